"Scores against published numbers and against another scorer, the account of errors, and the tables of an evaluation."
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import HealthCheck, given, settings, strategies as st
from typer.testing import CliRunner

from nbs_lib.boxes import Boxes, Sample, iou
from nbs_lib.cli import app
from nbs_lib.config import read_json, write_json
from nbs_lib.evaluate import COLUMNS, KINDS, assess, confusion, judge, judge_all, read_errors, slices, suspects
from nbs_lib.evaluate import _write as write_tables
from nbs_lib.metrics import bootstrap, coco_form, interval, match_coco, match_samples, score, score_coco, voc_ap

OFTEN = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def coco_case(real):
    "COCO's own fake detections, and the numbers that COCO publishes for them."
    case = real/"cocoeval/A_val2014_fake100"
    files = ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json", "expected.json")
    return [read_json(case/name) for name in files]


def test_coco_to_the_last_digit(coco_case):
    "The twelve numbers and every class, whatever ids the annotations have."
    truth, found, expected = coco_case
    renumbered = dict(truth, annotations=[dict(a, id=i) for i, a in enumerate(truth["annotations"])])
    for scores in (score_coco(truth, found), score_coco(renumbered, found)):
        for theirs, number in expected["published"].items():
            assert abs(scores.numbers[theirs.replace("AP", "map").replace("AR", "mar")] - number) < 1e-9, theirs
        for theirs, number in expected["per_class_AP"].items(): assert abs(scores.by_class[theirs.split("#")[0]]["map"] - number) < 1e-9, theirs
    assert set(score_coco(truth, []).numbers.values()) == {0.}


def test_matched_once_scores_the_same(coco_case):
    truth, found, expected = coco_case
    matched = match_coco(truth, found)
    [(map, map50)] = matched.scores(np.ones((1, 100), int))
    assert abs(map - expected["published"]["AP"]) < 1e-9 and abs(map50 - expected["published"]["AP50"]) < 1e-9
    values = bootstrap(matched, resamples=200)[0]
    low, high = interval(values[:, 0])
    assert low < map < high and len(set(values[:, 0])) > 100
    assert (bootstrap(matched, match_coco(truth, found), resamples=20)[0] == values[:20]).all()


@pytest.fixture
def voc_case(real, tmp_path):
    "A case of Pascal VOC's AP as COCO files: lines of class, [score,] left, top, width, height."
    case, images, annotations, found = real/"cocoeval/C_padilla_voc_case1", [], [], []
    for i, path in enumerate(sorted((case/"gts").iterdir())):
        images.append(dict(id=i, file_name=path.stem))
        numbers = lambda file: [[float(v) for v in line.split()[1:]] for line in file.read_text().splitlines() if line.strip()]
        annotations += [dict(id=len(annotations) + n, image_id=i, category_id=7, bbox=row) for n, row in enumerate(numbers(path))]
        found += [dict(image_id=i, category_id=7, bbox=row, score=score) for score, *row in numbers(case/"dets"/path.name)]
    truth = dict(images=images, annotations=annotations, categories=[dict(id=7, name="object")])
    return write_json(tmp_path/"truth.json", truth), write_json(tmp_path/"found.json", found), read_json(case/"expected.json")


@pytest.mark.parametrize("iou", ["0.1", "0.3", "0.5", "0.75"])
@pytest.mark.parametrize("ap, key", [("voc-all", "all_point"), ("voc-11", "eleven_point")])
def test_voc_to_the_last_digit(voc_case, ap, key, iou):
    truth, found, expected = voc_case
    said = CliRunner().invoke(app, ["evaluate", "--truth", str(truth), "--detections", str(found), "--ap", ap, "--iou", iou, "--json"])
    result = json.loads(said.stdout)
    for number in (expected["recomputed"][iou][key], expected[f"published_{key}"][iou]):
        assert result["ap"] == pytest.approx(number, rel=1e-9)
    assert result["by_class"] == dict(object=dict(boxes=15, ap=result["ap"]))
    if iou == "0.3": assert voc_ap(read_json(truth), read_json(found), iou=.3, points="all", inclusive=False)["ap"] != pytest.approx(result["ap"], rel=1e-3)


BOX = st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(2, 9), st.integers(4, 9)).map(list)
CLASS, PICTURE = st.integers(1, 2), st.integers(0, 2)


def coco(images, boxes):
    return dict(images=[dict(id=i) for i in images], categories=[dict(id=i, name="abc"[i - 1]) for i in (1, 2, 3)],
                annotations=[dict(id=i, image_id=p, category_id=c, bbox=b, iscrowd=int(crowd)) for i, (p, c, b, crowd) in enumerate(boxes)])


def another_scorer(truth, found):
    "The twelve numbers of faster-coco-eval. It takes an annotation with id 0 for an unmatched one."
    usual = lambda a: dict(area=a["bbox"][2] * a["bbox"][3]) | a
    them = COCO({**truth, "annotations": [usual(a) | dict(id=i) for i, a in enumerate(truth["annotations"], 1)]})
    judge = COCOeval_faster(them, them.loadRes([dict(d) for d in found]), "bbox", print_function=lambda *a: None)
    judge.evaluate(); judge.accumulate(); judge.summarize()
    return judge.stats


@OFTEN
@given(boxes=st.lists(st.tuples(PICTURE, CLASS, BOX, st.integers(0, 4).map(lambda dice: dice == 4)), max_size=16),
       found=st.lists(st.tuples(PICTURE, CLASS, BOX, st.integers(0, 30)), max_size=30), copies=st.integers(1, 60), scale=st.sampled_from([1, 4, 12]))
def test_scores_as_another_scorer(boxes, found, copies, scale):
    "Crowds, equal scores, all sizes, more than a hundred detections on a picture: all numbers, and what was matched once."
    larger = lambda rows: [(p, c, [v * scale for v in b], more) for p, c, b, more in rows]
    truth = coco(range(3), larger(boxes))
    found = [dict(image_id=p, category_id=c, bbox=b, score=s / 30) for p, c, b, s in larger(found)] * copies
    numbers = score_coco(truth, found).numbers
    assert np.abs(np.array([*numbers.values()]) - another_scorer(truth, found)).max() < 1e-9
    for one, k in zip(match_coco(truth, found).scores(np.ones((1, 3), int))[0], ("map", "map50")):
        assert abs((-1. if np.isnan(one) else one) - numbers[k]) < 1e-9


@OFTEN
@given(boxes=st.lists(st.tuples(PICTURE, CLASS, BOX, st.just(False)), min_size=1, max_size=16),
       found=st.lists(st.tuples(PICTURE, CLASS, BOX), max_size=30), draw=st.lists(PICTURE, min_size=3, max_size=3))
def test_a_draw_scores_as_its_pictures(boxes, found, draw):
    "A weight of n scores as if the picture were there n times; one of 0, as if it were not there."
    found = [dict(image_id=p, category_id=c, bbox=b, score=1 - i / 40) for i, (p, c, b) in enumerate(found)]
    [values] = match_coco(coco(range(3), boxes), found).scores(np.array([[draw.count(p) for p in range(3)]]))
    places = lambda p: [i for i, q in enumerate(draw) if q == p]
    drawn = coco(range(3), [(i, *rest) for p, *rest in boxes for i in places(p)])
    numbers = score_coco(drawn, [dict(d, image_id=i) for d in found for i in places(d["image_id"])]).numbers
    for one, k in zip(values, ("map", "map50")): assert abs((-1. if np.isnan(one) else one) - numbers[k]) < 1e-9


NAMES = ["cat", "dog", "größe, \"x\"\n"]
EDGES = BOX.map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
TRUE = st.lists(st.tuples(EDGES, st.sampled_from(NAMES), st.integers(0, 5).map(lambda dice: dice == 5)), max_size=7)
FOUND = st.lists(st.tuples(EDGES, st.sampled_from(NAMES), st.integers(0, 20).map(lambda s: s / 20)), max_size=9)
PAIRS = st.lists(st.tuples(TRUE, FOUND, st.none() | st.integers(0, 255).map(float), st.sampled_from(["raw", "more"])), min_size=1, max_size=5)


def made(pairs):
    "Samples and detections."
    unzip = lambda rows: zip(*rows) if rows else ([], [], [])
    samples, detections = [], []
    for i, (true, found, brightness, source) in enumerate(pairs):
        xyxy, label, crowd = unzip(true)
        samples.append(Sample(Path(f"{i}.jpg"), Boxes(xyxy, label, crowd=crowd), source=source,
                              file=f"{source}/{i}\udcff.jpg", row=i + 1, brightness=brightness))
        detections.append(Boxes(*unzip(found)))
    return samples, detections


@OFTEN
@given(pairs=PAIRS)
def test_samples_score_as_their_files(pairs):
    samples, detections = made(pairs)
    mine, files = score(samples, detections, NAMES), score_coco(*coco_form(samples, detections, NAMES))
    assert (mine.numbers, mine.by_class) == (files.numbers, files.by_class)


@OFTEN
@given(pairs=PAIRS, at=st.sampled_from([.05, .3, .5, .75]))
def test_every_box_is_accounted_for(pairs, at):
    samples, detections = made(pairs)
    rows = judge_all(samples, detections, at)
    kinds = Counter(r["kind"] for r in rows)
    assert set(kinds) <= set(KINDS) and all(list(r) == list(COLUMNS) for r in rows)
    crowds = sum(int(s.boxes.is_crowd.sum()) for s in samples)
    boxes = sum(len(s.boxes) for s in samples) - crowds
    ignored = sum((judge(s.boxes, d, at)[0] == "in_crowd").sum() for s, d in zip(samples, detections))
    assert boxes == kinds["right"] + kinds["wrong_class"] + kinds["missed"] and (crowds or not ignored)
    assert sum(map(len, detections)) == len(rows) - kinds["missed"] + ignored
    matrix = confusion(rows, NAMES)
    assert (matrix[:-1, :-1].trace(), matrix[:-1].sum(), matrix.sum()) == (kinds["right"], boxes, len(rows))
    objects = [(r["picture"], r["object"]) for r in rows if r["kind"] in ("right", "wrong_class", "missed")]
    assert len(set(objects)) == len(objects)
    for s in samples: check_false_alarms(s.boxes[~s.boxes.is_crowd], [r for r in rows if r["picture"] == s.path.name], at)
    check_slices(slices(samples, rows, NAMES), boxes, kinds, len(samples))


def check_false_alarms(truth, rows, at):
    "Which kind a false alarm is, said once more in plain words."
    for r in rows:
        overlap = iou(np.array([[r[k] for k in ("xmin", "ymin", "xmax", "ymax")]]), truth.xyxy)[0]
        own = overlap[truth.label == r["predicted"]].max(initial=0)
        if r["kind"] == "double": assert overlap.max() >= at and (r["true"] == r["predicted"] if own >= at else r["iou"] == round(overlap.max(), 4))
        if r["kind"] == "poorly_placed": assert overlap.max() < at and own >= .1 and (r["true"], r["iou"]) == (r["predicted"], round(own, 4))
        if r["kind"] == "background": assert overlap.max(initial=0) < at and own < .1 and r["object"] is None


def check_slices(table, boxes, kinds, pictures):
    "Each kind of slice adds up to the whole."
    for what in ("size", "class", "brightness", "source"):
        mine = [t for t in table if t["slice"] == what]
        assert sum(t["boxes"] for t in mine) == boxes, what
        for k in KINDS: assert sum(t[k] for t in mine) == kinds[k], (what, k)
        if what in ("brightness", "source"): assert sum(t["pictures"] for t in mine) == pictures
        for t in mine: assert t["boxes"] == t["right"] + t["missed"] + t["wrong_class"] and (t["recall"] is None) == (not t["boxes"])


@OFTEN
@given(pairs=PAIRS)
def test_tables_come_back(tmp_path_factory, pairs):
    "What is written is read back equal, twice the same bytes; suspects change no account."
    samples, detections = made(pairs)
    out = tmp_path_factory.mktemp("tables")
    first, again = (assess(samples, detections, NAMES, conf=.25, match_iou=.5, suspect=s, bootstrap=5) for s in (.5, 1.))
    assert first.report == again.report and first.rows == again.rows and {l.record["score"] for l in again.suspects} <= {1.}
    write_tables(out, first, detections)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    write_tables(out, first, detections)
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    assert read_errors(out/"errors.csv") == [dict(r, origin=r["origin"].replace("\udcff", "\\udcff")) for r in first.rows]
    for letter in first.suspects:
        assert letter.record["score"] >= .5 and f"{letter.source}/{letter.file}" in {s.file for s in samples}
        assert (letter.code == "suspect_missing") == (letter.record["truth"] is None)
        if letter.record["truth"]: assert (letter.code == "suspect_class") == (letter.record["truth"]["label"] != letter.record["label"])
    assert first.suspects == suspects(samples, first.rows, .5)


def test_thirds_of_brightness():
    "As many pictures in each third, and the limits say where each picture lies."
    samples = [Sample(Path(f"{i}.jpg"), Boxes([], []), brightness=float(b)) for i, b in enumerate(range(10, 100))]
    table = [t for t in slices(samples, [], []) if t["slice"] == "brightness"]
    assert [(t["value"], t["pictures"]) for t in table] == [("dark (< 39.7)", 30), ("middle (39.7 to 69.3)", 30), ("bright (>= 69.3)", 30)]


def test_a_better_detector_is_seen_on_few_pictures():
    "On the same draws, the difference of two detectors is known far better than the score of either."
    rng = np.random.default_rng(0)
    samples = [Sample(Path(f"{i}.jpg"), Boxes([[10, 10, 50, 50]], ["cat"])) for i in range(60)]
    hard = rng.random(60) < .5
    moved = lambda more: [Boxes([[10 + 9 * h + more, 10, 50 + 9 * h + more, 50]], ["cat"], [.5 + h / 10]) for h in hard]
    one, other = (match_samples(samples, moved(more), ["cat"]) for more in (0, 3))
    values = bootstrap(one, other, resamples=1000)[:, :, 0]
    (low, high), own = interval(values[0] - values[1]), interval(values[0])
    assert low > 0 and high - low < (own[1] - own[0]) / 2
    assert interval(values[0] - values[0]) == (0, 0)
