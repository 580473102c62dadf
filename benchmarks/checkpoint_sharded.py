"""What a checkpoint of 2 billion bf16 parameters costs: one file, and sharded over two ranks, over plain copying of the same bytes.

Every phase runs in fresh processes that tell their own peak memory. Copying is a loop over blocks with fsync, without hashing,
and reading the copy back; the page cache is warm in all, so loads and verifications are those of a resume on the same node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from medgen import room
from medgen.launch.ports import job_id_with_free_port
from medgen.launch.script import FIRST_PORT, PORTS

COLUMNS = 4096
ROWS = [300_000, *[25_000] * 8]  # of each tensor; the first alone has more bytes than one write() of Linux takes
PARAMETERS = COLUMNS * sum(ROWS)
RANKS = 2

WORKER = """
import json, os, resource, sys, time
from pathlib import Path
import torch
from medgen import checkpoint, commits, dist, files
what, folder, columns, *rows = sys.argv[1], Path(sys.argv[2]), *(int(word) for word in sys.argv[3:])

def whole_tensors():
    return {f"layer{number}": torch.full((count, columns), number + 0.5, dtype=torch.bfloat16) for number, count in enumerate(rows)}

def sharded_tensors(ranks):
    from torch.distributed.tensor import Shard, init_device_mesh, DTensor
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    def part(number, count):
        local = torch.full((count // ranks.world_size, columns), number + 0.5, dtype=torch.bfloat16)
        return DTensor.from_local(local, mesh, [Shard(0)])
    return {f"layer{number}": part(number, count) for number, count in enumerate(rows)}

def copy():
    source = memoryview(bytearray(files.CHUNK_BYTES))
    with open(folder / "copy", "wb") as handle:
        for _ in range(2 * columns * sum(rows) // files.CHUNK_BYTES):
            handle.write(source)
        handle.flush()
        os.fsync(handle.fileno())

def read_back():
    with open(folder / "copy", "rb") as handle:
        while handle.readinto(buffer):
            pass

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with dist.joined_ranks(threads=1) as ranks:
    value, buffer = None, bytearray(files.CHUNK_BYTES)
    if what in ("save", "load") and ranks.world_size > 1:
        value = sharded_tensors(ranks)
    elif what == "save":
        value = whole_tensors()
    before = peak()
    dist.barrier(ranks)
    started = time.perf_counter()
    if what == "copy":
        copy()
    elif what == "read":
        read_back()
    elif what == "save":
        checkpoint.save(folder, 1, {"network": value}, {}, {}, ranks)
    elif what == "verify":
        assert checkpoint.problem_with(folder / "step-000001") is None
    else:
        saved = commits.read(folder / "step-000001")
        loaded = checkpoint.Checkpoint(**vars(saved)).tensors("network", like=value)
    seconds = time.perf_counter() - started
    if what == "load":
        locals_ = [tensor.to_local() if value else tensor for tensor in loaded.values()]
        assert all(bool((tensor[[0, -1]] == number + 0.5).all()) for number, tensor in enumerate(locals_))
    dist.barrier(ranks)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak(), "added_bytes": peak() - before}))
"""


def _phase(what: str, folder: Path, ranks: int = 1) -> dict[str, float]:
    """Of the slowest rank, and of the one with the most memory."""
    command = [sys.executable, "-c", WORKER, what, str(folder), str(COLUMNS), *map(str, ROWS)]
    common = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(FIRST_PORT + job_id_with_free_port() % PORTS)}
    started = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True) for rank in range(ranks)]
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {name: max(item[name] for item in told) for name in told[0]}


def _kind(folder: Path, ranks: int, copied: dict[str, float], read: dict[str, float]) -> dict[str, Any]:
    """Save by `ranks`; verify by one; load into as many, and whole into one process."""
    folder.mkdir()
    save, verify = _phase("save", folder, ranks), _phase("verify", folder)
    loads = {"load": _phase("load", folder, ranks)} | ({"load_whole_by_one": _phase("load", folder)} if ranks > 1 else {})
    files_written = [path for path in folder.rglob("*") if path.is_file()]
    facts = {"files": len(files_written), "gigabytes": round(sum(path.stat().st_size for path in files_written) / 1e9, 2)}
    for name, phase in {"save": save, "verify": verify, **loads}.items():
        plain = copied if name == "save" else read
        facts[name] = {"seconds": round(phase["seconds"], 2), "over_plain": round(phase["seconds"] / plain["seconds"], 2),
                       "added_gigabytes_per_rank": round(phase["added_bytes"] / 1e9, 2), "peak_gigabytes_per_rank": round(phase["peak_bytes"] / 1e9, 2)}
    return facts


def run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        folder = Path(name)
        copied, read = _phase("copy", folder), _phase("read", folder)
        (folder / "copy").unlink()
        record: dict[str, Any] = {"parameters": PARAMETERS, "dtype": "bfloat16", "tensors": len(ROWS), "largest_tensor_bytes": 2 * COLUMNS * max(ROWS), "file_system": room.mount_of(folder)[0], "load_average_before": os.getloadavg()[0],
                                  "plain_write_with_fsync_seconds": round(copied["seconds"], 2), "plain_read_seconds": round(read["seconds"], 2)}
        record["one_file"] = _kind(folder / "one", 1, copied, read)
        subprocess.run(["rm", "-r", str(folder / "one")], check=True)
        record["sharded_over_2"] = _kind(folder / "sharded", RANKS, copied, read)
        return record
