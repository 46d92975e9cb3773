"""What an image must be able to do: `docker run --rm --gpus all nbs python docker/smoke.py`.

Everything imports, one epoch trains, a picture is predicted; on a card, where the container sees one.
"""
import importlib, sys, tempfile
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from nbs_lib.config import WrongCall, environment, params
from nbs_lib.detector import train
from nbs_lib.fetch import fetch
from nbs_lib.ingest import ingest
from nbs_lib.predict import load, predict
from nbs_lib.split import split

MODULES = "asyncpg", "cv2", "dvc_s3", "jupyterlab", "mlflow", "openvino", "onnxruntime", "papermill", "prefect", "psycopg2", "ray", "torch"
CARDS = sorted(Path("/dev").glob("nvidia[0-9]*"))


def trained(folder, device):
    "Where one epoch on a few tiny pictures was trained; and how many boxes were found in one."
    p = lambda section, **more: {**params(section), **environment("ci").get(section, {}), **more}
    fetch(folder/"raw/fetched", folder/"cache", folder, **p("fetch"))
    ingest(folder/"interim", **p("ingest", root=folder/"raw"))
    split(folder/"interim", folder/"processed", **p("split"))
    report, _ = train(folder/"processed", folder/"models", folder/"work", **p("train", device=device))
    picture = Image.open(next((folder/"processed/images/test").iterdir()))
    found, = predict(load(folder/"models", device=device), [picture], conf=1e-6)
    return report["device"], len(found)


def main():
    "Status 1: it cannot."
    try:
        for name in MODULES: importlib.import_module(name)
        import torch
        print(f"python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in ("torch", "ultralytics", "mlflow", "prefect", "dvc")), sep=", ")
        cuda = torch.cuda.is_available()
        if CARDS and not cuda: sys.exit(f"smoke: torch cannot use {CARDS[0]}: the driver may be older than CUDA {torch.version.cuda}")
        print(f"device: {torch.cuda.get_device_name(0) if cuda else f'CPU, {torch.get_num_threads()} threads'}")
        with tempfile.TemporaryDirectory() as folder: device, boxes = trained(Path(folder), "0" if cuda else "cpu")
        print(f"trained on {device}, {boxes} boxes found")
    except (ImportError, WrongCall) as error: sys.exit(f"smoke: {error}")


if __name__ == "__main__": main()
