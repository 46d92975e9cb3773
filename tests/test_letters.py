"From a letter to a decision, and from there into the pipeline, on the command line."
import json

from nbs_lib.deadletter import Letter, read_history, write_letters, write_patch


def letters(workspace): return {letter["code"]: letter for letter in json.loads(workspace.run("nbs", "letters", "--json"))}


def test_decisions_reach_the_pipeline(finished):
    before, report = letters(finished), finished.report("ingest")
    empty, gone, outside = (before[code] for code in ("empty_box", "missing_image", "box_outside"))
    shown = finished.run("nbs", "letters", "show", empty["id"], "--png", "letter.bmp")
    assert "the box has no width" in shown and "in 1 runs; open" in shown and (finished/"letter.bmp").read_bytes().startswith(b"\x89PNG")

    finished.run("nbs", "letters", "replace", empty["id"], json.dumps({**empty["record"], "bbox": [10, 10, 20, 20]}), "--why", "width and height were lost")
    finished.run("nbs", "letters", "drop", gone["id"][:8], "--why", "the disk is gone")
    finished.run("nbs", "letters", "replace", outside["id"], json.dumps({**outside["record"], "bbox": [9, 9, -5, 1]}), "--why", "a guess")
    write_patch(finished/"data/patches.jsonl", "0" * 12, action="drop", why="of a set that we had before")
    assert "say why" in finished.run("nbs", "letters", "drop", empty["id"], "--why", " ", status=2)
    suspects = finished/"data/reports/suspects.jsonl"
    write_letters([Letter("suspect_class", "box", "fetched", "a.json", 1, "a dog on a cat", dict(label="dog"))], suspects)
    decisions, suspect = (finished/"data/patches.jsonl").read_text(), json.loads(suspects.read_text())["id"]
    assert "has not the letters of the pipeline" in finished.run("nbs", "letters", "--file", str(suspects), "drop", suspect, "--why", "it is", status=2)
    assert (finished/"data/patches.jsonl").read_text() == decisions

    kept = finished.results("interim", "reports")
    said = finished.run("nbs", "redrive")
    assert f"- {empty['id']}" in said and f"- {gone['id']}" in said and "1 decisions: failed" in said and "such as 000000000000" in said
    assert finished.results("interim", "reports") == kept

    finished.run("dvc", "repro", "ingest")
    after, now = letters(finished), finished.report("ingest")
    assert now["patches"] == dict(dropped=1, replaced=1, failed=1, stale=["0" * 12])
    assert (now["boxes_kept"], now["pictures"]) == (report["boxes_kept"] + 1, report["pictures"] - 1)
    assert "empty_box" not in after and "missing_image" not in after and "the replacement in patches.jsonl is bad too" in after["box_outside"]["detail"]
    assert "nothing would change" in finished.run("nbs", "redrive")

    history = {code: read_history(finished/"data/history/letters.sqlite", letter["id"]) for code, letter in before.items()}
    assert {code: (h["status"], h["attempts"]) for code, h in history.items()} == {
        **{code: ("open", 2) for code in before}, "empty_box": ("replaced", 1), "missing_image": ("dropped", 1)}


def test_the_same_again_changes_nothing(finished):
    before = finished.results("interim", "reports")
    finished.run("dvc", "repro", "--force", "--single-item", "ingest")
    assert finished.results("interim", "reports") == before
    assert all(read_history(finished/"data/history/letters.sqlite", letter["id"])["attempts"] == 2 for letter in letters(finished).values())


def test_a_file_of_decisions_that_is_broken_is_one_line(finished):
    (finished/"data/patches.jsonl").write_text('{"id": "1", "action": "keep"}\n')
    for command in (["nbs", "redrive"], ["python", "-m", "flows.stage", "ingest"]):
        said = finished.run(*command, status=2 if command[0] == "nbs" else 1)
        assert "patches.jsonl, line 1: the action is drop or replace, not 'keep'" in said and "Traceback" not in said
