"""What a run has cost: hours by stage and what became of them, efficiency, waiting. Called by the verb `usage`; reads only.

From Slurm's accounting, all lives of requeued jobs included, joined with medgen's events; from the events alone where there is none."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from medgen.errors import Exit
from medgen.launch import slurm
from medgen.launch.causes import STATES, Kind, classify
from medgen.launch.slurm import AccountingRow
from medgen.launch.tries import Key, Try, all_tries, last_seen
from medgen.plan import PlannedStage
from medgen.rundir import RunDir
from medgen.watch.accounted import rows_of
from medgen.watch.advice import size
from medgen.watch.why import Inquiry, beats, inquire

RESUMED = re.compile(r"^resuming from .* \(step (\d+) of \d+\)", re.MULTILINE)
HEAD_BYTES = 64 * 1024  # of a log: a training says at once from where it goes on
SAMPLED_SECONDS = 60  # Slurm looks at the memory twice a minute: of shorter jobs it may have seen the beginning only
TOO_MUCH = 3.0  # times the memory that was used: then asking for less starts jobs sooner
MARGIN = 1.5  # of what was used, to ask for
SMALLEST_MEBIBYTES = 512.0


@dataclass(frozen=True)
class Spent:
    """One life of one job, or one local attempt. `kind`: why it ended early, None if it did not or still runs.

    `lost_share`: of the time, in work that no later attempt could use."""

    shard: int
    source: str  # accounting | events
    started: float  # unix seconds
    seconds: float
    gpus: int
    cpus: int
    running: bool
    kind: Kind | None
    lost_share: float
    cpu_seconds: float | None = None
    used_mebibytes: float | None = None
    asked_mebibytes: float | None = None


@dataclass(frozen=True)
class StageUsage:
    """Hours are of all attempts. `wasted_hours`: by cause, in GPU-hours where the stage has GPUs, else in CPU-hours.

    `wait_seconds`: from when its needs were there until its first task began. Efficiencies in [0, 1]; None: nobody measured."""

    name: str
    kind: str
    unit: str
    tasks: int
    done: int
    attempts: int
    running: int
    gpu_hours: float
    cpu_hours: float
    wasted_hours: dict[Kind, float]
    cpu_efficiency: float | None
    memory_efficiency: float | None
    used_mebibytes: float | None
    asked_mebibytes: float | None
    longest_seconds: float  # of the attempts whose memory was measured
    wait_seconds: float | None
    images: int | None
    images_per_hour: float | None

    @property
    def hours(self) -> float:
        return self.gpu_hours if self.unit == "GPU-hours" else self.cpu_hours


@dataclass(frozen=True)
class Usage:
    """`source`: where the hours are from. `hints`: options that ask for less memory, where more than three times too much was."""

    run_id: str
    path: str
    source: str
    running: int
    stages: tuple[StageUsage, ...]
    notes: tuple[str, ...]
    hints: tuple[str, ...]


def usage(run: RunDir, as_json: bool = False) -> Exit:
    """Print what a run has cost so far. Raises InputError if the folder is no run."""
    record = measure(run)
    if as_json:
        print(json.dumps(to_json(record), indent=1))
    else:
        from medgen.watch.usage_view import show

        show(record)
    return Exit.DONE


def to_json(record: Usage) -> dict[str, Any]:
    total = {
        "gpu_hours": sum(stage.gpu_hours for stage in record.stages), "cpu_hours": sum(stage.cpu_hours for stage in record.stages),
        "wasted_hours": {unit: wasted(record, unit) for unit in ("GPU-hours", "CPU-hours")},
    }  # fmt: skip
    return {**asdict(record), "total": total}


def wasted(record: Usage, unit: str) -> dict[Kind, float]:
    """Over all stages that count in this unit, by cause, the largest first."""
    total: dict[Kind, float] = {}
    for stage in record.stages:
        for kind, hours in stage.wasted_hours.items() if stage.unit == unit else ():
            total[kind] = total.get(kind, 0.0) + hours
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def measure(run: RunDir) -> Usage:
    """Raises InputError if the folder is no run."""
    inquiry = inquire(run)
    stages, notes = [], []
    unaccounted = 0
    for stage in inquiry.plan.stages:
        spent = [item for task in stage.tasks for item in _spent(inquiry, stage, (stage.name, task.shard))]
        unaccounted += sum(item.source == "events" for item in spent)
        stages.append(_stage(inquiry, stage, spent))
    problem = inquiry.accounting.problem if inquiry.on_slurm else None
    if problem is not None:
        notes.append(f"from medgen's own events: the accounting does not answer ({problem})")
    elif inquiry.on_slurm and unaccounted:
        which = "1 attempt is" if unaccounted == 1 else f"{unaccounted} attempts are"
        notes.append(f"{which} not in the accounting (removed there, or run elsewhere): counted from medgen's own events")
    source = "accounting" if inquiry.on_slurm and problem is None else "events"
    hints = [hint for stage, used in zip(inquiry.plan.stages, stages, strict=True) if (hint := _memory_hint(stage, used)) is not None]
    return Usage(run.run_id, str(run.root), source, sum(stage.running for stage in stages), tuple(stages), tuple(notes), tuple(hints))


# --- one task --------------------------------------------------------------------------------------------------------


def _spent(inquiry: Inquiry, stage: PlannedStage, key: Key) -> list[Spent]:
    """Every life of the task: rows of the accounting, and attempts that it does not know."""
    tries = all_tries(inquiry.run, *key, inquiry.tries.get(key, []))
    # a job that was cancelled before it began may have a start all the same: that of its end
    rows = [row for row in inquiry.rows(key) if row.start is not None and (row.elapsed_seconds or row.state not in slurm.TERMINAL_STATES)] if inquiry.on_slurm else []
    mates = rows_of(tries, rows)
    places = {id(mates[item.attempt]): place for place, item in enumerate(tries) if item.attempt in mates}
    found = [_of_row(inquiry, stage, row, places.get(id(row)), tries) for row in rows]
    found += [_of_try(inquiry, stage, tries, place) for place, item in enumerate(tries) if item.attempt not in mates and item.told]
    return sorted(found, key=lambda item: item.started)


def _of_row(inquiry: Inquiry, stage: PlannedStage, row: AccountingRow, place: int | None, tries: list[Try]) -> Spent:
    running = row.end is None and row.state in ("RUNNING", "SUSPENDED", "COMPLETING", "RESIZING")
    kind, lost = (None, 0.0) if running else _loss(inquiry, stage, tries, place) if place is not None else _loss_without_a_try(row)
    offset = tries[place].shard if place is not None else 0
    return Spent(
        offset, "accounting", row.start or 0.0, float(row.elapsed_seconds), row.gpus, row.cpus, running, kind, lost, row.total_cpu_seconds,
        row.max_rss_mebibytes * stage.ranks if row.max_rss_mebibytes is not None else None, row.requested_mem_mebibytes,
    )  # fmt: skip


def _loss_without_a_try(row: AccountingRow) -> tuple[Kind | None, float]:
    """A job that ended before medgen's first word: everything it held was lost."""
    return (None, 0.0) if row.state == "COMPLETED" else (STATES.get(row.state, "PREEMPTED" if row.state == "REQUEUED" else "SETUP"), 1.0)


def _of_try(inquiry: Inquiry, stage: PlannedStage, tries: list[Try], place: int) -> Spent:
    item = tries[place]
    running = item.status is None and place == len(tries) - 1 and _is_alive(inquiry, item)
    kind, lost = (None, 0.0) if running else _loss(inquiry, stage, tries, place)
    seconds = max(0.0, (inquiry.now if running else last_seen(inquiry.run, item)) - item.started)
    gpus = stage.nodes * stage.gpus_per_node
    return Spent(item.shard, "events", item.started, seconds, gpus, stage.ranks * stage.threads, running, kind, lost)


def _is_alive(inquiry: Inquiry, item: Try) -> bool:
    if inquiry.on_slurm and inquiry.queue_problem is None and item.job_id:
        queued = inquiry.queue.get((item.stage, item.shard))
        return queued is not None and not queued.is_pending
    return inquiry.supervisor is not None or beats(inquiry, item)


def _loss(inquiry: Inquiry, stage: PlannedStage, tries: list[Try], place: int) -> tuple[Kind | None, float]:
    """Why an attempt ended before the task was done, and the share of its work that was lost."""
    item = tries[place]
    if item.status == "done":
        return None, 0.0
    return classify(inquiry.records(stage, item)).kind, _lost_share(inquiry.run, stage, tries, place)


def _lost_share(run: RunDir, stage: PlannedStage, tries: list[Try], place: int) -> float:
    """Of a training what was done after the last checkpoint; of a stopped command nothing, it saves for itself; else all."""
    item = tries[place]
    if stage.kind == "command" and item.status == "interrupted":
        return 0.0
    if not stage.saves or not item.told:
        return 1.0
    begun = _resumed_step(run, item) or 0
    later = tries[place + 1 :]
    beat = run.read_heartbeat(item.stage, item.shard)
    reached = next((other.from_step for other in later if other.told), beat.step if beat is not None else None)
    kept = next((step for other in later if (step := _resumed_step(run, other)) is not None), None)
    if kept is None:
        kept = run.saved_step(stage.name, item.shard) if not any(other.status == "done" for other in later) else 0
    if reached is None or reached <= begun:
        return 1.0
    return min(1.0, max(0.0, (reached - max(kept, begun)) / (reached - begun)))


def _resumed_step(run: RunDir, item: Try) -> int | None:
    """Where an attempt at a training says that it goes on; None if it says nothing."""
    try:
        with run.log(item.stage, item.shard, 0, item.attempt).open("rb") as handle:
            match = RESUMED.search(handle.read(HEAD_BYTES).decode(errors="replace"))
    except OSError:
        return None
    return int(match[1]) if match else None


# --- one stage -------------------------------------------------------------------------------------------------------


def _stage(inquiry: Inquiry, stage: PlannedStage, spent: list[Spent]) -> StageUsage:
    gpu_hours = sum(item.gpus * item.seconds for item in spent) / 3600
    cpu_hours = sum(item.cpus * item.seconds for item in spent) / 3600
    unit = "GPU-hours" if stage.gpus_per_node or gpu_hours else "CPU-hours"
    lost: dict[Kind, float] = {}
    for item in spent:
        if item.kind is not None and item.lost_share:
            held = (item.gpus if unit == "GPU-hours" else item.cpus) * item.seconds * item.lost_share / 3600
            lost[item.kind] = lost.get(item.kind, 0.0) + held
    finished = [task for task in stage.tasks if inquiry.run.is_done(task.stage, task.shard, task.hash)]
    images = sum(task.images.stop - task.images.first for task in finished if task.images is not None) if stage.kind == "generate" else None
    hours = gpu_hours if unit == "GPU-hours" else cpu_hours
    measured = [item for item in spent if item.cpu_seconds is not None and not item.running and item.seconds > 0]
    remembered = [item for item in spent if item.used_mebibytes and item.asked_mebibytes]
    most = max(remembered, key=lambda item: item.used_mebibytes or 0, default=None)
    return StageUsage(
        name=stage.name,
        kind=stage.kind,
        unit=unit,
        tasks=len(stage.tasks),
        done=len(finished),
        attempts=len(spent),
        running=sum(item.running for item in spent),
        gpu_hours=gpu_hours,
        cpu_hours=cpu_hours,
        wasted_hours=lost,
        cpu_efficiency=sum(item.cpu_seconds or 0 for item in measured) / sum(item.cpus * item.seconds for item in measured) if measured else None,
        memory_efficiency=(most.used_mebibytes or 0) / (most.asked_mebibytes or 1) if most is not None else None,
        used_mebibytes=most.used_mebibytes if most is not None else None,
        asked_mebibytes=most.asked_mebibytes if most is not None else None,
        longest_seconds=max((item.seconds for item in remembered), default=0.0),
        wait_seconds=_wait_seconds(inquiry, stage, spent),
        images=images,
        images_per_hour=images / hours if images and hours else None,
    )


def _wait_seconds(inquiry: Inquiry, stage: PlannedStage, spent: list[Spent]) -> float | None:
    """The last submit of the stage that has started: from when nothing but Slurm held it back until its first task began."""
    jobs = [job for job in inquiry.submitted.jobs.values() if job.stage == stage.name and job.numbers]
    released = [event["time"] for event in inquiry.events if event["event"] == "jobs_released"]
    for job in reversed(jobs):
        starts = [item.started for item in spent if item.started >= job.time - 1]
        if starts:
            free = next((time for time in released if time >= job.time), job.time)
            needed = [item.ended for name in stage.needs for key, items in inquiry.tries.items() if key[0] == name for item in items if item.status == "done" and item.ended]
            return max(0.0, min(starts) - max([job.time, min(free, min(starts)), *[end for end in needed if end <= min(starts)]]))
    return None


def _memory_hint(stage: PlannedStage, used: StageUsage) -> str | None:
    """The option to ask for less with; None where enough was used, or where a spec has no place for it."""
    if used.used_mebibytes is None or used.asked_mebibytes is None or used.asked_mebibytes <= TOO_MUCH * used.used_mebibytes or stage.kind == "collect":
        return None
    if used.longest_seconds < SAMPLED_SECONDS:
        return None
    wanted = max(SMALLEST_MEBIBYTES, -(-used.used_mebibytes * MARGIN // 512) * 512)
    if wanted >= used.asked_mebibytes:
        return None
    return f"-o stages.{stage.name}.resources.mem={size(wanted)}  (asked for {size(used.asked_mebibytes)}, used {size(used.used_mebibytes)} at most)"
