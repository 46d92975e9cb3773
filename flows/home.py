"Where the flows work."
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A container may mount this repository at the same path: its pids mean nothing here.
HOME = f"{os.uname().nodename}:{ROOT}"
