"""The stack of containers: `python3 docker/stack.py up`, and as `make stack-up`. Needs Python and Docker with Compose, nothing of the workspace."""
import argparse, errno, ipaddress, json, os, secrets, shutil, socket, subprocess, sys, time
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, ENV = HERE.parent, HERE/"stack.env"
SHARED = "data/raw", "data/incoming", "data/predictions"  # folders of this checkout that the worker sees, too
PATIENCE = 300  # within which all must be healthy [s]
PORTS = dict(JUPYTER_PORT=8888, MLFLOW_PORT=5000, PREFECT_PORT=4200, API_PORT=8000, REDIS_PORT=6379)
OPEN = "MLFLOW_PORT", "PREFECT_PORT"  # on NBS_BIND; all others on loopback
DATABASES, VOLUMES = ("mlflow", "prefect", "requests"), ("artifacts", "remote")  # what a backup holds
SECRETS = dict(POSTGRES_PASSWORD="", PREFECT_AUTH="nbs:", JUPYTER_TOKEN="", REDIS_PASSWORD="", NBS_SERVE_TOKEN="")  # name: what it begins with
OPTIONS = """
# what else can be set, with its default
#NBS_GPUS=0                  # cards for notebooks and worker, such as 0 or 0,1; needs NVIDIA's container toolkit
#JUPYTER_PORT=8888
#MLFLOW_PORT=5000
#PREFECT_PORT=4200
#API_PORT=8000
#REDIS_PORT=6379
#REDIS_MEMORY=1gb            # of messages that wait; beyond it senders are refused
#NBS_BIND=127.0.0.1          # the address on which other machines reach MLflow and Prefect; see the guide before you open it
#NBS_HOSTS=                  # names under which they reach MLflow, such as mlops.example.org:5000
#NBS_SOURCE=                 # git repository from which workers on other machines get the code, such as https://…/team.git
#NBS_SERVER=                 # on one more machine: where the stack is that it works for (`make stack-join`), whose PREFECT_AUTH it needs
#NBS_POOL=cpu                # work pool that this machine's worker takes runs from
#NBS_QUEUE=default           # and its queue
#NBS_MEMORY=16g              # most memory of notebooks, and of the worker
#NBS_SHM=2g                  # shared memory, in which data loaders hand over their batches
#NBS_ARTIFACTS=/state        # of MLflow: s3://bucket/folder with the three below
#AWS_ENDPOINT_URL=
#AWS_ACCESS_KEY_ID=
#AWS_SECRET_ACCESS_KEY=
#NBS_NOTIFY=                 # where to tell people what happened: addresses of apprise
"""


class Wrong(Exception): "One line for people."


def settings():
    "What docker/stack.env says."
    if not ENV.exists(): raise Wrong("there is no docker/stack.env: `make stack-env` writes one with passwords of its own")
    lines = (line.split(" #")[0].strip() for line in ENV.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def make_env():
    "Write docker/stack.env, which only its owner may read, where there is none."
    if ENV.exists(): return complete()
    owner, lines = ROOT.stat(), needed()
    with open(os.open(ENV, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        print("# The stack's own settings and secrets: not for git, not for others.", *lines, OPTIONS, sep="\n", end="", file=file)
    os.chown(ENV, owner.st_uid, owner.st_gid)
    print(f"{ENV.relative_to(ROOT)}: written")


def needed(known=()):
    "Lines for what the stack cannot do without, but for what is known already."
    owner = ROOT.stat()
    if owner.st_uid == 0 and not {"NBS_UID", "NBS_GID"} <= set(known):
        raise Wrong(f"{ROOT} belongs to root, and nothing in the stack runs as root: give it to somebody (`chown -R 1000:1000 {ROOT}`)")
    new = {name: begin + secrets.token_hex(24) for name, begin in SECRETS.items()}
    return [f"{name}={value}" for name, value in dict(NBS_UID=owner.st_uid, NBS_GID=owner.st_gid, **new).items() if name not in known]


def complete():
    "Add to a docker/stack.env that is there what came with a newer version, or was taken out."
    new, begin = needed(settings()), "" if ENV.read_text().endswith("\n") else "\n"
    with open(ENV, "a") as file: file.writelines([begin] + [f"{line}\n" for line in new])
    print(f"{ENV.relative_to(ROOT)}: {'now has ' + ', '.join(line.split('=')[0] for line in new) if new else 'kept as it is'}")


def tell(*words):
    "What a command says, and its status."
    done = subprocess.run(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout.strip(), done.returncode


@cache
def compose():
    "The words that call Compose, v2 where it is there, with this stack's files."
    if not shutil.which("docker"): raise Wrong("there is no docker on this machine: docs.docker.com/engine/install")
    v2 = tell("docker", "compose", "version")[1] == 0
    if not v2 and not shutil.which("docker-compose"): raise Wrong("Docker has no Compose here: docs.docker.com/compose/install")
    if (said := tell("docker", "info", "--format", "{{.ServerVersion}}"))[1]: raise Wrong(f"no Docker Engine answers: {said[0].splitlines()[-1]}")
    name = "compose.worker" if settings().get("NBS_SERVER") else "compose"  # another machine's stack, or one of its own
    files = [f"{name}.yaml", *([f"{name}.gpu.yaml"] if settings().get("NBS_GPUS") else [])]
    return [*(["docker", "compose"] if v2 else ["docker-compose"]), "--env-file", str(ENV), "--project-name", project(),
            *(word for file in files for word in ("--file", str(HERE/file)))]


def project(): return settings().get("NBS_PROJECT", "nbs")


def containers():
    "Every container of the stack by its service: its name, state and health."
    said, _ = tell("docker", "ps", "--all", "--filter", f"label=com.docker.compose.project={project()}", "--format", "{{.ID}}")
    if not said: return {}
    found = json.loads(tell("docker", "inspect", *said.split())[0])
    return {c["Config"]["Labels"]["com.docker.compose.service"]: dict(name=c["Name"][1:], state=c["State"]["Status"], restarts=c["RestartCount"],
            started=c["State"]["StartedAt"], health=c["State"].get("Health", {}).get("Status", "")) for c in found}


def check_ports():
    "Raises `Wrong` for a port that something else listens on, or an address that this machine does not have."
    there, bound = containers(), settings().get("NBS_BIND") or "127.0.0.1"
    try: v6 = ipaddress.ip_address(bound.strip("[]")).version == 6
    except ValueError: raise Wrong(f"NBS_BIND in docker/stack.env must be an address of this machine, not {bound!r}") from None
    for name, port in PORTS.items():
        told = settings().get(name) or str(port)  # empty is the default, as for Compose
        if not told.isdecimal() or not 0 < (port := int(told)) < 65536: raise Wrong(f"{name} in docker/stack.env must be a port from 1 to 65535, not {told!r}")
        address = bound.strip("[]") if name in OPEN else "127.0.0.1"
        with socket.socket(socket.AF_INET6 if v6 and name in OPEN else socket.AF_INET) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try: s.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL: raise Wrong(f"{bound} is no address of this machine: set NBS_BIND in docker/stack.env") from None
                service = name.partition("_")[0].lower()
                if there.get(service, {}).get("state") != "running": raise Wrong(f"port {port} is taken: set {name} in docker/stack.env") from None


# what Docker or a container says, and what to do
HINTS = {"could not select device driver": "NBS_GPUS names cards, but Docker has no NVIDIA runtime here: install NVIDIA's container toolkit, or unset NBS_GPUS",
         "port is already allocated": "a port is taken: set another one in docker/stack.env",
         "o space left on device": "the disk is full: `docker system df` tells what Docker has of it",
         "not compatible with this version": "another Postgres wrote the database: name it in POSTGRES_IMAGE, `make stack-backup`, restore into a new stack",
         "out-of-date database schema": "MLflow's database is of an older version: `make stack-backup`, then `make stack-upgrade`",
         "password authentication failed": "the database has another password than docker/stack.env: put the old file back, or remove the volume"}


def hint(lines):
    "What to do about such words; nothing where they are not known."
    return next((what for sign, what in HINTS.items() if any(sign in line for line in lines)), "")


def last(lines): return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def call(*words, **how): return told([*compose(), *words], **how)


def told(command, **how):
    "A command whose words go to people. Raises `Wrong` with its last one where it fails."
    env = os.environ | dict(DOCKER_BUILDKIT="1", COMPOSE_DOCKER_CLI_BUILD="1")
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=env, **how)
    said = []
    for line in process.stderr:
        print(line, end="", file=sys.stderr)
        said.append(line.strip())
    if process.wait(): raise Wrong(hint(said) or last(said))


def ill(services):
    "Containers that are not healthy by their service, of these services, or of all where none is named."
    return {service: c for service, c in containers().items() if c["health"] != "healthy" and (not services or service in services)}


def given_up(found):
    "What there is to say of one of these containers that will not come; None where all may."
    for service, c in found.items():
        words = lambda *since, name=c["name"]: tell("docker", "logs", *since, "--tail", "50", name)[0].splitlines()
        lines = words("--since", c["started"]) or (words() if c["restarts"] else [])  # one that begins once more has said nothing yet
        if why := hint(lines): return f"{service}: {why}"
        if c["health"] == "unhealthy" or c["restarts"] > 3 or c["state"] in ("exited", "dead"): return f"{service} is not healthy: {last(lines)}"


def start(*services):
    "Start these services, or all, and wait until they are healthy. Raises `Wrong` with the last words of one that is not."
    failed = ""
    try: call("up", "--detach", "--no-build", *services)
    except Wrong as error:  # often because one of them ends, which itself knows better why
        if (failed := str(error)) in HINTS.values(): raise
    end = time.monotonic() + (60 if failed else PATIENCE)
    while found := ill(services):
        if why := given_up(found): raise Wrong(why)
        if time.monotonic() > end: raise Wrong(failed or f"{', '.join(found)}: not healthy within {PATIENCE} s; `make stack-logs` tells more")
        time.sleep(1)
    if failed: raise Wrong(failed)


def up():
    "Build, start, wait, deploy."
    words = compose()
    if settings().get("NBS_SERVER"): raise Wrong("docker/stack.env names another machine's stack in NBS_SERVER: `make stack-join` starts a worker for it")
    check_ports()
    owner = ROOT.stat()
    for folder in SHARED:
        (ROOT/folder).mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0: os.chown(ROOT/folder, owner.st_uid, owner.st_gid)
    begin = time.monotonic()
    call("build", "jupyter")
    built = time.monotonic()
    start()
    print(f"stack: built in {built - begin:.0f} s, healthy {time.monotonic() - built:.0f} s later ({words[0]})")
    deploy()
    told = settings()
    port = lambda name: told.get(name) or PORTS[name]
    print(f"stack: JupyterLab http://127.0.0.1:{port('JUPYTER_PORT')} (its token: JUPYTER_TOKEN in docker/stack.env), "
          f"MLflow http://127.0.0.1:{port('MLFLOW_PORT')}, Prefect http://127.0.0.1:{port('PREFECT_PORT')} (PREFECT_AUTH), "
          f"detection http://127.0.0.1:{port('API_PORT')} (NBS_SERVE_TOKEN)")


def join():
    "Build and start a worker for a stack on another machine."
    if not (server := settings().get("NBS_SERVER")): raise Wrong("docker/stack.env names no NBS_SERVER, the machine whose stack this one is to join")
    call("build", "worker")
    start()
    print(f"stack: this machine works for {server}, pool {settings().get('NBS_POOL', 'cpu')}")


def deploy():
    "The schedules, at the commit that is checked out here."
    source = settings().get("NBS_SOURCE", "/source")
    try: call("exec", "-T", "jupyter", "python", "-m", "flows.deploy", "--source", source, "--project", project(), "--checkout", "/checkout")
    except Wrong as error: raise Wrong(f"the stack is up, but its schedules are not deployed: {error} (then `make stack-deploy`)") from None


def upgrade():
    "MLflow's database; Prefect's server brings its own up to date. One that came with a newer version is made. Then all are started."
    call("stop", "mlflow")
    start("postgres")
    for name in DATABASES:
        there = f"psql --username=nbs --dbname=mlflow --tuples-only --command='SELECT datname FROM pg_database' | grep --quiet --word-regexp {name}"
        call("exec", "-T", "postgres", "sh", "-c", f"{there} || createdb --username=nbs {name}")
    call("run", "--rm", "--no-deps", "-T", "mlflow", "sh", "-c", "mlflow db upgrade $MLFLOW_BACKEND_STORE_URI")
    start()


def backup(folder):
    "Databases first, then the files that they speak of; the folder is there when it is whole. Of all services only the database is needed."
    if folder.exists(): raise Wrong(f"{folder} exists: name a new folder")
    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True, mode=0o700)
    ran = containers().get("postgres", {}).get("state") == "running"
    start("postgres")
    for name in DATABASES:
        with open(tmp/f"{name}.dump", "wb") as file: call("exec", "-T", "postgres", "pg_dump", "--username=nbs", "--format=custom", name, stdout=file)
    if not ran: call("stop", "postgres")
    for name in VOLUMES:
        with open(tmp/f"{name}.tar", "wb") as file: tar(name, "--create .", stdout=file)
    tmp.rename(folder)
    print(f"stack: kept in {folder}: {', '.join(f'{p.name} {p.stat().st_size >> 20} MB' for p in sorted(folder.iterdir()))}")


def tar(volume, words, **how):
    """tar in a volume, without what a service checks when it starts, and without a log of what it says. Its status is 1 where files came or grew
    meanwhile: of those no database knew."""
    place = f"{project()}_{volume}:/kept"
    told(["docker", "run", "--rm", "--interactive", "--log-driver=none", f"--volume={place}", "--entrypoint=sh", settings().get("NBS_IMAGE", "nbs"),
          "-c", f"tar --directory=/kept {words} || test $? = 1"], **how)


def restore(folder):
    "Into a stack that has nothing yet. Raises `Wrong` for one that has."
    files = {p.name for p in folder.glob("*")}
    if missing := {*(f"{n}.dump" for n in DATABASES), *(f"{n}.tar" for n in VOLUMES)} - files: raise Wrong(f"{folder} is no backup: there is no {min(missing)}")
    start("postgres", "mlflow", "prefect", "jupyter")
    runs = tell(*compose(), "exec", "-T", "postgres", "psql", "--username=nbs", "--dbname=mlflow", "--tuples-only", "--no-align",
                "--command=SELECT count(*) FROM runs")[0].splitlines()[-1]
    if runs != "0": raise Wrong(f"this stack remembers {runs} runs already: restore into an empty one (`make stack-down`, then remove its volumes)")
    call("stop", "mlflow", "prefect", "jupyter", "worker", "api", "consumer")
    for name in DATABASES:
        with open(folder/f"{name}.dump", "rb") as file:
            call("exec", "-T", "postgres", "pg_restore", "--username=nbs", "--clean", "--if-exists", "--single-transaction", f"--dbname={name}", stdin=file)
    for name in VOLUMES:
        with open(folder/f"{name}.tar", "rb") as file: tar(name, "--extract", stdin=file)
    start()
    print(f"stack: has what {folder} kept")


COMMANDS = {
    "env": (make_env, "write docker/stack.env"),
    "up": (up, "build, start, wait until all is healthy, deploy the schedules"),
    "deploy": (deploy, "deploy the schedules anew"),
    "join": (join, "a worker for the stack of another machine"),
    "upgrade": (upgrade, "bring the databases to the version of the image"),
    "down": (lambda: call("down"), "stop and remove the containers; what they keep stays in volumes"),
    "logs": (lambda: call("logs", "--follow", "--tail", "100"), "what they say"),
    "backup": (backup, "databases, artifacts and DVC's remote into a folder"),
    "restore": (restore, "the same back, into an empty stack"),
}


def main():
    "Status 1: it could not be done."
    parser = argparse.ArgumentParser(prog="stack", description="The stack of containers on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, says) in COMMANDS.items():
        command = commands.add_parser(name, help=says)
        if name in ("backup", "restore"): command.add_argument("folder", type=lambda path: Path(path).resolve())
    given = vars(parser.parse_args())
    try: COMMANDS[given.pop("command")][0](*given.values())
    except (Wrong, OSError) as error: sys.exit(f"stack: {error}")
    except KeyboardInterrupt: sys.exit(130)


if __name__ == "__main__": main()
