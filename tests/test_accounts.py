"Whatever an annotation file holds, ingest raises nothing, and every picture and box is accounted for."
import json, os, re, shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from nbs_lib.coco import load_coco
from nbs_lib.deadletter import Letters, Patches
from nbs_lib.formats import export
from nbs_lib.ingest import balanced, ingest

LIMITS = dict(classes=[], max_pixels=10**6, min_side=10, overhang=.1, on_bad_box="reject_box")
NAMES = ["a.jpg", "b.jpg", "B.JPG", "gone.jpg", "sub/c.png", "../out.jpg", "/etc/hostname", "html.jpg", "line\nbreak.jpg", "dir.jpg", "loop.jpg", "$x_$.jpg"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A source with good and bad pictures, links and oddly named files."
    root = tmp_path_factory.mktemp("accounts")/"raw"
    (root/"sub").mkdir(parents=True)
    for i, name in enumerate(["a.jpg", "b.jpg", "sub/c.png", "line\nbreak.jpg", "$x_$.jpg"]): Image.new("RGB", (40, 30), (40 * i, 9, 9)).save(root/name)
    (root/"html.jpg").write_text("<html>")
    (root/"dir.jpg").mkdir()
    os.symlink("loop.jpg", root/"loop.jpg")
    Image.new("RGB", (40, 30)).save(root.parent/"out.jpg")
    return root


ODD = st.one_of(st.none(), st.booleans(), st.integers(-2, 60), st.floats(), st.text(max_size=4), st.just(10**400), st.just("\ud800"),
                st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2))


def mostly(good, odd=ODD):
    "Mostly what is expected, one time in ten anything: else hardly a record would get as far as its picture."
    return st.integers(0, 9).flatmap(lambda dice: odd if dice == 9 else good)


def record(**fields): return mostly(st.fixed_dictionaries(fields), st.fixed_dictionaries({}, optional=fields) | ODD)


ID = mostly(st.integers(0, 4))
BBOX = mostly(st.tuples(*[mostly(st.floats(0, 15) | st.integers(0, 15), st.floats() | st.integers())] * 4).map(list))
IMAGE = record(id=ID, file_name=mostly(st.sampled_from(NAMES)), split=mostly(st.sampled_from(["train", "valid", "test"])))
BOX = record(id=mostly(st.integers(0, 99)), image_id=ID, category_id=ID, bbox=BBOX, iscrowd=ODD)
CATEGORY = record(id=ID, name=mostly(st.sampled_from(["cat", "dog", "cat"])))
COCO = st.fixed_dictionaries(dict(images=mostly(st.lists(IMAGE, max_size=6)), annotations=mostly(st.lists(BOX, max_size=9)),
                                  categories=mostly(st.lists(CATEGORY, min_size=3, max_size=6))))
NUMBER = mostly(st.integers(-2, 45).map(str), st.sampled_from(["", "nan", "1e999", "left", "3,5", " 7 "]))
OBJECT = st.tuples(mostly(st.just("<name>RBC</name>"), st.sampled_from(["<name/>", ""])), *[NUMBER] * 4).map(
    lambda o: f"<object>{o[0]}<bndbox><xmin>{o[1]}</xmin><ymin>{o[2]}</ymin><xmax>{o[3]}</xmax><ymax>{o[4]}</ymax></bndbox></object>")
VOC = st.tuples(st.sampled_from([*NAMES, ""]), st.lists(OBJECT, max_size=6)).map(
    lambda v: f"<annotation><filename>{v[0]}</filename>{''.join(v[1])}</annotation>")
BROKEN = st.sampled_from(["", "<html/>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>", "<annotation>" + "<object>" * 3000])
XML = (VOC | VOC.map(lambda text: text[:len(text) // 2]) | BROKEN).map(str.encode)
LABEL = st.lists(st.lists(mostly(st.integers(0, 2).map(str) | st.floats(0, 1).map(str), st.sampled_from(["", "nan", "-1e999", "x", "1.5", "\0"])),
                          min_size=4, max_size=8).map(" ".join), max_size=5).map("\r\n".join)
LABELS = st.dictionaries(st.sampled_from(["a.txt", "b.txt", "sub/c.txt", "html.txt", "labels/gone.txt"]), LABEL.map(str.encode) | st.binary(max_size=20))
YAML = mostly(st.sampled_from(["names: [cat, dog, bird]", "names: {0: cat, 2: dog}\ntrain: sub\nval: [., sub]", "names: [cat, dog]\ntest: a.txt\npath: /"]),
              st.sampled_from(["names: 3", "names: [", "- 1", "train: [1, {a: b}]\nnames: {x: y, 1: ''}", ""])).map(str)

CELL = mostly(st.sampled_from([*NAMES, "cat", "dog", "1", "12", "3,5", ".5", "0.25"]),
              st.sampled_from(["", "nan", "1e999", "-7", '"', "a\x00b", ";", "\udcff"]))
HEADERS = ["image,class,xmin,ymin,xmax,ymax", "file;label;x;y;w;h", "img\tname\tbbox", "filename,width,height,cx,cy,w,h,category,iscrowd"]
TABLE = st.tuples(st.sampled_from(HEADERS), st.lists(st.lists(CELL, min_size=2, max_size=9), min_size=1, max_size=9)).map(
    lambda t: "\r\n".join([t[0], *(re.search(r"[,;\t]", t[0])[0].join(row) for row in t[1])]))
OBJECT_JSON = record(label=mostly(st.sampled_from(["cat", "dog", 3])), bbox=BBOX, iscrowd=ODD)
ROW = record(image=mostly(st.sampled_from(NAMES)), id=ID, objects=mostly(st.lists(OBJECT_JSON, max_size=4) | st.fixed_dictionaries(
    dict(bbox=st.lists(BBOX, max_size=3), category=st.lists(ID, max_size=3)))), width=ODD, height=ODD, split=mostly(st.sampled_from(["train", "test"])))
INSIDE = record(data=mostly(st.sampled_from(["R0lGODlhAQABAAAAACw=", "data:image/png;base64,iVBORw0KGgo=", "####"])), label=st.just("cat"), bbox=BBOX)
ON_BAD_BOX = st.sampled_from(["reject_box", "reject_image"])

FEW = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def check(root, out, format, bad="reject_box", cache=None, patches=None, **options):
    "Ingest, and read back all that it wrote."
    report = ingest(out, cache, patches, root=root, sources=[dict(path=".", format=format, **options)], **{**LIMITS, "on_bad_box": bad})
    samples, names, info = load_coco(out/"annotations.json", out/"images")
    letters = Letters(out/"dead_letters.jsonl")
    assert balanced(report) and info == json.loads(json.dumps(report))
    assert len(samples) == report["samples"] and sum(len(s.boxes) for s in samples) == report["boxes_kept"]
    assert len(letters) == report["picture_letters"] + report["box_letters"] + report["file_letters"]
    assert all((s.boxes.xyxy[:, 2:] > s.boxes.xyxy[:, :2]).all() for s in samples)
    assert {p.name for p in (out/"images").iterdir()} == {s.path.name for s in samples}
    json.dumps([vars(letter) for letter in letters], allow_nan=False)
    return report


@FEW
@given(coco=COCO, bad=ON_BAD_BOX)
def test_coco(pictures, tmp_path, coco, bad):
    files = pictures/"instances.json"
    try:
        files.write_text(json.dumps(coco), encoding="utf-8")
        check(pictures, tmp_path/"out", "coco", bad)
    finally: files.unlink()


@FEW
@given(xml=st.lists(XML, min_size=1, max_size=4), bad=ON_BAD_BOX)
def test_voc(pictures, tmp_path, xml, bad):
    files = [pictures/f"{name}.xml" for name, _ in zip("abcd", xml)]
    try:
        for file, content in zip(files, xml): file.write_bytes(content)
        check(pictures, tmp_path/"out", "voc", bad)
    finally:
        for file in files: file.unlink()


@FEW
@given(labels=LABELS, yaml=YAML, background=st.booleans(), bad=ON_BAD_BOX)
def test_yolo(pictures, tmp_path, labels, yaml, background, bad):
    files = [pictures/name for name in ("classes.txt", "data.yaml", *labels)]
    (pictures/"labels").mkdir(exist_ok=True)
    try:
        for file, content in zip(files, [b"cat\ndog\nbird", yaml.encode(), *labels.values()]): file.write_bytes(content)
        check(pictures, tmp_path/"out", "yolo", bad, background=background)
    finally:
        for file in files: file.unlink()


@FEW
@given(table=TABLE, background=st.booleans(), unit=st.sampled_from([None, "share", "pixels"]), bad=ON_BAD_BOX)
def test_csv(pictures, tmp_path, table, background, unit, bad):
    file = pictures/"train.csv"
    try:
        file.write_bytes(table.encode("utf-8", "surrogateescape"))
        check(pictures, tmp_path/"out", "csv", bad, background=background, unit=unit)
    finally: file.unlink()


@FEW
@given(rows=st.lists(ROW | INSIDE, min_size=1, max_size=6), lines=st.booleans(), cut=st.integers(0, 9), options=st.fixed_dictionaries({}, optional=dict(
    background=st.booleans(), whole=st.booleans(), fields=st.just(dict(id="id")), box=st.sampled_from(["xyxy", "cxcywh"]))), bad=ON_BAD_BOX)
def test_records(pictures, tmp_path, rows, lines, cut, options, bad):
    rows = [*rows, dict(image="a.jpg")]
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    file = pictures/("r.jsonl" if lines else "r.json")
    try:
        file.write_text(text[cut:] if cut > 7 and lines else text)
        check(pictures, tmp_path/"out", "jsonl", bad, **options)
    finally: file.unlink()


@settings(FEW, max_examples=100)
@given(coco=COCO, data=st.data())
def test_decisions(pictures, tmp_path, coco, data):
    "Whatever people decide, the account adds up: what they drop is in neither side of it, and what they replace is judged again."
    file, out = pictures/"instances.json", tmp_path/"out"
    try:
        file.write_text(json.dumps(coco), encoding="utf-8")
        before = check(pictures, out, "coco")
        patches = Patches()
        letters = list(Letters(out/"dead_letters.jsonl"))  # two equal records have one id, and one decision
        for letter in letters:
            action = data.draw(st.sampled_from(["drop", "replace", None]))
            value = data.draw(BOX | IMAGE | ODD | st.just({"picture": "b.jpg"})) if action == "replace" else None
            if action: patches.by_id[letter.id] = dict(id=letter.id, action=action, value=value)
        after = check(pictures, out, "coco", patches=patches)
        assert sum(after["patches"][k] for k in ("dropped", "replaced", "failed")) + len(after["patches"]["stale"]) == len(patches.by_id)
        dropped = sum(letter.level == "picture" and patches.outcome.get(letter.id) == "dropped" for letter in letters)
        assert 0 <= before["pictures"] - after["pictures"] <= dropped
    finally: file.unlink()


def mutated(rng, text):
    "A text with a few of the slips that editors, exports and disks make."
    for _ in range(rng.integers(1, 4)):
        i, j = sorted(rng.integers(0, len(text) + 1, 2))
        j = min(j, i + 40)
        text = [text[:i] + text[j:], text[:j] + text[i:], text[:i] + rng.choice(["nan", "-1", "1e400", '"', "<", "\0", "{}", "é", ",", " "]) + text[i:],
                text[:i] + chr(rng.integers(0, 300)) + text[i + 1:], text[:i] if rng.random() < .02 else text][rng.integers(5)]
    return text


def mutated_json(rng, value, share):
    "A value of which a share was replaced, dropped or repeated, at any depth."
    if rng.random() < share: return [None, -1, 1e300, float("nan"), "x", [], {}, True, 10**30][rng.integers(9)]
    if isinstance(value, dict): return {k: mutated_json(rng, v, share) for k, v in value.items() if rng.random() > share}
    if isinstance(value, list): return [mutated_json(rng, v, share) for v in value for _ in range(1 + (rng.random() < share))]
    return value


def test_a_hundred_thousand_mutated_records(real, tmp_path):
    "The blood cells in five formats, mutated again and again."
    cache, rng, records = tmp_path/"cache", np.random.default_rng(0), 0
    ingest(tmp_path/"set", cache, root=real, sources=[dict(path="bccd", format="voc")], **LIMITS)
    for format in ("coco", "voc", "yolo", "csv", "jsonl"):
        source = tmp_path/format
        if format == "jsonl":
            source.mkdir()
            samples, _, _ = load_coco(tmp_path/"set/annotations.json", tmp_path/"set/images")
            for s in samples: shutil.copyfile(s.path, source/s.path.name)
            rows = (dict(image=s.path.name, objects=[dict(label=n, bbox=b.tolist()) for n, b in zip(s.boxes.label.tolist(), s.boxes.xyxy)]) for s in samples)
            (source/"train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else: export(tmp_path/"set", source, format)
        files = {f: f.read_text() for f in sorted(source.rglob("*")) if f.suffix in (".json", ".xml", ".txt", ".csv", ".jsonl")}
        for _ in range(5):
            for file, text in files.items():
                if file.suffix == ".json": new = json.dumps(mutated_json(rng, json.loads(text), .003))
                elif file.suffix in (".csv", ".jsonl"): new = "\n".join(mutated(rng, line) if rng.random() < .1 else line for line in text.splitlines())
                else: new = mutated(rng, text) if rng.random() < .3 and file.name != "classes.txt" else text
                file.write_text(new, encoding="utf-8", errors="replace")
            report = check(source, tmp_path/"out", format, cache=cache)
            records += report["pictures"] + report["boxes"] + report["file_letters"]
            assert report["letters"] and report["samples"], (format, report)
    assert records >= 100_000
