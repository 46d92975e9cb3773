"Several environments: one file of values, and what differs from it where."
import json

import pytest

from nbs_lib.config import environment

DIFFERS = {
    "dev": dict(fetch=dict(train_scenes=100, val_scenes=20, test_scenes=30, side=96), split=dict(max_dead_rate=.2), train=dict(imgsz=96, epochs=3),
                gate=dict(min_map=0., floor=0., min_pictures=20, min_new_class=0.)),
    "ci": dict(fetch=dict(train_scenes=24, val_scenes=6, test_scenes=6, side=64), split=dict(max_dead_rate=.5),
               train=dict(imgsz=64, epochs=1, batch=8, device="cpu"), evaluate=dict(device="cpu"), score=dict(runtime="torch"),
               gate=dict(min_map=0., floor=0., min_pictures=1, min_new_class=0., bootstrap=50)),
    "production": dict(split=dict(max_dead_rate=.02), train=dict(epochs=100, device="0"), evaluate=dict(device="0")),
}


@pytest.mark.parametrize("name", DIFFERS)
def test_what_differs(name):
    assert environment(name) == DIFFERS[name]


def test_papermill_runs_in_an_environment_without_touching_the_pipeline(finished):
    "Other values than DVC follows: an experiment in its own run folder."
    before = finished.results()
    finished.run("papermill", "notebooks/stages/10_fetch.ipynb", "/dev/null", env={"NBS_ENV": "dev", "NBS_RUN_ID": "mine"})
    assert finished.results() == before
    assert json.loads((finished/"data/runs/mine/reports/fetch.json").read_text())["files"] > 100
    said = finished.run("papermill", "notebooks/stages/10_fetch.ipynb", "/dev/null", env={"NBS_ENV": "dew"}, status=1)
    assert "there is no environment 'dew'. Did you mean 'dev'?" in said


def test_dvc_refuses_values_that_it_does_not_see(finished):
    finished.set(fetch=dict(seed=1))
    said = finished.run("dvc", "repro", env={"NBS_ENV": "dev"}, status=255)
    assert "NBS_ENV=dev has other values for fetch.train_scenes" in said and "`nbs params --apply` writes them there" in said
    assert not (finished/"data/reports/fetch.json").exists()
    comments = (finished/"params.yaml").read_text().count("#")
    finished.run("nbs", "params", "--apply", env={"NBS_ENV": "dev"})
    assert json.loads(finished.run("nbs", "params", "--json"))["train"]["epochs"] == 3
    assert (finished/"params.yaml").read_text().count("#") == comments
    finished.run("dvc", "repro", "fetch", env={"NBS_ENV": "dev"})
    assert finished.report("fetch")["files"] > 100
