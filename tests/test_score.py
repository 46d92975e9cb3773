"Batch scoring: once, the same whoever does it and however it was named, killed and gone on with, told in one line where it cannot be."
import json, re, shutil, time
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import PrefectServer, last, wait
from nbs_lib.config import read_json
from nbs_lib.deadletter import Letters
from nbs_lib.ingest import ingest
from nbs_lib.scenes import write_scenes
from test_schedules import marked

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("prefect")]
MONDAY = "data/incoming/monday"


@pytest.fixture(scope="module")
def _champion(_judged, tmp_path_factory):
    "A workspace with a champion, and with a batch of good and bad pictures."
    workspace = _judged.copy(tmp_path_factory.mktemp("champion")/"workspace")
    workspace.set(score=dict(conf=1e-6, max_det=5, shard=16, device="cpu"))
    write_scenes(workspace/"scenes", scenes=dict(test=80), side=64)
    shutil.copytree(workspace/"scenes/test", workspace/MONDAY)
    for name, data in {"night/empty.png": b"", "broken.jpg": (workspace/MONDAY/"00001.jpg").read_bytes()[:300], "page.gif": b"<html>"}.items():
        (workspace/MONDAY/name).parent.mkdir(exist_ok=True)
        (workspace/MONDAY/name).write_bytes(data)
    return workspace


@pytest.fixture(scope="module")
def scored(_champion, server, tmp_path_factory):
    "The same after an undisturbed run."
    workspace = _champion.copy(tmp_path_factory.mktemp("scored")/"workspace")
    score(workspace, server, MONDAY)
    return workspace


@pytest.fixture
def champion(_champion, tmp_path): return _champion.copy(tmp_path/"champion/workspace")


def score(workspace, server, *words, status=0, **env):
    "Its last line, without those of Prefect's log, which may come later."
    said = workspace.run("python", "-m", "flows.score", *words, env=server.env | env, status=status)
    assert "Traceback" not in said, said
    return last(said)


def results(workspace, batch="monday"):
    "Every file of a scored batch; the drawn pictures, too."
    files = (p for p in (workspace/"data/predictions"/batch).rglob("*") if p.is_file())
    return {p.relative_to(workspace/"data/predictions"/batch).as_posix(): p.read_bytes() for p in files}


def test_scored_once(scored, server):
    report, before = read_json(scored/"data/predictions/monday/report.json"), results(scored)
    table = pq.read_table(scored/"data/predictions/monday/predictions.parquet").to_pandas()
    assert len(table) == report["boxes"] > 100 and set(table.version) == {"1"} and report["scored"] == table.picture.nunique() + report["without_boxes"]
    assert set(table.run) == {report["run"]} and len(report["run"]) == 32
    assert (report["pictures"], report["scored"], report["letters"]) == (83, 80, dict(unreadable_image=3))
    told = json.loads(score(scored, server, MONDAY, "--json"))
    assert told == [dict(batch="data/predictions/monday", new=False, **report)]
    said = scored.run("python", "-X", "importtime", "-m", "flows.score", MONDAY, env=server.env)
    assert "nothing new: the champion saw data/incoming/monday before" in said and results(scored) == before
    assert re.search(r"\| +nbs_lib.score$", said, re.M) and not re.search(r"\| +(torch|ultralytics)$", said, re.M)


@pytest.mark.flows
def test_letters_have_the_codes_of_ingest(champion, server, real, tmp_path):
    shutil.copytree(real/"badimages", champion/"data/incoming/odd")
    (champion/"data/incoming/odd/classes.txt").write_text("digit\n")
    score(champion, server, "data/incoming/odd")
    ingest(tmp_path/"out", root=champion/"data/incoming", sources=[dict(path="odd", format="yolo", background=True)], classes=[], max_pixels=50_000_000,
           min_side=10, overhang=.1, on_bad_box="reject_box")
    refused = lambda file: {(l.picture, l.code) for l in Letters(file) if l.level == "picture" and l.code != "conflicting_duplicate"}
    ours = refused(champion/"data/predictions/odd/dead_letters.jsonl")
    assert ours == refused(tmp_path/"out/dead_letters.jsonl") and len(ours) > 50 and len({code for _, code in ours}) >= 3


@pytest.mark.flows
def test_the_same_on_one_process_and_on_ray(champion, scored, server):
    for words in (["--workers", 1], ["--task-runner", "ray"]):
        shutil.rmtree(champion/"data/cache/score", ignore_errors=True); shutil.rmtree(champion/"data/predictions", ignore_errors=True)
        assert "by version 1" in score(champion, server, MONDAY, *words)
        assert results(champion) == results(scored), words
    assert not marked(champion)


@pytest.mark.flows
def test_another_runtime_finds_the_same(champion, scored, server):
    champion.set(score=dict(runtime="onnx"))
    made = []
    for workers in (2, 1):
        shutil.rmtree(champion/"data/cache/score", ignore_errors=True)
        score(champion, server, MONDAY, "--workers", workers)
        made.append(results(champion))
    assert made[0] == made[1] and len([*(champion/"data/cache/runtimes").glob("*/best.onnx")]) == 1
    ours, theirs = (pq.read_table(w/"data/predictions/monday/predictions.parquet").to_pandas() for w in (champion, scored))
    assert ours.picture.equals(theirs.picture) and np.allclose(ours.score, theirs.score, rtol=.01, atol=0)


@pytest.mark.flows
def test_a_list_and_a_glob_give_the_same_boxes(champion, scored, server):
    names = sorted(p.relative_to(champion/MONDAY).as_posix() for p in (champion/MONDAY).rglob("*.jpg"))
    (champion/MONDAY/"seen.txt").write_text("".join(f"{n}\n" for n in [*reversed(names), "gone.jpg"]))
    score(champion, server, f"{MONDAY}/seen.txt"), score(champion, server, f"{MONDAY}/**/*.*")
    rows = lambda workspace, batch: pq.read_table(workspace/f"data/predictions/{batch}/predictions.parquet").to_pylist()
    assert rows(champion, "monday-seen.txt") == rows(champion, "monday-_-_._") == rows(scored, "monday")
    assert read_json(champion/"data/predictions/monday-seen.txt/report.json")["letters"] == dict(missing_image=1, unreadable_image=1)


@pytest.mark.flows
@pytest.mark.parametrize("runner", ["process", "ray"])
def test_after_a_kill_the_next_run_goes_on(champion, scored, server, runner):
    flow = champion.start("python", "-m", "flows.score", MONDAY, "--task-runner", runner, env=server.env, start_new_session=True)
    shards = lambda: {p: p.stat().st_mtime_ns for p in (champion/"data/cache/score/monday").glob("[0-9a-f]*/predictions.parquet")}
    wait(lambda: shards() or flow.poll() is not None)
    flow.kill()
    said, begin = flow.communicate()[0], time.monotonic()
    while marked(champion) and time.monotonic() < begin + 10: time.sleep(.1)
    assert not marked(champion) and not results(champion), said
    kept, all = shards(), -(-read_json(scored/"data/predictions/monday/report.json")["pictures"] // 16)
    assert 0 < len(kept) < all
    assert "by version 1" in score(champion, server, MONDAY)
    assert results(champion) == results(scored) and kept.items() <= shards().items() and len(shards()) == all


@pytest.mark.flows
@pytest.mark.parametrize("back", [True, False])
def test_a_server_that_goes_while_a_batch_is_scored(champion, scored, tmp_path, back):
    "Back again, the run completes; gone for good, it ends in one line, and what was scored is kept."
    (own := PrefectServer(tmp_path/"server")).folder.mkdir()
    own.start()
    try:
        flow = champion.start("python", "-m", "flows.score", MONDAY, "--workers", 1, env=own.env)
        wait(lambda: [*(champion/"data/cache/score/monday").glob("[0-9a-f]*/predictions.parquet")] or flow.poll() is not None)
        own.kill()
        if back: own.start()
        said = flow.communicate(timeout=600)[0]
        if not back:
            assert flow.returncode == 1 and re.search("^score: the Prefect server at .* went away, and did not come back", said, re.M), said
            assert "Traceback" not in said, said
            own.start()
            score(champion, own, MONDAY)
        assert not marked(champion) and results(champion) == results(scored), said
    finally: own.kill()


@pytest.mark.flows
def test_pictures_are_drawn_later_and_without_the_model(champion, scored, server):
    score(champion, server, MONDAY)
    before = {p: p.stat().st_mtime_ns for p in (champion/"data/cache/score/monday").glob("*/predictions.parquet")}
    score(champion, server, MONDAY, "--draw")
    after = results(champion)
    assert {name: data for name, data in after.items() if not name.startswith("pictures/")} == results(scored)
    assert sum(name.startswith("pictures/") for name in after) == read_json(champion/"data/predictions/monday/report.json")["scored"]
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "nothing new" in score(champion, server, MONDAY, "--draw") and "nothing new" in score(champion, server, MONDAY)


@pytest.mark.flows
def test_each_folder_and_that_of_the_day(champion, server):
    today = f"{datetime.now(UTC).astimezone():%Y-%m-%d}"
    (champion/MONDAY).rename(champion/"data/elsewhere")
    for name in (today, "2001-01-01"): shutil.copytree(champion/"scenes", champion/f"data/incoming/{name}")
    assert f"data/predictions/{today}: 80 pictures" in score(champion, server, "data/incoming", "--batch", "%Y-%m-%d")
    assert sorted(p.name for p in (champion/"data/predictions").iterdir()) == [today]
    (champion/"data/incoming/empty").mkdir()
    said = score(champion, server, "data/incoming", "--batch", "*", status=1)
    assert "data/incoming/empty: there are no pictures in it" in said and "data/predictions/2001-01-01: 80 pictures" in said and today not in said
    (champion/"data/incoming/empty").rmdir()
    assert "nothing new" in score(champion, server, "data/incoming", "--batch", "*")


@pytest.mark.flows
def test_what_cannot_be_scored_is_one_line(champion, finished, server):
    (champion/"data/incoming/empty").mkdir()
    for words, says in {("data/incoming/empty",): "data/incoming/empty: there are no pictures in it",
                        ("data/incoming/gone",): "data/incoming/gone: there is no such folder, list or glob of pictures",
                        ("data/incoming", "--batch", "%Y-%m-%d"): f"data/incoming: there is no folder {datetime.now(UTC).astimezone():%Y-%m-%d} in it",
                        (MONDAY, "--task-runner", "ray", "--address", "127.0.0.1:9"): "no Ray cluster answers at 127.0.0.1:9 ([Errno 111]"}.items():
        assert says in score(champion, server, *words, status=1)
    assert "no version of 'detector' is registered" in score(finished, server, "data/incoming", status=1)
    said = champion.run("python", "-m", "flows.score", "--task-runner", "dask", env=server.env, status=2)
    assert "invalid choice: 'dask'" in said
    failed = server.ask("/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["FAILED"]}}}})
    assert any("data/incoming/empty: there are no pictures" in r["state"]["message"] for r in failed)


@pytest.mark.flows
def test_a_batch_that_vanishes_loses_nothing(champion, scored, server):
    score(champion, server, MONDAY)
    champion.set(score=dict(iou=.6))
    flow = champion.start("python", "-m", "flows.score", MONDAY, "--workers", 1, env=server.env)
    known = set((champion/"data/cache/score/monday").iterdir())
    wait(lambda: set((champion/"data/cache/score/monday").iterdir()) - known or flow.poll() is not None)
    (champion/MONDAY).rename(champion/"data/elsewhere")
    said = flow.communicate()[0]
    assert flow.returncode == 1 and "was there when scoring began, and is gone" in said.strip().splitlines()[-1] and "Traceback" not in said, said
    assert results(champion) == results(scored)
    (champion/"data/elsewhere").rename(champion/MONDAY)
    assert "by version 1" in score(champion, server, MONDAY)


@pytest.mark.flows
def test_one_at_a_time(champion, server):
    flow = champion.start("python", "-m", "flows.score", MONDAY, "--workers", 1, env=server.env)
    wait(lambda: (champion/"data/cache/score/monday/lock").exists() or flow.poll() is not None)
    assert score(champion, server, MONDAY, "--json", status=3) == "skipped: another run scores in this workspace"
    assert "by version 1" in flow.communicate()[0]
