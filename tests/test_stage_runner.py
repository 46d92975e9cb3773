"""The runner of a stage, with real kernels, signals and `dvc repro` in a repository of its own."""
import json, os, shutil, signal, subprocess, sys
from contextlib import suppress
from pathlib import Path

import nbformat, psutil, pytest, yaml
from nbformat.v4 import new_code_cell, new_notebook

from conftest import ROOT, wait
from nbs_lib.config import COMMANDS, write_json

pytestmark = pytest.mark.timeout(60)

FLOWS = Path(__file__).resolve().parent.parent/"flows"
PARAMETERS = "out: str = None  # folder\nepochs: int = None  # passes [1]"
CHILD = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
STAGES = {
    "10_good": ["import json, os",
                "print(json.dumps([os.getcwd(), os.environ['PYTHONPATH'].split(':')[0], os.environ['NBS_RUN_ID'], epochs]))", CHILD],
    "20_next": ["1 + 1"],
    "30_bad": ["print('before')", "raise ValueError('not\\nthis')", "print('after')"],
    "31_leave": ["import sys; sys.exit(0)", "print('after')"],
    "40_long": [CHILD, "import time; print('ready', flush=True); time.sleep(600)"],
}


def write(repo, name, cells, tags=("parameters",), kernel="python3"):
    cells = [new_code_cell(PARAMETERS, id="parameters", metadata={"tags": list(tags)}),
             *(new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(cells))]
    spec = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), repo/f"notebooks/stages/{name}.ipynb")
    if not (repo/"params.yaml").exists():
        ours = yaml.safe_load((ROOT/"params.yaml").read_text())
        (repo/"params.yaml").write_text(yaml.safe_dump({section: ours[section] for section in COMMANDS}))
    with open(repo/"params.yaml", "a") as params: params.write(f"{name.partition('_')[2]}: {{epochs: 1}}\n")


@pytest.fixture
def repo(tmp_path):
    repo = tmp_path.resolve()/"a {braced} folder"
    shutil.copytree(FLOWS, repo/"flows", ignore=shutil.ignore_patterns("__pycache__"))
    (repo/"notebooks/stages").mkdir(parents=True)
    for name, cells in STAGES.items(): write(repo, name, cells)
    yield repo
    for process in alive(repo): process.kill()


def start(repo, *command, log="", **env):
    "Start a command in a session of its own, its output in files; Ctrl-C works also where the tests run in the background."
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NBS_", "DVC_"))}
    clean |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}", "DVC_NO_ANALYTICS": "1"} | env
    with open(repo/f"{log}out.txt", "w") as out, open(repo/f"{log}err.txt", "w") as err:
        return subprocess.Popen(command, cwd=repo, env=clean, stdout=out, stderr=err, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def stage(repo, *args, **more): return start(repo, sys.executable, "-m", "flows.stage", *args, **more)


def test_the_page_of_a_report_is_that_of_the_run_that_wrote_it(tmp_path, monkeypatch):
    "Not of the latest one, which may have executed another stage, or none."
    from flows import stage
    monkeypatch.chdir(tmp_path)
    write_json(report := Path("data/reports/evaluate.json"), dict(map=.5))
    assert stage.page("evaluate") == "no page (its notebook was not executed here: `dvc repro --force --single-item evaluate` does it)"
    (run := Path("data/runs/1")).mkdir(parents=True)
    for kind in ("ipynb", "html"): (run/f"50_evaluate.{kind}").write_text("")
    stage.remember("evaluate", run/"50_evaluate.ipynb", report.stat().st_mtime)
    Path("data/runs/latest").symlink_to("2")
    assert stage.page("evaluate") == "data/runs/1/50_evaluate.html"
    write_json(report, dict(map=.6))  # of another clone's run, by `dvc pull`
    assert stage.page("evaluate").startswith("no page")


def test_a_page_that_cannot_be_written_leaves_the_notebook_whole(tmp_path, monkeypatch):
    from flows.stage import export
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1")]), tmp_path/"10_good.ipynb")
    before = (tmp_path/"10_good.ipynb").read_bytes()
    def half(nb, file):
        Path(file).write_text("{")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(nbformat, "write", half)
    with pytest.raises(OSError, match="No space"): export(tmp_path/"10_good.ipynb", "Stopped by SIGINT", None)
    assert [p.name for p in tmp_path.iterdir()] == ["10_good.ipynb"] and (tmp_path/"10_good.ipynb").read_bytes() == before


def repro(repo, *names):
    "Start `dvc repro` on these stages, one after the other."
    (repo/"dvc.yaml").write_text(json.dumps({"stages": {name: {"cmd": f"python -m flows.stage {name}"} for name in names}}))
    assert start(repo, "dvc", "init", "--no-scm", "-q").wait() == 0
    return start(repo, "dvc", "repro", *names)


def output(repo, log=""): return (repo/f"{log}out.txt").read_text(), (repo/f"{log}err.txt").read_text()


def kept(repo): return sorted(path.name for path in (repo/"data/runs/latest").iterdir())


def alive(repo):
    "Every process of the stages of this repository, runners and watchdogs included."
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("NBS_STAGE_ROOT", "").endswith(f":{repo}")
            if ours or {"flows.reaper", "flows.stage"} & set(process.cmdline()) and process.cwd() == str(repo): yield process


def one(repo, word): return next(process for process in alive(repo) if word in process.cmdline())


def wait_until_ready(repo, log=""):
    wait(lambda: "ready" in output(repo, log)[0], 40)
    assert one(repo, "ipykernel_launcher") and one(repo, "sleep") and one(repo, "flows.reaper")


def test_success_is_kept_and_leaves_no_process(repo):
    (repo/"data").mkdir()
    runner = stage(repo/"data", "good", "-p", "epochs", "7", NBS_RUN_ID="my.run-1", PYTHONPATH=str(repo))
    assert runner.wait() == 0 and not list(alive(repo))
    out, err = output(repo/"data")
    assert json.loads(out) == [str(repo), str(repo), "my.run-1", 7] and err == ""
    assert os.readlink(repo/"data/runs/latest") == "my.run-1" and kept(repo) == ["10_good.html", "10_good.ipynb"]
    page = (repo/"data/runs/my.run-1/10_good.html").read_text()
    assert "my.run-1" in page and "<script" not in page


def test_failure_is_kept_and_told_in_two_lines(repo):
    assert stage(repo, "bad").wait() == 1
    run = os.readlink(repo/"data/runs/latest")
    assert output(repo) == ("before\n", f"bad failed: ValueError: not this\nsee data/runs/{run}/30_bad.html\n")
    assert kept(repo) == ["30_bad.html", "30_bad.ipynb"]
    assert "An Exception was encountered" in (repo/"data/runs/latest/30_bad.html").read_text()


def test_leaving_early_is_a_failure(repo):
    assert stage(repo, "leave").wait() == 1
    assert "leave failed: SystemExit" in output(repo)[1]
    assert "SystemExit: a cell ended" in nbformat.read(repo/"data/runs/latest/31_leave.ipynb", 4).cells[0].source


@pytest.mark.parametrize("args, env, says", [
    (["god"], {}, "there is no stage 'god'. Did you mean 'good'?"),
    (["good", "-p", "epoch", "3"], {}, "has no parameter 'epoch'. Did you mean 'epochs'?"),
    (["untagged"], {}, "50_untagged.ipynb has no cell tagged `parameters`"),
    (["foreign"], {}, "needs the kernel 'klingon', which is not installed"),
    (["good"], {"NBS_RUN_ID": "../up"}, "NBS_RUN_ID='../up' cannot name a folder"),
    (["good"], {"NBS_RUN_ID": "latest"}, "NBS_RUN_ID='latest' cannot name a folder"),
], ids=["stage", "parameter", "untagged", "kernel", "path", "latest"])
def test_a_wrong_call_is_one_line_and_starts_nothing(repo, args, env, says):
    write(repo, "50_untagged", ["1"], tags=())
    write(repo, "51_foreign", ["1"], kernel="klingon")
    assert stage(repo, *args, **env).wait() == 2
    out, err = output(repo)
    assert says in err and err.count("\n") == 1 and out == "" and not (repo/"data").exists()


def test_ctrl_c_stops_everything_and_keeps_the_notebook(repo):
    runner = stage(repo, "long")
    wait_until_ready(repo)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(10) == 130 and not list(alive(repo))
    assert output(repo) == ("ready\n", "long stopped: SIGINT\n")
    assert kept(repo) == ["40_long.html", "40_long.ipynb"]
    assert "Stopped by SIGINT" in (repo/"data/runs/latest/40_long.html").read_text()


def test_term_while_starting(repo):
    runner = stage(repo, "long")
    wait(lambda: (repo/"data/runs/latest").exists(), 20)
    runner.terminate()
    assert runner.wait(10) == 143 and not list(alive(repo)) and output(repo) == ("", "long stopped: SIGTERM\n")


def test_nothing_outlives_a_killed_runner(repo):
    runner = stage(repo, "long")
    wait_until_ready(repo)
    runner.kill()
    wait(lambda: not list(alive(repo)), 10)


def test_a_killed_kernel_is_told_and_leaves_nothing(repo):
    runner = stage(repo, "long")
    wait_until_ready(repo)
    one(repo, "ipykernel_launcher").kill()
    assert runner.wait(10) == 1 and not list(alive(repo))
    assert output(repo)[1].startswith("long failed: the kernel died (killed, crashed or out of memory)\nsee data/runs/")
    assert "the kernel died" in (repo/"data/runs/latest/40_long.html").read_text()


def test_stages_of_one_repro_share_a_run_and_die_with_it(repo):
    dvc = repro(repo, "next", "long")
    wait_until_ready(repo)
    dvc.kill()  # not collected before the end: to the watchdog a zombie has to be as good as gone
    wait(lambda: not list(alive(repo)), 10)
    assert dvc.wait() == -signal.SIGKILL and os.readlink(repo/"data/runs/latest").endswith(f"-{dvc.pid}")
    assert kept(repo) == ["20_next.html", "20_next.ipynb", "40_long.html", "40_long.ipynb"]


def test_survivors_of_a_killed_run_are_ended_and_a_parallel_stage_is_not(repo):
    parallel = stage(repo, "long", log="parallel-")
    wait_until_ready(repo, "parallel-")
    others = set(alive(repo))
    killed = stage(repo, "long", log="killed-")
    wait(lambda: "ready" in output(repo, "killed-")[0], 40)
    next(process for process in set(alive(repo)) - others if "flows.reaper" in process.cmdline()).kill()
    killed.kill()
    killed.wait()
    assert any("sleep" in process.cmdline() for process in set(alive(repo)) - others)
    assert stage(repo, "next").wait() == 0
    assert output(repo)[1] == "ended what 1 killed run(s) of this repository had left running\n"
    assert set(alive(repo)) == others and parallel.poll() is None
