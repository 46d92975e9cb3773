"Schedules from a file: what is wrong in it is one line; one process serves them, survives its server, and leaves nothing when it is killed."
import json, signal, time
from contextlib import suppress
from datetime import UTC, datetime
from types import SimpleNamespace
from uuid import uuid4

import pytest

from conftest import PrefectServer, wait
from flows import reaper
from nbs_lib.config import WrongCall
from test_interruptions import before, moment_has_come, processes
from test_retrain import drop, registered

POOLS = "work_pools: {cpu: process}\n"
ONE = "deployments:\n  - {{name: a, flow: retrain, {}}}\n"
WRONG = {
    "schedules: [{cron: 'x y'}]": "deployment a: schedule 1: Invalid cron string",
    "schedules: [{cron: '0 2 * * *', timezone: Europe/Berln}]": "there is no timezone 'Europe/Berln'; did you mean 'Europe/Berlin'?",
    "schedules: [{interval: -3}]": "should be greater than 0, not -3",
    "schedules: [{rrule: FREQ=NEVER}]": "Invalid RRule string",
    "schedules: [{timezone: UTC}]": "name one of cron, interval and rrule, not none",
    "schedules: [{cron: '* * * * *', interval: 3}]": "name one of cron, interval and rrule, not cron and interval",
    "shedules: []": "there is no key shedules. Did you mean 'schedules'?",
    "parameters: {setle: 3}": "retrain has no parameter 'setle'. Did you mean 'settle'?",
    "parameters: {settle: soon}": "settle: Input should be a valid number",
    "parameters: {trian: {epochs: 3}}": "retrain has no parameter 'trian'. Did you mean 'train'?",
    "parameters: {train: {epochs: many}}": "train.epochs: Input should be a valid integer",
    "parameters: {train: {epochz: 3}}": "there is no key train.epochz. Did you mean 'epochs'?",
    "name: a/b": "name: String should match pattern",
    "work_pool: {name: cpo}": "work_pools has no pool 'cpo'. Did you mean 'cpu'?",
    "work_pool: {name: cpu, work_queue: fast}": "there is no key work_pool.work_queue. Did you mean 'work_queue_name'?",
}
WHOLE = {"work_pools: {cpu: proces}\ndeployments: []": "work_pools: cpu: there is no type 'proces'. Did you mean 'process'?",
         "work_pools: [cpu]\ndeployments: []": "a type is expected for each name", "x: 1": "one list is expected",
         "deployments: [{name: a, flow: retrian}]": "Did you mean 'retrain'?",
         "deployments: [{name: a, flow: retrain}, {name: a, flow: retrain}]": "two deployments retrain/a"}


def test_what_is_wrong_in_the_file_is_one_line(tmp_path):
    from flows.schedules import entries
    known = [("retrain", "nightly", False), ("score", "daily", True), ("drift", "weekly", False)]
    assert [(entry.flow, entry.name, entry.paused) for entry in entries()] == known
    for text, why in {**{POOLS + ONE.format(text): why for text, why in WRONG.items()}, **WHOLE}.items():
        (tmp_path/"s.yaml").write_text(text)
        with pytest.raises(WrongCall) as error: entries(tmp_path/"s.yaml")
        assert why in str(error.value) and "\n" not in str(error.value)


def test_the_day_is_that_of_the_line(tmp_path, monkeypatch):
    "A run due half an hour after midnight in Berlin scores the day that has just begun there, whatever the machine's clock says."
    from flows import score
    from flows.schedules import entries
    def read(schedules, parameters="pictures: data/incoming, batch: '%Y-%m-%d'"):
        line = f"deployments:\n  - {{name: a, flow: score, schedules: [{schedules}], parameters: {{{parameters}}}}}\n"
        (tmp_path/"s.yaml").write_text(line)
        return entries(tmp_path/"s.yaml")[0].parameters
    berlin, utc = "{cron: '30 0 * * *', timezone: Europe/Berlin}", "{interval: 60}"
    assert read(berlin)["timezone"] == "Europe/Berlin" and read("") == dict(pictures="data/incoming", batch="%Y-%m-%d")
    assert read(f"{berlin}, {utc}", "batch: '*', timezone: Asia/Tokyo")["timezone"] == "Asia/Tokyo" and not read(f"{berlin}, {utc}", "")
    with pytest.raises(WrongCall, match="its schedules have the timezones Europe/Berlin and UTC"): read(f"{berlin}, {utc}")
    assert "timezone" not in entries()[0].parameters and entries()[1].parameters["timezone"] == "UTC"

    due = SimpleNamespace(flow_run=SimpleNamespace(scheduled_start_time=datetime(2026, 1, 1, 23, 30, tzinfo=UTC)))
    monkeypatch.setattr(score, "runtime", due)
    for day in (1, 2): (tmp_path/f"2026-01-0{day}").mkdir()
    of = lambda zone: [path[-2:] for path in score.batches(str(tmp_path), "%Y-%m-%d", zone)]
    assert (of("UTC"), of("Europe/Berlin")) == (["01"], ["02"])
    with pytest.raises(WrongCall, match="there is no timezone 'Berlin'"): of("Berlin")


@pytest.mark.flows
def test_no_server_is_one_line(workspace):
    said = workspace.run("python", "-m", "flows.serve", env=dict(PREFECT_API_URL="http://127.0.0.1:9/api", PREFECT_HOME=str(workspace/"home")), status=2)
    assert said.startswith("serve: no Prefect server answers at http://127.0.0.1:9/api") and said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, *(pytest.param(s, marks=pytest.mark.flows) for s in (signal.SIGTERM, signal.SIGINT))])
def test_the_server_of_one_run_ends_with_it(workspace, number):
    run = workspace.start("python", "-m", "flows.drift", env=dict(PREFECT_HOME=str(workspace/"home")), start_new_session=True)
    wait(lambda: any("uvicorn" in word for process in marked(workspace) for word in process.cmdline()))
    run.send_signal(number)
    run.communicate()
    wait(lambda: not marked(workspace), 10)


class Served:
    "`flows.serve` in a workspace, with the server that it brings."
    def __init__(self, workspace, text):
        self.workspace, self.server = workspace, PrefectServer(workspace/"data")
        self.file = workspace/"schedules.yaml"
        self.file.write_text(text)

    def start(self):
        with open(self.workspace/"serve.log", "a") as log:
            command = f"exec python -m flows.serve --file schedules.yaml --port {self.server.port} >&{log.fileno()} 2>&1"
            self.process = self.workspace.start("bash", "-c", command, env=dict(PREFECT_HOME=str(self.workspace/"home")), pass_fds=[log.fileno()],
                                                start_new_session=True)
        wait_for(lambda: self.deployments())

    def deployments(self):
        with suppress(OSError): return {d["name"]: d for d in self.server.ask("/deployments/filter")}

    def runs(self, **which):
        found = self.server.ask("/flow_runs/filter", dict(sort="EXPECTED_START_TIME_ASC"))
        return [r for r in found if r["state"] and r["state"]["name"] != "Scheduled" and all(r[k] == v for k, v in which.items())]

    def ended(self, name, least=1, after=""):
        "Runs that ended so, as soon as there are so many."
        def look():
            with suppress(OSError):
                found = [r for r in self.runs() if r["state"]["name"] == name and r["expected_start_time"] > after]
                return found if len(found) >= least else None
        return wait_for(look)

    def kill(self):
        self.process.kill()
        self.process.wait()
        begin = time.monotonic()
        while (left := marked(self.workspace)) and time.monotonic() < begin + 10: time.sleep(.1)
        assert not left, left


def wait_for(condition): return wait(condition, 600, .5)


def marked(workspace):
    "All that bears the mark of this workspace, dead ones left out."
    return [process for process, env in reaper.marked() if env.get("NBS_STAGE_ROOT", "").endswith(f":{workspace.folder}") and not reaper.gone(process)]


def now(): return datetime.now(UTC).isoformat()


@pytest.mark.flows
@pytest.mark.timeout(1500)
def test_served_by_one_process(finished):
    "Nothing new five times, new data once; both servers killed; an event, a call; lines that go."
    served = Served(finished, ONE.format("schedules: [{interval: 20}], parameters: {settle: 1}, triggers: [nbs.incoming]"))
    served.start()
    try:
        served.ended("Completed")
        quiet = served.ended("Nothing new", least=5)
        assert registered(finished) == [1] and all(r["total_run_time"] < 15 for r in quiet)

        drop(finished, "week", seed=7)
        wait_for(lambda: "runner" in processes(finished))
        served.kill()
        begin = now()
        served.start()
        assert {r["state"]["message"] for r in served.ended("Crashed")} == {"its process was gone when serving began"}
        assert "version 2" in served.ended("Completed", after=begin)[0]["state"]["message"]
        served.ended("Nothing new", after=begin)
        assert registered(finished) == [1, 2]

        server = next(p for p in marked(finished) if "server" in p.cmdline())
        server.kill()
        begin = now()
        served.ended("Nothing new", least=2, after=begin)
        assert "is started again" in (finished/"serve.log").read_text()

        id = served.deployments()["a"]["id"]
        served.server.ask(f"/deployments/{id}/create_flow_run", dict(name="by call"))
        event = dict(id=str(uuid4()), occurred=now(), event="nbs.incoming", resource={"prefect.resource.id": "camera.1"}, payload={})
        with suppress(json.JSONDecodeError): served.server.ask("/events", [event])
        wait_for(lambda: any(r["state"]["type"] == "COMPLETED" for r in served.runs(name="by call")))
        wait_for(lambda: any((r["created_by"] or {}).get("type") == "AUTOMATION" and r["state"]["type"] == "COMPLETED" for r in served.runs()))

        served.kill()
        other = "  - {name: b, flow: retrain, schedules: [{cron: '0 2 * * *', timezone: Europe/Berlin}], paused: true}\n"
        served.file.write_text(ONE.format("schedules: []") + other)
        served.start()
        wait_for(lambda: set(served.deployments()) == {"a", "b"} and not served.deployments()["a"]["schedules"])
        assert [s["schedule"]["timezone"] for s in served.deployments()["b"]["schedules"]] == ["Europe/Berlin"] and served.deployments()["b"]["paused"]
        served.kill()
        served.file.write_text(ONE.format("schedules: [{interval: 3600}]"))
        served.start()
        wait_for(lambda: set(served.deployments()) == {"a"} and len(served.deployments()["a"]["schedules"]) == 1)
        assert not served.deployments()["a"]["paused"]
    finally:
        served.kill()


@pytest.mark.kills
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("stage", ["ingest", "train", "evaluate"])
def test_a_killed_serving_process_is_made_up_for_at_the_next_time(finished, stage):
    undisturbed = finished.results()
    before(finished, stage)
    served = Served(finished, ONE.format("schedules: [{interval: 20}], parameters: {settle: 1}"))
    served.start()
    try:
        wait_for(lambda: moment_has_come(finished, stage, "start"))
        time.sleep(1)
        served.kill()
        assert {p: b for p, b in finished.results().items() if p in undisturbed} != undisturbed, "it was over before it was killed"
        served.start()
        assert "version 1 passed" in served.ended("Completed")[0]["state"]["message"]
        assert {r["state"]["message"] for r in served.ended("Crashed")} == {"its process was gone when serving began"}
        served.ended("Nothing new")
        assert finished.results() == undisturbed and registered(finished) == [1]
    finally:
        served.kill()
