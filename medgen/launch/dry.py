"""What submit would do, as text: the stages and, byte for byte, the scripts. Called by `submit --dry-run`."""

from __future__ import annotations

import sys
from pathlib import Path

from medgen.launch.script import Chunk, render_script
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

HEADINGS = ("stage", "kind", "tasks", "at once", "processes", "threads", "GPUs", "time", "waits for")


def describe(plan: Plan, run_root: Path, chunks: dict[str, list[Chunk]], python: str = sys.executable) -> str:
    """The table of stages, then each script of `chunks` under a line that names it. Writes nothing."""
    run = RunDir(run_root)
    rows = [HEADINGS, *(_row(stage, run) for stage in plan.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = [f"run     {plan.run_id}", f"folder  {run_root}", f"site    {plan.site}", "", table[0], "-" * len(table[0]), *table[1:]]
    for stage in plan.stages:
        for chunk in (chunk for chunk in chunks[stage.name] if chunk.segment <= 1):
            name = f"{stage.name}.{chunk.offset}.sh"
            again = f" ({stage.chain} times, each waits for the one before)" if stage.chain > 1 else ""
            lines += ["", f"===== {name}{again} " + "=" * max(3, 103 - len(name + again)), render_script(plan, stage, chunk, run_root, python).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _row(stage: PlannedStage, run: RunDir) -> tuple[str, ...]:
    done = sum(run.is_done(task.stage, task.shard, task.hash) for task in stage.tasks)
    tasks = f"{len(stage.tasks)}" + (f" ({done} done)" if done else "")
    hours, minutes = divmod(stage.time_minutes, 60)
    return (
        stage.name, stage.kind, tasks, str(stage.parallel), str(stage.ranks), str(stage.threads),
        str(stage.nodes * stage.gpus_per_node or "-"), f"{hours}:{minutes:02}:00", ", ".join(stage.needs) or "-",
    )  # fmt: skip
