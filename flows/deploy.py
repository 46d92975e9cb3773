"""All schedules of flows/schedules.yaml on a server, for workers on other machines: `python -m flows.deploy --source GIT_URL`.

Workers get code and parameters by a git commit, or baked into an image, and data by the DVC remote.
"""
import argparse, json, shlex, sys, tempfile
from pathlib import Path

import flows.embedded  # noqa: F401  before prefect
from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

from flows.commands import git
from flows.home import ROOT
from flows.schedules import FILE, FLOWS, pools_and_entries
from flows.server import DEPLOYED, as_prefect, check_server, full_name, on_server, remove, tagged
from nbs_lib.config import WrongCall

STEPS, FOLDER = "prefect.deployments.steps", "/workspace"  # the folder in which docker/Dockerfile lays the code
LEASES = "prefect.server.concurrency.lease_storage.filesystem"
ALONE = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)


def by_commit(source, commit, checkout=None):
    "How workers get the code from git: project, version, steps. Raises `WrongCall` for a commit that they would not find there."
    if not source: raise WrongCall("name the repository that workers clone: SOURCE=… (--source), or set git's origin")
    if not commit and (changed := git(ROOT, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!data", ":!dvc.lock").splitlines()):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise WrongCall(f"{changed[0][2:].strip()}{more} changed since the last commit, and workers would not get that: commit and push, or name a --commit")
    try: sha = git(ROOT, "rev-parse", "--verify", f"{commit or 'HEAD'}^{{commit}}")
    except WrongCall as error: raise WrongCall(f"there is no commit {commit or 'HEAD'!r} here ({error})") from None
    if Path(source).exists(): source = str(Path(source).resolve())
    with tempfile.TemporaryDirectory() as folder:
        git(folder, "init", "--quiet", "--bare")
        try: git(folder, "fetch", "--quiet", "--depth", "1", "--filter", "tree:0", source, sha)
        except WrongCall as error: raise WrongCall(f"{source} does not give out commit {sha[:12]}, push it there ({error})") from None
    project = source.rstrip("/").rpartition("/")[2].removesuffix(".git")
    return project, sha[:12], in_checkout(checkout, source, sha) if checkout else in_clone(project, source, sha), {}


def in_clone(project, source, sha):
    "Prefect's own step, which would leave a clone that it finds at the commit that it has: a folder a commit. The name below is MLflow's experiment."
    clone = dict(id="clone", repository=source, commit_sha=sha, clone_directory_name=f"{sha[:12]}/{project}")
    return [{f"{STEPS}.git_clone": clone}, {f"{STEPS}.set_working_directory": dict(directory="{{ clone.directory }}")}]


def in_checkout(folder, source, sha):
    "One folder for all commits, with what is mounted there; it changes only while no flow is at work in it, and then drops what a run wrote over git's files."
    locks = " ".join(f"flock data/cache/{flow}.lock" for flow in FLOWS)
    change = f"git fetch --quiet --depth 1 {shlex.quote(source)} {sha} && {locks} git checkout --quiet --force --detach {sha}"
    script = f'mkdir -p data/cache && git init --quiet && {{ [ "$(git rev-parse --quiet --verify HEAD)" = {sha} ] || {{ {change}; }}; }}'
    return [{f"{STEPS}.run_shell_script": dict(directory=folder, script=f"bash -c {shlex.quote(script)}")},
            {f"{STEPS}.set_working_directory": dict(directory=folder)}]


def by_image(image):
    "How workers get the code from an image: project, version, steps, job variables."
    project = image.rpartition("/")[2].partition("@")[0].partition(":")[0]
    return project, image, [{f"{STEPS}.set_working_directory": dict(directory=FOLDER)}], dict(image=image)


def check_entries(pools, found, image):
    "Raises `WrongCall` for a deployment that no worker could take."
    for entry in found:
        if not entry.work_pool: raise WrongCall(f"{full_name(entry)} names no work_pool: workers take runs from one, such as `work_pool: {{name: cpu}}`")
        kind = pools[entry.work_pool.name]
        if image and kind != "docker": raise WrongCall(f"{full_name(entry)}: a {kind} pool starts no image: --source gives its workers the code")
        if not image and kind == "docker" and "image" not in entry.work_pool.job_variables:
            raise WrongCall(f"{full_name(entry)}: work_pool.job_variables names no image with what the code needs; --image takes the code from one as well")


def check_pools(client, pools):
    "Raises `WrongCall` for a pool that is something else on the server."
    for name, kind in pools.items():
        if (there := pool_on_server(client, name)) and there.type != kind:
            raise WrongCall(f"work pool {name} is of type {there.type} on the server, not {kind}: give it another name, or delete it there")


def pool_on_server(client, name):
    try: return client.read_work_pool(name)
    except ObjectNotFound: return None


def make_pools(client, pools):
    "Those that are missing, with what Prefect has for their type."
    for name, kind in pools.items():
        if pool_on_server(client, name): continue
        template = run_coro_as_sync(get_default_base_job_template_for_infrastructure_type(kind))
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template or {}))
        print(f"work pool {name}: created")


def check_owner(client, names, own):
    "Raises `WrongCall` for a name that others use."
    for name in names:
        if (there := on_server(client, name)) and not {DEPLOYED, own} <= set(there.tags):
            raise WrongCall(f"{name} is on the server already, with tags {', '.join(there.tags) or 'of nobody'}: give it another name, or delete it there")


def wanted(entry, version, steps, variables, tags):
    "What the API is to be told of a deployment; its schedules and triggers as objects."
    pool = entry.work_pool
    it = as_prefect(entry, tags=tags, version=version, concurrency_limit=ALONE, work_pool_name=pool.name, work_queue_name=pool.work_queue_name,
                    job_variables=pool.job_variables | variables)
    plain = json.loads(it.model_dump_json(include={"name", "paused", "parameters", "tags", "version", "work_pool_name", "work_queue_name", "job_variables",
                                                   "enforce_parameter_schema", "concurrency_options", "description"}))
    return plain | dict(entrypoint=f"flows/{entry.flow}.py:{entry.flow}", pull_steps=steps,
                        parameter_openapi_schema=json.loads(it._parameter_openapi_schema.model_dump_json(exclude_unset=True))), it


def same(client, there, plain, it):
    "Whether the server says already what it is to be told."
    answer = json.loads(there.model_dump_json(include=set(plain)))
    when = lambda schedules: sorted((s.schedule.model_dump_json(), s.active) for s in schedules)
    # The API does not say which of these the deployment owns, and which a person made: the name does.
    ours = [a for a in client.read_resource_related_automations(f"prefect.deployment.{there.id}") if a.name.startswith(f"{there.name}: ")]
    starts = sorted((a.name, sorted(a.trigger.expect), a.enabled) for a in ours)
    return (answer == plain and there.global_concurrency_limit and there.global_concurrency_limit.limit == ALONE.limit
            and when(there.schedules) == when(it.schedules) and starts == sorted((t.name, sorted(t.expect), t.enabled) for t in it.triggers))


def put(client, name, plain, it):
    "Create or change a deployment where the server says otherwise: what was done."
    if (there := on_server(client, name)) and same(client, there, plain, it): return "unchanged"
    try: id = client.create_deployment(client.create_flow_from_name(it.flow_name), schedules=it.schedules, concurrency_limit=ALONE.limit,
                                       **plain | dict(concurrency_options=it.concurrency_options))
    except PrefectHTTPStatusError as error: raise WrongCall(f"{name}: the server refuses it: {error.response.text[:300]}") from None
    client.delete_resource_owned_automations(f"prefect.deployment.{id}")
    for trigger in it.triggers:
        trigger.set_deployment_id(id)
        client.create_automation(trigger.as_automation())
    return "changed" if there else "created"


def deploy(pools, found, project, version, steps, variables):
    "Let the server have what the file says, and nothing else of this project."
    own = f"{DEPLOYED}:{project}"
    with get_client(sync_client=True) as client:
        check_pools(client, pools)
        check_owner(client, names := [full_name(entry) for entry in found], own)
        make_pools(client, pools)
        for name, entry in zip(names, found):
            print(f"{name}: {put(client, name, *wanted(entry, version, steps, variables, [DEPLOYED, own]))}")
        for name, gone in tagged(client, DEPLOYED, own).items():
            if name in names: continue
            remove(client, gone)
            print(f"{name}: removed")
        if client.request("GET", "/admin/settings").json()["server"]["concurrency"]["lease_storage"] != LEASES:
            print(f"deploy: this server forgets at a restart which runs are at work: start it with PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={LEASES}",
                  file=sys.stderr)


def main():
    "Deploy once. Status 2: called wrongly."
    parser = argparse.ArgumentParser(prog="python -m flows.deploy", description="Put all schedules on a server, for workers on other machines.")
    parser.add_argument("--file", type=Path, default=FILE, help="with the schedules")
    code = parser.add_mutually_exclusive_group(required=True)
    code.add_argument("--source", help="git repository from which workers clone the code")
    code.add_argument("--image", help=f"image with the code in {FOLDER}, for pools of type docker")
    parser.add_argument("--commit", help="of --source; default: HEAD, where nothing has changed since")
    parser.add_argument("--project", help="whose deployments these are, among others on the server; default: the name of the repository or image")
    parser.add_argument("--checkout", help="folder on the workers that is brought to the commit, where something is mounted in it; default: a clone a commit")
    args = parser.parse_args()
    try:
        if args.image and (args.commit or args.checkout): raise WrongCall("an image has its code already: --commit and --checkout go with --source")
        pools, found = pools_and_entries(args.file.resolve())
        if not (url := PREFECT_API_URL.value()): raise WrongCall("PREFECT_API_URL names no server, such as http://server:4200/api")
        check_entries(pools, found, args.image)
        code = by_image(args.image) if args.image else by_commit(args.source, args.commit, args.checkout)
        check_server(url)
        deploy(pools, found, args.project or code[0], *code[1:])
    except (WrongCall, OSError) as error:
        print(f"deploy: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__": main()
