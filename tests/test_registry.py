"The registry: switches at once, from several processes, undone, interrupted; and what people get wrong."
import getpass, json, os, shutil, signal, socket, sqlite3, subprocess, sys, time
from pathlib import Path
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from nbs_lib import cli
from nbs_lib.config import WrongCall, read_json
from nbs_lib.registry import _follow, champion, download, find, history, lineage, promote, register, rollback, stored, versions
from nbs_lib.store import connect, experiment

SAY = dict(why="because", who="ann@lab")

pytestmark = pytest.mark.xdist_group("registry")  # one server and one empty store for all


def publish(client, folder, bundle, name="detector"):
    "A version with artifacts, and a run it came from."
    cells, model = experiment(client, "cells"), folder/"model"
    (model/"data/bundle").mkdir(parents=True, exist_ok=True)
    (model/"MLmodel").write_text("flavors: {python_function: {data: data/bundle}}\n")
    (model/"data/bundle/best.pt").write_text(bundle)
    run = client.create_run(cells, tags={"mlflow.source.git.commit": "c0ffee"}).info.run_id
    logged = client.create_logged_model(cells, source_run_id=run).model_id
    client.log_model_artifacts(logged, str(model))
    return register(client, name, run, f"models:/{logged}", {"nbs.bundle": bundle})


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    "The folder of a store without anything in it; its tables take a second to make."
    folder = tmp_path_factory.mktemp("empty")
    connect(f"sqlite:///{folder}/mlflow.db", new=True)
    return folder


@pytest.fixture
def client(empty, tmp_path, monkeypatch):
    "Of an embedded store with three versions."
    shutil.copyfile(empty/"mlflow.db", tmp_path/"mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = connect(os.environ["MLFLOW_TRACKING_URI"])
    for n in (1, 2, 3): publish(client, tmp_path, f"b{n}")
    return client


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A client of MLflow's own server, which hands out the artifacts too."
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); address = f"http://127.0.0.1:{s.getsockname()[1]}"
    args = ["server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder/"artifacts", "--serve-artifacts",
            "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--workers", "1"]
    with open(folder/"log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", *map(str, args)], stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        for _ in range(600):
            try: urlopen(f"{address}/health").close(); break
            except OSError: time.sleep(.1); assert process.poll() is None, (folder/"log").read_text()
        client = connect(address)
        client.folder = folder
        for n in (1, 2, 3, 4): publish(client, folder, f"b{n}")
        yield client
    finally: os.killpg(process.pid, signal.SIGKILL); process.wait()


SWITCH = """import sys
from nbs_lib.registry import promote
from nbs_lib.store import connect
uri, who, one, other, times = sys.argv[1:]
client = connect(uri)
print(flush=True); sys.stdin.readline()
for n in range(int(times)): promote(client, "detector", (one, other)[n % 2], why=f"{who} {n}", who=who)"""


def switch_at_once(client, times):
    "Two processes, which promote two versions each in turn; every switch is in the history once, in each one's order, and the alias is the last one's."
    switchers = [subprocess.Popen([sys.executable, "-c", SWITCH, client.tracking_uri, who, *pair, str(times)], text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE) for who, pair in (("ann", "12"), ("bob", "34"))]
    for s in switchers: s.stdout.readline()
    for s in switchers: s.stdin.write("\n"); s.stdin.flush()
    assert [s.wait() for s in switchers] == [0, 0]
    for s in switchers: s.stdin.close(); s.stdout.close()
    entries = history(client, "detector")
    for who in ("ann", "bob"): assert [e["why"] for e in entries if e["who"] == who] == [f"{who} {n}" for n in range(times)]
    assert len(entries) == 2 * times and [e["before"] for e in entries] == [None, *(e["version"] for e in entries[:-1])]
    assert len({e["who"] for e in entries[:times]}) == 2, "they took turns: the test would show nothing"
    assert champion(client, "detector").version == entries[-1]["version"]


def test_switched_from_two_processes(client, tmp_path):
    publish(client, tmp_path, "b4")
    switch_at_once(client, 100)


def test_switched_on_a_server(server):
    switch_at_once(server, 10)


def test_an_alias_that_lags_is_set_again(client):
    "The moment in which the other process's entry came after this one had read: its late alias does not stay."
    promote(client, "detector", 1, **SAY)
    setting, others = client.set_registered_model_alias, [2]
    def late(name, alias, version):
        if others: promote(connect(client.tracking_uri), name, others.pop(), **SAY)
        setting(name, alias, version)
    client.set_registered_model_alias = late
    assert promote(client, "detector", 3, **SAY)["version"] == 3
    assert [e["version"] for e in history(client, "detector")] == [1, 3, 2] and champion(client, "detector").version == 2


def test_clocks_that_differ(client):
    "A machine whose clock was an hour ahead: what comes after it stands after it."
    promote(client, "detector", 1, **SAY)
    (key, text), = ((k, v) for k, v in client.get_registered_model("detector").tags.items() if k.startswith("promotion/"))
    ahead = "promotion/21000101T000000.000000Z-00000000"
    client.set_registered_model_tag("detector", ahead, text.replace('"version": 1', '"version": 2'))
    _follow(client, "detector")
    promote(client, "detector", 3, **SAY); rollback(client, "detector", **SAY)
    assert [e["version"] for e in history(client, "detector")] == [1, 2, 3, 2] and champion(client, "detector").version == 2


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from([1, 2, 3, "back"]), max_size=12))
def test_rollbacks_undo(client, steps):
    "A promotion lays a version on the others, a rollback takes the top one off; what cannot be done changes nothing."
    name = f"m{len(client.search_registered_models())}"
    for v in versions(client, "detector"): register(client, name, v.run_id, f"models:/{v.model_id}", v.tags)
    stack, done = [], []
    for step in steps:
        possible = len(stack) > 1 if step == "back" else stack[-1:] != [step]
        try: entry = rollback(client, name, **SAY) if step == "back" else promote(client, name, step, **SAY)
        except WrongCall: assert not possible; continue
        assert possible
        if step == "back": stack.pop()
        else: stack.append(step)
        done.append((stack[-1], "rollback" if step == "back" else "promote"))
        assert (entry["version"], entry["kind"]) == done[-1]
    best = champion(client, name)
    assert (best.version if best else None) == (stack[-1] if stack else None)
    assert [(e["version"], e["kind"]) for e in history(client, name)] == done


def test_more_than_a_page(client):
    one, = (v for v in versions(client, "detector") if v.version == 1)
    for _ in range(4, 224): client.create_model_version("detector", one.source, one.run_id)
    assert [v.version for v in versions(client, "detector")] == list(range(1, 224))
    assert find(client, "detector", "latest").version == 223
    with pytest.raises(WrongCall, match=r"no version '999'.*\b223\b"): find(client, "detector", 999)


def test_published_twice_at_once(client, tmp_path):
    "Both processes see that nobody has this bundle, both make a version; one stays."
    making, others = client.create_model_version, []
    def late(*args, **kw):
        if not others: others.append(0); others.append(publish(connect(client.tracking_uri), tmp_path, "b4"))
        return making(*args, **kw)
    client.create_model_version = late
    mine = publish(client, tmp_path, "b4")
    assert mine == others[1] and [v.version for v in versions(client, "detector")] == [1, 2, 3, 4]


def test_nothing_half_registered(client):
    "A store that makes the registered model, then takes no version."
    v = find(client, "detector", 1)
    for uri in (f"models:/{v.model_id}", "models:/m-" + 32*"0"):
        with pytest.raises(WrongCall): register(client, "other", v.run_id, uri, {"nbs.bundle": "b9", "a//b": "no key"})
    assert [m.name for m in client.search_registered_models()] == ["detector"]


def test_through_a_server(server, tmp_path):
    "Versions, bundles and what is gone, where the store is a server's."
    v = find(server, "detector", 2)
    assert stored(server, v) and v.source == f"models:/{v.model_id}"
    out = download(server, "detector", 2, tmp_path/"out")
    assert (out/"best.pt").read_text() == "b2" and sorted(p.name for p in out.iterdir()) == ["best.pt", "version.json"]
    assert read_json(out/"version.json") == dict(name="detector", version=2, run=v.run_id, model_id=v.model_id, bundle="b2")
    assert lineage(server, "detector", 2)["commit"] == "c0ffee"
    gone = publish(server, tmp_path, "b5")
    shutil.rmtree(next(server.folder.rglob(gone.model_id)))
    assert not stored(server, gone)
    with pytest.raises(WrongCall, match="are gone"): download(server, "detector", 5, out)
    with pytest.raises(WrongCall, match="are gone"): promote(server, "detector", 5, **SAY)
    assert (out/"best.pt").read_text() == "b2" and list(tmp_path.glob(".*")) == []
    assert history(server, "absent") == versions(server, "absent") == []


def test_downloaded_whole_or_not_at_all(client, tmp_path):
    "An artifact that cannot be read leaves what was there."
    out = download(client, "detector", 1, tmp_path/"out")
    shutil.rmtree(Path(find(client, "detector", 2).source)/"data/bundle")
    with pytest.raises(WrongCall) as said: download(client, "detector", 2, out)
    assert "\n" not in str(said.value) and (out/"best.pt").read_text() == "b1" and list(tmp_path.glob(".out*")) == []


@pytest.fixture
def nbs(capfd, monkeypatch):
    "`nbs` as a person calls it: what it printed, or the one line that it refused with."
    def nbs(*args, status=0):
        monkeypatch.setattr(sys, "argv", ["nbs", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end: cli.main()
        out, told = capfd.readouterr()
        assert (end.value.code or 0) == status, told
        if not status: assert told == ""; return out
        assert told.startswith("nbs: ") and told.count("\n") == 1 and len(told) < 700, told
        return told
    return nbs


def dump(client):
    with sqlite3.connect(client.tracking_uri.removeprefix("sqlite:///")) as db: return list(db.iterdump())


def test_a_day_with_the_registry(client, nbs):
    "Promote, roll back, look; everything also as JSON; and what MLflow's page shows."
    assert json.loads(nbs("history", "--json")) == [] and "no version of 'detector' was promoted yet" in nbs("history")
    first = json.loads(nbs("promote", "v1", "--why", "the first", "--json"))
    me = f"{getpass.getuser()}@{socket.gethostname()}"
    assert first == dict(version=1, before=None, kind="promote", who=me, when=first["when"], why="the first", decision=None)
    assert "version 3    instead of 1" in nbs("promote", "--why", "finds | more\nof them")
    back = json.loads(nbs("rollback", "--why", "misses cells", "--json"))
    assert (back["version"], back["before"], back["kind"]) == (1, 3, "rollback")
    assert [e["version"] for e in json.loads(nbs("history", "--json"))] == [1, 3, 1] and nbs("history").count("\n") == 3
    known = json.loads(nbs("lineage", "champion", "--json"))
    assert (known["version"], known["commit"], [e["why"] for e in known["promotions"]]) == (1, "c0ffee", ["the first", "misses cells"])
    assert "commit     c0ffee" in nbs("lineage", 1)
    page = client.get_registered_model("detector").description
    assert page.count("\n| 2") == 3 and "| 3 | 1 | promote |" in page and "finds \\| more of them |" in page
    assert client.get_model_version("detector", "1").tags["promoted"].endswith(f", by {me}: misses cells")


def test_what_people_get_wrong(client, nbs):
    why = "--why", "x"
    before = dump(client)
    for args, says in {("promote", "9", *why): "has no version '9'. There is: 1, 2, 3.", ("promote", "champoin", *why): "has no version 'champoin'",
                       ("lineage", "nine"): "no version 'nine'", ("lineage", "champion"): "is champion yet", ("rollback", *why): "nothing to roll back",
                       ("promote", "1", "--why", " "): "say why", ("promote", "1", "--why", "x" * 1001): "at most 1000",
                       ("promote", *why, "--model", "detectors"): "no version of 'detectors' is registered", ("lineage", "1", "--model", "a/b"): "a/b",
                       ("lineage", "1", "--model", "a'b\""): "no version of"}.items(): assert says in nbs(*args, status=2)
    assert dump(client) == before
    nbs("promote", 1, *why)
    before = dump(client)
    assert "is champion already" in nbs("promote", "1", *why, status=2) and "has no champion before it" in nbs("rollback", *why, status=2)
    assert dump(client) == before


def test_artifacts_that_are_gone(client, nbs):
    why = "--why", "x"
    for n in (1, 2): nbs("promote", n, *why)
    before = dump(client)
    shutil.rmtree(find(client, "detector", 3).source)
    assert "version 3 of 'detector' are gone" in nbs("promote", *why, status=2)
    shutil.rmtree(find(client, "detector", 1).source)
    assert "no other version could be promoted" in nbs("rollback", *why, status=2)
    assert dump(client) == before
    client.delete_model_version("detector", "1")
    before = dump(client)
    assert "version 1 of 'detector' was deleted: it was champion before 2" in nbs("rollback", *why, status=2)
    assert dump(client) == before


def moved(client): client.set_registered_model_alias("detector", "champion", "1")
def deleted(client): client.delete_registered_model_alias("detector", "champion")
def lost(client): client.delete_model_version("detector", "2")


@pytest.mark.parametrize("behind, says, commands", [
    (moved, "names version 1", [("history",)]), (lost, "is gone", [("rollback", "--why", "x")]),
    (deleted, "is gone", [("history", "--json"), ("rollback", "--why", "x"), ("lineage", "champion")])])
def test_an_alias_behind_our_back(client, nbs, behind, says, commands):
    "History and alias disagree: each command says so, nothing changes it but a promotion, which says what it mended."
    promote(client, "detector", 1, **SAY); promote(client, "detector", 2, **SAY)
    behind(client)
    before = dump(client)
    for args in commands:
        told = nbs(*args, status=2)
        assert "says that version 2 is champion" in told and says in told and "`nbs promote VERSION --why …`" in told
    assert dump(client) == before
    version = 1 if behind == lost else 2
    assert "(the alias `champion` " in nbs("promote", version, "--why", "mended") and champion(client, "detector").version == version


def test_an_alias_without_a_history(client, nbs):
    moved(client)
    assert "has no history of promotions, MLflow's alias `champion` names version 1" in nbs("rollback", "--why", "x", status=2)
    assert "named version 1 before" in nbs("promote", 1, "--why", "x") and nbs("history").count("\n") == 1


def test_killed_between_entry_and_alias(client, nbs):
    promote(client, "detector", 1, **SAY)
    code = """import os, signal, sys
from mlflow import MlflowClient
from nbs_lib.cli import main
MlflowClient.set_registered_model_alias = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # the moment after the entry
main()"""
    assert subprocess.run([sys.executable, "-c", code, "promote", "3", "--why", "newer"]).returncode == -signal.SIGKILL
    assert "says that version 3 is champion, MLflow's alias `champion` names version 1" in nbs("history", status=2)
    nbs("promote", 3, "--why", "mended")
    assert [(e["version"], e["before"]) for e in json.loads(nbs("history", "--json"))] == [(1, None), (3, 1), (3, 3)]


def test_an_empty_registered_model(client, nbs):
    "Left so by someone: there is nothing to show, nothing to promote, and a version can still be made."
    client.create_registered_model("other")
    before = dump(client)
    assert nbs("history", "--json", "--model", "other") == "[]\n"
    for args in (("promote", "--why", "x"), ("lineage", "1")): assert "no version of 'other' is registered" in nbs(*args, "--model", "other", status=2)
    assert "nothing to roll back" in nbs("rollback", "--why", "x", "--model", "other", status=2)
    assert dump(client) == before
    v = find(client, "detector", 1)
    assert register(client, "other", v.run_id, f"models:/{v.model_id}", v.tags).version == 1


def test_stores_that_are_none(empty, tmp_path, nbs, monkeypatch):
    "An older schema, no store, no database, a folder, nobody who answers."
    shutil.copyfile(empty/"mlflow.db", tmp_path/"old.db")
    with sqlite3.connect(tmp_path/"old.db") as db: db.execute("update alembic_version set version_num = 'cbc13b556ace'")
    (tmp_path/"bad.db").write_text("no database at all " * 100)
    free = socket.socket(); free.bind(("127.0.0.1", 0))  # and nobody listens
    for uri, says in {f"sqlite:///{tmp_path}/old.db": "mlflow db upgrade", f"sqlite:///{tmp_path}/absent.db": "nothing was tracked yet",
                      f"sqlite:///{tmp_path}/bad.db": "not a database", f"{tmp_path}/mlruns": "mlruns",
                      f"http://127.0.0.1:{free.getsockname()[1]}": "Connection refused"}.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        files = {p: p.read_bytes() for p in tmp_path.iterdir() if p.suffix == ".db"}
        for args in (("history",), ("promote", "--why", "x")): assert says in nbs(*args, status=2)
        assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.suffix == ".db"} == files
