"""A rank that dies, wherever it stands, frees the GPUs of all others within seconds, on a Slurm as patient as most: KillWait is 30 s."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_NET

from medgen import fault

from .conftest import Slurm, shared_sandbox
from .test_submit import SITE, Lab

KILL_WAIT_SECONDS = 30  # Slurm's default; the sandbox's own is shorter than what is tested here
FREE_SECONDS = 10  # the promise
SLACK_SECONDS = 8  # for a machine with more processes than cores; still far from KillWait
CONFIG = {**TINY_NET, "strategy": "ddpm", "mode": "bravo", "epochs": 100, "loop": {"log_steps": 10, "preview_images": 0, "validate_epochs": 2.0}}
DATA = {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2}
RESOURCES: dict[str, dict[str, Any]] = {
    "srun": {"nodes": 2, "processes": 1, "cpus": 1, "time": "10m", "mem": "2G"},
    "torchrun": {"nodes": 2, "processes": 1, "cpus": 1, "time": "10m", "mem": "2G"},
    "local": {"processes": 2, "cpus": 2},
}
# which rank dies where, and what the other does meanwhile
DEATHS = {
    "in a step": ("site=step,rank=1,step=5,action=kill9;site=step,rank=0,step=5,action=sleep:60", 1),
    "rank 0 in a step": ("site=step,rank=0,step=5,action=kill9;site=step,rank=1,step=5,action=sleep:60", 0),
    "in validation": ("site=validate,rank=1,action=kill9;site=validate,rank=0,action=sleep:60", 1),
    "where they meet": ("site=rdzv,rank=1,action=kill9", 1),
    "in its save": ("site=ckpt.write,rank=0,action=kill9", 0),
}
CASES = [("srun", death) for death in DEATHS] + [(launcher, death) for launcher in ("torchrun", "local") for death in ("in a step", "where they meet")]


@pytest.fixture(scope="session")
def patient_slurm() -> Iterator[Slurm]:
    for made in shared_sandbox("patient", "--without-accounting"):
        if made.folder is not None:
            settings = made.folder / "slurm.conf"
            settings.write_text(settings.read_text().replace("KillWait=10\n", f"KillWait={KILL_WAIT_SECONDS}\n"))
            made.run("scontrol", "reconfigure")
            assert f"KillWait                = {KILL_WAIT_SECONDS} sec" in made.run("scontrol", "show", "config").stdout
        yield made


@pytest.fixture
def lab(tmp_path: Path, patient_slurm: Slurm, medgen: Any, environment: dict[str, str]) -> Iterator[Lab]:
    made = Lab(tmp_path, patient_slurm, medgen, environment)
    yield made
    if (tmp_path / "runs").exists():
        medgen("cancel", "die")


def first_attempt(run: Path) -> list[int]:
    """The rank processes of a run's first attempt."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if folder.name.isdigit() and "train" in words and str(run) in words and words[-2:-1] == ["0"] and "--attempt" in words and "torch.distributed.run" not in words:
            found.append(int(folder.name))
    return found


def until(condition: Callable[[], Any], timeout_seconds: float, what: str) -> float:
    """How many seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_seconds, what
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.fault("F5")
@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "death"), CASES)
def test_a_dead_rank_frees_all(lab: Lab, launcher: str, death: str, record_property: Callable[[str, object], None]) -> None:
    faults, dead = DEATHS[death]
    fired = lab.folder / "fired"
    lab.environment |= {fault.VARIABLE: ";".join(f"{item},attempt=0" for item in faults.split(";")), fault.LOG_VARIABLE: str(fired)}
    lab.site({**SITE, "export": [fault.VARIABLE, fault.LOG_VARIABLE]})
    stage = {"kind": "train", "config": CONFIG, "launcher": "torchrun" if launcher == "torchrun" else "srun", "resources": RESOURCES[launcher]}
    spec = lab.spec("die", {"t": stage}, data=DATA)
    local = None
    if launcher == "local":
        local = subprocess.Popen([sys.executable, "-m", "medgen", "submit", str(spec), "--local"], cwd=lab.folder, env=lab.environment, stdout=subprocess.DEVNULL)
    else:
        lab.submit(spec)
    try:
        until(lambda: fired.exists() and "kill9" in fired.read_text(), 180, "the fault never happened")
        run = lab.run("die")
        ends: list[dict[str, Any]] = []

        def over() -> bool:
            ends[:] = [end for end in lab.events("die", "task_ended") if end["attempt"] == 0]
            return bool(ends) and not first_attempt(run)

        seconds = until(over, 60, "the other rank lives on")
        record_property("fired", f"{launcher}, {death}: {fired.read_text()}")
        record_property("freed_seconds", round(seconds, 1))
        assert seconds < FREE_SECONDS + SLACK_SECONDS
        assert ends[0]["again"]
        if death != "where they meet":  # the other may not have been there yet, and just hears TERM
            assert ends[0]["status"] == "failed"
            assert "SIGKILL" in ends[0]["cause"] or f"rank {dead} on " in ends[0]["cause"], ends
    finally:
        if local is not None:
            local.send_signal(signal.SIGTERM)
            local.wait(60)


@pytest.mark.fault("F6")
@pytest.mark.slow
def test_a_stopped_rank_is_given_up_and_the_job_goes_on(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    """Ended by the other rank; Slurm then ends the stopped one, and the job starts again."""
    fired = lab.folder / "fired"
    lab.environment |= {fault.VARIABLE: "site=step,rank=1,step=5,attempt=0,action=stop", fault.LOG_VARIABLE: str(fired)}
    lab.site({**SITE, "export": [fault.VARIABLE, fault.LOG_VARIABLE], "lost": "20s"})
    lab.submit(lab.spec("die", {"t": {"kind": "train", "config": {**CONFIG, "epochs": 2}, "resources": RESOURCES["srun"]}}, data=DATA))
    until(lambda: lab.events("die", "rank_lost"), 180, "nobody noticed")
    [lost] = lab.events("die", "rank_lost")
    lab.wait("die", 240)
    first = next(end for end in lab.events("die", "task_ended") if end["attempt"] == 0)
    assert first["cause"] == lost["cause"] and "rank 1 on " in first["cause"]
    assert "step stop" in fired.read_text()
    record_property("fired", fired.read_text())
    lab.assert_done("die")
