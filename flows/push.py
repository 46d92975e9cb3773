"""What `dvc push --run-cache` leaves out: `python -m flows.push`, after it.

DVC pushes what it remembers of a stage, but not the small files that lie in git (`cache: false`), without which a fresh clone restores nothing.
"""
import sys

from dvc.exceptions import DvcException
from dvc.repo import Repo

from flows.home import ROOT


def main():
    "Push them. Status 1: the remote could not be reached."
    try:
        with Repo(str(ROOT)) as repo:
            small = {out.hash_info for stage in repo.index.stages for out in stage.outs
                     if not out.use_cache and out.hash_info and repo.cache.local.exists(out.hash_info.value)}
            if failed := repo.cloud.push(small).failed: raise OSError(f"{len(failed)} of {len(small)} small files could not be pushed")
    except (DvcException, OSError) as error:
        print(f"ERROR: {error}")
        sys.exit(1)


if __name__ == "__main__": main()
