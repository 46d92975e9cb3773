"The whole pipeline by `dvc repro`, on a small setting and on real pictures."
import pytest

KEYS = "map map50 map75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large".split()
STAGES = ["10_fetch", "20_ingest", "30_split", "40_train", "50_evaluate"]


def test_repro(finished):
    "Every stage leaves its report and its executed notebook; nothing runs twice; a parameter re-runs what depends on it."
    assert set(KEYS) <= set(finished.report("evaluate"))
    assert finished.report("ingest")["letters"]["missing_image"] == 1
    assert (finished.report("train")["epochs"], finished.report("train")["resumed"]) == (1, False)
    run = (finished/"data/runs/latest").resolve()
    assert sorted(p.name for p in run.iterdir()) == sorted(f"{s}.{e}" for s in STAGES for e in ("html", "ipynb"))
    assert "image/png" in (run/"50_evaluate.ipynb").read_text()
    before = finished.results("interim")

    assert "Data and pipelines are up to date" in finished.run("dvc", "repro")
    assert (finished/"data/runs/latest").resolve() == run

    finished.set(split=dict(max_dead_rate=.6))
    said = finished.run("dvc", "repro")
    assert "Running stage 'split'" in said and "Running stage 'ingest'" not in said
    assert before == finished.results("interim")


@pytest.mark.parametrize("section, key, hint", [("split", "max_dead_rat", "max_dead_rate"), ("fetch", "seeed", "seed")])
def test_mistyped_parameter(workspace, section, key, hint):
    "A key that does not exist, in whatever section, stops the first stage before any work, and names the nearest."
    workspace.set(**{section: {key: 1}})
    said = workspace.run("python", "-m", "flows.stage", "fetch", status=2)
    assert not (workspace/"data/runs").exists()
    assert f"has no parameter '{key}'" in said and f"Did you mean '{hint}'?" in said and "Traceback" not in said


def test_dead_rate(finished):
    "Too many dead letters stop the split, with the letters on disk."
    finished.set(split=dict(max_dead_rate=.01))
    said = finished.run("dvc", "repro", status=255)
    assert "more than split.max_dead_rate 1.0%" in said and "Running stage 'train'" not in said
    assert (finished/"data/interim/dead_letters.jsonl").read_text().count("\n") == 9
    assert (finished/"data/runs/latest/30_split.html").exists()


@pytest.mark.large
def test_blood_cells(workspace, real):
    "A real set in Pascal VOC by parameters alone, its own ImageSets kept."
    workspace.set(fetch=dict(kind="none"), ingest=dict(root=str(real), sources=[dict(path="bccd", format="voc")]), train=dict(batch=32))
    workspace.run("dvc", "repro")
    report = workspace.report("ingest")
    assert (report["pictures"], report["boxes_kept"], report["letters"]) == (364, 4886, {"empty_box": 2})
    assert workspace.report("split")["pictures"] == dict(train=205, val=87, test=72)
