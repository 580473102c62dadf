"""The script text, the stand-in for srun, and what a dry run shows."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_stub import REPOSITORY, build

from medgen.launch import local_srun
from medgen.launch.dry import describe
from medgen.launch.script import render_script, whole_stage

GPU_ARRAY = [{"name": "images", "kind": "generate", "tasks": 16, "parallel": 4, "gpus": 1, "threads": 3}]


def script(tmp_path: Path, stages: list[dict[str, object]], **changes: object) -> str:
    run, plan = build(tmp_path, stages)
    stage = dataclasses.replace(plan.stages[0], **changes)  # type: ignore[arg-type]
    return render_script(plan, stage, whole_stage(stage, 1), run.root, "/opt/env/bin/python")


def test_directives_say_what_the_stage_asks_for(tmp_path: Path) -> None:
    text = script(tmp_path, GPU_ARRAY, mem_mebibytes=4096)
    for directive in (
        "--time=60", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=3", "--gres=gpu:1",
        "--mem=4096M", "--array=0-15%4", "--open-mode=append", "--requeue", "--signal=USR2@180", "--kill-on-invalid-dep=yes",
    ):  # fmt: skip
        assert f"#SBATCH {directive}\n" in text
    assert "#SBATCH --job-name=medgen.stub-0123456789.images.1.0." in text
    assert "/logs/images/s%a/batch.log" in text
    assert text.index("trap '' USR2") < text.index("set -Eeuo pipefail") < text.index("srun ")


def test_a_single_task_is_no_array(tmp_path: Path) -> None:
    text = script(tmp_path, [{"name": "train", "kind": "train"}])
    assert "--array" not in text
    assert "--gres" not in text
    assert "--mem" not in text
    assert "/logs/train/s0/batch.log" in text


def test_the_text_is_pure_and_is_bash(tmp_path: Path) -> None:
    once, twice = script(tmp_path, GPU_ARRAY, nodes=2), script(tmp_path, GPU_ARRAY, nodes=2)
    assert once == twice
    assert "scontrol show hostnames" in once
    assert subprocess.run(["bash", "-n"], input=once, text=True, check=False).returncode == 0


def test_odd_folder_names_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "it's 100%t of $HOME"
    folder.mkdir()
    text = script(folder, GPU_ARRAY)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert any("100%%t" in line for line in text.splitlines() if "--output" in line)


def test_dry_run_shows_each_script_byte_for_byte(tmp_path: Path) -> None:
    run, plan = build(tmp_path, [*GPU_ARRAY, {"name": "report", "kind": "report", "needs": ["images"]}])
    before = sorted(tmp_path.rglob("*"))
    chunks = {stage.name: [whole_stage(stage, 1)] for stage in plan.stages}
    text = describe(plan, run.root, chunks, "/opt/env/bin/python")
    for stage in plan.stages:
        assert render_script(plan, stage, chunks[stage.name][0], run.root, "/opt/env/bin/python") in text
    assert sorted(tmp_path.rglob("*")) == before


def srun(tmp_path: Path, ranks: int, program: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "medgen.launch.local_srun", *options, f"--output={tmp_path}/r%t.log", "bash", "-c", program],
        env={**os.environ, "SLURM_NTASKS": str(ranks), "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_each_rank_has_its_number_and_its_log(tmp_path: Path) -> None:
    assert srun(tmp_path, 3, "echo rank $SLURM_PROCID of $SLURM_NTASKS").returncode == 0
    assert [(tmp_path / f"r{rank}.log").read_text() for rank in range(3)] == [f"rank {rank} of 3\n" for rank in range(3)]


def test_the_exit_code_is_the_largest_of_the_ranks(tmp_path: Path) -> None:
    assert srun(tmp_path, 3, "exit $((SLURM_PROCID * 2))").returncode == 4


def test_a_rank_that_was_killed_because_of_another_does_not_hide_its_code(tmp_path: Path) -> None:
    ended = srun(tmp_path, 2, '[ "$SLURM_PROCID" = 1 ] && exit 2; sleep 100', "--kill-on-bad-exit=1")
    assert ended.returncode == 2
    assert "task 1: Exited with exit code 2" in ended.stderr
    assert "task 0: " not in ended.stderr


def test_stopped_after_saving_is_not_a_bad_exit(tmp_path: Path) -> None:
    ended = srun(tmp_path, 2, '[ "$SLURM_PROCID" = 1 ] && exit 3; sleep 2; echo saved', "--kill-on-bad-exit=1", "--wait=600")
    assert ended.returncode == 3
    assert (tmp_path / "r0.log").read_text() == "saved\n"


def test_ranks_that_stay_behind_are_killed_after_the_wait(tmp_path: Path) -> None:
    assert srun(tmp_path, 2, '[ "$SLURM_PROCID" = 1 ] && exit 0; sleep 100', "--wait=1").returncode == 0
    assert local_srun.parse(["--wait=1", "--output=x", "--label", "true", "--not-ours"]).command == ["true", "--not-ours"]


def test_no_command_is_told() -> None:
    with pytest.raises(SystemExit, match="no command"):
        local_srun.parse(["--wait=1"])


def test_usr2_before_a_rank_is_ready_does_not_kill_it(tmp_path: Path) -> None:
    # the rank sends it to itself before it could have set a handler
    assert srun(tmp_path, 1, "kill -USR2 $$; echo alive").returncode == 0
    assert (tmp_path / "r0.log").read_text() == "alive\n"


@pytest.mark.parametrize(("verb", "heard"), [("train", "SIGUSR2"), ("attempt", "None")])
def test_usr2_while_a_rank_still_imports_is_not_forgotten(verb: str, heard: str) -> None:
    """Other verbs leave it ignored, for themselves and for what they start."""
    code = f"""import os, signal, sys
sys.argv[1:] = [{verb!r}]
import medgen.__main__
os.kill(os.getpid(), signal.SIGUSR2)
from medgen.stop import StopFlag
flag = StopFlag()
flag.install()
print(flag.signal_name)"""
    shown = subprocess.run(["bash", "-c", "trap '' USR2; exec \"$@\"", "rank", sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout == heard + "\n", shown.stderr
