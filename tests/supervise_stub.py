"""Runs the local backend on a stub run in a process of its own, so that tests can send it signals."""

from __future__ import annotations

import sys
from pathlib import Path

from medgen import plan
from medgen.errors import MedgenError
from medgen.launch.local import LocalBackend
from medgen.rundir import RunDir

if __name__ == "__main__":
    run = RunDir(Path(sys.argv[1]))
    try:
        sys.exit(LocalBackend(cpus=2, gpus=0, python=sys.argv[2]).submit(run, plan.read(run)))
    except MedgenError as error:
        print(error, flush=True)
        sys.exit(10)
