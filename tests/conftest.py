"What tests share: copies of the workspace, its commands, and the folder of real pictures."
import json, os, shutil, signal, socket, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "data", "cache", "tmp", "config.local", "dvc.lock", "__pycache__", ".*_cache", ".hypothesis",
                                  "*.egg-info", ".ipynb_checkpoints")


@pytest.fixture(scope="session")
def real():
    "The folder of real pictures, which is not part of the repository."
    folder = Path(os.environ.get("NBS_TEST_DATA", ROOT.parent/"shared/data"))
    if not folder.is_dir(): pytest.skip(f"no real pictures in {folder}; NBS_TEST_DATA names the folder")
    return folder


def pytest_configure(config):
    "A worker of pytest-xdist keeps to one CPU: trainings side by side on all of them would wait for each other."
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[int(worker[2:]) % len(cpus)]})


class Workspace:
    "A copy of this workspace without git, data or results, as a source archive has it, in the environment `ci`."
    def __init__(self, folder):
        self.folder = Path(folder)
        shutil.copytree(ROOT, self.folder, ignore=LEFT_OUT)
        (self.folder/"data").mkdir()
        shutil.copyfile(ROOT/"data/patches.jsonl", self.folder/"data/patches.jsonl")
        self.run("dvc", "config", "--local", "core.no_scm", "true")
        self.run("nbs", "params", "--env", "ci", "--apply")

    def __truediv__(self, path): return self.folder/path

    def copy(self, folder):
        "The same with all its results, elsewhere."
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workspace.at(folder)

    @classmethod
    def at(cls, folder):
        "What lies in a folder already."
        workspace = object.__new__(cls)
        workspace.folder = Path(folder)
        return workspace

    def start(self, *command, env={}, **kw):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NBS_", "DVC_", "MLFLOW_")) and k != "PYTHONDONTWRITEBYTECODE"}
        clean |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(self.folder), **env}
        return subprocess.Popen(list(map(str, command)), cwd=self.folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)

    def run(self, *command, status=0, env={}):
        process = self.start(*command, env=env)
        said = process.communicate()[0]
        assert process.returncode == status, f"{command} ended with {process.returncode}:\n{said}"
        return said

    def set(self, **sections):
        "Change params.yaml."
        path = self/"params.yaml"
        params = yaml.safe_load(path.read_text())
        for section, values in sections.items(): params[section].update(values)
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def report(self, name): return json.loads((self/f"data/reports/{name}.json").read_text())

    def results(self, *folders):
        "All files that stages left below `data`, by name."
        folders = folders or ("raw/fetched", "interim", "processed", "models", "reports")
        files = (p for f in folders for p in (self/"data"/f).rglob("*"))
        return {p.relative_to(self.folder).as_posix(): p.read_bytes() for p in sorted(files) if p.is_file() and p.name not in UNLIKE}


# pictures drawn with a date in them, labels' cache of ultralytics, DVC's own
UNLIKE = {"worst.png", "train.cache", "val.cache", "test.cache", ".gitignore"}


@pytest.fixture
def workspace(tmp_path):
    "A workspace on a setting that takes seconds."
    return Workspace(tmp_path/"workspace")


@pytest.fixture(scope="session")
def _finished(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("finished")/"workspace")
    workspace.run("dvc", "repro")
    return workspace


@pytest.fixture
def finished(_finished, tmp_path):
    "The same after an undisturbed `dvc repro`; a copy of its own for each test, in a folder of the same name, which is the experiment's in MLflow."
    return _finished.copy(tmp_path/"finished/workspace")


@pytest.fixture(scope="session")
def _judged(_finished, tmp_path_factory):
    "The same, published and judged: its model is the champion. To be copied, like `_finished`."
    workspace = _finished.copy(tmp_path_factory.mktemp("judged")/"workspace")
    workspace.run("nbs", "publish", "--gate")
    return workspace


# without these, Chromium looks for servers elsewhere
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--no-first-run"]


@pytest.fixture
def page():
    "A page of Debian's Chromium, which gives up after a minute."
    sync_api = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")): pytest.skip("no chromium on the path: apt-get install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport=dict(width=1500, height=1300))
        page.set_default_timeout(60_000)
        sync_api.expect.set_options(timeout=60_000)
        yield page
        browser.close()


def git(workspace, *command):
    return workspace.run("git", "-c", "user.name=team", "-c", "user.email=team@example.org", *command)


@pytest.fixture
def repository(finished):
    "The finished workspace as a git repository with one commit."
    finished.run("dvc", "config", "--local", "core.no_scm", "false")
    git(finished, "init", "--quiet", "--initial-branch", "main")
    git(finished, "add", "--all")
    git(finished, "commit", "--quiet", "--message", "as it was")
    return finished


def wait(condition, seconds=300, pause=.02):
    "What the condition gives as soon as it holds."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(pause)
    return value


def last(said):
    "What a run said last, without lines of Prefect's log, which may come later."
    return next((line for line in reversed(said.strip().splitlines()) if " | " not in line), "")


class PrefectServer:
    "Prefect's own server, on sqlite in a folder, which can be killed and started again."
    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        database = f"sqlite+aiosqlite:///{folder}/prefect.db"
        self.env = dict(PREFECT_HOME=str(folder), PREFECT_API_URL=self.url, PREFECT_SERVER_DATABASE_CONNECTION_URL=database,
                        PREFECT_SERVER_ANALYTICS_ENABLED="false",
                        PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="prefect.server.concurrency.lease_storage.filesystem")

    def start(self):
        with open(self.folder/"log", "a") as log:
            self.process = subprocess.Popen([Path(sys.executable).with_name("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(self.port)],
                                            env=os.environ | self.env, stdout=log, stderr=log, start_new_session=True)
        def answers():
            assert self.process.poll() is None, (self.folder/"log").read_text()
            with suppress(OSError): return urlopen(f"{self.url}/health").close() is None
        wait(answers, 120, .2)

    def ask(self, path, body=None):
        "What the API answers to a POST; where its sqlite was busy, once more."
        request = Request(self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"})
        for last in (False, False, True):
            try:
                with urlopen(request) as answer: return json.load(answer)
            except HTTPError as error:
                if last or error.code != 503: raise
                time.sleep(2)

    def kill(self):
        if self.process.poll() is None: os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    yield server
    server.kill()
