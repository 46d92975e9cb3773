"A version made again from what its run keeps: commit, what was changed in it, parameters, data under DVC."
import json, shutil, subprocess, sys

import pytest

from conftest import ROOT, git, wait
from flows import reaper
from nbs_lib.config import WrongCall, file_digest, read_yaml, write_json

DVC = "from flows import reproduce\nwith reproduce.own(reproduce.Path('{0}/again')): reproduce.dvc(reproduce.Path('{0}'), 'repro')"
PAPERMILL = """from pathlib import Path
from types import SimpleNamespace
from flows import bench
bench.sys, bench.KEPT = SimpleNamespace(executable='{0}/bin/python', argv=['bench']), Path('{0}/kept')
bench.main()"""


@pytest.mark.parametrize("code", [pytest.param(DVC, id="reproduce"), pytest.param(PAPERMILL, id="bench")])
def test_what_it_starts_dies_with_it(tmp_path, code):
    (tmp_path/"dvc.py").write_text(idle := "import time\nopen('{}/begun', 'w').close()\ntime.sleep(600)\n".format(tmp_path))
    (papermill := tmp_path/"bin/papermill").parent.mkdir()
    papermill.write_text(f"#!{sys.executable}\n{idle}")
    papermill.chmod(0o755)
    process = subprocess.Popen([sys.executable, "-c", code.format(tmp_path)], cwd=ROOT)
    wait((tmp_path/"begun").exists, 60)
    left = lambda: [p for p, env in reaper.marked() if env["NBS_STAGE_RUNNER"] == str(process.pid) and not reaper.gone(p)]
    assert left()
    process.kill()
    process.wait()
    wait(lambda: not left(), 10)


def test_a_folder_is_one_run_s_and_nobody_else_s(tmp_path):
    from flows.reproduce import own
    with own(tmp_path/"again"):
        (tmp_path/"again/workspace").mkdir()
        with pytest.raises(WrongCall, match="another run makes a version in .*again: wait for it"), own(tmp_path/"again"): pass
        assert (tmp_path/"again/workspace").exists()
    with own(tmp_path/"again"): assert not (tmp_path/"again/workspace").exists()
    (tmp_path/"mine").mkdir(); (tmp_path/"mine/thesis").write_text("")
    with pytest.raises(WrongCall, match="mine is not empty"), own(tmp_path/"mine"): pass


def test_the_weights_that_a_training_started_from_come_along(tmp_path, monkeypatch):
    from flows import reproduce
    kept, folder, here = (tmp_path/name for name in ("kept", "workspace", "here"))
    for made in (kept, folder, here/"weights"): made.mkdir(parents=True)
    monkeypatch.setattr(reproduce, "ROOT", here)
    def bring(name):
        (kept/"params.yaml").write_text(f"train: {{model: {name}}}\n")
        reproduce.bring_start(kept, folder)
    (here/"weights/best.pt").write_text("weights")
    write_json(kept/"reports/train.json", dict(start=(then := file_digest(here/"weights/best.pt"))))
    bring("weights/best.pt"), bring("weights/best.pt")
    assert file_digest(folder/"weights/best.pt") == then
    (here/"other.pt").write_text("others")
    with pytest.raises(WrongCall, match=f"other.pt is not the file that this version was trained from .* then {then}"): bring("other.pt")
    with pytest.raises(WrongCall, match="gone.pt, which this version was trained from .* is not here"): bring("gone.pt")
    bring("yolo11n.pt")  # to be had by its name
    write_json(kept/"reports/train.json", dict(start=None))
    bring("yolo11n.yaml")


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
