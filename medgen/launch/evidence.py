"""Everything that the run folder tells of how one attempt ended, for causes.py. Used by after.py in the job and by watch/why.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medgen import room
from medgen.launch.backend import guilty_log, last_lines
from medgen.launch.causes import Records
from medgen.launch.slurm import AccountingRow
from medgen.launch.tries import Try, batch_section, read_end
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

LAST_LINES = 200
RECORD_BYTES = 64 * 1024  # the outcome of a shard, and a log


def gather(run: RunDir, plan: Plan, stage: PlannedStage, item: Try, rank_causes: Iterable[str], row: AccountingRow | None, on_slurm: bool, cancelled: bool) -> Records:
    """`row`: of the accounting, None if nobody asked it; `cancelled`: a person ended the run meanwhile."""
    outcome = run.read_outcome(item.stage, item.shard)
    log = guilty_log(run, item.stage, item.shard, item.attempt)
    is_batch = log == run.batch_log(item.stage, item.shard)  # the rank's own is empty
    return Records(
        item=item,
        stage_kind=stage.kind,
        limit_seconds=stage.limit_seconds,
        grace_seconds=plan.place.grace_seconds,
        on_slurm=on_slurm,
        outcome=outcome if outcome is not None and outcome.attempt == item.attempt and item.told else None,
        rank_causes=tuple(rank_causes),
        batch=batch_section(run, item.stage, item.shard, item.attempt),
        rank_log="batch log" if is_batch else f"log {log.name}",
        rank_lines=() if is_batch else tuple(last_lines(read_end(log), LAST_LINES)),
        row=row,
        cancelled=cancelled,
        no_room=_without_room(run.root),
    )


def _without_room(folder: Path) -> str | None:
    """The folder, if its disk has no room to write down how something ended."""
    try:
        free = room.on_disk(folder)
    except OSError:
        return None
    return str(folder) if free.bytes < RECORD_BYTES or free.files == 0 else None


def rank_causes(events: Iterable[dict[str, Any]]) -> dict[tuple[Any, Any, Any], list[str]]:
    """(stage, shard, attempt) -> what its ranks other than the first told."""
    found: dict[tuple[Any, Any, Any], list[str]] = {}
    for event in events:
        if event["event"] == "rank_failed":
            found.setdefault((event.get("stage"), event.get("shard"), event.get("attempt")), []).append(str(event.get("cause")))
    return found
