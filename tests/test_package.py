"A packaged model with nothing but its own requirements, and behind MLflow's scoring server."
import base64, json, os, shutil, socket, subprocess, sys, time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
import torch

from nbs_lib.config import write_json
from nbs_lib.detector import _bundle, open_model
from nbs_lib.package import Model, package
from nbs_lib.scenes import write_scenes

PREDICT = """
import sys, mlflow
model = mlflow.pyfunc.load_model("model")
table = model.predict(sys.argv[1:])
assert not [m for m in sys.modules if m.startswith("nbs_lib")]
print(table.to_json(double_precision=15))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with a packaged model, some pictures, and what the bundle finds on them."
    folder = tmp_path_factory.mktemp("package")
    torch.manual_seed(0)
    net = open_model("yolo11n.yaml").model
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = 1.
    net.train()(torch.rand(4, 3, 96, 96)); net.eval()  # not trained, but pictures differ to it
    for c in net.model[-1].cv3: c[-1].weight.data *= .02
    _bundle(dict(ema=net, version="0"), folder/"bundle", dict(names=list(net.names.values()), imgsz=96, architecture="yolo11n.yaml"))
    write_json(folder/"bundle/thresholds.json", dict(conf=1e-6, iou=.7, max_det=4))
    package(folder/"bundle", folder/"elsewhere/model")
    write_scenes(folder/"scenes", scenes=dict(test=3), side=96)
    pictures = sorted((folder/"scenes").rglob("*.jpg"))
    return folder/"elsewhere", pictures, Model(folder/"bundle", "cpu").predict(pictures)


def alike(found, expected):
    assert found.label.tolist() == expected.label.tolist() and found.picture.tolist() == expected.picture.tolist()
    assert np.allclose(found.iloc[:, 2:].astype(float), expected.iloc[:, 2:], atol=1e-3)


def bare():
    "The environment without this repository or its settings."
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL", "MLFLOW", "NBS", "YOLO", "ULTRALYTICS", "UV_COMPILE"))}


def test_its_requirements_are_enough(made, tmp_path):
    folder, pictures, expected = made
    uv, python = Path(sys.executable).with_name("uv"), tmp_path/"venv/bin/python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path/"venv"], check=True, env=bare())
    start = time.monotonic()
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--requirement", folder/"model/requirements.txt"], check=True, env=bare())
    print(f"installed in {time.monotonic() - start:.1f} s")
    start = time.monotonic()
    done = subprocess.run([python, "-c", PREDICT, *pictures], cwd=folder, env=bare() | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    print(f"loaded and predicted in {time.monotonic() - start:.1f} s; it said: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    alike(pd.DataFrame(json.loads(done.stdout)), expected)


def test_the_scoring_server_answers(made):
    folder, pictures, expected = made
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [Path(sys.executable).with_name("mlflow"), "models", "serve", "--model-uri", "model", "--port", port, "--env-manager", "local", "--workers", 1]
    server = subprocess.Popen(list(map(str, command)), cwd=folder, env=bare() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        ask = lambda **body: httpx.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
        for _ in range(240):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ping", timeout=5).status_code == 200: break
            except httpx.TransportError: pass
            assert server.poll() is None, "the server ended"
            time.sleep(.25)
        texts = [base64.b64encode(p.read_bytes()).decode() for p in pictures]
        alike(pd.DataFrame(ask(inputs=texts).json()["predictions"]), expected)
        assert len(ask(inputs=texts, params={"max_det": 1}).json()["predictions"]) == 3
        refused = ask(inputs=[texts[0], base64.b64encode(b"no picture").decode()])
        assert refused.status_code == 400 and "picture 1: unreadable_image: no known picture format" in refused.json()["message"]
        secret = folder/"secret.txt"
        secret.write_text("very secret")
        assert "very" not in ask(inputs=[str(secret)]).text
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def test_every_version_runs_its_own_code(made, tmp_path):
    "Also beside one of other code, and with this library imported."
    import mlflow

    folder, pictures, expected = made
    shutil.copytree(folder/"model", tmp_path/"other")
    [code] = (tmp_path/"other/code").iterdir()
    renamed = code.rename(code.with_name("nbs_0"))
    (renamed/"package.py").write_text((renamed/"package.py").read_text() + "\nVERSION = 0\n")
    about = tmp_path/"other/MLmodel"
    about.write_text(about.read_text().replace(code.name, "nbs_0"))
    old, new = mlflow.pyfunc.load_model(str(tmp_path/"other")), mlflow.pyfunc.load_model(str(folder/"model"))
    assert hasattr(sys.modules["nbs_0.package"], "VERSION") and not hasattr(sys.modules[f"{code.name}.package"], "VERSION")
    for model in (old, new): alike(model.predict(pictures), expected)
