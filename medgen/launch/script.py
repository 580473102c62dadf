"""The text of a job script: a pure function of the plan, the same bytes in a dry run, on Slurm and locally.

Called by dry.py and by every backend. Locally `srun` and `scontrol` are stand-ins that come first on PATH."""

from __future__ import annotations

import shlex
from pathlib import Path

from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

GRACE_SECONDS = 180  # between the warning signal and the time limit: one step, one save and a minute of slack
FIRST_PORT, PORTS = 10000, 20000  # below 32768, where Linux begins to hand out ephemeral ports


def job_name(plan: Plan, stage: PlannedStage) -> str:
    return f"medgen.{plan.run_id}.{stage.name}"


def is_array(stage: PlannedStage) -> bool:
    return len(stage.tasks) > 1


def render_script(plan: Plan, stage: PlannedStage, run_root: Path, python: str) -> str:
    """The bash script of one stage; `python` is the interpreter that runs the ranks.

    Exit code: that of srun, which is the largest of the ranks' codes."""
    run = RunDir(run_root)
    blocks = [
        ["#!/bin/bash", *(f"#SBATCH {directive}" for directive in _directives(plan, stage, run))],
        ["# The warning signal goes to every process: ignored here, ranks install their own handler.", "trap '' USR2", "set -Eeuo pipefail"],
        _attempt(stage, run),
        ["set +u  # module and conda read variables that are not set", *plan.setup, "set -u"] if plan.setup else [],
        _environment(stage, run),
        _srun(stage, run, python),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _directives(plan: Plan, stage: PlannedStage, run: RunDir) -> list[str]:
    shard_folder = run.log(stage.name, 0, 0, 0).parent
    output = str(shard_folder if not is_array(stage) else shard_folder.parent).replace("%", "%%")
    lines = [
        f"--job-name={job_name(plan, stage)}",
        f"--time={stage.time_minutes}",
        f"--nodes={stage.nodes}",
        f"--ntasks-per-node={stage.ranks_per_node}",
        f"--cpus-per-task={stage.threads}",
    ]
    if stage.gpus_per_node:
        lines.append(f"--gres=gpu:{stage.gpus_per_node}")
    if stage.mem_mebibytes is not None:
        lines.append(f"--mem={stage.mem_mebibytes}M")
    if is_array(stage):
        lines.append(f"--array=0-{len(stage.tasks) - 1}%{stage.parallel}")
    lines += [
        f'--output="{output}{"/s%a" if is_array(stage) else ""}/batch.log"',
        "--open-mode=append",
        "--requeue",
        f"--signal=USR2@{GRACE_SECONDS}",
        "--kill-on-invalid-dep=yes",
    ]
    return lines


def _attempt(stage: PlannedStage, run: RunDir) -> list[str]:
    folder = shlex.quote(str(run.log(stage.name, 0, 0, 0).parent.parent))
    return [
        "# An attempt is one start of one shard; its number is the first without a log.",
        "shard=${SLURM_ARRAY_TASK_ID:-0}",
        f"logs={folder}/s$shard",
        'mkdir -p "$logs"',
        "attempt=0",
        'while [ -e "$logs/r0.a$attempt.log" ]; do attempt=$((attempt + 1)); done',
        ': > "$logs/r0.a$attempt.log"',
        f'echo "medgen: {stage.name} shard $shard attempt $attempt on $(hostname) at $(date +%FT%T%z)"',
    ]


def _environment(stage: PlannedStage, run: RunDir) -> list[str]:
    lines = [
        "# The code as it was when the run was made comes first: later edits do not reach queued jobs.",
        f"export PYTHONPATH={shlex.quote(str(run.code))}${{PYTHONPATH:+:$PYTHONPATH}}:$PWD",
        "export PYTHONUNBUFFERED=1",
        f"export OMP_NUM_THREADS={stage.threads}",
        f"export SRUN_CPUS_PER_TASK={stage.threads}  # srun of Slurm 22.05 and later forgets --cpus-per-task",
    ]
    if stage.nodes > 1:
        lines.append('read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")')
    else:
        lines.append("MASTER_ADDR=127.0.0.1")
    lines.append(f"MASTER_PORT=$(({FIRST_PORT} + (SLURM_JOB_ID + ${{SLURM_RESTART_COUNT:-0}}) % {PORTS}))")
    lines.append("export MASTER_ADDR MASTER_PORT")
    return lines


def _srun(stage: PlannedStage, run: RunDir, python: str) -> list[str]:
    # `python <folder>` runs its __main__.py without putting the current folder on the path, which `-m` would
    command = f"{shlex.quote(python)} {shlex.quote(str(run.code))} {stage.kind} {shlex.quote(str(run.root))}"
    return [
        "trap : TERM  # wait for srun, whose ranks are saving, and keep its exit code",
        "set +e",
        'srun --kill-on-bad-exit=1 --wait=60 --output="${logs//%/%%}/r%t.a$attempt.log" \\',
        f'  {command} --stage {stage.name} --shard "$shard" --attempt "$attempt"',
        "rc=$?",
        'echo "medgen: ended with exit code $rc at $(date +%FT%T%z)"',
        'exit "$rc"',
    ]
