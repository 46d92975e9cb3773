"""What flows.serve and flows.deploy do alike with a server: is it the right one, whose are its deployments, what goes from it.

Tags say whose a deployment is: who serves or deploys removes only what bears its own.
"""
from prefect import get_client
from prefect.client.schemas.filters import DeploymentFilter
from prefect.client.schemas.sorting import DeploymentSort
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound

from flows.runs import PAGE
from flows.schedules import flow_of
from nbs_lib.config import WrongCall

SERVED, DEPLOYED = "served", "deployed"


def check_server(url):
    "Raises `WrongCall` unless a server of this version answers."
    with get_client(sync_client=True) as client:
        if error := client.api_healthcheck():
            raise WrongCall(f"no Prefect server answers at {url} ({type(error).__name__}): start it, or unset PREFECT_API_URL")
        try: client.raise_for_api_version_mismatch()
        except RuntimeError as error: raise WrongCall(f"{url}: {' '.join(str(error).split())}") from None


def full_name(entry): return f"{flow_of(entry).name}/{entry.name}"


def on_server(client, name):
    "The deployment `flow/name`, or None."
    try: return client.read_deployment_by_name(name)
    except ObjectNotFound: return None


def tagged(client, *tags):
    "Every deployment that bears all these tags, by its full name."
    found = []
    while not len(found) % PAGE:
        page = client.read_deployments(deployment_filter=DeploymentFilter(tags={"all_": list(tags)}), sort=DeploymentSort.NAME_ASC,
                                       limit=PAGE, offset=len(found))
        if not page: break
        found += page
    return {f"{client.read_flow(deployment.flow_id).name}/{deployment.name}": deployment for deployment in found}


def remove(client, deployment):
    "Take a deployment from the server, and first the triggers that would start it."
    client.delete_resource_owned_automations(f"prefect.deployment.{deployment.id}")
    client.delete_deployment(deployment.id)


def as_prefect(entry, **more):
    "An entry as Prefect has it, with its form."
    triggers = [DeploymentEventTrigger(name=f"{entry.name}: {name}", expect={name}) for name in entry.triggers]
    return flow_of(entry).to_deployment(entry.name, schedules=[when.schedule() for when in entry.schedules], parameters=entry.parameters,
                                        triggers=triggers, paused=entry.paused, **more)
