"""Run one stage notebook with many sets of parameters, side by side: `python -m flows.sweep notebooks/stages/40_train.ipynb --grid grid.yaml`.

Each set has a run folder of its own, and where it trains a run in MLflow. What is finished is not done again by the next call.
"""
import argparse, json, os, queue, re, secrets, subprocess, sys, threading
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pandas as pd
import psutil
from filelock import FileLock, Timeout

from flows.commands import Command
from flows.home import ROOT
from flows.reaper import leash
from flows.sets import Sets, Stage, Study, read_sets, read_study, told
from flows.stage import RUNS, check_params, end_survivors, stage_notebooks
from nbs_lib.config import WrongCall, cores, digest, file_digest, nearest, read_json, read_yaml, replacing, write_json
from nbs_lib.draw import show_parallel

MEMORY = 2 << 30  # that one job may need [bytes]
slot = threading.local()  # what a worker has for its jobs: a share of the CPUs, perhaps a card


def cards():
    "The cards of this machine, as CUDA_VISIBLE_DEVICES names them."
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None: return [card for card in given.split(",") if card.strip() not in ("", "-1")]
    try: return subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError): return []


def usual_jobs(stage):
    "One a card where the stage takes the first card that it sees, else one a core, as far as the memory goes."
    if cards() and stage.usual.get("device") == "auto": return len(cards())
    return max(1, min(cores(), psutil.virtual_memory().available // MEMORY))


def slots(jobs):
    "Shares of the CPUs and a card for each job: trainings that are side by side on all cores wait for each other."
    cpus, there, free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [], cards(), queue.SimpleQueue()
    for i in range(jobs): free.put((cpus and (cpus[i::jobs] or [cpus[i % len(cpus)]]), there[i % len(there)] if there else None))
    return free


def take(free):
    "Let this thread have a slot; what it starts inherits its CPUs."
    cpus, slot.card = free.get()
    if cpus: os.sched_setaffinity(0, cpus)


def content(path: Path):
    "A hash of a file, or of the names, sizes and times in a folder; None where there is nothing. Caches of ultralytics do not count."
    if not path.is_dir(): return file_digest(path)
    return digest(sorted((str(p), (state := p.stat()).st_size, state.st_mtime_ns) for p in path.rglob("*") if p.is_file() and p.suffix != ".cache"))


def needs(stage: str):
    "A hash of what dvc.yaml says that the stage depends on, besides parameters: code and data. Of another stage nobody knows: each sweep of it starts over."
    told, stages = read_yaml(ROOT/"params.yaml"), read_yaml(ROOT/"dvc.yaml")["stages"]
    if stage not in stages: return secrets.token_hex(8)
    deps = [re.sub(r"\$\{(\w+)\.(\w+)\}", lambda key: str(told[key[1]][key[2]]), dep) for dep in stages[stage]["deps"]]
    return digest({dep: content(ROOT/dep) for dep in deps})


def numbers(report: dict):
    "What can be compared in a report; not-a-number is None there."
    return {key: value for key, value in report.items() if value is None or type(value) in (int, float)}


@dataclass
class Sweep:
    "One stage, tried with sets that come one after the other."
    stage: Stage
    name: str
    metric: str   # of the stage's report; None: the first with map in its name, else the first
    rows: list = field(default_factory=list)  # dicts of run, set, and report or why and page
    locks: dict = field(default_factory=lambda: defaultdict(threading.Lock))

    def __post_init__(self):
        self.folder, self.needs = RUNS/self.name, needs(self.stage.name)

    def attempt(self, values):
        "One set; its row. A set that is being tried already is waited for."
        whole = self.stage.whole(values, self.name)
        run = f"{self.name}-{digest(self.stage.name, whole)[:8]}"
        row, done = dict(run=run, set=values), RUNS/run/"sweep.json"
        mine = digest(self.stage.name, whole, self.needs, self.start(whole))
        with self.locks[run]:
            if not (done.is_file() and read_json(done) == mine):
                done.unlink(missing_ok=True)
                if why := self.execute(run, whole): return row | dict(why=why, page=self.page(run))
                write_json(done, mine)
        return row | dict(report=read_json(RUNS/run/f"reports/{self.stage.name}.json"))

    def start(self, values):
        "A hash of the weights that a training starts from, where they are a file."
        return file_digest(ROOT/(values.get("model") or ""))

    def execute(self, run, whole):
        "Run the notebook; why it failed, or nothing."
        given = {**whole, "out": str(RUNS/run)}  # a set that equals params.yaml would write into the pipeline's results
        words = [word for key, value in given.items() for word in ("-p", key, value if isinstance(value, str) else json.dumps(value))]
        own = dict(CUDA_VISIBLE_DEVICES=slot.card) if slot.card and whole.get("device") == "auto" else {}
        try: Command("python", "-m", "flows.stage", self.stage.name, *words, NBS_RUN_ID=run, **own).end()
        except WrongCall as error: return str(error)

    def page(self, run):
        "Where a failed notebook is to be seen; the page is missing where nothing was started."
        return next(map(str, (RUNS/run).glob(f"*_{self.stage.name}.html")), None)

    def score(self, report):
        "The metric of a report. Raises `WrongCall` where it has no such number."
        known = numbers(report)
        self.metric = self.metric or next((key for key in known if "map" in key), next(iter(known), None))
        if self.metric not in known: raise WrongCall(f"the report of {self.stage.name} has no number {self.metric!r}.{nearest(self.metric, known)}")
        return known[self.metric]

    def all(self, source, jobs):
        "Try what the source gives; it is told of each outcome."
        with ThreadPoolExecutor(jobs, initializer=take, initargs=(slots(jobs),)) as pool, leash():
            pending, asked = {}, count()
            while True:
                while len(pending) < jobs and (one := source.ask()): pending[pool.submit(self.attempt, one[1])] = next(asked), one[0]
                if not pending: return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    number, which = pending.pop(future)
                    self.rows.append(row := future.result() | dict(number=number))
                    value = self.score(row["report"]) if "report" in row else None
                    source.tell(which, value)
                    outcome = f"failed: {row['why']}" if "why" in row else f"{self.metric} {value}"
                    print(f"{len(self.rows)}/{source.trials}  {told(row['set'])}  {outcome}", file=sys.stderr, flush=True)

    def table(self, direction):
        "A row a set, the best first, failed ones at the end: all keys that any set has, all numbers, why and page."
        tried = sorted(self.rows, key=lambda row: row["number"])  # not as they ended
        keys, rows = list(dict.fromkeys(key for row in tried for key in row["set"])), []
        for row in tried:
            whole = self.stage.whole(row["set"], self.name)
            rows.append({key: whole[key] for key in keys} | {k: v for k, v in numbers(row.get("report", {})).items() if k not in keys}
                        | {key: row[key] for key in ("run", "why", "page") if key in row})
        sign = -1 if direction == "maximize" else 1
        return keys, sorted(rows, key=lambda row: (row.get(self.metric) is None, sign * (row.get(self.metric) or 0)))


def vary(rows, keys):
    "The keys that not all rows have the same value of."
    return [key for key in keys if len({digest(row[key]) for row in rows if key in row}) > 1]


def show(sweep, keys, rows):
    "Write the table and the picture; what people see of the table."
    with replacing(sweep.folder/"sweep.csv") as tmp: pd.DataFrame(rows).convert_dtypes().to_csv(tmp, index=False)
    fine = [row for row in rows if "why" not in row]
    others = [key for key in fine[0] if key not in (*keys, "run", sweep.metric)] if fine else []
    columns = list(dict.fromkeys([*(vary(rows, keys) or keys), *vary(fine, others)[:3], *([sweep.metric] if fine else [])]))
    with replacing(sweep.folder/"sweep.png") as tmp: show_parallel(rows, columns, sweep.metric).savefig(tmp, format="png", dpi=110)
    return pd.DataFrame(fine, columns=[*columns, "run"]).to_string(index=False)


def stage_of(notebook: str,  # path, or the stage's name
             path: Path      # the same seen from where it was typed
             ):
    "The stage that is meant."
    stages = {name: file for name, file in stage_notebooks().items() if name != "score"}  # which reports nothing to compare
    for name, file in stages.items():
        if notebook == name or path == file.resolve(): return Stage(name)
    raise WrongCall(f"{notebook} is no stage notebook.{nearest(path.stem.partition('_')[2] or notebook, stages)}")


def work(stage, source, name, metric, jobs):
    "Do all that is left to do; the keys and rows of the table, and what people see of it."
    sweep = Sweep(stage, name, metric or source.metric)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    try: lock = FileLock(sweep.folder/"lock", timeout=0).acquire()
    except Timeout: raise WrongCall(f"another sweep {name!r} is at work in this workspace: wait for it, or give this one a --name") from None
    with lock:
        end_survivors()
        if isinstance(source, Study):
            about = source.parameters, source.seed, source.direction, metric or source.metric
            of = digest(stage.name, stage.usual, *about, sweep.needs, sweep.start(stage.usual))
            source.open(sweep.folder/"study.db", of)
        sweep.all(source, min(jobs or usual_jobs(stage), source.trials))
        keys, rows = sweep.table(source.direction)
        return keys, rows, show(sweep, keys, rows)


def arguments():
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description="Run one stage notebook with many sets of parameters.")
    parser.add_argument("notebook", help="of a stage, or the stage's name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--grid", type=Path, help="YAML: key → values to try, which are combined; or a list of sets")
    what.add_argument("--study", type=Path, help="YAML: trials, parameters, perhaps seed, metric, direction; Optuna proposes the sets")
    parser.add_argument("--jobs", type=int, help="sets at a time; default: one a card, else one a core, as far as the memory goes")
    parser.add_argument("--name", help="of the sweep and of its run folders; default: the file's name")
    parser.add_argument("--metric", help="number of the stage's report to sort by; default: the first with map in its name")
    parser.add_argument("--json", action="store_true", help="print the rows for a program")
    return parser.parse_args()


def tell(keys, rows, text, folder, as_json):
    "The table on standard output, what failed on standard error."
    failed = [row for row in rows if "why" in row]
    if as_json: print(json.dumps(rows))
    elif len(failed) < len(rows): print(text)
    if failed: print(f"{len(failed)} of {len(rows)} failed:", file=sys.stderr)
    for row in failed:
        see = f"; see {row['page']}" if row["page"] else ""
        print(f"  {row['run']}: {told({key: row[key] for key in keys})}: {row['why']}{see}", file=sys.stderr)
    print(f"{folder}/sweep.csv, {folder}/sweep.png", file=sys.stderr)


def main():
    "Try all sets. Status 0: all are there, 1: some failed, 2: called wrongly, 130: stopped."
    args = arguments()
    file, path = (args.grid or args.study).resolve(), Path(args.notebook).resolve()
    name = args.name or file.stem
    os.chdir(ROOT)
    try:
        stage = stage_of(args.notebook, path)
        if name == "latest" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise WrongCall(f"{name!r} cannot name a folder: --name takes letters, digits, '.', '_' and '-', not 'latest'")
        if args.jobs is not None and args.jobs < 1: raise WrongCall(f"--jobs {args.jobs}: at least 1")
        check_params(stage_notebooks(), under_dvc=False)
        source = Sets(read_sets(file, stage)) if args.grid else read_study(file, stage)
        outcome = work(stage, source, name, args.metric, args.jobs)
    except (WrongCall, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"sweep: {name} was stopped; the same call goes on", file=sys.stderr)
        sys.exit(130)
    tell(*outcome, RUNS/name, args.json)
    sys.exit(any("why" in row for row in outcome[1]))


if __name__ == "__main__": main()
