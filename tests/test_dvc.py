"DVC as people know it: metrics, plots, experiments, push and pull; and what a change re-runs."
import json, shutil

import pytest

from conftest import Workspace, git
from test_pipeline import STAGES


def changed(workspace):
    "The stages that `dvc status` calls changed by their own dependencies."
    status = json.loads(workspace.run("dvc", "status", "--json"))
    return [s[3:] for s in STAGES if any("changed deps" in c for c in status.get(s[3:], []) if isinstance(c, dict))]


def test_metrics_plots_and_experiments(repository):
    shown = repository.run("dvc", "metrics", "show")
    assert "data/reports/evaluate.json" in shown and "map50" in shown and "val_map50" in shown

    said = repository.run("dvc", "exp", "run", "--set-param", "train.epochs=2", "--name", "longer")
    assert "Running stage 'train'" in said and "Running stage 'split'" not in said and "Ran experiment(s): longer" in said
    assert repository.report("train")["epochs"] == 2
    assert json.loads(repository.run("dvc", "params", "diff", "--json"))["params.yaml"] == {"train.epochs": dict(old=1, new=2, diff=1)}
    diff = json.loads(repository.run("dvc", "metrics", "diff", "--json"))
    diff = diff["diff"] if "diff" in diff else diff
    assert diff["data/reports/train.json"]["epochs"] == dict(old=1, new=2, diff=1)
    assert "longer" in repository.run("dvc", "exp", "show", "--csv")

    repository.run("dvc", "plots", "show")
    page = (repository/"dvc_plots/index.html").read_text()
    titles = "score in validation", "loss in training", "score of each class", "precision over recall", "which class is taken for which"
    assert [title for title in titles if title not in page] == []


def test_a_value_that_was_tried_before_is_restored(finished):
    "From DVC's run-cache, without running; where that was deleted, by running, with the same result."
    before, runs = finished.results(), sorted((finished/"data/runs").iterdir())
    finished.set(split=dict(max_dead_rate=.6))
    finished.run("dvc", "repro")
    finished.set(split=dict(max_dead_rate=.5))
    assert "Stage 'split' is cached - skipping run" in finished.run("dvc", "repro") and finished.results() == before

    finished.run("dvc", "gc", "--workspace", "--force")
    shutil.rmtree(finished/".dvc/cache/runs", ignore_errors=True)
    assert "up to date" in finished.run("dvc", "repro")
    finished.set(split=dict(max_dead_rate=.6))
    finished.run("dvc", "repro")
    finished.set(split=dict(max_dead_rate=.5))
    assert "Running stage 'split'" in finished.run("dvc", "repro") and finished.results() == before
    assert len(sorted((finished/"data/runs").iterdir())) > len(runs)


def test_push_and_pull_into_a_fresh_clone_that_runs_nothing(repository, tmp_path):
    repository.run("dvc", "remote", "add", "--default", "folder", tmp_path/"remote")
    repository.run("dvc", "push")
    git(repository, "commit", "--quiet", "--all", "--message", "a remote")
    git(repository, "clone", "--quiet", ".", tmp_path/"clone")
    clone = Workspace.at(tmp_path/"clone")
    clone.run("dvc", "pull")
    assert "up to date" in clone.run("dvc", "repro")
    assert not (clone/"data/runs").exists() and clone.results() == repository.results()


def test_a_fresh_clone_restores_what_another_ran(repository, tmp_path):
    "Though git never heard of it: from the run-cache in the remote, small files that lie in git included."
    undisturbed = repository.results()
    repository.run("dvc", "remote", "add", "--default", "folder", tmp_path/"remote")
    repository.run("dvc", "push", "--run-cache")
    repository.run("python", "-m", "flows.push")
    git(repository, "rm", "--quiet", "-r", "--cached", "dvc.lock", "data/reports")
    git(repository, "commit", "--quiet", "--all", "--message", "a remote")
    git(repository, "clone", "--quiet", ".", tmp_path/"clone")
    clone = Workspace.at(tmp_path/"clone")
    said = clone.run("dvc", "repro", "--pull")
    assert "Running stage" not in said and said.count("is cached") == 5 and clone.results() == undisturbed, said


def edit(workspace, notebook, kind, text):
    "Append to the last cell of a kind, and export."
    path = workspace/f"notebooks/api/{notebook}.ipynb"
    content = json.loads(path.read_text())
    is_kind = dict(prose=lambda c: c["cell_type"] == "markdown", example=lambda c: c["cell_type"] == "code" and "#| export" not in "".join(c["source"]),
                   exported=lambda c: "".join(c["source"]).startswith("#| export"))[kind]
    [c for c in content["cells"] if is_kind(c)][-1]["source"].append(text)
    path.write_text(json.dumps(content))
    workspace.run("nbdev_export")


@pytest.mark.parametrize("notebook, kind, stages", [
    ("13_ingest", "prose", []),
    ("13_ingest", "example", []),
    ("13_ingest", "exported", ["ingest"]),
    ("14_split", "exported", ["split"]),
    ("15_dataset", "exported", ["ingest", "split"]),
    ("21_metrics", "exported", ["evaluate"]),
    ("23_evaluate", "exported", ["evaluate"]),
    ("40_cli", "exported", []),
])
def test_a_library_change_reruns_the_stages_that_import_it(finished, notebook, kind, stages):
    edit(finished, notebook, kind, "\n# more of it")
    assert changed(finished) == stages


def test_a_changed_picture_reruns_from_ingest(finished):
    (finished/"data/raw/mine").mkdir()
    (finished/"data/raw/mine/a.jpg").write_bytes(b"a picture")
    assert changed(finished) == ["ingest"]
