"""The checkpoints of a stage, verified without torch: commit.json lists every file with size and sha256. Used by fsck."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medgen import files
from medgen.fsck.hashing import Hasher, unreadable

STEP = re.compile(r"step-(\d{6,})")
SET_ASIDE = "bad-step-*"


@dataclass(frozen=True)
class Saved:
    """One step folder. `problem`: why it cannot be trusted; `command`: what makes it readable; `metrics`: name -> (value, better), empty where the commit cannot be read."""

    folder: Path
    step: int
    problem: str | None
    metrics: dict[str, tuple[float, str]]
    command: str | None = None


def saved(folder: Path, hasher: Hasher) -> list[Saved]:
    """Every checkpoint of a training, newest first."""
    steps = [(int(match.group(1)), path) for path in _entries(folder) if (match := STEP.fullmatch(path.name))]
    return [found for step, path in sorted(steps, reverse=True) if (found := _look(path, step, hasher)) is not None]


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> (bytes, sha256) of every file in the commit. Raises OSError or ValueError if there is no such commit."""
    return _listed(_commit(folder))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _commit(folder: Path) -> dict[str, Any]:
    commit: dict[str, Any] = files.read_json(folder / "commit.json")
    try:
        if folder.name != f"step-{commit['step']:06d}" or "state.json" not in commit["files"]:
            raise ValueError(f"{folder}: not the commit of this checkpoint")
        if not files.own_hash_holds(commit):
            raise ValueError(f"{folder}: commit.json was changed")
        if any(not isinstance(facts["value"], int | float) or facts["better"] not in ("lower", "higher") for facts in commit["metrics"].values()):
            raise ValueError(f"{folder}: metrics that are none")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not a commit: {error}") from None
    return commit


def _listed(commit: dict[str, Any]) -> dict[str, tuple[int, str]]:
    try:
        found = {str(name): (facts["size_bytes"], facts["sha256"]) for name, facts in commit["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a list of files: {error}") from None
    if any(not isinstance(size_bytes, int) or not isinstance(digest, str) for size_bytes, digest in found.values()):
        raise ValueError("sizes or hashes that are none")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in found):
        raise ValueError("a file outside the checkpoint")
    return found


def _look(folder: Path, step: int, hasher: Hasher) -> Saved | None:
    """None if the folder went away meanwhile: a training deletes what it no longer needs."""
    try:
        commit = _commit(folder)
        expected = _listed(commit)
        metrics = {name: (facts["value"], facts["better"]) for name, facts in commit["metrics"].items()}
    except FileNotFoundError:
        return Saved(folder, step, "it was never committed (no commit.json)", {}) if folder.exists() else None
    except OSError as error:
        return Saved(folder, step, f"commit.json cannot be read: {error.strerror or error}", {}, unreadable(folder / "commit.json", error))
    except ValueError:
        return Saved(folder, step, "commit.json is not readable", {})
    for name, (size_bytes, digest) in expected.items():
        problem = hasher.problem_with(folder / name, size_bytes, digest)
        if problem is not None:
            return Saved(folder, step, f"{name} {problem.words}", metrics, problem.command) if folder.exists() else None
    return Saved(folder, step, None, metrics)


def best(checkpoints: list[Saved]) -> dict[str, Saved]:
    """Selector -> checkpoint, as training chooses them: by what the commits say, whatever became of the other files."""
    found = {}
    for name in sorted({name for item in checkpoints for name in item.metrics}):
        scored = [item for item in checkpoints if name in item.metrics]
        sign = -1 if scored[0].metrics[name][1] == "higher" else 1
        found[f"best-{name}"] = min(scored, key=lambda item: (sign * item.metrics[name][0], item.step))
    return found


def beyond_policy(checkpoints: list[Saved], keep: int) -> list[Saved]:
    """What a training would have deleted itself: all but the newest `keep` and the best of every metric."""
    kept = {item.folder for item in [*checkpoints[:keep], *best(checkpoints).values()]}
    return [item for item in checkpoints if item.folder not in kept]
