"""How fast the command line answers: seconds, and as a multiple of an empty Python."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).parent.parent
REPEATS = 15


def seconds(command: list[str], runs: Path) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "MEDGEN_RUNS": str(runs)}, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return median(times)


def run() -> dict[str, Any]:
    medgen = [sys.executable, "-m", "medgen"]
    with tempfile.TemporaryDirectory() as folder:
        empty = seconds([sys.executable, "-c", "pass"], Path(folder))
        shown = seconds([*medgen, "--help"], Path(folder))
        dry = seconds([*medgen, "submit", "jobs/demo.yaml", "--dry-run"], Path(folder))
    return {
        "empty_python_seconds": round(empty, 4),
        "help_seconds": round(shown, 3), "help_limit_seconds": 0.3, "help_over_empty_python": round(shown / empty, 1),
        "dry_run_seconds": round(dry, 3), "dry_run_limit_seconds": 0.6, "dry_run_over_empty_python": round(dry / empty, 1),
    }
