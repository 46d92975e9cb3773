"The whole pipeline by `dvc repro`, on a small setting and on real pictures."
import json

import pytest

KEYS = "map map50 map75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large".split()
STAGES = ["10_fetch", "20_ingest", "30_split", "40_train", "50_evaluate"]


def test_repro(workspace):
    "Every stage leaves its report and its executed notebook; nothing runs twice; a parameter re-runs what depends on it."
    workspace.run("dvc", "repro")
    data = workspace.folder/"data"
    report = lambda name: json.loads((data/f"reports/{name}.json").read_text())
    assert set(KEYS) <= set(report("evaluate"))
    assert report("ingest")["letters"]["missing_image"] == 1
    assert report("train")["epochs"] == 1
    run = (data/"runs/latest").resolve()
    assert sorted(p.name for p in run.iterdir()) == sorted(f"{s}.{e}" for s in STAGES for e in ("html", "ipynb"))
    assert "image/png" in (run/"50_evaluate.ipynb").read_text()
    before = {p: p.read_bytes() for p in (data/"interim").rglob("*") if p.is_file()}

    assert "Data and pipelines are up to date" in workspace.run("dvc", "repro")
    assert (data/"runs/latest").resolve() == run

    workspace.set(split=dict(max_dead_rate=.6))
    said = workspace.run("dvc", "repro")
    assert "Running stage 'split'" in said and "Running stage 'ingest'" not in said
    assert before == {p: p.read_bytes() for p in (data/"interim").rglob("*") if p.is_file()}


@pytest.mark.parametrize("section, key, hint", [("split", "max_dead_rat", "max_dead_rate"), ("fetch", "seeed", "seed")])
def test_mistyped_parameter(workspace, section, key, hint):
    "A key that does not exist, in whatever section, stops the first stage before any work, and names the nearest."
    workspace.set(**{section: {key: 1}})
    said = workspace.run("python", "-m", "flows.stage", "fetch", status=2)
    assert not (workspace.folder/"data/runs").exists()
    assert f"has no parameter '{key}'" in said and f"Did you mean '{hint}'?" in said and "Traceback" not in said


def test_dead_rate(workspace):
    "Too many dead letters stop the split, with the letters on disk."
    workspace.set(split=dict(max_dead_rate=.01))
    said = workspace.run("dvc", "repro", status=255)
    assert "more than split.max_dead_rate 1.0%" in said and "Running stage 'train'" not in said
    assert (workspace.folder/"data/interim/dead_letters.jsonl").read_text().count("\n") == 9
    assert (workspace.folder/"data/runs/latest/30_split.html").exists()


def test_blood_cells(workspace, real):
    "A real set in Pascal VOC by parameters alone, its own ImageSets kept."
    workspace.set(fetch=dict(kind="none"), ingest=dict(root=str(real), sources=[dict(path="bccd", format="voc")]), train=dict(imgsz=64, epochs=1, batch=32))
    workspace.run("dvc", "repro")
    report = json.loads((workspace.folder/"data/reports/ingest.json").read_text())
    assert (report["pictures"], report["boxes_kept"], report["letters"]) == (364, 4886, {"empty_box": 2})
    split = json.loads((workspace.folder/"data/reports/split.json").read_text())
    assert split["pictures"] == dict(train=205, val=87, test=72)
