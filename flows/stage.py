"""Run one stage notebook: `python -m flows.stage train -p epochs 50`.

The executed notebook and its HTML are kept in `data/runs/<run id>/`, also of a run that failed or was stopped; nothing the notebook
started outlives the runner.
"""
import argparse, logging, os, re, secrets, signal, sys, textwrap, time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from flows.home import HOME, ROOT, python_path
from flows.reaper import find, gone, marked, marks, reap, start_reaper
from nbs_lib.config import COMMANDS, WrongCall, check_sections, environment, nearest, replacing
from nbs_lib.tracking import link, linked

RUNS, LINKS = Path("data/runs"), Path("data/cache/executed")
# nbconvert's page without the scripts that it would load from the network.
PAGE = "{% extends 'lab/index.html.j2' %}" + "".join(f"{{% block {name} %}}{{% endblock %}}" for name in
    ("html_head_js", "jupyter_widgets", "html_head_js_mathjax", "html_head_js_mermaidjs"))


def refuse(why: str  # one line: what, where, what to do
          ):
    "Say why nothing was started, and exit."
    print(why, file=sys.stderr)
    sys.exit(2)


def stage_notebooks():
    "The notebook of each stage, by the stage's name."
    return {path.stem.partition("_")[2]: path for path in sorted(Path("notebooks/stages").glob("[0-9]*_*.ipynb"))}


def check_params(stages, under_dvc):
    "Raises `WrongCall` for a params.yaml with a section or key that no stage and no command knows, before the first stage has run for nothing."
    import papermill
    check_sections({name: list(papermill.inspect_notebook(path)) for name, path in stages.items()} | COMMANDS, path=ROOT/"params.yaml")
    if under_dvc and (differs := environment(path=ROOT/"params.yaml")):
        keys = ", ".join(f"{section}.{key}" for section, values in differs.items() for key in values)
        raise WrongCall(f"NBS_ENV={os.environ['NBS_ENV']} has other values for {keys} than params.yaml, which DVC follows: "
                        "`nbs params --apply` writes them there")


def parameters(notebook, given):
    "The given parameters, typed as `papermill -p` does; refuses what papermill would only warn of or find out late."
    sys.modules["pyarrow"] = None  # an optional import of papermill that no notebook needs and that takes long
    for name in ("papermill", "traitlets"): logging.getLogger(name).setLevel(logging.CRITICAL)  # the runner tells what failed
    import papermill, papermill.cli
    from jupyter_client.kernelspec import KernelSpecManager
    try:
        kernel = papermill.utils.nb_kernel_name(papermill.iorw.load_notebook_node(str(notebook)))
        known, kernels = papermill.inspect_notebook(notebook), KernelSpecManager().find_kernel_specs()
    except ValueError as error: refuse(f"{notebook}: {error}")
    if kernel not in kernels: refuse(f"{notebook} needs the kernel {kernel!r}, which is not installed (kernels: {', '.join(kernels)})")
    if not known: refuse(f"{notebook} has no cell tagged `parameters` with parameters in it")
    for name, _ in given:
        if name not in known: refuse(f"{notebook} has no parameter {name!r}.{nearest(name, known)}")
    return {name: papermill.cli._resolve_type(value) for name, value in given}


def dvc():
    "The process of the `dvc` command that runs this stage, if one does."
    for process in psutil.Process().parents() if "DVC_STAGE" in os.environ else ():
        with suppress(psutil.Error):
            if "dvc" in (Path(part).name for part in process.cmdline()[:3]): return process


def run_id(starter: psutil.Process  # whose stages share the id
          ):
    "The run id that was given, or the starter's."
    if given := os.environ.get("NBS_RUN_ID"):
        if given == "latest" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", given):
            refuse(f"NBS_RUN_ID={given!r} cannot name a folder: letters, digits, '.', '_' and '-', not 'latest'")
        return given
    start = datetime.fromtimestamp(starter.create_time(), UTC)
    # The system corrects its clock, and with it start times: a later stage may see another second.
    ids = [f"{start + timedelta(seconds=off):%Y%m%d-%H%M%S}-{starter.pid}" for off in (0, -1, 1)]
    return next((id for id in ids if (RUNS/id).exists()), ids[0])


def run_folder(id):
    "Make the folder of a run and let `latest` point at it."
    folder, link = RUNS/id, RUNS/f".latest-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # a file system without links goes without
        link.symlink_to(id)
        link.replace(RUNS/"latest")
    return folder


def end_survivors():
    "End what an earlier run of this repository left, when its reaper was killed as well."
    left = set()
    for process, env in marked():
        with suppress(psutil.NoSuchProcess):
            if env.get("NBS_STAGE_ROOT") == HOME and orphan(process, env["NBS_STAGE_RUNNER"]): left.add(env["NBS_STAGE_TOKEN"])
    for token in left: reap(token)
    if left: print(f"ended what {len(left)} killed run(s) of this repository had left running", file=sys.stderr)


def orphan(process, runner):
    "Whether a process has outlived its runner; a holder of the runner's pid that is younger than the process is not the runner."
    holder = find(runner)
    return gone(holder) or holder.create_time() > process.create_time()


def note_signals(stopped: list  # to receive the signals
                ):
    "Note Ctrl-C, TERM and HUP, no more: an exception from a handler may get lost in a library's clean-up."
    def note(number, _):
        stopped.append(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN: signal.signal(number, note)  # nohup stays nohup


def mark_environment(id, token):
    "What the kernel and all that it starts inherit: this repository's own library, no progress bars, the run, the marks."
    os.environ.update(PYTHONPATH=python_path(), TQDM_DISABLE="1", NBS_RUN_ID=id, **marks(token))


def execute(notebook, executed, given):
    "Run the notebook; why it failed, or nothing."
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config
    # Else each kernel warns that it is open to eavesdropping, and some complain of the interrupt that ends them.
    config = Config(KernelManager={"transport_encryption": "auto"}, NotebookClient={"extra_arguments": ["--log-level=CRITICAL"]})
    try:
        # The idle message of a cell may be late on a busy machine: the default of 4 s would end a training.
        nb = papermill.execute_notebook(notebook, executed, given, progress_bar=False, stdout_file=sys.stdout,
                                        stderr_file=sys.stderr, iopub_timeout=60, config=config)
    except papermill.PapermillExecutionError as error: return error.evalue if error.ename == "WrongCall" else f"{error.ename}: {error.evalue}"
    except Exception as error:
        # before its first answer jupyter_client tells it by a RuntimeError
        if isinstance(error, DeadKernelError) or "Kernel died" in str(error): return "the kernel died (killed, crashed or out of memory)"
        return f"{type(error).__name__}: {error}"
    # papermill takes an exit with status 0 for a success.
    if nb.metadata.papermill.exception: return "SystemExit: a cell ended the notebook, the cells after it did not run"


def html_exporter(notebook):
    "An exporter that has rendered once: the import and the first rendering take a second, which passes while the kernel starts."
    from nbconvert import HTMLExporter
    exporter = HTMLExporter(raw_template=PAGE)
    exporter.from_filename(str(notebook))
    return exporter


def export(executed, why, exporter):
    "Write the HTML of the executed notebook; papermill heads it only with the error of a cell, other ends are added."
    import nbformat
    nb = nbformat.read(executed, as_version=4)
    if why and "papermill-error-cell-tag" not in nb.cells[0].metadata.get("tags", []):
        nb.cells.insert(0, nbformat.v4.new_markdown_cell(f"**{why}**", metadata={"tags": ["papermill-error-cell-tag"]}))
        with replacing(executed) as tmp: nbformat.write(nb, tmp)
    html, _ = exporter.from_notebook_node(nb, {"metadata": {"name": executed.stem}})
    with replacing(executed.with_suffix(".html")) as tmp: tmp.write_text(html, encoding="utf-8")


def remember(stage, executed, since):
    "Let the report that the stage wrote lead to its notebook, which publishing attaches; an experiment wrote elsewhere, maybe beside the pipeline."
    new = lambda file: file.is_file() and file.stat().st_mtime >= since
    report = Path("data/reports")/f"{stage}.json"
    if new(report) and not new(executed.parent/f"reports/{stage}.json"): link(report, executed, LINKS)


def page(stage):
    "Where the notebook that wrote a stage's report, perhaps in an earlier run, is to be seen; or, in words, that it was executed elsewhere."
    notebook = linked(Path("data/reports")/f"{stage}.json", LINKS)
    if notebook and (html := notebook.with_suffix(".html")).is_file(): return os.path.relpath(html)
    return f"no page (its notebook was not executed here: `dvc repro --force --single-item {stage}` does it)"


def run(stage, given, token, stopped):
    "Execute and export; why it failed and where to look, or nothing."
    starter = dvc()
    stages, id = stage_notebooks(), run_id(starter or psutil.Process())
    notebook = stages.get(stage) or refuse(f"there is no stage {stage!r}.{nearest(stage, stages)}")
    given = parameters(notebook, given)
    try: check_params(stages, under_dvc="DVC_STAGE" in os.environ)
    except WrongCall as error: refuse(str(error))
    end_survivors()
    executed = run_folder(id)/notebook.name
    with start_reaper(token, *([starter.pid] if starter else [])), ThreadPoolExecutor(1) as pool:
        mark_environment(id, token)
        exporter, since = pool.submit(html_exporter, notebook), time.time() - 1
        why = stopped or execute(notebook, executed, given)
        if stopped: why = f"Stopped by {stopped[0].name}"
        try:
            if executed.exists(): export(executed, why, exporter.result())
            if not why: remember(stage, executed, since)
        except Exception as error: why = why or f"no report could be written: {type(error).__name__}: {error}"  # what came first is the cause
    return why and f"{textwrap.shorten(why, 600)}\nsee {executed.with_suffix('.html')}"


def main():
    "Run the stage that the command line names."
    parser = argparse.ArgumentParser(prog="python -m flows.stage", description="Run one stage notebook.")
    parser.add_argument("stage", help="its notebook's name without the number")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="a parameter, as `papermill -p`")
    args, token, stopped = parser.parse_args(), secrets.token_hex(8), []
    note_signals(stopped)
    os.chdir(ROOT)  # relative paths: a brace in an absolute one would be a format field to papermill
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(run, args.stage, args.p, token, stopped)
        while wait([work], 0.2).not_done:
            if stopped: reap(token)
    try: why = work.result()
    except Exception as error: why = f"{type(error).__name__}: {error}"
    if stopped: print(f"{args.stage} stopped: {stopped[0].name}", file=sys.stderr)
    elif why: print(f"{args.stage} failed: {why}", file=sys.stderr)
    sys.exit(128 + stopped[0] if stopped else bool(why))


if __name__ == "__main__": main()
