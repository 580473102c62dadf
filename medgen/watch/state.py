"""The state of a run, read from its folder: outcomes first, then heartbeats, then the backend. Writes nothing.

Called by view.py and by anything that wants `medgen watch --json`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medgen import plan
from medgen.launch.backend import guilty_log, tail
from medgen.launch.history import Attempt, close_lost, read_history, seconds_busy
from medgen.launch.supervisor import Supervisor, living_supervisor
from medgen.plan import Plan, PlannedStage, Task
from medgen.rundir import Heartbeat, Outcome, RunDir

STALE_SECONDS = 60  # a heartbeat is written every few seconds
LAST_LINES = 12

Word = Literal["pending", "running", "stalled", "done", "failed", "interrupted", "blocked"]
Verdict = Literal["not started", "running", "stopping", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class TaskState:
    """One task. `seconds`: its last attempt; `age_seconds`: of its heartbeat; `log`: the guilty one after a failure."""

    shard: int
    word: Word
    attempt: int | None
    step: int
    total: int
    unit: str
    loss: float | None
    seconds: float
    age_seconds: float | None
    eta_seconds: float | None
    cause: str | None
    log: str | None
    last_lines: list[str]

    @property
    def fraction(self) -> float:
        if self.word == "done":
            return 1.0
        return min(1.0, self.step / self.total) if self.total else 0.0


@dataclass(frozen=True)
class StageState:
    """One stage. `fraction` in [0, 1]; `seconds`: time in which at least one task ran; `waits_for`: unfinished needs."""

    name: str
    kind: str
    word: Word
    counts: dict[str, int]
    fraction: float
    seconds: float
    device_hours: float
    eta_seconds: float | None
    waits_for: list[str]
    tasks: list[TaskState]


@dataclass(frozen=True)
class RunState:
    """A whole run at one moment. `where`: who runs it now, None if nobody does."""

    run_id: str
    name: str
    path: str
    verdict: Verdict
    where: str | None
    seconds: float
    device_hours: float
    device_word: str
    created: float | None
    changed: float | None
    stages: list[StageState]

    @property
    def fraction(self) -> float:
        return sum(stage.fraction for stage in self.stages) / len(self.stages)


@dataclass(frozen=True)
class _Reading:
    """Everything read once for one state."""

    run: RunDir
    plan: Plan
    supervisor: Supervisor | None
    attempts: dict[tuple[str, int], list[Attempt]]
    now: float


def read_state(run: RunDir) -> RunState:
    """Raises InputError if the folder is no run."""
    planned = plan.read(run)
    # asked before the events are read: a supervisor that ends in between has by then told everything
    supervisor = living_supervisor(run)
    events = run.events()
    history = read_history(events)
    if supervisor is None:
        close_lost(run, history)
    reading = _Reading(run, planned, supervisor, history, time.time())
    stages: list[StageState] = []
    for stage in planned.stages:
        stages.append(_stage(reading, stage, {item.name: item.word for item in stages}))
    spans = [item.span(reading.now) for attempts in history.values() for item in attempts]
    on_gpu = any(stage.gpus_per_node for stage in planned.stages)
    return RunState(
        run_id=planned.run_id,
        name=planned.name,
        path=str(run.root),
        verdict=_verdict(stages, supervisor, events),
        where=str(supervisor) if supervisor else None,
        seconds=seconds_busy(spans),
        device_hours=sum(stage.device_hours for stage in stages),
        device_word="GPU-hours" if on_gpu else "process-hours",
        created=events[0]["time"] if events else None,
        changed=events[-1]["time"] if events else None,
        stages=stages,
    )


def _verdict(stages: list[StageState], supervisor: Supervisor | None, events: list[dict[str, Any]]) -> Verdict:
    words = {stage.word for stage in stages}
    if words == {"done"}:
        return "done"
    last = next((event["event"] for event in reversed(events) if event["event"] in ("submitted", "stopping")), None)
    if supervisor is not None and last == "stopping":
        return "stopping"
    if supervisor is not None or words & {"running", "stalled"}:
        return "running"
    if "failed" in words:
        return "failed"
    return "interrupted" if any(event["event"] == "task_started" for event in events) else "not started"


def _stage(reading: _Reading, stage: PlannedStage, words: dict[str, Word]) -> StageState:
    waits_for = [name for name in stage.needs if words[name] != "done"]
    stuck = [name for name in waits_for if words[name] in ("failed", "blocked")]
    tasks = [_task(reading, stage, task, bool(stuck)) for task in stage.tasks]
    counts = Counter(task.word for task in tasks)
    attempts = [item for task in stage.tasks for item in reading.attempts.get((stage.name, task.shard), [])]
    return StageState(
        name=stage.name,
        kind=stage.kind,
        word=_stage_word(counts, len(tasks)),
        counts={str(word): number for word, number in counts.items()},
        fraction=sum(task.fraction for task in tasks) / len(tasks),
        seconds=seconds_busy([item.span(reading.now) for item in attempts]),
        device_hours=_device_hours(reading, stage, attempts),
        eta_seconds=_stage_eta(stage, tasks),
        waits_for=_nearest(reading.plan, stuck or waits_for),
        tasks=tasks,
    )


def _nearest(planned: Plan, names: list[str]) -> list[str]:
    """Without those that another of them waits for anyway."""

    def ancestors(name: str) -> set[str]:
        needs = planned.stage(name).needs
        return {*needs, *(above for needed in needs for above in ancestors(needed))}

    implied = {above for name in names for above in ancestors(name)}
    return [name for name in names if name not in implied]


def _stage_word(counts: Counter[Word], tasks: int) -> Word:
    if counts["done"] == tasks:
        return "done"
    order: tuple[Word, ...] = ("stalled", "running", "failed", "blocked", "interrupted")
    return next((word for word in order if counts[word]), "pending")


def _task(reading: _Reading, stage: PlannedStage, task: Task, stuck: bool) -> TaskState:
    run = reading.run
    outcome = run.read_outcome(task.stage, task.shard)
    if outcome is not None and outcome.task_hash != task.hash:
        outcome = None
    attempts = reading.attempts.get((task.stage, task.shard), [])
    last = attempts[-1] if attempts else None
    beat = run.read_heartbeat(task.stage, task.shard)
    if beat is not None and last is not None and beat.attempt < last.attempt:
        beat = None  # of an earlier attempt
    word, cause = _word(reading, task, outcome, last, beat, stuck)
    log, lines = None, []
    if word in ("failed", "stalled") and last is not None:
        path = guilty_log(run, task.stage, task.shard, last.attempt)
        log, lines = str(path), tail(path, LAST_LINES)
    age_seconds = reading.now - beat.time if beat else None
    eta = _task_eta(beat, last, reading.now) if word == "running" else None
    return TaskState(
        shard=task.shard,
        word=word,
        attempt=last.attempt if last else (beat.attempt if beat else None),
        step=beat.step if beat else 0,
        total=beat.total if beat else 0,
        unit=beat.unit if beat else "",
        loss=beat.loss if beat else None,
        seconds=last.seconds(reading.now) if last else 0.0,
        age_seconds=age_seconds,
        eta_seconds=eta,
        cause=cause,
        log=log,
        last_lines=lines,
    )


def _word(
    reading: _Reading, task: Task, outcome: Outcome | None, last: Attempt | None, beat: Heartbeat | None, stuck: bool
) -> tuple[Word, str | None]:
    """The truth order: a verified outcome, then signs of life, then how the last attempt ended."""
    if outcome is not None and reading.run.is_done(task.stage, task.shard, task.hash):
        return "done", None
    ended = last is not None and last.status is not None
    told = outcome is not None and (last is None or outcome.attempt >= last.attempt)
    beats = beat is not None and reading.now - beat.time <= STALE_SECONDS
    if reading.supervisor is not None and last is not None and not ended:
        if beat is None or beats:  # before its first heartbeat a task imports and reads data
            return "running", None
        return "stalled", f"no heartbeat for {reading.now - beat.time:.0f} s"
    if beats and not ended and not told:  # started by hand, or on another machine
        return "running", None
    if last is not None and last.comes_back and reading.supervisor is not None:
        return "pending", None
    if last is not None and ended:
        return _word_of_ending(last, outcome)
    if outcome is not None and told:
        return ("failed" if outcome.status == "failed" else "interrupted"), outcome.cause
    if last is not None:
        return "interrupted", "its supervisor ended without a word"
    return ("blocked" if stuck else "pending"), None


def _word_of_ending(last: Attempt, outcome: Outcome | None) -> tuple[Word, str | None]:
    if last.status == "interrupted":
        return "interrupted", last.cause
    if last.status == "done":
        return "failed", "its files are missing or were changed since; submit again to make them again"
    return "failed", (outcome.cause if outcome and outcome.attempt == last.attempt else None) or last.cause


def _task_eta(beat: Heartbeat | None, last: Attempt | None, now: float) -> float | None:
    """From the mean speed of this attempt; None before there is one."""
    if beat is None or last is None or beat.step <= last.from_step or beat.time <= last.started:
        return None
    seconds_per_step = (beat.time - last.started) / (beat.step - last.from_step)
    return max(0.0, (beat.total - beat.step) * seconds_per_step - (now - beat.time))


def _stage_eta(stage: PlannedStage, tasks: list[TaskState]) -> float | None:
    """One task: its own. Several: what is left, at the mean time of the finished ones, on as many as run now."""
    running = [task for task in tasks if task.word == "running"]
    if not running:
        return None
    if len(tasks) == 1:
        return running[0].eta_seconds
    finished = [task.seconds for task in tasks if task.word == "done" and task.seconds > 0]
    if finished:
        each = sum(finished) / len(finished)
        return sum(1 - task.fraction for task in tasks) * each / len(running)
    known = [task.eta_seconds for task in running if task.eta_seconds is not None]
    waves = -(-sum(task.word == "pending" for task in tasks) // len(running)) + 1
    return max(known) * waves if known else None


def _device_hours(reading: _Reading, stage: PlannedStage, attempts: list[Attempt]) -> float:
    """All attempts, failed ones included; tasks started by hand have only their outcome."""
    total = sum(item.devices * item.seconds(reading.now) for item in attempts) / 3600
    for task in stage.tasks:
        outcome = reading.run.read_outcome(task.stage, task.shard)
        if outcome is not None and (task.stage, task.shard) not in reading.attempts:
            total += max(outcome.devices, stage.devices) * (outcome.ended - outcome.started) / 3600
    return total


def to_json(state: RunState) -> dict[str, Any]:
    return asdict(state)
