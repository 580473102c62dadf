"""What a real Slurm would refuse is told before anything is queued, with the line that asks for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Medgen = Callable[..., subprocess.CompletedProcess[str]]
PROFILE = {
    "name": "lab", "scheduler": "slurm", "cpus": 8, "gpus": 4, "cpus_per_gpu": 1, "mem": "400M", "grace": "30s",
    "partitions": {"gpu": "GPUQ", "cpu": "GPUQ"}, "features": {"a100": "40G", "h100": "80G", "v100": "32G"},
}  # fmt: skip
SPEC = """\
version: 1
name: asked
stages:
  a:
    kind: command
    run: echo a > $MEDGEN_OUT/a
    resources: {time: 5m, cpus: 1}
  b:
    kind: command
    needs: [a]
    foreach: [x, y, z]
    run: echo $MEDGEN_ITEM > $MEDGEN_OUT/item
    resources: {time: 5m, cpus: 1}
"""


class Lab:
    """A spec and a profile on a real Slurm; what a test queues is taken away at its end."""

    def __init__(self, folder: Path, slurm: Any, medgen: Medgen, environment: dict[str, str]):
        self.folder, self.slurm, self.medgen, self.environment = folder, slurm, medgen, environment
        environment.update(slurm.environment)
        self.name = f"asked{int.from_bytes(os.urandom(4), 'big')}"
        (folder / "lab.yaml").write_text(yaml.safe_dump(PROFILE, sort_keys=False))
        (folder / "asked.yaml").write_text(SPEC.replace("name: asked", f"name: {self.name}"))

    def submit(self, *overrides: str, expect: int = 0) -> str:
        options = [word for override in overrides for word in ("-o", override)]
        return self.medgen("submit", self.folder / "asked.yaml", "--site", self.folder / "lab.yaml", *options, expect=expect).stderr

    def refused(self, *overrides: str, expect: int = 2) -> str:
        """What is said; and nothing is queued, no run is made."""
        said = self.submit(*overrides, expect=expect)
        assert self.queued() == []
        assert not list((self.folder / "runs").glob("*/plan.json"))
        return said

    def queued(self) -> list[str]:
        return [line for line in self.slurm.run("squeue", "-h", "-t", "all", "-o", "%j").stdout.splitlines() if self.name in line]

    def shim(self, command: str, text: str) -> None:
        """A script that comes before Slurm's own command; $real is that one."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        (folder / command).write_text(f"#!/bin/bash\nreal={shutil.which(command)}\n{text}\n")
        (folder / command).chmod(0o755)
        self.environment["PATH"] = f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def lab(tmp_path: Path, slurm: Any, medgen: Medgen, environment: dict[str, str]) -> Any:
    made = Lab(tmp_path, slurm, medgen, environment)
    yield made
    slurm.cancel_all(f"medgen.{made.name}")


REFUSED = [  # overrides, where the fault stands, what is told
    (["stages.a.resources={gpus: 1, time: 5m, gpu: {any_of: [v100]}}"], "-o stages.a.resources=", ["resources.gpu: ", "(v100)", "a100", "gpu80g"]),
    (["stages.a.resources.gpus=9"], "-o stages.a.resources.gpus=9: stages.a.resources.gpus: ", ["9 GPUs on one node", "have 4 at most", "GPUQ has: 1 node with 8 CPUs"]),
    (["stages.a.resources.cpus=99"], "-o stages.a.resources.cpus=99: stages.a.resources.cpus: ", ["99 CPUs on one node"]),
    (["stages.a.resources.mem=900G"], "-o stages.a.resources.mem=900G: stages.a.resources.mem: ", ["900G of memory on one node"]),
    (["stages.a.resources.nodes=5"], "-o stages.a.resources.nodes=5: stages.a.resources.nodes: ", ["5 nodes, GPUQ has 2 of them"]),
    (["stages.a.resources.time=9d"], "-o stages.a.resources.time=9d: stages.a.resources.time: ", []),
    (["site.partitions.cpu=nope"], "-o site.partitions.cpu=nope: partitions.cpu: ", ["partitions here: GPUQ"]),
    (["site.account=nope"], "-o site.account=nope: account: ", ["your accounts: share-lab"]),
    (["site.account=other-lab"], "-o site.account=other-lab: account: ", ["your accounts: share-lab"]),
    (["site.qos=nope"], "-o site.qos=nope: qos: ", []),
    (["site.reservation=nope"], "-o site.reservation=nope: reservation: ", []),
    (["site.exclude=[{nodes: zz, reason: broken, until: 2100-01-01}]"], "-o site.exclude=", ["exclude: ", "node name"]),
    (['stages.a.resources.slurm=["--constraint=v100"]'], "-o stages.a.resources.slurm=", ["slurm.0: ", "(v100)"]),
    (['stages.a.resources.slurm=["-p nope"]'], "-o stages.a.resources.slurm=", ["slurm.0: ", "partitions here: GPUQ"]),
    (['stages.a.resources.slurm=["--no-such-option=1"]'], "-o stages.a.resources.slurm=", ["unrecognized option"]),
    (['stages.a.resources.slurm=["--gres=tpu:1"]'], "-o stages.a.resources.slurm=", ["slurm.0: ", "generic resource"]),
]  # fmt: skip


@pytest.mark.fault("F23")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("overrides", "place", "told"), REFUSED, ids=[row[0][0][:50] for row in REFUSED])
def test_what_slurm_refuses_is_told_at_its_key_and_nothing_is_queued(lab: Lab, overrides: list[str], place: str, told: list[str], record_property: Callable[[str, object], None]) -> None:
    said = lab.refused(*overrides)
    lines = [line.removeprefix("medgen: ") for line in said.splitlines()]
    assert any(line.startswith(place) and all(part in line for part in told) for line in lines), said
    record_property("fired", said.splitlines()[-1])


@pytest.mark.fault("F23")
@pytest.mark.timeout(120)
def test_a_value_of_the_spec_is_told_with_its_line(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    text = (lab.folder / "asked.yaml").read_text().replace("{time: 5m, cpus: 1}", "{time: 5m, cpus: 64}", 1)
    (lab.folder / "asked.yaml").write_text(text)
    assert "asked.yaml:7:27: stages.a.resources.cpus: 64 CPUs on one node, its nodes have 8 at most" in lab.refused()
    record_property("fired", "64 CPUs, the nodes have 8")


def test_a_job_that_slurm_takes_is_queued_and_its_start_told(lab: Lab) -> None:
    said = lab.submit("site.qos=normal", "site.account=share-lab")
    assert "Slurm expects to start a " in said
    assert len(lab.queued()) == 2


def test_asking_leaves_nothing_in_the_queue(lab: Lab) -> None:
    said = lab.medgen("check", lab.folder / "asked.yaml", "--site", lab.folder / "lab.yaml", "--json")
    answer = json.loads(said.stdout)
    assert answer["fine"] and lab.queued() == []
    assert any(item["topic"] == "Slurm" and "expected_start" in item["facts"] for item in answer["checks"])
    answer = json.loads(lab.medgen("check", lab.folder / "asked.yaml", "--site", lab.folder / "lab.yaml", "--json", "-o", "site.qos=nope", expect=2).stdout)
    assert [item["topic"] for item in answer["checks"] if item["mark"] == "wrong"] == ["Slurm"]


@pytest.mark.fault("F25")
@pytest.mark.timeout(120)
def test_the_variables_of_an_enclosing_job_change_nothing(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    lab.environment.update({
        "SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": "500", "SLURM_MEM_PER_NODE": "900000",
        "SBATCH_PARTITION": "nope", "SBATCH_ACCOUNT": "nope", "SBATCH_CONSTRAINT": "nope", "SINFO_PARTITION": "nope", "SLURM_CLUSTERS": "nope",
    })  # fmt: skip
    assert "this is inside job 7" in lab.submit()
    assert len(lab.queued()) == 2
    record_property("fired", "the variables of job 7")


@pytest.mark.parametrize("command", ["sinfo", "sbatch"])
def test_a_command_that_fails_stops_the_submit(lab: Lab, command: str) -> None:
    lab.shim(command, "exit 1")
    assert f"{command} " in (said := lab.refused(expect=1)) and "nothing was queued" in said


@pytest.mark.fault("F31")
@pytest.mark.timeout(180)
def test_a_controller_that_is_away_stops_the_submit(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    lab.environment["SLURM_CONF"] = str(lab.folder / "slurm.conf")
    conf = Path(lab.slurm.environment["SLURM_CONF"]).read_text()
    port = next(line.partition("=")[2] for line in conf.splitlines() if line.startswith("SlurmctldPort="))
    (lab.folder / "slurm.conf").write_text(conf.replace(f"SlurmctldPort={port}", "SlurmctldPort=1") + "\nMessageTimeout=2\n")
    said = lab.submit(expect=1)
    assert "nothing was queued" in said and "medgen: sinfo" in said
    record_property("fired", "sinfo")


def test_a_cluster_without_accounting_says_that_it_checks_no_accounts(
    tmp_path: Path, slurm_without_accounting: Any, medgen: Medgen, environment: dict[str, str]
) -> None:
    lab = Lab(tmp_path, slurm_without_accounting, medgen, environment)
    answer = json.loads(medgen("check", tmp_path / "asked.yaml", "--site", tmp_path / "lab.yaml", "--json", "-o", "site.account=typo").stdout)
    assert any("checks no accounts" in item["text"] and "account typo" in item["text"] for item in answer["checks"])
    assert lab.queued() == []
