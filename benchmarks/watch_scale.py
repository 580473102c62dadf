"""What one `medgen watch --once` of a big Slurm run costs: CPU seconds, and how often Slurm is asked.

12,000 tasks: 10,000 done, 300 running, the rest queued. squeue and sacct are stand-ins that print what Slurm would."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medgen import plan
from medgen.launch.script import Chunk, job_name
from medgen.plan import Place, Plan, PlannedStage, Shard, Task
from medgen.rundir import Heartbeat, Outcome, Produced, RunDir

REPOSITORY = Path(__file__).parent.parent
TASKS, DONE, RUNNING = 12_000, 10_000, 300
FILES = 4  # of each shard, its manifest included
LARGEST_ARRAY = 1_000
ROUNDS = 3


def big_run(root: Path) -> RunDir:
    """A run in the middle of its images."""
    run = RunDir(root / "big-0123456789")
    tasks = [Task("images", shard, f"{shard:016x}", Shard(16 * shard, 16 * shard + 16)) for shard in range(TASKS)]
    stage = PlannedStage("images", "generate", [], 1, 1, 1, 1, 60, None, RUNNING, 1, 1, "srun", [], [], [], [], {}, tasks)
    place = Place("slurm", [], [], None, 180, {"mail": None, "webhook": None, "command": None, "on": []}, 600)
    made = Plan(plan.PLAN_VERSION, run.run_id, "big", 42, "example", place, {}, [stage])
    run.root.mkdir(parents=True)
    run.plan.write_text(json.dumps(plan.to_json(made)))
    now = time.time()
    events: list[dict[str, Any]] = [{"time": now - 90_000, "event": "submitted", "backend": "slurm", "tasks": TASKS, "submission": "1"}]
    for offset in range(0, TASKS, LARGEST_ARRAY):
        name = job_name(run, "images", Chunk(1, offset))
        shards = list(range(offset, offset + LARGEST_ARRAY))
        events.append({"time": now - 90_000, "event": "job_intent", "name": name, "stage": "images", "submission": "1", "offset": offset, "shards": shards})
        events.append({"time": now - 90_000, "event": "job_submitted", "name": name, "job_id": 5000 + offset // LARGEST_ARRAY})
    for shard in range(DONE + RUNNING):
        began = now - 80_000 + 7 * shard
        facts = {"stage": "images", "shard": shard, "attempt": 0, "host": "n1", "job_id": f"{5000 + shard // LARGEST_ARRAY}_{shard % LARGEST_ARRAY}", "node": "n1"}
        events.append({"time": began, "event": "task_started", **facts, "task_hash": tasks[shard].hash, "devices": 1, "from_step": 0, "restart": 0})
        is_done = shard < DONE
        beat = Heartbeat("images", shard, 0, 16 if is_done else 7, 16, "images", None, began + 600 if is_done else now - 3, "n1", 4711, now - 5)
        _write(run.heartbeat_file("images", shard), asdict(beat))
        if is_done:
            events.append({"time": began + 600, "event": "task_ended", **facts, "status": "done", "rc": 0, "cause": None, "seconds": 600.0, "devices": 1, "next": "done", "again": False, "log": "logs/x"})
            _finish(run, shard, tasks[shard].hash, began)
    run.events_file.write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def _finish(run: RunDir, shard: int, task_hash: str, began: float) -> None:
    folder = run.shard("images", shard)
    produced = []
    for number in range(FILES):
        path = folder / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        produced.append(Produced(str(path.relative_to(run.root)), 1, "0" * 64))
    _write(run.outcome_file("images", shard), asdict(Outcome(run.run_id, "images", shard, task_hash, 0, "done", None, "n1", "GPU", 1, began, began + 600, produced)))


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def stand_ins(folder: Path, run: RunDir) -> None:
    """squeue and sacct that print a file and count their calls."""
    now = int(time.time())
    lines = []
    for shard in range(DONE, DONE + RUNNING):
        offset = shard - shard % LARGEST_ARRAY
        lines.append(f"{5000 + offset // LARGEST_ARRAY}|{shard % LARGEST_ARRAY}|RUNNING|None|{now - 600}|{now + 3000}|10:00|{now - 90_000}|n1|{job_name(run, 'images', Chunk(1, offset))}")
    for offset in range(DONE, TASKS, LARGEST_ARRAY):
        first = max(0, DONE + RUNNING - offset)
        lines.append(f"{5000 + offset // LARGEST_ARRAY}|{first}-{LARGEST_ARRAY - 1}%300|PENDING|JobArrayTaskLimit|N/A|N/A|0:00|{now - 90_000}||{job_name(run, 'images', Chunk(1, offset))}")
    folder.mkdir()
    (folder / "answer").write_text("\n".join(lines) + "\n")
    for name in ("squeue", "sacct"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} >> "{folder}/calls"\n' + (f'exec cat "{folder}/answer"\n' if name == "squeue" else ""))
        (folder / name).chmod(0o755)


def watched(run: RunDir, folder: Path) -> tuple[float, float]:
    """CPU and wall seconds of one look, Slurm's stand-ins included."""
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "140"}
    start = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        pid = os.posix_spawn(
            sys.executable, [sys.executable, "-m", "medgen", "watch", str(run.root), "--once"], environment, file_actions=[(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1)]
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 4, "a running run is not finished"
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def calls(folder: Path) -> int:
    return len((folder / "bin" / "calls").read_text().split())


def run() -> dict[str, Any]:
    os.chdir(REPOSITORY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = big_run(folder)
        stand_ins(folder / "bin", made)
        first, _ = watched(made, folder)
        first_calls = calls(folder)
        again = [watched(made, folder) for _ in range(ROUNDS)]
        return {
            "tasks": TASKS, "done": DONE, "running": RUNNING, "files_per_task": FILES,
            "first_look_cpu_seconds": round(first, 3), "first_look_slurm_calls": first_calls,
            "next_look_cpu_seconds": round(min(cpu for cpu, _ in again), 3), "next_look_wall_seconds": round(min(wall for _, wall in again), 3),
            "looks": 1 + ROUNDS, "slurm_calls_of_all_looks": calls(folder), "limit_cpu_seconds": 1.0, "limit_slurm_calls_per_look": 3,
        }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
