"""The sandbox itself: it must refuse, preempt and kill as a real cluster does, or the other tests prove nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.conftest import SESSION, Slurm, sandbox

SMALL = ("--mem=50", "--time=5")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A job name of this test alone."""
    return f"{request.node.name}-{os.getpid()}"


@pytest.fixture
def lab(slurm: Slurm, name: str) -> Iterator[Slurm]:
    """The cluster, without this test's jobs afterwards."""
    yield slurm
    slurm.cancel_all(name)


@pytest.fixture
def private() -> Iterator[Path]:
    """The folder for a sandbox that a test may damage; beside the shared ones, so that a killed session's is found too."""
    folder = SESSION / f"private-{os.getpid()}"
    yield folder
    assert sandbox("down", folder).returncode == 0


def script(folder: Path, text: str) -> Path:
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{text}\n")
    return path


def test_two_jobs_on_one_node_see_different_gpus(lab: Slurm, name: str, tmp_path: Path) -> None:
    job = script(tmp_path, 'echo "$CUDA_VISIBLE_DEVICES" > $1.tmp; mv $1.tmp $1; until [ -e go ]; do sleep 0.1; done')
    options = (*SMALL, f"--job-name={name}", f"--chdir={tmp_path}", "--output=%j.log", "--partition=GPUQ", "--nodelist=n2", "--gres=gpu:2")
    jobs = [lab.submit(*options, job, tmp_path / letter) for letter in "ab"]
    lab.wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    assert [lab.state(job) for job in jobs] == ["RUNNING", "RUNNING"]
    (tmp_path / "go").touch()
    seen = [set((tmp_path / letter).read_text().strip().split(",")) for letter in "ab"]
    assert seen[0] | seen[1] == {"0", "1", "2", "3"}
    assert not seen[0] & seen[1]


@pytest.mark.slow
def test_a_low_job_makes_room_and_runs_again(lab: Slurm, name: str, tmp_path: Path) -> None:
    """TERM comes to the step at once; after the grace time Slurm itself requeues the job."""
    (tmp_path / "step.sh").write_text("trap 'touch got_term; exit 0' TERM; touch ready; while true; do sleep 0.1; done\n")
    job = script(tmp_path, 'echo "${SLURM_RESTART_COUNT:-0}" >> lives; [ -n "$SLURM_RESTART_COUNT" ] && exit 0; srun bash step.sh; sleep 300')
    options = (*SMALL, f"--job-name={name}", f"--chdir={tmp_path}", "--output=%j.log", "--nodelist=n1", "--gres=gpu:4")
    low = lab.submit(*options, "--partition=low", job)
    lab.wait_for((tmp_path / "ready").exists)
    urgent = lab.submit(*options, "--partition=GPUQ", "--wrap=true")
    lab.wait_for((tmp_path / "got_term").exists)
    lab.wait_for(lambda: lab.state(urgent) == "COMPLETED", timeout_seconds=90)
    lab.wait_for(lambda: lab.state(low) == "COMPLETED")
    assert (tmp_path / "lives").read_text().split() == ["0", "1"]

    def recorded() -> list[str]:  # the database learns of an end a little later
        return lab.run("sacct", "-D", "-X", "-n", "-P", "-j", low, "-o", "state").stdout.split()

    lab.wait_for(lambda: recorded() == ["PREEMPTED", "COMPLETED"])


def test_somebody_elses_account_is_refused(lab: Slurm, name: str) -> None:
    refused = lab.run("sbatch", f"--job-name={name}", *SMALL, "--account=other-lab", "--wrap=true", expect=1)
    assert "Invalid account" in refused.stderr
    lab.submit(f"--job-name={name}", *SMALL, "--account=share-lab", "--output=/dev/null", "--wrap=true")


def test_a_quality_of_service_limits_how_many_jobs_may_be_submitted(lab: Slurm, name: str) -> None:
    options = (f"--job-name={name}", *SMALL, "--qos=small", "--hold", "--output=/dev/null", "--wrap=true")
    for _ in range(8):
        lab.submit(*options)
    assert "QOSMaxSubmitJobPerUserLimit" in lab.run("sbatch", *options, expect=1).stderr


def test_large_arrays_are_refused(lab: Slurm, name: str) -> None:
    options = (f"--job-name={name}", *SMALL, "--hold", "--output=/dev/null", "--wrap=true")
    lab.submit("--array=0-63", *options)
    assert "Invalid job array specification" in lab.run("sbatch", "--array=0-64", *options, expect=1).stderr


def test_a_preferred_gpu_is_taken(lab: Slurm, name: str, tmp_path: Path) -> None:
    job = lab.submit(f"--job-name={name}", *SMALL, "--constraint=a100|h100", "--prefer=h100", "--output=/dev/null", "--wrap=true")
    lab.wait_for(lambda: lab.state(job) == "COMPLETED")
    assert lab.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%N").stdout.strip() == "n2"


def test_a_job_that_takes_more_than_its_memory_is_killed(lab: Slurm, name: str, tmp_path: Path) -> None:
    job = script(tmp_path, "exec python3 -c \"import time; held = b'x' * (300 * 2**20); time.sleep(60)\"")
    job_id = lab.submit(f"--job-name={name}", "--mem=100", "--time=5", f"--output={tmp_path}/log", job)
    lab.wait_for(lambda: lab.state(job_id) == "FAILED")
    assert "exceeded memory limit" in (tmp_path / "log").read_text()


def test_without_accounting_only_squeue_knows(slurm_without_accounting: Slurm, name: str) -> None:
    lab = slurm_without_accounting
    job = lab.submit(f"--job-name={name}", *SMALL, "--output=/dev/null", "--wrap=true")
    lab.wait_for(lambda: lab.state(job) == "COMPLETED")
    assert "accounting storage is disabled" in lab.run("sacct", "-j", job, expect=1).stderr


def test_both_clusters_are_told_apart(slurm: Slurm, slurm_without_accounting: Slurm, name: str) -> None:
    job = slurm.submit(f"--job-name={name}", *SMALL, "--hold", "--output=/dev/null", "--wrap=true")
    try:
        assert name in slurm.run("squeue", "--noheader", "--format=%j").stdout
        assert name not in slurm_without_accounting.run("squeue", "--noheader", "--format=%j").stdout
    finally:
        slurm.run("scancel", job)


def test_what_died_comes_back_and_down_leaves_nothing(slurm_without_accounting: Slurm, private: Path, tmp_path: Path) -> None:
    """`slurm_without_accounting` says whether a sandbox can be had here at all, and must survive what happens to another."""
    assert sandbox("up", private, "--without-accounting").returncode == 0
    assert "is already up" in sandbox("up", private, "--without-accounting").stdout
    assert "take it down first" in sandbox("up", private).stderr
    assert sandbox("status", private, "--export").stdout == f"export SLURM_CONF={private}/slurm.conf\n"
    assert socket.gethostbyname("n1") == socket.gethostbyname("n2") == "127.0.0.1"

    lab = Slurm({"SLURM_CONF": str(private / "slurm.conf")}, private)
    # a child that has left its job's process group and session
    job = lab.submit(*SMALL, "--output=/dev/null", f"--chdir={tmp_path}", f"--wrap=setsid sleep 1000 & echo $! > {tmp_path}/pid.tmp; mv pid.tmp pid; sleep 1000")
    lab.wait_for((tmp_path / "pid").exists)
    before, remembered = time.time(), private / "state" / "job_state"
    lab.submit(*SMALL, "--hold", "--output=/dev/null", "--wrap=true")  # a change, after which slurmctld writes down all it knows, seconds later
    lab.wait_for(lambda: remembered.exists() and remembered.stat().st_mtime > before)

    controller = int((private / "pid" / "slurmctld").read_text().split()[0])
    os.kill(controller, 9)
    lab.wait_for(lambda: sandbox("status", private).returncode == 1)
    assert "partly up" in sandbox("status", private).stdout
    assert sandbox("up", private, "--without-accounting").returncode == 0
    assert sandbox("status", private).returncode == 0
    assert lab.state(job) == "RUNNING"

    assert sandbox("down", private).returncode == 0
    assert not private.exists()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/exe").exists()  # a zombie has no /proc/<pid>/exe either
    assert str(private) not in Path("/etc/hosts").read_text()
    assert sandbox("status", private).returncode == 1
    assert slurm_without_accounting.run("sinfo", "--noheader", "--format=%T").stdout


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, slurm_without_accounting: Slurm) -> None:
    folder = Path(f"/tmp/medgen-foreign-{os.getpid()}")
    folder.mkdir()
    try:
        (folder / "thesis.tex").touch()
        for verb in ("up", "down"):
            assert "holds files but no sandbox" in sandbox(verb, folder).stderr
        assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    finally:
        (folder / "thesis.tex").unlink()
        folder.rmdir()
