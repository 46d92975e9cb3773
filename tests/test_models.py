"What MLflow holds after real trainings: with servers that die or hang, commands that are killed, called twice, or called wrongly; and the gate after them."
import csv, json, os, re, shutil, signal, socket, sqlite3, subprocess, sys, time
from contextlib import closing, suppress
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from mlflow.entities import ViewType

from conftest import wait
from nbs_lib.registry import download, history, versions
from nbs_lib.store import connect, embedded
from test_interruptions import processes

pytestmark = pytest.mark.timeout(1200)  # the fixture `three` trains

EPOCHS = 12
LIKE_NEW = dict(epochs=EPOCHS, seed=1, lr0=1e-6, settings=dict(nbs=16, warmup_epochs=0., mosaic=0., fliplr=0.))  # a net that still finds something
FORKED = """
import json, os, sys, traceback
from nbs_lib.store import mlflow; mlflow()
import matplotlib.pyplot, mlflow.pyfunc, nbs_lib.gate, nbs_lib.publish, pandas, torch
from nbs_lib.cli import main
for line in sys.stdin:
    args, env, out = json.loads(line)
    if os.fork(): continue
    if pid := os.fork():
        print(pid, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(out + ".tmp", "w") as f: f.write(str(code))
        os.rename(out + ".tmp", out + ".code"); os._exit(0)
    os.environ.update(env)
    for n, name in ((1, "out"), (2, "err")): os.dup2(os.open(f"{out}.{name}", os.O_CREAT | os.O_WRONLY), n)
    sys.argv, code = ["nbs", *args], 0
    try: main()
    except SystemExit as e: code = e.code or 0
    except BaseException: traceback.print_exc(); code = 1
    sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
"""


class Nbs:
    "`nbs` in a workspace, a process a call; they are forked off one that has imported already, which saves seconds each."
    def __init__(self, workspace, folder):
        self.workspace, self.folder, self.calls = workspace, folder, 0
        self.process = workspace.start("python", "-c", FORKED, stdin=subprocess.PIPE)

    def start(self, *args, **env):
        self.calls += 1
        self.process.stdin.write(json.dumps([list(map(str, args)), env, place := f"{self.folder}/call-{self.calls}"]) + "\n"); self.process.stdin.flush()
        return int(self.process.stdout.readline()), Path(place)

    def end(self, call):
        "(status, what it printed, what it said besides)"
        code = call[1].with_suffix(".code")
        wait(code.exists)
        return int(code.read_text()), *(call[1].with_suffix(f".{name}").read_text() for name in ("out", "err"))

    def __call__(self, *args, status=0, **env):
        code, out, err = self.end(self.start(*args, **env))
        assert code == status, out + err
        return out

    def refused(self, *args, **env):
        "The one line with which it refused."
        code, out, err = self.end(self.start(*args, **env))
        assert code == 2 and not out and err.startswith("nbs: ") and err.count("\n") == 1 and len(err) < 700, f"{args} {env}: {code}\n{out}{err}"
        return err

    def close(self): self.process.stdin.close(); self.process.stdout.close(); self.process.wait()


class Server:
    "MLflow's own server, which can be killed and started again."
    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); self.port = s.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        args = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--artifacts-destination", self.folder/"artifacts", "--serve-artifacts",
                "--host", "127.0.0.1", "--port", self.port, "--workers", 1]
        with open(self.folder/"log", "a") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *map(str, args)], stdout=log, stderr=log, cwd=self.folder,
                                            env=os.environ | dict(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"), start_new_session=True)
        def answers():
            assert self.process.poll() is None, (self.folder/"log").read_text()
            try: return urlopen(f"{self.uri}/health").close() or True
            except OSError: return False
        wait(answers)

    def kill(self): os.killpg(self.process.pid, signal.SIGKILL); self.process.wait()

    def epochs(self, before):
        "Those that were told of other runs than this, as run and epoch."
        try:
            with closing(sqlite3.connect(f"file:{self.folder}/mlflow.db?mode=ro", uri=True)) as db:
                return db.execute("SELECT run_uuid, step FROM metrics WHERE key = 'train/box' AND run_uuid != ?", [before]).fetchall()
        except sqlite3.Error: return []


def store(uri):
    "All that an embedded store holds: tables and artifacts."
    file = embedded(uri)
    with closing(sqlite3.connect(file)) as db: tables = list(db.iterdump())
    return tables, {p: p.read_bytes() for p in file.parent.rglob("*") if p.is_file() and not p.name.startswith(file.name)}


def runs(client):
    "Every run there is, the oldest first, all in the one experiment; and no stray one."
    experiments = client.search_experiments(view_type=ViewType.ALL)
    found = client.search_runs([e.experiment_id for e in experiments], run_view_type=ViewType.ALL, order_by=["attributes.start_time ASC"])
    active = {e.name for e in experiments if e.lifecycle_stage == "active"}
    assert active == {"workspace", *([] if embedded(client.tracking_uri) else ["Default"])}, "named like the folder; a server makes its own besides"
    ours = client.get_experiment_by_name("workspace").experiment_id
    assert {r.info.experiment_id for r in found} == {ours}
    logged = client.search_logged_models([e.experiment_id for e in experiments])
    assert {m.status.value for m in logged} <= {"READY"}
    assert sorted(m.model_id for m in logged) == sorted(v.model_id for v in versions(client, "detector")), "no half models, no stray ones"
    return found


def complete(client, run, workspace, executed=("train", "evaluate")):
    "Check that the run of what lies in the workspace now has all of it: once, and as it lies there."
    id, model = run.info.run_id, json.loads((workspace/"data/models/model.json").read_text())
    assert (run.info.status, run.data.tags["nbs.model"], run.data.tags["nbs.data"]) == ("FINISHED", model["tensors"], model["data"])
    rows = list(csv.DictReader((workspace/"data/reports/curves.csv").open()))
    for column in set(rows[0]) - {"epoch"}:
        points = client.get_metric_history(id, column.replace("_", "/", 1))
        assert sorted(m.step for m in points) == [int(r["epoch"]) for r in rows], "each epoch once"
        assert [m.value for m in sorted(points, key=lambda m: m.step)] == [float(r[column]) for r in rows]
    assert run.data.metrics["test/map"] == workspace.report("evaluate")["map"] and run.data.metrics["best/map50"] == workspace.report("train")["val_map50"]
    assert run.data.params["train.epochs"] == str(len(rows)) and {"nbs.stage.train", "nbs.stage.evaluate"} <= set(run.data.tags)
    places = [f.path for folder in (None, "reports", "notebooks") for f in client.list_artifacts(id, folder)]
    pages = {f"notebooks/{n}.{kind}" for n, s in (("40_train", "train"), ("50_evaluate", "evaluate")) if s in executed for kind in ("ipynb", "html")}
    assert {"params.yaml", "dvc.lock", "reports/profile.json", "reports/evaluate.json", "reports/errors.csv", "reports/worst.png", *pages} <= set(places)
    for place, file in {"params.yaml": "params.yaml", "dvc.lock": "dvc.lock", "reports/profile.json": "data/reports/profile.json"}.items():
        assert Path(client.download_artifacts(id, place)).read_bytes() == (workspace/file).read_bytes()


@pytest.fixture
def ready(finished, tmp_path):
    "A finished workspace, `nbs` in it, and the embedded store that its training was told to."
    nbs = Nbs(finished, tmp_path)
    yield finished, nbs, f"sqlite:///{finished.folder}/data/mlflow/mlflow.db"
    nbs.close()


def test_killed_while_it_publishes(ready):
    "Later and later, until it gets through: the run that was live has all, there is one version, and once more does nothing."
    workspace, nbs, uri = ready
    client, killed = connect(uri), 0
    [live] = runs(client)
    assert live.info.status == "FINISHED" and [m.step for m in client.get_metric_history(live.info.run_id, "train/box")] == [1]
    assert "`nbs publish`" in nbs.refused("gate") and runs(client)[0].to_dictionary() == live.to_dictionary()
    for _ in range(100):
        pid, place = nbs.start("publish")
        time.sleep(.1 + .15 * killed)
        with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        if nbs.end((pid, place))[0] != -signal.SIGKILL: break
        killed += 1
    assert killed > 2, "it was over before it could be stopped"
    assert workspace.run("nbs", "publish") == f"published before: run {live.info.run_name}; version 1\n"
    [run], [version] = runs(client), versions(client, "detector")
    assert (run.info.run_id, version.run_id) == (live.info.run_id,) * 2 and "nbs.recreated" not in run.data.tags
    complete(client, run, workspace)
    before = store(uri)
    assert json.loads(nbs("publish", "--json")) == dict(run=run.info.run_id, name=run.info.run_name, made=False, version=1, registered=False, changed=False)
    assert store(uri) == before
    told = json.loads(nbs("publish", "--gate", "--json"))
    assert (told["version"], told["gate"]["version"], told["gate"]["promoted"], told["gate"]["new"]) == (1, 1, True, True)
    code = "import sys; from nbs_lib.cli import main; sys.argv[1:] = 'publish', '--gate', '--json'; main()"
    said = workspace.run("python", "-X", "importtime", "-c", code)  # nothing changed since, so nobody asks MLflow
    assert json.loads(said.splitlines()[-1]) == dict(told, gate=dict(told["gate"], new=False)) and not re.search(r"\| +mlflow$", said, re.M)
    connect(uri).set_registered_model_tag("detector", "seen", "yes")
    assert json.loads(nbs("publish", "--gate", "--json"))["gate"]["text"] == "is champion"


def test_published_by_two_at_once_and_what_people_get_wrong_then(ready, tmp_path):
    "A store that knows nothing gets one run and one version from files, both processes say the same. Refusals are one line, and the store is as it was."
    workspace, nbs, uri = ready
    shutil.rmtree(workspace/"data/mlflow")
    calls = [nbs.start("publish", "--json") for _ in range(2)]
    (one, told, _), (two, other, _) = map(nbs.end, calls)
    told, other = json.loads(told), json.loads(other)
    assert one == two == 0 and (told["run"], told["version"]) == (other["run"], other["version"]) == (other["run"], 1)
    assert sorted([told["made"], other["made"]]) == sorted([told["registered"], other["registered"]]) == [False, True]
    client = connect(uri)
    [run], [version] = runs(client), versions(client, "detector")
    assert version.run_id == run.info.run_id == told["run"] and run.data.tags["nbs.recreated"] == "true"
    complete(client, run, workspace)
    before = store(uri)

    def without(path, says, *commands, text=None):
        "Refusals while a file or folder is away, or says something else."
        (workspace/path).rename(tmp_path/"aside")
        if text: (workspace/path).write_text(text((tmp_path/"aside").read_text()))
        for args in commands: assert says in nbs.refused(*args), args
        (tmp_path/"aside").rename(workspace/path)
        assert store(uri) == before

    other = lambda key: lambda text: json.dumps(json.loads(text) | {key: "0123456789abcdef"})
    without("data/models", "model", ["publish"], ["gate"])
    without("data/models/model.json", "`make run` trains one", ["publish"])
    without("data/reports/evaluate.json", "holds no evaluate.json", ["publish"])
    without("data/reports/evaluate.json", "speaks of other weights", ["publish"], text=other("model"))
    without("data/reports/train.json", "speaks of other weights", ["publish"], text=other("tensors"))
    without("data/models/model.json", "`nbs publish` registers it", ["gate"], text=other("tensors"))
    without("data/processed/train.json", "other data", ["publish"], text=lambda text: text.replace('"0"', '"zero"', 1))
    without("params.yaml", "'tflite' is no format", ["publish"], text=lambda text: text.replace("exports: []", "exports: [tflite]"))
    without("params.yaml", "Invalid model name 'a/b'", ["publish"], ["gate"], text=lambda text: text.replace("model: detector", "model: a/b"))

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        old = tmp_path/"old.db"
        shutil.copyfile(embedded(uri), old)
        with closing(sqlite3.connect(old)) as db: db.execute("UPDATE alembic_version SET version_num = 'cbc13b556ace'"); db.commit()
        for wrong, says in {f"sqlite:///{old}": "mlflow db upgrade", f"http://127.0.0.1:{nobody.getsockname()[1]}": "does not answer", "foo://x": "foo://x",
                            f"file://{tmp_path}/runs": f"file://{tmp_path}/runs", f"{tmp_path}/runs": f"{tmp_path}/runs"}.items():
            for command in ("publish", "gate"): assert says in nbs.refused(command, MLFLOW_TRACKING_URI=wrong)
    assert not (tmp_path/"runs").exists() and store(uri) == before

    shutil.rmtree(version.source)
    before = store(uri)
    assert "artifacts of version 1 of 'detector' are gone" in nbs.refused("gate")
    assert "has no version '2'" in nbs.refused("gate", 2) and "no version of 'other'" in nbs.refused("gate", 1, "--model", "other")
    assert store(uri) == before


@pytest.fixture(scope="module")
def three(_finished, tmp_path_factory):
    "A workspace that was trained three times, before servers that died and hung, and published after each; what was seen of it, in order."
    folder = tmp_path_factory.mktemp("three")
    workspace, server, seen = _finished.copy(folder/"workspace"), Server(folder), {}
    tracked = dict(MLFLOW_TRACKING_URI=server.uri)
    nbs = Nbs(workspace, folder)
    publish, told = lambda: json.loads(nbs("publish", "--json", **tracked)), lambda: server.epochs(seen["files"]["run"])
    server.start()
    try:
        workspace.set(train=dict(seed=0))  # as it was, in the form in which it comes back below
        seen["files"] = publish()

        workspace.set(train=LIKE_NEW)
        dvc = workspace.start("dvc", "repro", env=tracked)
        wait(lambda: told() or dvc.poll() is not None)
        seen["live"] = dvc.poll(), told()
        processes(workspace)["runner"].kill()
        dvc.communicate()
        wait(lambda: not processes(workspace))
        seen["stopped"] = dvc.returncode, told()

        dvc = workspace.start("dvc", "repro", env=tracked)
        wait(lambda: len(told()) > len(seen["stopped"][1]) or dvc.poll() is not None)
        seen["went on"] = told()
        server.kill()
        seen["said"], seen["status"] = dvc.communicate()[0], dvc.returncode
        seen["report"], seen["refused"] = workspace.report("train"), nbs.refused("publish", **tracked)
        server.start()
        seen["before"] = connect(server.uri).get_run(seen["live"][1][0][0]).info.status
        seen["completed"] = publish()
        complete(connect(server.uri), connect(server.uri).get_run(seen["completed"]["run"]), workspace)
        seen["found"] = json.loads((workspace/"data/reports/detections.json").read_text())

        workspace.set(train=dict(LIKE_NEW, epochs=1, seed=2))
        with socket.socket() as hangs:
            hangs.bind(("127.0.0.1", 0)); hangs.listen(100)
            seen["hung"] = workspace.run("dvc", "repro", env=dict(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{hangs.getsockname()[1]}"))
        seen["anew"] = publish()
        complete(connect(server.uri), connect(server.uri).get_run(seen["anew"]["run"]), workspace)
        yield workspace, server, lambda *args, **kw: nbs(*args, **kw, **tracked), seen
    finally: server.kill(); nbs.close()


@pytest.mark.xdist_group("three")  # or each worker would train three times
def test_three_trainings_are_three_runs(three):
    workspace, server, nbs, seen = three
    client = connect(server.uri)
    status, told = seen["live"]
    [id] = {run for run, _ in told}
    assert status is None and 0 < len(told) < EPOCHS, "epochs come while it trains"
    status, told = seen["stopped"]
    assert status and len(told) < EPOCHS
    assert {run for run, _ in seen["went on"]} == {id} and len(told) < len(seen["went on"]) < EPOCHS, "the same run, and the server died before its end"
    assert seen["status"] == 0 and seen["said"].count("not tracked") == 1 and "Traceback" not in seen["said"]
    assert (seen["report"]["epochs"], seen["report"]["resumed"]) == (EPOCHS, True)
    assert f"{server.uri} does not answer" in seen["refused"] and seen["before"] == "RUNNING"
    assert (seen["completed"]["run"], seen["completed"]["made"], seen["completed"]["registered"]) == (id, False, True)
    assert seen["hung"].count("not tracked") == 1 and "takes too long" in seen["hung"] and seen["anew"]["made"]
    ids = [seen[k]["run"] for k in ("files", "completed", "anew")]
    assert [v.run_id for v in versions(client, "detector")] == ids and sorted(r.info.run_id for r in runs(client)) == sorted(ids)
    assert {r.info.status for r in runs(client)} == {"FINISHED"}

    workspace.set(train=dict(epochs=1, seed=0, lr0=.003, settings=dict(nbs=16, warmup_epochs=1., mosaic=0., fliplr=0.)))
    assert "Stage 'train' is cached - skipping run" in workspace.run("dvc", "repro")
    again = json.loads(nbs("publish", "--json"))
    assert again == dict(seen["files"], made=False, registered=False, changed=False) and len(runs(client)) == len(versions(client, "detector")) == 3


@pytest.mark.xdist_group("three")
def test_the_gate_and_back(three, tmp_path):
    "The test's boxes are what the second model finds: no training of seconds has more to be right about."
    workspace, server, nbs, seen = three
    client, test = connect(server.uri), workspace/"data/processed/test.json"
    boxes = [dict(b, id=i, area=b["bbox"][2] * b["bbox"][3], iscrowd=0) for i, b in enumerate(seen["found"], 1)]
    test.write_text(json.dumps(dict(json.loads(test.read_text()), annotations=[{k: v for k, v in b.items() if k != "score"} for b in boxes])))
    first, better = (json.loads(nbs("gate", n, "--json")) for n in (1, 2))
    assert (first["champion"], first["promoted"]) == (None, True)
    assert (better["champion"], better["promoted"]) == (1, True) and better["low"] > .5
    worse = json.loads(nbs("gate", 3, "--json", status=3))
    assert (worse["champion"], worse["promoted"]) == (2, False) and worse["high"] < -.5 and worse["text"].startswith("refused: mAP 0.0")
    assert worse["map"]["champion"] - worse["map"]["candidate"] == pytest.approx(-worse["difference"], abs=1e-6)
    for decision, run in zip((first, better, worse), (seen[k]["run"] for k in ("files", "completed", "anew"))):
        assert {f"gate/{decision['key']}.{kind}" for kind in ("json", "png")} <= {f.path for f in client.list_artifacts(run, "gate")}
        assert json.loads(Path(client.download_artifacts(run, f"gate/{decision['key']}.json")).read_text())["promoted"] == decision["promoted"]
    again = json.loads(nbs("gate", 3, "--json", status=3))
    assert again == dict(worse, new=False)

    nbs("rollback", "--why", "misses cells")
    entries = json.loads(nbs("history", "--json"))
    assert [(e["version"], e["before"], e["kind"]) for e in entries] == [(1, None, "gate"), (2, 1, "gate"), (1, 2, "rollback")]
    assert entries[-1]["why"] == "misses cells"
    known = json.loads(nbs("lineage", 2, "--json"))
    assert (known["run_id"], known["params"]["train.epochs"], known["params"]["train.seed"]) == (seen["completed"]["run"], str(EPOCHS), "1")
    assert known["promotions"] == [entries[1]] and known["gate"]["gate"]["key"] == better["key"] and known["data"] and known["metrics"]["test/map"] == 0
    assert {"notebooks/40_train.ipynb", "notebooks/50_evaluate.html"} <= set(known["notebooks"]) and set(known["stages"]) >= {"fetch", "train", "evaluate"}
    assert "version 2 made way for version 1 (rollback" in nbs("gate", 2, status=3) and history(client, "detector") == entries

    pictures, code = sorted((workspace/"data/processed/images/test").iterdir()), """
import json, sys, mlflow
table = mlflow.pyfunc.load_model("models:/detector@champion").predict(sys.argv[1:], params={"conf": 1e-4})
assert not [m for m in sys.modules if m.split(".")[0] in ("nbs_lib", "flows")]
print(table.to_json(orient="values", double_precision=15))"""
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW", "NBS", "YOLO", "ULTRALYTICS"))} | dict(MLFLOW_TRACKING_URI=server.uri)
    done = subprocess.run([sys.executable, "-c", code, *pictures], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from nbs_lib.predict import load, predict
    bundle = download(client, "detector", 1, tmp_path/"bundle")
    assert json.loads((bundle/"model.json").read_text())["tensors"] == client.get_run(seen["files"]["run"]).data.tags["nbs.model"]
    expected = predict(load(bundle, "cpu"), pictures, conf=1e-4, iou=.7, max_det=100)
    rows = [(i, label, *box) for i, b in enumerate(expected) for label, *box in zip(b.label, b.score, *b.xyxy.T)]
    found = json.loads(done.stdout.splitlines()[-1])
    assert rows and [r[:2] for r in found] == [list(r[:2]) for r in rows] and np.allclose([r[2:] for r in found], [r[2:] for r in rows], atol=1e-4)
