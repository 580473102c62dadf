"""The text of a job script: a pure function of the plan, the same bytes in a dry run, on Slurm and locally.

Called by dry.py and by every backend. Locally `srun` and `scontrol` are stand-ins that come first on PATH."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from medgen import files, sbatch_options
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

FIRST_PORT, PORTS = 10000, 20000  # below 32768, where Linux begins to hand out ephemeral ports
REQUEUE = 75  # exit code of `medgen attempt end`: start this job again
ENOUGH = 76  # exit code of `medgen attempt begin`: the task is done already
NAME = re.compile(r"medgen\.(?P<run_id>[A-Za-z0-9_-]+)\.(?P<stage>[a-z0-9_]+)\.(?P<submission>\d+)\.(?P<offset>\d+)(?:-(?P<segment>\d+))?(?:\.(?P<folder>[0-9a-f]{6}))?")


@dataclass(frozen=True)
class Chunk:
    """The tasks of one sbatch call: of shard `offset` alone, or of the array elements `indices`, whose shards are offset + index."""

    submission: int
    offset: int
    indices: tuple[int, ...] | None = None
    segment: int = 0  # from 1 on in a chain of jobs that do the same task one after the other

    @property
    def shards(self) -> list[int]:
        return [self.offset] if self.indices is None else [self.offset + index for index in self.indices]


@dataclass(frozen=True)
class JobName:
    """What a job's name tells: with the array index, exactly which task it is."""

    run_id: str
    stage: str
    submission: int
    offset: int
    folder: str | None  # of which runs folder; None: not told
    segment: int = 0  # its place in a chain of jobs, from 1 on; 0: it is not part of one

    def is_of(self, run: RunDir) -> bool:
        return self.run_id == run.run_id and self.folder in (None, folder_tag(run))


def job_name(run: RunDir, stage: str, chunk: Chunk) -> str:
    segment = f"-{chunk.segment}" if chunk.segment else ""
    return f"medgen.{run.run_id}.{stage}.{chunk.submission}.{chunk.offset}{segment}.{folder_tag(run)}"


def folder_tag(run: RunDir) -> str:
    """The same spec may be submitted in two folders: their jobs must not be taken for each other's."""
    return files.sha256_bytes(str(run.root.resolve()).encode())[:6]


def parse_job_name(name: str) -> JobName | None:
    """None for a job that is not medgen's."""
    match = NAME.fullmatch(name)
    return JobName(match["run_id"], match["stage"], int(match["submission"]), int(match["offset"]), match["folder"], int(match["segment"] or 0)) if match else None


def is_array(stage: PlannedStage) -> bool:
    return len(stage.tasks) > 1


def whole_stage(stage: PlannedStage, submission: int) -> Chunk:
    return Chunk(submission, 0, tuple(range(len(stage.tasks))) if is_array(stage) else None)


def array_text(indices: tuple[int, ...]) -> str:
    """`0-4,7,9-11` for sorted indices."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def render_script(plan: Plan, stage: PlannedStage, chunk: Chunk, run_root: Path, python: str) -> str:
    """The bash script of one stage; `python`: the interpreter to use where the site brings none.

    Exit code on a cluster: 0 if and only if the outcome says done and verifies, whatever became of the ranks; else that of
    srun, which is the largest of theirs."""
    run = RunDir(run_root)
    interpreter = shlex.join(plan.place.interpreter or [python])
    is_command = stage.launcher == "none"
    blocks = [
        ["#!/bin/bash", *(sbatch_options.directive_line(directive) for directive in _directives(plan, stage, chunk, run))],
        ["# The warning signal goes to every process: ignored here, ranks install their own handler.", "trap '' USR2", "set -Eeuo pipefail"],
        _attempt(stage, chunk, run),
        _secrets(plan),
        _setup(stage.setup),
        [] if is_command else _environment(stage, run),
        _rendezvous(stage),
        _begin(stage, run, interpreter),
        _command(stage, run, interpreter) if is_command else _srun(stage, run, interpreter),
        _end(stage, run, interpreter),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def tasks_per_node(stage: PlannedStage) -> int:
    """How many processes srun starts on a node: one per rank, or one torchrun agent."""
    return 1 if stage.launcher == "torchrun" else stage.ranks_per_node


def _directives(plan: Plan, stage: PlannedStage, chunk: Chunk, run: RunDir) -> list[str]:
    lines = [
        f"--job-name={job_name(run, stage.name, replace(chunk, segment=0))}",  # all jobs of a chain have the same script
        f"--time={stage.time_minutes}",
        f"--nodes={stage.nodes}",
        f"--ntasks-per-node={tasks_per_node(stage)}",
        f"--cpus-per-task={stage.threads * stage.ranks_per_node // tasks_per_node(stage)}",
    ]
    if stage.gpus_per_node:
        lines.append(f"--gres=gpu:{stage.gpus_per_node}")
    if stage.mem_mebibytes is not None:
        lines.append(f"--mem={stage.mem_mebibytes}M")
    lines += [
        f'--output="{batch_log_pattern(run, stage, chunk)}"',
        "--open-mode=append",
        "--requeue",
        "--kill-on-invalid-dep=yes",
    ]
    if stage.launcher != "none":
        lines.append(f"--signal=USR2@{plan.place.grace_seconds}")
    elif stage.segments != 1:
        lines.append(f"--signal=B:USR2@{plan.place.grace_seconds}")  # to the batch shell, which passes it on
    lines = sbatch_options.without(lines, {*sbatch_options.decided(stage.directives), *stage.left_out})
    if chunk.indices is not None:
        lines.append(f"--array={array_text(chunk.indices)}%{min(stage.parallel, len(chunk.indices))}")
    return [*lines, *stage.directives]


def batch_log_pattern(run: RunDir, stage: PlannedStage, chunk: Chunk) -> str:
    """Where sbatch puts what the batch shell prints. Where it can name the folder of a shard, it does; it cannot add an offset to %a."""
    log = run.batch_log(stage.name, chunk.offset)
    if chunk.indices is None:
        return str(log).replace("%", "%%")
    folder = str(log.parent.parent).replace("%", "%%")
    return f"{folder}/s%a/{log.name}" if chunk.offset == 0 else f"{folder}/from{chunk.offset}.%a.{log.name}"


def _attempt(stage: PlannedStage, chunk: Chunk, run: RunDir) -> list[str]:
    folder = shlex.quote(str(run.log(stage.name, 0, 0, 0).parent.parent))
    lines = [
        "# An attempt is one start of one shard; its number is the first without a log.",
        f"shard={chunk.offset}" if chunk.indices is None else f"shard=$(({chunk.offset} + SLURM_ARRAY_TASK_ID))",
        f"logs={folder}/s$shard",
        'mkdir -p "$logs"',
    ]
    if chunk.indices is not None and chunk.offset:
        lines.append('exec >> "$logs/batch.log" 2>&1')
    return [
        *lines,
        "attempt=0",
        'while [ -e "$logs/r0.a$attempt.log" ]; do attempt=$((attempt + 1)); done',
        ': > "$logs/r0.a$attempt.log"',
        "started=$(date +%s)",
        # an array's last element has the array's own number as SLURM_JOB_ID: asked by that, Slurm would answer for all of them
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-${SLURM_JOB_ID:-}}",
        f'echo "medgen: {stage.name} shard $shard attempt $attempt on $(hostname) at $(date +%FT%T%z)"',
        "trap 'rc=$?; echo \"medgen: set-up failed with exit code $rc: $BASH_COMMAND\"; exit $rc' ERR",
    ]


def _secrets(plan: Plan) -> list[str]:
    if plan.place.secrets is None:
        return []
    path = shlex.quote(plan.place.secrets)
    return ["# Read on the node: the values stand in no script and no log.", f"{{ set +x; set -a; source {path}; set +a; }} 2> /dev/null"]


def _setup(lines: list[str]) -> list[str]:
    if not lines:
        return []
    return ["set +u  # module and conda read variables that are not set", *lines, "set -u"]


def _environment(stage: PlannedStage, run: RunDir) -> list[str]:
    agent_threads = stage.threads * stage.ranks_per_node // tasks_per_node(stage)
    return [
        "# The code as it was when the run was made comes first: later edits do not reach queued jobs.",
        f"export PYTHONPATH={shlex.quote(str(run.code))}${{PYTHONPATH:+:$PYTHONPATH}}:$PWD",
        "export PYTHONUNBUFFERED=1",
        f"export OMP_NUM_THREADS={stage.threads}",
        f"export SRUN_CPUS_PER_TASK={agent_threads}  # srun of Slurm 22.05 and later forgets --cpus-per-task",
    ]


def _rendezvous(stage: PlannedStage) -> list[str]:
    """Where the ranks meet: this script runs on the first node, so it can see which port is free there."""
    if stage.ranks == 1 or stage.launcher == "none":
        return []
    if stage.nodes == 1:
        lines = ["MASTER_ADDR=127.0.0.1"]
    else:
        lines = [
            'first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "# by name where names resolve, else by the address that Slurm itself uses",
            'MASTER_ADDR=$(getent hosts "$first_node" > /dev/null && echo "$first_node" || scontrol show node "$first_node" | sed -n \'s/.*NodeAddr=\\([^ ]*\\).*/\\1/p\')',
        ]
    return [
        *lines,
        f"MASTER_PORT=$(({FIRST_PORT} + (SLURM_JOB_ID + 101 * ${{SLURM_RESTART_COUNT:-0}}) % {PORTS}))",
        'while (exec 3<> "/dev/tcp/127.0.0.1/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done  # somebody listens there',
        "export MASTER_ADDR MASTER_PORT",
    ]


def _begin(stage: PlannedStage, run: RunDir, interpreter: str) -> list[str]:
    return [
        'if [ -z "${MEDGEN_SUPERVISED:-}" ]; then  # a local supervisor tells of starts and ends itself',
        f'  {interpreter} {shlex.quote(str(run.code))} attempt begin {shlex.quote(str(run.root))} --stage {stage.name} --shard "$shard" --attempt "$attempt" || {{',
        f"    rc=$?; [ $rc -ne {ENOUGH} ] || rc=0  # an earlier job of the chain has done it",
        '    rm -f "$logs/r0.a$attempt.log"; trap - ERR; exit $rc; }',
        "fi",
    ]


def _srun(stage: PlannedStage, run: RunDir, interpreter: str) -> list[str]:
    # `python <folder>` runs its __main__.py without putting the current folder on the path, which `-m` would
    command = f"{interpreter} {shlex.quote(str(run.code))} {stage.kind} {shlex.quote(str(run.root))}"
    options = f'--stage {stage.name} --shard "$shard" --attempt "$attempt"'
    if stage.launcher == "torchrun":
        agent = (
            f"{interpreter} -m torch.distributed.run --nnodes={stage.nodes} --nproc-per-node={stage.ranks_per_node} --max-restarts=0 "
            f'--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID.$attempt" '
            "--rdzv-conf=timeout=120,join_timeout=120 --no-python"
        )
        work = [f"  {agent} \\", f"  {command} {options}"]
    else:
        work = [f"  {command} {options}"]
    # Slurm starts tasks with no signal ignored. The warning must not kill a rank whose interpreter has not set its handler
    # yet; and torchrun's agent, which takes it for the end of everything, never gets one.
    work = ["  bash -c 'trap \"\" USR2; exec \"$@\"' rank \\", *work]
    exported = "--export=ALL "  # whatever sbatch was told: what this script has set must reach the ranks
    return [
        "trap - ERR",
        "trap : TERM  # wait for srun, whose ranks are saving, and keep its exit code",
        "set +e",
        f'srun {exported}--kill-on-bad-exit=1 --wait=600 --output="${{logs//%/%%}}/r%t.a$attempt.log" \\',
        *work,
        "rc=$?",
    ]


def _command(stage: PlannedStage, run: RunDir, interpreter: str) -> list[str]:
    """In the batch shell itself: the user's own script may call srun. Signals are passed on."""
    return [
        "trap - ERR",
        "work=",
        "for name in USR1 USR2 TERM; do trap '[ -z \"$work\" ] || kill -'\"$name\"' \"$work\" 2> /dev/null' $name; done",
        "set +e",
        f'{interpreter} {shlex.quote(str(run.code))} command {shlex.quote(str(run.root))} --stage {stage.name} --shard "$shard" --attempt "$attempt" \\',
        '  < /dev/null >> "$logs/r0.a$attempt.log" 2>&1 &',
        "work=$!",
        'wait "$work"; rc=$?',
        'while kill -0 "$work" 2> /dev/null; do wait "$work"; rc=$?; done  # a signal ends wait, not the work',
    ]


def _end(stage: PlannedStage, run: RunDir, interpreter: str) -> list[str]:
    """What came of it is in the outcome; whether to start again is decided there, and done here, where scontrol is."""
    return [
        'echo "medgen: ended with exit code $rc at $(date +%FT%T%z)"',
        'if [ -z "${MEDGEN_SUPERVISED:-}" ]; then',
        f'  changes=$({interpreter} {shlex.quote(str(run.code))} attempt end {shlex.quote(str(run.root))} --stage {stage.name} --shard "$shard" --attempt "$attempt" \\',
        '    --exit-code "$rc" --started "$started" --job "$(scontrol show job --oneliner "$job" 2> /dev/null)")',
        "  case $? in",
        "    0) rc=0 ;;  # done: a rank that was killed after its work has harmed nothing",
        f"    {REQUEUE})",
        '      [ "$rc" -ne 0 ] || rc=1',
        "      trap 'exit \"$rc\"' TERM  # Slurm ends this script when it takes the job back; until then the next start can be changed",
        "      if (trap '' TERM; scontrol requeue \"$job\" || exit; for change in $changes; do scontrol update JobId=\"$job\" \"$change\"; done; true); then",
        '        sleep 60; exit "$rc"',
        "      fi",
        f'      {interpreter} {shlex.quote(str(run.code))} attempt refused {shlex.quote(str(run.root))} --stage {stage.name} --shard "$shard" --attempt "$attempt" ;;',
        '    *) [ "$rc" -ne 0 ] || rc=1 ;;',
        "  esac",
        "fi",
        'exit "$rc"',
    ]
