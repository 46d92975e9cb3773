"""Commands that a flow runs: told line by line in its log, ended by one clear line where they fail."""
import json, os, re, subprocess, sys
from collections import deque
from pathlib import Path

from flows.home import ROOT, python_path
from nbs_lib.config import WrongCall

BIN = Path(sys.executable).parent  # where dvc and nbs lie
# The stage's own words before DVC's, which only say that the stage failed.
WHY = re.compile(r"(?P<said>[\w-]+ (failed|stopped): .+|nbs: .+|ERROR: .+|.*Error: .+)")
STAGE = re.compile(r"(?:Running stage|Stage) '(?P<name>[^']+)'")


class Command:
    "A running command; its lines come out as it prints them, both streams in one."
    def __init__(self, *words: str, **env: str):
        self.words, self.said = words, deque(maxlen=200)
        env = os.environ | dict(PYTHONUNBUFFERED="1", PYTHONPATH=python_path()) | env
        self.process = subprocess.Popen([BIN/words[0], *words[1:]], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, errors="replace")
        self.lines = (line.rstrip() for line in self.process.stdout)

    def __iter__(self): return self

    def __next__(self):
        self.said.append(next(self.lines))
        return self.said[-1]

    def end(self, *fine: int  # statuses that are no failure, besides 0
           ):
        "Wait; the status. Raises `WrongCall` with the line that says why where it failed."
        for _ in self: pass
        if (status := self.process.wait()) in (0, *fine): return status
        raise WrongCall(self.why() or f"{' '.join(self.words)} ended with status {status}")

    def why(self):
        "The line that says why it failed: what a stage said of itself, else what came first."
        found = [m["said"] for line in self.said if (m := WHY.match(line))]
        stages = [said for said in found if " failed: " in said or " stopped: " in said]
        return (stages or found or [line for line in reversed(self.said) if line.strip()] or [""])[0][:600]


def ask(*words: str):
    "What a command answers in JSON. Raises `WrongCall` where it fails."
    done = subprocess.run([BIN/words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: raise WrongCall((done.stderr.strip().splitlines() or [f"{' '.join(words)} ended with status {done.returncode}"])[-1])
    return json.loads(done.stdout or "{}")


def git(folder, *words: str):
    "What git answers in a folder. Raises `WrongCall` where it fails; it never asks for a password."
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, env=os.environ | dict(GIT_TERMINAL_PROMPT="0"))
    if done.returncode: raise WrongCall(f"git {words[0]}: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}")
    return done.stdout.strip()


def remote():
    "Whether DVC has a default remote."
    return subprocess.run([BIN/"dvc", "remote", "default"], cwd=ROOT, capture_output=True).returncode == 0
