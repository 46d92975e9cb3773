"Sweeps: sets side by side, one failing, killed and gone on with, called wrongly; studies; and what papermill alone does."
import csv, json, os, signal, sqlite3, time
from contextlib import closing, suppress
from math import prod

import psutil, pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import wait
from flows.sets import Stage, expand, read_sets, read_study
from nbs_lib.config import WrongCall
from nbs_lib.store import connect

pytestmark = pytest.mark.timeout(600)
TRAIN = "notebooks/stages/40_train.ipynb"
SIX = "[{lr0: 0.001}, {lr0: 0.002}, {lr0: 0.004}, {lr0: 0.002, seed: 1}, {optimizer: SGD}, {optimizer: Adm}]"


def sweep(workspace, *words, status=0, stage=TRAIN, **env):
    "What it says, both streams."
    return workspace.run("python", "-m", "flows.sweep", stage, *words, status=status, env=env)


def rows(workspace, name):
    with open(workspace/f"data/runs/{name}/sweep.csv") as f: return list(csv.DictReader(f))


def write(workspace, text, name="grid"):
    (workspace/f"{name}.yaml").write_text(text)
    return f"{name}.yaml"


def tracked(workspace, name):
    "Status by name of the sweep's runs in MLflow."
    client = connect(f"sqlite:///{workspace/'data/mlflow/mlflow.db'}")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], f"attributes.run_name LIKE '{name}-%'")
    return {run.info.run_name: run.info.status for run in found}


def working(workspace):
    "Every process that works in this workspace."
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(workspace.folder) and process.status() != psutil.STATUS_ZOMBIE: yield process


@given(st.dictionaries(st.text(max_size=5), st.lists(st.integers(), min_size=1, max_size=3), max_size=4))
def test_a_grid_is_every_combination_in_the_order_of_the_file(grid):
    sets = expand(grid)
    assert len(sets) == prod(map(len, grid.values())) and all(list(s) == list(grid) for s in sets)
    places = [[[i for i, v in enumerate(grid[k]) if v == s[k]] for k in grid] for s in sets]
    assert all(all(p) for p in places)
    if all(len(set(values)) == len(values) for values in grid.values()):
        assert places == sorted(places) and len(set(map(str, places))) == len(sets)


WRONG = {
    "unknown key": ("lr: [0.1]", "train has no parameter 'lr'. Did you mean 'lr0'?"),
    "unknown key in a list": ("[{lr0: 0.1}, {epoch: 3}]", "set 2: train has no parameter 'epoch'. Did you mean 'epochs'?"),
    "own folder": ("out: [a, b]", "train has no parameter 'out'"),
    "empty": ("", "it holds no sets"),
    "empty list": ("lr0: []", "lr0 must have a list of values to try, not []"),
    "no list": ("lr0: 0.1", "lr0 must have a list of values to try, not 0.1"),
    "type": ("epochs: [1, many]", "set 2: train.epochs must be of type int, not 'many'"),
    "not a set": ("[3]", "set 1: keys and values were expected, not 3"),
    "no yaml": ("a: [", "not YAML"),
    "twice": ("lr0: [0.001, 1e-3]", "sets 1 and 2 are the same: lr0=0.001 and lr0=0.001"),
    "twice by another name": ("[{}, {epochs: null}]", "sets 1 and 2 are the same: params.yaml as it is and epochs="),
    "too many": (f"seed: {list(range(40))}\nlr0: {[i / 100 for i in range(1, 40)]}", "a grid of 1560 sets"),
    "no file": (None, "no such file or directory"),
}
RANGE = "trials: 2\nparameters: {lr0: %s}"
WRONG_STUDY = {
    "no trials": ("parameters: {lr0: {low: 0.1, high: 1}}", "a study must say its trials"),
    "nothing": ("", "a study has the keys trials, seed"),
    "word": ("trails: 2", "a study has no key 'trails'. Did you mean 'trials'?"),
    "key": ("trials: 2\nparameters: {lr: [0.1]}", "train has no parameter 'lr'. Did you mean 'lr0'?"),
    "range": (RANGE % "{low: 0.1, hihg: 1}", "lr0: a range has no 'hihg'. Did you mean 'high'?"),
    "end": (RANGE % "{low: 0.1}", "lr0: the range lacks high"),
    "upside down": (RANGE % "{low: 2, high: 1}", "lr0: "),
    "logarithm of nothing": (RANGE % "{low: 0, high: 1, log: true}", "lr0: "),
    "number": (RANGE % "{low: few, high: 1}", "lr0.low must be of type float, not 'few'"),
    "text has no range": ("trials: 2\nparameters: {optimizer: {low: 1, high: 2}}", "optimizer must be a list of choices, not {'low': 1, 'high': 2}"),
    "choice": ("trials: 2\nparameters: {epochs: [1, 1.5]}", "train.epochs must be of type int, not 1.5"),
    "direction": (RANGE % "[0.1]" + "\ndirection: up", "direction is maximize or minimize"),
    "none": ("trials: 0\nparameters: {lr0: [0.1]}", "must say its trials"),
}


@pytest.mark.parametrize("read, text, says", [*((read_sets, *case) for case in WRONG.values()), *((read_study, *case) for case in WRONG_STUDY.values())],
                         ids=[*WRONG, *(f"study: {name}" for name in WRONG_STUDY)])
def test_what_cannot_be_tried_is_told_in_one_line(tmp_path, read, text, says):
    if text is not None: (tmp_path/"file.yaml").write_text(text)
    with pytest.raises(WrongCall) as error: read(tmp_path/"file.yaml", Stage("train"))
    assert says in str(error.value) and str(error.value).startswith(f"{tmp_path/'file.yaml'}") and "\n" not in str(error.value)


def test_a_wrong_call_is_one_line_and_starts_nothing(workspace):
    grid = write(workspace, "lr0: [1]")
    def says(line, *words, **env): assert sweep(workspace, *words, status=2, **env) == f"sweep: {line}\n"
    says("trian is no stage notebook. Did you mean 'train'?", "--grid", grid, stage="trian")
    stages = ", ".join(sorted(path.stem[3:] for path in (workspace/"notebooks/stages").glob("*.ipynb") if path.stem != "60_score"))
    says(f"notebooks/api/20_detector.ipynb is no stage notebook. There is: {stages}.", "--grid", grid, stage="notebooks/api/20_detector.ipynb")
    says("'../up' cannot name a folder: --name takes letters, digits, '.', '_' and '-', not 'latest'", "--grid", grid, "--name", "../up")
    says("--jobs 0: at least 1", "--grid", grid, "--jobs", 0)
    says(f"{workspace/'none.yaml'}: no such file or directory", "--grid", "none.yaml")
    assert not (workspace/"data/runs").exists()


@pytest.mark.flows
def test_a_set_that_equals_params_yaml_touches_no_result(finished):
    "With another that fails on purpose, at the same time as a second sweep of the same name is refused."
    before, grid = finished.results(), write(finished, "[{}, {optimizer: Adm}]")
    first = finished.start("python", "-m", "flows.sweep", "train", "--grid", grid, "--jobs", 1)
    wait(lambda: (finished/"data/runs/grid/lock").exists())
    said = sweep(finished, "--grid", grid, status=2)
    assert said == "sweep: another sweep 'grid' is at work in this workspace: wait for it, or give this one a --name\n"
    said = first.communicate()[0]
    assert first.returncode == 1 and "1 of 2 failed" in said and "Traceback" not in said, said
    assert finished.results() == before
    good, bad = rows(finished, "grid")
    assert (finished/f"data/runs/{good['run']}/models/best.pt").read_bytes() == (finished/"data/models/best.pt").read_bytes()
    assert "Optimizer 'Adm' not found" in bad["why"] and "Adm" in (finished/bad["page"]).read_text()
    said = sweep(finished, "--grid", write(finished, "[{}]"), "--metric", "val_mpa", status=2)
    assert said == "sweep: the report of train has no number 'val_mpa'. Did you mean 'val_map'?\n"


@pytest.mark.flows
def test_six_sets_one_failing(finished):
    grid = write(finished, SIX)
    begin = time.monotonic()
    said = sweep(finished, "--grid", grid, "--jobs", 2, status=1)
    took = time.monotonic() - begin
    assert "1 of 6 failed" in said and "6/6" in said and "Traceback" not in said, said
    table = rows(finished, "grid")
    assert len(table) == 6 and [bool(r["why"]) for r in table] == [False] * 5 + [True]
    assert len({r["run"] for r in table}) == 6
    for r in table[:-1]:
        report = json.loads((finished/f"data/runs/{r['run']}/reports/train.json").read_text())
        assert float(r["val_map50"]) == report["val_map50"] and (finished/f"data/runs/{r['run']}/40_train.html").exists()
    failed = table[-1]
    assert f"{failed['run']}: lr0=0.003 seed=0 optimizer=Adm: train failed: NotImplementedError" in said and f"see {failed['page']}" in said
    assert "An Exception was encountered" in (finished/failed["page"]).read_text()
    assert Image.open(finished/"data/runs/grid/sweep.png").size[0] > 300
    found = tracked(finished, "grid")
    assert {r["run"] for r in table[:-1]} <= set(found) and {found[r["run"]] for r in table[:-1]} == {"FINISHED"}
    pages = {r["run"]: (finished/f"data/runs/{r['run']}/40_train.ipynb").stat().st_mtime for r in table}
    sweep(finished, "--grid", grid, status=1)
    again = {run for run, at in pages.items() if (finished/f"data/runs/{run}/40_train.ipynb").stat().st_mtime != at}
    assert again == {failed["run"]}
    print(f"\n6 sets, 2 at a time: {took:.0f} s")


@pytest.mark.flows
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_killed_in_the_middle_it_goes_on(finished, number):
    finished.set(train=dict(epochs=3))
    grid = write(finished, "lr0: [0.001, 0.002, 0.004]\n")
    first = finished.start("python", "-m", "flows.sweep", TRAIN, "--grid", grid, "--jobs", 2, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    checkpoints = lambda: list((finished/"data/cache/train").glob("*/epoch-0000[12]"))
    wait(lambda: checkpoints() and list((finished/"data/runs").glob("grid-*/sweep.json")))
    first.send_signal(number)
    begin = time.monotonic()
    wait(lambda: not list(working(finished)), 10)
    print(f"\n{number.name}: nothing left after {time.monotonic() - begin:.1f} s")
    said = first.communicate()[0]
    if number == signal.SIGINT: assert said.endswith("sweep: grid was stopped; the same call goes on\n") and first.returncode == 130, said
    done = {p: p.stat().st_mtime for p in (finished/"data/runs").glob("grid-*/sweep.json")}
    assert 1 <= len(done) < 3
    said = sweep(finished, "--grid", grid, "--jobs", 2)
    assert len(rows(finished, "grid")) == 3 and all(p.stat().st_mtime == at for p, at in done.items())
    reports = [json.loads(p.read_text()) for p in (finished/"data/runs").glob("grid-*/reports/train.json")]
    assert [r["epochs"] for r in reports] == [3] * 3 and any(r["resumed"] for r in reports)


@pytest.mark.flows
def test_a_study_goes_on_with_what_an_undisturbed_one_would_try(finished):
    study = write(finished, "trials: 4\nseed: 3\nmetric: parameters\ndirection: minimize\n"
                            "parameters:\n  lr0: {low: 1e-4, high: 0.1, log: true}\n  batch: {low: 4, high: 12, step: 4}\n  optimizer: [SGD, AdamW]\n", "study")
    table = lambda name: {(r["lr0"], r["batch"], r["optimizer"]) for r in rows(finished, name)}
    sweep(finished, "--study", study, "--jobs", 1, "--name", "whole")
    first = finished.start("python", "-m", "flows.sweep", TRAIN, "--study", study, "--jobs", 1, "--name", "cut")
    def trials(state):
        with suppress(sqlite3.Error), closing(sqlite3.connect(finished/"data/runs/cut/study.db")) as db:
            return db.execute("SELECT count(*) FROM trials WHERE state = ?", [state]).fetchone()[0]
    wait(lambda: trials("COMPLETE") == 2 and trials("RUNNING") == 1)
    time.sleep(2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    wait(lambda: not list(working(finished)), 10)
    said = sweep(finished, "--study", study, "--jobs", 1, "--name", "cut")
    assert "4/4" in said and trials("COMPLETE") == 4 and not trials("RUNNING")
    assert len(table("whole")) == 4 and table("cut") == table("whole")


@pytest.mark.flows
def test_plain_papermill_gives_what_a_set_gives(finished):
    finished.run("papermill", TRAIN, "out.ipynb", "-p", "epochs", "3", env=dict(NBS_RUN_ID="plain"))
    sweep(finished, "--grid", write(finished, "epochs: [3]"))
    [row] = rows(finished, "grid")
    one, other = ((finished/f"data/runs/{run}/models/best.pt").read_bytes() for run in ("plain", row["run"]))
    assert one == other and (finished/"out.ipynb").exists()


def test_each_job_has_cpus_of_its_own_and_a_card(monkeypatch):
    from flows import sweep
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5, 7, 8})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-b")
    free = sweep.slots(3)
    assert [free.get() for _ in range(3)] == [([2, 7], "0"), ([3, 8], "GPU-b"), ([5], "0")]
    free = sweep.slots(7)
    assert [free.get()[0] for _ in range(7)] == [[2], [3], [5], [7], [8], [2], [3]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.cards() == [] and sweep.slots(1).get() == ([2, 3, 5, 7, 8], None)
