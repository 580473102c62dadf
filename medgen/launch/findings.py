"""What a check found, and what is still to be done of a stage. Used by preflight.py and the modules it asks, and by checks/."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from medgen.plan import PlannedStage, Task
from medgen.rundir import RunDir

Mark = Literal["fine", "note", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of a check. `wrong` stops a submit; a `note` or `warning` is told; `facts`: what was measured, for scripts."""

    topic: str
    mark: Mark
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


def undone(run: RunDir, stage: PlannedStage) -> list[Task]:
    return [task for task in stage.tasks if not run.is_done(task.stage, task.shard, task.hash)]


def once(findings: list[Finding]) -> list[Finding]:
    """Points of a sweep, and jobs that fail for one reason, say the same."""
    return list({(item.topic, item.mark, item.text): item for item in findings}.values())


def listed(names: list[str], shown: int = 4) -> str:
    """`a, b and 3 more`."""
    return ", ".join(names) if len(names) <= shown else f"{', '.join(names[:shown])} and {len(names) - shown} more"
