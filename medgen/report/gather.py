"""The facts of a run as the report tells them: how each stage ended, what it cost, what went wrong, what the logs say.

Used by build.py; reads the run folder only."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from medgen import files
from medgen.plan import Plan, PlannedStage
from medgen.rundir import Outcome, RunDir

TROUBLE = {"rank_failed", "shard_set_aside", "dataset_set_aside", "stage_blocked", "stopping", "stopped", "cancelled", "many_rejected"}
MOST_TROUBLES = 40
GROUPED_BINS = 10


@dataclass(frozen=True)
class Attempt:
    """One start of one task, as far as it is known."""

    shard: int
    number: int
    status: str
    cause: str | None
    started: float  # unix seconds
    ended: float
    devices: int

    @property
    def device_hours(self) -> float:
        return self.devices * (self.ended - self.started) / 3600


@dataclass(frozen=True)
class StageFacts:
    """`status`: done, failed, interrupted, unfinished (some tasks) or not run. `facts` are added up over tasks."""

    name: str
    kind: str
    status: str
    causes: list[str]
    tasks_done: int
    tasks: int
    attempts: list[Attempt]
    facts: dict[str, Any]
    settings: dict[str, Any]

    @property
    def started(self) -> float | None:
        return min((item.started for item in self.attempts), default=None)

    @property
    def ended(self) -> float | None:
        return max((item.ended for item in self.attempts), default=None)

    @property
    def device_hours(self) -> float:
        return sum(item.device_hours for item in self.attempts)


def all_stages(run: RunDir, plan: Plan) -> list[StageFacts]:
    """Every stage of the plan but the report itself, in the order of the plan."""
    ended_events = [event for event in run.events() if event["event"] == "task_ended"]
    return [_stage_facts(run, stage, ended_events) for stage in plan.stages if stage.kind != "report"]


def _stage_facts(run: RunDir, stage: PlannedStage, ended_events: list[dict[str, Any]]) -> StageFacts:
    outcomes = {task.shard: run.read_outcome(stage.name, task.shard) for task in stage.tasks}
    done = sum(run.is_done(stage.name, task.shard, task.hash) for task in stage.tasks)
    known = [outcome for outcome in outcomes.values() if outcome is not None]
    causes = list(dict.fromkeys(outcome.cause for outcome in known if outcome.cause))
    return StageFacts(
        name=stage.name, kind=stage.kind, status=_status(done, len(stage.tasks), known), causes=causes, tasks_done=done,
        tasks=len(stage.tasks), attempts=_attempts(stage.name, known, ended_events), facts=_added_up(known), settings=stage.settings,
    )


def _status(done: int, tasks: int, outcomes: list[Outcome]) -> str:
    if done == tasks:
        return "done"
    for status in ("failed", "interrupted"):
        if any(outcome.status == status for outcome in outcomes):
            return status
    return "unfinished" if outcomes else "not run"


def _attempts(stage: str, outcomes: list[Outcome], ended_events: list[dict[str, Any]]) -> list[Attempt]:
    """Outcomes know the last attempt of a task; earlier ones, and those that died without a word, are in the events."""
    found = {
        (outcome.shard, outcome.attempt): Attempt(
            outcome.shard, outcome.attempt, outcome.status, outcome.cause, outcome.started, outcome.ended, outcome.devices
        )
        for outcome in outcomes
    }
    for event in ended_events:
        needed = {"stage", "shard", "attempt", "status", "cause", "seconds", "devices", "time"}
        if needed <= event.keys() and event["stage"] == stage:
            found.setdefault((event["shard"], event["attempt"]), Attempt(
                event["shard"], event["attempt"], event["status"], event["cause"], event["time"] - event["seconds"], event["time"], event["devices"]
            ))
    return [found[key] for key in sorted(found)]


def _added_up(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts are added over shards; anything else is shown once if all shards agree."""
    facts: dict[str, Any] = {}
    for outcome in outcomes:
        for name, value in outcome.facts.items():
            if name in facts and isinstance(value, int) and not isinstance(value, bool):
                facts[name] += value
            elif name not in facts:
                facts[name] = value
    return facts


@dataclass(frozen=True)
class Trouble:
    """One thing that went wrong, in words."""

    time: float
    where: str
    what: str


def troubles(run: RunDir) -> list[Trouble]:
    """Failures, retries and interruptions from the event log, oldest first."""
    found = []
    for event in run.events():
        failed_task = event["event"] == "task_ended" and event.get("status") != "done"
        if event["event"] in TROUBLE or failed_task:
            found.append(Trouble(event["time"], _where(event), _what(event)))
    return found[-MOST_TROUBLES:]


def _where(event: dict[str, Any]) -> str:
    words = [str(event["stage"])] if "stage" in event else []
    words += [f"{name} {event[name]}" for name in ("shard", "attempt") if name in event]
    return ", ".join(words)


def _what(event: dict[str, Any]) -> str:
    said = event["status"] if "status" in event else event["event"].replace("_", " ")
    told = [str(event[name]) for name in ("cause", "needs", "next") if event.get(name)]
    return ": ".join([str(said), "; ".join(told)] if told else [str(said)])


@dataclass(frozen=True)
class TrainingCurves:
    """What a training log holds, ready to draw."""

    steps: list[float]
    loss: list[float]
    val_steps: list[float]
    val_loss: list[float]
    bins: list[float]  # loss per tenth of the timesteps, mean over the last tenth of the log; empty if not logged
    records: list[dict[str, Any]]  # every line

    def logged(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one scalar where it is a finite number."""
        found = [(record["step"], record[name]) for record in self.records if isinstance(record.get(name), int | float) and math.isfinite(record[name])]
        return [step for step, _ in found], [value for _, value in found]


def training_curves(run: RunDir, stage: str) -> TrainingCurves | None:
    """The curves of a train stage; None without a log."""
    try:
        lines = run.training_log(stage).read_text().splitlines()
    except FileNotFoundError:
        return None
    records = [record for line in lines if (record := _parsed(line)) is not None and "step" in record]
    losses = [record for record in records if "loss" in record]
    validated = [record for record in records if "val_loss" in record]
    return TrainingCurves(
        [record["step"] for record in losses], [record["loss"] for record in losses],
        [record["step"] for record in validated], [record["val_loss"] for record in validated],
        _last_bins(losses), records,
    )


def _last_bins(records: list[dict[str, Any]]) -> list[float]:
    """Mean loss per tenth of the timesteps at the end of training; a line leaves out the tenths that no sample fell into."""
    names = [f"loss_t{number}" for number in range(GROUPED_BINS)]
    for count in (max(1, len(records) // 10), len(records)):  # a short log fills its bins only as a whole
        values = [[record[name] for record in records[-count:] if name in record] for name in names]
        if all(values):
            return [sum(found) / len(found) for found in values]
    return []


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # cut by a kill
        return None
    return record if isinstance(record, dict) else None


def read_metrics(run: RunDir, stage: str) -> dict[str, Any] | None:
    """What evaluate wrote, or None if it has not."""
    try:
        record: dict[str, Any] = files.read_json(run.metrics(stage))
    except (FileNotFoundError, ValueError):
        return None
    return record


def smoothed(values: list[float], window: int) -> list[float]:
    """A running mean over up to `window` earlier values, for the eye."""
    total, result = 0.0, []
    for number, value in enumerate(values):
        total += value
        if number >= window:
            total -= values[number - window]
        result.append(total / min(number + 1, window))
    return result
