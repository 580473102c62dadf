"""A stand-in for the stage verbs: real outcomes, heartbeats and signals, no work. Used by test_launch* and test_watch*.

`behaviour.json` in the run folder says what each stage does; `build` makes a run folder with such stages."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent


def main(arguments: list[str]) -> int:
    from medgen import plan
    from medgen.rundir import Heartbeat, Outcome, RunDir

    kind, root = arguments[1], Path(arguments[2])
    options = dict(zip(arguments[3::2], arguments[4::2], strict=True))
    name, shard, attempt = options["--stage"], int(options["--shard"]), int(options["--attempt"])
    rank = int(os.environ["SLURM_PROCID"])
    run = RunDir(root)
    task = plan.read(run).stage(name).tasks[shard]
    behaviour = json.loads((root / "behaviour.json").read_text()).get(name, {})
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: stopped.append(received))
    with (root / "calls.txt").open("a") as calls:
        calls.write(f"{name} {shard} {attempt} {rank} {os.getpid()}\n")
    print(f"{kind} {name} shard {shard} rank {rank} env", json.dumps({key: os.environ.get(key) for key in behaviour.get("env", [])}), flush=True)
    started = time.time()

    def end(status: str, cause: str | None, code: int) -> int:
        made = run.shard(name, shard) / "image.bin" if kind == "generate" else run.stage(name) / "made.bin"
        if rank == 0:
            produced = []
            if status == "done":
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_bytes(task.hash.encode())
                produced = [run.produced(made)]
            run.write_outcome(Outcome(run.run_id, name, shard, task.hash, attempt, status, cause, "here", "cpu", 1, started, time.time(), produced))  # type: ignore[arg-type]
        return code

    if behaviour.get("child"):
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "300")
    total = behaviour.get("steps", 1)
    for step in range(total):
        if rank == 0:
            run.write_heartbeat(Heartbeat(name, shard, attempt, step, total, "steps", 0.5, time.time(), "here", os.getpid()))
        time.sleep(behaviour.get("seconds", 0) / total)
        if stopped and not behaviour.get("deaf"):
            return end("interrupted", f"stopped by {signal.Signals(stopped[0]).name}", 3)
    if kind == "collect" and attempt < behaviour.get("send_back", 0):
        run.outcome_file(behaviour["of"], 1).unlink()
        return end("failed", "shard 1 is corrupt", 1)
    if rank in behaviour.get("crash_ranks", [0]) and shard in behaviour.get("crash_shards", [0]) and attempt < behaviour.get("crashes", 0):
        print("ValueError: the stub was told to crash", flush=True)
        return 1
    if attempt < behaviour.get("told_failures", 0):
        return end("failed", "the stub cannot do it", behaviour.get("code", 1))
    if rank in behaviour.get("hanging_ranks", []):
        time.sleep(300)
    if behaviour.get("silent"):
        return 0
    return end("done", None, 0)


def build(root: Path, stages: list[dict[str, Any]], behaviour: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A run folder and its plan. A stage: name, kind, needs, tasks, ranks, threads, gpus, parallel, of."""
    from medgen import files, plan
    from medgen.plan import PLAN_VERSION, Place, Plan, PlannedStage, Shard, Task
    from medgen.rundir import RunDir

    run = RunDir(root / "stub-0123456789")
    planned = []
    for stage in stages:
        count = stage.get("tasks", 1)
        generates = stage["kind"] == "generate"
        tasks = [Task(stage["name"], number, f"{stage['name']}{number}", Shard(number, number + 1) if generates else None) for number in range(count)]
        planned.append(
            PlannedStage(
                stage["name"], stage["kind"], stage.get("needs", []), 1, stage.get("ranks", 1), stage.get("gpus", 0), stage.get("threads", 1),
                60, None, stage.get("parallel", count), stage.get("segments", 1), stage.get("chain", 1), stage.get("launcher", "srun"), [], [], stage.get("directives", []), [],
                {"of": stage["of"]} if "of" in stage else {}, tasks,
            )
        )  # fmt: skip
    place = Place("local", [], [], None, 180, {"mail": None, "webhook": None, "command": None, "on": []}, 600)
    made = Plan(PLAN_VERSION, run.run_id, "stub", 42, "local", place, {}, planned)
    files.write_json(run.plan, plan.to_json(made))
    files.write_json(run.root / "behaviour.json", behaviour or {})
    return run, made


def create_run(spec_path: Path, overrides: Sequence[str] = (), runs: Path | None = None) -> tuple[Any, Any]:
    """The run folder that `submit --local` makes before it starts anything, and its plan."""
    from medgen.launch.submit import create, prepare

    [prepared] = prepare(spec_path, overrides, None, runs or spec_path.parent / "runs", True)
    create(prepared)
    return prepared.run, prepared.plan


def interpreter(folder: Path) -> str:
    """An executable that job scripts call like python and that runs this file."""
    path = folder / "stub-python"
    path.write_text(f'#!/bin/bash\nPYTHONPATH={REPOSITORY}:$PYTHONPATH exec "{sys.executable}" "{__file__}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def calls(run: Any) -> list[tuple[str, int, int, int]]:
    """(stage, shard, attempt, rank) of every start, in order."""
    path = run.root / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name, int(shard), int(attempt), int(rank)) for name, shard, attempt, rank, _ in (line.split() for line in lines)]


def events(run: Any, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == kind]


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def outcome_record(run: Any, stage: str, shard: int = 0) -> dict[str, Any]:
    outcome = run.read_outcome(stage, shard)
    assert outcome is not None
    return asdict(outcome)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
