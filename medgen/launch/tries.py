"""Every start of every task with all that the run folder tells of it, failed and forgotten ones too. Used by logs, why and usage.

More than launch/history.py keeps: exit code, job, node, and starts that no event tells of because the set-up failed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from medgen.launch.backend import next_attempt
from medgen.launch.history import ending
from medgen.rundir import RunDir

HEADER = re.compile(r"^medgen: \S+ shard (?P<shard>\d+) attempt (?P<attempt>\d+) on (?P<node>\S+) at (?P<time>\S+)$", re.MULTILINE)
TAIL_BYTES = 256 * 1024  # of a batch log: a job requeued for weeks has a long one

Key = tuple[str, int]  # stage, shard


@dataclass(frozen=True)
class Try:
    """One start of one task. `ended` and `status` are None while it runs, or if nobody saw it end; times in unix seconds.

    `job_id` ("12", "12_3") and `node` are "" where nobody told; `told` is False if only a log shows that it began."""

    stage: str
    shard: int
    attempt: int
    started: float
    devices: int
    from_step: int
    job_id: str = ""
    node: str = ""
    ended: float | None = None
    status: str | None = None
    exit_code: int | None = None
    cause: str | None = None
    kind: str | None = None  # a word of causes.Kind
    certain: bool = True  # False if that is but the likeliest reading
    next: str = ""
    comes_back: bool = False
    told: bool = True
    segment: int = 0  # its place in a chain of jobs, from 1 on

    def gave_up_before(self, segment: int) -> bool:
        """True if it ended for good in an earlier job of the chain: a later one would end no better."""
        return self.status in ("failed", "refused") and not self.comes_back and 0 < self.segment < segment


def read_tries(events: Iterable[dict[str, Any]]) -> dict[Key, list[Try]]:
    """(stage, shard) -> its starts in order, as far as events tell of them."""
    found: dict[Key, list[Try]] = {}
    for event in events:
        kind = event["event"]
        if kind == "task_started":
            found.setdefault((event["stage"], event["shard"]), []).append(
                Try(
                    event["stage"], event["shard"], event["attempt"], event["time"], event["devices"], event["from_step"],
                    str(event.get("job_id", "")), str(event.get("node", event.get("host", ""))),  # a local supervisor tells neither
                    segment=event.get("segment", 0),
                )
            )
        elif kind == "task_ended":
            _end(found.get((event["stage"], event["shard"]), []), event)
    return found


def _end(tries: list[Try], event: dict[str, Any]) -> None:
    """Put the end where it belongs: to the start with its number, else to the last one."""
    places = [place for place, item in enumerate(tries) if item.attempt == event.get("attempt")] or list(range(len(tries)))
    if places:
        begun = tries[places[-1]]
        ended = ending(begun.started, event)
        tries[places[-1]] = replace(
            begun, ended=ended, status=event["status"], exit_code=event.get("rc"), cause=event["cause"], kind=event.get("cause_kind"),
            certain=event.get("cause_certain") is not False, next=event["next"], comes_back=event["again"],
        )  # fmt: skip


def all_tries(run: RunDir, stage: str, shard: int, told: list[Try]) -> list[Try]:
    """With those that only their log shows: a failed set-up ends a script before it can tell of itself."""
    known = {item.attempt for item in told}
    missing = [number for number in range(next_attempt(run, stage, shard)) if number not in known]
    if not missing:
        return told
    headers = {int(match["attempt"]): match for match in HEADER.finditer(batch_text(run, stage, shard))}
    extra = []
    for number in missing:
        header = headers.get(number)
        began = _unix_seconds(header["time"]) if header else None
        extra.append(Try(stage, shard, number, began or run.log(stage, shard, 0, number).stat().st_mtime, 0, 0, node=header["node"] if header else "", told=False))
    return sorted([*told, *extra], key=lambda item: item.attempt)


def _unix_seconds(text: str) -> float | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None


def batch_text(run: RunDir, stage: str, shard: int) -> str:
    """What the job script of a task printed in all its attempts, and what Slurm said about it; the end of it if it is long."""
    return "".join(read_end(path) for path in _batch_files(run.batch_log(stage, shard), shard))


def _batch_files(log: Path, shard: int) -> list[Path]:
    """Of an array that begins at a later shard, Slurm's own words go to from<first>.<index>.batch.log beside the folders."""
    folder = log.parent.parent
    try:
        elsewhere = _elsewhere(folder, folder.stat().st_mtime_ns)
    except OSError:
        return [log]
    return [log, *elsewhere.get(shard, ())]


@lru_cache(maxsize=8)
def _elsewhere(folder: Path, modified_ns: int) -> dict[int, list[Path]]:
    """Listed once for as long as nothing is added: a stage may have ten thousand shards."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("from*.batch.log")):
        match = re.fullmatch(r"from(\d+)\.(\d+)\.batch\.log", path.name)
        if match:
            found.setdefault(int(match[1]) + int(match[2]), []).append(path)
    return found


def read_end(path: Path) -> str:
    """The last 256 KiB of a text file; "" if it cannot be read."""
    try:
        with path.open("rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - TAIL_BYTES))
            return handle.read().decode(errors="replace")
    except OSError:
        return ""


def batch_section(run: RunDir, stage: str, shard: int, attempt: int) -> str:
    """The part of the batch log that belongs to one attempt; "" if there is none."""
    text = batch_text(run, stage, shard)
    starts = list(HEADER.finditer(text))
    for number, header in enumerate(starts):
        if int(header["attempt"]) == attempt:
            return text[header.start() : starts[number + 1].start() if number + 1 < len(starts) else len(text)]
    return ""
