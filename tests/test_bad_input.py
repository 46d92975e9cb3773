"What goes wrong around a pipeline is told in a line, and mended by the next run."
import subprocess, time

import pytest, yaml

from test_interruptions import processes


def test_an_out_edited_by_hand_is_told_kept_and_made_anew(finished):
    out = finished/"data/interim/annotations.json"
    before = out.read_bytes()
    out.write_text("{}")
    (finished/"data/interim/note.txt").write_text("look at 17")
    said = finished.run("python", "-m", "flows.preflight")
    assert said.count("\n") == 1 and "data/interim/annotations.json and 1 more changed since DVC recorded it" in said
    finished.run("dvc", "repro")
    assert out.read_bytes() == before
    assert [p.read_text() for p in sorted((finished/"data/runs").glob("*/edited/data/interim/*"))] == ["{}", "look at 17"]
    assert finished.run("python", "-m", "flows.preflight") == ""


@pytest.mark.parametrize("text, says", [("schema: '9.9'\nstages: {}\n", "invalid schema version"), ("{{{", "'./dvc.lock' is invalid")])
def test_a_lock_that_dvc_cannot_read_stops_before_any_work(finished, text, says):
    (finished/"dvc.lock").write_text(text)
    said = finished.run("dvc", "repro", status=255)
    assert says in said and "Running stage" not in said and "Traceback" not in said


def test_a_lock_of_an_older_pipeline_reruns_what_changed(finished):
    "Another command for a stage, and a stage that is no more."
    lock = yaml.safe_load((finished/"dvc.lock").read_text())
    lock["stages"]["gone"] = lock["stages"]["split"] | dict(cmd="python gone.py")
    lock["stages"]["split"]["cmd"] = "python split.py"
    (finished/"dvc.lock").write_text(yaml.safe_dump(lock))
    said = finished.run("dvc", "repro")
    assert "Stage 'ingest' didn't change" in said and "split" in said and "Stage 'train' didn't change" in said


def test_a_second_repro_is_told_that_the_first_is_at_work(finished):
    finished.set(split=dict(max_dead_rate=.6))
    first = finished.start("dvc", "repro")
    while not processes(finished).get("kernel"):
        assert first.poll() is None
        time.sleep(.1)
    said = finished.run("dvc", "repro", status=255)
    assert "is busy" in said and "dvc repro" in said and "Traceback" not in said
    said = first.communicate()[0]
    assert first.returncode == 0, said


def test_a_folder_that_cannot_be_written(finished):
    data = finished/"data"
    if subprocess.run(["mount", "--bind", data, data]).returncode: pytest.skip("making a folder read-only for root needs a mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", data], check=True)
        said = finished.run("python", "-m", "flows.stage", "split", status=1)
        assert said.startswith("split failed: OSError: [Errno 30] Read-only file system") and said.count("\n") == 1
        finished.set(split=dict(max_dead_rate=.6))
        said = finished.run("dvc", "repro", status=255)
        assert "Read-only file system" in said and "Traceback" not in said
    finally: subprocess.run(["umount", data])


def test_no_room_is_told(finished):
    "A limit on the size of files stands in for a full disk: `make test-kills` fills a real one."
    finished.set(split=dict(max_dead_rate=.6))
    said = finished.run("bash", "-c", "ulimit -f 8; python -m flows.stage split", status=1)
    assert "split failed" in said and "File too large" in said and "Traceback" not in said
