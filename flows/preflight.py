"""What `make run` does before `dvc repro`: `python -m flows.preflight`.

DVC replaces a result that somebody changed by hand, and deletes what somebody added, without a word; here it is kept and told. It also does not see that
another file lies where `train.model` says: the name alone is a parameter.
"""
import json, os, shutil, subprocess, sys
from contextlib import suppress
from pathlib import Path

from flows.home import ROOT
from nbs_lib.config import WrongCall, file_digest, params, read_json, run_id

RUNS = Path("data/runs")
MOST = 100  # files that are kept: more are what a stopped stage left, not what a person changed


def edited():
    "Files in the pipeline's results that differ from what DVC recorded."
    status = subprocess.run([sys.executable, "-m", "dvc", "data", "status", "--granular", "--json"], cwd=ROOT, stdout=subprocess.PIPE)
    differs = {} if status.returncode else json.loads(status.stdout or "{}").get("uncommitted", {})
    return [Path(name) for kind in ("modified", "added") for name in differs.get(kind, []) if (ROOT/name).is_file()]


def keep(files: list,  # relative to the root
         folder: Path  # to copy them to
        ):
    "Copy files, their folders with them."
    for file in files:
        (folder/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder/file)


def keep_edited():
    "Keep and tell."
    os.chdir(ROOT)
    if not (files := edited()): return
    folder = RUNS/run_id()/"edited"
    try: keep(files[:MOST], folder)
    except OSError as error: folder = f"nowhere ({error.strerror})"
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    first = f"of the first {MOST} " if len(files) > MOST else ""
    print(f"{files[0]}{more} changed since DVC recorded it, and will be made anew: a copy {first}lies in {folder}", file=sys.stderr)


def other_start():
    "A line where the weights that training starts from are another file than those that the model was trained from; else nothing."
    with suppress(WrongCall):  # the stages tell what is wrong with these files
        model, then = str(params("train", path=ROOT/"params.yaml")["model"]), read_json(ROOT/"data/reports/train.json").get("start")
        if not then or file_digest(ROOT/model) in (None, then): return
        return f"{model} is another file than data/models was trained from: `dvc repro --force --single-item train` trains anew"


if __name__ == "__main__":
    keep_edited()
    if said := other_start(): print(said, file=sys.stderr)
