"The flow that retrains: real runs against a real Prefect server, overlapped, killed, fed with new data, and called wrongly."
import json, shutil, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest
from PIL import Image

from conftest import last
from nbs_lib.config import WrongCall, file_digest, write_json
from nbs_lib.registry import versions
from nbs_lib.scenes import write_scenes
from nbs_lib.store import connect
from test_interruptions import before, moment_has_come, processes

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("prefect")]


@contextmanager
def listening():
    "What a notification's address heard."
    heard = []
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200); self.end_headers()
        def log_message(self, *_): pass
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield heard, f"json://127.0.0.1:{http.server_port}/"
        http.shutdown()


def retrain(workspace, server, status=0, **env):
    return last(workspace.run("python", "-m", "flows.retrain", "--settle", 0, env=server.env | env, status=status))


def registered(workspace): return [v.version for v in versions(connect(f"sqlite:///{workspace/'data/mlflow/mlflow.db'}"), "detector")]


def drop(workspace, name, seed):
    write_scenes(workspace/f"data/incoming/{name}", scenes=dict(train=20, val=2, test=2), side=64, seed=seed)


def test_once_and_then_nothing_new(finished, server):
    with listening() as (heard, address):
        assert "version 1 passed" in retrain(finished, server, NBS_NOTIFY=address)
        assert [h["title"] for h in heard] == ["model promoted"]
        assert "nothing new" in retrain(finished, server, NBS_NOTIFY=address) and registered(finished) == [1]


@pytest.mark.flows
def test_only_what_is_new_makes_a_version(finished, server):
    with listening() as (heard, address):
        assert "version 1 passed" in retrain(finished, server, NBS_NOTIFY=address)
        drop(finished, "week 1", seed=7)
        shutil.copytree(finished/"data/incoming/week 1/train", finished/"data/incoming/pictures")
        (finished/"data/incoming/unclear").mkdir()
        (finished/"data/incoming/unclear/a.txt").write_text("0 .5 .5 .1 .1\n")
        assert "version 2" in retrain(finished, server, NBS_NOTIFY=address) and registered(finished) == [1, 2]
        assert len(heard) == 2
    assert finished.report("ingest")["recognised"]["incoming/week 1"].startswith("coco")
    assert (finished/"data/raw/incoming/week 1.dvc").exists() and not (finished/"data/incoming/week 1").exists()
    assert (finished/"data/incoming/unclear/a.txt").exists() and not (finished/"data/predictions/unclear").exists()
    assert json.loads((finished/"data/predictions/pictures/report.json").read_text())["scored"] > 10
    assert "nothing new" in retrain(finished, server)
    artifacts = {a["key"]: a["data"] for a in server.ask("/artifacts/latest/filter")}
    assert "# Version 2" in artifacts["retraining"] and "data:image/jpeg" in artifacts["retraining"] and "New data: week 1" in artifacts["retraining"]
    assert "Scored by the champion:\n- data/predictions/pictures: " in artifacts["retraining"]
    assert {"notebook-train", "notebook-evaluate", "dead-letters"} <= set(artifacts)


def test_a_batch_that_no_source_reads_is_told(tmp_path):
    from flows.retrain import unread
    for name in ("a", "b", ".c.tmp"): (tmp_path/"incoming"/name).mkdir(parents=True)
    of = lambda *paths: unread((tmp_path/"incoming").glob("*"), tmp_path, [dict(path=path) for path in paths])
    assert [of("cells"), of("incoming/b"), of("incoming/*"), of("incoming"), of(".")] == [["a", "b"], ["a"], [], [], []]
    assert unread((tmp_path/"incoming").glob("*"), tmp_path, None) == []


@pytest.mark.flows
def test_what_a_killed_run_did_not_save_stops_no_other(finished, server, tmp_path):
    "With a remote: DVC refuses to bring what would replace files that it has not saved."
    finished.run("dvc", "remote", "add", "--local", "--default", "folder", tmp_path/"remote")
    finished.run("dvc", "push")
    undisturbed, params = finished.results(), (finished/"params.yaml").read_text()
    finished.set(fetch=dict(seed=1))
    finished.run("python", "-m", "flows.stage", "fetch")
    (finished/"params.yaml").write_text(params)
    assert finished.results() != undisturbed
    assert "version 1 passed" in retrain(finished, server) and finished.results() == undisturbed
    assert [*(finished/"data/runs").glob("*/edited/data/raw/fetched/train/*.jpg")], "a copy is kept, since a person may have made them"


def working(finished, server, stage, moment, **env):
    "A run that has come so far with the stage; its results were forgotten before."
    before(finished, stage)
    flow = finished.start("python", "-m", "flows.retrain", env=server.env | env, start_new_session=True)
    while not moment_has_come(finished, stage, "end" if moment == "end" else "start"):
        assert flow.poll() is None, flow.communicate()[0]
        time.sleep(.01)
    if moment == "middle": time.sleep(1)
    return flow


def end(flow): return last(flow.communicate()[0])


MATRIX = [(stage, process, moment) for stage in ("ingest", "train", "evaluate") for process in ("flow", "dvc", "runner", "kernel")
          for moment in ("start", "middle", "end")]
ALWAYS = {("train", "flow", "middle"), ("ingest", "dvc", "start")}


@pytest.mark.parametrize("stage, process, moment", [pytest.param(*case, marks=pytest.mark.flows if case in ALWAYS else pytest.mark.kills) for case in MATRIX])
def test_after_a_kill_the_next_run_completes(finished, server, stage, process, moment):
    undisturbed = finished.results()
    flow = working(finished, server, stage, moment)
    found = processes(finished)
    dvc = next(p for p in psutil.Process(flow.pid).children() if "dvc" in p.name() or any(w.endswith("/dvc") for w in p.cmdline()))
    if not (victim := {**found, "flow": flow, "dvc": dvc}.get(process)):
        assert moment == "end", "it was over before it could be killed"
        pytest.skip("it was over before it could be killed")
    victim.kill()
    late = (process, moment) == ("kernel", "end")  # after its last cell nobody misses it, and the run may go on
    said = end(flow) if late else None
    begin = time.monotonic()
    while processes(finished) and time.monotonic() < begin + 10: time.sleep(.05)
    assert not processes(finished)
    said = said or end(flow)
    why = dict(runner=f"failed to reproduce '{stage}'", kernel=f"{stage} failed: the kernel died")
    if not (late and flow.returncode == 0):
        if process in why: assert flow.returncode == 1 and why[process] in said, said
        said = retrain(finished, server)
    assert "version 1 passed" in said and registered(finished) == [1]
    assert finished.results() == undisturbed
    if process == "flow":
        assert {r["state"]["message"] for r in server.ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["CRASHED"]}}}})} \
            == {"its process was killed; a later run found that out"}
        assert not server.ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}})


@pytest.mark.parametrize("stage", [pytest.param("train", marks=pytest.mark.flows), *(pytest.param(s, marks=pytest.mark.kills) for s in ("ingest", "evaluate"))])
def test_a_run_outlives_its_server(finished, server, stage):
    undisturbed = finished.results()
    flow = working(finished, server, stage, "middle")
    server.kill()
    time.sleep(3)
    server.start()
    assert "version 1 passed" in end(flow) and flow.returncode == 0
    assert finished.results() == undisturbed and "nothing new" in retrain(finished, server)
    assert not server.ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}})


@pytest.mark.flows
def test_one_at_a_time(finished, server):
    flow = working(finished, server, "train", "start")
    assert retrain(finished, server, status=3) == "skipped: another run is at work in this workspace"
    assert "version 1 passed" in end(flow)
    assert [r["state"]["type"] for r in server.ask("/flow_runs/filter", {"flow_runs": {"state": {"name": {"any_": ["Skipped"]}}}})] == ["COMPLETED"]


def test_a_run_that_another_kept_away_has_a_status_of_its_own(monkeypatch, capsys):
    from prefect.states import Completed
    from flows import once, score
    monkeypatch.setattr(once, "held_by_this_process", lambda: lambda: None)
    class Flow:
        name = "score"
        def __call__(self, **given): return Completed(name="Skipped", message="skipped: another run scores in this workspace")
    monkeypatch.setattr(score, "score", Flow())
    monkeypatch.setattr("sys.argv", ["score", "--json"])
    with pytest.raises(SystemExit) as ended: score.main()
    assert ended.value.code == 3 and capsys.readouterr() == ("", "skipped: another run scores in this workspace\n")


@pytest.mark.flows
def test_a_failure_is_one_line_and_told(finished, server):
    with listening() as (heard, address):
        def fails(why, title, **env):
            said = finished.run("python", "-m", "flows.retrain", env=server.env | dict(NBS_NOTIFY=address) | env, status=1)
            assert why in last(said) and "Traceback" not in said, said
            assert heard[-1]["title"] == title and why in heard[-1]["message"]
        finished.set(split=dict(max_dead_rate=0.))
        fails("more than split.max_dead_rate", "too many dead letters")
        finished.set(split=dict(max_dead_rate=.5), train=dict(model="no.pt"))
        fails("no.pt", "retraining failed")
        fails("no environment 'nowhere'", "retraining failed", NBS_ENV="nowhere")
        finished.set(train=dict(epochz=3))
        fails("Did you mean 'epochs'?", "retraining failed")
        with open(finished/"params.yaml", "a") as file: file.write("<<<<<<< HEAD\n")
        fails("params.yaml: not YAML", "retraining failed")
    assert not registered(finished)


@pytest.mark.flows
def test_without_a_network_nothing_is_lost(finished, server):
    finished.run("dvc", "remote", "add", "--local", "--default", "far", "http://127.0.0.1:9/data")
    undisturbed = finished.results()
    said = finished.run("python", "-m", "flows.retrain", env=server.env, status=1)
    assert "127.0.0.1:9" in last(said) and "Traceback" not in said, said
    assert finished.results() == undisturbed


def test_a_full_disk_is_told_before_it_is_hit(monkeypatch):
    from flows import retrain
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), dict(free=5 << 20)))
    with pytest.raises(retrain.WrongCall, match="5 MB of disk are free where 1024 MB are needed"): retrain.preflight.fn({})


def test_what_an_environment_sets_no_run_changes(monkeypatch):
    from flows import retrain
    before = (retrain.ROOT/"params.yaml").read_text()
    monkeypatch.setenv("NBS_ENV", "production")
    with pytest.raises(retrain.WrongCall, match="train.epochs is 100 in NBS_ENV=production"): retrain.preflight.fn(dict(train=dict(epochs=5)))
    assert (retrain.ROOT/"params.yaml").read_text() == before


def test_a_form_takes_what_its_stage_takes(monkeypatch, tmp_path):
    "Whatever YAML makes of the value that stands in the file."
    from flows import forms
    whole = (forms.ROOT/"params.yaml").read_text()
    (tmp_path/"params.yaml").write_text(whole.replace("device: auto", "device: 0").replace("tolerance: 0.01 ", "tolerance: 0 "))
    forms.declared()  # of the workspace's notebooks
    monkeypatch.setattr(forms, "ROOT", tmp_path)
    assert forms.typed("train")["device"] == "0" and forms.typed("train", device="cpu")["device"] == "cpu"
    assert forms.typed("gate", tolerance=.5)["tolerance"] == .5


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\n", "train:\n", "[]", ""])
def test_a_broken_file_still_has_its_forms(monkeypatch, tmp_path, text):
    "So that the run begins, and tells what is wrong."
    from flows import forms
    keys = forms.declared()["train"]  # of the workspace's notebooks
    monkeypatch.setattr(forms, "ROOT", tmp_path)
    (tmp_path/"params.yaml").write_text(text)
    assert set(forms.sections("train")["train"].model_fields) == set(keys)
    with pytest.raises(WrongCall, match="params.yaml"): forms.typed("train")


def test_files_that_were_left_alone_are_not_left_for_another_run(monkeypatch, tmp_path):
    from prefect.logging import disable_run_logger
    from flows import retrain
    for name in ("INCOMING", "RAW"): (folder := tmp_path/"data"/name).mkdir(parents=True); monkeypatch.setattr(retrain, name, folder)
    for i in range(2): Image.new("RGB", (64, 64)).save(retrain.INCOMING/f"{i}.jpg")
    with disable_run_logger():
        early = "to be left alone for 1 s before it is taken: data/INCOMING/0.jpg (for 0 s), data/INCOMING/1.jpg (for 0 s)"
        assert retrain.incoming.fn(1, "early") == ([], [], early)
        time.sleep(1.1)
        assert retrain.incoming.fn(1, "run") == ([], ["run"], "")


def test_what_the_gate_decides_is_told_before_anything_can_fail(monkeypatch, tmp_path):
    "And as long as the run has not told all, the next one does not take it for done."
    from prefect.logging import disable_run_logger
    from flows import retrain
    heard, fails = [], []
    class Gate:
        said = ['{"version": "2", "new": true, "promoted": true, "text": "passed"}']
        def __init__(self, *words): assert words[:2] == ("nbs", "gate")
        def __iter__(self): return iter(self.said)
        def end(self, *fine): return 0
    def at(step):
        if step in fails: raise retrain.WrongCall(step)
    quiet = lambda *given: None
    for name, stand_in in dict(preflight=quiet, pull=quiet, remote=lambda: True, incoming=lambda *_: ([], [], "monday must wait"), ask=lambda *_: {},
                               keep_edited=quiet, reproduce=quiet, state=lambda: "now", publish=lambda: dict(version="2"), gate=retrain.gate.fn, Command=Gate,
                               push=lambda: at("push"), scored=lambda waits: at("scored"), tell=quiet, DONE=tmp_path/"done.json",
                               notify=lambda *told: heard.append(told)).items(): monkeypatch.setattr(retrain, name, stand_in)
    with disable_run_logger():
        for step in ("push", "scored"):
            fails[:] = [step]
            with pytest.raises(retrain.WrongCall, match=step): retrain.work(0, False, {}, "run")
            assert heard.pop() == ("model promoted", "version 2 passed", False) and not heard and not retrain.DONE.exists()
        fails.clear()
        Gate.said = [Gate.said[0].replace('"new": true', '"new": false')]
        assert retrain.work(0, False, {}, "run").message == "version 2 passed; monday must wait" and retrain.DONE.exists() and not heard
        monkeypatch.setattr(retrain, "scored", quiet)
        assert retrain.work(0, False, {}, "run").message == "nothing new: data, code and parameters are those of the last run; monday must wait"


def test_other_weights_under_the_same_name_are_told(monkeypatch, tmp_path):
    from flows import preflight
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    (tmp_path/"params.yaml").write_text("train: {model: start.pt}\n")
    assert preflight.other_start() is None
    (tmp_path/"start.pt").write_text("weights")
    write_json(tmp_path/"data/reports/train.json", dict(start=file_digest(tmp_path/"start.pt")))
    assert preflight.other_start() is None
    (tmp_path/"start.pt").write_text("others")
    assert preflight.other_start().startswith("start.pt is another file than data/models was trained from")
