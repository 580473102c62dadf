"""The Slurm backend: queues what is not done, correctly and once. Called by the submit and cancel verbs.

Two phases: everything is submitted so that nothing can start, recorded, and only then released. Whoever comes after a
crash, a lost reply or another submit looks into the queue first: a job's name says which task it is."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from medgen import fault, files
from medgen.errors import Exit, InputError, MedgenError
from medgen.launch import slurm
from medgen.launch.backend import Poll
from medgen.launch.executor import submit_script
from medgen.launch.fit import Limits
from medgen.launch.queued import QueuedTask, queued_tasks
from medgen.launch.script import Chunk, batch_log_pattern, is_array, job_name, render_script
from medgen.launch.slurm import SlurmError, SlurmRefused, SlurmUnsure
from medgen.launch.supervisor import living_supervisor
from medgen.launch.tries import read_tries
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

LOCK_SECONDS = 300  # another submit of the same run may be queueing many chunks
LOOKS, LOOK_PAUSE_SECONDS = 4, 2.0  # a job is in the queue a moment after sbatch, whatever became of its reply
TRIES = 2
TERM_SECONDS = 5.0  # to save after `cancel`; then KILL, so that everything is gone within ten seconds
KILL_SECONDS = 3.0
FORGETS_SECONDS = 120.0  # between what slurmctld last did and its next start, if it was killed
GONE_SECONDS = 40.0  # what has just been starting ends after Slurm's own KillWait


@dataclass
class Submission:
    """What one submit finds and makes. `jobs`: for each stage what its children wait for, as `12` or `12_3`; `made`: new jobs."""

    number: int
    jobs: dict[str, list[str]] = field(default_factory=dict)
    made: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # of those, what nothing but the hold keeps back


class SlurmBackend:
    """`submit` returns when everything is queued; the jobs go on without it."""

    def __init__(self, limits: Limits, python: str = sys.executable):
        self.limits = limits
        self.python = python

    def submit(self, run: RunDir, planned: Plan) -> Exit:
        """Queue everything that is not done and not queued. Raises InputError for what Slurm refuses, and MedgenError
        (nothing runs) if Slurm does not answer."""
        try:
            with FileLock(run.lock, timeout=LOCK_SECONDS):
                self._submit_under_lock(run, planned)
        except Timeout:
            local = living_supervisor(run)
            hint = f"it runs on this machine now ({local}); `medgen cancel {run.run_id}` first" if local else "another submit of it is at work; try again"
            raise MedgenError(f"{run.run_id}: {hint}") from None
        return Exit.DONE

    def _submit_under_lock(self, run: RunDir, plan: Plan) -> None:
        try:
            queued = queued_tasks(run)
        except SlurmError as error:
            raise MedgenError(f"{error}; nothing was submitted, because what is queued already cannot be seen") from None
        run.cancel_mark.unlink(missing_ok=True)
        queued, lost = self._without_doubles(run, queued)
        queued = self._cancel_doomed(run, plan, self._without_given_up(run, queued), lost)
        alive = {(task.stage, task.shard) for task in queued}
        waiting = {stage.name: self._waiting(run, stage, alive) for stage in plan.stages}
        total = sum(map(len, waiting.values()))
        submission = Submission(int(run.next_submission().name))
        if total:
            run.event("submitted", backend="slurm", tasks=total, submission=str(submission.number))
        try:
            for stage in plan.stages:
                present = [task for task in queued if task.stage == stage.name]
                submission.jobs[stage.name] = self._parents(run, stage, present)
                asked = chunks(stage, waiting[stage.name], submission.number, self.limits.array) or self._rest_of_chain(run, stage, present, submission.number)
                self._submit_stage(run, plan, stage, asked, submission)
        except SlurmRefused as error:
            left = self._roll_back(run, submission)
            raise InputError(f"Slurm refused a job of {run.run_id}: {error.reason}; {left}") from None
        except SlurmUnsure as error:
            raise MedgenError(f"{error}. If anything was queued it is held and will not run; submit again when Slurm answers: nothing is queued twice") from None
        self._release(run, submission)

    def _waiting(self, run: RunDir, stage: PlannedStage, alive: set[tuple[str, int]]) -> list[int]:
        """Shards that are neither done nor queued."""
        return [task.shard for task in stage.tasks if (stage.name, task.shard) not in alive and not run.is_done(stage.name, task.shard, task.hash)]

    def _without_doubles(self, run: RunDir, queued: list[QueuedTask]) -> tuple[list[QueuedTask], set[str]]:
        """Of two jobs for one task the older stays. Returns what is left, and the stages whose children may wait for what is gone."""
        oldest: dict[tuple[str, int, int], int] = {}
        for task in queued:
            oldest.setdefault((task.stage, task.shard, task.segment), task.job_id)
        doubles = [task for task in queued if oldest[task.stage, task.shard, task.segment] != task.job_id]
        if doubles:
            slurm.cancel([task.element for task in doubles])
            run.event("jobs_cancelled", job_ids=sorted({task.job_id for task in doubles}), cause="queued twice: the older job stays")
        return [task for task in queued if task not in doubles], {task.stage for task in doubles}

    def _without_given_up(self, run: RunDir, queued: list[QueuedTask]) -> list[QueuedTask]:
        """The jobs of a chain that still wait behind one that ended for good would start only to end: the chain is queued anew."""
        tries = read_tries(run.events())
        given_up = [task for task in queued if task.is_pending and any(last.gave_up_before(task.segment) for last in tries.get((task.stage, task.shard), [])[-1:])]
        if given_up:
            slurm.cancel([task.element for task in given_up])
            run.event("jobs_cancelled", job_ids=sorted({task.job_id for task in given_up}), cause="their chain was given up: it is queued anew")
        return [task for task in queued if task not in given_up]

    def _cancel_doomed(self, run: RunDir, plan: Plan, queued: list[QueuedTask], lost: set[str]) -> list[QueuedTask]:
        """What waits for tasks that have to be queued anew, or for jobs of `lost` stages, would wait for ever: it is queued anew too.

        What runs already is left alone."""
        alive = {(task.stage, task.shard) for task in queued}
        anew = lost | {stage.name for stage in plan.stages if self._waiting(run, stage, alive)}
        for stage in plan.stages:  # in order, so what waits for what waits is found
            if anew & set(stage.needs):
                anew.add(stage.name)
        doomed = [task for task in queued if task.is_pending and anew & set(plan.stage(task.stage).needs)]
        if doomed:
            slurm.cancel([task.element for task in doomed])
            run.event("jobs_cancelled", job_ids=sorted({task.job_id for task in doomed}), cause="what they waited for is queued anew")
        return [task for task in queued if task not in doomed]

    def _parents(self, run: RunDir, stage: PlannedStage, queued: list[QueuedTask]) -> list[str]:
        """What to wait for of jobs that are queued already: a whole array only if none of its elements has failed."""
        shards_of = {event["name"]: event["shards"] for event in run.events() if event["event"] == "job_intent"}
        if stage.chain > 1:
            return [str(task.job_id) for task in queued][-1:]  # the jobs before it fail by design, at their limit
        parents = []
        for job_id, name in sorted({(task.job_id, task.name) for task in queued}):
            alive = {task.shard for task in queued if task.job_id == job_id}
            gone = [shard for shard in shards_of[name] if shard not in alive] if name in shards_of else []
            failed = [shard for shard in gone if not run.is_done(stage.name, shard, stage.tasks[shard].hash)]
            parents += [task.element for task in queued if task.job_id == job_id] if failed else [str(job_id)]
        return parents

    def _rest_of_chain(self, run: RunDir, stage: PlannedStage, queued: list[QueuedTask], number: int) -> list[Chunk]:
        """What a submit that was killed in the middle, or a person, has left out at the end of a chain."""
        if stage.chain == 1 or not queued or run.is_done(stage.name, 0, stage.tasks[0].hash):
            return []
        last = max(task.segment for task in queued)
        return [chunk for chunk in chunks(stage, [0], number, None) if chunk.segment > last]

    def _submit_stage(self, run: RunDir, plan: Plan, stage: PlannedStage, asked: list[Chunk], submission: Submission) -> None:
        parents = list(dict.fromkeys(job for needed in stage.needs for job in submission.jobs[needed]))
        # the throttle of an array is its own: arrays that share one run one by one, and so do the jobs of a chain
        serial = stage.parallel < len(stage.tasks) or stage.chain > 1
        for chunk in asked:
            before = submission.jobs[stage.name][-1:] if serial else []
            conditions = [f"afterok:{':'.join(parents)}"] if parents else []
            conditions += [f"afterany:{before[0]}"] if before else []
            options = [f"--job-name={job_name(run, stage.name, chunk)}", *self._relief(run, stage, chunk)]
            # a command's own --output stays in its script for whoever submits that by hand; here the log is the run's
            options += [f"--output={batch_log_pattern(run, stage, chunk)}"] if stage.launcher == "none" else []
            options.append(f"--dependency={','.join(conditions)}" if conditions else "--hold")
            job_id = self._submit_chunk(run, plan, stage, chunk, options, submission)
            submission.jobs[stage.name] = [*([] if stage.chain > 1 else submission.jobs[stage.name]), str(job_id)]
            submission.held += [] if conditions else [job_id]

    def _relief(self, run: RunDir, stage: PlannedStage, chunk: Chunk) -> list[str]:
        """More memory than the plan says, for what an earlier attempt ran out of it."""
        granted = [relief.mem_mebibytes for shard in chunk.shards if (relief := run.read_relief(stage.name, shard)).mem_mebibytes is not None]
        largest = max((mem for mem in granted if mem is not None), default=0)
        return [f"--mem={largest}M"] if largest > (stage.mem_mebibytes or 0) else []

    def _submit_chunk(self, run: RunDir, plan: Plan, stage: PlannedStage, chunk: Chunk, options: list[str], submission: Submission) -> int:
        script = render_script(plan, stage, chunk, run.root, self.python)
        name = job_name(run, stage.name, chunk)
        folder = run.submission(submission.number)
        files.write_text(folder / f"{stage.name}.{chunk.offset}.sh", script)
        run.event("job_intent", name=name, stage=stage.name, submission=str(chunk.submission), offset=chunk.offset, shards=chunk.shards)
        job_id = self._submit_once(folder, name, script, options, plan.place.export)
        if fault.ARMED:
            fault.at("submit.before_record")
        submission.made.append(job_id)
        run.event("job_submitted", name=name, job_id=job_id)
        return job_id

    def _submit_once(self, folder: Path, name: str, script: str, options: list[str], exported: list[str]) -> int:
        """sbatch until it is known that the job exists, and exactly once. Raises SlurmRefused, SlurmUnsure."""
        for attempt in range(TRIES):
            try:
                return submit_script(folder, script, options, exported)
            except SlurmUnsure as error:
                known = self._look_up(name, error)
                if known is not None:
                    return known
                if attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def _look_up(self, name: str, lost: SlurmUnsure) -> int | None:
        """The number of the job called `name`, None if there is none. Raises SlurmUnsure if Slurm does not tell."""
        for look in range(LOOKS):
            try:
                found = slurm.queue(name)
            except SlurmError as error:
                raise SlurmUnsure(f"{lost}; and whether {name} exists cannot be seen: {error}") from None
            ids = sorted({row.job_id for row in found if row.name == name})
            if ids:
                return ids[0]
            if look < LOOKS - 1:
                time.sleep(LOOK_PAUSE_SECONDS)
        return None

    def _roll_back(self, run: RunDir, submission: Submission) -> str:
        """Take back what this submit queued; what was there before stays. Returns what became of it in words."""
        try:
            slurm.cancel(submission.made)
        except SlurmError as error:
            return f"what was queued is held and will not run, but could not be taken back ({error}); submit again, or `medgen cancel {run.run_id}`"
        run.event("submission_rolled_back", job_ids=submission.made, submission=str(submission.number))
        return "nothing was left in the queue by this submit"

    def _release(self, run: RunDir, submission: Submission) -> None:
        """Let start what medgen holds, and nothing a person has put on hold since. What this submit has made is released even if
        squeue, which may answer from a cache, does not show it yet."""
        tasks, _ = self._without_doubles(run, queued_tasks(run))
        released = {job: event["time"] for event in run.events() if event["event"] == "jobs_released" for job in event["job_ids"]}
        seen = {task.job_id for task in tasks if task.is_held}
        held = sorted((seen - set(released)) | self._forgotten(seen, released) | set(submission.held))
        if held:
            slurm.release(held)
            run.event("jobs_released", job_ids=held)

    def _forgotten(self, held: set[int], released: dict[int, float]) -> set[int]:
        """Jobs that were released so shortly before slurmctld died that it no longer knows: it saves its state every few seconds."""
        known = {job: released[job] for job in held if job in released}
        started = slurm.controller_started() if known else None
        return {job for job, time in known.items() if started is not None and 0 <= started - time <= FORGETS_SECONDS}

    def poll(self, run: RunDir) -> Poll:
        tasks = {(task.stage, task.shard) for task in queued_tasks(run)}
        return Poll(bool(tasks), f"{len(tasks)} tasks in Slurm's queue" if tasks else "nothing of it is in Slurm's queue")

    def cancel(self, run: RunDir, planned: Plan) -> str:
        """What waits goes at once; what runs gets TERM, some seconds to save, KILL. Raises SlurmError if Slurm does not answer."""
        files.write_text(run.cancel_mark, "no job of this run starts itself again until the next submit\n")
        tasks = queued_tasks(run)
        if not tasks:
            return f"{run.run_id}: nothing is queued or running"
        waiting, running = [task for task in tasks if task.is_pending], [task for task in tasks if not task.is_pending]
        slurm.cancel(sorted({task.element for task in waiting}))
        scripts = {task.element for task in running if planned.stage(task.stage).launcher == "none"}
        with_step = [task.element for task in running if task.element not in scripts]
        slurm.signal_scripts(sorted(scripts), "TERM")
        slurm.signal_steps(with_step, "TERM")
        left = self._wait_until_gone(run, TERM_SECONDS)
        if left:
            slurm.kill_steps([task.element for task in left if task.element in with_step])
            slurm.signal_scripts([task.element for task in left if task.element in scripts], "KILL")
            left = self._wait_until_gone(run, KILL_SECONDS)
        if left:
            slurm.cancel([task.element for task in left])
            left = self._wait_until_gone(run, GONE_SECONDS)
        run.event("cancelled", job_ids=sorted({task.job_id for task in tasks}), left=len(left))
        if left:
            nodes = ", ".join(sorted({task.row.nodes for task in left}))
            raise MedgenError(f"{run.run_id}: {len(left)} tasks are still ending on {nodes}; look again with `medgen watch {run.run_id}`")
        count = len({(task.stage, task.shard) for task in tasks})  # a chain has several jobs for one
        return f"{run.run_id}: {count} {'task' if count == 1 else 'tasks'} taken out of the queue; the same submit command goes on from what was saved"

    def _wait_until_gone(self, run: RunDir, seconds: float) -> list[QueuedTask]:
        """What is still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := queued_tasks(run)) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left


def chunks(stage: PlannedStage, shards: list[int], submission: int, largest_array: int | None) -> list[Chunk]:
    """Sbatch calls for these shards, each job of a chain by itself: indices stay below the cluster's MaxArraySize, so later shards get an offset."""
    if not is_array(stage):
        segments = range(1, stage.chain + 1) if stage.chain > 1 else [0]
        return [Chunk(submission, shard, None, segment) for shard in shards for segment in segments]
    size = largest_array or len(stage.tasks)
    grouped: dict[int, list[int]] = {}
    for shard in shards:
        grouped.setdefault(shard - shard % size, []).append(shard % size)
    return [Chunk(submission, offset, tuple(indices)) for offset, indices in sorted(grouped.items())]
