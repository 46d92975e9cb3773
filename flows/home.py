"Where the flows work."
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A container may mount this repository at the same path: its pids mean nothing here.
HOME = f"{os.uname().nodename}:{ROOT}"


def python_path():
    "PYTHONPATH with which a process finds this repository's own library before an installed one."
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
