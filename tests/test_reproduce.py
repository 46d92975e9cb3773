"A version made again from what its run keeps: commit, what was changed in it, parameters, data under DVC."
import json, shutil

import pytest

from conftest import git
from nbs_lib.config import read_yaml


@pytest.mark.flows
def test_a_version_is_made_again_with_changes_that_nobody_committed_and_data_of_ones_own(workspace):
    workspace.run("dvc", "config", "--local", "core.no_scm", "false")
    git(workspace, "init", "--quiet", "--initial-branch", "main")
    workspace.run("dvc", "repro", "fetch")
    (workspace/"data/raw/fetched").rename(workspace/"data/raw/mine")
    workspace.set(fetch=dict(kind="none"), ingest=dict(sources=[dict(path="mine", format="auto")]))
    workspace.run("dvc", "add", "data/raw/mine")
    git(workspace, "add", "--all")
    git(workspace, "commit", "--quiet", "--message", "pictures of our own")
    workspace.set(train=dict(seed=7))
    with (workspace/"nbs_lib/split.py").open("a") as code: code.write("\n# a change that nobody committed\n")
    (workspace/"flows/helper.py").write_text("# new, and not committed either\n")
    workspace.run("dvc", "repro")
    assert "version 1, new" in workspace.run("nbs", "publish")
    first, known = json.loads((workspace/"data/models/model.json").read_text()), json.loads(workspace.run("nbs", "lineage", "1", "--json"))
    assert (known["commit"], known["dirty"]) == (git(workspace, "rev-parse", "HEAD").strip(), True)

    workspace.set(evaluate=dict(conf=.5))  # the same weights once more: what their run keeps is version 2's now
    workspace.run("dvc", "repro")
    assert "version 2, new" in workspace.run("nbs", "publish")
    workspace.set(train=dict(seed=8))  # what lies there today says nothing about version 1
    git(workspace, "checkout", "--quiet", "nbs_lib/split.py")
    (workspace/"flows/helper.py").unlink()
    before = git(workspace, "status", "--porcelain")
    said = workspace.run("python", "-m", "flows.reproduce", "v1", "--folder", "again", "--json")
    done = json.loads(said.splitlines()[-1])
    assert (done["agree"], done["equal"], done["devices"], done["noise"]) == (True, True, ["cpu"], None)
    again = workspace/"again/workspace"
    assert "nobody committed" in (again/"nbs_lib/split.py").read_text() and (again/"flows/helper.py").exists()
    assert json.loads((again/"data/models/model.json").read_text()) == first
    assert read_yaml(again/"params.yaml")["evaluate"]["conf"] == .25
    assert git(workspace, "status", "--porcelain").replace("?? again/\n", "") == before

    shutil.rmtree(workspace/".dvc/cache"); shutil.rmtree(workspace/"data/raw/mine")
    said = workspace.run("python", "-m", "flows.reproduce", "1", "--folder", "again", status=2)
    assert "data/raw/mine.dvc: the data is neither in DVC's cache nor in a remote" in said and "Traceback" not in said
    assert "There is: 1, 2." in workspace.run("python", "-m", "flows.reproduce", "3", status=2)
