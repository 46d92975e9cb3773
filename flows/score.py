"""Batches of pictures, scored by the champion: `python -m flows.score data/incoming/monday`."""
import argparse, glob, json, os
from typing import Literal
from zoneinfo import ZoneInfo

import flows.embedded  # noqa: F401  before prefect
from prefect import flow, runtime
from prefect.artifacts import create_table_artifact
from prefect.states import Completed

from flows.forms import chosen, typed, with_sections
from flows.home import ROOT
from flows.once import once
from flows.runs import guarded
from flows.spread import spread
from flows.stage import end_survivors
from nbs_lib.config import WrongCall, params, read_json, tracking_uri
from nbs_lib.registry import download
from nbs_lib.score import batch_name, plan, run_plan
from nbs_lib.store import asking, connect

DATA = ROOT/"data"


def champion():
    "The champion's bundle, brought where it is another than last time. Raises `WrongCall` where there is no champion."
    with asking(uri := tracking_uri(DATA/"mlflow")):
        return download(connect(uri), params("publish", path=ROOT/"params.yaml")["model"], "champion", DATA/"champion")


def planned(bundle, source, values):
    "What is to be done for a batch. Raises `WrongCall` for one that is empty or gone."
    name = batch_name(source, ROOT, DATA/"incoming")
    p = typed("score", **{**values, "pictures": source})
    return plan(bundle, DATA/"predictions"/name, DATA/"cache/score"/name, DATA/"cache/runtimes", ROOT, **p)


def batches(pictures, batch, timezone):
    "What `pictures` names; with a pattern the folders below it that are called so, by the time that the run was scheduled for."
    if not batch: return [pictures]
    try: zone = ZoneInfo(timezone) if timezone else None
    except (KeyError, ValueError, OSError): raise WrongCall(f"there is no timezone {timezone!r}; name one such as Europe/Berlin") from None
    pattern = runtime.flow_run.scheduled_start_time.astimezone(zone).strftime(batch)
    found = [path for path in sorted(glob.glob(f"{glob.escape(str(ROOT/pictures))}/{pattern}")) if os.path.isdir(path)]
    if not found: raise WrongCall(f"{pictures}: there is no folder {pattern} in it")
    return found


def work(pictures, batch, timezone, each, values):
    "What a run does, once it is alone."
    end_survivors()
    bundle, pictures = champion(), pictures or typed("score", **values)["pictures"]
    told, failed = [], []
    for source in batches(pictures, batch, timezone):
        try:
            new = not (todo := planned(bundle, source, values)).done
            report = run_plan(todo, each) if new else read_json(todo.out/"report.json")
            told.append(dict(batch=str(todo.out.relative_to(ROOT)), new=new, **report))
        except WrongCall as error: failed.append(str(error))
    said = [line(of) for of in told if of["new"]]
    if said: create_table_artifact([dict(batch=line) for line in said], key="scoring")
    if failed: raise WrongCall("; ".join([*failed, *said]))
    if not said: return Completed(name="Nothing new", message=f"nothing new: the champion saw {', '.join(of['source'] for of in told)} before", data=told)
    return Completed(message="; ".join(said), data=told)


def line(of):
    "A batch in one line."
    return f"{of['batch']}: {of['pictures']} pictures, {of['boxes']} boxes, {sum(of['letters'].values())} letters, by version {of['version']}"


@flow(name="score")
@with_sections("score")
def score(pictures: str = "", batch: str = "", timezone: str = "", draw: bool = False, task_runner: Literal["process", "ray"] = "process", address: str = "",
          workers: int = 0, **sections):
    """Let the champion find objects in pictures: a table of boxes in data/predictions, a letter for each picture that cannot be read.

    Args:
        pictures: folder, text file with a path a line, or glob; empty: score.pictures of params.yaml
        batch: not all of `pictures`, but each folder in it that is called so; %Y-%m-%d is the day that the run was scheduled for, * is every folder
        timezone: of that day; empty: this machine's. A line of flows/schedules.yaml fills in that of its schedules
        draw: pictures with their boxes, too
        task_runner: process: on this machine; ray: on a cluster
        address: of the Ray cluster; empty: one on this machine for this run
        workers: processes on this machine; 0: one a core
    """
    values = chosen(sections).get("score", {}) | (dict(draw=True) if draw else {})
    return guarded(DATA/"cache/score.lock", "scores", lambda: work(pictures, batch, timezone, spread(task_runner, address, workers), values), "scoring failed")


def main():
    "Run it once. Status 0: done, or nothing to do; 1: failed; 2: called wrongly, or no server where one is named; 3: another run is at work."
    parser = argparse.ArgumentParser(prog="python -m flows.score", description="Score pictures with the champion. Once, without a server.")
    parser.add_argument("pictures", nargs="?", default="", help="folder, text file with a path a line, or glob; default: score.pictures of params.yaml")
    parser.add_argument("--batch", default="", help="each folder in it that is called so, such as %%Y-%%m-%%d (today's) or * (every one)")
    parser.add_argument("--draw", action="store_true", help="pictures with their boxes, too")
    parser.add_argument("--task-runner", choices=["process", "ray"], default="process", help="on this machine, or on a Ray cluster")
    parser.add_argument("--address", default="", help="of the Ray cluster; default: one on this machine for this run")
    parser.add_argument("--workers", type=int, default=0, help="processes on this machine; default: one a core")
    parser.add_argument("--json", action="store_true", help="print the batches' reports for a program")
    args = vars(parser.parse_args())
    as_json, ended = args.pop("json"), once(score, **args)
    print(json.dumps(ended.result()) if as_json else ended.message)


if __name__ == "__main__": main()
