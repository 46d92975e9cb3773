"""All schedules of flows/schedules.yaml from one process: `python -m flows.serve`.

Without a server (PREFECT_API_URL, or a profile) it brings its own, with its pages and its memory in data/prefect.
"""
import argparse, logging, os, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from datetime import UTC, datetime
from pathlib import Path
from urllib.request import urlopen

import flows.embedded  # noqa: F401  before prefect
from prefect import get_client, serve
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed

from flows.commands import BIN
from flows.home import HOME, ROOT, python_path
from flows.reaper import leash
from flows.runs import end
from flows.schedules import FILE, entries
from flows.server import DEPLOYED, SERVED, as_prefect, check_server, full_name, on_server, remove, tagged
from flows.stage import note_signals
from nbs_lib.config import WrongCall

PATIENCE = 60  # for a server to answer [s]


def answers(url):
    try: urlopen(f"{url}/health", timeout=5).close()  # the address of a Prefect server  # nosec B310
    except OSError: return False
    return True


def start_server(host, port):
    "In a session of its own: a Ctrl-C is this process's to hear."
    with open(flows.embedded.FOLDER/"server.log", "a") as log:
        return subprocess.Popen([BIN/"prefect", "server", "start", "--host", host, "--port", str(port)], cwd=ROOT, stdout=log, stderr=log,
                                env=dict(PREFECT_HOME=str(flows.embedded.FOLDER)) | os.environ, start_new_session=True)


@contextmanager
def own_server(host, port):
    "A server that is started again when it dies: its address on this machine. Raises `WrongCall` where it does not come up."
    near = "127.0.0.1" if host == "0.0.0.0" else host  # nothing is bound here  # nosec B104
    url, stopping = f"http://{near}:{port}/api", threading.Event()
    if answers(url): raise WrongCall(f"a Prefect server runs on port {port} already: PREFECT_API_URL={url} uses it, --port takes another")
    process, patience = start_server(host, port), time.monotonic() + PATIENCE
    while not answers(url):
        if process.poll() is None and time.monotonic() < patience: time.sleep(.2)
        else: raise WrongCall(f"Prefect's server does not start: see {flows.embedded.FOLDER/'server.log'}")
    def look_after(process):
        while not stopping.wait(1):
            if process.poll() is None: continue
            print(f"serve: the server ended with {process.returncode}, and is started again", file=sys.stderr, flush=True)
            process = start_server(host, port)
    threading.Thread(target=look_after, args=[process], daemon=True).start()
    try: yield url
    finally: stopping.set()


def tidy(client, kept):
    "Take from the server what the file no longer holds, and end the runs that nobody has served: this process alone does."
    for name, deployment in tagged(client, SERVED, HOME).items():
        runs = lambda **more: FlowRunFilter(deployment_id={"any_": [deployment.id]}, **more)
        end(client, runs(state={"type": {"any_": ["RUNNING", "PENDING"]}}), Crashed(message="its process was gone when serving began"))
        past = runs(state={"type": {"any_": ["SCHEDULED"]}}, expected_start_time={"before_": datetime.now(UTC)})
        end(client, past, Cancelled(message="its time had passed when serving began; the next run comes at its own"))
        if name not in kept: remove(client, deployment)
        elif not kept[name].schedules:
            for schedule in deployment.schedules: client.delete_deployment_schedule(deployment.id, schedule.id)


def check_free(client, names):
    "Raises `WrongCall` for a deployment that workers take from the server: served as well, they would get it no more."
    for name in names:
        if (there := on_server(client, name)) and DEPLOYED in there.tags:
            raise WrongCall(f"{name} is deployed for workers on this server: give it another name, or take it from there first")


def served(found):
    check_server(PREFECT_API_URL.value())
    with get_client(sync_client=True) as client:
        check_free(client, kept := {full_name(entry): entry for entry in found})
        tidy(client, kept)
    serve(*(as_prefect(entry, tags=[SERVED, HOME]) for entry in found), pause_on_shutdown=False)


def until_stopped(work, *args):
    "Work in a thread, where Prefect hears no signal, until it ends or a signal comes: which."
    stopped = []
    note_signals(stopped)
    done = ThreadPoolExecutor(1).submit(copy_context().run, work, *args)
    while wait([done], .2).not_done and not stopped: pass
    if not stopped: done.result()
    logging.disable(logging.CRITICAL)  # nobody needs to hear how Prefect misses what ends now
    return stopped


def main():
    "Serve until it is stopped. Status 2: called wrongly."
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description="Serve all schedules from one process.")
    parser.add_argument("--file", type=Path, default=FILE, help="with the schedules")
    parser.add_argument("--host", default="127.0.0.1", help="address on which the server that it brings listens; 0.0.0.0: for other machines too")
    parser.add_argument("--port", type=int, default=4200, help="of the server that it brings, where none is named")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = python_path()
    try:
        found = entries(args.file.resolve())
        if not found: raise WrongCall(f"{args.file}: it holds no deployment to serve")
        with leash():
            if PREFECT_API_URL.value(): stopped = until_stopped(served, found)
            else:
                with own_server(args.host, args.port) as url, temporary_settings({PREFECT_API_URL: url}): stopped = until_stopped(served, found)
    except WrongCall as error:
        print(f"serve: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt: stopped = [signal.SIGINT]  # before it served
    sys.stdout.flush()
    # Prefect's threads would be waited for, and wait for a server that is gone
    os._exit(128 + stopped[0] if stopped else 0)


if __name__ == "__main__": main()
