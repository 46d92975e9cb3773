"""What a run tells in Prefect: scores and what changed, letters by code, pictures, and where its notebooks lie."""
import base64, io, json
from pathlib import Path

from PIL import Image
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from flows.home import ROOT
from nbs_lib.config import read_json

REPORTS, RUNS = ROOT/"data/reports", ROOT/"data/runs"
WIDTH = 900  # of a picture in a report [pixels]


def tell(run: str,        # id: the folder of its notebooks
         taken: list,     # batches that became raw data
         scored: list,    # a line for each batch of pictures that the champion scored
         published: dict, # what `nbs publish` answered
         judged: dict     # what `nbs gate` answered
        ):
    "Create the artifacts of a run."
    ingest, evaluate = (read_json(REPORTS/f"{name}.json") for name in ("ingest", "evaluate"))
    pages = sorted((RUNS/run).glob("*.html"))
    for page in pages:
        create_link_artifact(page.resolve().as_uri(), page.stem, key=f"notebook-{page.stem.partition('_')[2].replace('_', '-')}",
                             description=f"The executed notebook `{page.stem}`, on the machine that ran it: `{page.relative_to(ROOT)}`")
    create_table_artifact([dict(code=code, letters=n) for code, n in ingest["letters"].items()] or [dict(code="none", letters=0)], key="dead-letters",
                          description=f"{ingest['samples']} of {ingest['pictures']} pictures and {ingest['boxes_kept']} of {ingest['boxes']} boxes are used; "
                                      "`nbs letters` lists the others")
    create_markdown_artifact(markdown(run, taken, scored, published, judged, evaluate, pages), key="retraining")


def markdown(run, taken, scored, published, judged, evaluate, pages):
    "The report of a run."
    verdict = "is champion" if judged["promoted"] else "was refused"
    lines = [f"# Version {judged['version']} {verdict}", "", judged["text"], "", "| score on the test pictures | value |", "|---|---|",
             *(f"| {name} | {evaluate[key]:.3f} |" for name, key in (("mAP", "map"), ("mAP50", "map50"), ("mAP75", "map75"))),
             *(f"| {key.replace('_', ' ')} | {evaluate[key]} |" for key in ("pictures", "boxes", "right", "missed", "false_alarms"))]
    if judged.get("difference") is not None:
        lines.append(f"| mAP over the champion's | {judged['difference']:+.3f} ({judged['low']:+.3f} to {judged['high']:+.3f}) |")
    if taken: lines += ["", f"New data: {', '.join(taken)} (`git add` their `.dvc` files in data/raw/incoming)"]
    if scored: lines += ["", "Scored by the champion:", *(f"- {line}" for line in scored)]
    executed = ", ".join(p.stem for p in pages) or "none, all came from the cache"
    lines += ["", f"MLflow run {published['name']} ({published['run']}); notebooks of this run: {executed}", ""]
    pictures = {"training": last_picture(RUNS/run/"40_train.ipynb"), "worst pictures": (REPORTS/"worst.png").read_bytes()}
    lines += [f"![{what}]({embedded(picture)})\n" for what, picture in pictures.items() if picture]
    return "\n".join(lines)


def last_picture(notebook: Path  # executed
                ):
    "The last picture of a notebook as PNG; None where it was not executed."
    if not notebook.is_file(): return None
    outputs = [out.get("data", {}) for cell in json.loads(notebook.read_text())["cells"] for out in cell.get("outputs", ())]
    return next((base64.b64decode(data["image/png"]) for data in reversed(outputs) if "image/png" in data), None)


def embedded(picture: bytes):
    "A picture, small, as an address that holds it."
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    image.save(small := io.BytesIO(), "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"
