"""Whether pictures are still like those that the champion was judged on: `python -m flows.drift` looks once, without a server."""
import argparse, os
from datetime import UTC, datetime, timedelta

import flows.embedded  # noqa: F401  before prefect
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed

from flows.home import ROOT
from flows.notify import notify
from flows.once import once
from flows.report import embedded
from flows.runs import guarded, one_line
from nbs_lib.config import WrongCall, params, read_json, replacing, run_id, tracking_uri, write_json
from nbs_lib.draw import show_drift
from nbs_lib.drift import compare, logged, profile
from nbs_lib.registry import champion, download
from nbs_lib.requestlog import rows
from nbs_lib.score import scored
from nbs_lib.store import asking, connect, embedded as embedded_store

DATA = ROOT/"data"
ROWS = 12  # comparisons in the picture


def judged():
    "The champion's version and weights, the profile of the pictures that it was judged on, and the least score of their boxes; None without a champion."
    uri, name = tracking_uri(DATA/"mlflow"), params("publish", path=ROOT/"params.yaml")["model"]
    if (file := embedded_store(uri)) and not file.exists(): return None
    with asking(uri):
        if not (best := champion(client := connect(uri), name)): return None
        bundle = download(client, name, best.version, DATA/"champion")
    if not (bundle/"profile.json").is_file(): raise WrongCall(f"version {best.version} of {name!r} has no profile: `nbs publish` makes a version that has one")
    return (str(best.version), read_json(bundle/"model.json")["tensors"]), read_json(bundle/"profile.json"), read_json(bundle/"thresholds.json")["conf"]


def above(conf, samples, found):
    "A profile of the boxes that the champion's own counts, too."
    return profile(samples, [boxes[boxes.score >= conf] for boxes in found])


def asked():
    "The address of the log of requests; None where nobody asked the service."
    own = DATA/"requests/requests.db"
    return os.environ.get("NBS_REQUESTS") or (f"sqlite:///{own}" if own.is_file() else None)


def batches(champion, conf, since):
    """Folders of batches that this champion, as of `judged`, scored since then, each with why it is left out, or None. A batch has no clock but its
    report's file."""
    for file in sorted((DATA/"predictions").glob("*/report.json")):
        about = read_json(file)
        if (about["version"], about["model"]) != champion or file.stat().st_mtime < since.timestamp(): continue
        higher = about["settings"]["conf"] > conf
        yield file.parent, f"it has boxes from score {about['settings']['conf']} on, the profile from {conf}" if higher else None


def sources(champion, conf, since, least):
    """What there is to compare: name → (samples, boxes); and a line for each that was left out, or could not be read.

    Who asks for a higher least score than the profile's says nothing about drift: such requests are no part of it.
    """
    there, small, out, failed = {}, ([], []), {}, []
    if url := asked():
        ours = lambda row: row["model"] == champion[1] and (row["conf"] or 0) <= conf
        try: there["live"] = logged(filter(ours, rows(url, since=since, version=champion[0])))
        except WrongCall as error: failed.append(str(error))
    for folder, why in batches(champion, conf, since):
        name = str(folder.relative_to(ROOT))
        if why: out[name] = why; continue
        try: of = scored(folder)
        except WrongCall as error: out[name] = str(error); continue
        if len(of[0]) >= least: there[name] = of
        else: small[0].extend(of[0]); small[1].extend(of[1])
    if small[0]: there["small batches together"] = small
    return {name: of for name, of in there.items() if of[0]}, out, failed


def look(champion, reference, conf, since, alpha, effect, least):
    """Compare each source with the profile: name → (profile, outcome); what was left out and what failed, as of `sources`.

    A batch is compared by itself, as it is what people can do something about: a camera, a day. Only those with too few pictures are put together. All
    comparisons of a run share its alpha, so that a run with many batches calls nobody more often.
    """
    there, out, failed = sources(champion, conf, since, least)
    profiles = {name: above(conf, *of) for name, of in there.items()}
    among = max(1, sum(p["pictures"] >= least for p in profiles.values()))
    return {name: (p, compare(reference, p, alpha=alpha, effect=effect, least=least, among=among)) for name, p in profiles.items()}, out, failed


def report(run, version, since, reference, compared, out):
    "Write drift.json and drift.png of a run, and show both in Prefect: the lines for people, those that drifted first."
    folder = DATA/"runs"/run
    order = sorted(compared, key=lambda name: compared[name][1]["verdict"] != "drifted")
    write_json(folder/"drift.json", dict(version=version, since=since.isoformat(timespec="seconds"), left_out=out,
                                         comparisons={name: compared[name][1] for name in order}))
    with replacing(folder/"drift.png") as tmp:
        show_drift({name: (reference, *compared[name]) for name in order[:ROWS]}).savefig(tmp, format="png", dpi=110)
    lines = [f"{name}: {compared[name][1]['text']}" for name in order]
    table = [row(name, feature, of) for name in order for feature, of in compared[name][1]["tests"].items()]
    head = ["| pictures | feature | | distance | p, corrected | n of the profile | n now |", "|---|---|---|---|---|---|---|"]
    picture = f"![each feature before (grey) and now]({embedded((folder/'drift.png').read_bytes())})"
    text = [f"# Drift against version {version}", "", *(f"- {line}" for line in lines), *(f"- {name} is left out: {why}" for name, why in out.items()), "",
            *head, *table, "", picture]
    create_markdown_artifact("\n".join(text), key="drift")
    return lines


def row(name, feature, of):
    "A test as a line of the table."
    verdict = "**drifted**" if of["drifted"] else "alike"
    return f"| {name} | {feature} | {verdict} | {of['distance']:.3f} | {of['corrected']:.2g} | {of['n'][0]} | {of['n'][1]} |"


def ask_for_retraining(version, run, drifted):
    "Tell the server, whose deployments have `nbs.drift` among their triggers; without one there is nobody to start them."
    if PREFECT_API_URL.value():
        emit_event("nbs.drift", resource={"prefect.resource.id": f"nbs.champion.{version}"}, payload=dict(run=run, drifted=drifted))


def work(hours, alpha, effect, least, request_retraining):
    "What a run does, once it is alone."
    if not 0 < hours < 1e6: raise WrongCall(f"hours says how far back, and cannot be {hours:g}")
    run, since = run_id(), datetime.now(UTC) - timedelta(hours=hours)
    if not (known := judged()): return Completed(name="Nothing to compare", message="nothing to compare: no version is champion yet")
    (version, _), reference, conf = known
    compared, out, failed = look(known[0], reference, conf, since, alpha, effect, least)
    lines = report(run, version, since, reference, compared, out) if compared else []
    if drifted := [name for name, (_, of) in compared.items() if of["verdict"] == "drifted"]:
        notify("pictures drifted", "\n".join(lines[:len(drifted)]), True)
        if request_retraining: ask_for_retraining(version, run, drifted)
    said = "; ".join([*failed, *lines, *(f"{name} is left out: {why}" for name, why in out.items())])
    if failed: raise WrongCall(said)
    if any(of["verdict"] != "too few" for _, of in compared.values()): return Completed(message=said)
    return Completed(name="Nothing to compare", message=f"nothing to compare: {said or f'version {version} saw no pictures in the last {hours:g} hours'}")


@flow(name="drift")
def drift(hours: float = 168, alpha: float = .01, effect: float = .1, least: int = 30, request_retraining: bool = False):
    """Compare what was asked (NBS_REQUESTS, else data/requests) and the batches that were scored with the pictures that the champion was judged on.

    Args:
        hours: how far back
        alpha: chance that a run calls people for nothing, in (0, 1)
        effect: least distance of two distributions that matters, in [0, 1]; 0.1 is a shift by a quarter of the standard deviation
        least: pictures without which nothing is judged
        request_retraining: where something drifted, emit the event nbs.drift, which starts what names it in its triggers
    """
    return guarded(DATA/"cache/drift.lock", "compares", lambda: work(hours, alpha, effect, least, request_retraining), "drift cannot be told")


def main():
    "Run it once. Status 0: done, drifted or not; 1: failed; 2: called wrongly, or no server where one is named; 3: another run compares."
    parser = argparse.ArgumentParser(prog="python -m flows.drift", description="Compare new pictures with those that the champion was judged on. Once.")
    parser.add_argument("--hours", type=float, default=168, help="how far back")
    parser.add_argument("--alpha", type=float, default=.01, help="chance that a run calls people for nothing")
    parser.add_argument("--effect", type=float, default=.1, help="least distance of two distributions that matters, in [0, 1]")
    parser.add_argument("--least", type=int, default=30, help="pictures without which nothing is judged")
    parser.add_argument("--request-retraining", action="store_true", help="where something drifted, emit the event nbs.drift to the server")
    print(once(drift, **vars(parser.parse_args())).message)


one_line()
if __name__ == "__main__": main()
