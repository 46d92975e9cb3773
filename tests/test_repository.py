"Every notebook of the library runs, the library is what the notebooks export, and the notebooks are clean."
import filecmp, json, re, runpy, shutil, subprocess, sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from conftest import LEFT_OUT, ROOT, git

NOTEBOOKS = sorted((ROOT/"notebooks").glob("api/*.ipynb"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook):
    "In a process of its own, so that no notebook leans on what another one imported."
    done = subprocess.run([BIN/"nbdev_test", "--path", notebook, "--n_workers", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("command, kept", [("nbdev_export", "nbs_lib"), ("nbdev_clean", "notebooks")])
def test_no_op(command, kept, tmp_path):
    "A library edited by hand, a notebook that was not exported, or outputs in a stage would change here."
    copy = tmp_path/"workspace"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    subprocess.run([BIN/command], cwd=copy, check=True, capture_output=True)
    same = lambda p: (ROOT/p).exists() and filecmp.cmp(copy/p, ROOT/p, shallow=False)
    changed = [str(p) for p in (p.relative_to(copy) for p in (copy/kept).rglob("*") if p.is_file()) if not same(p)]
    assert not changed, f"run `make export`: {changed}"


def test_clean_leaves_what_nobody_can_make_again(tmp_path):
    for file in ("runs/1/edited/data/models/best.pt", "runs/1/40_train.html", "runs/2/40_train.html", "cache/retrain.lock", "raw/cells/a.jpg"):
        (tmp_path/"data"/file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"data"/file).write_text("")
    (tmp_path/"data/runs/latest").symlink_to("1")
    words = "make", "--no-print-directory", "-f", ROOT/"Makefile", "clean"
    clean = lambda: subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    left = lambda: sorted(str(p.relative_to(tmp_path/"data")) for p in (tmp_path/"data").rglob("*") if not p.is_dir() or p.is_symlink())
    assert clean() == "clean: data/runs/1/edited stays, the only copy of what somebody edited\n"
    assert left() == ["raw/cells/a.jpg", "runs/1/edited/data/models/best.pt"]
    shutil.rmtree(tmp_path/"data/runs/1")
    assert clean() == "" and not (tmp_path/"data/runs").exists()


def test_a_stage_leaves_no_half_of_a_file():
    "What a library writes for it goes to a temporary name first."
    written = {p.name: re.findall(r"\.(?:to_csv|savefig)\((\w+)", p.read_text()) for p in (ROOT/"notebooks/stages").glob("*.ipynb")}
    assert {to for found in written.values() for to in found} == {"tmp"}, written


def test_a_commit_takes_no_outputs(workspace):
    "Of a notebook that another editor than the workspace's JupyterLab saved."
    path = "notebooks/guides/10_quickstart.ipynb"
    ran = json.loads((workspace/path).read_text())
    for cell in ran["cells"]:
        if cell["cell_type"] == "code":
            cell.update(execution_count=1, outputs=[dict(output_type="stream", name="stdout", text=["42"])])
            cell["metadata"]["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    (workspace/path).write_text(json.dumps(ran))
    git(workspace, "init", "--quiet")
    git(workspace, "add", ".pre-commit-config.yaml", "settings.ini", path)
    said = workspace.run("pre-commit", "run", "clean", status=1)
    assert "files were modified by this hook" in said and (workspace/path).read_bytes() == (ROOT/path).read_bytes()


def test_whoever_looks_at_requests_in_the_stack_knows_where_they_are():
    "What answers writes them down; the worker's drift compares them."
    services = yaml.safe_load((ROOT/"docker/compose.yaml").read_text())["services"]
    log, = {services[name]["environment"].get("NBS_REQUESTS") for name in ("api", "consumer", "worker")}
    assert log.endswith("@postgres/requests") and "PREFECT_API_URL" in services["worker"]["environment"]


@pytest.mark.parametrize("port, says", [("http", "API_PORT in docker/stack.env must be a port from 1 to 65535, not 'http'"), ("70000", "70000"), ("", "")])
def test_a_port_of_the_stack_that_is_none_is_one_line(tmp_path, port, says):
    "Said before Docker is asked for anything; an empty one is the default, as Compose has it."
    stack = runpy.run_path(str(ROOT/"docker/stack.py"))
    (tmp_path/"stack.env").write_text(f"API_PORT={port}\n")
    there = dict.fromkeys(("jupyter", "mlflow", "prefect", "api", "redis"), dict(state="running"))
    stack["check_ports"].__globals__.update(ENV=tmp_path/"stack.env", containers=lambda: there)
    with pytest.raises(stack["Wrong"], match=says) if says else nullcontext(): stack["check_ports"]()
