"""What Slurm and signals do to a training of two ranks: it saves, goes on, and ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_NET
from filelock import FileLock
from slurm.test_submit import SITE, Lab, lab  # noqa: F401  (a fixture)

from medgen import checkpoint
from medgen.launch.script import folder_tag
from medgen.launch.tries import batch_section
from medgen.rundir import RunDir
from medgen.watch import judge
from medgen.watch.poll import Patient
from medgen.watch.state import Reader

SEED, STEPS, STEPS_PER_EPOCH = 5, 27, 9
NET = {
    **TINY_NET, "strategy": "ddpm", "mode": "bravo", "epochs": 3, "batch_size": 2,
    "loop": {"log_steps": 1, "preview_images": 0, "validate_epochs": 50.0, "checkpoint_steps": 5},
}  # fmt: skip
DATA = {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2}
TWO_RANKS = {"processes": 2, "cpus": 2, "mem": "2G", "time": "10m"}
REQUEUED = ("REQUEUED", "PREEMPTED", "FAILED", "NODE_FAIL", "TIMEOUT")  # what the accounting says of a life that was not the last

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Disturbed:
    """A run on a real Slurm, what is armed for it, and what has happened."""

    def __init__(self, lab: Lab, name: str, stages: dict[str, Any], faults: list[str], **site: Any):  # noqa: F811
        self.lab, self.name = lab, name
        lab.seed = SEED  # the weights of the undisturbed run
        lab.site({**SITE, "mem": "2G", "grace": "10s", "export": ["MEDGEN_FAULT", "MEDGEN_FAULT_LOG"], **site})
        self.log = lab.folder / "faults.log"
        lab.environment.update(MEDGEN_FAULT=";".join(faults), MEDGEN_FAULT_LOG=str(self.log), XDG_CACHE_HOME=str(lab.folder / "home_cache"))
        self.spec = lab.spec(name, stages, data=DATA)

    def submit(self, *options: str) -> str:
        done = self.lab.submit(self.spec, *options)
        return done.stdout + done.stderr

    @property
    def run(self) -> RunDir:
        return RunDir(self.lab.run(self.name))

    def fired(self, words: str) -> str:
        """The first line of the faults' log that begins so, or nothing."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return next((line for line in lines if line.startswith(words)), "")

    def wait_for(self, words: str) -> str:
        return str(self.lab.slurm.wait_for(lambda: self.fired(words), 300))

    def jobs(self, stage: str = "train") -> list[dict[str, str]]:
        """Of this folder's run, the last one first: another test process may have made a run of the same name and seed."""
        rows = [row for row in self.lab.jobs(self.name) if f".{stage}." in row["name"] and row["name"].endswith(folder_tag(self.run))]
        return sorted(rows, key=lambda row: -int(row["id"]))

    def job(self, stage: str = "train") -> str:
        return self.jobs(stage)[0]["id"]

    def slurm(self, *command: str) -> None:
        self.lab.slurm.run(*command)

    def attempts(self, stage: str = "train") -> list[tuple[int, str, str]]:
        """(the step it began from, how it ended, what came next) of each."""
        started = [event["from_step"] for event in self.lab.events(self.name, "task_started") if event["stage"] == stage]
        ended = [(event["status"], event["next"]) for event in self.lab.events(self.name, "task_ended") if event["stage"] == stage]
        assert len(started) == len(ended), "every attempt has an end"
        return [(step, *end) for step, end in zip(started, ended, strict=True)]

    def time_of(self, kind: str, attempt: int) -> float:
        return next(float(event["time"]) for event in self.lab.events(self.name, kind) if event["attempt"] == attempt)

    def lives(self, stage: str = "train") -> list[str]:
        """What the accounting says of each life of the job, when it has heard of the end."""
        job = self.job(stage)

        def states() -> list[str]:
            words = self.lab.slurm.run("sacct", "-X", "-D", "-n", "-P", "-j", job, "-o", "State").stdout.split("\n")
            found = [word.split()[0] for word in words if word.strip()]
            return found if found and found[-1] not in ("RUNNING", "PENDING", "") else []

        return list(self.lab.slurm.wait_for(states, 60))

    def wait_until_done(self) -> None:
        self.lab.wait(self.name, 600)
        self.lab.assert_done(self.name)
        states = self.lives()
        assert states[-1] == "COMPLETED" and all(state in REQUEUED for state in states[:-1]), f"Slurm called an unfinished task done: {states}"

    def assert_same_bits(self, reference: Undisturbed) -> None:
        """The weights and optimizer state of the undisturbed run, every step logged once, and nothing half-written left."""
        folder = self.run.checkpoints("train")
        last = checkpoint.newest(folder, print)
        assert last is not None and (last.step, last.sha256) == (STEPS, reference.sha256)
        assert self.logged_steps() == list(range(1, STEPS + 1)), "every sample once"
        assert not list(folder.glob(".*")), "nothing half-written is left"
        assert self.lab.medgen("watch", self.name, "--once").returncode == 0
        assert json.loads(self.lab.medgen("why", self.name, "--json").stdout)["findings"] == []

    def logged_steps(self) -> list[int]:
        lines = [json.loads(line) for line in self.run.training_log("train").read_text().splitlines()]
        return [line["step"] for line in lines if "val_loss" not in line]


@dataclass(frozen=True)
class Undisturbed:
    """A training that nothing happened to. `start_seconds`: until its first step was logged."""

    sha256: str
    start_seconds: float


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Undisturbed:
    """The weights of an undisturbed training of the same two ranks on this machine. Made once for all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "undisturbed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            spec = {"version": 1, "name": "reference", "seed": SEED, "data": DATA, "stages": {"train": {"kind": "train", "config": NET, "resources": {"processes": 2, "cpus": 2}}}}
            (folder / "reference.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
            environment = {**os.environ, "MEDGEN_CACHE": str(cache), "MEDGEN_RUNS": str(folder / "runs")}
            subprocess.run([sys.executable, "-m", "medgen", "submit", "reference.yaml", "--local"], cwd=folder, env=environment, check=True, capture_output=True, timeout=300)
    [commit] = (folder / "runs").glob(f"reference-*/train/ckpt/step-{STEPS:06d}")
    last = checkpoint.newest(commit.parent, print)
    assert last is not None
    run = RunDir(commit.parent.parent.parent)
    started = next(event["time"] for event in run.events() if event["event"] == "task_started")
    return Undisturbed(last.sha256, json.loads(run.training_log("train").read_text().splitlines()[0])["time"] - started)


def training(**changes: Any) -> dict[str, Any]:
    """One stage of two ranks on one node."""
    return {"train": {"kind": "train", "config": NET, "resources": TWO_RANKS, **changes}}


def steps_ended(run: RunDir, attempt: int) -> float:
    """When the script had the exit code of its ranks, in whole unix seconds: its own words."""
    section = batch_section(run, "train", 0, attempt)
    told = re.search(r"^medgen: ended with exit code \d+ at (\S+)$", section, re.MULTILINE)
    assert told is not None, section
    return datetime.strptime(told[1], "%Y-%m-%dT%H:%M:%S%z").timestamp()


def rank_pid(run: RunDir, rank: int, attempt: int) -> int:
    """The process of a rank: the one whose environment and command line say so."""
    for folder in Path("/proc").iterdir():
        try:
            command, environment = (folder / "cmdline").read_bytes().split(b"\0"), (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run.code).encode() in command and str(attempt).encode() == command[-2] and f"SLURM_PROCID={rank}".encode() in environment and b"train" in command:
            return int(folder.name)
    raise AssertionError(f"rank {rank} of attempt {attempt} does not run")


@pytest.mark.fault("F2", "F11")
def test_two_signals_in_one_epoch_and_a_kill_while_restoring(lab: Lab, reference: Undisturbed, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    job = Disturbed(lab, "signals", training(), [
        "site=step,attempt=0,rank=0,step=3,action=sleep:5", "site=step,attempt=1,rank=0,step=7,action=sleep:5", "site=ckpt.load,attempt=2,rank=0,action=kill9",
    ])  # fmt: skip
    job.submit()
    for attempt, step in ((0, 3), (1, 7)):
        job.wait_for(f"step sleep stage=train shard=0 rank=0 attempt={attempt} step={step}")
        job.slurm("scancel", "--signal=USR2", job.job())
    killed = job.wait_for("ckpt.load kill9")
    job.wait_until_done()
    record_property("fired", f"USR2 twice; {killed}")
    record_property("recovery_seconds", job.time_of("task_started", 1) - job.time_of("task_ended", 0))
    assert 3 < 7 < STEPS_PER_EPOCH
    assert job.attempts() == [
        (0, "interrupted", "goes on from what it saved"), (3, "interrupted", "goes on from what it saved"), (7, "failed", "will be tried again"), (7, "done", "done"),
    ]  # fmt: skip
    assert "stopped by SIGUSR2 after step 3" in lab.events("signals", "task_ended")[0]["cause"]
    job.assert_same_bits(reference)


@pytest.mark.fault("F3", "F5")
def test_requeued_without_a_warning_then_one_rank_is_killed(lab: Lab, reference: Undisturbed, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    job = Disturbed(lab, "requeued", training(), ["site=step,attempt=0,rank=0,step=4,action=sleep:4", "site=step,attempt=1,rank=1,step=8,action=kill9"])
    job.submit()
    job.wait_for("step sleep")
    job.slurm("scontrol", "requeue", job.job())
    killed = job.wait_for("step kill9")
    fault_time = job.log.stat().st_mtime
    job.wait_until_done()
    record_property("fired", f"scontrol requeue; {killed}")
    record_property("recovery_seconds", job.time_of("task_started", 2) - fault_time)
    assert job.attempts() == [(0, "interrupted", "goes on from what it saved"), (4, "failed", "will be tried again"), (5, "done", "done")]
    assert "Slurm took the job" in lab.events("requeued", "task_ended")[0]["cause"]
    assert steps_ended(job.run, 1) - fault_time <= 10 + 1, "the other rank does not wait for the dead one"
    job.assert_same_bits(reference)


@pytest.mark.fault("F6")
def test_a_rank_that_hangs(lab: Lab, reference: Undisturbed, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    job = Disturbed(lab, "hangs", training(), ["site=step,attempt=0,rank=1,step=8,action=stop"], lost="20s")
    job.submit()
    fired = job.wait_for("step stop")
    fault_time, stopped = job.log.stat().st_mtime, rank_pid(job.run, 1, 0)
    lab.slurm.wait_for(lambda: lab.events("hangs", "rank_lost"), 200)
    job.wait_until_done()
    record_property("fired", fired)
    record_property("recovery_seconds", job.time_of("task_started", 1) - fault_time)
    [silent], [lost] = lab.events("hangs", "rank_silent"), lab.events("hangs", "rank_lost")
    assert (silent["rank"], silent["told_by"]) == (1, 0) and "rank 1 on " in lost["cause"]
    assert not Path("/proc", str(stopped)).exists(), "it holds nothing any more"
    assert job.attempts() == [(0, "failed", "will be tried again"), (5, "done", "done")]
    assert lab.events("hangs", "task_ended")[0]["cause"] == lost["cause"]
    job.assert_same_bits(reference)


@pytest.mark.fault("F4", "F9", "F18")
def test_what_happens_while_a_checkpoint_is_written(lab: Lab, reference: Undisturbed, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    """A signal during the write, the other rank killed during the next one, then all ranks at once."""
    job = Disturbed(lab, "writes", training(), [
        "site=ckpt.write,attempt=0,nth=2,action=sleep:5", "site=ckpt.write,attempt=1,nth=2,action=sleep:60", "site=step,attempt=2,step=8,action=kill9",
    ])  # fmt: skip
    job.submit()
    written = job.wait_for("ckpt.write sleep stage=train shard=0 rank=0 attempt=0")
    job.slurm("scancel", "--signal=USR2", job.job())
    job.wait_for("ckpt.write sleep stage=train shard=0 rank=0 attempt=1")
    assert job.run.saved_step("train", 0) == 6
    steps = sorted(path.name for path in job.run.checkpoints("train").glob("step-*"))
    assert steps == ["step-000005", "step-000006"] and not any(map(checkpoint.problem_with, job.run.checkpoints("train").glob("step-*")))
    os.kill(rank_pid(job.run, 1, 1), signal.SIGKILL)
    killed = job.wait_for("step kill9")
    lab.wait("writes", 300)
    assert job.attempts() == [(0, "interrupted", "goes on from what it saved"), (6, "failed", "will be tried again"), (6, "failed", "not tried again")]
    assert job.lives()[-1] == "FAILED"
    assert lab.medgen("watch", "writes", "--once", expect=1)
    job.submit()  # new budgets
    job.wait_until_done()
    record_property("fired", f"{written}; USR2; rank 1 killed; {killed}")
    assert job.attempts()[3:] == [(6, "done", "done")]
    job.assert_same_bits(reference)


def kill_everything_of(job: str) -> list[str]:
    """A job's step daemons with SIGKILL, then the shell and the ranks that they have left behind; returns their names."""

    def is_step_daemon(process: Path) -> bool:
        return (process / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode())

    def was_started_by_one(process: Path) -> bool:
        environment = (process / "environ").read_bytes().split(b"\0")
        return f"SLURM_JOB_ID={job}".encode() in environment and any(entry.startswith(b"SLURMD_NODENAME=") for entry in environment)

    killed = []
    for belongs in (is_step_daemon, was_started_by_one):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if belongs(process):
                    killed.append((process / "comm").read_text().strip())
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:  # it has ended
                continue
    return killed


@pytest.mark.fault("F7")
def test_the_step_daemon_is_lost(lab: Lab, reference: Undisturbed, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    job = Disturbed(lab, "daemon", training(), ["site=step,attempt=0,rank=0,step=7,action=sleep:600"])
    job.submit()
    fired = job.wait_for("step sleep")
    number = job.job()
    killed = kill_everything_of(number)
    assert any(name.startswith("slurmstepd") for name in killed), killed
    for name in ("SLURM_CONF", "XDG_CACHE_HOME", "PATH"):
        monkeypatch.setenv(name, lab.environment[name])
    for seconds in ("SLURM_STALE_SECONDS", "LOST_SECONDS", "BEAT_SECONDS"):
        monkeypatch.setattr(judge, seconds, 0)  # nobody waits five minutes here
    [seen] = Reader(job.run, Patient()).read().stages[0].tasks
    assert job.jobs()[0]["state"] == "RUNNING", "Slurm does not know"
    assert seen.word == "lost" and f"scancel {number}" in str(seen.cause), (seen.word, seen.cause)
    job.slurm("scontrol", "update", f"JobId={number}", "TimeLimit=1")
    lab.wait("daemon", 300)
    assert "COMPLETED" not in job.lives()
    job.submit()
    job.wait_until_done()
    record_property("fired", f"{fired}; killed: {', '.join(sorted(set(killed)))}")
    assert [(step, status) for step, status, _ in job.attempts()] == [(0, "interrupted"), (5, "done")]
    job.assert_same_bits(reference)


@pytest.mark.fault("F8")
def test_a_signal_before_the_handlers_are_there(lab: Lab, reference: Undisturbed, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    """First while the interpreter has not even begun, then while it imports."""
    slow = lab.folder / "slow" / "bin"
    slow.mkdir(parents=True)
    mark = lab.folder / "interpreter_begins"
    (slow / "activate").write_text(f"export PATH={slow}:$PATH\n")
    (slow / "python").write_text(f'#!/bin/bash\ncase "$*" in *"/code train "*"--attempt 0"*) touch {mark}.$SLURM_PROCID; sleep 6 ;; esac\nexec {sys.executable} "$@"\n')
    (slow / "python").chmod(0o755)
    job = Disturbed(lab, "early", training(), ["site=start,attempt=0,rank=1,action=sleep:5"], environment={"venv": str(slow.parent)})
    job.submit()
    lab.slurm.wait_for(lambda: mark.with_name(f"{mark.name}.1").exists() and mark.with_name(f"{mark.name}.0").exists(), 60)
    job.slurm("scancel", "--signal=USR2", job.job())
    fired = job.wait_for("start sleep")
    job.slurm("scancel", "--signal=USR2", job.job())
    job.wait_until_done()
    record_property("fired", f"USR2 during the sleep of the interpreter; USR2 after {fired}")
    assert job.attempts() == [(0, "interrupted", "goes on from what it saved"), (1, "done", "done")]
    job.assert_same_bits(reference)


@pytest.mark.fault("F10")
def test_a_step_that_is_longer_than_the_grace(lab: Lab, reference: Undisturbed, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    job = Disturbed(lab, "long", training(), ["site=step,attempt=0,step=6,action=sleep:600"])
    job.submit()
    fired = job.wait_for("step sleep")
    job.slurm("scancel", "--signal=USR2", job.job())
    job.slurm("scontrol", "update", f"JobId={job.job()}", "TimeLimit=1")
    lab.wait("long", 300)
    assert job.lives()[-1] == "TIMEOUT", job.lives()
    found = json.loads(lab.medgen("why", "long", "--json", expect=1).stdout)["findings"][0]
    assert found["cause"]["kind"] == "TIMEOUT", found
    told = job.submit()
    job.wait_until_done()
    record_property("fired", f"{fired}; USR2; then the limit")
    assert "the grace of 10 s is short" in told and "gives enough" in told
    assert [(step, status) for step, status, _ in job.attempts()] == [(0, "interrupted"), (5, "done")]
    job.assert_same_bits(reference)


@pytest.mark.fault("F12")
def test_a_signal_to_everything_reaches_the_ranks_alone(lab: Lab, reference: Undisturbed, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    """torchrun's agents take a signal for the end of everything."""
    job = Disturbed(lab, "agents", training(launcher="torchrun"), ["site=step,attempt=0,rank=0,step=4,action=sleep:5"])
    job.submit()
    fired = job.wait_for("step sleep")
    job.slurm("scancel", "--full", "--signal=USR2", job.job())
    job.wait_until_done()
    record_property("fired", f"{fired}; USR2 to the shell, the agent and the ranks")
    assert job.attempts() == [(0, "interrupted", "goes on from what it saved"), (4, "done", "done")]
    job.assert_same_bits(reference)


@pytest.mark.fault("F13")
def test_slurm_does_not_take_the_job_back(lab: Lab, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    shims = lab.folder / "shims"
    shims.mkdir()
    (shims / "scontrol").write_text(
        f"#!/bin/bash\n[ \"$1\" != requeue ] || {{ touch {shims}/asked; echo 'Requested operation is presently disabled' >&2; exit 1; }}\nexec {shutil.which('scontrol')} \"$@\"\n"
    )
    (shims / "scontrol").chmod(0o755)
    once = f"[ -e {shims}/before ] || {{ touch {shims}/before; exit 143; }}; echo a > $MEDGEN_OUT/a"
    job = Disturbed(lab, "refused", {
        "train": {"kind": "command", "run": once}, "after": {"kind": "command", "needs": ["train"], "run": "echo once >> $MEDGEN_OUT/runs"},
    }, [], setup=[f"export PATH={shims}:$PATH"])  # fmt: skip
    job.submit()
    lab.wait("refused", 120)
    assert (shims / "asked").exists()
    record_property("fired", "scontrol requeue said: Requested operation is presently disabled")
    [event] = lab.events("refused", "requeue_refused")
    assert event["next"] == "submit again to go on"
    assert job.lives() == ["FAILED"]
    state = json.loads(lab.medgen("watch", "refused", "--once", "--json", expect=4).stdout)
    assert state["stages"][0]["tasks"][0]["word"] == "interrupted", state
    [found] = [item for item in json.loads(lab.medgen("why", "refused", "--json", expect=1).stdout)["findings"] if item["stage"] == "train"]
    assert found["cause"]["kind"] not in ("USER", "INPUT"), found
    job.submit()
    job.wait_until_done()
    assert (job.run.made("after", 0) / "runs").read_text() == "once\n"


@pytest.mark.fault("F14")
def test_what_makes_no_progress_is_given_up(lab: Lab, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    """One training crashes at the same step each time, another is stopped before its first."""
    stage = {"kind": "train", "config": NET, "resources": {"cpus": 1, "mem": "1G", "time": "10m"}}
    after = {"kind": "command", "run": "touch $MEDGEN_OUT/ran"}
    faults = ["site=step,stage=train,step=3,action=kill9", "site=start,stage=stopped,action=exit:3"]
    job = Disturbed(lab, "stuck", {"train": stage, "stopped": stage, "after": {**after, "needs": ["train"]}, "behind": {**after, "needs": ["stopped"]}}, faults)
    job.submit()
    lab.wait("stuck", 400)
    record_property("fired", job.log.read_text())
    assert [status for _, status, _ in job.attempts("train")] == ["failed", "failed"]
    assert job.attempts("train")[-1][2] == "not tried again"
    assert [status for _, status, _ in job.attempts("stopped")] == ["interrupted"] * 3
    assert job.attempts("stopped")[-1][2].startswith("not tried again: no progress in 3 attempts")
    assert len(job.log.read_text().splitlines()) == 5
    for stage_name in ("after", "behind"):
        assert not (job.run.made(stage_name, 0) / "ran").exists() and lab.outcome("stuck", stage_name) is None
    assert "COMPLETED" not in job.lives("train") + job.lives("stopped")
    lab.medgen("watch", "stuck", "--once", expect=1)


@pytest.mark.fault("F1")
@pytest.mark.parametrize("restart", ["requeue", "chain"])
def test_a_training_longer_than_its_time_limit(lab: Lab, reference: Undisturbed, restart: str, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    """More than a minute of steps in jobs of one minute; of more on a machine so busy that this is over before the first step."""
    minutes = 1 + int(reference.start_seconds // 20)
    slow = [f"site=step,rank=0,step={step},action=sleep:{1.5 * minutes}" for step in range(1, STEPS + 1)]
    stages = {**training(resources={**TWO_RANKS, "time": f"{minutes}m"}), "after": {"kind": "command", "needs": ["train"], "run": "echo once >> $MEDGEN_OUT/runs"}}
    job = Disturbed(lab, restart, stages, slow, grace=f"{10 * minutes + 5}s")
    job.submit(*(["-o", "site.restart=chain", "-o", "stages.train.segments=6"] if restart == "chain" else []))
    lab.wait(restart, 800)
    lab.assert_done(restart)
    attempts = job.attempts()
    assert len(attempts) >= 2 and [status for _, status, _ in attempts] == ["interrupted"] * (len(attempts) - 1) + ["done"]
    steps = [step for step, _, _ in attempts]
    assert steps == sorted(steps) and steps[-1] > 0, "each goes on where the one before has saved"
    record_property("fired", f"{len(attempts)} jobs of {minutes} min, from the steps {steps}")
    ended, started = lab.events(restart, "task_ended"), lab.events(restart, "task_started")
    record_property("recovery_seconds", started[1]["time"] - ended[0]["time"])
    causes = [end["cause"] for end in ended if end["status"] == "interrupted"]
    assert any("SIGUSR2" in cause for cause in causes) and all("SIGUSR2" in cause or "time limit" in cause for cause in causes), causes
    assert (job.run.made("after", 0) / "runs").read_text() == "once\n"
    jobs = job.jobs()
    assert len(jobs) == (6 if restart == "chain" else 1)
    if restart == "chain":
        segments = [start["segment"] for start in started if start["stage"] == "train"]
        assert segments == sorted(segments)
        states = {int(row["name"].split(".")[4].partition("-")[2]): row["state"] for row in jobs}
        assert all((state == "COMPLETED") == (segment >= segments[-1]) for segment, state in states.items()), states
    job.assert_same_bits(reference)


@pytest.mark.fault("F42")
def test_more_memory_and_another_node_are_in_force_at_the_next_start(lab: Lab, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    """Too little memory at the first attempt, then a node whose GPU cannot be used."""
    bad = lab.folder / "bad" / "bin"
    bad.mkdir(parents=True)
    (bad / "activate").write_text(f"export PATH={bad}:$PATH\n")
    (bad / "python").write_text(f"""#!/bin/bash
case "$*" in *"/code train "*"--attempt 1") echo $SLURMD_NODENAME > {bad}/node ;; esac
case "$*" in *"/code train "*) [ ! -e {bad}/node ] || [ $SLURMD_NODENAME != $(cat {bad}/node) ] || {{ echo "no GPU can be used on $SLURMD_NODENAME"; exit 1; }} ;; esac
exec {sys.executable} "$@"
""")  # fmt: skip
    (bad / "python").chmod(0o755)
    lab.environment["MEDGEN_CACHE"] = str(lab.folder / "cache")  # what is remembered of a node is remembered there
    one = {"train": {"kind": "train", "config": NET, "resources": {"cpus": 1, "mem": "1000M", "time": "10m"}}}
    job = Disturbed(lab, "changed", one, ["site=start,attempt=0,action=oom"], environment={"venv": str(bad.parent)})
    job.submit()
    fired = job.wait_for("start oom")
    lab.slurm.wait_for(lambda: (bad / "node").exists(), 240)
    node = (bad / "node").read_text().strip()
    shown = lab.slurm.run("scontrol", "show", "job", job.job()).stdout
    assert "MinMemoryNode=1500M" in shown, shown
    job.wait_until_done()
    record_property("fired", f"{fired}; no GPU can be used on {node}")
    shown = lab.slurm.run("scontrol", "show", "job", job.job()).stdout
    assert f"ExcNodeList={node}\n" in shown and "MinMemoryNode=1500M" in shown, shown
    assert [end["node"] == node for end in lab.events("changed", "task_ended")][1:] == [True, False]
    assert [end["cause_kind"] for end in lab.events("changed", "task_ended")] == ["OOM", "NODE_FAIL", None]
    assert lab.medgen("nodes", "--json").stdout.count(node) >= 1
