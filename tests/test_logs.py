"""`medgen logs`: which log is shown, following it over attempts, and what is said when there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_stub import build, interpreter, wait_until
from seeing import STAGES, FakeSlurm, batch, ended, event, log, outcome, queue_row, queued, started

from medgen.launch.supervisor import register, retire
from medgen.rundir import RunDir

Medgen = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made, _ = build(tmp_path / "runs", STAGES)
    return made


def shown(medgen: Medgen, *arguments: object) -> list[str]:
    return medgen("logs", *arguments).stdout.splitlines()


def test_without_a_stage_the_failed_task_is_shown_before_the_running_one(run: RunDir, medgen: Medgen) -> None:
    started(run, 100)
    log(run, "the training\n")
    assert shown(medgen, "stub") == ["the training"]
    started(run, 90, "images", 2)
    path = log(run, "shard two\n", "images", 2)
    assert shown(medgen, "stub") == ["shard two"]  # the last that began
    ended(run)
    assert shown(medgen, "stub") == ["the training"]
    started(run, 10, "images", 3)
    log(run, "shard three\n", "images", 3)
    done = medgen("logs", "stub")
    assert done.stdout == "the training\n" and done.stderr == f"medgen: train shard 0 attempt 0: {run.log('train', 0, 0, 0)}\n"
    assert shown(medgen, "stub/images/2") == ["shard two"] == path.read_text().splitlines()


@pytest.mark.parametrize("name", ["stub", "stub-0123456789", "runs/stub-0123456789", "runs/stub-0123456789/"])
def test_a_run_is_named_in_every_usual_way(run: RunDir, medgen: Medgen, name: str) -> None:
    started(run)
    log(run, "the training\n")
    assert shown(medgen, name) == ["the training"]
    assert shown(medgen, f"{name.rstrip('/')}/train") == shown(medgen, f"{name.rstrip('/')}/train/0") == ["the training"]


def test_a_stage_of_several_tasks_shows_those_that_matter_with_their_names(run: RunDir, medgen: Medgen) -> None:
    for shard in range(3):
        started(run, 50 - shard, "images", shard)
        log(run, f"one {shard}\ntwo {shard}\n", "images", shard)
    assert shown(medgen, "stub/images", "--lines", 1) == ["images.0 | two 0", "images.1 | two 1", "images.2 | two 2"]
    for shard in (0, 1):
        ended(run, "done", 0, stage="images", shard=shard, next_action="done")
    assert shown(medgen, "stub/images") == ["one 2", "two 2"]  # one alone needs no name


def test_the_guilty_rank_and_any_other(run: RunDir, medgen: Medgen) -> None:
    started(run)
    log(run, "rank zero\n")
    log(run, "rank one\n", rank=1)
    assert shown(medgen, "stub/train") == ["rank zero"]
    batch(run, "srun: error: vm: task 1: Killed\n")
    assert shown(medgen, "stub/train") == ["rank one"]
    assert shown(medgen, "stub/train", "--rank", 0) == ["rank zero"]


def test_attempts(run: RunDir, medgen: Medgen) -> None:
    for attempt in range(2):
        started(run, 100 - attempt, attempt=attempt)
        log(run, f"attempt {attempt}\n", attempt=attempt)
    assert shown(medgen, "stub/train") == ["attempt 1"]
    assert shown(medgen, "stub/train", "--attempt", 0) == ["attempt 0"]


def test_the_batch_log_stands_in_for_an_empty_rank_log(run: RunDir, medgen: Medgen) -> None:
    batch(run, "of the first attempt\n")
    batch(run, "bash: module: command not found\nmedgen: set-up failed with exit code 127: module load x\n", attempt=1)
    lines = shown(medgen, "stub")
    assert lines[0].startswith("medgen: train shard 0 attempt 1 on n1") and lines[-1].endswith("module load x") and len(lines) == 3
    assert shown(medgen, "stub/train", "--attempt", 0)[-1] == "of the first attempt"


def test_only_the_last_lines_and_progress_bars_as_they_last_looked(run: RunDir, medgen: Medgen) -> None:
    started(run)
    log(run, "".join(f"line {number}\n" for number in range(200)) + "1%\r50%\r99%\n")
    lines = shown(medgen, "stub")
    assert len(lines) == 50 and lines[-1] == "99%"
    assert shown(medgen, "stub", "-n", 2) == ["line 199", "99%"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing/train"], "nothing: no such run"),
        (["stub/trian"], "no stage 'trian'; the stages are: train, images, report"),
        (["stub/images/4"], "images has shards 0 to 3, not '4'"),
        (["stub/images/x"], "images has shards 0 to 3, not 'x'"),
        (["stub/train/0", "--attempt", "3"], "--attempt 3: train shard 0 of stub-0123456789 has attempts 0, 2"),
        (["stub/train", "--rank", "2"], "--rank 2: attempt 2 of train shard 0 has ranks 0 to 1"),
        (["stub/images"], "images of stub-0123456789: nothing has started, so there is no log"),
    ],
)  # fmt: skip
def test_errors_name_what_there_is(run: RunDir, medgen: Medgen, arguments: list[str], words: str) -> None:
    for attempt in (0, 2):
        started(run, 100 - attempt, attempt=attempt)
        log(run, "text\n", attempt=attempt)
    run.log("train", 0, 0, 1).unlink(missing_ok=True)
    log(run, "text\n", rank=1, attempt=2)
    assert words in medgen("logs", *arguments, expect=2).stderr


# --- following -------------------------------------------------------------------------------------------------------


class Following:
    """`medgen logs -f` in the background; `text` is what it has printed."""

    def __init__(self, environment: dict[str, str], folder: Path, *arguments: str):
        self.path = folder / "followed.txt"
        with self.path.open("w") as output:
            self.process = subprocess.Popen([sys.executable, "-m", "medgen", "logs", "-f", *arguments], cwd=folder, env=environment, stdout=output, stderr=subprocess.PIPE, text=True)

    @property
    def text(self) -> str:
        return self.path.read_text()

    def end(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


def test_following_over_attempts_until_the_task_is_done(run: RunDir, tmp_path: Path, environment: dict[str, str]) -> None:
    register(run, False)  # this process supervises it
    started(run)
    path = log(run, "".join(f"line {number}\n" for number in range(60)))
    following = Following(environment, tmp_path, "stub", "--lines", "2")
    wait_until(lambda: "line 59\n" in following.text, 60)
    assert following.text == "line 58\nline 59\n"
    with path.open("a") as handle:
        handle.write("half a ")
        handle.flush()
        handle.write("line\nno end")
    wait_until(lambda: "half a line\n" in following.text)
    ended(run, "interrupted", 3, "stopped", next_action="goes on from what it saved")
    started(run, 0, attempt=1)
    log(run, "again\n", attempt=1)
    wait_until(lambda: "again\n" in following.text)
    assert following.text.endswith("half a line\nno end\n--- attempt 1 ---\nagain\n")
    outcome(run, "done", attempt=1)
    ended(run, "done", 0, attempt=1, next_action="done")
    code, stderr = following.end()
    retire(run)
    assert code == 0 and stderr.endswith("medgen: train shard 0: done\n")


def test_following_a_failure_ends_with_its_cause(run: RunDir, tmp_path: Path, environment: dict[str, str]) -> None:
    started(run)
    log(run, "ValueError: no\n")
    ended(run, cause="exit code 1: ValueError: no")
    following = Following(environment, tmp_path, "stub")
    code, stderr = following.end()
    assert code == 1 and following.text == "ValueError: no\n"
    assert "train shard 0: failed: exit code 1: ValueError: no; `medgen why stub-0123456789` tells more" in stderr


def test_following_waits_for_a_start_and_for_a_requeue(run: RunDir, tmp_path: Path, environment: dict[str, str]) -> None:
    slurm = FakeSlurm(tmp_path, environment)
    name = queued(run, 7)
    slurm.queue(queue_row(7, name))
    following = Following(environment, tmp_path, "stub/train")
    time.sleep(2)  # nothing to wait for: it must still be there
    assert following.process.poll() is None and following.text == ""
    started(run, 0, job=7)
    batch(run, "setting up\n")
    wait_until(lambda: "setting up" in following.text)
    log(run, "step 1\n")
    wait_until(lambda: "step 1" in following.text)
    ended(run, "interrupted", 3, "stopped by SIGTERM after step 1", next_action="goes on from what it saved")
    time.sleep(2)
    assert following.process.poll() is None  # it is in the queue
    outcome(run, "done")
    code, _ = following.end()
    assert code == 0


def test_ctrl_c_leaves(run: RunDir, tmp_path: Path, environment: dict[str, str]) -> None:
    started(run)
    log(run, "text\n")
    register(run, False)
    following = Following(environment, tmp_path, "stub")
    wait_until(lambda: following.text == "text\n", 60)
    os.kill(following.process.pid, 2)
    code, stderr = following.end()
    retire(run)
    assert code == 0 and "Traceback" not in stderr


def test_following_several_shards_of_a_real_local_run(tmp_path: Path, environment: dict[str, str]) -> None:
    run, _ = build(tmp_path / "runs", [{"name": "images", "kind": "generate", "tasks": 2}], {"images": {"seconds": 2, "steps": 4, "env": ["SLURM_PROCID"]}})
    event(run, "created", 0)
    environment = {**environment, "PYTHONPATH": str(Path(__file__).parent)}
    code = f"from pathlib import Path; from medgen.launch.local import LocalBackend; from medgen import plan; from medgen.rundir import RunDir; " \
           f"run = RunDir(Path({str(run.root)!r})); LocalBackend(2, 0, {interpreter(tmp_path)!r}).submit(run, plan.read(run))"
    supervisor = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: run.log("images", 1, 0, 0).exists() and run.log("images", 1, 0, 0).stat().st_size > 0, 60)
    following = Following(environment, tmp_path, "stub/images")
    exit_code, _ = following.end()
    assert supervisor.wait(60) == 0 and exit_code == 0
    for shard in (0, 1):
        assert f"images.{shard} | generate images shard {shard} rank 0" in following.text
