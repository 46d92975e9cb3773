"Every notebook of the library runs, the library is what the notebooks export, and the notebooks are clean."
import filecmp, shutil, subprocess, sys
from pathlib import Path

import pytest

from conftest import LEFT_OUT, ROOT

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
