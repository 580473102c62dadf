"""The frame of one trial: its device, its checkpoints, and the one file that it leaves. Used by utility, structure and collect."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medgen import files
from medgen.errors import MedgenError
from medgen.plan import PlannedStage
from medgen.task import Done, Work

if TYPE_CHECKING:
    import torch

Record = dict[str, Any]


@contextmanager
def on_its_device(work: Work) -> Iterator[torch.device]:
    import torch

    from medgen import dist

    with dist.joined_ranks(work.stage.threads) as ranks:
        work.device_name = ranks.device_name
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield ranks.device


def finished(work: Work) -> Done | None:
    """What an earlier attempt has left that was cut before it could tell; None if the trial is still to be run."""
    record = _read(work, work.stage, work.task.shard)
    if record is None:
        return None
    work.say(f"{work.stage.name}: the result of trial {work.task.shard} is there and verifies; kept")
    return _done(work, record["steps"])


def finish(work: Work, record: Record, steps: int) -> Done:
    """Write the result; the checkpoints have served."""
    whole = {"version": 1, "task_hash": work.task.hash, "made_on": work.device_name, "steps": steps, **record}
    files.write_json(work.run.task_result(work.stage.name, work.task.shard), files.with_own_hash(whole))
    return _done(work, steps)


def _done(work: Work, steps: int) -> Done:
    shutil.rmtree(work.run.trial(work.stage.name, work.task.shard), ignore_errors=True)
    return Done([work.run.task_result(work.stage.name, work.task.shard)], {"steps": steps})


def _read(work: Work, stage: PlannedStage, shard: int) -> Record | None:
    """None unless the result is there, whole, and of exactly this task."""
    try:
        record: Record = files.read_json(work.run.task_result(stage.name, shard))
        return record if files.own_hash_holds(record) and record["task_hash"] == stage.tasks[shard].hash else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_all(work: Work, stage: PlannedStage) -> list[Record]:
    """The results of all trials of a stage. Raises MedgenError naming those that are missing or damaged; they count as not done."""
    work.await_done(stage)
    records = {task.shard: _read(work, stage, task.shard) for task in stage.tasks}
    bad = [shard for shard, record in records.items() if record is None]
    for shard in bad:
        work.run.outcome_file(stage.name, shard).unlink(missing_ok=True)
        work.run.event("outcome_withdrawn", stage=stage.name, shard=shard, cause=f"{work.run.task_result(stage.name, shard)} is missing or damaged")
    if bad:
        raise MedgenError(f"{len(bad)} of {len(stage.tasks)} trials of {stage.name} are missing or damaged and must be run again: {', '.join(map(str, bad[:10]))}")
    return [record for record in records.values() if record is not None]
