"""The pipeline by itself: new data in, what changed done anew, the model judged, people told. `python -m flows.retrain` runs it once, without a server."""
import argparse, json, os, shutil
from contextlib import suppress

import flows.embedded  # noqa: F401  before prefect
from prefect import flow, get_run_logger
from prefect.states import Completed

from flows.commands import STAGE, Command, ask, remote
from flows.forms import chosen, typed, with_sections
from flows.home import ROOT
from flows.notify import notify
from flows.once import once
from flows.preflight import keep_edited, other_start
from flows.report import tell
from flows.runs import guarded, one_line, step
from flows.score import champion, planned, score
from flows.stage import check_params, end_survivors, stage_notebooks
from nbs_lib.config import WrongCall, digest, edit_params, file_digest, overlay, params, read_json, replacing, run_id, tracking_uri, write_json
from nbs_lib.formats import several
from nbs_lib.incoming import gather, growing, judged, take, take_rest, waiting

CACHE, INCOMING, RAW, PATCHES = ROOT/"data/cache", ROOT/"data/incoming", ROOT/"data/raw/incoming", ROOT/"data/patches.jsonl"
DONE = CACHE/"retrain.json"  # the state that was published and judged last
ROOM = 1 << 30  # least free disk [bytes]


def follow(command, *fine):
    "Tell a command's lines as they come; its status."
    for line in filter(None, command): get_run_logger().info(line)
    return command.end(*fine)


@step("pull", retries=3, retry_delay_seconds=[1, 5, 15])
def pull(refetch, far):
    "What others have pushed, where there is a remote, and what has changed at the address that the stage fetch reads."
    if far:
        try: follow(Command("dvc", "pull", "--allow-missing"))
        except WrongCall as error:  # of what a killed run wrote and did not save
            if "unsaved files" not in str(error): raise
            keep_edited()
            follow(Command("dvc", "pull", "--allow-missing", "--force", "dvc.yaml"))
            follow(Command("dvc", "pull", "--allow-missing"))
    if refetch: follow(Command("dvc", "repro", "--force", "--single-item", "fetch"))


@step("preflight")
def preflight(values):
    "Take what the form says; refuse what would fail hours later; end what a killed run left."
    for section, of in values.items(): typed(section, **of)
    for section, key in overlay(env := os.environ.get("NBS_ENV"), path=ROOT/"params.yaml"):
        if typed(section, **values.get(section, {}))[key] != (fixed := typed(section)[key]):
            raise WrongCall(f"{section}.{key} is {fixed} in NBS_ENV={env}, whatever a run asks for")
    if values:
        edit_params(values, path=ROOT/"params.yaml")
        get_run_logger().info(f"written into params.yaml: {values}")
    check_params(stage_notebooks(), under_dvc=True)
    if not (ROOT/".git").exists(): follow(Command("dvc", "config", "--local", "core.no_scm", "true"))  # an image, an archive
    if (free := shutil.disk_usage(ROOT).free) < ROOM:
        raise WrongCall(f"{free >> 20} MB of disk are free where {ROOM >> 20} MB are needed: `dvc gc --workspace` frees some")
    if said := other_start(): get_run_logger().warning(said)
    end_survivors()


@step("incoming")
def incoming(settle, run):
    """Take batches with annotations to the raw data; their names, those of the batches that wait to be scored, and a line where some must be left alone for
    longer. And what people decided elsewhere."""
    if (file := os.environ.get("NBS_DECISIONS")) and file_digest(file) != file_digest(PATCHES):
        with replacing(PATCHES) as tmp: shutil.copyfile(file, tmp)
        get_run_logger().info(f"people's decisions on dead letters are those of {file}")
    young = growing(INCOMING, settle)  # before what follows looks: what has become still by then is taken
    (taken, closed), gathered = take_rest(INCOMING, RAW), gather(INCOMING, run, settle)
    batches = waiting(INCOMING, settle)
    if gathered and gathered not in [b.path for b in batches]: batches.append(judged(gathered))  # its files were left alone, it was made just now
    if later := too_young({p: age for p, age in young.items() if p.exists() and p not in [b.path for b in batches]}, settle): get_run_logger().warning(later)
    for batch in batches:
        if batch.unclear: get_run_logger().warning(f"{batch.path.relative_to(ROOT)} is left where it lies: {batch.why}")
    for batch in (b for b in batches if b.format):
        try: taken.append(take(batch, RAW))
        except OSError as error: closed.append(str(error))
    if closed:
        get_run_logger().warning(f"not taken: {'; '.join(closed)}")
        notify("a batch cannot be taken", "\n".join(closed), True)
    for folder in sorted(path for path in RAW.glob("[!.]*") if path.is_dir() and not path.with_name(f"{path.name}.dvc").exists()):
        Command("dvc", "add", str(folder.relative_to(ROOT))).end()  # also what a killed run had taken
    if names := unread(RAW.glob("*"), ROOT/params("ingest")["root"], params("ingest")["sources"]):
        get_run_logger().warning(f"data/raw/incoming has {', '.join(names)}, which ingest.sources does not read: add {{path: incoming/*, format: auto}}")
    return [folder.name for folder in taken], [b.path.name for b in batches if not b.format and not b.unclear], later


def too_young(ages, settle):
    "A line about what must be left alone for longer, path → for how long it was; else nothing."
    if not ages: return ""
    some = ", ".join(f"{path.relative_to(INCOMING.parent.parent)} (for {age:.0f} s)" for path, age in [*ages.items()][:3])
    return f"to be left alone for {settle:g} s before it is taken: {some}{f' and {len(ages) - 3} more' if len(ages) > 3 else ''}"


def unread(folders, root, sources):
    "Names of the folders that no source holds; none where ingest will refuse the sources as they are."
    if not isinstance(sources, list): return []
    paths = [root/s["path"] for s in several(root, sources) if isinstance(s, dict) and isinstance(s.get("path"), str)]
    return sorted(f.name for f in folders if f.is_dir() and not f.name.startswith(".") and not any(f.is_relative_to(p) for p in paths))


@step("stage")
def stage(heading, repro):
    "Tell the lines of one stage; the heading of the next."
    get_run_logger().info(heading)
    for line in repro:
        if STAGE.match(line): return line
        if line: get_run_logger().info(line)
    repro.end()


def reproduce(far):
    "One `dvc repro`; each stage is a task from where DVC says that it begins. What a clone pushed that is gone is not made again, but pulled."
    repro = Command("dvc", "repro", *(["--pull"] if far else []))
    heading = next(filter(STAGE.match, repro), None)
    while heading: heading = stage.with_options(name=(name := STAGE.match(heading)["name"]), task_run_name=name)(heading, repro)
    repro.end()


@step("publish")
def publish():
    follow(done := Command("nbs", "publish", "--json"))
    return json.loads(done.said[-1])


@step("gate")
def gate(version):
    "What was decided. People hear of it at once: what comes after may fail or be killed, and to the next run it is old."
    follow(done := Command("nbs", "gate", str(version), "--json"), 3)
    judged = json.loads(done.said[-1])
    if judged["new"]: notify(f"model {'promoted' if judged['promoted'] else 'refused'}", outcome(judged), not judged["promoted"])
    return judged


def outcome(judged): return f"version {judged['version']} {judged['text']}"


@step("push", retries=3, retry_delay_seconds=[1, 5, 15])
def push():
    follow(Command("dvc", "push", "--run-cache"))
    follow(Command("python", "-m", "flows.push"))


def scored(waits):
    "Let the champion, where there is one, score what waits and was not scored by it before; a line a batch."
    try: bundle = waits and champion()
    except WrongCall as error: return get_run_logger().warning(f"{', '.join(waits)} cannot be scored yet: {error}")
    said = []
    for source in [str(INCOMING/name) for name in waits]:
        with suppress(WrongCall):  # which the run that scores will tell
            if planned(bundle, source, {}).done: continue
        said.append(score(pictures=source, return_state=True).message)
    return said


def state():
    "A hash of what was published and judged, if it was: another lock, other parameters or another store, and it is to be done again."
    return digest(file_digest(ROOT/"dvc.lock"), file_digest(ROOT/"params.yaml"), tracking_uri(ROOT/"data/mlflow"))


def work(settle, refetch, values, run):
    "What a run does, once it is alone."
    preflight(values)
    pull(refetch, far := remote())
    taken, waits, later = incoming(settle, run)
    changed = ask("dvc", "status", "--json")
    if not changed and DONE.is_file() and read_json(DONE) == state():
        if said := scored(waits): return Completed(message="; ".join(filter(None, [*said, later])))
        nothing = "nothing new: data, code and parameters are those of the last run"
        return Completed(name="Nothing new", message="; ".join(filter(None, [nothing, later])))
    keep_edited()
    reproduce(far)
    seen, published = state(), publish()
    judged = gate(published["version"])
    if far: push()
    tell(run, taken, scored(waits), published, judged)
    write_json(DONE, seen)  # what is edited while the gate is at work is new to the next run
    return Completed(message="; ".join(filter(None, [outcome(judged), later])))


@flow(name="retrain")
@with_sections("fetch", "ingest", "split", "train", "evaluate", "publish", "gate")
def retrain(settle: float = 10, refetch: bool = False, **sections):
    """Do anew what changed: data, code or parameters.

    Args:
        settle: for how long a batch in data/incoming must have been left alone [s]
        refetch: ask the address of the stage fetch again, though nothing changed here
    """
    def numbered():
        os.environ["NBS_RUN_ID"] = run = run_id()
        return work(settle, refetch, chosen(sections), run)
    title = lambda error: "too many dead letters" if "max_dead_rate" in str(error) else "retraining failed"
    return guarded(CACHE/"retrain.lock", "is at work", numbered, title)


def main():
    "Run it once. Status 0: done, or nothing to do; 1: failed; 2: called wrongly, or no server where one is named; 3: another run is at work."
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description="Do anew what changed, publish, judge. Once, without a server.")
    parser.add_argument("--settle", type=float, default=10, help="seconds for which a batch in data/incoming must have been left alone")
    parser.add_argument("--refetch", action="store_true", help="ask the address of the stage fetch again, though nothing changed here")
    args = parser.parse_args()
    print(once(retrain, settle=args.settle, refetch=args.refetch).message)


one_line()
if __name__ == "__main__": main()
