"The gate: fair to both sides, deaf to pictures that one of them learned from, and never silent about a rule that was not met."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from nbs_lib.boxes import Boxes, Sample
from nbs_lib.coco import load_coco, write_coco
from nbs_lib.config import WrongCall, read_json, write_json
from nbs_lib.detector import _bundle, open_model
from nbs_lib.predict import load, predict
from nbs_lib.draw import show_gate
from nbs_lib.gate import Rules, Side, compare, weigh
from nbs_lib.metrics import score

OFTEN = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CLASSES = ["cat", "dog", "größe, $x$"]
USUAL = dict(tolerance=.01, min_map=.1, floor=.02, floors={}, min_pictures=1, min_new_class=.1, bootstrap=40)

EDGES = st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(2, 9), st.integers(4, 9)).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
TRUE = st.lists(st.tuples(EDGES, st.sampled_from(CLASSES), st.integers(0, 5).map(lambda dice: dice == 5)), max_size=5)
FOUND = st.lists(st.tuples(EDGES, st.sampled_from(CLASSES), st.integers(0, 20).map(lambda s: s / 20)), max_size=6)
PICTURES = st.lists(st.tuples(TRUE, FOUND, FOUND), min_size=1, max_size=6)
KNOWN = st.lists(st.sampled_from([*CLASSES, "cow"]), min_size=1, unique=True)


def unzip(rows): return zip(*rows) if rows else ([], [], [])


def drawn(pictures):
    "Samples, and the detections of two detectors by file name."
    samples, one, two = [], {}, {}
    for i, (true, a, b) in enumerate(pictures):
        xyxy, label, crowd = unzip(true)
        samples.append(Sample(Path(f"{i:016x}.png"), Boxes(xyxy, label, crowd=crowd)))
        for found, table in ((a, one), (b, two)): table[samples[-1].path] = Boxes(*unzip(found))
    return samples, one, two


def side(names, table, seen=None):
    return Side(names, seen, lambda samples: [b[np.isin(b.label, names)] for b in (table[s.path] for s in samples)])


def but(numbers, *keys): return {k: v for k, v in numbers.items() if k not in keys}


@OFTEN
@given(pictures=PICTURES, names=st.tuples(KNOWN, KNOWN))
def test_whoever_is_champion(pictures, names):
    "Swapping both negates the difference, and what was new is removed; twice the same call gives the same."
    samples, one, two = drawn(pictures)
    a, b, rules = side(names[0], one), side(names[1], two), Rules(**USUAL)
    there, back = weigh(samples, CLASSES, a, b, rules), weigh(samples, CLASSES, b, a, rules)
    again = weigh(samples, CLASSES, a, b, rules)
    assert again == there and (again.draws == there.draws).all()
    n, m = there.numbers, back.numbers
    for k in ("map", "map50"): assert n[k] == dict(champion=m[k]["candidate"], candidate=m[k]["champion"])
    negative = [v if v is None else -v for v in (m["difference"], m["high"], m["low"])]
    assert [n[k] for k in ("difference", "low", "high")] == pytest.approx(negative, abs=2e-6)
    assert [set(n["classes"][k]) for k in ("shared", "new", "removed")] == [set(m["classes"][k]) for k in ("shared", "removed", "new")]


@OFTEN
@given(pictures=PICTURES, names=KNOWN, tolerance=st.sampled_from([0, .01]))
def test_against_itself(pictures, names, tolerance):
    "A model is as good as itself, exactly; unless there is nothing to judge by."
    samples, one, _ = drawn(pictures)
    model = side(names, one)
    decision = weigh(samples, CLASSES, model, model, Rules(**USUAL | dict(tolerance=tolerance, floor=0)))
    boxes = sum(v["boxes"] for v in decision.numbers["by_class"].values())
    if decision.promoted: assert [decision.numbers[k] for k in ("difference", "low", "high")] == [0, 0, 0] and not decision.draws.any()
    else: assert decision.reasons == [f"the {len(samples)} pictures have too few boxes to judge by"] and (not boxes or len(samples) > 1)


@OFTEN
@given(pictures=PICTURES, seen=st.tuples(*[st.sets(st.integers(0, 7), max_size=4)] * 2), first=st.booleans())
def test_seen_is_as_if_it_were_not_there(pictures, seen, first):
    samples, one, two = drawn(pictures)
    seen = [{f"{i:016x}" for i in places} for places in seen]
    champion, candidate = None if first else side(CLASSES, one, seen[0]), side(CLASSES, two, seen[1])
    gone, rules = seen[1] if first else seen[0] | seen[1], Rules(**USUAL)
    decision = weigh(samples, CLASSES, champion, candidate, rules)
    others = [s for s in samples if s.path.stem not in gone]
    without = weigh(others, CLASSES, champion and replace(champion, seen=set()), replace(candidate, seen=set()), rules)
    assert but(decision.numbers, "of", "left_out") == but(without.numbers, "of", "left_out")
    if others: assert decision.reasons == without.reasons and (decision.draws == without.draws).all()
    there = {s.path.stem for s in samples}
    assert decision.numbers["left_out"]["candidate"] == len(seen[1] & there) and len(others) == decision.numbers["pictures"]
    if not first: assert decision.numbers["left_out"]["champion"] == len(seen[0] & there)


@OFTEN
@given(pictures=PICTURES, names=st.tuples(st.none() | KNOWN, KNOWN), rules=st.fixed_dictionaries(dict(
    tolerance=st.floats(0, .3), min_map=st.floats(0, 1), floor=st.floats(0, 1), min_new_class=st.floats(0, 1), min_pictures=st.integers(1, 4),
    bootstrap=st.integers(1, 30), floors=st.dictionaries(st.sampled_from(["cat", "cow"]), st.floats(0, 1)))))
def test_the_verdict_is_what_the_record_says(pictures, names, rules):
    "The rules, said once more in plain words, on the numbers that were recorded; which are COCO's, and JSON."
    samples, one, two = drawn(pictures)
    known = {*(names[0] or []), *names[1]}
    rules["floors"] = {k: v for k, v in rules["floors"].items() if k in known}
    decision = weigh(samples, CLASSES, names[0] and side(names[0], one), side(names[1], two), Rules(**rules))
    n = json.loads(json.dumps(decision.as_dict(), allow_nan=False))
    assert n["promoted"] == (not n["reasons"]) == decision.promoted and str(decision).count("\n") == 0
    enough, candidate = len(samples) >= rules["min_pictures"], {k: v for k, v in n["by_class"].items() if k in names[1]}
    fine = enough and (not names[0] or not set(names[0]) - set(names[1]))
    for k, v in candidate.items():
        new = bool(names[0]) and k not in names[0]
        least = max(rules["min_new_class"], rules["floors"].get(k, 0)) if new else rules["floors"].get(k, rules["floor"])
        assert v["floor"] == least
        if v["boxes"]: fine &= enough and v["candidate"] >= least
        else: fine &= not new and k not in rules["floors"]
    fine &= enough and n["map"]["candidate"] is not None and (n["low"] is not None and n["low"] >= -rules["tolerance"] if names[0] else
                                                             n["map"]["candidate"] >= rules["min_map"])
    assert decision.promoted == fine
    if not enough: return
    found = side(names[1], two).find(samples)
    truth = score(samples, found, names[1])
    for k, v in candidate.items(): assert (-1 if v["candidate"] is None else v["candidate"]) == pytest.approx(truth.by_class[k]["map"], abs=1e-6)
    if not names[0]:
        whole = score(samples, found, list(dict.fromkeys([*names[1], *CLASSES]))).numbers
        for k in ("map", "map50"): assert (-1 if n[k]["candidate"] is None else n[k]["candidate"]) == pytest.approx(whole[k], abs=1e-6)
    if names[0]: assert n["difference"] is None or n["difference"] == pytest.approx(n["map"]["candidate"] - n["map"]["champion"], abs=2e-6)


def perfect(samples, blur=0.):
    return {s.path: Boxes(s.boxes.xyxy + blur, s.boxes.label, np.full(len(s.boxes), .9)) for s in samples}


@pytest.fixture
def samples():
    "Sixty pictures with an object of each class."
    return [Sample(Path(f"{i:016x}.png"), Boxes([[0, 0, 40, 40], [50, 0, 90, 40], [0, 50, 40, 90]], CLASSES)) for i in range(60)]


def test_all_reasons_are_told(samples):
    "Five at once, each a line with its numbers; and what a person reads is one line."
    new = [*CLASSES[1:], "cow", "hen"]
    bad = {s.path: b[np.isin(b.label, CLASSES[1:2])] for s, b in zip(samples, perfect(samples, 6).values())}
    herd = [replace(s, boxes=Boxes([*s.boxes.xyxy, [50, 50, 90, 90]], [*s.boxes.label, "cow"])) for s in samples]
    decision = weigh(herd, [*CLASSES, "cow"], side([*CLASSES, "owl"], perfect(samples)), side([*new, "owl"], bad), Rules(**USUAL | dict(floors={"owl": .2})))
    starts = ["does not know cat,", "mAP 0.", "classes below their floor: größe, $x$ 0.000 (least 0.020)",
              "new classes below their floor: cow 0.000 (least 0.100)", "no box to judge by of hen, owl: "]
    assert [r[:len(s)] for r, s in zip(decision.reasons, starts, strict=True)] == starts
    assert all(r in str(decision) for r in decision.reasons) and str(decision).startswith("refused: mAP 0.")
    show_gate(decision.numbers, decision.draws, str(decision)).canvas.draw()


def test_what_chance_may_have_done(samples):
    "Each finds what the other misses: as good as the other here, and nobody knows on other pictures. Where both miss the same, it is known."
    whole = perfect(samples)
    half = [{s.path: whole[s.path][:3 * (i % 2 == odd)] for i, s in enumerate(samples)} for odd in (0, 1)]
    rules = Rules(**USUAL | dict(bootstrap=300))
    chance, same = (weigh(samples, CLASSES, side(CLASSES, half[0]), side(CLASSES, other), rules) for other in (half[1], half[0]))
    assert chance.numbers["difference"] == 0 and chance.numbers["low"] < -.1 < .1 < chance.numbers["high"]
    assert (chance.promoted, same.promoted) == (False, True) and len(chance.reasons) == 1
    assert weigh(samples, CLASSES, side(CLASSES, half[0]), side(CLASSES, half[1]), replace(rules, tolerance=-chance.numbers["low"])).promoted


def test_another_set_of_classes(samples):
    table = perfect(samples)
    told = lambda old, new, **rules: weigh(samples, CLASSES, side(old, table), side(new, table), Rules(**USUAL | rules))
    assert told(CLASSES[:2], CLASSES).promoted and told(CLASSES, CLASSES[::-1]).promoted
    assert told(CLASSES[:2], CLASSES, floors={CLASSES[2]: 1}).promoted and told(CLASSES[:2], CLASSES).numbers["map"]["candidate"] == 1
    worse = lambda least: weigh(samples, CLASSES, side(CLASSES[:2], table), side(CLASSES, table | dict(list(perfect(samples, 6).items())[:20])),
                                Rules(**USUAL | dict(tolerance=1, floors={CLASSES[2]: least}))).reasons
    assert worse(.1) == [] and [r[:37] for r in worse(.95)] == ["new classes below their floor: größe,"]
    assert [r[:13] for r in told(CLASSES, CLASSES[:2]).reasons] == ["does not know"]
    assert [r[:10] for r in told(CLASSES[:1], CLASSES[1:]).reasons] == ["knows none"]
    assert [r[:9] for r in told(CLASSES, [*CLASSES, "hen"]).reasons] == ["no box to"]
    with pytest.raises(WrongCall, match="Did you mean 'cat'"): told(CLASSES, CLASSES, floors={"cta": .1})


def test_few_pictures_and_none(samples):
    table, rules = perfect(samples), Rules(**USUAL | dict(min_pictures=50))
    for champion in (None, side(CLASSES, table)):
        few, none = (weigh(some, CLASSES, champion, side(CLASSES, table), rules) for some in (samples[:6], []))
        assert few.reasons[0].startswith("6 of 6 pictures are left") and none.reasons[0].startswith("0 of 0 pictures")
        assert set(few.numbers["map"].values()) == {None} and len(few.reasons) == len(none.reasons) == 1
        blank = [replace(s, boxes=s.boxes[:0]) for s in samples]
        assert weigh(blank, CLASSES, champion, side(CLASSES, table), rules).reasons == ["the 60 pictures have too few boxes to judge by"]
        for d in (few, none): show_gate(d.numbers, d.draws, str(d)).canvas.draw()


def test_a_class_without_boxes_is_named(samples):
    table, names = perfect(samples), [*CLASSES, "hen"]
    decision = weigh(samples, CLASSES, side(names, table), side(names, table), Rules(**USUAL))
    assert decision.promoted and decision.numbers["classes"]["not_judged"] == ["hen"] and str(decision).endswith("not judged for want of boxes: hen")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    "A detector that never learned, and pictures whose labels are what it finds, moved more from picture to picture."
    folder, names = tmp_path_factory.mktemp("gate"), ["0", "1", "2"]
    torch.manual_seed(0)
    yolo = open_model("yolo11n.yaml")
    yolo.model.model[-1].cv3[2][2].bias.data[:3] += 3  # sure enough to say something
    _bundle(dict(ema=yolo.model, version="8"), folder/"model", dict(names=[*names, *map(str, range(3, 80))], imgsz=96, architecture="yolo11n.yaml"))
    rng, paths = np.random.default_rng(0), [folder/f"tree/images/test/{i:016x}.png" for i in range(8)]
    paths[0].parent.mkdir(parents=True)
    for p in paths: Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(p)
    found = predict(load(folder/"model", "cpu"), paths, conf=.001, max_det=8)
    samples = [Sample(p, Boxes(b.xyxy + i, b.label), (96, 96), source="s", file="f") for i, (p, b) in enumerate(zip(paths, found))]
    write_coco(folder/"tree/test.json", samples, names)
    return folder


HOW = dict(part="test", device="cpu", batch=8, iou=.7, max_det=8)


def test_bundles(bundles, tmp_path):
    "From folder to verdict: without a champion, against itself, with pictures that one side saw."
    judge = lambda *sides, **rules: compare(*sides, bundles/"tree", HOW, Rules(**USUAL | rules))
    model, champion = bundles/"model", tmp_path/"champion"
    first = judge(None, model)
    assert first.promoted and .1 < first.numbers["map"]["candidate"] < 1 and len(first.numbers["test"]) == 16
    shutil.copytree(model, champion)
    stems = [s.path.stem for s in load_coco(bundles/"tree/test.json", bundles)[0]]
    (champion/"seen.txt").write_text("\n".join(stems[:3]) + "\n")
    decision = judge(champion, model)
    assert decision.promoted and decision == judge(champion, model)
    assert (decision.numbers["pictures"], decision.numbers["left_out"]) == (5, dict(champion=3, candidate=None))
    assert decision.numbers["test"] == first.numbers["test"] and decision.numbers["map"]["champion"] < first.numbers["map"]["candidate"]
    assert [r[:25] for r in judge(champion, model, min_pictures=6).reasons] == ["5 of 8 pictures are left "]


@pytest.mark.parametrize("what, broken", [
    ("best.pt", lambda f: f.write_bytes(f.read_bytes()[:9999])), ("best.pt", lambda f: f.write_text("<html>")), ("best.pt", Path.unlink),
    ("model.json", Path.unlink), ("model.json", lambda f: f.write_text("{}")), ("model.json", lambda f: f.write_text("[]")),
    ("model.json", lambda f: write_json(f, read_json(f) | dict(tensors="0" * 16)))])
def test_a_champion_that_does_not_load(bundles, tmp_path, what, broken):
    "One clear line, before anything is predicted."
    shutil.copytree(bundles/"model", tmp_path/"champion")
    broken(tmp_path/"champion"/what)
    with pytest.raises(WrongCall, match="^the champion does not load: .*") as said:
        compare(tmp_path/"champion", bundles/"model", bundles/"tree", HOW, Rules(**USUAL))
    assert "\n" not in str(said.value) and str(tmp_path) in str(said.value)


@pytest.mark.parametrize("how, rules, said", [
    ({}, dict(tolerance=1.5), "gate.tolerance"), ({}, dict(floors={"0": 2}), "gate.floors: 0"), ({}, dict(bootstrap=0), "gate.bootstrap"),
    (dict(iou=70), {}, "evaluate.iou"), (dict(part="tset"), {}, "tset.json"), ({}, dict(floors={"80": .1}), "gate.floors names '80'")])
def test_wrong_settings(bundles, how, rules, said):
    with pytest.raises(WrongCall, match=said): compare(None, bundles/"model", bundles/"tree", HOW | how, Rules(**USUAL | rules))
