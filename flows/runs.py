"""What the server says of runs, set right: who holds the workspace's lock knows that no other run of it lives."""
from prefect import get_client, runtime
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

from flows.home import HOME


def close_dead():
    "Mark this run as this workspace's; end runs that were killed before they could say so, and those of the same deployment that are late."
    this, deployment = runtime.flow_run.id, runtime.deployment.id
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(this)
        client.update_flow_run(this, tags=[*own.tags, HOME])
        dead = FlowRunFilter(tags={"all_": [HOME]}, state={"type": {"any_": ["RUNNING", "PENDING"]}}, id={"not_any_": [this]})
        end(client, dead, Crashed(message="its process was killed; a later run found that out"))
        if deployment:
            late = FlowRunFilter(deployment_id={"any_": [deployment]}, state={"name": {"any_": ["Late"]}}, id={"not_any_": [this]})
            end(client, late, Cancelled(message="its time had passed, and one run does the work of all"))


def end(client, which, state):
    for run in client.read_flow_runs(flow_run_filter=which, sort=FlowRunSort.START_TIME_ASC, limit=200):
        try: client.set_flow_run_state(run.id, state, force=True)
        except ObjectNotFound: pass
