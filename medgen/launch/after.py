"""What comes after an attempt: the one place where it is decided, from budgets that are kept apart by cause, and told.

Called by attempt.py in the job on a cluster, and by local.py in the supervisor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from medgen.launch.backend import ending_of, fresh_outcome, guilty_log
from medgen.launch.causes import PREEMPTION, Cause, Kind, classify, was_ended, was_warned
from medgen.launch.evidence import gather, rank_causes
from medgen.launch.queue import Ending
from medgen.launch.tries import Event, Try, batch_section, last_seen, read_tries
from medgen.plan import Plan, PlannedStage, Task
from medgen.rundir import Relief, RunDir

# of what told why it failed; collect, evaluate and report would give the same answer twice
TRIES = {"train": 2, "generate": 2, "collect": 1, "features": 2, "evaluate": 1, "structure": 2, "utility": 2, "report": 1, "command": 1}
TRIES_WITHOUT_A_WORD = 2  # of whatever was killed before it could tell why
TRIES_ON_BAD_NODES = 3  # each on another node
INTERRUPTIONS = 5  # of what cannot show progress, where Slurm did not say that it was preempted
WITHOUT_PROGRESS = 3  # attempts in a row that have saved nothing new: then a training is not started again
MORE_MEMORY = 1.5

GOES_ON = "goes on from what it saved"
AGAIN = "will be tried again"
LOST = "Slurm took the job away: preempted, or its node failed"
LOST_AT_LIMIT = "it met its time limit before it could save: a step and a checkpoint must fit into the site's grace; `medgen check` says how long that is"
OVER_TIME_AT_ONCE = "not tried again: it cannot save in the middle; write a longer time: or more shards:, and submit again"


@dataclass(frozen=True)
class Taken:
    """What somebody else has decided about an attempt that is ending: Slurm, or the person who stops the run."""

    cause: str
    kind: Kind
    words: str
    comes_back: bool


@dataclass(frozen=True)
class Circumstances:
    """What only the place of the attempt knows. `later_segments`: jobs of its chain that wait behind it.

    `preempted`: Slurm says that it takes the place for another job."""

    on_slurm: bool
    preempted: bool = False
    later_segments: int = 0
    taken: Taken | None = None


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, why, and what comes next. `again`: the same task is started once more by itself.

    `relief`: with what it starts instead; `elsewhere`: the node is to blame."""

    status: Ending
    cause: str | None
    kind: Kind | None
    again: bool
    words: str
    relief: Relief | None = None
    elsewhere: bool = False
    certain: bool = True  # `kind` is what the records say, not what is most often behind them


def judge(run: RunDir, plan: Plan, stage: PlannedStage, task: Task, attempt: int, exit_code: int, seconds: float, around: Circumstances) -> Verdict:
    """Reads the run folder; writes nothing."""
    events = run.events()
    status, cause = ending_of(run, task, attempt, exit_code, events)
    if status == "done":
        return Verdict("done", None, None, False, "done")
    taken = around.taken
    if taken is not None:
        return Verdict("interrupted", taken.cause or cause, taken.kind, taken.comes_back, taken.words)
    tries = read_tries(events).get((stage.name, task.shard), [])
    begun = next((item for item in tries if item.attempt == attempt), None)
    now = begun or Try(stage.name, task.shard, attempt, time.time() - seconds, stage.devices, 0)
    now = replace(now, ended=now.started + seconds, status=status, exit_code=exit_code, cause=cause)
    told = rank_causes(events).get((stage.name, task.shard, attempt), [])
    found = classify(gather(run, plan, stage, now, told, None, around.on_slurm, cancelled=False))
    past = _past(run, plan, stage, around.on_slurm, tries, now, events)
    if status == "interrupted":
        return _after_interruption(past, cause, found, around)
    spoke = fresh_outcome(run, task, attempt) is not None
    return _after_failure(past, cause, found, run.read_relief(stage.name, task.shard), spoke)


def judge_lost(run: RunDir, plan: Plan, stage: PlannedStage, task: Task, lost: Try) -> Verdict:
    """Of an attempt that nobody saw the end of. Asked where the next one begins, so Slurm starts it again; reads only."""
    if run.is_done(task.stage, task.shard, task.hash):
        return Verdict("done", None, None, False, "done")
    events = run.events()
    now = replace(lost, ended=last_seen(run, lost))
    past = _past(run, plan, stage, True, read_tries(events).get((stage.name, task.shard), []), now, events)
    at_limit = was_ended(now.seconds(now.started), stage.limit_seconds)
    found = Cause("TIMEOUT", LOST_AT_LIMIT) if at_limit else Cause("PREEMPTED", LOST)
    counts = not at_limit and PREEMPTION.search(batch_section(run, task.stage, task.shard, lost.attempt)) is None
    stopped = _without_progress(past, found.detail, found) or (_too_often(past, found.detail, found) if counts else None)
    return stopped or Verdict("interrupted", found.detail, found.kind, True, GOES_ON)


def _past(run: RunDir, plan: Plan, stage: PlannedStage, on_slurm: bool, tries: list[Try], now: Try, events: Sequence[Event]) -> Past:
    earlier = [item for item in tries[_before_last_submit(events, now) :] if item.attempt != now.attempt]
    return Past(plan, stage, on_slurm, earlier, now, run.saved_step(stage.name, now.shard))


def _before_last_submit(events: Sequence[Event], item: Try) -> int:
    """How many starts of a task do not count: each submit brings new budgets. By place in the events, not by time: the clocks of
    login node and nodes may differ."""
    last_submit = max((number for number, event in enumerate(events) if event["event"] == "submitted"), default=0)
    return sum(event["event"] == "task_started" and (event["stage"], event["shard"]) == (item.stage, item.shard) for event in events[:last_submit])


@dataclass(frozen=True)
class Past:
    """The attempts at one task since the last submit, oldest first, and the one that has just ended.

    `saved_step`: of the newest checkpoint now."""

    plan: Plan
    stage: PlannedStage
    on_slurm: bool
    earlier: list[Try]
    now: Try
    saved_step: int

    def count(self, *kinds: Kind) -> int:
        """Earlier attempts that are known to have ended so."""
        return sum(item.kind in kinds and item.certain for item in self.earlier)

    @property
    def since_progress(self) -> list[Try]:
        """Earlier attempts whose failures still count: of a training those since its newest checkpoint was made, else all."""
        return self.earlier[len(self.earlier) + 1 - max(1, self.without_progress) :] if self.stage.saves else self.earlier

    @property
    def without_progress(self) -> int:
        """Attempts in a row, this one included, after which no newer checkpoint was there."""
        if not self.stage.saves:
            return 0
        starts = [*(item.from_step for item in [*self.earlier, self.now]), self.saved_step]
        count = 0
        while count < len(starts) - 1 and starts[-count - 1] <= starts[-count - 2]:
            count += 1
        return count

    def met_limit(self, item: Try) -> bool:
        return item.ended is not None and was_warned(item.ended - item.started, self.stage.limit_seconds, self.plan.place.grace_seconds)

    @property
    def limits(self) -> int:
        """How often the time limit was met, this time included."""
        return sum(self.met_limit(item) for item in [*self.earlier, self.now])


def over_time(stage: PlannedStage) -> str:
    used_up = f"its {stage.segments} segments are used up; " if stage.segments is not None and stage.segments > 1 else ""
    return f"not tried again: {used_up}write more segments: or a longer time:, and submit again"


def goes_on_in_chain(later_segments: int) -> str:
    return f"the next job of its chain {GOES_ON} ({later_segments} left)"


def _stop(status: Ending, cause: str | None, found: Cause, words: str) -> Verdict:
    return Verdict(status, cause, found.kind, False, words)


def _after_interruption(past: Past, cause: str | None, found: Cause, around: Circumstances) -> Verdict:
    """It was stopped from outside: at its limit, for another job, or by hand."""
    stopped = _without_progress(past, cause, found)
    if stopped is not None:
        return stopped
    if around.preempted:
        return Verdict("interrupted", f"{cause}; Slurm gave its place to another job", "PREEMPTED", True, GOES_ON)
    if past.met_limit(past.now):
        return _at_limit(past, cause, around.later_segments)
    return _too_often(past, cause, found) or Verdict("interrupted", cause, found.kind, True, GOES_ON)


def _without_progress(past: Past, cause: str | None, found: Cause) -> Verdict | None:
    if past.without_progress < WITHOUT_PROGRESS:
        return None
    return _stop("interrupted", cause, found, f"not tried again: no progress in {past.without_progress} attempts, its checkpoints stand at step {past.saved_step}; "
                                             "it may need a longer time:, or more grace to save")  # fmt: skip


def _too_often(past: Past, cause: str | None, found: Cause) -> Verdict | None:
    """A training shows its progress; of all else the stops are counted."""
    if past.stage.saves or sum(item.status == "interrupted" for item in past.earlier) < INTERRUPTIONS:
        return None
    return _stop("interrupted", cause, found, f"not tried again: stopped {INTERRUPTIONS + 1} times; submit again to go on")


def _at_limit(past: Past, cause: str | None, later_segments: int) -> Verdict:
    """A training goes on for as long as it progresses, or for as many segments as the spec allows."""
    stage = past.stage
    if not stage.saves and stage.kind != "command":
        return Verdict("interrupted", cause, "TIMEOUT", False, OVER_TIME_AT_ONCE)
    if later_segments:
        return Verdict("interrupted", cause, "TIMEOUT", False, goes_on_in_chain(later_segments))
    if stage.segments is not None and (past.limits >= stage.segments or (past.on_slurm and stage.chain > 1)):
        return Verdict("interrupted", cause, "TIMEOUT", False, over_time(stage))
    return Verdict("interrupted", cause, "TIMEOUT", True, GOES_ON)


def _after_failure(past: Past, cause: str | None, found: Cause, relief: Relief, spoke: bool) -> Verdict:
    """It ended by itself, and not well. `spoke`: it left an outcome that says why."""
    stage, status = past.stage, past.now.status or "failed"
    if found.kind == "DISK_FULL":
        return _stop("refused", cause, found, "not tried again: the disk is full; free some space and submit again")
    if status == "refused":
        return _stop("refused", cause, found, "not tried again: the input is wrong")
    if found.kind == "NODE_FAIL" and stage.kind != "command" and past.on_slurm:
        again = past.count("NODE_FAIL") < TRIES_ON_BAD_NODES - 1
        return Verdict("failed", cause, found.kind, again, f"{AGAIN} on another node" if again else f"not tried again: {TRIES_ON_BAD_NODES} nodes failed", elsewhere=True)
    if past.without_progress >= WITHOUT_PROGRESS:
        return _stop("failed", cause, found, f"not tried again: no progress in {past.without_progress} attempts")
    if found.kind == "OOM" and found.certain:
        return _after_too_little_memory(past, cause, found, relief)
    tries = TRIES[stage.kind] if spoke else max(TRIES[stage.kind], TRIES_WITHOUT_A_WORD)
    crashes = 1 + sum(item.status == "failed" and not (item.certain and item.kind in ("OOM", "NODE_FAIL")) for item in past.since_progress)
    return Verdict("failed", cause, found.kind, crashes < tries, AGAIN if crashes < tries else "not tried again", certain=found.certain)


def _after_too_little_memory(past: Past, cause: str | None, found: Cause, relief: Relief) -> Verdict:
    """Once more with more of it, or with less to hold at a time."""
    stage = past.stage
    mem = relief.mem_mebibytes or stage.mem_mebibytes
    if past.count("OOM"):
        return Verdict("failed", cause, "OOM", False, "not tried again: it had too little memory twice")
    if found.where != "GPU" and mem is not None and past.on_slurm:
        larger = round(mem * MORE_MEMORY)
        return Verdict("failed", cause, "OOM", True, f"{AGAIN} with {larger} MiB of memory instead of {mem}", replace(relief, mem_mebibytes=larger))
    if stage.kind == "train":
        words = f"{AGAIN} with micro-batches half as large, the global batch stays the same"
        return Verdict("failed", cause, "OOM", True, words, replace(relief, micro_batch_divisor=2 * relief.micro_batch_divisor))
    again = TRIES[stage.kind] > 1
    return Verdict("failed", cause, "OOM", again, AGAIN if again else "not tried again")


def tell(run: RunDir, stage: PlannedStage, shard: int, attempt: int, verdict: Verdict, exit_code: int | None, seconds: float, **facts: Any) -> None:
    """Write what was decided: the event, and with what the next attempt is to start."""
    if verdict.relief is not None:
        run.write_relief(stage.name, shard, verdict.relief)
    run.event(
        "task_ended", stage=stage.name, shard=shard, attempt=attempt, status=verdict.status, rc=exit_code, cause=verdict.cause, cause_kind=verdict.kind,
        cause_certain=verdict.certain, seconds=round(seconds, 3), devices=stage.devices, next=verdict.words, again=verdict.again,
        log=str(guilty_log(run, stage.name, shard, attempt).relative_to(run.root)), **facts,
    )  # fmt: skip
