"""What a task is doing, in the order of truth: outcome, heartbeat, squeue, sacct. Pure; called by state.py.

Nobody's silence makes a failure: without proof a task stays in the last state that was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medgen.launch.slurm import QueueRow
from medgen.launch.tries import Try
from medgen.rundir import Heartbeat, RankBeat
from medgen.watch.outcomes import Left
from medgen.watch.ranks import guilty_in_words, silence_in_words, silent
from medgen.watch.reasons import HELD_STATES, SUSPENDED_STATES, WAITING_STATES, Ending, reason_in_words
from medgen.watch.words import duration

STALE_SECONDS = 60  # a heartbeat is written every few seconds
SLURM_STALE_SECONDS = 90  # a shared file system may show it a minute late
BEAT_SECONDS = 10  # what runs is heard of again within that time
LOST_SECONDS = 300
START_SECONDS = 600  # modules, environments and imports from a shared file system
STEP_SECONDS, STEPS = 600, 10  # a step that takes so long, and so many times the mean, is stuck
FIRST_STEP_SECONDS = 3600  # reading and caching the data comes before it
AWAITED_SECONDS = 60  # an outcome may be seen that much later than the end of its job
RESTART_SECONDS = 60  # between `goes on` and the job's return to the queue

Word = Literal[
    "pending", "queued", "held", "running", "stalled", "lost", "suspended", "requeued", "done", "failed", "interrupted", "blocked"
]  # fmt: skip
Judgement = tuple[Word, str | None]  # and why


@dataclass(frozen=True, slots=True)
class Facts:
    """What the run folder tells of a task that is not done. `stuck`: something it needs has failed.

    `ranks`: the beats of this attempt, where it runs and has several ranks; `gone`: the process that beat was on this machine, and is
    there no more."""

    left: Left | None
    last: Try | None
    beat: Heartbeat | None
    stuck: bool
    now: float
    ranks: tuple[RankBeat, ...] = ()
    gone: bool = False

    @property
    def ended(self) -> bool:
        """Its last attempt was seen to end."""
        return self.last is not None and self.last.status is not None

    @property
    def told(self) -> bool:
        """Its last attempt has left an outcome, which is not that it is done."""
        return self.left is not None and (self.last is None or self.left.attempt >= self.last.attempt)


@dataclass(frozen=True, slots=True)
class Seen:
    """What Slurm tells of it. `asked`: when, unix seconds; `absent`: it answered after the last sign of the task, and no longer has it."""

    asked: float | None
    row: QueueRow | None
    ending: Ending | None
    absent: bool
    silence: str | None  # "Slurm has not answered for 40s"
    submitted: float | None  # unix seconds
    cancelled: bool
    job: str


def on_this_machine(facts: Facts, supervised: bool) -> Judgement:
    """For runs that a supervisor on this machine runs, or nobody."""
    last, beat, now = facts.last, facts.beat, facts.now
    beats = beat is not None and not facts.gone and now - beat.heard <= STALE_SECONDS
    if supervised and last is not None and not facts.ended:
        if beat is None or beats:  # before its first heartbeat a task imports and reads data
            return _by_ranks(facts, STALE_SECONDS, "; to give it up: `medgen cancel`, then submit again")
        return "stalled", f"no heartbeat for {now - beat.heard:.0f} s{_of_rank_0(facts, STALE_SECONDS)}"
    if beats and not facts.ended and not facts.told:  # started by hand, or on another machine
        return "running", None
    if last is not None and last.comes_back and supervised:
        return "pending", None
    if last is not None and facts.ended:
        return _of_ending(last, facts.left)
    if facts.left is not None and facts.told:
        return ("failed" if facts.left.status == "failed" else "interrupted"), facts.left.cause
    if last is not None:
        return "interrupted", "its supervisor ended without a word"
    return _not_started(facts)


def on_slurm(facts: Facts, seen: Seen) -> Judgement:
    """For runs whose tasks are jobs of Slurm."""
    if _beats(facts, seen) and not facts.ended and not facts.told:
        return _by_ranks(facts, SLURM_STALE_SECONDS, _way_out(seen))
    if seen.row is not None:
        if seen.row.state in WAITING_STATES:
            if facts.last is not None and not facts.ended and facts.last.started > (seen.asked or 0.0):
                return _unknown(facts, seen)  # it has started since
            return _waiting(facts, seen, seen.row)
        if seen.row.state in SUSPENDED_STATES:
            return "suspended", "Slurm has suspended it"
        return _started(facts, seen, seen.row)
    return _gone(facts, seen) if seen.absent else _unknown(facts, seen)


def _beats(facts: Facts, seen: Seen) -> bool:
    """It was heard of lately, and Slurm has not said since that it does not run."""
    if facts.beat is None or facts.gone or facts.now - facts.beat.heard > SLURM_STALE_SECONDS:
        return False
    runs = seen.row is not None and seen.row.state not in (*WAITING_STATES, *SUSPENDED_STATES)
    return runs or seen.asked is None or seen.asked <= facts.beat.heard + BEAT_SECONDS


def _by_ranks(facts: Facts, stale_seconds: float, way_out: str) -> Judgement:
    """Rank 0 is heard of: what of the others, and of the step they make together?"""
    quiet = silent(facts.ranks, facts.now, stale_seconds)
    if quiet:
        is_lost = facts.now - min(beat.heard for beat in quiet) > LOST_SECONDS
        return ("lost" if is_lost else "stalled"), silence_in_words(quiet, facts.ranks, facts.now) + way_out
    stuck = _step_is_stuck(facts)
    return ("stalled", stuck + way_out) if stuck else ("running", None)


def _of_rank_0(facts: Facts, stale_seconds: float) -> str:
    """That it is rank 0 alone which is silent, where others are heard of."""
    first = next((beat for beat in facts.ranks if beat.rank == 0), None)
    if first is None or len(silent(facts.ranks, facts.now, stale_seconds)) == len(facts.ranks):
        return ""
    return f" of {first.name}, last heard of at step {first.step}, {first.doing}; the others live"


def _waiting(facts: Facts, seen: Seen, row: QueueRow) -> Judgement:
    """Slurm has it in its queue and has not started it."""
    if row.reason == "DependencyNeverSatisfied" or (facts.stuck and row.reason == "Dependency"):
        return "blocked", None
    if row.state in HELD_STATES or reason_in_words(row.reason).startswith("held"):
        return "held", f"{reason_in_words(row.reason)}; `scontrol release {seen.job}` lets it go on"
    again = facts.last is not None and (seen.submitted is None or facts.last.started > seen.submitted)
    if again and facts.last is not None:
        return "requeued", facts.last.cause
    return "queued", None


def _started(facts: Facts, seen: Seen, row: QueueRow) -> Judgement:
    """Slurm says it runs; no heartbeat does."""
    last, beat, now = facts.last, facts.beat, facts.now
    started = row.start or 0.0
    if last is not None and last.ended is not None and started <= last.ended:  # the script is about to end
        return ("requeued", last.cause) if last.comes_back else _of_ending(last, facts.left)
    if facts.told or row.state != "RUNNING":  # COMPLETING and its like
        return "running", None
    since = max(started, last.started if last else 0.0, beat.heard if beat else 0.0)
    node = f" on {row.nodes}" if row.nodes else ""
    if beat is None or beat.heard < started:
        if now - since <= START_SECONDS:
            return "running", None
        return "lost", f"Slurm says it has been running{node} for {duration(now - since)}, but nothing was heard of it{_way_out(seen)}"
    if now - since <= SLURM_STALE_SECONDS:
        return "running", None
    if now - since <= LOST_SECONDS:
        return "stalled", f"no heartbeat for {duration(now - since)}{_of_rank_0(facts, SLURM_STALE_SECONDS)}; Slurm says it runs{node}"
    return "lost", f"Slurm says it runs{node}, but nothing was heard of it for {duration(now - since)}{_of_rank_0(facts, SLURM_STALE_SECONDS)}{_way_out(seen)}"


def _way_out(seen: Seen) -> str:
    return f"; to give it up: `scancel {seen.job}`, then submit again"


def _gone(facts: Facts, seen: Seen) -> Judgement:
    """Slurm no longer has it."""
    last = facts.last
    if last is not None and facts.ended:
        return _of_ending(last, facts.left)
    if facts.left is not None and facts.told:
        return ("failed" if facts.left.status == "failed" else "interrupted"), facts.left.cause
    if last is None and (facts.stuck or seen.cancelled or seen.submitted is None):
        return _not_started(facts)
    if seen.ending is not None:
        began = last is not None or facts.beat is not None
        if began and seen.ending.end is not None and facts.now - seen.ending.end <= AWAITED_SECONDS:
            return "running", "its job has ended; its outcome is awaited"
        return seen.ending.word, seen.ending.text
    return "interrupted", f"its job {seen.job} has left Slurm's queue without an outcome"


def _unknown(facts: Facts, seen: Seen) -> Judgement:
    """Slurm has not answered since the last sign of it."""
    last, beat, now = facts.last, facts.beat, facts.now
    if last is not None and facts.ended:
        resubmitted = seen.submitted is not None and last.ended is not None and seen.submitted > last.ended
        if resubmitted:
            return "queued", None
        return ("requeued", last.cause) if last.comes_back else _of_ending(last, facts.left)
    if last is not None:
        quiet_seconds = now - (beat.heard if beat is not None else last.started)
        if quiet_seconds <= (SLURM_STALE_SECONDS if beat is not None else START_SECONDS):
            return "running", None
        return "stalled", f"no heartbeat for {duration(quiet_seconds)}" + (f", and {seen.silence}" if seen.silence else "")
    if seen.submitted is not None and not seen.cancelled and not facts.stuck:
        return "queued", None
    return _not_started(facts)


def gone_at(facts: Facts, ending: Ending | None) -> float:
    """When an attempt that nobody saw the end of was over, at the latest: unix seconds."""
    if facts.last is None:
        return facts.now
    if ending is not None and ending.end is not None and ending.end >= facts.last.started:
        return ending.end
    return max(facts.last.started, facts.beat.time if facts.beat is not None else 0.0)


def proof_of_absence(facts: Facts, asked: float | None, submitted: float | None) -> bool:
    """True if Slurm was asked after everything that shows the task was there."""
    if asked is None:
        return False
    ended = facts.last.ended + RESTART_SECONDS if facts.last is not None and facts.last.ended is not None and facts.last.comes_back else 0.0
    signs = (submitted, facts.last.started if facts.last else None, facts.beat.heard if facts.beat else None, ended)
    return asked > max(sign or 0.0 for sign in signs)


def damage_in_words(recorded: str | None) -> str:
    """Of a task whose last attempt was done, and which is not. `recorded`: the status in its outcome, None where this plan has none that can be read."""
    if recorded is None:
        return "it was done; the record of that is missing, cannot be read or is of another plan"
    if recorded == "done":
        return "it was done; its files are missing or have another size now"
    return f"it was done; the record of it says {recorded} now"


def _of_ending(last: Try, left: Left | None) -> Judgement:
    if last.status == "interrupted":
        given_up = not last.comes_back and last.kind != "CANCELLED"  # not by a person, who knows what to do
        return "interrupted", "; ".join(part for part in (last.cause, last.next if given_up else None) if part) or None
    if last.status == "done":
        return "failed", f"{damage_in_words(left.status if left is not None else None)}; submit again: exactly this is made again"
    return "failed", (left.cause if left is not None and left.attempt == last.attempt else None) or last.cause


def _not_started(facts: Facts) -> Judgement:
    return ("blocked" if facts.stuck else "pending"), None


def _step_is_stuck(facts: Facts) -> str | None:
    """It lives, but its step does not advance: in words, None if all is well or it does not tell its steps."""
    beat, last = facts.beat, facts.last
    if beat is None or beat.advanced is None or beat.last_advance is None or not beat.total:
        return None
    still_seconds = facts.now - beat.last_advance
    steps = beat.step - (last.from_step if last is not None else 0)
    if last is None or steps <= 0:
        limit_seconds: float = FIRST_STEP_SECONDS
    else:
        limit_seconds = max(STEP_SECONDS, STEPS * (beat.advanced - last.started) / steps)
    if still_seconds <= limit_seconds:
        return None
    who = guilty_in_words(facts.ranks)
    return f"it lives, but has stood at {beat.step} of {beat.total} {beat.unit} for {duration(still_seconds)}" + (f": {who}" if who else "")
