"""logs, why, usage and tensorboard on runs of a real Slurm: what its own words look like, not what we think they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Medgen = Callable[..., subprocess.CompletedProcess[str]]
SITE = {"name": "lab", "scheduler": "slurm", "cpus": 8, "gpus": 4, "cpus_per_gpu": 1, "mem": "400M", "grace": "30s", "partitions": {"gpu": "GPUQ", "cpu": "GPUQ"}}
HUNGRY = """python3 -c "
import time
data = []
for number in range(300):
    data.append(bytearray(10_000_000)); time.sleep(0.02)
" """


class Lab:
    """A folder with a site profile and specs of shell commands, on a real Slurm."""

    def __init__(self, folder: Path, slurm: Any, medgen: Medgen, environment: dict[str, str]):
        self.folder, self.slurm, self.medgen, self.environment = folder, slurm, medgen, environment
        environment.update(slurm.environment, XDG_CACHE_HOME=str(folder / "cache"))
        self.name = f"seen{os.urandom(3).hex()}"
        (folder / "lab.yaml").write_text(yaml.safe_dump(SITE))

    def submit(self, stages: dict[str, Any]) -> None:
        stages = {name: {"kind": "command", "resources": {"time": "5m"}, **stage} for name, stage in stages.items()}
        spec = self.folder / f"{self.name}.yaml"
        spec.write_text(yaml.safe_dump({"version": 1, "name": self.name, "stages": stages}, sort_keys=False))
        self.medgen("submit", spec, "--site", self.folder / "lab.yaml")

    @property
    def run(self) -> Path:
        [found] = (self.folder / "runs").glob(f"{self.name}-*")
        return found

    def states(self) -> dict[str, str]:
        """Stage -> what squeue says of its jobs that have not ended."""
        rows = [line.split("|") for line in self.slurm.run("squeue", "-h", "-o", "%j|%T").stdout.splitlines()]
        return {name.split(".")[2]: state for name, state in rows if name.startswith(f"medgen.{self.run.name}.")}

    def wait_until_over(self, seconds: float = 120) -> None:
        self.slurm.wait_for(lambda: not self.states(), seconds)

    def record_now(self) -> dict[str, Any]:
        """What `medgen why` says while it may change."""
        done = subprocess.run([sys.executable, "-m", "medgen", "why", self.name, "--json"], cwd=self.folder, env=self.environment, capture_output=True, text=True)
        record: dict[str, Any] = json.loads(done.stdout)
        return record

    def why_now(self) -> dict[str, dict[str, Any]]:
        return {finding["stage"]: finding for finding in reversed(self.record_now()["findings"])}

    def again(self) -> list[dict[str, Any]]:
        """What tasks have met that go on."""
        found: list[dict[str, Any]] = self.record_now()["again"]
        return found

    def why(self, expect: int) -> dict[str, dict[str, Any]]:
        """Stage -> its first finding."""
        record = json.loads(self.medgen("why", self.name, "--json", expect=expect).stdout)
        return {finding["stage"]: finding for finding in reversed(record["findings"])}

    def job(self, stage: str) -> int:
        events = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return int(next(event["job_id"] for event in reversed(events) if event["event"] == "job_submitted" and f".{stage}." in event["name"]))


@pytest.fixture
def lab(tmp_path: Path, slurm: Any, medgen: Medgen, environment: dict[str, str]) -> Lab:
    return Lab(tmp_path, slurm, medgen, environment)


def test_every_ending_is_told_with_its_cause(lab: Lab) -> None:
    lab.submit({
        "hungry": {"run": HUNGRY, "resources": {"time": "5m", "mem": "300M"}},
        "buggy": {"foreach": ["a", "b"], "run": '[ $MEDGEN_ITEM = a ] || python3 -c "print(1/0)"'},
        "full": {"run": "python3 -c \"open('/dev/full', 'w').write('x' * 100000)\""},
        "slain": {"run": "kill -9 $$"},
        "after": {"needs": ["buggy"], "run": "true"},
    })  # fmt: skip
    lab.wait_until_over()
    found = lab.why(expect=1)
    kinds = {stage: (finding["cause"]["kind"], finding["cause"]["certain"], finding["shards"]) for stage, finding in found.items()}
    assert kinds == {
        "hungry": ("OOM", True, [0]), "buggy": ("USER", True, [1]), "full": ("DISK_FULL", True, [0]), "slain": ("OOM", False, [0]), "after": ("DEPENDENCY", True, [0]),
    }  # fmt: skip
    assert found["buggy"]["cause"]["detail"] == "exit code 1: ZeroDivisionError: division by zero"
    assert found["buggy"]["job_id"] == f"{lab.job('buggy')}_1" and found["buggy"]["node"] in ("n1", "n2")
    assert any("resources.mem=600M" in line for line in found["hungry"]["advice"])
    assert "ZeroDivisionError" in lab.medgen("logs", f"{lab.name}/buggy/1").stdout
    used = json.loads(lab.medgen("usage", lab.name, "--json").stdout)
    assert used["source"] == "accounting" and not used["notes"]
    stages = {stage["name"]: stage for stage in used["stages"]}
    assert list(stages["hungry"]["wasted_hours"]) == ["OOM"] and stages["hungry"]["used_mebibytes"] > 300
    assert (stages["buggy"]["attempts"], stages["buggy"]["done"], stages["after"]["attempts"]) == (2, 1, 0)
    assert stages["buggy"]["wait_seconds"] is not None


@pytest.mark.fault("F28")
@pytest.mark.timeout(180)
def test_a_set_up_that_fails_before_anything_was_told(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    (lab.folder / "lab.yaml").write_text(yaml.safe_dump({**SITE, "setup": ["echo before", "a_module_that_is_not load"]}))
    lab.submit({"step": {"run": "true"}})
    lab.wait_until_over()
    found = lab.why(expect=1)["step"]
    assert found["cause"]["kind"] == "SETUP" and "a_module_that_is_not load" in found["cause"]["detail"]
    record_property("fired", found["cause"]["detail"])
    assert "before" in lab.medgen("logs", lab.name).stdout


def test_jobs_that_are_held_or_cancelled_by_hand(lab: Lab) -> None:
    lab.submit({"first": {"run": "sleep 120"}, "second": {"needs": ["first"], "run": "true"}})
    lab.slurm.wait_for(lambda: lab.states().get("first") == "RUNNING")
    assert lab.why(expect=0) == {}
    lab.slurm.run("scontrol", "uhold", lab.job("second"))
    lab.slurm.wait_for(lambda: "second" in lab.why_now())
    held = lab.why_now()["second"]
    assert held["cause"]["kind"] == "CANCELLED" and f"scontrol release {lab.job('second')}" in held["cause"]["detail"]
    assert f"medgen cancel {lab.run.name}" in held["advice"]
    lab.slurm.run("scancel", lab.job("second"))
    lab.slurm.wait_for(lambda: "second" not in lab.states())
    gone = lab.why(expect=1)["second"]
    assert (gone["cause"]["kind"], gone["cause"]["certain"]) == ("CANCELLED", True)
    lab.medgen("cancel", lab.name)
    assert lab.why(expect=1)["first"]["cause"]["kind"] == "CANCELLED"


@pytest.mark.slow
def test_following_a_job_over_a_requeue_and_its_cost(lab: Lab) -> None:
    lab.submit({"step": {"run": 'echo "life $SLURM_RESTART_COUNT"; [ -n "$SLURM_RESTART_COUNT" ] || sleep 100'}})
    followed = lab.folder / "followed.txt"
    with followed.open("w") as output:
        following = subprocess.Popen(
            [sys.executable, "-m", "medgen", "logs", "-f", lab.name], cwd=lab.folder, env=lab.environment, stdout=output, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    lab.slurm.wait_for(lambda: "life" in followed.read_text())
    lab.slurm.run("scontrol", "requeue", lab.job("step"))
    _, stderr = following.communicate(timeout=240)
    assert following.returncode == 0, stderr
    assert "--- attempt 1 ---" in followed.read_text() and "life 1" in followed.read_text()
    assert "step shard 0: done" in stderr
    [stage] = json.loads(lab.medgen("usage", lab.name, "--json").stdout)["stages"]
    assert (stage["attempts"], stage["done"]) == (2, 1)  # both lives, although the accounting shows one of a job by default
    assert lab.why(expect=0) == {}


@pytest.mark.fault("F30")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_without_accounting_nothing_breaks(tmp_path: Path, slurm_without_accounting: Any, medgen: Medgen, environment: dict[str, str], record_property: Callable[[str, object], None]) -> None:
    lab = Lab(tmp_path, slurm_without_accounting, medgen, environment)
    lab.submit({"good": {"run": "sleep 1"}, "buggy": {"run": "echo no; exit 5"}, "after": {"needs": ["buggy"], "run": "true"}})
    lab.wait_until_over()
    found = lab.why(expect=1)
    assert {stage: finding["cause"]["kind"] for stage, finding in found.items()} == {"buggy": "USER", "after": "DEPENDENCY"}
    used = json.loads(lab.medgen("usage", lab.name, "--json").stdout)
    assert used["source"] == "events" and "accounting" in used["notes"][0]
    record_property("fired", used["notes"][0])
    assert {stage["name"]: stage["attempts"] for stage in used["stages"]} == {"good": 1, "buggy": 1, "after": 0}


def test_tensorboard_in_a_job(lab: Lab) -> None:
    from launch_stub import build

    run, _ = build(lab.folder / "runs", [{"name": "train", "kind": "train"}])
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.tensorboard("train"))) as writer:
        writer.add_scalar("loss", 0.5, 1)
    done = lab.medgen("tensorboard", "stub", "--job", "--site", lab.folder / "lab.yaml")
    lines = done.stdout.splitlines()
    job = int(lines[-1].rpartition("scancel ")[2])
    try:
        [node, port] = next((lab.folder / "runs" / ".cache").glob("medgen-tensorboard-*/address")).read_text().split()
        assert f"ssh -N -L {port}:{node}:{port} " in lines[1]
        with urllib.request.urlopen(f"http://localhost:{port}/data/runs", timeout=60) as answer:  # its nodes are this machine
            assert answer.status == 200
        assert lab.slurm.state(job) == "RUNNING"
    finally:
        lab.slurm.run("scancel", job)
    lab.slurm.wait_for(lambda: lab.slurm.state(job) not in ("RUNNING", "COMPLETING"))


def test_tensorboard_in_a_job_that_cannot_start(lab: Lab) -> None:
    from launch_stub import build

    build(lab.folder / "runs", [{"name": "train", "kind": "train"}])
    (lab.folder / "lab.yaml").write_text(yaml.safe_dump({**SITE, "setup": ["echo no such module; exit 3"]}))
    assert "no such module" in lab.medgen("tensorboard", "stub", "--job", "--site", lab.folder / "lab.yaml", expect=1).stderr
    (lab.folder / "lab.yaml").write_text(yaml.safe_dump({**SITE, "partitions": {"cpu": "nowhere"}}))
    assert "Slurm refused the job" in lab.medgen("tensorboard", "stub", "--job", "--site", lab.folder / "lab.yaml", expect=2).stderr


@pytest.mark.slow
def test_a_preempted_job_goes_on_and_the_reason_is_told(lab: Lab) -> None:
    (lab.folder / "lab.yaml").write_text(yaml.safe_dump({**SITE, "partitions": {"cpu": "low"}}))
    lab.submit({"step": {"run": '[ -n "$SLURM_RESTART_COUNT" ] || sleep 100'}})
    lab.slurm.wait_for(lambda: (lab.run / "hb" / "step.0.json").exists())
    rival = lab.slurm.submit("--partition=GPUQ", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 5")
    lab.slurm.wait_for(lambda: lab.again(), 60)
    [again] = lab.again()
    assert (again["stage"], again["cause"]["kind"]) == ("step", "PREEMPTED"), again
    lab.wait_until_over(240)
    assert lab.slurm.state(rival) in ("COMPLETED", "")
    assert lab.why(expect=0) == {}
    [stage] = json.loads(lab.medgen("usage", lab.name, "--json").stdout)["stages"]
    assert (stage["attempts"], stage["done"]) == (2, 1)
