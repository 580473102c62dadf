"""The state of a run, read from its folder and, where its tasks are jobs of Slurm, from Slurm. Writes nothing into the run.

Called by live.py, by sweep.py and by anything that wants `medgen watch --json`."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from medgen import plan
from medgen.launch.backend import guilty_log, tail
from medgen.launch.life import is_gone
from medgen.launch.supervisor import Supervisor, living_supervisor
from medgen.launch.tries import Tries, Try, close_lost, read_tries, seconds_busy
from medgen.plan import Plan, PlannedStage
from medgen.rundir import Heartbeat, RankBeat, RunDir
from medgen.watch.events import EventLog
from medgen.watch.judge import Facts, Word, on_this_machine
from medgen.watch.outcomes import Left, Outcomes
from medgen.watch.poll import Patient, Source
from medgen.watch.queue_view import QueueView, read_queue_view
from medgen.watch.ranks import to_json as ranks_to_json
from medgen.watch.ranks import unwell_in_words

LAST_LINES = 12
LOGS_READ = 100  # of a stage's failed tasks
FEW_TASKS = 200  # a stage with more does not tell how many steps each finished one made
ON_DEVICES: tuple[Word, ...] = ("running", "stalled", "lost", "suspended")
ALIVE: tuple[Word, ...] = (*ON_DEVICES, "requeued", "queued", "held")
TROUBLED: tuple[Word, ...] = ("failed", "stalled", "lost")

Verdict = Literal["not started", "queued", "running", "stopping", "done", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class TaskState:
    """One task. `seconds`: its last attempt; `age_seconds`: of its heartbeat; `log`: the guilty one after a failure.

    Of a job of Slurm: its number, why it waits in words, when Slurm expects it to start (unix seconds), the node it runs on,
    what its last attempt failed of, and how often it may still fail (None where it has not failed).

    `ranks`: of a running task with several, what each does; `note`: what is not well though it runs, such as a slow rank."""

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
    job: str | None = None
    reason: str | None = None
    starts: float | None = None
    node: str | None = None
    last_cause: str | None = None
    tries_left: int | None = None
    note: str | None = None
    ranks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        if self.word == "done":
            return 1.0
        return min(1.0, self.step / self.total) if self.total else 0.0


@dataclass(frozen=True, slots=True)
class StageState:
    """One stage. `fraction` in [0, 1]; `seconds`: time in which at least one task ran; `waits_for`: those of `needs` that
    are not finished. Both without what another of them needs anyway.

    `reason`: why most of its queued jobs wait; `starts`: when Slurm expects the first of them to start (unix seconds)."""

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
    needs: list[str] = field(default_factory=list)
    reason: str | None = None
    starts: float | None = None


@dataclass(frozen=True, slots=True)
class RunState:
    """A whole run at one moment. `where`: who runs it now, None if nobody does; `silence`: that Slurm does not answer."""

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
    on_slurm: bool = False
    silence: str | None = None

    @property
    def fraction(self) -> float:
        return sum(stage.fraction for stage in self.stages) / len(self.stages)


def read_state(run: RunDir) -> RunState:
    """Raises InputError if the folder is no run. Where Slurm is asked, this may take some seconds."""
    return Reader(run, Patient()).read()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Half the time of a big run went into looking for garbage among what has just been read."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Reader:
    """Reads the same run again and again, and only what has changed: a screen looks twice a second."""

    def __init__(self, run: RunDir, source: Source):
        self.run = run
        self.source = source
        self.log = EventLog(run)
        self.outcomes = Outcomes(run)
        self._plan: Plan | None = None
        self._plan_signature: tuple[int, int, int] | None = None
        self._tries: Tries = {}
        self._changes_seen = 0

    def read(self) -> RunState:
        """Raises InputError if the folder is no run."""
        with _without_collector():
            return self._read()

    def _read(self) -> RunState:
        planned = self._read_plan()
        # asked before the events are read: a supervisor that ends in between has by then told everything
        supervisor = living_supervisor(self.run)
        self.log.refresh()
        if self.log.changes != self._changes_seen:
            self._tries, self._changes_seen = read_tries(self.log.records), self.log.changes
        self.outcomes.refresh()
        tries = {key: list(items) for key, items in self._tries.items()}  # attempts that were lost are ended in it
        done = self._done(planned)
        view = None if supervisor is not None else read_queue_view(self.run, planned, self.log.records, tries, self.outcomes, done, self.source)
        if supervisor is None and view is None:
            close_lost(self.run, tries)
        state = _Reading(self.run, planned, supervisor, tries, self.outcomes, done, view, time.time()).state(self.log.records)
        self.outcomes.keep()
        return state

    def _read_plan(self) -> Plan:
        try:
            status = self.run.plan.stat()
            signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError:
            signature = None
        if self._plan is None or signature != self._plan_signature:
            self._plan, self._plan_signature = plan.read(self.run), signature
        return self._plan

    def _done(self, planned: Plan) -> dict[tuple[str, int], Left]:
        """The tasks with an outcome that verifies."""
        done = {}
        for stage in planned.stages:
            for task in stage.tasks:
                left = self.outcomes.of(stage.name, task.shard, task.hash)
                if left is not None and self.outcomes.is_done(stage.name, task.shard, left):
                    done[stage.name, task.shard] = left
        return done


@dataclass(frozen=True)
class _Reading:
    """Everything read once for one state. `view`: what Slurm tells, None for a run that is not its business."""

    run: RunDir
    plan: Plan
    supervisor: Supervisor | None
    attempts: Tries
    outcomes: Outcomes
    done: dict[tuple[str, int], Left]
    view: QueueView | None
    now: float

    def state(self, events: Sequence[dict[str, Any]]) -> RunState:
        stages: list[StageState] = []
        for stage in self.plan.stages:
            stages.append(_stage(self, stage, {item.name: item.word for item in stages}))
        spans = [item.span(self.now) for attempts in self.attempts.values() for item in attempts]
        on_gpu = any(stage.gpus_per_node for stage in self.plan.stages)
        where = str(self.supervisor) if self.supervisor is not None else self.view.where(self.now) if self.view is not None else None
        return RunState(
            run_id=self.plan.run_id,
            name=self.plan.name,
            path=str(self.run.root),
            verdict=_verdict(stages, self.supervisor, events),
            where=where,
            seconds=seconds_busy(spans),
            device_hours=sum(state.device_hours for state, stage in zip(stages, self.plan.stages, strict=True) if stage.gpus_per_node or not on_gpu),
            device_word="GPU-hours" if on_gpu else "process-hours",
            created=events[0]["time"] if events else None,
            changed=events[-1]["time"] if events else None,
            stages=stages,
            on_slurm=self.view is not None,
            silence=self.view.silence(self.now) if self.view is not None else None,
        )


def _verdict(stages: list[StageState], supervisor: Supervisor | None, events: Sequence[dict[str, Any]]) -> Verdict:
    words = {stage.word for stage in stages}
    if words == {"done"}:
        return "done"
    last = next((event["event"] for event in reversed(events) if event["event"] in ("submitted", "stopping")), None)
    if supervisor is not None and last == "stopping":
        return "stopping"
    if supervisor is not None or words & set(ON_DEVICES):
        return "running"
    if words & set(ALIVE):
        return "queued"
    if "failed" in words:
        return "failed"
    return "interrupted" if any(event["event"] == "task_started" for event in events) else "not started"


def _stage(reading: _Reading, stage: PlannedStage, words: dict[str, Word]) -> StageState:
    waits_for = [name for name in stage.needs if words[name] != "done"]
    stuck = [name for name in waits_for if words[name] in ("failed", "blocked")]
    troubles = iter(range(LOGS_READ))
    tasks = [
        _done_task(reading, stage, task.shard, reading.done[stage.name, task.shard])
        if (stage.name, task.shard) in reading.done
        else _task(reading, stage, task.shard, task.hash, bool(stuck), troubles)
        for task in stage.tasks
    ]
    counts = Counter(task.word for task in tasks)
    attempts = [item for task in stage.tasks for item in reading.attempts.get((stage.name, task.shard), ())]
    spans = [item.span(reading.now) for item in attempts]
    reasons = Counter(task.reason for task in tasks if task.reason)
    return StageState(
        name=stage.name,
        kind=stage.kind,
        word=_stage_word(counts, len(tasks)),
        counts={str(word): number for word, number in counts.items()},
        fraction=sum(task.fraction for task in tasks) / len(tasks),
        seconds=seconds_busy(spans),
        device_hours=sum(item.devices * (end - start) for item, (start, end) in zip(attempts, spans, strict=True)) / 3600 + _untold_hours(reading, stage),
        eta_seconds=_stage_eta(tasks),
        waits_for=_nearest(reading.plan, stuck or waits_for),
        tasks=tasks,
        needs=_nearest(reading.plan, stage.needs),
        reason=reasons.most_common(1)[0][0] if reasons else None,
        starts=min((task.starts for task in tasks if task.starts is not None), default=None),
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
    order: tuple[Word, ...] = ("lost", "stalled", "running", "suspended", "requeued", "queued", "held", "failed", "blocked", "interrupted")
    return next((word for word in order if counts[word]), "pending")


def _done_task(reading: _Reading, stage: PlannedStage, shard: int, left: Left) -> TaskState:
    attempts = reading.attempts.get((stage.name, shard))
    last = attempts[-1] if attempts else None
    beat = reading.outcomes.beat(stage.name, shard) if len(stage.tasks) <= FEW_TASKS else None
    step, total, unit, loss = (beat.step, beat.total, beat.unit, beat.loss) if beat is not None else (0, 0, "", None)
    seconds = last.seconds(reading.now) if last else 0.0
    return TaskState(shard, "done", last.attempt if last else left.attempt, step, total, unit, loss, seconds, None, None, None, None, [])


def _task(reading: _Reading, stage: PlannedStage, shard: int, task_hash: str, stuck: bool, troubles: Any) -> TaskState:
    key = (stage.name, shard)
    attempts = reading.attempts.get(key, [])
    last = attempts[-1] if attempts else None
    beat = reading.outcomes.beat(stage.name, shard)
    if beat is not None and last is not None and beat.attempt < last.attempt:
        beat = None  # of an earlier attempt
    ranks = _rank_beats(reading, stage, shard, beat, last)
    facts = Facts(reading.outcomes.of(stage.name, shard, task_hash), last, beat, stuck, reading.now, ranks, beat is not None and is_gone(beat))
    if reading.view is None:
        word, cause = on_this_machine(facts, reading.supervisor is not None)
        job: dict[str, Any] = {}
    else:
        word, cause = reading.view.judge(key, facts)
        job = reading.view.about(key, facts, word, stage)
        if last is not None and last.ended is None and word not in ON_DEVICES:
            last = attempts[-1] = replace(last, ended=reading.view.gone_at(key, facts))
    log, lines = None, []
    if word in TROUBLED and (last is not None or reading.view is not None) and next(troubles, None) is not None:
        path = guilty_log(reading.run, stage.name, shard, last.attempt if last is not None else 0)
        log, lines = str(path), tail(path, LAST_LINES)
    return TaskState(
        shard=shard,
        word=word,
        attempt=last.attempt if last else (beat.attempt if beat else None),
        step=beat.step if beat else 0,
        total=beat.total if beat else 0,
        unit=beat.unit if beat else "",
        loss=beat.loss if beat else None,
        seconds=last.seconds(reading.now) if last else 0.0,
        age_seconds=reading.now - beat.heard if beat else None,
        eta_seconds=_task_eta(beat, last, reading.now) if word == "running" else None,
        cause=cause,
        log=log,
        last_lines=lines,
        note=unwell_in_words(beat, facts.ranks) if beat is not None and word == "running" else None,
        ranks=ranks_to_json(facts.ranks, beat, reading.now) if word in ON_DEVICES else [],
        **job,
    )


def _rank_beats(reading: _Reading, stage: PlannedStage, shard: int, beat: Heartbeat | None, last: Try | None) -> tuple[RankBeat, ...]:
    """Only of what runs and has several ranks: there may be 10,000 tasks."""
    if stage.ranks == 1 or beat is None or (last is not None and last.ended is not None):
        return ()
    return reading.outcomes.rank_beats(stage.name, shard, stage.ranks, beat.attempt)


def _task_eta(beat: Heartbeat | None, last: Try | None, now: float) -> float | None:
    """From the mean speed of this attempt; None before there is one."""
    if beat is None or last is None or beat.step <= last.from_step or beat.time <= last.started:
        return None
    seconds_per_step = (beat.time - last.started) / (beat.step - last.from_step)
    return max(0.0, (beat.total - beat.step) * seconds_per_step - (now - beat.heard))


def _stage_eta(tasks: list[TaskState]) -> float | None:
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
    waves = -(-sum(task.word in ("pending", "queued", "requeued") for task in tasks) // len(running)) + 1
    return max(known) * waves if known else None


def _untold_hours(reading: _Reading, stage: PlannedStage) -> float:
    """Device-hours of tasks started by hand, which have only their outcome."""
    total = 0.0
    for task in stage.tasks:
        if (stage.name, task.shard) not in reading.attempts:
            left = reading.outcomes.of(stage.name, task.shard, task.hash)
            if left is not None:
                total += max(left.devices, stage.devices) * (left.ended - left.started) / 3600
    return total


def to_json(state: RunState) -> dict[str, Any]:
    """As JSON values. Not `asdict`, which copies every value of 10,000 tasks."""
    record = {item.name: getattr(state, item.name) for item in fields(state)}
    record["stages"] = [{item.name: getattr(stage, item.name) for item in fields(stage)} for stage in state.stages]
    names = [item.name for item in fields(TaskState)]
    for stage in record["stages"]:
        stage["tasks"] = [{name: getattr(task, name) for name in names} for task in stage["tasks"]]
    return record
