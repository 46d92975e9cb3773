"Drift: batches that are like the judged pictures and batches that are not, what was asked live, and the request to retrain, on a real Prefect server."
import json, re, shutil
from datetime import UTC, datetime, timedelta

import pytest
from PIL import Image

from conftest import last, wait
from nbs_lib.config import read_json
from nbs_lib.requestlog import RequestLog
from test_retrain import listening

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("prefect")]


def batch(workspace, name, change=lambda image: image, copies=6):
    "The test pictures as a batch, several times, changed in some way."
    (folder := workspace/"data/incoming"/name).mkdir(parents=True)
    for file in sorted((workspace/"data/processed/images/test").iterdir()):
        with Image.open(file) as image:
            for i in range(copies): change(image.convert("RGB")).save(folder/f"{i}-{file.stem}.png")


def dark(image): return image.point(lambda v: v // 8)


def drift(workspace, server, *words, status=0, **env):
    "Its last line; the profile of the small test part has six pictures, so six are enough."
    said = workspace.run("python", "-m", "flows.drift", "--least", 6, *words, env=server.env | env, status=status)
    assert "Traceback" not in said, said
    return last(said)


def report(workspace): return read_json(max((workspace/"data/runs").glob("*/drift.json"), key=lambda file: file.stat().st_mtime))


@pytest.fixture(scope="module")
def _scored(_judged, server, tmp_path_factory):
    "A workspace whose champion scored two batches."
    workspace = _judged.copy(tmp_path_factory.mktemp("drift")/"workspace")
    batch(workspace, "by day"); batch(workspace, "at night", dark); batch(workspace, "one by one", copies=1)
    for name in ("by day", "at night"): workspace.run("python", "-m", "flows.score", f"data/incoming/{name}", env=server.env)
    return workspace


@pytest.fixture
def scored(_scored, tmp_path): return _scored.copy(tmp_path/"scored/workspace")


def test_which_batch_drifted(scored, server):
    "Told to people, written down, drawn; a batch that is like the judged pictures is not blamed."
    with listening() as (heard, address): said = drift(scored, server, NBS_NOTIFY=address)
    assert re.match(r"data/predictions/at night: 36 pictures drifted from the profile's 6: brightness \(median [\d.]+ → [\d.]+, distance 1.00\)", said), said
    assert "data/predictions/by day: 36 pictures are like the profile's 6" in said
    told = report(scored)["comparisons"]
    assert {name: of["verdict"] for name, of in told.items()} == {"data/predictions/at night": "drifted", "data/predictions/by day": "alike"}
    assert {"brightness", "contrast"} <= {name for name, test in told["data/predictions/at night"]["tests"].items() if test["drifted"]}
    assert {told["data/predictions/by day"]["tests"][name]["distance"] for name in ("brightness", "contrast", "size")} == {0}
    [message] = heard
    assert message["title"] == "pictures drifted" and "at night" in message["message"] and "by day" not in message["message"]
    [picture] = (scored/"data/runs").glob("*/drift.png")
    with Image.open(picture) as image: assert image.width > 800
    page = next(a["data"] for a in server.ask("/artifacts/latest/filter") if a["key"] == "drift")
    assert "| data/predictions/at night | brightness | **drifted** | 1.000 |" in page and "](data:image/jpeg;base64," in page


def test_what_was_asked_of_the_service_drifted(scored, server):
    "The log of requests is one more batch, of the champion's own answers alone."
    shutil.rmtree(scored/"data/predictions")
    log = RequestLog(f"sqlite:///{scored/'data/requests/requests.db'}")
    weights = read_json(scored/"data/models/model.json")["tensors"]
    for version, model, brightness in [("1", weights, 9.), ("2", weights, 90.), ("1", "of another registry", 90.)] * 40:
        log.put(dict(version=version, model=model, width=64, height=64, brightness=brightness, contrast=3., boxes=[], source="api"))
    for _ in range(40): log.put(dict(version="1", model=weights, width=64, height=64, brightness=90., boxes=[], conf=.9, source="api"))  # asked for fewer boxes
    log.put(dict(code="unreadable_image"))
    log.close()
    said = drift(scored, server)
    assert said.startswith("live: 40 pictures drifted from the profile's 6: brightness"), said


@pytest.mark.flows
def test_nothing_to_compare_is_one_line(finished, scored, server):
    nowhere = dict(MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert drift(finished, server) == "nothing to compare: no version is champion yet"
    assert drift(scored, server, "--hours", .0001) == "nothing to compare: version 1 saw no pictures in the last 0.0001 hours"
    assert "small batches together: too few pictures to judge: 72 against the profile's 6, and at least 99 are needed" in drift(scored, server, "--least", 99)
    assert "the tracking server http://127.0.0.1:9 does not answer" in drift(scored, server, status=1, **nowhere)
    assert "alpha lies between 0 and 1" in drift(scored, server, "--alpha", 2, status=1)
    assert not [*(finished/"data/runs").glob("*/drift.json")]


@pytest.mark.flows
def test_what_is_left_out_is_told(scored, server):
    "Batches of another version say nothing of this one, neither do those of older code; small ones are looked at together."
    for name in ("1", "2"):
        shutil.copytree(scored/"data/incoming/one by one", scored/f"data/incoming/{name}")
        (scored/f"data/incoming/{name}"/min(p.name for p in (scored/f"data/incoming/{name}").iterdir())).unlink()
        scored.run("python", "-m", "flows.score", f"data/incoming/{name}", env=server.env)
    (scored/"data/predictions/at night/pictures.parquet").unlink()
    file = scored/"data/predictions/by day/report.json"
    file.write_text(json.dumps(read_json(file) | dict(version="7")))
    said = drift(scored, server)
    assert "small batches together: 10 pictures are like the profile's 6" in said and "by day" not in said
    assert "data/predictions/at night is left out: " in said and "score the batch again" in said
    assert set(report(scored)["left_out"]) == {"data/predictions/at night"}


@pytest.mark.flows
def test_drift_asks_for_retraining(scored, server, tmp_path):
    "The event starts what names it in its triggers; without the wish there is none."
    starts = 'deployments:\n  - {name: a, flow: retrain, triggers: [nbs.drift], work_pool: {name: cpu}}\n'
    (scored/"s.yaml").write_text("work_pools: {cpu: process}\n" + starts)
    for words in (["init", "--quiet"], ["add", "--all"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all"]):
        scored.run("git", *words)
    scored.run("python", "-m", "flows.deploy", "--file", "s.yaml", "--source", scored.folder, env=server.env)
    started = lambda: [r for r in server.ask("/flow_runs/filter") if (r["created_by"] or {}).get("type") == "AUTOMATION"]
    drift(scored, server)
    assert not started()
    drift(scored, server, "--request-retraining")
    assert len(wait(started, 60, .5)) == 1
    day = dict(filter=dict(event=dict(name=["nbs.drift"]), occurred=dict(since=(datetime.now(UTC) - timedelta(hours=1)).isoformat())))
    [event] = wait(lambda: server.ask("/events/filter", day)["events"], 30, .5)  # the server writes them down a little later
    assert event["payload"]["drifted"] == ["data/predictions/at night"] and event["resource"]["prefect.resource.id"] == "nbs.champion.1"
