"Real sets in every format, and pictures of every kind."
import csv, json, os, subprocess, sys

import numpy as np
import pytest
from PIL import Image

from nbs_lib.coco import load_coco
from nbs_lib.deadletter import Letters
from nbs_lib.formats import WRITERS, export
from nbs_lib.images import decode_file
from nbs_lib.ingest import balanced, ingest

LIMITS = dict(classes=[], max_pixels=50_000_000, min_side=10, overhang=.1, on_bad_box="reject_box")


def take(out, root, format="auto", path=".", **options):
    "Ingest one source; the report, and the boxes without crowds by content of their picture."
    report = ingest(out, root=root, sources=[dict(path=path, format=format, **options)], **LIMITS)
    assert balanced(report)
    samples, _, _ = load_coco(out/"annotations.json", out/"images")
    rows = {s.path.name: s.boxes[~s.boxes.is_crowd] for s in samples}
    return report, {name: sorted(zip(b.label.tolist(), b.xyxy.tolist())) for name, b in rows.items()}


def letters(out): return list(Letters(out/"dead_letters.jsonl"))


def test_blood_cells_are_equal_in_voc_and_csv(real, tmp_path):
    (voc, one), (table, other), (found, third) = (take(tmp_path/f, real, f, "bccd") for f in ("voc", "csv", "auto"))
    assert one == other == third and (voc["boxes_kept"], len(one)) == (4886, 364)
    assert voc["letters"] == table["letters"] == {"empty_box": 2}
    assert found["recognised"]["bccd"].startswith("voc: ")


def test_coco_and_yolo_are_equal(real, tmp_path):
    (_, one), (_, other) = (take(tmp_path/f, real, f, "coco33_permissive") for f in ("coco", "yolo"))
    [unlabelled] = letters(tmp_path/"yolo")
    assert unlabelled.code == "missing_label" and sorted(map(len, one.values()))[0] == 0
    one = {name: boxes for name, boxes in one.items() if boxes}
    assert {n: [b[0] for b in boxes] for n, boxes in one.items()} == {n: [b[0] for b in boxes] for n, boxes in other.items()}
    off = [np.abs(np.array(a[1]) - b[1]).max() for name in one for a, b in zip(one[name], other[name])]
    assert len(off) == 243 and max(off) < .5  # this set's label files have six digits of a share, and whole pixels in the JSON


def test_playing_cards_whose_pictures_are_absent(real, tmp_path):
    (voc, one), (table, other) = (take(tmp_path/f, real, f, "playing_cards") for f in ("voc", "csv"))
    assert one == other and len(one) == 67 and sum(map(len, one.values())) == 143
    assert table["letters"] == {"missing_image": 296} and table["boxes_unused"] == 527
    assert {letter.file for letter in letters(tmp_path/"csv")} == {"images/train_labels.csv"}


def test_label_studio(real, tmp_path):
    report, _ = take(tmp_path/"out", real, "auto", "labelstudio_yolo")
    assert (report["samples"], report["duplicates"], report["boxes_kept"]) == (11, 1, 40)
    assert report["recognised"]["labelstudio_yolo"].startswith("yolo: ")


@pytest.mark.parametrize("format", WRITERS)
def test_what_is_written_is_read_back(real, tmp_path, format):
    "Real boxes and fractions of pixels; crowds where the format has a form for them."
    take(tmp_path/"set", real, "coco", "coco33_permissive")
    export(tmp_path/"set", tmp_path/"there", format)
    _, one = take(tmp_path/"one", real, "coco", "coco33_permissive")
    report, other = take(tmp_path/"back", tmp_path, "auto", "there")
    assert report["recognised"]["there"].startswith(format) and not report["letters"]
    assert report["boxes_kept"] == (246 if format in ("coco", "csv") else 243)
    exact = .01 if format == "yolo" else 0
    assert one.keys() == other.keys()
    for name in one: assert [(b[0], np.abs(np.array(b[1]) - c[1]).max() <= exact) for b, c in zip(one[name], other[name])] == [(b[0], True) for b in one[name]]


def test_every_odd_picture_has_its_code(real):
    "Pillow 13 raises at the first full decode of all that are marked; 18 PNG are marked well since a second try of the same object says nothing."
    folder, unlike = real/"badimages", []
    for row in csv.DictReader(open(folder/"manifest.csv")):
        found = decode_file(folder/row["file"])
        code, whole = getattr(found, "code", None), row["pil_full_decode_ok"] == "True"
        if row["pil_12_3_0_full_decode_ok"] != row["pil_full_decode_ok"]: continue
        if code == "too_many_pixels": assert "DecompressionBomb" in row["error"] or int(row["width"]) * int(row["height"]) > 50_000_000
        elif code == "too_small": assert min(int(row["width"]), int(row["height"])) < 10 and whole
        elif code == "unreadable_image" and whole: unlike.append(row)
        else: assert (code == "unreadable_image") == (not whole), row["file"]
    assert len(unlike) == 18 and all(row["format"] == "PNG" and row["exif_orientation"].startswith("err:") for row in unlike)
    for row in unlike:
        with pytest.raises((OSError, SyntaxError)), Image.open(folder/row["file"]) as image: image.load()


def test_the_memory_is_bounded_by_the_pixels(real, tmp_path):
    "A process that looks at all odd pictures, with a bound of 10 million pixels, stays far below what the largest of them would need."
    code = """import resource, sys
from pathlib import Path
from nbs_lib.images import decode_file
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for f in sorted(Path(sys.argv[1]).rglob("*.*")): decode_file(f, max_pixels=10_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, real/"badimages"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 8 + 60  # eight bytes a pixel, and what decoders need themselves


def test_exif_turns_the_boxes_that_were_drawn_on_the_stored_picture(real, tmp_path):
    "A bright rectangle, lying in all eight ways: the box is on it, whether it was drawn upright or as stored."
    source = tmp_path/"raw"
    source.mkdir()
    upright = Image.new("L", (60, 40))
    upright.paste(255, (10, 5, 30, 15))
    back = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    images, annotations = [], []
    for turn, method in back.items():
        stored, exif = upright.transpose(method), Image.Exif()
        exif[0x0112] = turn
        for kind, (size, box) in dict(stored=(stored.size, stored.getbbox()), upright=(upright.size, upright.getbbox())).items():
            stored.save(source/f"{turn}{kind}.jpg", quality=95, exif=exif, comment=kind)
            images.append(dict(id=len(images), file_name=f"{turn}{kind}.jpg", width=size[0], height=size[1]))
            annotations.append(dict(id=len(images), image_id=images[-1]["id"], category_id=1, bbox=[*box[:2], box[2] - box[0], box[3] - box[1]]))
    (source/"a.json").write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="x")])))
    _, found = take(tmp_path/"out", tmp_path, "coco", "raw")
    assert len(found) == 8 and all(boxes == [("x", [10, 5, 30, 15])] for boxes in found.values())


def test_compounds(tmp_path):
    "Records of the kind that chemists have: what was accepted silently elsewhere is a letter here, and twice is the same."
    raw = tmp_path/"raw"
    (raw/"images").mkdir(parents=True)
    for i in range(9): Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(raw/f"images/{i}.png")
    (raw/"images/8.png").write_text("not a picture")
    (tmp_path/"secret.png").write_bytes((raw/"images/0.png").read_bytes())
    row = lambda i, **more: dict(compound_id=i, image=f"images/{i}.png", num_rings=i % 4) | more
    rows = [row(0), row(1, image="images/missing_image.png"), dict(missing_key=7, image="images/2.png"), 3, row(4, num_rings=None), row(5, compound_id=2.7),
            row(0, image="images/6.png"), row(7, image="../secret.png"), row(8)]
    (raw/"compounds.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    source = dict(fields=dict(picture="image", id="compound_id", label="num_rings"), whole=True, background=True)
    report, found = take(tmp_path/"out", tmp_path, "jsonl", "raw", **source)
    codes = {letter.row: letter.code for letter in letters(tmp_path/"out") if letter.file == "compounds.json"}
    assert codes == {1: "missing_image", 2: "missing_key", 3: "malformed_record", 4: "missing_key", 5: "malformed_record", 6: "duplicate_id",
                     7: "path_escapes_source", 8: "unreadable_image"}
    assert [boxes for boxes in found.values() if boxes] == [[("0", [0, 0, 40, 40])]]
    before = (tmp_path/"out/dead_letters.jsonl").read_bytes()
    assert take(tmp_path/"out", tmp_path, "jsonl", "raw", **source)[0] == report and (tmp_path/"out/dead_letters.jsonl").read_bytes() == before


def test_odd_names(tmp_path):
    "Spaces, line breaks, emoji, upper-case endings, Windows' line ends and paths, a name that is no text: in every format that can hold them."
    raw = tmp_path/"raw"
    names = ["a b.JPG", "new\nline.jpg", "📷.Jpeg", "ünïcode.jpg", "-o.jpg", "per%cent.jpg"]
    (raw/"pics").mkdir(parents=True)
    for i, name in enumerate(names): Image.new("RGB", (40, 30), (9, 9, 30 * i)).save(raw/"pics"/name, "JPEG")
    os.rename(os.fsencode(raw/"pics/-o.jpg"), os.fsencode(raw/"pics") + b"/\xff.jpg")
    names[4] = os.fsdecode(b"\xff.jpg")
    coco = dict(images=[dict(id=i, file_name="pics\\" + n) for i, n in enumerate(names)], categories=[dict(id=1, name="x")],
                annotations=[dict(id=i, image_id=i, category_id=1, bbox=[1, 2, 3, 4]) for i in range(6)])
    files = {"coco": ("a.json", json.dumps(coco)), "yolo": ("classes.txt", "x\r\n"),
             "csv": ("a.csv", "image,class,x,y,w,h\r\n" + "".join(f'"C:\\shots\\pics\\{n}",x,1,2,3,4\r\n' for n in names)),
             "jsonl": ("a.jsonl", "".join(json.dumps(dict(image=f"pics/{n}", label="x", bbox=[1, 2, 3, 4])) + "\r\n" for n in names))}
    found = {}
    for format, (file, text) in files.items():
        (raw/file).write_bytes(text.encode("utf-8", "surrogateescape"))
        if format == "yolo":
            for n in names: (raw/"pics"/n).with_suffix(".txt").write_text(f"0 {2.5 / 40} {4 / 30} {3 / 40} {4 / 30}\r\n")
        report, found[format] = take(tmp_path/format, tmp_path, format, "raw")
        assert (report["samples"], report["letters"]) == (6, {}), format
        (raw/file).unlink()
    assert found["coco"] == found["csv"] == found["jsonl"] == found["yolo"]


def test_links_and_permissions(tmp_path):
    "What leads out of the source, and what may not be read, is told and not followed, in a process without root's rights."
    raw, outside = tmp_path/"raw", tmp_path/"outside"
    for folder in (raw/"closed", raw/"images", raw/"labels", outside): folder.mkdir(parents=True)
    for i, name in enumerate(["a", "b", "c", "d"]):
        Image.new("RGB", (40, 30), (50 * i, 0, 0)).save(raw/f"images/{name}.jpg")
        (raw/f"labels/{name}.txt").write_text("0 .5 .5 .2 .2\n")
    Image.new("RGB", (40, 30)).save(outside/"s.jpg")
    (raw/"images/link.jpg").symlink_to(outside/"s.jpg")
    (raw/"away").symlink_to(outside)
    (raw/"images/inside.jpg").symlink_to("d.jpg")
    (raw/"labels/inside.txt").write_text("0 .5 .5 .2 .2\n")
    (raw/"classes.txt").write_text("x\n")
    (raw/"notes.txt").write_text("3 trays")
    for path in ("images/a.jpg", "labels/b.txt", "closed", "notes.txt"): (raw/path).chmod(0)
    code = """import json, os, sys
from nbs_lib.ingest import ingest
raw, *outs = sys.argv[1:]
for out in outs:
    report = ingest(out, root=raw, sources=[dict(path='.', format='yolo')], **json.loads(os.environ['LIMITS']))
    if os.getuid() == 0: os.setuid(65534)  # only now: Python itself may lie where only root can look
print(json.dumps(report))"""
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents[:3]: folder.chmod(0o755)
    command = [sys.executable, "-c", code, raw, tmp_path/"warm", tmp_path/"out"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LIMITS": json.dumps(LIMITS)})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    found = sorted((letter.code, letter.level, letter.file) for letter in letters(tmp_path/"out"))
    assert found == [("path_escapes_source", "file", "away"), ("path_escapes_source", "picture", "images/link.jpg"), ("unreadable_file", "file", "closed"),
                     ("unreadable_file", "file", "notes.txt"), ("unreadable_file", "picture", "labels/b.txt"), ("unreadable_image", "picture", "labels/a.txt")]
    assert (report["samples"], report["duplicates"], report["pictures"]) == (2, 1, 6)
