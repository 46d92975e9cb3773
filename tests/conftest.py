"What tests share: a copy of the workspace, its commands, and the folder of real pictures."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "data", "cache", "tmp", "config.local", "dvc.lock", "__pycache__", ".*_cache", ".hypothesis",
                                  "*.egg-info", ".ipynb_checkpoints")


@pytest.fixture(scope="session")
def real():
    "The folder of real pictures, which is not part of the repository."
    folder = Path(os.environ.get("NBS_TEST_DATA", ROOT.parent/"shared/data"))
    if not folder.is_dir(): pytest.skip(f"no real pictures in {folder}; NBS_TEST_DATA names the folder")
    return folder


class Workspace:
    "A copy of this workspace without git, data or results, as a source archive has it."
    def __init__(self, folder):
        self.folder = Path(folder)
        shutil.copytree(ROOT, self.folder, ignore=LEFT_OUT)
        (self.folder/"data").mkdir()
        self.run("dvc", "config", "--local", "core.no_scm", "true")

    def start(self, *command, **kw):
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(self.folder)}
        env.pop("NBS_RUN_ID", None)
        return subprocess.Popen(list(map(str, command)), cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)

    def run(self, *command, status=0):
        process = self.start(*command)
        said = process.communicate()[0]
        assert process.returncode == status, f"{command} ended with {process.returncode}:\n{said}"
        return said

    def set(self, **sections):
        "Change params.yaml."
        path = self.folder/"params.yaml"
        params = yaml.safe_load(path.read_text())
        for section, values in sections.items(): params[section].update(values)
        path.write_text(yaml.safe_dump(params, sort_keys=False))


SMALL = dict(fetch=dict(train_scenes=24, val_scenes=6, test_scenes=6, side=64), split=dict(max_dead_rate=.5),
             train=dict(imgsz=64, epochs=1, batch=8, device="cpu"), evaluate=dict(device="cpu"))


@pytest.fixture
def workspace(tmp_path):
    "A workspace on a setting that takes seconds."
    w = Workspace(tmp_path/"workspace")
    w.set(**SMALL)
    return w
