"""commit.json: what was saved at a step, and which of several checkpoints is the newest, the best, or one too many. Loads no torch.

checkpoint.py writes it and goes by it; fsck judges by it; rundir.py and the launcher count steps and bytes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medgen import files

FORMAT_VERSION = 2
COMMIT = "commit.json"
LAST = "last_"  # begins the name of a metric that is the step itself: the best by it is the last of a phase
STATE = "state.json"
STEP_FOLDER = re.compile(r"step-(\d{6,})")
SET_ASIDE = "bad-step-*"
UNCOMMITTED = f"it was never committed (no {COMMIT})"
UNREADABLE = f"{COMMIT} is not readable"


@dataclass(frozen=True)
class Commit:
    """`files`: name -> {"size_bytes": int, "sha256": str}. `metrics`: name -> {"value": float, "better": "lower" | "higher"}."""

    folder: Path
    step: int
    files: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]]

    @property
    def sha256(self) -> str:
        """One hash over all weights and optimizer states; what was logged on the way is not part of it."""
        return files.sha256_json({name: facts["sha256"] for name, facts in self.files.items() if name != STATE})

    @property
    def size_bytes(self) -> int:
        return sum(facts["size_bytes"] for facts in self.files.values())


def read(folder: Path) -> Commit:
    """In the form that `write` gives it. Raises ValueError if it has any other, OSError if it cannot be read."""
    record = files.read_json(folder / COMMIT)
    try:
        well_formed = _is_well_formed(record) and folder.name == folder_name(record["step"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not a commit: {error}") from None
    if not well_formed:
        raise ValueError(f"{folder}: not a commit of this checkpoint")
    return Commit(folder, record["step"], record["files"], record["metrics"])


def _is_well_formed(record: dict[str, Any]) -> bool:
    return (
        record["version"] == FORMAT_VERSION
        and files.own_hash_holds(record)
        and STATE in record["files"]
        and all(_stays_inside(name) for name in record["files"])
        and all(isinstance(facts["size_bytes"], int) and isinstance(facts["sha256"], str) for facts in record["files"].values())
        and all(isinstance(facts["value"], int | float) and facts["better"] in ("lower", "higher") for facts in record["metrics"].values())
    )


def _stays_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def write(folder: Path, step: int, listed: dict[str, dict[str, Any]], metrics: dict[str, dict[str, Any]]) -> None:
    """With a hash of itself: nothing else speaks for this file."""
    record = {"version": FORMAT_VERSION, "step": step, "metrics": metrics, "files": listed}
    files.write_json(folder / COMMIT, files.with_own_hash(record))


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def set_aside(folder: Path) -> Path:
    """Where a damaged checkpoint, or a whole folder of them, is moved to: it neither counts as kept nor as progress."""
    return folder.with_name(f"bad-{folder.name}")


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """What is named like a checkpoint, newest first. Raises OSError if the folder is there and cannot be read."""
    try:
        found = [(match, path) for path in folder.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    except FileNotFoundError:
        return []
    return sorted(((int(match.group(1)), path) for match, path in found), reverse=True)


def newest(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest that has a commit, which is not read; None if none can be seen."""
    with contextlib.suppress(OSError):
        return next(((step, path) for step, path in step_folders(folder) if os.path.lexists(path / COMMIT)), None)
    return None


def committed(folder: Path) -> list[Commit]:
    """Of all checkpoints whose commit can be read, newest first; their other files are not looked at."""
    found = []
    for _, path in step_folders(folder):
        try:
            found.append(read(path))
        except (OSError, ValueError):
            continue
    return found


def best(found: Sequence[Commit]) -> dict[str, Commit]:
    """Metric -> the best checkpoint by it, the earliest of equals; whatever became of the other files."""
    chosen = {}
    for name in sorted({name for item in found for name in item.metrics}):
        scored = [item for item in found if name in item.metrics]
        sign = -1 if scored[0].metrics[name]["better"] == "higher" else 1
        chosen[name] = min(scored, key=lambda item: (sign * item.metrics[name]["value"], item.step))
    return chosen


def beyond_policy(found: Sequence[Commit], keep: int) -> list[Commit]:
    """Of `committed`: all but the `keep` newest and the best of every metric."""
    kept = {item.folder for item in [*found[:keep], *best(found).values()]}
    return [item for item in found if item.folder not in kept]
