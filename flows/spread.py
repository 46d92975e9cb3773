"""Where the shards of a batch are done: in processes of this machine, or on a Ray cluster whose machines see the workspace under the same path."""
import os, socket
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager

from prefect import get_client, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner

from flows.home import python_path
from flows.runs import one_line
from nbs_lib.config import WrongCall, cores


@task(name="shard", task_run_name="shard {which[0]}", cache_policy=NO_CACHE)
def shard(do, which): do(which)


def spread(kind: str,    # process or ray
           address: str, # of a Ray cluster; '': one that begins and ends here
           workers: int  # processes of this machine; 0: one a core
          ):
    "A `map` that does each shard in a task of this flow run."
    os.environ["TQDM_DISABLE"] = "1"  # bars of processes side by side tell nothing
    def each(do, shards):
        with get_client(sync_client=True) as client: url = str(client.api_url)
        # Told where the server is, a process does not bring its own.
        with temporary_settings({PREFECT_API_URL: url}), pool(kind, address, min(workers or cores(), len(shards))) as tasks:
            try: return tasks.map(shard, dict(do=unmapped(do), which=shards)).result()
            except BrokenProcessPool: raise WrongCall("a process that scored was killed, or out of memory: what was scored is kept; run it again") from None
    return each


@contextmanager
def pool(kind, address, workers):
    "A running task runner. Raises `WrongCall` where Ray does not answer."
    if kind == "process":
        with ProcessPoolTaskRunner(max_workers=workers) as tasks: yield tasks
        return
    if address: check(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options
    import ray
    how = dict(runtime_env=dict(env_vars=dict(PYTHONPATH=python_path(), TQDM_DISABLE="1")))
    if not address: how |= dict(num_cpus=workers, include_dashboard=False)
    with ExitStack() as stack:
        for tries in (1,) if address else (3, 2, 1):  # on a busy machine Ray gives up on its own processes, after a wait that nobody can set
            try: tasks = stack.enter_context(RayTaskRunner(address or None, how))
            except Exception as error:
                ray.shutdown()
                hint = "; a cluster that asks for a token wants RAY_AUTH_MODE=token, and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token" if address else ""
                if tries == 1: raise WrongCall(f"Ray does not start: {' '.join(str(error).split())[:300]}{hint}") from error
            else: break
        if "GPU" in ray.cluster_resources(): stack.enter_context(remote_options(num_gpus=1))  # else Ray hides the cards from a task
        yield tasks


def check(address):
    "Raises `WrongCall` unless something answers there, which Ray itself would await for many minutes."
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try: socket.create_connection((host, int(port)), 10).close()
    except (OSError, ValueError) as error: raise WrongCall(f"no Ray cluster answers at {address} ({error}): name host:6379, or ray://host:10001") from None


one_line()
