"Every guide runs and shows its pictures, on a small setting; `make guides` runs them in full."
import json, re, subprocess, sys
from pathlib import Path

import pytest

from conftest import ROOT

GUIDES = sorted((ROOT/"notebooks/guides").glob("*.ipynb"))
LONG = "60_retraining", "65_many_runs", "70_serving"  # run the whole pipeline several times


@pytest.mark.parametrize("guide", [pytest.param(p, id=p.stem, marks=pytest.mark.flows if p.stem in LONG else ()) for p in GUIDES])
def test_guide(guide, tmp_path, request):
    given = ["-p", "folder", request.getfixturevalue("real")/"bccd"] if "blood" in guide.stem else []
    command = [Path(sys.executable).with_name("papermill"), guide, tmp_path/guide.name, "-p", "small", "True", *given, "--no-progress-bar"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = [c for c in json.loads((tmp_path/guide.name).read_text())["cells"] if c["cell_type"] == "code"]
    drawn = [c for c in cells if re.search(r"^_ = .*(gallery|show_\w+)\(|plt\.subplots|plot\.", "".join(c["source"]), re.MULTILINE)]
    assert drawn and [c["id"] for c in drawn if not any("image/png" in o.get("data", {}) for o in c["outputs"])] == []
