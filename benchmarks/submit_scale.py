"""What submitting a 1,000-element array to a real Slurm costs: seconds, and how often each of Slurm's commands is called.

The sandbox takes arrays of 64 elements, so 1,000 elements are 16 sbatch calls. Needs what cluster/sandbox needs: root and Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SANDBOX = REPOSITORY / "cluster" / "sandbox" / "sandbox.py"
ELEMENTS = (64, 1000)
COMMANDS = ("sbatch", "squeue", "scontrol", "sacctmgr", "sacct", "sinfo", "scancel")
SPEC = """version: 1
name: scale
stages:
  work: {{kind: command, run: "true", foreach: {items}, resources: {{time: 5m, mem: 100M}}}}
"""
SITE = "name: lab\nscheduler: slurm\ncpus: 8\ngpus: 4\n"


def run() -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="mg-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # munge wants its socket to be reachable
        subprocess.run([sys.executable, SANDBOX, "up", "--folder", folder / "s", "--without-accounting"], check=True, capture_output=True)
        try:
            return {f"{elements}_elements": _submit(folder, elements) for elements in ELEMENTS}
        finally:
            subprocess.run([sys.executable, SANDBOX, "down", "--folder", folder / "s"], check=True, capture_output=True)


def _submit(folder: Path, elements: int) -> dict[str, object]:
    """One `medgen submit` of an array, with a stand-in before each command that counts its calls; then everything is cancelled."""
    work = folder / str(elements)
    work.mkdir()
    (work / "scale.yaml").write_text(SPEC.format(items=[str(number) for number in range(elements)]))
    (work / "lab.yaml").write_text(SITE)
    environment = {**os.environ, "SLURM_CONF": str(folder / "s" / "slurm.conf"), "MEDGEN_RUNS": str(work / "runs"), "PATH": f"{_counters(work)}:{os.environ['PATH']}"}
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "medgen", "submit", "scale.yaml", "--site", "lab.yaml"], cwd=work, env=environment, check=True, capture_output=True)
    seconds = time.monotonic() - started
    calls = Counter((work / "calls").read_text().split())
    subprocess.run([sys.executable, "-m", "medgen", "cancel", "scale"], cwd=work, env=environment, check=True, capture_output=True)
    return {"seconds": round(seconds, 2), "calls": dict(sorted(calls.items()))}


def _counters(folder: Path) -> Path:
    counters = folder / "bin"
    counters.mkdir()
    for command in COMMANDS:
        path = counters / command
        path.write_text(f'#!/bin/bash\necho {command} >> {folder}/calls\nexec {shutil.which(command)} "$@"\n')
        path.chmod(0o755)
    return counters
