"""A script and the stage it was imported to ask a real Slurm for the same: what scontrol shows of both jobs is equal."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

Medgen = Callable[..., subprocess.CompletedProcess[str]]
EXAMPLES = REPOSITORY / "tests" / "imported"
# what the job is, where it may run and what it gets; not its name, its logs, and what medgen adds so that it can start again
COMPARED = (
    "TimeLimit", "TimeMin", "NumNodes", "NumCPUs", "NumTasks", "CPUs/Task", "NtasksPerN:B:S:C", "ReqB:S:C:T", "TRES", "MinCPUsNode", "MinMemoryNode",
    "MinMemoryCPU", "MinTmpDiskNode", "Features", "Prefer", "Partition", "Account", "QOS", "TresPerNode", "TresPerJob", "TresPerTask", "MemPerTres",
    "CpusPerTres", "ExcNodeList", "ReqNodeList", "OverSubscribe", "Contiguous", "Licenses", "Network", "Dependency", "Comment", "Nice", "Reservation",
    "ThreadSpec", "CoreSpec", "StartTime", "EligibleTime", "MailUser", "MailType", "WCKey",
)  # fmt: skip
HEADERS = {
    "memory_per_core": ["--mem-per-cpu=300M", "-n 2", "--nodes=1", "--time=5"],
    "several_tasks": ["--ntasks=4", "-N 1", "--mem=1G", "--time=5"],
    "tasks_without_nodes": ["--ntasks=3", "--mem=200M", "--time=5"],
    "gpus_of_the_job": ["--gpus=2", "--cpus-per-gpu=2", "--mem-per-gpu=200M", "-t 5"],
    "gpus_of_two_nodes": ["--nodes=2", "--gpus-per-node=1", "--mem=200M", "-c2", "-t5"],
    "any_node": ["--time=10:00 -C 'a100|h100' --exclude=n1", "--oversubscribe --nice=7 --comment='a # b'", "--mem=100M"],
    "begin": ["--begin=2040-01-01T00:00:00", "--mail-type=END", "--mail-type=FAIL --mail-user=a@b.org", "-t 1-2", "--mem=100M"],
    "nothing_but_time": ["--time=5"],
    "no_time": ["--mem=100M"],
}


def shown(slurm: Any, job_id: int) -> dict[str, str]:
    """What is compared of a job. As many tasks as nodes is one per node, and one task one node, whether that is said or not."""
    text = slurm.run("scontrol", "show", "job", "--oneliner", job_id).stdout.splitlines()[0]
    found = dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S.*?)?(?= [A-Za-z/:]+=|\s*$)", text))
    if found["NumTasks"] == "1":
        found["NumNodes"] = found["NumNodes"].replace("1-1", "1")
    if found["NumTasks"] == found["NumNodes"].partition("-")[0]:
        found["NtasksPerN:B:S:C"] = re.sub("^0:", "1:", found["NtasksPerN:B:S:C"])
    # a job that waits for its time begins when it likes: only a wish of the user's is compared
    return {key: found[key] for key in COMPARED if key in found and not (key in ("StartTime", "EligibleTime") and not found[key].startswith("2040"))}


@pytest.fixture
def compare(slurm: Any, tmp_path: Path, medgen: Medgen, environment: dict[str, str]) -> Callable[[str], None]:
    """Submit both, held, and look at them."""

    def both(text: str) -> None:
        environment.update(slurm.environment)
        site, path = tmp_path / "site.yaml", tmp_path / "script.slurm"
        site.write_text("{name: plain, scheduler: slurm, cpus: 8, gpus: 4}\n")  # no words of its own
        path.write_text(text)
        medgen("import", path, "--out", tmp_path / "spec.yaml")
        dry = medgen("submit", tmp_path / "spec.yaml", "--dry-run", "--site", site).stdout
        (tmp_path / "rendered.sh").write_text(dry[dry.index("#!/bin/bash") :])
        jobs = [slurm.submit("--hold", "--chdir", tmp_path, tmp_path / name) for name in ("script.slurm", "rendered.sh")]
        try:
            original, stage = (shown(slurm, job_id) for job_id in jobs)
        finally:
            slurm.run("scancel", *jobs, expect=None)
        assert original.keys() >= {"TimeLimit", "NumNodes", "Partition", "Account"}
        assert stage == original

    return both


def as_it_fits(text: str) -> str:
    """An example with memory, cores and nodes that the small cluster of the tests has."""
    text = re.sub(r"--mem=\d+G", "--mem=800M", text)
    text = re.sub(r"--cpus-per-task=\d+|-c 8", "--cpus-per-task=2", text)
    return text.replace("node-06-02", "n1").replace("gpu80g", "a100|h100")


@pytest.mark.parametrize("name", ["train_plain", "train_chain", "generate_chain", "eval_loop", "functions", "array", "multi_gpu", "odd_header", "login_shell"])
def test_an_example_asks_for_the_same(compare: Callable[[str], None], name: str) -> None:
    compare(as_it_fits((EXAMPLES / f"{name}.slurm").read_text()))


@pytest.mark.parametrize("name", sorted(HEADERS))
def test_a_header_asks_for_the_same(compare: Callable[[str], None], name: str) -> None:
    lines = "".join(f"#SBATCH {line}\n" for line in HEADERS[name])
    compare(f"#!/bin/bash\n{lines}hostname\n")


PROGRAM = """#!/bin/bash
# a training that is never done in one segment: it goes on from what it left, and the second time it ends
echo "$@" >> calls
case "$*" in
    *resume_from=*) exit 0 ;;
esac
all="$*"
folder=${all##*run.dir=}
mkdir -p "$folder"
echo weights > "$folder/checkpoint_latest.pt"
while :; do sleep 0.2; done
"""


def test_a_chain_goes_on_in_the_same_folder(slurm: Any, tmp_path: Path, medgen: Medgen, environment: dict[str, str]) -> None:
    """Warned before its time limit, the work of an imported chain starts again where it was, as the old script did by itself."""
    environment.update(slurm.environment)
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "train").write_text(PROGRAM)
    (tmp_path / "programs" / "train").chmod(0o755)
    text = as_it_fits((EXAMPLES / "train_chain.slurm").read_text()).replace("python -m project.train", "programs/train").replace("${STORE}", "store")
    text = re.sub(r"^(module|conda|python|nvidia-smi).*\n", "", text, flags=re.MULTILINE)
    (tmp_path / "chain.slurm").write_text(text)
    (tmp_path / "site.yaml").write_text("{name: plain, scheduler: slurm, cpus: 8, gpus: 4}\n")
    medgen("import", "chain.slurm", "--out", "chain.yaml")
    medgen("submit", "chain.yaml", "--site", "site.yaml")
    calls = tmp_path / "calls"
    [job_id] = slurm.wait_for(lambda: {line.split()[0] for line in slurm.run("squeue", "-h", "-o", "%A %j").stdout.splitlines() if ".main." in line and "flow_1k" in line})
    slurm.wait_for(lambda: calls.exists() and list(tmp_path.glob("store/runs/*/checkpoint_latest.pt")))
    slurm.run("scancel", "--signal=USR2", "--batch", job_id)
    slurm.wait_for(lambda: len(calls.read_text().splitlines()) == 2, timeout_seconds=120)
    first, second = calls.read_text().splitlines()
    [folder] = re.findall(r"run\.dir=(\S+)", first)
    assert f"run.dir={folder} training.resume_from={folder}/checkpoint_latest.pt" in second
    slurm.wait_for(lambda: not slurm.run("squeue", "-h", "-j", job_id, expect=None).stdout.strip())
    medgen("watch", "flow_1k", "--once")
