"""The slice cache: reading from it against reading .nii.gz, and the memory that a second rank adds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medgen.data.phantoms import write_phantoms
from medgen.data.store import open_store
from medgen.spec_data import DataSpec

BATCH = 16

# one rank: touch every slice, tell the memory it shares and the memory it owns, wait to be asked to leave
RANK = """
import sys
from pathlib import Path
import numpy as np
from medgen.data.store import open_store
from medgen.spec_data import DataSpec
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return {name: int(fields[name].split()[0]) * 1024 for name in ("Pss", "Private_Dirty", "Private_Clean", "Rss")}
data = DataSpec.model_validate_json(sys.argv[1])
store = open_store(data, 1, Path(sys.argv[2]), lambda text: None)
before = memory()["Pss"]
total = 0.0
for start in range(0, len(store.rows), 16):
    total += float(store.images("bravo", np.arange(start, min(start + 16, len(store.rows)))).sum())
print("ready", flush=True)
sys.stdin.readline()
print(memory()["Pss"] - before, flush=True)
sys.stdin.readline()
"""


def _speed(data: DataSpec, folder: Path) -> dict[str, Any]:
    store = open_store(data, 1, folder / "cache", lambda text: None)
    generator = np.random.default_rng(1)
    choices = [generator.choice(len(store.rows), BATCH, replace=False) for _ in range(20)]

    start = time.perf_counter()
    for rows in choices:
        for row in rows:
            facts = store.rows.iloc[int(row)]
            np.asarray(nibabel.load(facts.file_bravo).dataobj[..., int(facts.slice)])  # type: ignore[attr-defined]
    from_nifti = time.perf_counter() - start

    start = time.perf_counter()
    for rows in choices:
        store.images("bravo", rows)
    from_cache = time.perf_counter() - start
    return {"slices": len(choices) * BATCH, "nifti_seconds": round(from_nifti, 4), "cache_seconds": round(from_cache, 5),
            "cache_is_faster_by": round(from_nifti / from_cache, 1), "wanted_at_least": 20}


def _memory(data: DataSpec, folder: Path) -> dict[str, Any]:
    def rank() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, data.model_dump_json(exclude_none=True), str(folder / "cache")]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
        assert started.stdout is not None and started.stdout.readline().strip() == "ready"
        return started

    def data_bytes(ranks: list[subprocess.Popen[str]]) -> int:
        found = []
        for one in ranks:
            assert one.stdin is not None and one.stdout is not None
            one.stdin.write("\n")
            one.stdin.flush()
            found.append(int(one.stdout.readline()))
        return sum(found)

    def end(ranks: list[subprocess.Popen[str]]) -> None:
        for one in ranks:
            one.communicate("\n")

    alone = [rank()]
    one = data_bytes(alone)
    end(alone)
    pair = [rank(), rank()]
    two = data_bytes(pair)
    end(pair)
    return {"one_rank_mebibytes": round(one / 2**20, 1), "two_ranks_mebibytes": round(two / 2**20, 1), "two_over_one": round(two / one, 2), "doubling_would_be": 2.0}


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantoms(folder / "data", 24, 1)
        data = DataSpec(root=folder / "data", images={"bravo": "bravo.nii.gz"}, mask="seg.nii.gz", size=128)
        return {"reading": _speed(data, folder), "memory_of_the_data_proportional_set": _memory(data, folder)}
