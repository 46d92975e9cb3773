"""Whatever stops a stage, nothing of it runs on, and `dvc repro` completes: every process, at three moments of every stage.

The whole matrix takes its time: `make test-kills`; `make test` takes one row of it for each kind of stop.
"""
import json, os, shutil, signal, sqlite3, subprocess, time
from contextlib import suppress

import psutil, pytest, yaml
from PIL import Image

from test_pipeline import STAGES

NAMES = [stage[3:] for stage in STAGES]
EPOCHS = 3


def processes(workspace):
    "Every process of the stages of this workspace, by kind."
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            ours = process.environ().get("NBS_STAGE_ROOT", "").endswith(f":{workspace.folder}") or process.cwd() == str(workspace.folder)
            kind = next((k for k, word in dict(kernel="ipykernel_launcher", runner="flows.stage", reaper="flows.reaper").items() if word in words), None)
            if ours and process.status() != psutil.STATUS_ZOMBIE and kind: found[kind] = process
    return found


def moment_has_come(workspace, stage, moment):
    "start: there is a kernel; middle: the library works; end: the report is written."
    if moment == "start": return "kernel" in processes(workspace)
    if moment == "end": return (workspace/f"data/reports/{stage}.json").exists()
    if stage == "train": return any((workspace/"data/cache/train").glob("*/epoch-*1"))
    with suppress(OSError, ValueError, KeyError, StopIteration):
        cells = json.loads(next((workspace/"data/runs/latest").glob(f"*_{stage}.ipynb")).read_text())["cells"]
        states = [c["metadata"]["papermill"]["status"] for c in cells if c["cell_type"] == "code"]
        return "running" in states and states.index("running") >= 2


def before(finished, stage):
    "The workspace as it is when this stage has to run: its results forgotten, and what was remembered to save work."
    lock = yaml.safe_load((finished/"dvc.lock").read_text())
    for out in lock["stages"].pop(stage)["outs"]:
        path = finished/out["path"]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (finished/"dvc.lock").write_text(yaml.safe_dump(lock))
    for cache in (".dvc/cache/runs", "data/cache", "data/runs"): shutil.rmtree(finished/cache)


def stop(workspace, stage, process, moment, number):
    "Start, stop at the moment; how many seconds later nothing was left."
    dvc = workspace.start("dvc", "repro", stage, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not moment_has_come(workspace, stage, moment) and dvc.poll() is None: time.sleep(.01)
    found = {**processes(workspace), "dvc": dvc, "terminal": dvc}
    if dvc.poll() is not None or process not in found:
        dvc.communicate()
        assert moment == "end", "it was over before it could be stopped"
        pytest.skip("it was over before it could be stopped")
    if process == "terminal": os.killpg(dvc.pid, number)  # Ctrl-C goes to all of them
    else: found[process].send_signal(number)
    begin = time.monotonic()
    while processes(workspace) and time.monotonic() < begin + 10: time.sleep(.05)
    gone = time.monotonic() - begin
    dvc.communicate()
    assert not processes(workspace)
    return gone


@pytest.fixture(scope="session")
def _undisturbed(_finished, tmp_path_factory):
    "With more than one epoch, so that there is something to go on from."
    workspace = _finished.copy(tmp_path_factory.mktemp("undisturbed")/"workspace")
    workspace.set(train=dict(epochs=EPOCHS))
    workspace.run("dvc", "repro")
    return workspace


def check(workspace, undisturbed, stage, process, moment, number):
    before(workspace, stage)
    gone = stop(workspace, stage, process, moment, number)
    unfinished = any(not p.name.endswith("-last") for p in (workspace/"data/cache/train").glob("*/epoch-*"))
    workspace.run("dvc", "repro")
    assert "up to date" in workspace.run("dvc", "status")
    report = workspace.report("train")
    assert report["epochs"] == EPOCHS and report["resumed"] == unfinished
    if report["resumed"]: assert workspace.results("raw/fetched", "interim", "processed") == undisturbed.results("raw/fetched", "interim", "processed")
    else: assert workspace.results() == undisturbed.results()
    then = f"went on, {EPOCHS} epochs" if report["resumed"] else "equal"
    print(f"\n| {stage} | {process} | {moment} | {signal.Signals(number).name} | {gone:.1f} s | {then} |")


MATRIX = [(stage, process, moment, signal.SIGKILL) for stage in NAMES for process in ("dvc", "runner", "kernel") for moment in ("start", "middle", "end")]
MATRIX += [(stage, process, "middle", signal.SIGTERM) for stage in NAMES for process in ("dvc", "runner", "kernel")]
MATRIX += [(stage, "terminal", "middle", signal.SIGINT) for stage in NAMES]
ALWAYS = {("fetch", "dvc", "middle", signal.SIGTERM), ("ingest", "runner", "middle", signal.SIGKILL), ("train", "kernel", "middle", signal.SIGKILL),
          ("train", "dvc", "end", signal.SIGKILL)}


@pytest.mark.parametrize("stage, process, moment, number", [pytest.param(*case, marks=[] if case in ALWAYS else pytest.mark.kills) for case in MATRIX],
                         ids=lambda v: v.name if isinstance(v, signal.Signals) else v)
def test_a_stop_is_survived(_undisturbed, tmp_path, stage, process, moment, number):
    check(_undisturbed.copy(tmp_path/"workspace"), _undisturbed, stage, process, moment, number)


def test_resume_false_starts_over_and_is_equal(_undisturbed, tmp_path):
    workspace = _undisturbed.copy(tmp_path/"workspace")
    workspace.set(train=dict(resume=False))
    stop(workspace, "train", "kernel", "middle", signal.SIGKILL)
    workspace.run("dvc", "repro")
    assert workspace.results("models", "reports") == _undisturbed.results("models", "reports")


def test_checked_pictures_are_not_checked_again(workspace):
    "Killed in the middle of many pictures, ingest knows afterwards those that it had checked."
    many = workspace/"data/raw/many"
    many.mkdir(parents=True)
    (many/"classes.txt").write_text("cell\n")
    for i in range(1000): Image.new("RGB", (1200, 900), (0, *divmod(i, 256))).save(many/f"{i}.png", compress_level=1)
    workspace.set(fetch=dict(kind="none"), ingest=dict(sources=[dict(path="many", format="yolo", background=True)]))
    workspace.run("dvc", "repro", "fetch")
    dvc = workspace.start("dvc", "repro", "ingest")

    def checked():
        for db in (workspace/"data/cache/pictures").glob("*.sqlite"):
            with suppress(sqlite3.Error): return sqlite3.connect(f"file:{db}?mode=ro", uri=True).execute("SELECT count(*) FROM pictures").fetchone()[0]
        return 0

    while not checked(): time.sleep(.05)
    processes(workspace)["kernel"].kill()
    dvc.communicate()
    known = checked()
    said = workspace.run("dvc", "repro", "ingest")
    assert 500 <= known < 1000 and f"{known} of 1000 pictures were checked before" in said
    assert workspace.report("ingest")["samples"] == 1000


@pytest.mark.kills
@pytest.mark.parametrize("stage", NAMES)
def test_a_full_disk_is_survived(_undisturbed, tmp_path, stage):
    "The disk is filled while the stage works; when there is room again, it completes."
    disk = tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", disk]).returncode: pytest.skip("mounting a small disk needs root")
    try:
        workspace = _undisturbed.copy(disk/"workspace")
        before(workspace, stage)
        dvc = workspace.start("dvc", "repro", stage)
        while not moment_has_come(workspace, stage, "start") and dvc.poll() is None: time.sleep(.01)
        with suppress(OSError), open(disk/"filler", "wb", buffering=0) as filler:
            while True: filler.write(bytes(1 << 16))
        said = dvc.communicate()[0]
        assert dvc.returncode and "No space left on device" in said and not processes(workspace), said
        (disk/"filler").unlink()
        workspace.run("dvc", "repro")
        assert workspace.report("train")["epochs"] == EPOCHS
        print(f"\n| {stage} | full disk | {next(line for line in said.splitlines() if 'No space left' in line)[:140]} |")
    finally: subprocess.run(["umount", "--lazy", disk])
