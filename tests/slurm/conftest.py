"""A real Slurm for the tests in this folder: cluster/sandbox, brought up once per session and shared by the processes of pytest-xdist."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import REPOSITORY, unavailable
from filelock import FileLock

from medgen.launch.processes import start_ticks

SANDBOX = REPOSITORY / "cluster" / "sandbox" / "sandbox.py"
FOLDERS = "/tmp/medgen-slurm-"  # not pytest's folder: sockets need a short path
LOCK = "/tmp/medgen-slurm.lock"
SESSION = Path(FOLDERS + os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))[:8])
MIN_JOB_AGE_SECONDS = os.environ.get("MEDGEN_TEST_MIN_JOB_AGE", "300")
POLL_SECONDS = 0.2
USERS = itertools.count()  # a process has several where more than one folder of tests uses a sandbox
Value = TypeVar("Value")


@dataclass(frozen=True)
class Slurm:
    """A cluster to test on. `folder`: its sandbox; None for an existing cluster."""

    environment: dict[str, str]  # to be merged into a command's
    folder: Path | None

    def run(self, *command: object, expect: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster and check its exit code; None: any."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_"))}
        words = [str(word) for word in command]
        done = subprocess.run(words, env={**outside, **self.environment}, capture_output=True, text=True, timeout=120, **options)
        assert expect is None or done.returncode == expect, f"{' '.join(words)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, *arguments: object) -> int:
        """sbatch; returns the job id."""
        return int(self.run("sbatch", "--parsable", *arguments).stdout.partition(";")[0])

    def state(self, job_id: int) -> str:
        """squeue's long word; empty for a job that was forgotten."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T", expect=None).stdout.strip()

    def wait_for(self, condition: Callable[[], Value], timeout_seconds: float = 60) -> Value:
        """The first value that counts as true; the test fails, showing the queue, if there is none in time."""
        deadline = time.monotonic() + timeout_seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"not within {timeout_seconds} s; the queue:\n{self.run('squeue', '--states=all', expect=None).stdout}")
            time.sleep(POLL_SECONDS)
        return value

    def cancel_all(self, name_prefix: str) -> None:
        """Cancel the jobs whose names start so, and wait until they are gone."""

        def remaining() -> list[str]:
            rows = (line.partition(" ") for line in self.run("squeue", "--noheader", "--format=%A %j").stdout.splitlines())
            return sorted({job_id for job_id, _, name in rows if name.startswith(name_prefix)})

        if found := remaining():
            self.run("scancel", *found, expect=None)  # one may end just now
            self.wait_for(lambda: not remaining())


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """With accounting, accounts and limits; $SLURM_CONF's own cluster where MEDGEN_TEST_SLURM=existing."""
    if os.environ.get("MEDGEN_TEST_SLURM") != "existing":
        yield from shared_sandbox("with")
    elif "SLURM_CONF" in os.environ:
        yield Slurm({"SLURM_CONF": os.environ["SLURM_CONF"]}, None)
    else:
        pytest.fail("MEDGEN_TEST_SLURM=existing says to test on your cluster; SLURM_CONF must say which")


@pytest.fixture(scope="session")
def slurm_without_accounting() -> Iterator[Slurm]:
    """No slurmdbd: sacct fails, nothing but squeue knows of jobs."""
    yield from shared_sandbox("without", "--without-accounting")


def shared_sandbox(kind: str, *options: str) -> Iterator[Slurm]:
    """The first of the session's processes brings it up, the last one takes it down."""
    if os.geteuid() != 0:
        unavailable("a Slurm of our own needs root; with MEDGEN_TEST_SLURM=existing the tests use the cluster of your SLURM_CONF")
    folder = SESSION / kind
    me = SESSION / f"{kind}-{next(USERS)}-{os.getpid()}.user"
    with FileLock(LOCK):
        clear_what_killed_sessions_left()
        done = sandbox("up", folder, "--min-job-age", MIN_JOB_AGE_SECONDS, *options)
        if done.returncode:
            unavailable(f"no Slurm could be brought up here: {done.stderr.strip()}")
        me.write_text(f"{start_ticks(os.getpid())}\n")
    try:
        yield Slurm({"SLURM_CONF": str(folder / "slurm.conf")}, folder)
    finally:
        with FileLock(LOCK):
            me.unlink()
            if not living_users(SESSION, kind):
                sandbox("down", folder).check_returncode()
            if not any(SESSION.iterdir()):
                SESSION.rmdir()


def sandbox(verb: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SANDBOX), verb, "--folder", str(folder), *options], capture_output=True, text=True, timeout=180)


def living_users(session: Path, kind: str = "*") -> list[Path]:
    """The files of the processes that use a session's sandboxes now."""
    return [path for path in session.glob(f"{kind}-*.user") if path.read_text().strip() == str(start_ticks(int(path.stem.rpartition("-")[2])))]


def clear_what_killed_sessions_left() -> None:
    for session in Path("/").glob(f"{FOLDERS[1:]}*/"):
        if session != SESSION and not living_users(session):
            for settings in session.glob("*/sandbox.json"):
                sandbox("down", settings.parent)
            shutil.rmtree(session, ignore_errors=True)
