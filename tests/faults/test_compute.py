"""Faults of compute and numerics (F41 to F45), each made to happen in the real thing and seen to have happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_NET, tiny_spec
from slurm.conftest import slurm  # noqa: F401  (a fixture)
from slurm.test_submit import SITE, Lab, lab  # noqa: F401  (a fixture)
from test_pipeline import Medgen, WriteSpec, _equal, _last_tensors, only_run

Record = Callable[[str, object], None]
DATA = {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2}
NET = {**TINY_NET, "strategy": "ddpm", "mode": "bravo", "batch_size": 4,
       "loop": {"log_steps": 1, "checkpoint_steps": 1, "preview_images": 0, "validate_epochs": 1.0}}  # fmt: skip


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def fired(path: Path) -> list[str]:
    """What the armed faults told of themselves."""
    return path.read_text().splitlines() if path.exists() else []


# --- F42: too little memory ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("F42")
@pytest.mark.timeout(420)
def test_slurm_kills_for_memory_and_the_next_attempt_has_half_as_much_again(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """Two trainings that need about 900 MiB each: 800 become 1200, which is enough; 400 become 600, which is not."""
    lab.site({**SITE, "export": ["MEDGEN_FAULT", "MEDGEN_FAULT_LOG"]})
    lab.environment.update(MEDGEN_FAULT="site=start,action=hold:600", MEDGEN_FAULT_LOG=str(lab.folder / "fired"))
    stages = {name: {"kind": "train", "config": NET, "resources": {"cpus": 1, "mem": mem}} for name, mem in (("enough", "800M"), ("never", "400M"))}
    lab.submit(lab.spec("memory", stages, data=DATA))
    lab.wait("memory", 360)
    killed = [line for name in stages for line in (lab.run("memory") / "logs" / name / "s0" / "batch.log").read_text().splitlines() if "memory limit" in line]
    record_property("fired", killed[0])
    assert len(fired(lab.folder / "fired")) == 4, "two attempts at each"

    ends = {name: [end for end in lab.events("memory", "task_ended") if end["stage"] == name] for name in stages}
    assert [(end["status"], end["cause_kind"]) for end in ends["enough"]] == [("failed", "OOM"), ("done", None)], ends
    assert ends["enough"][0]["next"] == "will be tried again with 1200 MiB of memory instead of 800"
    assert [(end["status"], end["cause_kind"], end["again"]) for end in ends["never"]] == [("failed", "OOM", True), ("failed", "OOM", False)], ends
    assert ends["never"][1]["next"] == "not tried again: it had too little memory twice"
    record_property("recovery_seconds", ends["enough"][1]["time"] - ends["enough"][0]["time"])
    asked = {row["name"].split(".")[2]: lab.slurm.run("scontrol", "show", "job", "--oneliner", row["id"]).stdout for row in lab.jobs("memory")}
    assert "MinMemoryNode=1200M" in asked["enough"] and "MinMemoryNode=600M" in asked["never"]
    assert all("Restarts=1 " in words for words in asked.values()), "the same jobs, started once more"
    outcome = lab.outcome("memory", "enough")
    assert outcome is not None and outcome["status"] == "done"

    finding = json.loads(lab.medgen("why", "memory", "--json", expect=1).stdout)["findings"]
    assert [(item["stage"], item["cause"]["kind"], item["cause"]["certain"]) for item in finding] == [("never", "OOM", True)]
    assert any("resources.mem=" in line for line in finding[0]["advice"]), finding[0]["advice"]
