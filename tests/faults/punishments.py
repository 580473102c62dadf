"""What the punisher does to a run: every function tries one fault and returns what it hit, or None where there is nothing to hit.

Called by punisher.py, in an order that the seed decides; every fault is told in its log with time and victim."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from medgen.launch.processes import start_ticks

from .arena import COMMAND_SECONDS, Graph, Job, Observer, Process

Punishment = Callable[[Graph, Observer], str | None]
GONE_SECONDS = 20.0
RIVAL = "punisher-rival"


def _a_job(graph: Graph, observer: Observer) -> Job | None:
    """A running one; a training rather than one of many shards, because there is only one of it."""
    running = observer.running()
    trainings = [job for job in running if job.stage == "train"]
    return graph.arena.random.choice(trainings or running) if running else None


def _gone(processes: list[Process]) -> bool:
    deadline = time.monotonic() + GONE_SECONDS
    while not all(process.is_gone for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _killed(processes: list[Process], what: str) -> str | None:
    hit = [process for process in processes if process.send(signal.SIGKILL)]
    if not hit:
        return None
    words = ", ".join(f"{process.kind} shard {process.shard} attempt {process.attempt} pid {process.pid}" for process in hit)
    return f"{what}: {words}{'' if _gone(hit) else ' (still there)'}"


# ---- signals and kills -------------------------------------------------------------------------------------------------------


def _scancel_signal(name: str) -> Punishment:
    def punish(graph: Graph, observer: Observer) -> str | None:
        job = _a_job(graph, observer)
        if job is None:
            return None
        done = graph.arena.slurm("scancel", f"--signal={name}", job.element)
        return f"{job.stage} {job.element} exit {done.returncode}"

    return punish


def requeue(graph: Graph, observer: Observer) -> str | None:
    job = _a_job(graph, observer)
    if job is None:
        return None
    done = graph.arena.slurm("scontrol", "requeue", job.element)
    return f"{job.stage} {job.element} exit {done.returncode}"


def kill_a_rank(graph: Graph, observer: Observer) -> str | None:
    ranks = graph.ranks()
    return _killed([graph.arena.random.choice(ranks)], "one rank") if ranks else None


def kill_all_ranks(graph: Graph, observer: Observer) -> str | None:
    return _killed(graph.ranks(), "all ranks")


def kill_a_batch_shell(graph: Graph, observer: Observer) -> str | None:
    shells = [process for process in graph.processes() if process.kind == "batch"]
    return _killed([graph.arena.random.choice(shells)], "batch shell") if shells else None


def kill_a_step_daemon(graph: Graph, observer: Observer) -> str | None:
    """The slurmstepd above one of our own processes."""
    ours = graph.processes()
    if not ours:
        return None
    victim = graph.arena.random.choice(ours)
    pid = victim.pid
    try:
        while pid > 1 and not (Path("/proc") / str(pid) / "comm").read_text().startswith("slurmstepd"):
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
    if pid <= 1:
        return None
    return _killed([Process(pid, f"slurmstepd of {victim.kind}", victim.shard, victim.attempt, victim.job)], "step daemon")


def stop_a_rank(graph: Graph, observer: Observer) -> str | None:
    ranks = graph.ranks()
    if not ranks:
        return None
    victim, seconds = graph.arena.random.choice(ranks), graph.arena.random.uniform(3, 20)
    if not victim.send(signal.SIGSTOP):
        return None
    ticks = start_ticks(victim.pid)

    def go_on() -> None:
        if start_ticks(victim.pid) == ticks:  # never another process of this number
            victim.send(signal.SIGCONT)

    graph.later.append((time.monotonic() + seconds, "continue", go_on))
    return f"{victim.kind} shard {victim.shard} pid {victim.pid} for {seconds:.0f} s"


# ---- the cluster ---------------------------------------------------------------------------------------------------------


def preempt(graph: Graph, observer: Observer) -> str | None:
    """A rival that wants both nodes for itself; what runs in `low` has to leave, the rest does not."""
    if not observer.running():
        return None
    done = graph.arena.slurm("sbatch", "--parsable", "--partition=GPUQ", "--nodes=2", "--exclusive", "--mem=100", "--time=2", f"--job-name={RIVAL}", "--output=/dev/null", "--wrap", "sleep 3")
    if done.returncode != 0:
        return None
    job = done.stdout.strip().partition(";")[0]
    graph.later.append((time.monotonic() + 45, "rival leaves", lambda: graph.arena.slurm("scancel", job)))
    return f"rival job {job} against {', '.join(sorted({f'{job.stage} {job.element}' for job in observer.running()}))}"


def _kill_daemon(*names: str) -> Punishment:
    def punish(graph: Graph, observer: Observer) -> str | None:
        arena = graph.arena
        name = arena.random.choice(names)
        pid = arena.daemon(name)
        if pid is None:
            return None
        os.kill(pid, signal.SIGKILL)
        seconds = arena.random.uniform(2, 12)
        graph.later.append((time.monotonic() + seconds, f"{name} comes back", arena.bring_back))
        return f"{name} pid {pid}, back after {seconds:.0f} s"

    return punish


# ---- files ---------------------------------------------------------------------------------------------------------------


def _damage(graph: Graph, path: Path) -> str:
    """Cut it, or turn one bit over."""
    size_bytes = path.stat().st_size
    graph.damaged.add(str(path.relative_to(graph.run.root)))
    if graph.arena.random.random() < 0.5:
        left = int(size_bytes * graph.arena.random.uniform(0, 0.95))
        os.truncate(path, left)
        return f"{path.relative_to(graph.run.root)} cut from {size_bytes} to {left} bytes"
    place = graph.arena.random.randrange(size_bytes)
    with open(path, "r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ (1 << graph.arena.random.randrange(8))]))
    return f"{path.relative_to(graph.run.root)} one bit of byte {place}"


def damage_the_newest_checkpoint(graph: Graph, observer: Observer) -> str | None:
    """While it matters: all ranks are killed first, or the training is over and images are drawn from it."""
    if graph.is_done("images") or len(graph.whole_checkpoints()) < 2:
        return None
    killed = ""
    if not graph.is_done("train"):
        ranks = [process for process in graph.ranks() if process.kind == "train"]
        if not ranks:
            return None
        killed = f"{_killed(ranks, 'after all ranks')}; "
    elif not any(job.stage == "images" and job.state == "PENDING" for job in observer.jobs):
        return None  # nobody would read it any more
    whole = graph.whole_checkpoints()
    if len(whole) < 2:
        return None
    return killed + _damage(graph, graph.arena.random.choice(sorted(whole[0].glob("*.pt"))))


def damage_a_shard(graph: Graph, observer: Observer) -> str | None:
    """One that is done, before anything was collected."""
    done = [shard for stage, shard in graph.done_tasks() if stage == "images"]
    if not done or len(done) == 8:
        return None
    shard = graph.arena.random.choice(done)
    images = sorted(path for path in graph.run.shard("images", shard).rglob("*") if path.is_file())
    return _damage(graph, graph.arena.random.choice(images))


def remove_an_outcome(graph: Graph, observer: Observer) -> str | None:
    done = graph.done_tasks()
    if not done:
        return None
    stage, shard = graph.arena.random.choice(done)
    graph.run.outcome_file(stage, shard).unlink(missing_ok=True)
    return f"{stage} shard {shard}"


def fill_the_disk(graph: Graph, observer: Observer) -> str | None:
    if not graph.has_own_disk or not observer.running():
        return None
    filler, seconds = graph.runs / "filler", graph.arena.random.uniform(4, 15)
    free = shutil.disk_usage(graph.runs).free
    with open(filler, "wb") as handle:
        left = free - free % 4096
        while left > 0:
            try:
                os.posix_fallocate(handle.fileno(), handle.seek(0, os.SEEK_END), left)
                left = shutil.disk_usage(graph.runs).free // 4096 * 4096
            except OSError:
                left = left // 2 // 4096 * 4096
    graph.later.append((time.monotonic() + seconds, "disk has room", lambda: filler.unlink(missing_ok=True)))
    return f"{free / 2**20:.0f} MiB for {seconds:.0f} s"


# ---- submitting ----------------------------------------------------------------------------------------------------------


def submit_killed_at_a_site(graph: Graph) -> str:
    place = f"site={graph.arena.random.choice(['submit.after_sbatch', 'submit.before_record'])},nth={graph.arena.random.randint(1, 3)},action=kill9"
    code, _ = graph.submit({"MEDGEN_FAULT": place})
    return f"{place} exit {code}"


def submit_killed_at_a_moment(graph: Graph) -> str:
    process, seconds = graph.command(*graph.submit_words), graph.arena.random.uniform(0.5, 15)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return f"after {seconds:.1f} s, exit {process.returncode}"


def four_submits(graph: Graph) -> str:
    processes = [graph.command(*graph.submit_words) for _ in range(4)]
    said = [process.communicate(timeout=COMMAND_SECONDS)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if any(codes):
        graph.arena.log.write("told", said=[text[-400:] for text, code in zip(said, codes, strict=True) if code])
    return f"exit {codes}"


def submit_with_a_lying_sbatch(graph: Graph) -> str:
    """It submits and says that it did not, or the other way round."""
    lie = graph.arena.random.choice(["submits and fails", "fails once"])
    shims = graph.folder / "shims"
    shims.mkdir(exist_ok=True)
    (shims / "tried").unlink(missing_ok=True)
    first = f'"{shutil.which("sbatch")}" "$@" > /dev/null' if lie == "submits and fails" else f'if [ -e {shims}/tried ]; then exec "{shutil.which("sbatch")}" "$@"; fi; touch {shims}/tried'
    (shims / "sbatch").write_text(
        f'#!/bin/bash\ncase "$*" in *--test-only*) exec "{shutil.which("sbatch")}" "$@" ;; esac\n{first}\n'
        'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1\n'
    )
    (shims / "sbatch").chmod(0o755)
    code, said = graph.submit({"PATH": f"{shims}:{graph.environment['PATH']}"})
    return f"an sbatch that {lie}: exit {code}{'' if code == 0 else ': ' + said[-300:]}"


SUBMITS: dict[str, Callable[[Graph], str]] = {
    "submit killed at a site": submit_killed_at_a_site,
    "submit killed at a moment": submit_killed_at_a_moment,
    "four submits": four_submits,
    "lying sbatch": submit_with_a_lying_sbatch,
}


def cancel(graph: Graph, observer: Observer) -> str | None:
    if not observer.jobs:
        return None
    code, said = graph.medgen("cancel", graph.run.root)
    return f"exit {code}: {said.strip()[-200:]}"


def _after_cancel(submit: Callable[[Graph], str]) -> Punishment:
    def punish(graph: Graph, observer: Observer) -> str | None:
        cancelled = cancel(graph, observer)
        return None if cancelled is None else f"cancel {cancelled}; then {submit(graph)}"

    return punish


def _plain_submit(graph: Graph) -> str:
    code, said = graph.submit()
    return f"submit exit {code}{'' if code == 0 else ': ' + said[-300:]}"


PUNISHMENTS: dict[str, Punishment] = {
    "scancel USR2": _scancel_signal("USR2"),
    "scancel TERM": _scancel_signal("TERM"),
    "scancel KILL": _scancel_signal("KILL"),
    "requeue": requeue,
    "kill a rank": kill_a_rank,
    "kill all ranks": kill_all_ranks,
    "kill a batch shell": kill_a_batch_shell,
    "kill a step daemon": kill_a_step_daemon,
    "stop a rank": stop_a_rank,
    "preempt": preempt,
    "kill slurmctld": _kill_daemon("slurmctld"),
    "kill slurmd": _kill_daemon("slurmd-n1", "slurmd-n2"),
    "damage a checkpoint": damage_the_newest_checkpoint,
    "damage a shard": damage_a_shard,
    "remove an outcome": remove_an_outcome,
    "fill the disk": fill_the_disk,
    "cancel": cancel,
    "cancel, submit": _after_cancel(_plain_submit),
    **{f"cancel, {name}": _after_cancel(submit) for name, submit in SUBMITS.items()},
}
