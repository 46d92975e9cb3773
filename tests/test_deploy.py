"Deployments for workers: what is wrong is one line; a worker gets code by a commit and data by the DVC remote; killed, it leaves nothing."
import os, shlex, signal, subprocess, sys, threading, time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from conftest import git, wait
from flows.runs import alone
from nbs_lib.config import WrongCall
from nbs_lib.registry import versions
from nbs_lib.store import connect
from test_interruptions import processes
from test_schedules import ONE, Served, marked, wait_for

pytestmark = pytest.mark.xdist_group("prefect")
POOL = "work_pools: {cpu: process, gpu: docker}\n"


@contextmanager
def refused(why):
    with pytest.raises(WrongCall) as error: yield
    assert why in str(error.value) and "\n" not in str(error.value)


def test_a_commit_that_workers_would_not_find(tmp_path, monkeypatch):
    from flows import deploy
    here, team = tmp_path/"here", tmp_path/"team.git"
    run = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=here, check=True)
    here.mkdir()
    monkeypatch.setattr(deploy, "ROOT", here)
    with refused("not a git repository"): deploy.by_commit(str(team), None)
    run("init", "--quiet", "--initial-branch", "main")
    (here/"params.yaml").write_text("a: 1\n")
    run("add", "--all")
    run("commit", "--quiet", "--message", "one")
    with refused(f"{team} does not give out commit"): deploy.by_commit(str(team), None)
    run("clone", "--quiet", "--bare", ".", str(team))
    project, version, steps, _ = deploy.by_commit(str(team), None)
    assert project == "team" and steps[0]["prefect.deployments.steps.git_clone"]["commit_sha"].startswith(version)
    (here/"params.yaml").write_text("a: 2\n")
    with refused("params.yaml changed since the last commit"): deploy.by_commit(str(team), None)
    assert deploy.by_commit(str(team), "main")[1] == version
    with refused("name the repository that workers clone"): deploy.by_commit("", "main")
    with refused("there is no commit 'none' here"): deploy.by_commit(str(team), "none")
    run("commit", "--quiet", "--all", "--message", "two")
    with refused("push it there"): deploy.by_commit(str(team), None)


def test_a_checkout_comes_to_the_commit(tmp_path):
    "What is mounted in it stays, what a run wrote over git's files only as long as the commit does; and it waits for a flow that is at work."
    from flows.deploy import in_checkout
    team, folder = tmp_path/"team", tmp_path/"checkout"
    (folder/"data/raw").mkdir(parents=True)
    (folder/"data/raw/a.jpg").write_text("a picture")
    team.mkdir()
    run = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=team, check=True, capture_output=True)
    run("init", "--quiet")
    shas = []
    for lock in ("one", "two"):
        (team/"dvc.lock").write_text(lock)
        run("add", "--all")
        run("commit", "--quiet", "--message", lock)
        shas.append(run("rev-parse", "HEAD").stdout.decode().strip())
    def pull(sha):
        step = in_checkout(str(folder), str(team), sha)[0]["prefect.deployments.steps.run_shell_script"]
        return subprocess.Popen(shlex.split(step["script"]), cwd=step["directory"])
    assert pull(shas[0]).wait() == 0 and (folder/"dvc.lock").read_text() == "one"
    (folder/"dvc.lock").write_text("of a run")
    assert pull(shas[0]).wait() == 0 and (folder/"dvc.lock").read_text() == "of a run"
    with alone(folder/"data/cache/score.lock"):
        waiting = pull(shas[1])
        time.sleep(2)
        assert waiting.poll() is None and (folder/"dvc.lock").read_text() == "of a run"
    assert waiting.wait(10) == 0 and (folder/"dvc.lock").read_text() == "two" and (folder/"data/raw/a.jpg").exists()


@contextmanager
def old_server():
    "One that says of itself that it is of another version."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'"2.19.0"' if self.path.endswith("version") else b"true")
        def log_message(self, *_): pass
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/api"
        http.shutdown()


@pytest.mark.flows
def test_deployed_as_the_file_says(workspace, server):
    "Pools, queues, a changed and a removed line; nothing to do the second time; what is refused."
    file = workspace/"s.yaml"
    def deploy(text, *code, status=0, **env):
        if text: file.write_text(POOL + text)
        return workspace.run("python", "-m", "flows.deploy", "--file", file, *code, env=server.env | env, status=status).strip()
    image = "--image", "registry:5000/team:3"
    on_gpu = "schedules: [{{cron: '0 2 * * *', timezone: Europe/Berlin}}, {{interval: 60}}], triggers: [nbs.incoming], paused: {}, " \
             "parameters: {{settle: {}}}, work_pool: {{name: gpu, work_queue_name: big, job_variables: {{env: {{A: b}}}}}}"
    first = ONE.format(on_gpu.format("true", 1)) + "  - {name: b, flow: retrain, work_pool: {name: gpu}}\n"
    assert deploy(first, *image).splitlines() == ["work pool cpu: created", "work pool gpu: created", "retrain/a: created", "retrain/b: created"]
    before = {d["name"]: d for d in server.ask("/deployments/filter")}
    assert deploy(None, *image).splitlines() == ["retrain/a: unchanged", "retrain/b: unchanged"]
    assert {d["name"]: d for d in server.ask("/deployments/filter")} == before
    a = before["a"]
    assert a["paused"] and a["parameters"] == {"settle": 1} and a["work_queue_name"] == "big" and a["global_concurrency_limit"]["limit"] == 1
    assert a["job_variables"] == {"env": {"A": "b"}, "image": "registry:5000/team:3"} and a["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert a["pull_steps"] == [{"prefect.deployments.steps.set_working_directory": {"directory": "/workspace"}}]
    assert a["entrypoint"] == "flows/retrain.py:retrain" and "train" in a["parameter_openapi_schema"]["properties"]
    pools = {p["name"]: p for p in server.ask("/work_pools/filter")}
    assert pools["cpu"]["type"] == "process" and "image" in pools["gpu"]["base_job_template"]["variables"]["properties"]

    assert deploy(ONE.format(on_gpu.format("false", 2)), *image).splitlines() == ["retrain/a: changed", "retrain/b: removed"]
    a, = server.ask("/deployments/filter")
    assert not a["paused"] and a["parameters"] == {"settle": 2} and a["id"] == before["a"]["id"] and len(server.ask("/automations/filter")) == 1

    def refuses(why, text, *code, **env):
        said = deploy(text, *(code or image), status=2, **env)
        assert said.startswith("deploy: ") and why in said and "\n" not in said, said
    refuses("retrain/a is on the server already, with tags deployed, deployed:team", None, "--image", "other:3")
    refuses("retrain/a is on the server already", None, *image, "--project", "other")
    assert deploy(None, "--image", "registry:5000/team:3", "--project", "team") == "retrain/a: unchanged"
    refuses("retrain/a names no work_pool", ONE.format("schedules: []"))
    refuses("a process pool starts no image", ONE.format("work_pool: {name: cpu}"))
    refuses("names no image", ONE.format("work_pool: {name: gpu}"), "--source", "team.git")
    refuses("env", ONE.format("work_pool: {name: gpu, job_variables: {env: 3}}"))
    refuses("PREFECT_API_URL names no server", None, PREFECT_API_URL="")
    refuses("no Prefect server answers at http://127.0.0.1:9/api", None, PREFECT_API_URL="http://127.0.0.1:9/api")
    with old_server() as url: refuses("2.19.0", None, PREFECT_API_URL=url)
    file.write_text("work_pools: {cpu: docker}\n" + ONE.format("work_pool: {name: cpu}"))
    refuses("work pool cpu is of type process on the server, not docker", None)
    assert server.ask("/deployments/filter") == [a]

    file.write_text(ONE.format("schedules: []"))
    said = workspace.run("python", "-m", "flows.serve", "--file", file, env=server.env, status=2)
    assert said.startswith("serve: retrain/a is deployed for workers on this server") and said.count("\n") == 1
    assert deploy("deployments: []\n", *image) == "retrain/a: removed" and not server.ask("/automations/filter")


class Worker:
    "A worker in a folder of its own, as on another machine, that knows the code only from git."
    def __init__(self, folder, server):
        self.folder, self.log, self.server = folder, folder/"log", server
        (folder/"tmp").mkdir(parents=True)
        self.tracking = f"sqlite:///{folder}/mlflow.db"

    def start(self):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NBS_", "DVC_", "MLFLOW_", "PREFECT_", "PYTHON"))}
        env = clean | self.server.env | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", TMPDIR=str(self.folder/"tmp"),
                                             MLFLOW_TRACKING_URI=self.tracking, MLFLOW_EXPERIMENT_NAME="team")
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(["prefect", "worker", "start", "--pool", "cpu", "--type", "process"], cwd=self.folder, env=env,
                                            stdout=log, stderr=log, start_new_session=True)

    def kill(self):
        self.process.kill()
        self.process.wait()
        begin = time.monotonic()
        while (left := self.processes()) and time.monotonic() < begin + 10: time.sleep(.1)
        assert not left, left

    def in_kernel(self):
        "Whether a notebook is at work."
        with suppress(psutil.Error): return any("ipykernel_launcher" in process.cmdline() for process in self.processes())

    def processes(self):
        def within(process):
            try: return process.cwd().startswith(str(self.folder)) and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error: return False
        return [process for process in psutil.process_iter() if within(process)]

    def request(self, name):
        id = next(d["id"] for d in self.server.ask("/deployments/filter") if d["name"] == name)
        return self.server.ask(f"/deployments/{id}/create_flow_run", dict(state=dict(type="SCHEDULED")))["id"]

    def state(self, id): return self.server.ask("/flow_runs/filter", {"flow_runs": {"id": {"any_": [id]}}})[0]["state"]

    def ended(self, id):
        wait(lambda: self.state(id)["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"), 500, .5)
        return self.state(id)

    def run(self, name):
        "Its state at its end, and what the worker said meanwhile."
        before = len(self.log.read_text())
        state = self.ended(self.request(name))
        return state, self.log.read_text()[before:]

    def slots(self): return [d["global_concurrency_limit"]["active_slots"] for d in self.server.ask("/deployments/filter")]


@pytest.mark.flows
@pytest.mark.timeout(3000)
def test_a_worker_by_commit(repository, server, tmp_path):
    "A run by commit completes and pushes; a fresh clone trains nothing again; killed, with and without its server, the next run completes."
    team, worker = tmp_path/"team.git", Worker(tmp_path/"worker", server)
    repository.run("dvc", "remote", "add", "--default", "folder", tmp_path/"remote")
    git(repository, "commit", "--quiet", "--all", "--message", "a remote")
    git(repository, "clone", "--quiet", "--bare", ".", team)
    repository.run("dvc", "push")
    file = repository/"flows/schedules.yaml"
    def deploy(*names, **train):
        repository.set(train=train)
        roams = "  - {{name: {}, flow: retrain, parameters: {{settle: 0}}, work_pool: {{name: cpu{}}}}}\n"
        stays = f", job_variables: {{working_dir: {worker.folder}}}"
        file.write_text(POOL + "deployments:\n" + "".join(roams.format(name, stays if name == "stays" else "") for name in names))
        git(repository, "commit", "--quiet", "--all", "--message", "deployed")
        git(repository, "push", "--quiet", team, "main")
        return repository.run("python", "-m", "flows.deploy", "--source", team, env=server.env)
    try:
        deploy("roams", "stays", epochs=2)
        worker.start()
        state, said = worker.run("roams")
        assert state["type"] == "COMPLETED" and "version 1 passed" in state["message"], said
        assert "Running stage 'train'" in said and "Running stage 'ingest'" not in said
        begin = time.monotonic()
        state, said = worker.run("roams")
        print(f"a run in a fresh clone with nothing new: {time.monotonic() - begin:.0f} s")
        assert state["type"] == "COMPLETED" and "Stage 'train' is cached" in said and "Running stage" not in said, said
        assert [v.version for v in versions(connect(worker.tracking), "detector")] == [1]

        assert worker.run("stays")[0]["type"] == "COMPLETED"
        assert worker.run("stays")[0]["name"] == "Nothing new"
        deploy("roams", "stays", epochs=3)
        running = worker.request("stays")
        wait_for(worker.in_kernel)
        assert worker.ended(worker.request("stays"))["type"] == "CANCELLED"
        worker.kill()
        assert worker.state(running)["type"] == "CRASHED" and not any(worker.slots())
        worker.start()
        state, said = worker.run("stays")
        assert state["type"] == "COMPLETED" and "version 2" in state["message"], said

        deploy("roams", epochs=4)
        running = worker.request("roams")
        wait_for(worker.in_kernel)
        server.kill()
        worker.kill()
        server.start()
        worker.start()
        assert worker.state(running)["type"] == "RUNNING" and worker.slots() == [1]
        begin = time.monotonic()
        while (state := worker.run("roams")[0])["type"] == "CANCELLED" and time.monotonic() < begin + 400: time.sleep(20)
        print(f"a slot that was held when all was killed: free after at most {time.monotonic() - begin:.0f} s, the next run included")
        assert state["type"] == "COMPLETED" and "version 3" in state["message"], state
        assert worker.state(running)["type"] == "CRASHED" and worker.slots() == [0]
    finally:
        worker.kill()


@pytest.mark.flows
def test_serving_ends_quickly_and_quietly(workspace):
    "SIGTERM while a stage runs, Ctrl-C while nothing does: a moment later all is gone, nothing is paused, nothing was complained of."
    (workspace/".dvc/config.local").unlink()  # neither has an image that setting, nor git
    served = Served(workspace, ONE.format("schedules: [{interval: 3600}]"))
    def stop(number):
        begin = time.monotonic()
        served.process.send_signal(number)
        assert served.process.wait(10) == 128 + number
        print(f"{signal.Signals(number).name}: {time.monotonic() - begin:.1f} s")
        wait(lambda: not marked(workspace) and not processes(workspace), 10)
        assert "Traceback" not in (workspace/"serve.log").read_text()
    try:
        served.start()
        served.server.ask(f"/deployments/{served.deployments()['a']['id']}/create_flow_run")
        wait_for(lambda: "kernel" in processes(workspace))
        stop(signal.SIGTERM)
        served.start()
        assert not served.deployments()["a"]["paused"] and [s["active"] for s in served.deployments()["a"]["schedules"]] == [True]
        stop(signal.SIGINT)
    finally:
        served.kill()
