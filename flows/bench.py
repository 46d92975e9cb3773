"""Run the benchmarks and keep what they measured in one table: `make bench`.

    python -m flows.bench                  every notebook of notebooks/bench
    python -m flows.bench 50_evaluation    this one; the rows of the others stay
    python -m flows.bench --small          with hardly any work, to see that they run; nothing is kept

Each notebook does the same work here and as people would do it otherwise, in turn, and hands its rows to `done`.
"""
import argparse, json, platform, statistics, subprocess, sys, time
from pathlib import Path

import cloudpickle
import numpy as np
from PIL import Image

from flows.home import ROOT
from flows.reaper import leash
from nbs_lib.boxes import iou
from nbs_lib.config import WrongCall, cores, environment, nearest, params, read_json, replacing, write_json
from nbs_lib.detector import train
from nbs_lib.fetch import fetch
from nbs_lib.ingest import ingest
from nbs_lib.split import split

TABLE, KEPT = ROOT/"data/reports/bench.json", ROOT/"data/runs/bench"
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->\n"


def settings(section: str, small: bool, **more) -> dict:
    "A section of params.yaml; in `small`, as the tests have it."
    return {**params(section), **(environment("ci").get(section, {}) if small else {}), **more}


def demo(folder: Path, small: bool) -> Path:
    "The demo set, checked and split as a training takes it: the tree."
    fetch(folder/"raw/fetched", folder/"cache", folder, **settings("fetch", small))
    ingest(folder/"interim", **settings("ingest", small, root=folder/"raw", sources=[dict(path="fetched", format="auto")]))
    split(folder/"interim", folder/"tree", **settings("split", small))
    return folder/"tree"


def trained(here: Path, small: bool) -> Path:
    """The bundle of a detector that learned the demo set, ready to be served, made in a folder: its scenes lie in tree/images. It sees 640 pixels, four
    scenes side by side. A small one has hardly learned, and its boxes are sure of nothing."""
    train(demo(here, small), here/"models", here/"work", **settings("train", small, device="cpu"))
    about = {"model": read_json(here/"models/model.json") | dict(imgsz=4 * settings("fetch", small)["side"]), "version": dict(version=1, run="bench"),
             "thresholds": dict(conf=1e-4 if small else .25, iou=.7, max_det=100)}
    for name, value in about.items(): write_json(here/f"models/{name}.json", value)
    return here/"models"


def mosaics(here: Path, out: Path, count: int) -> list:
    "Paths of so many new pictures, each of 4 × 3 test scenes of `trained`: what the detector learned to find, as large as it saw it."
    rng, scenes = np.random.default_rng(0), [Image.open(f).convert("RGB") for f in sorted((here/"tree/images/test").iterdir())]
    side, files = scenes[0].width, [out/f"{i:05}.jpg" for i in range(count)]
    out.mkdir(parents=True)
    for file in files:
        picture = Image.new("RGB", (4 * side, 3 * side))
        for place, which in enumerate(rng.integers(len(scenes), size=12)): picture.paste(scenes[which], (place % 4 * side, place // 4 * side))
        picture.save(file, quality=90)
    return files


def same_boxes(some: list, others: list, conf: float):
    """Assert that two sides found the same on each picture, as (edges, scores, labels): an IoU over .99, a score within .01, the label. Of what lies near
    `conf`, the least score, one side may lack what the other has."""
    for i, sides in enumerate(zip(some, others, strict=True)):
        a, b = ([np.asarray(column) for column in side] for side in sides)
        same = (iou(a[0].reshape(-1, 4), b[0].reshape(-1, 4)) > .99) & (abs(a[1][:, None] - b[1]) < .01) & (a[2][:, None] == b[2])
        for axis, score in ((1, a[1]), (0, b[1])): assert same.any(axis)[score > conf + .01].all(), f"picture {i}: {a} and {b}"


def in_turn(rounds: int, **sides) -> dict:
    "Seconds of each side in each round: name → list. What a side does for the first time is not counted: each runs once before."
    took = {name: [] for name in sides}
    for n in range(rounds + 1):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            if n: took[name].append(time.perf_counter() - begun)
    return took


SIDE = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), 'w')
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
exec(sys.argv[1])
for line in sys.stdin:
    begun = time.perf_counter()
    try: result = work(*json.loads(line))
    except Exception as e: said = dict(raised=f'{type(e).__name__}: {e}')
    else: said = dict(seconds=time.perf_counter() - begun) | told(result); del result
    print(json.dumps(said), file=answers, flush=True)
"""


class Side:
    """One side in a process of its own, ours or a peer's, that imports once and is asked as often as one likes. Its code defines `work`, which is
    measured, and `told`, which says in a dict what came of it; `args` are its `sys.argv[2:]`."""
    def __init__(self, code: str, *args, peer: bool = False):
        python = Path(sys.prefix)/"peers/bin/python" if peer else sys.executable
        self.process = subprocess.Popen([python, "-c", SIDE, code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def __call__(self, *given) -> dict:
        "What it told, with the `seconds` of `work`; or what was `raised`. `given` is anything that JSON can hold."
        print(json.dumps(given), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()): raise WrongCall("a side of this benchmark ended before its work was done; it has said why")
        return json.loads(line)

    def end(self):
        with self.process: self.process.stdin.close()


APART = """
import json, sys, time
answer, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
import cloudpickle
work, given, ready = cloudpickle.load(sys.stdin.buffer)
if ready: given = [ready(*given)]
begun = time.perf_counter()
said = work(*given)
seconds = time.perf_counter() - begun
with open('/proc/self/status') as f: peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
print(json.dumps(dict(seconds=seconds, peak=peak, said=said)), file=answer)
"""


def apart(work, *given, ready=None) -> dict:
    """A function, such as one of a notebook, in a process of its own that holds nothing else: what it `said`, the `seconds` it took, and the `peak` of the
    memory [bytes]. What it refers to is imported before, and what it works on may be made before, by `ready(*given)`."""
    ran = subprocess.run([sys.executable, "-c", APART], input=cloudpickle.dumps((work, given, ready)), capture_output=True, cwd=ROOT)
    if ran.returncode: raise WrongCall(f"a side of this benchmark failed: {ran.stderr.decode()[-3000:]}")
    return json.loads(ran.stdout)


def row(work: str, peer: str, ours: list, peers: list = (), *, most: float = None, over: float = None, within: float = None, also: dict = {}) -> dict:
    """One line of the table, from the seconds of both sides in each round. The goal: a ratio of at most `most`, at most `over` seconds more than
    the peer, `within` seconds; `also` are other goals, in words → whether they are met."""
    ratios = [o / p for o, p in zip(ours, peers)]
    ours_s, peer_s, ratio = (statistics.median(x) if x else None for x in (ours, peers, ratios))
    goals = [(most, f"≤ {most} × its time", lambda: ratio <= most), (over, f"≤ {over} s more", lambda: ours_s - peer_s <= over),
             (within, f"≤ {within} s", lambda: ours_s <= within)]
    goals = {words: bool(met()) for given, words, met in goals if given is not None} | also
    return dict(work=work, peer=peer, ours_s=_short(ours_s), peer_s=_short(peer_s), ratio=_short(ratio), goal=", ".join(goals), met=all(goals.values()),
                n=len(ours), spread=[_short(f(ratios or ours)) for f in (min, max)])


def _short(number): return None if number is None else float(f"{number:.4g}")


def done(rows: list, out: str = None):
    "Print the rows, and leave them in the file that `main` named."
    for r in rows: print(line(r))
    if out: write_json(Path(out), rows)


def line(r):
    beside = f", beside {r['peer']}" if r["peer"] else ""
    return (f"{r['work']}{beside}: {r['ours_s']} s" + (f" to {r['peer_s']} s, ratio {r['ratio']}" if r["peer_s"] else "")
            + f" ({r['spread'][0]} to {r['spread'][1]}, n {r['n']}); goal {r['goal']}: {'met' if r['met'] else 'not met'}")


def machine():
    "What the figures are of."
    with open("/proc/cpuinfo") as f: name = next((x.split(":")[1].strip() for x in f if x.startswith("model name")), platform.processor())
    return f"{cores()} cores of {name}, Python {platform.python_version()}"


def run(notebook, small):
    "Rows of one notebook; its executed copy stays."
    out, rows = KEPT/notebook.name, KEPT/f"{notebook.stem}.json"
    KEPT.mkdir(parents=True, exist_ok=True); rows.unlink(missing_ok=True)
    command = [Path(sys.executable).with_name("papermill"), notebook, out, "-p", "small", str(small), "-p", "out", rows]
    if subprocess.run(list(map(str, command)), cwd=ROOT).returncode: raise WrongCall(f"{notebook.name} failed; {out} shows where")
    return [dict(r, notebook=notebook.stem, machine=r.get("card") or machine()) for r in read_json(rows)]


def table(rows):
    "The rows as Markdown."
    cells = lambda r: (r["work"], r["peer"], *("" if r[k] is None else f"{r[k]:g}" for k in ("ours_s", "peer_s", "ratio")), r["goal"], "✓" if r["met"] else "✗")
    lines = [("work", "beside", "here [s]", "there [s]", "ratio", "goal", ""), ["---"] * 7, *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def keep(rows, names):
    "Replace the rows of these notebooks, in the table and in README.md."
    before = [r for r in (json.loads(TABLE.read_text()) if TABLE.exists() else []) if r["notebook"] not in names]
    rows = sorted(before + rows, key=lambda r: r["notebook"])
    write_json(TABLE, rows)
    head, rest = (ROOT/"README.md").read_text().split(BEGIN)
    with replacing(ROOT/"README.md") as tmp: tmp.write_text(head + BEGIN + table(rows) + END + rest.split(END)[1])


def main():
    parser = argparse.ArgumentParser(prog="python -m flows.bench", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NOTEBOOK", help="such as 50_evaluation; none: every one")
    parser.add_argument("--small", action="store_true", help="hardly any work; nothing is kept")
    args = parser.parse_args()
    there = {p.stem: p for p in sorted((ROOT/"notebooks/bench").glob("*.ipynb"))}
    for name in args.names:
        if name not in there: raise WrongCall(f"there is no benchmark {name!r}.{nearest(name, there)}")
    for name in args.names or there:
        print(f"bench: {name}", flush=True)
        with leash(): rows = run(there[name], args.small)
        for r in rows: print(line(r), flush=True)
        if not args.small: keep(rows, [name])


if __name__ == "__main__":
    try: main()
    except WrongCall as e: sys.exit(f"bench: {e}")
