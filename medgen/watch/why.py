"""Why a run stands still or failed: every task that will not get done by itself, the cause, the records that say so, what to do.

Called by the verb `why`. Reads only; Slurm is asked once each for its queue and its accounting, by watch once more if a task runs, and none has to answer."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from medgen import files
from medgen import plan as planning
from medgen.errors import Exit
from medgen.launch.backend import guilty_log, last_lines
from medgen.launch.causes import STATES, Cause, Evidence, Kind, Records, classify
from medgen.launch.evidence import gather, rank_causes
from medgen.launch.life import may_live
from medgen.launch.queued import QueuedTask, queued_tasks, was_queued
from medgen.launch.slurm import AccountingRow, SlurmError, element_text
from medgen.launch.supervisor import Supervisor, living_supervisor
from medgen.launch.tries import Key, Tries, Try, all_tries, read_end, read_tries
from medgen.plan import Plan, PlannedStage, Task
from medgen.rundir import RunDir
from medgen.watch.accounted import ROUNDING_SECONDS, Accounting, read_accounting, rows_of, was_cancelled
from medgen.watch.advice import Case, advise, submit_command
from medgen.watch.judge import damage_in_words
from medgen.watch.reasons import reason_in_words
from medgen.watch.slurm_jobs import Submitted, SubmittedJob, read_submitted
from medgen.watch.state import TaskState, read_state

LAST_LINES = 30
NUMBER = re.compile(r"\d+")
GIBIBYTE = 2**30
# reasons of waiting jobs that no time will mend; keys as Slurm's, without spaces and underscores, in small letters
FOREVER: dict[str, Kind] = {
    "dependencyneversatisfied": "DEPENDENCY", "partitiontimelimit": "INPUT", "partitionnodelimit": "INPUT", "partitionconfig": "INPUT", "badconstraints": "INPUT",
    "accountnotallowed": "INPUT", "qosnotallowed": "INPUT", "invalidaccount": "INPUT", "invalidqos": "INPUT", "reservationdeleted": "INPUT", "deadline": "TIMEOUT",
    "jobhelduser": "CANCELLED", "jobheldadmin": "CANCELLED", "jobrequeuedinheldstate": "CANCELLED", "jobholdmaxrequeue": "NODE_FAIL", "maxrequeue": "NODE_FAIL",
    "launchfailedrequeuedheld": "NODE_FAIL", "launchfailedlimitexceededrequeuedheld": "NODE_FAIL", "partitiondown": "NODE_FAIL", "partitioninactive": "NODE_FAIL",
}  # fmt: skip
RELEASABLE = ("jobhelduser", "jobheldadmin", "jobrequeuedinheldstate", "jobholdmaxrequeue", "maxrequeue", "launchfailedrequeuedheld", "launchfailedlimitexceededrequeuedheld")


@dataclass(frozen=True)
class Finding:
    """One cause, and all tasks of a stage that share it. `lines`: the last of the guilty log of the first of them."""

    stage: str
    shards: tuple[int, ...]
    tasks: int  # of the whole stage
    cause: Cause
    attempt: int | None
    node: str
    job_id: str
    log: str | None
    lines: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """`again`: what an earlier attempt of a task that goes on has met. `alive`: something of the run is queued or running.

    `notes`: records that could not be had, and what is not well though it goes on."""

    run_id: str
    path: str
    alive: bool
    done: int
    tasks: int
    findings: tuple[Finding, ...]
    again: tuple[Finding, ...]
    notes: tuple[str, ...]


@dataclass
class Inquiry:
    """Everything about one run that is read once; the accounting only if somebody asks."""

    run: RunDir
    plan: Plan
    events: list[dict[str, Any]]
    tries: Tries
    supervisor: Supervisor | None
    on_slurm: bool
    now: float
    queue: dict[Key, QueuedTask] = field(default_factory=dict)
    queue_problem: str | None = None

    @cached_property
    def submitted(self) -> Submitted:
        return read_submitted(self.events)

    @cached_property
    def failed_shards(self) -> Counter[str]:
        """Stage -> how many of its tasks failed in their last attempt."""
        return Counter(key[0] for key, items in self.tries.items() if items[-1].status in ("failed", "refused"))

    @cached_property
    def rank_causes(self) -> dict[tuple[Any, Any, Any], list[str]]:
        """(stage, shard, attempt) -> what its ranks other than the first told."""
        return rank_causes(self.events)

    @cached_property
    def cancelled_at(self) -> list[float]:
        return [event["time"] for event in self.events if event["event"] == "cancelled"]

    @cached_property
    def jobs_cancelled_at(self) -> list[float]:
        """When medgen itself took waiting jobs out, to queue them anew."""
        return [event["time"] for event in self.events if event["event"] == "jobs_cancelled"]

    @cached_property
    def accounting(self) -> Accounting:
        return read_accounting(self.submitted)

    @cached_property
    def watched(self) -> dict[Key, TaskState]:
        """What watch says of every task."""
        return {(stage.name, task.shard): task for stage in read_state(self.run).stages for task in stage.tasks}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            manifest = files.read_json(self.run.manifest)
            return manifest if isinstance(manifest, dict) else {}
        return {}

    @cached_property
    def free_gibibytes(self) -> float | None:
        with contextlib.suppress(OSError):
            return shutil.disk_usage(self.run.root).free / GIBIBYTE
        return None

    def rows(self, key: Key) -> list[AccountingRow]:
        return self.accounting.rows.get(key, [])

    def row(self, item: Try) -> AccountingRow | None:
        """What the accounting keeps of one attempt."""
        key = (item.stage, item.shard)
        tries = [other for other in self.tries.get(key, []) if other.attempt != item.attempt]
        return rows_of(sorted([*tries, item], key=lambda other: other.attempt), self.rows(key)).get(item.attempt) if self.on_slurm else None

    def records(self, stage: PlannedStage, item: Try) -> Records:
        """All that is known of how an attempt ended."""
        told = self.rank_causes.get((item.stage, item.shard, item.attempt), ())
        return gather(self.run, self.plan, stage, item, told, self.row(item), self.on_slurm, was_cancelled(self.cancelled_at, item))


def inquire(run: RunDir) -> Inquiry:
    """Raises InputError if the folder is no run."""
    plan = planning.read(run)
    supervisor = living_supervisor(run)  # before the events: one that ends in between has by then told everything
    events = run.events()
    inquiry = Inquiry(run, plan, events, read_tries(events), supervisor, was_queued(run), time.time())
    if inquiry.on_slurm:
        try:
            inquiry.queue = {(task.stage, task.shard): task for task in queued_tasks(run)}
        except SlurmError as error:
            inquiry.queue_problem = str(error)
    return inquiry


def why(run: RunDir, as_json: bool = False) -> Exit:
    """Print what is wrong. DONE if nothing is, FAILED if something is."""
    diagnosis = diagnose(run)
    if as_json:
        print(json.dumps(asdict(diagnosis), indent=1))
    else:
        from medgen.watch.why_view import show

        show(diagnosis)
    return Exit.FAILED if diagnosis.findings else Exit.DONE


def diagnose(run: RunDir) -> Diagnosis:
    """Raises InputError if the folder is no run."""
    inquiry = inquire(run)
    found: list[tuple[PlannedStage, Try | None, Finding]] = []
    again: list[tuple[PlannedStage, Try | None, Finding]] = []
    stuck: set[str] = set()  # stages that cannot get done by themselves
    done = 0
    for stage in inquiry.plan.stages:
        for task in stage.tasks:
            if run.is_done(task.stage, task.shard, task.hash):
                done += 1
                continue
            trouble = _trouble(inquiry, stage, task, stuck)
            if trouble is not None:
                found.append((stage, trouble[1], _finding(inquiry, stage, task, *trouble)))
            elif (ended := _last_ended(inquiry, task)) is not None:
                again.append((stage, ended, _finding(inquiry, stage, task, classify(inquiry.records(stage, ended)), ended)))
        stuck |= {stage.name} if any(finding.stage == stage.name and finding.cause.kind != "STALLED" for _, _, finding in found) else set()
    notes = [inquiry.queue_problem] if inquiry.queue_problem else []
    notes += _skipped_steps(inquiry)
    if inquiry.on_slurm and "accounting" in vars(inquiry) and inquiry.accounting.problem:  # it was needed
        notes.append(f"without the accounting: {inquiry.accounting.problem}")
    findings = tuple(_completed(inquiry, stage, item, finding) for stage, item, finding in _grouped(found))
    alive = bool(inquiry.queue) or inquiry.supervisor is not None
    tasks = sum(len(stage.tasks) for stage in inquiry.plan.stages)
    return Diagnosis(run.run_id, str(run.root), alive, done, tasks, findings, tuple(finding for _, _, finding in _grouped(again)), tuple(notes))


# --- one task --------------------------------------------------------------------------------------------------------


def _trouble(inquiry: Inquiry, stage: PlannedStage, task: Task, stuck: set[str]) -> tuple[Cause, Try | None] | None:
    """Why a task that is not done will not get done by itself, and the attempt to blame; None if it will, or was never asked for."""
    key = (task.stage, task.shard)
    queued = inquiry.queue.get(key)
    if queued is not None and ((cause := _waits_forever(queued, stage, stuck)) is not None or queued.is_pending):
        return (cause, None) if cause is not None else None
    tries = all_tries(inquiry.run, task.stage, task.shard, inquiry.tries.get(key, []))
    last = tries[-1] if tries else None
    if queued is not None or _goes_on(inquiry, key, last, stage, stuck):
        cause = _stands_still(inquiry, key) if queued is not None or (last is not None and last.status is None) else None
        return (cause, last) if cause is not None else None
    job = inquiry.submitted.newest.get(key)
    if job is not None and job.numbers and (last is None or last.started < job.time - ROUNDING_SECONDS) and inquiry.queue_problem is None:
        return _never_began(inquiry, stage, key, job, stuck), None  # the newest job ended before its script began
    if last is None:
        return _not_started(inquiry, stage, stuck)
    if last.status == "done":
        return _damage(inquiry.run, task), last
    return classify(inquiry.records(stage, last)), last


def _skipped_steps(inquiry: Inquiry) -> list[str]:
    """The last word of each training that is not done and skips too many of its steps."""
    open_stages = {stage.name for stage in inquiry.plan.stages for task in stage.tasks if not inquiry.run.is_done(task.stage, task.shard, task.hash)}
    last = {event["stage"]: event for event in inquiry.events if event["event"] == "steps_skipped" and event["stage"] in open_stages}
    return [f"{name}, step {event.get('step')}: {event['cause']}" for name, event in last.items()]


def _damage(run: RunDir, task: Task) -> Cause:
    """Of a task that the events call done, and that is not."""
    outcome, file = run.read_outcome(task.stage, task.shard), run.outcome_file(task.stage, task.shard)
    said = str(file.relative_to(run.root))
    if outcome is None:
        problem = "cannot be read" if file.exists() else "is missing"
        return Cause("DAMAGED", damage_in_words(None), (Evidence("outcome", f"{said} {problem}"),))
    if outcome.task_hash != task.hash or outcome.run_id != run.run_id:
        return Cause("DAMAGED", damage_in_words(None), (Evidence("outcome", f"{said} is of another plan"),))
    try:
        wrong = [problem for problem in map(run.size_problem, outcome.files) if problem is not None]
    except OSError as error:
        wrong = [f"{error.filename} cannot be read: {error.strerror}"]
    more = f", and {len(wrong) - 1} more of its {len(outcome.files)} files" if len(wrong) > 1 else ""
    return Cause("DAMAGED", damage_in_words(outcome.status), (Evidence("outcome", f"{outcome.status}; {wrong[0] if wrong else 'it names no files'}{more}"),))


def _goes_on(inquiry: Inquiry, key: Key, last: Try | None, stage: PlannedStage, stuck: set[str]) -> bool:
    """True if something is at work on the task, or will be; where Slurm does not answer its own word counts."""
    if last is None:
        return inquiry.supervisor is not None and not (set(stage.needs) & stuck)
    gone = bool(last.job_id) and inquiry.queue_problem is None  # out of the queue: a heartbeat of a moment ago was its last
    if last.status is None:
        return inquiry.supervisor is not None or (last.told and not gone and beats(inquiry, last))
    waits = inquiry.supervisor is not None or inquiry.queue_problem is not None
    return last.comes_back and waits


def _stands_still(inquiry: Inquiry, key: Key) -> Cause | None:
    """Of a task that runs: what watch says if it is not heard of or does not advance."""
    seen = inquiry.watched[key]
    if seen.word not in ("stalled", "lost"):
        return None
    return Cause("STALLED", seen.cause or seen.word, (Evidence("watch", seen.word),))


def _last_ended(inquiry: Inquiry, task: Task) -> Try | None:
    """Of a task that goes on, the attempt before."""
    ended = [item for item in inquiry.tries.get((task.stage, task.shard), []) if item.status not in (None, "done")]
    return ended[-1] if ended else None


def beats(inquiry: Inquiry, item: Try) -> bool:
    beat = inquiry.run.read_heartbeat(item.stage, item.shard)
    return beat is not None and beat.attempt >= item.attempt and may_live(beat, inquiry.now)


def _not_started(inquiry: Inquiry, stage: PlannedStage, stuck: set[str]) -> tuple[Cause, None] | None:
    """A task without any attempt: blocked by others, or nobody asked for it yet."""
    if set(stage.needs) & stuck:
        return _blocked(stage, stuck), None
    failed = inquiry.failed_shards[stage.name]
    if failed and inquiry.queue_problem is None:
        return Cause("DEPENDENCY", "not even tried, because other shards of this stage failed", (Evidence("events", f"{failed} shards failed"),)), None
    return None


def _blocked(stage: PlannedStage, stuck: set[str], evidence: tuple[Evidence, ...] = ()) -> Cause:
    names = ", ".join(name for name in stage.needs if name in stuck)
    return Cause("DEPENDENCY", f"needs {names}", evidence or (Evidence("plan", f"{stage.name} needs {names}, which is not done"),))


def _waits_forever(queued: QueuedTask, stage: PlannedStage, stuck: set[str]) -> Cause | None:
    """What keeps a waiting job from ever starting; None if it only has to wait, or runs."""
    state, reason = queued.row.state, queued.row.reason
    key = re.sub(r"[ _]", "", re.split(r"[,:(]", reason.strip("() "), maxsplit=1)[0]).lower()
    if state not in ("PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT") or key not in FOREVER:
        return None
    said = (Evidence("queue", f"job {queued.job_id}: {state} ({reason})"),)
    if FOREVER[key] == "DEPENDENCY" and set(stage.needs) & stuck:
        return _blocked(stage, stuck, said)
    words = reason_in_words(reason)
    hint = f"; `scontrol release {queued.job_id}` lets it go on" if key in RELEASABLE else ""
    return Cause(FOREVER[key], f"{words}{hint}", said)


def _never_began(inquiry: Inquiry, stage: PlannedStage, key: Key, job: SubmittedJob, stuck: set[str]) -> Cause:
    """Its job left the queue before the script began: what Slurm says of it, else what is likely."""
    rows = [row for row in inquiry.rows(key) if row.job_id in job.numbers]
    row = rows[-1] if rows else None
    if set(stage.needs) & stuck and (row is None or row.state == "CANCELLED"):
        return _blocked(stage, stuck, (Evidence("accounting", f"job {element_text(row.job_id, row.array_task)}: {row.state}"),) if row is not None else ())
    if row is not None and row.state:
        said = (Evidence("accounting", f"job {element_text(row.job_id, row.array_task)}: {row.state} {row.exit_code}:{row.signal}{f' ({row.reason})' if row.reason else ''}"),)
        kind: Kind = STATES.get(row.state, "SETUP")
        words = "cancelled before it began" if kind == "CANCELLED" else f"its job ended as {row.state} before its script began"
        return Cause(kind, words, said)
    cancelled = any(time >= job.time for time in [*inquiry.cancelled_at, *inquiry.jobs_cancelled_at])
    evidence = (Evidence("event cancelled", f"after job {job.numbers[-1]} was queued"),) if cancelled else (Evidence("queue", f"job {job.numbers[-1]} is not there any more"),)
    return Cause("CANCELLED", "it left the queue before it began", evidence, certain=cancelled)


# --- what is told ----------------------------------------------------------------------------------------------------


def _finding(inquiry: Inquiry, stage: PlannedStage, task: Task, cause: Cause, item: Try | None) -> Finding:
    row = inquiry.row(item) if item is not None else None
    node = row.node_list if row is not None else item.node if item is not None else ""
    job = item.job_id or (element_text(row.job_id, row.array_task) if row is not None else "") if item is not None else ""
    return Finding(stage.name, (task.shard,), len(stage.tasks), cause, item.attempt if item is not None else None, node, job, None, (), ())


def _grouped(found: list[tuple[PlannedStage, Try | None, Finding]]) -> Iterator[tuple[PlannedStage, Try | None, Finding]]:
    """Shards of a stage with the same cause, numbers aside, as one finding."""
    groups: dict[tuple[str, str, str], list[tuple[PlannedStage, Try | None, Finding]]] = {}
    for entry in found:
        finding = entry[2]
        groups.setdefault((finding.stage, finding.cause.kind, NUMBER.sub("#", finding.cause.detail)), []).append(entry)
    for entries in groups.values():
        stage, item, first = entries[0]
        shards = tuple(shard for _, _, finding in entries for shard in finding.shards)
        yield stage, item, replace(first, shards=shards)


def _completed(inquiry: Inquiry, stage: PlannedStage, item: Try | None, finding: Finding) -> Finding:
    """With the guilty log and what to do: read once for a group."""
    run, log, lines = inquiry.run, None, list[str]()
    row = None
    if item is not None:
        log = guilty_log(run, item.stage, item.shard, item.attempt)
        lines = last_lines(read_end(log), LAST_LINES)
        row = inquiry.row(item)
    seconds = (item.ended - item.started) if item is not None and item.ended is not None else 0.0
    case = Case(
        cause=finding.cause, stage=stage, run_root=run.root, submit=submit_command(inquiry.manifest, Path.cwd()), node=finding.node, job_id=finding.job_id,
        seconds=seconds, beat=run.read_heartbeat(stage.name, finding.shards[0]), requested_mem_mebibytes=row.requested_mem_mebibytes if row is not None else None,
        free_gibibytes=inquiry.free_gibibytes, today=datetime.date.today(), on_slurm=inquiry.on_slurm, waits=(stage.name, finding.shards[0]) in inquiry.queue, guilty_log=log or run.batch_log(stage.name, finding.shards[0]),
    )  # fmt: skip
    return replace(finding, log=str(log) if log is not None else None, lines=tuple(lines), advice=tuple(advise(case)))
