"""A flow run once, from the command line."""
import atexit, sys
from contextlib import ExitStack

from httpx import HTTPError
from prefect.settings import PREFECT_API_URL

from flows.reaper import leash
from flows.server import check_server
from nbs_lib.config import WrongCall


def once(flow, **given):
    """The state of a run that completed; of another one say why, and exit: with status 1, with 2 where a server is named and there is none, with 3 where
    another run is at work, and this one did nothing."""
    try:
        if url := PREFECT_API_URL.value(): check_server(url)
        else: atexit.register(held_by_this_process())  # ends after what Prefect registers for the server that it brings
    except WrongCall as error:
        print(f"{flow.name}: {error}", file=sys.stderr)
        sys.exit(2)
    try: ended = flow(**given, return_state=True)
    except RuntimeError as error:
        if "ephemeral" not in str(error): raise
        sys.exit(f"{flow.name}: the server that Prefect brings for a run did not start in time; on a busy machine name one that runs in PREFECT_API_URL")
    except HTTPError: sys.exit(f"{flow.name}: the Prefect server at {url} went away, and did not come back: run it again when it is there")
    if ended.name == "Skipped":
        print(ended.message, file=sys.stderr)
        sys.exit(3)
    return ended if ended.is_completed() else sys.exit(ended.message)


def held_by_this_process():
    "From now on whatever this process starts dies with it, Prefect's server too. What ends that, in good order."
    stack = ExitStack()
    stack.enter_context(leash())
    return stack.close
