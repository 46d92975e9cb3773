"`nbs` as people and programs call it."
import json, resource, subprocess, sys
from dataclasses import replace
from pathlib import Path

from nbs_lib.coco import load_coco

NBS = Path(sys.executable).parent/"nbs"


def nbs(*args, status=0):
    done = subprocess.run([NBS, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_ingest_blood_cells(real, tmp_path):
    report = json.loads(nbs("ingest", real/"bccd", "--format", "voc", "--out", tmp_path/"out", "--json"))
    assert (report["pictures"], report["samples"], report["boxes_kept"], report["letters"]) == (364, 364, 4886, {"empty_box": 2})
    coco = json.loads((tmp_path/"out/annotations.json").read_text())
    assert [a["id"] for a in coco["annotations"]] == list(range(1, 4887))
    assert all((tmp_path/"out/images"/im["file_name"]).exists() for im in coco["images"])
    letters = json.loads(nbs("letters", "--file", tmp_path/"out/dead_letters.jsonl", "--json"))
    assert [(l["code"], l["file"]) for l in letters] == [("empty_box", f"BCCD/Annotations/BloodImage_{n}.xml") for n in ("00338", "00343")]


def boxes(folder):
    "Boxes without crowds, by content of their picture."
    samples, _, _ = load_coco(folder/"annotations.json", folder/"images")
    rows = {s.path.name: sorted(zip(s.boxes.label.tolist(), s.boxes.xyxy.tolist())) for s in (replace(s, boxes=s.boxes[~s.boxes.is_crowd]) for s in samples)}
    return [(name, label, xyxy) for name, found in sorted(rows.items()) for label, xyxy in found]


def test_coco_and_yolo_are_equal(real, tmp_path):
    "33 pictures of COCO, annotated in both: equal boxes within half a pixel; the picture without boxes has no label file."
    for format in ("coco", "yolo"): nbs("ingest", real/"coco33_permissive", "--format", format, "--out", tmp_path/format)
    letters = json.loads(nbs("letters", "--file", tmp_path/"yolo/dead_letters.jsonl", "--json"))
    assert [letter["code"] for letter in letters] == ["missing_label"]
    coco, yolo = boxes(tmp_path/"coco"), boxes(tmp_path/"yolo")
    assert len(coco) == 243 and [box[:2] for box in coco] == [box[:2] for box in yolo]
    assert max(abs(a - b) for one, other in zip(coco, yolo) for a, b in zip(one[2], other[2])) < .5
    nbs("export", tmp_path/"again", "--set", tmp_path/"coco", "--format", "yolo")
    nbs("ingest", tmp_path/"again", "--format", "yolo", "--out", tmp_path/"back")
    assert max(abs(a - b) for one, other in zip(coco, boxes(tmp_path/"back")) for a, b in zip(one[2], other[2])) < .01


def test_label_studio(real, tmp_path):
    "Two exports with a class list each; one picture is in both."
    report = json.loads(nbs("ingest", real/"labelstudio_yolo", "--format", "yolo", "--out", tmp_path/"out", "--json"))
    account = {k: report[k] for k in ("pictures", "samples", "duplicates", "boxes", "boxes_kept", "letters")}
    assert account == dict(pictures=12, samples=11, duplicates=1, boxes=44, boxes_kept=40, letters={})


def test_evaluate_coco(real):
    "COCO's own detections on COCO's own pictures give COCO's own numbers."
    case = real/"cocoeval/A_val2014_fake100"
    files = "--truth", case/"instances_val2014_100.json", "--detections", case/"instances_val2014_fakebbox100_results.json"
    found = json.loads(nbs("evaluate", *files, "--json"))
    published = json.loads((case/"expected.json").read_text())["published"]
    for theirs, number in published.items(): assert abs(found[theirs.replace("AP", "map").replace("AR", "mar")] - number) < 1e-4, theirs


def test_wrong_calls(tmp_path):
    (tmp_path/"empty").mkdir()
    assert "no such folder" in nbs("ingest", tmp_path/"absent", "--format", "coco", "--out", tmp_path/"o", status=2)
    assert "is empty" in nbs("ingest", tmp_path/"empty", "--format", "coco", "--out", tmp_path/"o", status=2)
    assert "Did you mean 'coco'?" in nbs("ingest", tmp_path/"empty", "--format", "coc", "--out", tmp_path/"o", status=2)
    assert "no such file" in nbs("letters", "--file", tmp_path/"absent.jsonl", status=2)
    (tmp_path/"t.json").write_text("{")
    assert "not JSON" in nbs("evaluate", "--truth", tmp_path/"t.json", "--detections", tmp_path/"t.json", status=2)


def test_letters_load_no_torch(tmp_path):
    (tmp_path/"l.jsonl").touch()
    code = """import sys
from nbs_lib.cli import main
try: main()
except SystemExit as end: assert not end.code
assert not {"torch", "ultralytics", "pandas"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code, "letters", "--file", tmp_path/"l.jsonl"], check=True)


def test_a_full_disk_is_one_line(tmp_path):
    "As far as a limit on the size of files goes: so many letters do not fit into the memory."
    (tmp_path/"in").mkdir()
    (tmp_path/"in/boxes.csv").write_text("image,label,xmin,ymin,xmax,ymax\n" + "".join(f"{i}.jpg,cat,1,1,9,9\n" for i in range(30_000)))
    done = subprocess.run([NBS, "ingest", tmp_path/"in", "--format", "csv", "--out", tmp_path/"out"], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr and said.startswith("nbs: ") and "TMPDIR" in said, done.stderr
    assert not (tmp_path/"out/dead_letters.jsonl").exists()
