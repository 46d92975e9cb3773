"""All schedules of flows/schedules.yaml from one process: `python -m flows.serve`.

Without a server (PREFECT_API_URL, or a profile) it brings its own, on this machine alone, with its pages and its memory in data/prefect.
"""
import argparse, os, subprocess, sys, threading, time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.request import urlopen

import flows.embedded  # noqa: F401  before prefect
from prefect import get_client, serve
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.sorting import DeploymentSort
from prefect.events import DeploymentEventTrigger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed

from flows.commands import BIN
from flows.home import HOME, ROOT, python_path
from flows.reaper import leash
from flows.runs import end
from flows.schedules import FILE, entries, flow_of
from nbs_lib.config import WrongCall

PATIENCE = 60  # for a server to answer [s]


def answers(url):
    try: urlopen(f"{url}/health", timeout=5).close()
    except OSError: return False
    return True


def start_server(port):
    with open(flows.embedded.FOLDER/"server.log", "a") as log:
        return subprocess.Popen([BIN/"prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], cwd=ROOT, stdout=log, stderr=log)


@contextmanager
def own_server(port):
    "A server that is started again when it dies: its address. Raises `WrongCall` where it does not come up."
    url, stopping = f"http://127.0.0.1:{port}/api", threading.Event()
    if answers(url): raise WrongCall(f"a Prefect server runs on port {port} already: PREFECT_API_URL={url} uses it, --port takes another")
    process, patience = start_server(port), time.monotonic() + PATIENCE
    while not answers(url):
        if process.poll() is None and time.monotonic() < patience: time.sleep(.2)
        else: raise WrongCall(f"Prefect's server does not start: see {flows.embedded.FOLDER/'server.log'}")
    def look_after(process):
        while not stopping.wait(1):
            if process.poll() is None: continue
            print(f"serve: the server ended with {process.returncode}, and is started again", file=sys.stderr, flush=True)
            process = start_server(port)
    threading.Thread(target=look_after, args=[process], daemon=True).start()
    try: yield url
    finally: stopping.set()


def check_server(url):
    "Raises `WrongCall` unless a server of this version answers."
    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise WrongCall(f"no Prefect server answers at {url} ({type(error).__name__}): start it, or unset PREFECT_API_URL")
        try: client.raise_for_api_version_mismatch()
        except RuntimeError as error: raise WrongCall(f"{url}: {' '.join(str(error).split())}") from None


def tidy(client, kept):
    "Take from the server what the file no longer holds, and end the runs that nobody has served: this process alone does."
    ours = DeploymentFilter(tags={"all_": [HOME]})
    for deployment in client.read_deployments(deployment_filter=ours, sort=DeploymentSort.NAME_ASC, limit=200):
        runs = lambda **more: FlowRunFilter(deployment_id={"any_": [deployment.id]}, **more)
        end(client, runs(state={"type": {"any_": ["RUNNING", "PENDING"]}}), Crashed(message="its process was gone when serving began"))
        past = runs(state={"type": {"any_": ["SCHEDULED"]}}, expected_start_time={"before_": datetime.now(UTC)})
        end(client, past, Cancelled(message="its time had passed when serving began; the next run comes at its own"))
        if deployment.name not in kept: client.delete_deployment(deployment.id)
        elif not kept[deployment.name].schedules:
            for schedule in deployment.schedules: client.delete_deployment_schedule(deployment.id, schedule.id)


def deployment(entry):
    "As Prefect has it."
    triggers = [DeploymentEventTrigger(name=f"{entry.name}: {name}", expect={name}) for name in entry.triggers]
    return flow_of(entry).to_deployment(entry.name, schedules=[when.schedule() for when in entry.schedules], parameters=entry.parameters,
                                        triggers=triggers, paused=entry.paused, tags=[HOME])


def served(found):
    check_server(PREFECT_API_URL.value())
    with get_client(sync_client=True) as client: tidy(client, {entry.name: entry for entry in found})
    serve(*map(deployment, found), pause_on_shutdown=False)


def main():
    "Serve until it is stopped. Status 2: called wrongly."
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Serve all schedules from one process.")
    parser.add_argument("--file", type=Path, default=FILE, help="with the schedules")
    parser.add_argument("--port", type=int, default=4200, help="of the server that it brings, where none is named")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = python_path()
    try:
        found = entries(args.file.resolve())
        if not found: raise WrongCall(f"{args.file}: it holds no deployment to serve")
        with leash():
            if PREFECT_API_URL.value(): return served(found)
            with own_server(args.port) as url, temporary_settings({PREFECT_API_URL: url}): served(found)
    except WrongCall as error:
        print(f"serve: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__": main()
