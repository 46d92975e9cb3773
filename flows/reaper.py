"""The watchdog of one runner, of a stage or of a flow, in a session of its own: `python -m flows.reaper TOKEN RUNNER [PARENT]`.

Its standard input is a pipe that only the runner can write to: when the pipe ends, the runner is gone, whatever ended it.
"""
import os, secrets, select, subprocess, sys, time
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

import psutil

from flows.home import HOME, ROOT


def start_reaper(token: str,    # in the environment of all that the runner, this process, will start
                 *parents: int  # pids of processes that this one shall not outlive
                ):
    "Start the watchdog; leaving its `with` block ends the pipe, then waits until nothing is left of what bears the token."
    env = {name: value for name, value in os.environ.items() if not name.startswith("NBS_STAGE_")}
    return subprocess.Popen([sys.executable, "-m", "flows.reaper", token, str(os.getpid()), *map(str, parents)], cwd=ROOT, env=env,
                            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def marks(token: str  # of this runner
         ):
    "What all that this process starts bears in its environment."
    return dict(NBS_STAGE_TOKEN=token, NBS_STAGE_ROOT=HOME, NBS_STAGE_RUNNER=str(os.getpid()))


@contextmanager
def leash(*parents: int  # pids of processes that this one shall not outlive
         ):
    "Whatever is started inside dies with this process, and this process with its parents."
    resource_tracker.ensure_running()  # started inside it would be ended under multiprocessing's hands; it ends by itself when this process does
    before, token = dict(os.environ), secrets.token_hex(8)
    with start_reaper(token, *parents):
        os.environ.update(marks(token))
        try: yield
        finally:
            for name in marks(token): os.environ.pop(name)
            os.environ.update({name: before[name] for name in marks(token) if name in before})


def marked():
    "Every process of any stage, with its environment: the marks survive new sessions, double forks and a dead parent."
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            env = process.environ()
            if "NBS_STAGE_TOKEN" in env: yield process, env


def find(pid: str  # of a process, which may have ended
        ):
    "The process, or None."
    with suppress(psutil.NoSuchProcess): return psutil.Process(int(pid))


def gone(process):
    "Whether a process that was looked up with `find` has ended; one that only waits to be collected has."
    with suppress(psutil.NoSuchProcess):
        return not (process and process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return True


def end(processes: list,  # of `psutil.Process`
        grace: float      # between SIGTERM and SIGKILL [s]
       ):
    "End processes, politely at first."
    for signal in ("terminate", "kill"):
        for process in processes:
            with suppress(psutil.Error): getattr(process, signal)()
        deadline = time.monotonic() + grace
        # Not psutil.wait_procs: it waits until somebody collects the dead, which in a container may be never.
        while (processes := [p for p in processes if not gone(p)]) and time.monotonic() < deadline: time.sleep(0.02)


def reap(token: str  # in the environment of all that one runner started
        ):
    "End every process that bears the token, also those that are started meanwhile."
    while found := [process for process, env in marked() if env["NBS_STAGE_TOKEN"] == token]: end(found, grace=2)


def pipe_ends(within: float  # [s]
              ):
    "Wait for the end of the runner."
    return select.select([sys.stdin], [], [], within)[0]


def watch(token: str,    # of the runner
          runner: str,   # its pid
          *parents: str  # pids that it shall not outlive: of its `dvc`, of the server of its flow
         ):
    "Wait for the end of the runner, which an end of a parent brings about, then end what it left."
    runner, parents, orphan = find(runner), [find(pid) for pid in parents], False
    while not pipe_ends(within=0.5):
        if not any(map(gone, parents)): continue
        orphan = True
        with suppress(psutil.Error):
            runner.terminate()
            if not pipe_ends(within=5): runner.kill()  # time enough to keep its notebook
    reap(token)
    if orphan and not os.fork():  # it goes on when this process ends, and would tell its end for minutes to a server that is gone as well
        time.sleep(3)
        with suppress(psutil.Error): runner.kill()


if __name__ == "__main__": watch(*sys.argv[1:])
