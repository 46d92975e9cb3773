"""The watchdog of one stage, started by its runner in a session of its own: `python -m flows.reaper TOKEN RUNNER [DVC]`.

Its standard input is a pipe that only the runner can write to: when the pipe ends, the runner is gone, whatever ended it.
"""
import select, sys, time
from contextlib import suppress

import psutil


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


def watch(token: str,  # of the stage
          runner: str, # its pid
          *dvc: str    # the pid of the `dvc` it belongs to, if there is one
         ):
    "Wait for the end of the runner, which an end of its `dvc` brings about, then end what it left."
    runner, dvc = find(runner), [find(pid) for pid in dvc]
    while not pipe_ends(within=0.5):
        if not any(map(gone, dvc)): continue
        with suppress(psutil.Error):
            runner.terminate()
            if not pipe_ends(within=5): runner.kill()  # time enough to keep its notebook
    reap(token)


if __name__ == "__main__": watch(*sys.argv[1:])
