"""A whole job on two nodes, with a preemption and a killed task on the way, makes the very files of an undisturbed local run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_NET

from .test_submit import SITE, Lab, lab  # noqa: F401  (a fixture)

NET = {**TINY_NET, "strategy": "ddpm", "mode": "bravo", "epochs": 100, "loop": {"log_steps": 10, "preview_images": 0, "validate_epochs": 50.0}}
STAGES: dict[str, Any] = {
    "train": {"kind": "train", "config": NET, "resources": {"time": "30m", "mem": "3G"}},
    "images": {"kind": "generate", "from": "train", "condition": "test", "count": 16, "chunk": 2, "shards": 8, "sampling": {"sampler": "ddim", "steps": 2},
               "resources": {"gpus": 1, "time": "10m", "mem": "1500M"}},
    "evaluate": {"kind": "evaluate", "of": "images", "metrics": ["ms_ssim_diversity", "swd", "kid"], "extractor": "random_conv", "shards": 2,
                 "resources": {"cpus": 1, "mem": "3G"}},
    "report": {"kind": "report", "resources": {"cpus": 1, "mem": "3G"}},
}  # fmt: skip
DATA = {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2}
# the same two ranks with one thread each
TWO_NODES = ["-o", "stages.train.resources.nodes=2", "-o", "stages.train.resources.processes=1", "-o", "stages.train.resources.cpus=1"]
ONE_MACHINE = ["-o", "stages.train.resources.processes=2", "-o", "stages.train.resources.cpus=2"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def processes(*words: str) -> list[int]:
    """The python processes of this machine whose command line has all the words."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        texts = [part.decode(errors="replace") for part in command]
        if folder.name.isdigit() and "python" in texts[0] and all(word in texts for word in words):
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.fault("F3")
def test_a_disturbed_job_on_two_nodes_equals_an_undisturbed_local_one(lab: Lab, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    if "low" not in lab.slurm.run("sinfo", "-h", "-o", "%R").stdout.split():
        pytest.skip("this cluster has no preemptible partition called low")
    spec = lab.spec("whole", STAGES, data=DATA)
    lab.site({**SITE, "mem": "3G"})
    lab.submit(spec, *TWO_NODES, "-o", 'stages.train.resources.slurm=["--partition=low"]')
    run = lab.run("whole")

    beat = run / "hb" / "train.0.json"
    lab.slurm.wait_for(lambda: beat.exists() and json.loads(beat.read_text())["step"] >= 20, 120)
    subprocess.run(
        ["sbatch", "--partition=GPUQ", "--nodes=2", "--exclusive", "--mem=100", "--time=1", "--output=/dev/null", "--wrap", "sleep 3"],
        env=lab.environment, check=True, capture_output=True,
    )  # fmt: skip
    lab.slurm.wait_for(lambda: len(lab.events("whole", "task_started")) == 2, 180)

    def killed_one() -> bool:
        for pid in processes("generate", "images", "3"):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    lab.slurm.wait_for(killed_one, 300)
    lab.wait("whole", 420)
    lab.assert_done("whole")
    ends = [(end["stage"], end["shard"], end["status"], end["next"]) for end in lab.events("whole", "task_ended")]
    assert ("train", 0, "interrupted", "goes on from what it saved") in ends
    [preempted] = [end["cause"] for end in lab.events("whole", "task_ended") if (end["stage"], end["status"]) == ("train", "interrupted")]
    assert "Slurm gave its place to another job" in preempted or "Slurm took the job" in preempted, preempted
    assert ("images", 3, "failed", "will be tried again") in ends
    assert {row["nodes"] for row in lab.jobs("whole") if ".train." in row["name"]} == {"n[1-2]"}
    assert {row["nodes"] for row in lab.jobs("whole") if ".images." in row["name"]} == {"n1", "n2"}
    started = [start for start in lab.events("whole", "task_started") if start["stage"] == "train"]
    assert started[1]["from_step"] >= 20, "it went on from what it had saved"

    taken = [lab.outcome("whole", "features_evaluate", shard) for shard in (0, 1)]
    assert all(outcome is not None and outcome["facts"]["images"] > 0 for outcome in taken), "an array took the features"

    record_property("fired", f"{preempted}; kill -9 of a shard")

    lab.environment["MEDGEN_RUNS"] = str(lab.folder / "elsewhere")
    lab.medgen("submit", spec, "--local", *ONE_MACHINE, timeout=600)
    [local] = (lab.folder / "elsewhere").glob("whole-*")
    assert local.name == run.name, "other resources are the same run"
    assert files_of(run / "images" / "dataset") == files_of(local / "images" / "dataset")


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_both_launchers_train_on_two_nodes_with_several_ranks_each(lab: Lab, launcher: str) -> None:  # noqa: F811
    config = {**NET, "epochs": 2, "loop": {"log_steps": 1, "preview_images": 0, "validate_epochs": 1.0}}
    resources = {"nodes": 2, "gpus_per_node": 2, "cpus": 2, "time": "10m", "mem": "4G"}
    lab.submit(lab.spec("ranks", {"train": {"kind": "train", "config": config, "launcher": launcher, "resources": resources}}, data=DATA))
    lab.wait("ranks", 240)
    lab.assert_done("ranks")
    outcome = lab.outcome("ranks", "train")
    assert outcome is not None and outcome["devices"] == 4
