"""The attempts of each task, from the events of a run. Used by both backends and by watch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from medgen.rundir import RunDir

History = dict[tuple[str, int], "list[Attempt]"]


@dataclass(frozen=True)
class Attempt:
    """One start of one task. `ended` is None while it runs; `status` stays None if nobody was there to see it end."""

    attempt: int
    started: float  # unix seconds
    devices: int
    from_step: int  # where it resumed
    ended: float | None = None
    status: str | None = None
    cause: str | None = None
    comes_back: bool = False

    def span(self, now: float) -> tuple[float, float]:
        return self.started, max(self.started, now if self.ended is None else self.ended)

    def seconds(self, now: float) -> float:
        start, end = self.span(now)
        return end - start


def read_history(events: Iterable[dict[str, Any]]) -> History:
    """(stage, shard) -> its attempts in order."""
    history: History = {}
    for event in events:
        kind = event["event"]
        if kind == "task_started":
            attempts = history.setdefault((event["stage"], event["shard"]), [])
            attempts.append(Attempt(event["attempt"], event["time"], event["devices"], event["from_step"]))
        if kind == "task_ended" and (event["stage"], event["shard"]) in history:
            attempts = history[event["stage"], event["shard"]]
            last = attempts[-1]
            # not `replace`, which takes ten times as long: there may be 10,000
            ended = ending(last.started, event)
            attempts[-1] = Attempt(last.attempt, last.started, last.devices, last.from_step, ended, event["status"], event["cause"], event["again"])
        if kind == "requeue_refused" and (event["stage"], event["shard"]) in history:
            attempts = history[event["stage"], event["shard"]]
            attempts[-1] = replace(attempts[-1], comes_back=False)
    return history


def ending(started: float, event: dict[str, Any]) -> float:
    """When an attempt ended, unix seconds, from its `task_ended`; by the clock of its start where that was set back meanwhile.

    Not after the event itself: the script had begun, and counts from there, before it could tell."""
    by_duration: float = started + event["seconds"]
    return by_duration if event["time"] < started else min(by_duration, event["time"])


def close_lost(run: RunDir, history: History) -> dict[tuple[str, int], Attempt]:
    """With no supervisor alive, an attempt without an end was lost: it counts up to its last heartbeat.

    Changes `history` and returns the lost ones."""
    lost = {}
    for (stage, shard), attempts in history.items():
        last = attempts[-1]
        if last.ended is None:
            beat = run.read_heartbeat(stage, shard)
            seen = beat.time if beat is not None and beat.attempt == last.attempt else last.started
            lost[stage, shard] = attempts[-1] = replace(last, ended=max(seen, last.started))
    return lost


def seconds_busy(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: time in which at least one of them ran."""
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
