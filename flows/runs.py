"""What every flow does around its work: one at a time, told in one line where it fails, and the server set right about runs that were killed."""
import logging, os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from httpx import HTTPError
from prefect import get_client, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Crashed

from flows.home import HOME
from flows.notify import notify
from flows.reaper import leash
from nbs_lib.config import WrongCall

PAGE = 200  # most runs that a server answers at once


class Line(logging.Filter):
    "A wrong call and a server that went away are told in one line; where in the code they were noticed helps nobody."
    def filter(self, record):
        if record.exc_info and isinstance(record.exc_info[1], (WrongCall, HTTPError)): record.exc_info = record.exc_text = None
        return True


def one_line():
    "Let Prefect's logs of runs tell such errors so."
    for name in ("prefect.flow_runs", "prefect.task_runs"): logging.getLogger(name).addFilter(Line())


def step(name, **more):
    "A Prefect task that is done anew in every run."
    return task(name=name, task_run_name=name, cache_policy=NO_CACHE, **more)


def parent():
    "The process that serves this flow, if one does: without it nobody would hear of the outcome."
    return [os.getppid()] if "PREFECT__FLOW_RUN_ID" in os.environ and os.getppid() > 1 else []


@contextmanager
def alone(file: Path  # the lock
         ):
    "Whether this is the only run of its kind in this workspace. The lock ends with the process that holds it, however that ends."
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0)
    try: lock.acquire()
    except Timeout: yield False
    else:
        try: yield True
        finally: lock.release()


def guarded(lock, busy, work, failed):
    """What a flow returns: `work()`, done by the only run of its kind in this workspace, of which nothing is left however it ends.

    lock: path of the lock of this kind; busy: what another run is at, for people; failed: title of the message where the work fails, or its error → title
    """
    with alone(lock) as free:
        if not free: return Completed(name="Skipped", message=f"skipped: another run {busy} in this workspace")
        with leash(*parent()):
            try:
                close_dead()
                return work()
            except Exception as error:
                notify(failed(error) if callable(failed) else failed, str(error) or type(error).__name__, True)
                raise


def close_dead():
    "Mark this run as this workspace's; end runs of its flow that were killed before they could say so, and late ones of its deployment."
    this, deployment = runtime.flow_run.id, runtime.deployment.id
    flow = FlowFilter(name={"any_": [runtime.flow_run.flow_name]})
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(this)
        client.update_flow_run(this, tags=[*own.tags, HOME])
        dead = lambda **which: FlowRunFilter(state={"type": {"any_": ["RUNNING", "PENDING"]}}, id={"not_any_": [this]}, **which)
        crashed = Crashed(message="its process was killed; a later run found that out")
        found = end(client, dead(tags={"all_": [HOME]}), crashed, flow_filter=flow)
        if not deployment: return
        late = FlowRunFilter(deployment_id={"any_": [deployment]}, state={"name": {"any_": ["Late"]}}, id={"not_any_": [this]})
        end(client, late, Cancelled(message="its time had passed, and one run does the work of all"))
        slot = client.read_deployment(deployment).global_concurrency_limit
        if not (slot and slot.limit == 1 and own.state.state_details.deployment_concurrency_lease_id): return
        # Whoever holds the only slot knows that no other run of the deployment lives, wherever its folder was.
        found += end(client, dead(deployment_id={"any_": [deployment]}), crashed)
        # A run whose lease ran out gives back, when it is ended, a slot that is this one's by now.
        if found: client.update_global_concurrency_limit(slot.name, GlobalConcurrencyLimitUpdate(active_slots=1))


def end(client, which, state, **more):
    "Give all these runs this state, which makes them runs of another kind: until none is left. How many there were."
    ended = 0
    while runs := client.read_flow_runs(flow_run_filter=which, sort=FlowRunSort.START_TIME_ASC, limit=PAGE, **more):
        for run in runs:
            try: client.set_flow_run_state(run.id, state, force=True)
            except ObjectNotFound: pass
        ended += len(runs)
        if len(runs) < PAGE: break
    return ended
