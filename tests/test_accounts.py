"Whatever an annotation file holds, ingest raises nothing, and every picture and box is accounted for."
import json, os

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from nbs_lib.coco import load_coco
from nbs_lib.deadletter import Letters
from nbs_lib.ingest import balanced, ingest

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

FEW = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def check(root, out, format, bad="reject_box", **options):
    "Ingest, and read back all that it wrote."
    report = ingest(out, root=root, sources=[dict(path=".", format=format, **options)], classes=[], max_pixels=10**6, min_side=10, overhang=.1, on_bad_box=bad)
    samples, names, info = load_coco(out/"annotations.json", out/"images")
    letters = Letters(out/"dead_letters.jsonl")
    assert balanced(report) and info == json.loads(json.dumps(report))
    assert len(samples) == report["samples"] and sum(len(s.boxes) for s in samples) == report["boxes_kept"]
    assert len(letters) == report["picture_letters"] + report["box_letters"] + report["file_letters"]
    assert all((s.boxes.xyxy[:, 2:] > s.boxes.xyxy[:, :2]).all() for s in samples)
    assert {p.name for p in (out/"images").iterdir()} == {s.path.name for s in samples}
    json.dumps([vars(letter) for letter in letters], allow_nan=False)


@FEW
@given(coco=COCO)
def test_coco(pictures, tmp_path, coco):
    files = pictures/"instances.json"
    try:
        files.write_text(json.dumps(coco), encoding="utf-8")
        check(pictures, tmp_path/"out", "coco")
    finally: files.unlink()


@FEW
@given(xml=st.lists(XML, min_size=1, max_size=4))
def test_voc(pictures, tmp_path, xml):
    files = [pictures/f"{name}.xml" for name, _ in zip("abcd", xml)]
    try:
        for file, content in zip(files, xml): file.write_bytes(content)
        check(pictures, tmp_path/"out", "voc")
    finally:
        for file in files: file.unlink()


@FEW
@given(labels=LABELS, yaml=YAML, background=st.booleans())
def test_yolo(pictures, tmp_path, labels, yaml, background):
    files = [pictures/name for name in ("classes.txt", "data.yaml", *labels)]
    (pictures/"labels").mkdir(exist_ok=True)
    try:
        for file, content in zip(files, [b"cat\ndog\nbird", yaml.encode(), *labels.values()]): file.write_bytes(content)
        check(pictures, tmp_path/"out", "yolo", background=background)
    finally:
        for file in files: file.unlink()
