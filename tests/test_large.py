"What takes minutes or a gigabyte: `make test-large`."
import json, os, signal, sqlite3, subprocess, sys, time

import numpy as np
import pytest
from PIL import Image

from nbs_lib.deadletter import Letters

pytestmark = [pytest.mark.large, pytest.mark.timeout(1800)]
GB = 1 << 30
INGEST = """import json, resource, sys
from pathlib import Path
from nbs_lib.ingest import ingest
raw, out, cache, format = sys.argv[1:]
report = ingest(Path(out), Path(cache), root=Path(raw), sources=[dict(path=".", format=format)], classes=[], max_pixels=50_000_000, min_side=10,
                overhang=.1, on_bad_box="reject_box")
print(json.dumps(dict(report, megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)))"""


def start(*args): return subprocess.Popen([sys.executable, "-c", INGEST, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def ingested(*args):
    process = start(*args)
    said = process.communicate()[0]
    assert process.returncode == 0
    return json.loads(said.splitlines()[-1])


def rows_of(format, file, size):
    "Write records of 50,000 pictures, a thousand of which are there, until the file has this size; how many there are."
    box = lambda i: [i % 600 + .5, i % 400 + .25, 20.5, 30.5]
    name = lambda i: f"{i * 7919 % 50_000:05}.jpg"
    row = {"coco": lambda i: json.dumps(dict(id=i, image_id=i * 7919 % 50_000, category_id=1, bbox=box(i), area=625.25, iscrowd=0, segmentation=[[1.5] * 8])),
           "csv": lambda i: f"{name(i)},cell,{','.join(map(str, box(i)))},drawn by hand with some care, and looked at twice by two people\n",
           "jsonl": lambda i: json.dumps(dict(image=name(i), label="cell", bbox=box(i), note="drawn by hand with some care")) + "\n"}[format]
    n = 0
    if format == "coco":
        images = [dict(id=i, file_name=f"{i:05}.jpg") for i in range(50_000)]
        file.write('{"categories": [{"id": 1, "name": "cell"}], "images": ' + json.dumps(images) + ', "annotations": [' + row(0))
    if format == "csv": file.write("image,class,x,y,w,h,note,more\n")
    while file.tell() < size:
        some = [row(i) for i in range(n + 1, n + 100_001)]
        file.write("".join(f", {r}" for r in some) if format == "coco" else "".join(some))
        n += len(some)
    if format == "coco": file.write("]}")
    return n + (format == "coco")


@pytest.mark.parametrize("format, file", [("coco", "instances.json"), ("csv", "rows.csv"), ("jsonl", "rows.jsonl")])
def test_an_annotation_file_of_a_gigabyte(tmp_path, format, file):
    raw = tmp_path/"raw"
    raw.mkdir()
    for i in range(1000): Image.new("RGB", (640, 480)).save(raw/f"{i:05}.jpg", comment=str(i))
    with open(raw/file, "w") as f: n = rows_of(format, f, GB)
    begin = time.monotonic()
    report = ingested(raw, tmp_path/"out", tmp_path/"cache", format)
    print(f"\n{format}: {n} boxes, {report['megabytes']} MB, {time.monotonic() - begin:.0f} s")
    assert (report["boxes"], report["samples"], report["letters"]) == (n, 1000, {"missing_image": 49_000})
    assert report["megabytes"] < 2000


def test_a_million_letters(workspace):
    "The report stays readable, and the command line quick."
    raw = workspace/"data/raw/rows"
    raw.mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(raw/"a.jpg")
    with open(raw/"rows.csv", "w") as f:
        f.write("image,class,x,y,w,h\na.jpg,cell,1,2,30,40\n")
        f.writelines(f"a.jpg,cell,{i},2,0,40\n" for i in range(1_000_000))
    workspace.set(fetch=dict(kind="none"), ingest=dict(sources=[dict(path="rows", format="csv")]))
    for stage in ("fetch", "ingest"): workspace.run("python", "-m", "flows.stage", stage)
    assert workspace.report("ingest")["letters"] == {"empty_box": 1_000_000}
    page = workspace/"data/runs/latest/20_ingest.html"
    assert page.stat().st_size < 3 << 20
    begin = time.monotonic()
    said = workspace.run("nbs", "letters", "--limit", "3")
    print(f"\nnbs letters: {time.monotonic() - begin:.0f} s; the page has {page.stat().st_size >> 10} kB")
    told = [line for line in said.splitlines() if "empty_box" in line]
    assert told[0].startswith(" 1000000  empty_box") and len(told) == 4 and "and 999997 more" in said
    assert len(Letters(workspace/"data/interim/dead_letters.jsonl")) == 1_000_000


def test_killed_among_twenty_thousand_pictures(tmp_path):
    "KILL in the middle, run again: the result of an undisturbed run, and what was checked is not checked again."
    raw, rng = tmp_path/"raw", np.random.default_rng(0)
    raw.mkdir()
    (raw/"classes.txt").write_text("cell\n")
    coarse = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).resize((640, 480))
    for i in range(20_000):
        coarse.save(raw/f"{i:05}.jpg", comment=str(i))
        (raw/f"{i:05}.txt").write_text("0 .5 .5 .2 .2\n")

    def checked():
        for db in (tmp_path/"cache").glob("*.sqlite"):
            return sqlite3.connect(f"file:{db}?mode=ro", uri=True).execute("SELECT count(*) FROM pictures").fetchone()[0]
        return 0

    process = start(raw, tmp_path/"out", tmp_path/"cache", "yolo")
    while checked() < 8000: time.sleep(.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    known = checked()
    again = start(raw, tmp_path/"out", tmp_path/"cache", "yolo")
    said = again.communicate()[0]
    ingested(raw, tmp_path/"undisturbed", tmp_path/"another", "yolo")
    content = lambda out: {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    one, other = content(tmp_path/"out"), content(tmp_path/"undisturbed")
    print(f"\n{known} of 20,000 were known")
    assert f"{known} of 20000 pictures were checked before" in said and 8000 <= known < 20_000
    assert one.keys() == other.keys() and all(one[k] == other[k] for k in one)
