"""Four ways to run the stages give one result: `dvc repro`, plain papermill, cell by cell in a Jupyter server; the fourth is the flow, in
test_retrain."""
import pytest

from jupyter import Jupyter
from test_pipeline import STAGES


def by_papermill(workspace):
    "From another folder than the root, with values that papermill hands over as it likes."
    (workspace/"out").mkdir()
    given = {"40_train": ["-p", "epochs", "1", "-p", "lr0", "3e-3", "-p", "device", "cpu"], "20_ingest": ["-p", "classes", "[]"]}
    for stage in STAGES:
        workspace.run("papermill", "--cwd", "out", f"notebooks/stages/{stage}.ipynb", f"out/{stage}.ipynb", *given.get(stage, []))


def by_jupyter(workspace):
    before = {stage: (workspace/f"notebooks/stages/{stage}.ipynb").read_bytes() for stage in STAGES}
    with Jupyter(workspace) as jupyter:
        for stage in STAGES:
            outputs = jupyter.run_all_and_save(f"notebooks/stages/{stage}.ipynb")
            assert [o["traceback"] for o in outputs if o["output_type"] == "error"] == []
            assert any("image/png" in o.get("data", {}) for o in outputs), "a person sees a picture"
    assert before == {stage: (workspace/f"notebooks/stages/{stage}.ipynb").read_bytes() for stage in STAGES}, "saving changed nothing"


@pytest.mark.parametrize("way", [by_papermill, by_jupyter])
def test_one_result(workspace, finished, way):
    "Byte-equal data, splits, reports and weights, compared with an undisturbed `dvc repro`."
    way(workspace)
    expected, found = finished.results(), workspace.results()
    assert len(expected) > 100 and [*expected] == [*found]
    assert [name for name in expected if expected[name] != found[name]] == []


def test_saving_after_run_all_changes_no_dependency(finished):
    with Jupyter(finished) as jupyter: jupyter.run_all_and_save("notebooks/stages/30_split.ipynb")
    assert "up to date" in finished.run("dvc", "status")


def test_other_parameters_write_to_their_own_run(finished):
    "A papermill run with another value leaves the pipeline's results alone."
    before, runs = finished.results(), {*(finished/"data/runs").iterdir()}
    finished.run("papermill", "notebooks/stages/30_split.ipynb", "/dev/null", "-p", "max_dead_rate", "0.9")
    [run] = {*(finished/"data/runs").iterdir()} - runs
    assert before == finished.results() and (run/"processed/data.yaml").exists() and (run/"reports/split.json").exists()
    finished.run("papermill", "notebooks/stages/30_split.ipynb", "/dev/null", "-p", "max_dead_rate", "0.9", "-p", "out", "mine")
    assert (finished/"mine/processed/data.yaml").exists()


@pytest.mark.parametrize("given, says", [
    (["-p", "max_dead_rat", "0.9"], "split has no parameter 'max_dead_rat'. Did you mean 'max_dead_rate'?"),
    (["-p", "max_dead_rate", "much"], "split.max_dead_rate must be of type float, not 'much'"),
])
def test_plain_papermill_is_as_strict(finished, given, says):
    assert says in finished.run("papermill", "notebooks/stages/30_split.ipynb", "/dev/null", *given, status=1)


def test_a_lost_tag_is_noticed(finished):
    "papermill injects above a parameters cell that lost its tag, whose defaults then win."
    notebook = finished/"notebooks/stages/30_split.ipynb"
    notebook.write_text(notebook.read_text().replace('"parameters"\n', '"parametres"\n'))
    said = finished.run("papermill", "notebooks/stages/30_split.ipynb", "/dev/null", "-p", "max_dead_rate", "0.9", status=1)
    assert "give that cell its tag `parameters`" in said


def test_help(finished):
    "`papermill --help-notebook` is a page that people can read."
    said = finished.run("papermill", "--help-notebook", "notebooks/stages/40_train.ipynb")
    assert "epochs: int (default None)      rounds over the training pictures" in said
