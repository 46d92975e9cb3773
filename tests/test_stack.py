"The stack of containers: from nothing to a retraining inside it, each container killed in turn, two machines, a backup that is restored. `make stack-test`."
import base64, json, os, re, shutil, socket, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import httpx
import pytest
import redis

from conftest import ROOT, wait
from nbs_lib.scenes import write_scenes

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]
UID = os.getuid() or 1000  # nothing in the stack may run as root
SERVICES = "jupyter", "mlflow", "postgres", "prefect", "worker"  # that a retraining needs
SHOT = ROOT/"data/runs/welcome.png"


def run(*words, status=0, cwd=None, **env):
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, f"{words} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout.strip()


def own(path):
    "Give it to the user of the stack."
    if os.getuid() == 0: run("chown", "--recursive", f"{UID}:{UID}", path)


def free():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def forget(project):
    "What containers of a stack kept."
    for name in run("docker", "volume", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={project}").splitlines():
        run("docker", "volume", "rm", name)


class Stack:
    "A checkout of its own, in the environment `ci`, and the stack that stands on it."
    def __init__(self, folder, project):
        self.folder, self.project, self.address = folder, project, "127.0.0.1"
        for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/name, folder/name)
        run(Path(sys.executable).with_name("nbs"), "params", "--env", "ci", "--apply", cwd=folder, PYTHONPATH=str(folder))
        self.schedule("cron: \"0 2 * * *\"", "interval: 45")
        run("git", "init", "--quiet", "--initial-branch", "main", cwd=folder)
        self.commit("as it was")
        own(folder)
        self.stack("env")
        self.ports = {name: free() for name in ("JUPYTER_PORT", "MLFLOW_PORT", "PREFECT_PORT", "API_PORT", "REDIS_PORT")}
        self.set(NBS_PROJECT=project, **self.ports)

    def commit(self, why):
        run("git", "-c", f"safe.directory={self.folder}", "add", "--all", cwd=self.folder)
        run("git", "-c", f"safe.directory={self.folder}", "-c", "user.name=team", "-c", "user.email=team@example.org", "commit", "--quiet", "--message", why,
            cwd=self.folder)
        own(self.folder/".git")

    def schedule(self, *pairs):
        "Other words in the file of schedules."
        file = self.folder/"flows/schedules.yaml"
        text = file.read_text()
        for old, new in zip(pairs[::2], pairs[1::2]):
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)

    def set(self, **values):
        with open(self.folder/"docker/stack.env", "a") as file: file.writelines(f"{name}={value}\n" for name, value in values.items())

    @property
    def told(self):
        lines = (self.folder/"docker/stack.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))

    def stack(self, *words, status=0): return run(sys.executable, "docker/stack.py", *words, status=status, cwd=self.folder)

    def inside(self, service, *words, status=0): return run("docker", "exec", self.name(service), *words, status=status)

    def name(self, service):
        return run("docker", "ps", "--all", "--filter", f"label=com.docker.compose.project={self.project}", "--filter",
                   f"label=com.docker.compose.service={service}", "--format", "{{.Names}}")

    def ask(self, path, body=None, method="POST"):
        "Prefect's API."
        auth = base64.b64encode(self.told["PREFECT_AUTH"].encode()).decode()
        data = json.dumps(body or {}).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {auth}"}
        with urlopen(Request(f"http://{self.address}:{self.ports['PREFECT_PORT']}/api{path}", data, headers, method=method)) as answer: return json.load(answer)

    def runs(self):
        "Those that the schedule began, by their time."
        found = self.ask("/flow_runs/filter", dict(sort="EXPECTED_START_TIME_ASC"))
        return [r for r in found if r["auto_scheduled"] and r["state"] and r["state"]["name"] not in ("Scheduled", "Cancelled")]

    def outcome(self, says, seconds=900):
        "Wait until a scheduled run completes with these words."
        def look():
            with suppress(OSError): return [r for r in self.runs() if r["state"]["type"] == "COMPLETED" and says in (r["state"]["message"] or "")]
        return wait(look, seconds, 1)

    def at_work(self):
        with suppress(AssertionError): return "ipykernel_launcher" in run("docker", "top", self.name("worker"), "-eo", "pid,args")

    def drop(self, name, seed):
        "A batch with annotations, as somebody copies it into JupyterLab's folder."
        write_scenes(self.folder/"data/coming", scenes=dict(train=20, val=2, test=2), side=64, seed=seed)
        own(self.folder/"data/coming")
        (self.folder/"data/coming").rename(self.folder/f"data/incoming/{name}")

    def versions(self):
        "Those that are registered."
        return json.loads(self.inside("jupyter", "python", "-c", "from nbs_lib.registry import versions; from nbs_lib.store import connect; "
                                      "print([v.version for v in versions(connect('http://mlflow:5000'), 'detector')])").splitlines()[-1])

    def champion(self): return self.inside("jupyter", "nbs", "lineage", "champion", "--json").splitlines()[-1]

    def gone(self):
        self.stack("down")
        forget(self.project)


REDIS = """FROM python:3.11-slim-bookworm
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server && install -d -o redis -g redis /data
USER redis
VOLUME /data
"""


def redis_image():
    "Redis' own image, or where no image can be pulled the same from Debian."
    name = "redis:7-bookworm"
    if not any(subprocess.run(["docker", *words, name], capture_output=True).returncode == 0 for words in (("image", "inspect"), ("pull",))):
        subprocess.run(["docker", "build", "--tag", name, "-"], input=REDIS, text=True, check=True, capture_output=True)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    "Built and started from nothing but the checkout."
    redis_image()
    it = Stack(tmp_path_factory.mktemp("stack")/"team", "nbs-test")
    for folder in (it.folder, *it.folder.parents)[:4]: folder.chmod(0o755)  # pytest's own are closed for others
    try:
        print(it.stack("up").splitlines()[-4:])
        yield it
    finally: it.gone()


def test_healthy_soon_and_rebuilt_soon(stack):
    (stack.folder/"nbs_lib/__init__.py").touch()
    (stack.folder/"flows/home.py").write_text((stack.folder/"flows/home.py").read_text() + "\n")
    begin = time.monotonic()
    said = stack.stack("up", status=1)  # what is not committed would not reach the worker
    assert "flows/home.py changed since the last commit" in said.splitlines()[-1] and time.monotonic() - begin < 120
    built, healthy = map(int, re.search(r"built in (\d+) s, healthy (\d+) s later", said).groups())
    print(f"rebuilt in {built} s, healthy {healthy} s later")
    assert built < 20
    run("git", "-c", f"safe.directory={stack.folder}", "checkout", "--quiet", ".", cwd=stack.folder)
    own(stack.folder/"flows/home.py")


def test_the_image_is_little_more_than_the_lock_and_trains(stack):
    size = int(run("docker", "image", "inspect", "nbs", "--format", "{{.Size}}"))
    lock = int(run("docker", "run", "--rm", "--entrypoint", "du", "nbs", "--bytes", "--summarize", "/opt/venv").split()[0])
    print(f"image {size / 1e9:.2f} GB, installed lock {lock / 1e9:.2f} GB")
    assert size < 1.1 * lock
    assert re.search(r"^trained on (cpu|0), \d+ boxes found$", run("docker", "run", "--rm", "nbs", "python", "docker/smoke.py"), re.M)


def test_a_retraining_inside_and_a_picture_dropped_in_jupyterlab(stack):
    stack.outcome("version 1 passed")
    stack.outcome("nothing new")
    assert stack.versions() == [1]
    write_scenes(stack.folder/"data/camera", scenes=dict(test=6), side=64, seed=8)
    (stack.folder/"data/camera/test").rename(stack.folder/"data/incoming/plain")
    own(stack.folder/"data/incoming")
    stack.drop("week", seed=7)
    stack.outcome("version 2")
    assert (stack.folder/"data/raw/incoming/week.dvc").exists() and (stack.folder/"data/predictions/plain/report.json").exists()
    assert {p.stat().st_uid for folder in ("raw", "predictions", "incoming") for p in (stack.folder/"data"/folder).rglob("*")} == {UID}


def test_the_champion_answers(stack):
    "Over HTTP and on a stream, as soon as there is a champion; what was asked is in the database, what people say of it in JupyterLab's folder."
    http = httpx.Client(base_url=f"http://127.0.0.1:{stack.ports['API_PORT']}", timeout=60)
    wait(lambda: http.get("/health/ready").is_success, 120, 1)
    picture = next((stack.folder/"data/predictions").parent.glob("raw/incoming/week/train/*.jpg")).read_bytes()
    said = http.post("/predict/", files=dict(image=picture)).json()["pictures"][0]
    assert said["version"] in ("1", "2") and http.get("/page/").is_success
    queue = redis.Redis(port=stack.ports["REDIS_PORT"], password=stack.told["REDIS_PASSWORD"], protocol=2)
    queue.xadd("pictures", dict(id="street", image=picture))
    [[_, [[_, fields]]]] = queue.xread(dict(boxes=0), block=120_000)
    assert (fields[b"id"], fields[b"version"]) == (b"street", said["version"].encode())
    assert json.loads(fields[b"boxes"]) == [[b[k] for k in ("xmin", "ymin", "xmax", "ymax", "label", "score")] for b in said["boxes"]]
    holder = dict(authorization=f"Bearer {stack.told['NBS_SERVE_TOKEN']}")
    wait(lambda: {r["source"] for r in http.get("/requests", headers=holder).json()} == {"api", "stream"}, 30, .5)
    kept = http.post("/feedback/", json=dict(id=said["id"], verdict="right")).json()["written"]
    assert (stack.folder/"data/incoming"/kept).stat().st_uid == UID
    shutil.rmtree((stack.folder/"data/incoming"/kept).parents[1])


def test_notebooks_in_jupyterlab(stack):
    "Behind its token; a stage notebook run through its API; a script that logs to MLflow by the name of the service."
    url = f"http://127.0.0.1:{stack.ports['JUPYTER_PORT']}"
    with pytest.raises(OSError, match="403"): urlopen(f"{url}/api/contents")
    with pytest.raises(OSError, match="403"): urlopen(Request(f"{url}/api/contents", headers={"Authorization": "token wrong"}))
    there = stack.inside("jupyter", "jupyter", "labextension", "list")
    assert all(re.search(rf"{name} v\S+ enabled +OK", re.sub(r"\x1b\[\d+m", "", there)) for name in
               ("@jupyterlab/git", "nbdime-jupyterlab", "@jupyter-server/resource-usage")), there
    assert "rss" in json.load(urlopen(Request(f"{url}/api/metrics/v1", headers={"Authorization": f"token {stack.told['JUPYTER_TOKEN']}"})))
    from jupyter import Jupyter
    jupyter = object.__new__(Jupyter)
    jupyter.token, jupyter.address = stack.told["JUPYTER_TOKEN"], url.removeprefix("http://")
    for path in ("notebooks/stages/10_fetch.ipynb", "notebooks/guides/00_welcome.ipynb"):
        outputs = jupyter.run_all_and_save(path)
        assert outputs and [o["traceback"] for o in outputs if o["output_type"] == "error"] == []
    assert run("git", "-c", f"safe.directory={stack.folder}", "status", "--porcelain", "notebooks", cwd=stack.folder) == ""
    stack.inside("worker", "python", "-c", "import mlflow; mlflow.set_experiment('from a script'); mlflow.log_metric('x', 1)")
    assert "from a script" in stack.inside("mlflow", "python", "-c",
                                           "import mlflow; print([e.name for e in mlflow.MlflowClient('http://mlflow:5000').search_experiments()])")


def test_a_person_logs_in_and_runs_the_welcome_page(stack, page):
    from playwright.sync_api import expect
    page.goto(f"http://127.0.0.1:{stack.ports['JUPYTER_PORT']}")
    page.locator("#password_input").fill("wrong")
    page.get_by_role("button", name="Log in", exact=True).click()
    expect(page.get_by_text("Invalid credentials")).to_be_visible()
    page.locator("#password_input").fill(stack.told["JUPYTER_TOKEN"])
    page.get_by_role("button", name="Log in", exact=True).click()
    page.wait_for_url("**/00_welcome.ipynb")
    expect(page.get_by_text("| Idle")).to_be_visible()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.get_by_text("Drop pictures into data/incoming, a folder a batch.")).to_be_visible()
    page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollTo(0, 0)")
    page.wait_for_timeout(2000)
    SHOT.parent.mkdir(exist_ok=True)
    page.screenshot(path=SHOT)
    assert page.get_by_text("Traceback").count() == 0


def test_what_must_not_be_there(stack):
    history = run("docker", "history", "--no-trunc", "nbs")
    secrets = [stack.told[name] for name in ("POSTGRES_PASSWORD", "PREFECT_AUTH", "JUPYTER_TOKEN", "REDIS_PASSWORD", "NBS_SERVE_TOKEN")]
    text = "".join((stack.folder/"docker"/name).read_text() for name in ("compose.yaml", "compose.gpu.yaml", "Dockerfile"))
    assert not any(secret in history + text for secret in secrets)
    assert run("docker", "run", "--rm", "--entrypoint", "find", "nbs", "/workspace", "-name", "*.env") == ""
    for service in (*SERVICES, "api", "consumer", "redis"):
        of, = json.loads(run("docker", "inspect", stack.name(service)))
        assert all(b["HostIp"] == "127.0.0.1" for ports in of["NetworkSettings"]["Ports"].values() for b in ports or [])
        assert not any("docker.sock" in m["Source"] for m in of["Mounts"]) and not of["HostConfig"]["Privileged"]
        processes = run("docker", "top", stack.name(service), "-eo", "pid,uid,args").splitlines()[1:]
        assert processes and all(line.split()[1] != "0" for line in processes), processes


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_killed_in_a_retraining(stack, service):
    "The first process of each is killed, as by a lack of memory: the stack heals, the work is neither lost nor done twice, the schedule goes on."
    stack.outcome("version 1 passed")
    before = stack.versions()
    stack.drop(f"before {service} dies", seed=100 + SERVICES.index(service))
    wait(stack.at_work, 300, .2)
    pid = run("docker", "inspect", "--format", "{{.State.Pid}}", stack.name(service))
    run("docker", "run", "--rm", "--pid", "host", "--user", "0", "--entrypoint", "bash", "nbs", "-c", f"kill -9 {pid}")
    begin = time.monotonic()
    stack.outcome(f"version {before[-1] + 1}")
    print(f"{service} killed: {time.monotonic() - begin:.0f} s later the work is done")
    done = len(stack.runs())
    wait(lambda: [r for r in stack.runs()[done:] if r["state"]["name"] == "Nothing new"], 300, 1)
    assert stack.versions() == [*before, before[-1] + 1]
    wait(lambda: not [r for r in stack.runs()[:done] if r["state"]["type"] == "RUNNING"], 60, 1)
    assert json.loads(run("docker", "inspect", stack.name(service)))[0]["State"]["Health"]["Status"] == "healthy"


def test_backup_and_restore(stack, tmp_path):
    kept = stack.versions(), stack.champion()
    stack.stack("backup", tmp_path/"backup")
    assert "exists: name a new folder" in stack.stack("backup", tmp_path/"backup", status=1)
    stack.gone()
    stack.stack("restore", tmp_path/"backup")
    assert (stack.versions(), stack.champion()) == kept
    stack.inside("jupyter", "rm", "-rf", "data/champion")
    write_scenes(stack.folder/"data/later", scenes=dict(test=6), side=64, seed=9)
    own(stack.folder/"data/later")
    assert "6 pictures" in stack.inside("jupyter", "python", "-m", "flows.score", "data/later/test")
    assert "remembers" in stack.stack("restore", tmp_path/"backup", status=1)


def test_two_machines(stack, tmp_path_factory):
    "A worker in a network of its own reaches the stack only by published ports; code from a git server, data and artifacts in a store that speaks S3."
    run("docker", "network", "create", network := f"{stack.project}-here")
    address = run("docker", "network", "inspect", network, "--format", "{{(index .IPAM.Config 0).Gateway}}")
    there = tmp_path_factory.mktemp("there")/"team"
    ports = dict(s3=free(), git=free())
    helper = lambda name, port, *words: run("docker", "run", "--detach", "--name", f"{stack.project}-{name}", "--network", network, "--publish",
                                            f"{address}:{ports[name]}:{port}", "--volume", f"{stack.folder}:/git/team:ro", "nbs", *words)
    keys = dict(AWS_ACCESS_KEY_ID="team", AWS_SECRET_ACCESS_KEY="secret", AWS_ENDPOINT_URL=f"http://{address}:{ports['s3']}")
    text = (stack.folder/"docker/stack.env").read_text()
    join = lambda *words: run(sys.executable, there/"docker/stack.py", *words, cwd=there)
    try:
        helper("s3", 5000, "moto_server", "--host", "0.0.0.0", "--port", "5000")
        helper("git", 9418, "git", "daemon", "--base-path=/git", "--export-all", "--reuseaddr")
        run("docker", "exec", f"{stack.project}-s3", "python", "-c", "import boto3; s3 = boto3.client('s3', endpoint_url='http://127.0.0.1:5000', "
            "aws_access_key_id='a', aws_secret_access_key='b', region_name='us-east-1'); [s3.create_bucket(Bucket=b) for b in ('dvc', 'mlflow')]")
        dvc = lambda *words: run(sys.executable, "-m", "dvc", *words, cwd=stack.folder, GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="safe.directory",
                                 GIT_CONFIG_VALUE_0="*", **keys)
        dvc("remote", "add", "--default", "team", "s3://dvc/team")
        dvc("remote", "modify", "team", "endpointurl", keys["AWS_ENDPOINT_URL"])
        if batches := [p.relative_to(stack.folder) for p in (stack.folder/"data/raw/incoming").glob("*.dvc")]:  # which the commit below names
            dvc("commit", "--force", *batches)
            dvc("push", *batches)
        stack.schedule("{cpu: process}", "{cpu: process, far: process}", "{name: cpu}", "{name: far}")
        own(stack.folder)
        stack.commit("a remote, and a pool for machines elsewhere")
        stack.set(NBS_BIND=address, NBS_HOSTS=f"{address}:{stack.ports['MLFLOW_PORT']}", NBS_SOURCE=f"git://{address}:{ports['git']}/team",
                  NBS_ARTIFACTS="s3://mlflow/team", **keys)
        stack.gone()  # what was published before lies in a store that this one does not read
        stack.address = address
        print(stack.stack("up").splitlines()[-3:])
        (there.parent/"config").write_text("[safe]\n    directory = *\n")
        run("git", "clone", "--quiet", stack.folder, there, GIT_CONFIG_GLOBAL=str(there.parent/"config"))
        own(there)
        join("env")
        with open(there/"docker/stack.env", "a") as env:
            far = dict(NBS_PROJECT=f"{stack.project}-far", NBS_SERVER=address, NBS_POOL="far", PREFECT_AUTH=stack.told["PREFECT_AUTH"], **keys)
            env.writelines(f"{k}={v}\n" for k, v in (far | {k: v for k, v in stack.ports.items() if k != "JUPYTER_PORT"}).items())
        print(join("join").splitlines()[-1])
        wait(lambda: [r for r in stack.runs() if r["state"]["type"] == "COMPLETED" and r["state"]["name"] != "Nothing new"], 900, 1)
        assert stack.versions()
        worker = run("docker", "ps", "--filter", f"label=com.docker.compose.project={stack.project}-far", "--format", "{{.Names}}")
        run("docker", "exec", worker, "getent", "hosts", "mlflow", status=2)  # no name of the stack is known there
        assert "Running stage" in run("docker", "logs", worker)
    finally:
        if (there/"docker/stack.env").exists(): join("down")
        forget(f"{stack.project}-far")
        for name in ports: run("docker", "rm", "--force", f"{stack.project}-{name}")
        run("docker", "network", "rm", network)
        (stack.folder/"docker/stack.env").write_text(text)
        stack.address = "127.0.0.1"


def test_bad_input_is_one_line(stack, tmp_path):
    "No settings, a taken port, an address of another machine, no engine, cards without NVIDIA's runtime, a uid that owns nothing."
    def last(*words):
        said = stack.stack(*words, status=1).splitlines()[-1]
        assert said.startswith("stack: "), said
        return said
    env = stack.folder/"docker/stack.env"
    text = env.read_text()
    env.rename(tmp_path/"env")
    assert "`make stack-env` writes one" in last("up")
    (tmp_path/"env").rename(env)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        run("docker", "stop", stack.name("jupyter"))
        env.write_text(text + f"JUPYTER_PORT={s.getsockname()[1]}\n")
        assert "is taken: set JUPYTER_PORT" in last("up")
    env.write_text(text + "NBS_BIND=192.0.2.77\n")
    assert "192.0.2.77 is no address of this machine: set NBS_BIND" in last("up")
    env.write_text(text)
    no_engine = run(sys.executable, "docker/stack.py", "up", status=1, cwd=stack.folder, DOCKER_HOST="tcp://127.0.0.1:9")
    assert no_engine.startswith("stack: no Docker Engine answers")
    env.write_text(text + "NBS_GPUS=0\n")
    assert "Docker has no NVIDIA runtime here" in last("up")
    env.write_text(text)
    said = run("docker", "run", "--rm", "--user", "4242", "nbs", "true", status=78)
    assert said.startswith("nbs: uid 4242 may not write to /workspace") and said.count("\n") == 0
    said = run("docker", "run", "--rm", "--tmpfs", f"/state:size=1m,uid={UID}", "--env", "NBS_WRITES=/state", "nbs", "true", status=78)
    assert said.startswith("nbs: less than 100 MB are free in /state") and said.count("\n") == 0
    stack.stack("up")
    sql = lambda text: stack.inside("postgres", "psql", "--username=nbs", "--dbname=mlflow", "--tuples-only", "--no-align", "--command", text)
    version = sql("SELECT version_num FROM alembic_version")
    sql("UPDATE alembic_version SET version_num = '451aebb31d03'")
    run("docker", "restart", stack.name("mlflow"))
    assert "`make stack-upgrade`" in last("up")
    stack.stack("backup", tmp_path/"before")
    run("docker", "stop", stack.name("mlflow"))  # it makes tables that are not there by itself
    sql(f"UPDATE alembic_version SET version_num = '{version}'")
    uri = f"postgresql://nbs:{stack.told['POSTGRES_PASSWORD']}@postgres/mlflow"
    stack.inside("jupyter", "python", "-c", "from alembic import command; from mlflow.store.db.utils import _get_alembic_config as config; "
                                            f"command.downgrade(config({uri!r}), '-1')")
    assert sql("SELECT version_num FROM alembic_version") != version
    stack.stack("upgrade")
    assert sql("SELECT version_num FROM alembic_version") == version
    write = lambda number: run("docker", "run", "--rm", "--volume", f"{stack.project}_postgres:/kept", "--user", "0", "--entrypoint", "sh", "nbs", "-c",
                               f"echo {number} > /kept/PG_VERSION")
    write(14)
    run("docker", "restart", stack.name("postgres"))
    assert "another Postgres wrote the database" in last("up")
    write(15)
    stack.stack("up")
