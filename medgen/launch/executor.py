"""submitit's Slurm executor with medgen's own script: one sbatch call, one job or array. Called by slurm_backend.py.

submitit writes the file it submits, calls sbatch, reads the number and keeps the file as <job>_submission.sh. Its pickled
entry point is not used: the script would not be the one a person can read, keep and sbatch by hand."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from medgen import fault
from medgen.launch import slurm
from medgen.launch.slurm import SlurmMissing, SlurmRefused, SlurmUnsure

SBATCH_SECONDS = 60
TIMED_OUT = (124, 137)  # exit codes of timeout(1)
# everything else of the login shell stays there
EXPORTED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "SLURM_CONF", "XDG_CACHE_HOME", "XDG_CONFIG_HOME",
    "MEDGEN_CACHE", "MEDGEN_RUNS", "MEDGEN_SITE",
)  # fmt: skip


class ScriptExecutor(submitit.SlurmExecutor):
    """Submits one finished script with some sbatch options beside it. `folder` belongs to this submission alone."""

    def __init__(self, folder: Path, script: str, options: list[str]):
        super().__init__(folder=folder)
        self.script = script
        self.options = options

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", "--kill-after=5", str(SBATCH_SECONDS), "sbatch", *self.options, str(submission_file_path)]

    def submit_script(self) -> int:
        """The job's number. Raises SlurmRefused, SlurmMissing, or SlurmUnsure when the job may exist all the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        job_id = int(self._submit_command("").job_id)
        if fault.ARMED:
            fault.at("submit.after_sbatch")
        return job_id


def submit_script(folder: Path, script: str, options: list[str], exported: list[str]) -> int:
    """One sbatch call with the allowed part of the environment; see ScriptExecutor for what it raises."""
    try:
        executor = ScriptExecutor(folder, script, options)
    except RuntimeError:
        raise SlurmMissing("srun: this command of Slurm is not on PATH; run medgen on a login node of the cluster") from None
    try:
        with allowed_environment(exported), contextlib.redirect_stderr(io.StringIO()):  # its words are in the exception
            return executor.submit_script()
    except FailedSubmissionError as error:
        raise SlurmUnsure(f"sbatch gave no job number: {_one_line(str(error))}") from None
    except FailedJobError as error:
        words = _one_line(str(error))
        cause = error.__cause__
        code = cause.returncode if isinstance(cause, subprocess.CalledProcessError) else None
        if code == 127:
            raise SlurmMissing("sbatch: this command of Slurm is not on PATH; run medgen on a login node of the cluster") from None
        if code in TIMED_OUT:
            raise SlurmUnsure(f"sbatch did not answer within {SBATCH_SECONDS} s") from None
        if slurm.is_transient(words):
            raise SlurmUnsure(words) from None
        raise SlurmRefused(words.removeprefix("sbatch: ").removeprefix("error: ")) from None


@contextlib.contextmanager
def allowed_environment(exported: list[str]) -> Iterator[None]:
    """While it lasts, this process has only the variables that jobs may have; nothing of an enclosing Slurm job."""
    before = dict(os.environ)
    kept = {name: before[name] for name in (*EXPORTED, *exported) if name in before}
    os.environ.clear()
    os.environ.update(kept)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Traceback")]
    return "; ".join(lines)[:400]
