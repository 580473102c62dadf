"""How fast big plans are made: 64 ranks' worth of shards, and 10,000 shards, through --dry-run --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent


def planned(shards: int, runs: Path) -> float:
    command = [sys.executable, "-m", "medgen", "submit", "jobs/demo.yaml", "--dry-run", "--json",
               f"-ostages.masks.count={shards * 16}", f"-ostages.images.count={shards * 16}", f"-ostages.images.shards={shards}"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "MEDGEN_RUNS": str(runs)}, check=True, capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert len(stages["images"]["tasks"]) == shards
    return elapsed


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"shards_64_seconds": round(planned(64, Path(folder)), 3), "shards_64_limit_seconds": 1.0,
                "shards_10000_seconds": round(planned(10_000, Path(folder)), 3), "shards_10000_limit_seconds": 5.0}
