"""Every start of every task: from the events, and those that only a log shows because the set-up failed. Used by both backends and by watch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from medgen.launch.backend import next_attempt
from medgen.rundir import RunDir

HEADER = re.compile(r"^medgen: \S+ shard (?P<shard>\d+) attempt (?P<attempt>\d+) on (?P<node>\S+) at (?P<time>\S+)$", re.MULTILINE)
TAIL_BYTES = 256 * 1024  # of a batch log: a job requeued for weeks has a long one

Event = dict[str, Any]
Key = tuple[str, int]  # stage, shard
Tries = dict[Key, "list[Try]"]  # in order


@dataclass(slots=True)  # frozen ones take four times as long to make, and watch makes 10,000 of them
class Try:
    """One start of one task. `ended` is None while it runs; `status` stays None if nobody saw it end; times in unix seconds.

    `job_id` ("12", "12_3") and `node` are "" where nobody told; `told` is False if only a log shows that it began."""

    stage: str
    shard: int
    attempt: int
    started: float
    devices: int
    from_step: int  # where it resumed
    job_id: str = ""
    node: str = ""
    segment: int = 0  # its place in a chain of jobs, from 1 on
    ended: float | None = None
    status: str | None = None
    exit_code: int | None = None
    cause: str | None = None
    kind: str | None = None  # a word of causes.Kind
    certain: bool = True  # False if that is but the likeliest reading
    next: str = ""
    comes_back: bool = False
    told: bool = True

    def gave_up_before(self, segment: int) -> bool:
        """True if it ended for good in an earlier job of the chain: a later one would end no better."""
        return self.status in ("failed", "refused") and not self.comes_back and 0 < self.segment < segment

    def span(self, now: float) -> tuple[float, float]:
        return self.started, max(self.started, now if self.ended is None else self.ended)

    def seconds(self, now: float) -> float:
        start, end = self.span(now)
        return end - start


def read_tries(events: Iterable[Event]) -> Tries:
    """As far as events tell of them."""
    tries: Tries = {}
    for event in events:
        kind = event["event"]
        if kind == "task_started":
            tries.setdefault((event["stage"], event["shard"]), []).append(_begun(event))
        elif kind in ("task_ended", "requeue_refused") and (event["stage"], event["shard"]) in tries:
            item = _meant(tries[event["stage"], event["shard"]], event)
            if kind == "task_ended":
                _end(item, event)
            else:
                item.comes_back = False
    return tries


def _begun(event: Event) -> Try:
    """A local supervisor tells neither job nor node."""
    return Try(
        event["stage"], event["shard"], event["attempt"], event["time"], event["devices"], event["from_step"],
        str(event.get("job_id", "")), str(event.get("node", event.get("host", ""))), event.get("segment", 0),
    )  # fmt: skip


def _meant(items: list[Try], event: Event) -> Try:
    """The last start with the number that the event tells, else the last one."""
    for item in reversed(items):
        if item.attempt == event.get("attempt"):
            return item
    return items[-1]


def _end(item: Try, event: Event) -> None:
    """It ended no later than the event: the script had begun, and counts from there, before it could tell. By the clock of its
    start where that was set back meanwhile."""
    by_duration: float = item.started + event["seconds"]
    item.ended = by_duration if event["time"] < item.started else min(by_duration, event["time"])
    item.status, item.exit_code, item.next, item.comes_back = event["status"], event.get("rc"), event["next"], event["again"]
    item.cause, item.kind, item.certain = event["cause"], event.get("cause_kind"), event.get("cause_certain") is not False


def last_seen(run: RunDir, item: Try) -> float:
    """When an attempt ended, unix seconds; one that nobody saw the end of counts up to its last heartbeat."""
    if item.ended is not None:
        return item.ended
    beat = run.read_heartbeat(item.stage, item.shard)
    return max(item.started, beat.time) if beat is not None and beat.attempt == item.attempt else item.started


def close_lost(run: RunDir, tries: Tries) -> list[Try]:
    """With no supervisor alive, an attempt without an end was lost. Changes `tries` and returns the lost ones."""
    lost = []
    for items in tries.values():
        if items[-1].ended is None:
            items[-1] = replace(items[-1], ended=last_seen(run, items[-1]))
            lost.append(items[-1])
    return lost


def seconds_busy(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: time in which at least one of them ran."""
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


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
