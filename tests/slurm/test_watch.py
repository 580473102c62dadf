"""Watching runs of a real Slurm: what squeue and sacct say in words, with few questions, and with no accounting at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medgen.launch import slurm as client
from medgen.rundir import RunDir
from medgen.watch import judge
from medgen.watch.poll import Patient
from medgen.watch.state import Reader, TaskState

from .test_submit import Lab, lab  # noqa: F401  (a fixture)

WAITING = 'for _ in $(seq 600); do [ -e "$MEDGEN_RUN/go" ] && break; sleep 0.2; done; echo x > $MEDGEN_OUT/x'
SMALL = {"mem": "100M", "time": "10m", "gpus": 0}


class Watched:
    """A lab whose watches never use an old answer of Slurm."""

    def __init__(self, lab: Lab, name: str, stages: dict[str, Any]):  # noqa: F811
        self.lab = lab
        self.name = name
        self.cache = lab.folder / "cache"
        lab.environment["XDG_CACHE_HOME"] = str(self.cache)
        lab.submit(lab.spec(name, stages))

    def look(self, expect: int = 4) -> dict[str, Any]:
        shutil.rmtree(self.cache / "medgen", ignore_errors=True)
        record: dict[str, Any] = json.loads(self.lab.medgen("watch", self.name, "--once", "--json", expect=expect).stdout)
        return record

    def task(self, stage: str, shard: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = next(item for item in self.look()["stages"] if item["name"] == stage)["tasks"][shard]
        return found

    def until(self, stage: str, word: str, timeout_seconds: float = 90) -> dict[str, Any]:
        """The first look at which a task is in a state."""
        seen = []
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            seen.append(self.task(stage))
            if seen[-1]["word"] == word:
                return seen[-1]
            time.sleep(0.5)
        pytest.fail(f"never {word}: {[(task['word'], task['cause'], task['reason']) for task in seen]}")

    def go(self) -> None:
        (self.lab.run(self.name) / "go").write_text("")

    def job(self, stage: str) -> str:
        return next(row["id"] for row in self.lab.jobs(self.name) if f".{stage}." in row["name"])


@pytest.fixture
def watched(lab: Lab) -> Callable[[str, dict[str, Any]], Watched]:  # noqa: F811
    return lambda name, stages: Watched(lab, name, stages)


def test_a_run_from_the_queue_to_its_end(watched: Callable[..., Watched]) -> None:
    stages = {
        "first": {"kind": "command", "run": WAITING, "resources": SMALL},
        "many": {"kind": "command", "needs": ["first"], "foreach": ["x", "y", "z"], "parallel": 1, "run": "echo x > $MEDGEN_OUT/x", "resources": SMALL},
    }
    run = watched("w_end", stages)
    folder = run.lab.shim("squeue", 'echo x >> $folder/asked; exec $real "$@"')
    run.lab.shim("sacct", 'echo x >> $folder/asked; exec $real "$@"')
    first = run.until("first", "running")
    assert first["job"] == run.job("first")
    state = run.look()
    assert (state["verdict"], state["on_slurm"], state["silence"]) == ("running", True, None)
    assert [task["word"] for task in state["stages"][1]["tasks"]] == ["queued"] * 3
    assert state["stages"][1]["tasks"][2]["job"] == run.job("many") + "_2"
    (folder / "asked").unlink()
    shown = run.lab.medgen("watch", run.name, "--once", expect=4).stdout
    assert "after first" in shown and "Slurm: 1 running, 3 queued" in shown
    assert not (folder / "asked").exists()  # the answer of a moment ago is good enough
    run.go()
    run.lab.wait(run.name)
    state = run.look(expect=0)
    assert (state["verdict"], state["where"], [stage["fraction"] for stage in state["stages"]]) == ("done", None, [1, 1])
    assert (folder / "asked").read_text().split() == ["x"]
    assert state["device_hours"] > 0


@pytest.mark.fault("F16", "F17")
def test_held_taken_back_and_suspended(watched: Callable[..., Watched], record_property: Callable[[str, object], None]) -> None:
    run = watched("w_states", {"only": {"kind": "command", "run": WAITING, "resources": SMALL}})
    run.until("only", "running")
    job = run.job("only")
    run.lab.slurm.run("scontrol", "suspend", job)
    assert run.until("only", "suspended")["cause"] == "Slurm has suspended it"
    run.lab.slurm.run("scontrol", "resume", job)
    run.until("only", "running")
    run.lab.slurm.run("scontrol", "requeuehold", job)
    held = run.until("only", "held")
    assert f"`scontrol release {job}`" in held["cause"]
    record_property("fired", "scontrol suspend, resume, requeuehold: Slurm said so each time")
    assert run.look()["verdict"] == "queued"
    run.lab.slurm.run("scontrol", "release", job)
    run.until("only", "running")
    run.go()
    run.lab.wait(run.name)
    assert run.look(expect=0)["verdict"] == "done"


def killed_outright(run: Watched, monkeypatch: pytest.MonkeyPatch, is_known: Callable[[int], bool]) -> TaskState:
    """Kill a job so that it can tell nothing, and wait until it `is_known`; returns what watch says of it, without the time
    it would wait for a late outcome."""
    run.until("only", "running")
    run.lab.slurm.wait_for(lambda: run.lab.events(run.name, "task_started"))
    run.lab.slurm.run("scancel", "--signal=KILL", "--batch", run.job("only"))
    run.lab.wait(run.name)
    shutil.rmtree(run.cache / "medgen", ignore_errors=True)
    assert run.look()["verdict"] == "running"  # its outcome might still appear
    for seconds in ("AWAITED_SECONDS", "BEAT_SECONDS"):
        monkeypatch.setattr(judge, seconds, 0)
    for name in ("SLURM_CONF", "XDG_CACHE_HOME", "PATH"):
        monkeypatch.setenv(name, run.lab.environment[name])
    run.lab.slurm.wait_for(lambda: is_known(int(run.job("only"))))
    shutil.rmtree(run.cache / "medgen")
    [task] = Reader(RunDir(run.lab.run(run.name)), Patient()).read().stages[0].tasks
    assert not run.lab.events(run.name, "task_ended")
    assert task.seconds < 300
    return task


def test_a_job_that_was_killed_outright(watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    run = watched("w_killed", {"only": {"kind": "command", "run": WAITING, "resources": SMALL}})

    def is_accounted(job: int) -> bool:
        """For a moment the row has neither a name nor how it ended."""
        return any(row.name.startswith("medgen.") and row.state == "FAILED" for row in client.accounting([job], time.time() - 3600))

    task = killed_outright(run, monkeypatch, is_accounted)
    assert (task.word, task.cause) == ("failed", "its job was killed by signal 9 and left no outcome")


@pytest.mark.fault("F30")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_accounting(slurm_without_accounting: Any, tmp_path: Path, medgen: Callable[..., subprocess.CompletedProcess[str]], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> None:
    here = Lab(tmp_path, slurm_without_accounting, medgen, environment)
    run = Watched(here, "w_alone", {"only": {"kind": "command", "run": WAITING, "resources": SMALL}})
    folder = here.shim("sacct", 'echo x >> $folder/asked; exec $real "$@"')
    task = killed_outright(run, monkeypatch, lambda job: True)
    assert (task.word, task.cause) == ("failed", "its job failed and left no outcome")
    asked = (folder / "asked").read_text()
    record_property("fired", "sacct was asked in vain")
    Reader(RunDir(here.run("w_alone")), Patient()).read()
    assert (folder / "asked").read_text() == asked  # that there is no accounting is remembered


@pytest.fixture
def held_array(slurm: Any) -> Iterator[tuple[int, list[int]]]:
    """A held array whose elements squeue writes as an expression with a step."""
    elements = list(range(0, 63, 2))
    job = slurm.submit("--hold", "--mem=10", "--output=/dev/null", "--job-name=medgen.a-0123456789.b.1.0", "--array=0-62:2%3", "--wrap=true")
    yield job, elements
    slurm.run("scancel", job)


def test_every_element_of_a_waiting_array_is_seen(slurm: Any, held_array: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue -r of Slurm 22.05 leaves out the last element of such an array: a task without a job."""
    job, elements = held_array
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    rows = [row for row in client.queue("medgen.a-0123456789.") if row.job_id == job]
    assert [row.array_task for row in rows] == elements
    assert {(row.state, row.reason, row.start) for row in rows} == {("PENDING", "JobHeldUser", None)}
    assert all(abs((row.submitted or 0) - time.time()) < 60 for row in rows)


def test_what_the_client_asks_of_a_cluster(slurm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    monkeypatch.setenv("SINFO_FORMAT", "%P")
    monkeypatch.setenv("SACCT_FORMAT", "JobID")
    name = f"medgen.a-{os.urandom(5).hex()}.b.1.0"
    job = slurm.submit("--hold", "--mem=10", "--output=/dev/null", f"--job-name={name}", "--wrap=sleep 0.1")
    assert "sleep 0.1" in client.write_batch_script(job)
    client.release([job])
    slurm.wait_for(lambda: slurm.state(job) == "COMPLETED")
    client.release([job])  # too late, and no failure
    client.cancel([job, 999_999])
    row = slurm.wait_for(lambda: next((item for item in client.accounting([job], time.time() - 3600) if (item.name, item.state) == (name, "COMPLETED")), None))  # a half row comes first
    assert (row.exit_code, row.signal, row.cpus, row.nodes) == (0, 0, 1, 1)
    known = {partition.name: partition for partition in client.partitions()}
    assert known["GPUQ"].is_default
    assert {feature for node_set in known["GPUQ"].node_sets for feature in node_set.features} >= {"a100", "h100"}
    assert [node_set.gpus for node_set in known["GPUQ"].node_sets] == [4, 4]
    assert client.config()["ClusterName"] == "sandbox"
    assert not client.queue(name + "x")
