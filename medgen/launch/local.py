"""The local backend: a queue with CPU and GPU slots that runs the very scripts a cluster would run, with bash.

Called by the submit and cancel verbs. One supervisor per run; it holds run/.lock for life and leaves no process behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from medgen import files, plan
from medgen.errors import Exit, MedgenError
from medgen.launch import after
from medgen.launch.after import GOES_ON, Circumstances, Taken, Verdict
from medgen.launch.backend import Poll, fresh_outcome, next_attempt
from medgen.launch.ports import job_id_with_free_port
from medgen.launch.processes import MARK, die_with_parent, kill_marked, signal_group, signal_process, start_ticks
from medgen.launch.queue import Job, Queue
from medgen.launch.script import Chunk, is_array, job_name, render_script, tasks_per_node, whole_stage
from medgen.launch.snapshot import PACKAGE
from medgen.launch.supervisor import BEAT_SECONDS, Supervisor, beat, living_supervisor, register, retire
from medgen.launch.tries import close_lost, read_tries
from medgen.plan import Plan, Task
from medgen.rundir import RunDir

SAVE_SECONDS = 20  # between TERM and KILL: a step and a save
POLL_SECONDS = 0.1
DISPLAY_SECONDS = 0.5
DETACH_SECONDS = 15
SHIMS = {"srun": '-m medgen.launch.local_srun "$@"', "scontrol": '-c "print(\'localhost\')"'}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


class AlreadyRunning(MedgenError):
    """Another process supervises this run now."""

    def __init__(self, run: RunDir, supervisor: Supervisor | None):
        super().__init__(f"{run.run_id} is already running here ({supervisor or 'it has just been started'})")


@dataclass
class Running:
    """A started job script."""

    job: Job
    process: subprocess.Popen[bytes]
    attempt: int
    began: float  # by the clock that nobody sets


class LocalBackend:
    """`submit` returns when the run has ended; `display` is called twice a second meanwhile."""

    def __init__(self, cpus: int, gpus: int, python: str = sys.executable, display: Callable[[], None] = lambda: None, detached: bool = False):
        self.cpus = cpus
        self.gpus = gpu_names(gpus)
        self.python = python
        self.display = display
        self.detached = detached
        self.stop_asked = 0  # how often a signal came

    def submit(self, run: RunDir, planned: Plan) -> Exit:
        """Run everything that is not done. Raises AlreadyRunning if another process does so now.

        DONE: all is done. FAILED: a task failed for good. INTERRUPTED: a signal came, the tasks saved and ended."""
        lock = FileLock(run.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise AlreadyRunning(run, living_supervisor(run)) from None
        before = {number: signal.signal(number, self._ask_to_stop) for number in STOP_SIGNALS}
        try:
            kill_marked(run.root)  # what a supervisor killed outright may have left
            register(run, self.detached)
            return _Supervision(self, run, planned).supervise()
        except OSError as error:
            raise MedgenError(_explained(run, error)) from None
        finally:
            retire(run)
            lock.release()
            self.show()  # once more, now that nothing runs
            for number, handler in before.items():
                signal.signal(number, handler)

    def show(self) -> None:
        try:
            self.display()
        except OSError:  # the terminal or pipe is gone; the run is not
            self.display = lambda: None

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self.stop_asked += 1

    def poll(self, run: RunDir) -> Poll:
        supervisor = living_supervisor(run)
        return Poll(supervisor is not None, str(supervisor) if supervisor else "nothing runs here")

    def cancel(self, run: RunDir, planned: Plan) -> str:
        return cancel(run)


def _explained(run: RunDir, error: OSError) -> str:
    """The system does not say whether it was read or written; a file that is there and cannot be opened was read."""
    reason = error.strerror or str(error)
    if error.filename is None or not os.path.lexists(error.filename):
        return f"{run.root}: cannot be written, everything was stopped: {error}"
    try:
        os.close(os.open(error.filename, os.O_RDONLY))
    except OSError:
        return (f"{error.filename}: cannot be read, everything was stopped: {reason}; make it readable (chmod u+r), "
                f"or see what is safe to delete (medgen fsck {run.run_id}), and run the same command again")  # fmt: skip
    return f"{error.filename}: cannot be written, everything was stopped: {reason}; mend that and run the same command again"


class _Supervision:
    """One life of a supervisor: its queue and the scripts it has started."""

    def __init__(self, backend: LocalBackend, run: RunDir, planned: Plan):
        self.backend = backend
        self.run = run
        self.queue = Queue(planned, self._still_verifies, backend.cpus, backend.gpus)
        self.plan = planned
        self.running: list[Running] = []
        self.folder = self._write_scripts()
        self.next_beat = self.next_display = 0.0
        self._tell_lost()

    def _still_verifies(self, task: Task) -> bool:
        """What an earlier submit finished counts only if its files are what they were; else it is told and made again."""
        outcome = self.run.done_outcome(task.stage, task.shard, task.hash)
        if outcome is None:
            return False
        damage = self.run.damage_to(outcome)
        if damage is not None:
            self.run.outcome_file(task.stage, task.shard).unlink(missing_ok=True)
            self.run.event("outcome_withdrawn", stage=task.stage, shard=task.shard, cause=damage)
        return damage is None

    def _write_scripts(self) -> Path:
        folder = self.run.next_submission()
        for stage in self.plan.stages:
            chunk = whole_stage(stage, int(folder.name))
            files.write_text(folder / f"{stage.name}.0.sh", render_script(self.plan, stage, chunk, self.run.root, self.backend.python))
        for name, arguments in SHIMS.items():
            files.write_text(folder / "bin" / name, f'#!/bin/bash\nPYTHONSAFEPATH=1 exec {shlex.quote(sys.executable)} {arguments}\n')
            (folder / "bin" / name).chmod(0o755)
        return folder

    def _tell_lost(self) -> None:
        """End in the events what a killed supervisor could not end."""
        for lost in close_lost(self.run, read_tries(self.run.events())):
            verdict = Verdict("interrupted", "its supervisor was killed, or the machine went down", "LOST", True, GOES_ON)
            after.tell(self.run, self.plan.stage(lost.stage), lost.shard, lost.attempt, verdict, None, lost.seconds(time.time()))

    def supervise(self) -> Exit:
        waiting = sum(job.state == "waiting" for job in self.queue.jobs)
        self.run.event("submitted", backend="local", tasks=waiting, pid=os.getpid(), submission=self.folder.name, detached=self.backend.detached)
        try:
            while True:
                self._reap()
                while not self.backend.stop_asked and (job := self.queue.start_next()):
                    self._start(job)
                if self.backend.stop_asked or not self.running:
                    break
                self._idle()
            if self.backend.stop_asked:
                return self._stop()
            return self._finish()
        finally:
            self._kill_all()  # on every way out, a full disk included

    def _idle(self) -> None:
        now = time.monotonic()
        if now >= self.next_beat:
            beat(self.run)
            self.next_beat = now + BEAT_SECONDS
        if now >= self.next_display:
            self.backend.show()
            self.next_display = now + DISPLAY_SECONDS
        time.sleep(POLL_SECONDS)

    def _start(self, job: Job) -> None:
        stage, shard = job.stage, job.task.shard
        attempt = next_attempt(self.run, stage.name, shard)
        batch = self.run.batch_log(stage.name, shard)
        batch.parent.mkdir(parents=True, exist_ok=True)
        self.run.event(
            "task_started", stage=stage.name, shard=shard, attempt=attempt, task_hash=job.task.hash, devices=stage.devices,
            from_step=self.run.saved_step(stage.name, shard) if stage.saves else 0, gpus=job.gpus,
        )  # fmt: skip
        with batch.open("ab") as output:
            process = subprocess.Popen(
                ["bash", str(self.folder / f"{stage.name}.0.sh")],
                env=self._environment(job),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches the supervisor alone, which lets the tasks save
                preexec_fn=die_with_parent(),
            )
        self.running.append(Running(job, process, attempt, time.monotonic()))

    def _environment(self, job: Job) -> dict[str, str]:
        """What Slurm would set; anything of an enclosing Slurm job is taken away first."""
        stage = job.stage
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI"))}
        job_id = job_id_with_free_port()
        array = {"SLURM_ARRAY_JOB_ID": str(job_id), "SLURM_ARRAY_TASK_ID": str(job.task.shard)} if is_array(stage) else {}
        return {
            **kept,
            **array,
            MARK: str(self.run.root.resolve()),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": ",".join(job.gpus),
            "SLURM_JOB_ID": str(job_id),
            "SLURM_JOB_NAME": job_name(self.run, stage.name, Chunk(int(self.folder.name), 0)),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": str(tasks_per_node(stage)),
            "SLURM_NTASKS_PER_NODE": str(tasks_per_node(stage)),
            "SLURM_CPUS_PER_TASK": str(stage.threads),
            "SLURM_RESTART_COUNT": "0",
        }

    def _reap(self) -> None:
        for item in list(self.running):
            if item.process.poll() is not None:
                self.running.remove(item)
                signal_group(item.process.pid, signal.SIGKILL)  # what the script left in the background
                self._settle(item)

    def _settle(self, item: Running) -> None:
        """Say how a script ended, and what comes next."""
        stage, task, run = item.job.stage, item.job.task, self.run
        code = item.process.returncode if item.process.returncode >= 0 else 128 - item.process.returncode
        seconds = time.monotonic() - item.began
        verdict = after.judge(run, self.plan, stage, task, item.attempt, code, seconds, Circumstances(on_slurm=False, taken=self._taken(item, code)))
        repair = self.queue.repair(item.job) if verdict.status == "failed" else None
        if repair is not None:
            verdict = replace(verdict, again=True, words=repair)
        self.queue.end(item.job, verdict.status, verdict.again)
        after.tell(run, stage, task.shard, item.attempt, verdict, code, seconds)

    def _taken(self, item: Running, code: int) -> Taken | None:
        """What a person who stops the run has decided about it; None while nobody does, or if it ended by itself before."""
        if not self.backend.stop_asked or code not in (0, Exit.INTERRUPTED, 130, 137, 143):
            return None
        fresh = fresh_outcome(self.run, item.job.task, item.attempt)
        told = fresh.cause if fresh is not None else None
        # the signal came from this supervisor, which is nothing to a person who has pressed Ctrl-C
        return Taken((told or "stopped before it could save").replace("stopped by SIGTERM", "stopped"), "CANCELLED", "waits for the next submit", comes_back=False)

    def _stop(self) -> Exit:
        """TERM to everything, time to save, KILL at the end of it or at the second signal."""
        self.run.event("stopping", tasks=len(self.running), seconds=SAVE_SECONDS)
        signals_before = self.backend.stop_asked
        for item in self.running:
            signal_group(item.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + SAVE_SECONDS
        while self.running and time.monotonic() < deadline and self.backend.stop_asked == signals_before:
            self._reap()
            self._idle()
        self._kill_all()
        self.run.event("stopped", next="the same submit command goes on from here")
        return Exit.INTERRUPTED

    def _kill_all(self) -> None:
        for item in self.running:
            signal_group(item.process.pid, signal.SIGKILL)
        for item in self.running:
            item.process.wait()
        kill_marked(self.run.root)
        while self.running:
            self._settle(self.running.pop())

    def _finish(self) -> Exit:
        for stage, guilty in self.queue.blocked().items():
            self.run.event("stage_blocked", stage=stage, needs=guilty)
        done = self.queue.all_done()
        self.run.event("finished", status="done" if done else "failed", failed=[str(job) for job in self.queue.failed()])
        return Exit.DONE if done else Exit.FAILED


def gpu_names(count: int) -> list[str]:
    """What to write into CUDA_VISIBLE_DEVICES for each of the first `count` GPUs this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [name.strip() for name in visible.split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:count]


def detach(run: RunDir, cpus: int, gpus: int) -> str:
    """Start a supervisor that outlives this terminal; returns what to tell. Raises AlreadyRunning, or MedgenError if it dies."""
    if (known := living_supervisor(run)) is not None:
        raise AlreadyRunning(run, known)
    run.local_log.parent.mkdir(parents=True, exist_ok=True)
    with run.local_log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "medgen.launch.local", str(run.root), str(cpus), str(gpus)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + DETACH_SECONDS
    while time.monotonic() < deadline:
        known = living_supervisor(run)
        if known is not None and known.pid == process.pid:
            return f"{run.run_id} runs in the background ({known}); follow it: medgen watch {run.run_id}"
        if process.poll() is not None:
            if process.returncode == Exit.DONE:
                return f"{run.run_id} is done"
            if known is not None:
                raise AlreadyRunning(run, known)
            raise MedgenError(f"{run.run_id}: the supervisor ended with exit code {process.returncode}; see {run.local_log}")
        time.sleep(POLL_SECONDS)
    raise MedgenError(f"{run.run_id}: the supervisor did not start within {DETACH_SECONDS} s; see {run.local_log}")


def cancel(run: RunDir) -> str:
    """Stop the supervisor of a run and all its tasks: TERM, time to save, KILL. Returns what happened in words."""
    known = living_supervisor(run)
    if known is None:
        left = kill_marked(run.root)
        return f"{run.run_id}: nothing is running" + (f"; {left} left-over processes were killed" if left else "")
    if known.host != socket.gethostname():
        raise MedgenError(f"{run.run_id} runs on {known.host}; cancel it there")
    signal_process(known.pid, signal.SIGTERM)
    deadline = time.monotonic() + SAVE_SECONDS + 10
    while start_ticks(known.pid) == known.start_ticks and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    forced = start_ticks(known.pid) == known.start_ticks
    if forced:
        signal_process(known.pid, signal.SIGKILL)
    kill_marked(run.root)
    run.event("cancelled", pid=known.pid, forced=forced)
    return f"{run.run_id}: stopped; the same submit command goes on from here"


def main() -> None:
    """The detached supervisor: RUN CPUS GPUS."""
    run = RunDir(Path(sys.argv[1]))
    try:
        code = LocalBackend(int(sys.argv[2]), int(sys.argv[3]), detached=True).submit(run, plan.read(run))
    except MedgenError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
