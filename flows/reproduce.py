"""Make a registered version again: `python -m flows.reproduce 3`.

Its commit, what was changed in it, its parameters and its data are laid out aside, the pipeline runs there, and the scores are held beside each other.
"""
import argparse, json, os, shutil, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flows.commands import git
from flows.home import ROOT
from flows.reaper import leash
from flows.stage import end_survivors
from nbs_lib.config import WrongCall, file_digest, params, read_json, read_yaml, tracking_uri
from nbs_lib.registry import download, find, stored
from nbs_lib.store import asking, connect

CODE = "nbs_lib/", "notebooks/"


@contextmanager
def own(folder):
    "A folder to work in, made anew, for this run alone; nothing that is started in it outlives the run."
    there = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if there - {"kept", "workspace", "lock"} or there == {"workspace"}: raise WrongCall(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    try: lock = FileLock(folder/"lock", timeout=0).acquire()
    except Timeout: raise WrongCall(f"another run makes a version in {folder}: wait for it, or name another --folder") from None
    with lock, leash():
        end_survivors()
        for name in ("kept", "workspace"): shutil.rmtree(folder/name, ignore_errors=True)
        (folder/"kept").mkdir()
        yield


def attached(client, version, folder):
    "Bring what a version and its run keep into a folder: parameters, lock, reports, the patch of its code."
    with asking(client.tracking_uri):
        there = {a.path for a in client.list_artifacts(version.run_id)}
        for name in ("params.yaml", "dvc.lock", "reports", "code.patch"):
            if name in there: client.download_artifacts(version.run_id, name, str(folder))
    missing = sorted({"params.yaml", "dvc.lock", "reports"} - there)
    if missing: raise WrongCall(f"run {version.run_id} keeps no {' and no '.join(missing)}: it was never published")
    if not stored(client, version): return  # what its run keeps may be that of a later version of these weights
    origin = download(client, version.name, version.version, folder/"bundle")/"origin"
    if origin.is_dir(): shutil.copytree(origin, folder, dirs_exist_ok=True)


def lay_out(tags, kept, folder):
    "The code as it was, in a clone of its own."
    commit = tags.get("mlflow.source.git.commit")
    if not commit: raise WrongCall("this version was trained outside git: nobody knows with what code")
    if subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True).returncode:
        raise WrongCall(f"commit {commit[:12]} is not in this repository: `git fetch` may bring it")
    git(ROOT, "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(folder))
    git(folder, "checkout", "--quiet", "--detach", commit)
    if tags.get("nbs.dirty") == "true":
        if not (kept/"code.patch").is_file(): raise WrongCall(f"the code had more changes over commit {commit[:12]} than were kept: it cannot be made again")
        git(folder, "apply", "--whitespace=nowarn", str(kept/"code.patch"))
    for name in ("params.yaml", "dvc.lock"): shutil.copyfile(kept/name, folder/name)


def bring_start(kept, folder):
    "The weights that the training started from, which may lie in nobody's keeping: here, or where ultralytics has them from."
    start, name = read_json(kept/"reports/train.json").get("start"), read_yaml(kept/"params.yaml")["train"]["model"]
    if not start or file_digest(folder/name) == start: return
    if (there := file_digest(ROOT/name)) == start:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/name, folder/name)
    elif there: raise WrongCall(f"{name} is not the file that this version was trained from (now {there}, then {start}): put that one there")
    else:
        from nbs_lib.detector import ultralytics
        if name not in ultralytics().utils.downloads.GITHUB_ASSETS_NAMES:
            raise WrongCall(f"{name}, which this version was trained from ({start}), is not here: put it there")


def dvc(folder, *words, told=True):
    "Run DVC in the folder, with its own library and its own tracking store; what it says goes to people, or into the outcome."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NBS_", "DVC_", "MLFLOW_")) or k.startswith("NBS_STAGE_")}  # the leash
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    to = dict(stdout=sys.stderr) if told else dict(capture_output=True, text=True)
    return subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, env={**clean, "PATH": path, "PYTHONPATH": str(folder)}, **to)


def bring_data(folder):
    "The raw data as it was: from DVC's cache, from the remote where there is one, and only then from where it once came."
    if (ROOT/".dvc/config.local").is_file(): shutil.copyfile(ROOT/".dvc/config.local", folder/".dvc/config.local")
    dvc(folder, "cache", "dir", "--local", dvc(ROOT, "cache", "dir", told=False).stdout.strip(), told=False)
    own = [str(p.relative_to(folder)) for p in sorted((folder/"data/raw").rglob("*.dvc"))]
    bring = "pull" if dvc(folder, "remote", "default", told=False).returncode == 0 else "checkout"
    if own and dvc(folder, bring, *own).returncode: raise WrongCall(f"{', '.join(own)}: the data is neither in DVC's cache nor in a remote")
    if dvc(folder, bring, "fetch", told=False).returncode and dvc(folder, "repro", "--force", "--single-item", "fetch").returncode:
        raise WrongCall("the stage fetch failed")
    check_deps(folder)


def check_deps(folder):
    "Refuse data that is not what the version was made from; tell of code that is not."
    status = dvc(folder, "status", "--json", told=False)
    if status.returncode: raise WrongCall(f"dvc status: {status.stderr.strip().splitlines()[-1]}")
    deps = {s: [d for c in changes if isinstance(c, dict) for d in c.get("changed deps", {})] for s, changes in json.loads(status.stdout).items()}
    if changed := [d for d in deps.get("ingest", []) if not d.startswith(CODE)]:
        raise WrongCall(f"{', '.join(changed)} is not what this version was made from: part of it is neither in git nor in DVC (`dvc add` keeps it)")
    if other := sorted({d for changed in deps.values() for d in changed if d.startswith(CODE)}):
        print(f"{', '.join(other)}: a stage ran with other code than was there when the training began; scores may differ", file=sys.stderr)


def compare(then, now, noise):
    "What both evaluations say of each score, and whether they agree."
    before, after = read_json(then/"evaluate.json"), read_json(now/"evaluate.json")
    devices = {read_json(f/"train.json")["device"] for f in (then, now)}
    scores = {k: dict(then=before.get(k), now=after.get(k)) for k in ("map", "map50", "map75", "right", "missed", "false_alarms")}
    same = before == after
    agree = same if devices == {"cpu"} else all(abs(scores[k]["then"] - scores[k]["now"]) <= noise for k in ("map", "map50"))
    return dict(agree=agree, equal=same, devices=sorted(devices), noise=None if devices == {"cpu"} else noise, scores=scores)


def reproduce(version, model, noise, folder):
    "Make a version again in a folder that is `own`; the comparison."
    uri, kept = tracking_uri(ROOT/"data/mlflow"), folder/"kept"
    with asking(uri):
        found = find(client := connect(uri), model, version)
        tags = client.get_run(found.run_id).data.tags
    attached(client, found, kept)
    lay_out(tags, kept, here := folder/"workspace")
    bring_start(kept, here)
    bring_data(here)
    stages = [s for s in read_yaml(here/"dvc.yaml")["stages"] if s != "fetch"]
    if dvc(here, "repro", "--force", "--single-item", *stages).returncode:
        raise WrongCall(f"the pipeline failed: its notebooks lie in {here/'data/runs/latest'}")
    return dict(version=found.version, folder=str(here), **compare(kept/"reports", here/"data/reports", noise))


def main():
    "Make a version again, and say whether it is the same. Status 0: it agrees, 1: it does not, 2: it could not be made."
    parser = argparse.ArgumentParser(prog="python -m flows.reproduce", description="Make a registered version again, and compare.")
    parser.add_argument("version", help="number or alias")
    parser.add_argument("--model", default=None, help="name of the registered model; default: publish.model of params.yaml")
    parser.add_argument("--noise", type=float, default=.02, help="difference in map and map50 that a card may make; on CPUs they must be equal")
    parser.add_argument("--folder", type=Path, default=None, help="to work in, made anew; default: one in data/cache")
    parser.add_argument("--json", action="store_true", help="print JSON for a program")
    args = parser.parse_args()
    folder = (args.folder or ROOT/f"data/cache/reproduce/{args.version}").resolve()
    try:
        with own(folder): done = reproduce(args.version, args.model or params("publish")["model"], args.noise, folder)
    except (WrongCall, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(2)
    if args.json: print(json.dumps(done))
    else:
        for name, of in done["scores"].items(): print(f"{name:12} {of['then']:10.6g} then {of['now']:10.6g} now")
        rule = "equal is what one CPU gives" if done["noise"] is None else f"within {done['noise']} is what a card gives"
        print(f"version {done['version']}: {'the same again' if done['equal'] else 'agrees' if done['agree'] else 'DIFFERS'} ({rule}); {done['folder']}")
    sys.exit(not done["agree"])


if __name__ == "__main__": main()
