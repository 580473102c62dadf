"""The checkpoints of a training against their commits: which can be trusted, and what is wrong with the others. Used by fsck.

Which is the best and which is one too many says commits.py, as it does for the training itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medgen import commits
from medgen.commits import Commit
from medgen.fsck.hashing import Hasher, unreadable


@dataclass(frozen=True)
class Saved:
    """One step folder. `problem`: why it cannot be trusted; `command`: what makes it readable; `commit`: None where that is the problem."""

    folder: Path
    step: int
    problem: str | None
    commit: Commit | None
    command: str | None = None


def saved(folder: Path, hasher: Hasher) -> list[Saved]:
    """Every checkpoint of a training, newest first. Raises OSError if the folder is there and cannot be read."""
    return [found for step, path in commits.step_folders(folder) if (found := _look(path, step, hasher)) is not None]


def readable_commits(found: list[Saved]) -> list[Commit]:
    """What training chooses from, and counts when it deletes: whatever became of the other files."""
    return [item.commit for item in found if item.commit is not None]


def _look(folder: Path, step: int, hasher: Hasher) -> Saved | None:
    """None if the folder went away meanwhile: a training deletes what it no longer needs."""
    try:
        commit = commits.read(folder)
    except FileNotFoundError:
        return Saved(folder, step, commits.UNCOMMITTED, None) if folder.exists() else None
    except OSError as error:
        return Saved(folder, step, f"{commits.COMMIT} cannot be read: {error.strerror or error}", None, unreadable(folder / commits.COMMIT, folder, error))
    except ValueError:
        return Saved(folder, step, commits.UNREADABLE, None)
    for name, facts in commit.files.items():
        problem = hasher.problem_with(folder / name, facts["size_bytes"], facts["sha256"])
        if problem is not None:
            return Saved(folder, step, f"{name} {problem.words}", commit, problem.command) if folder.exists() else None
    return Saved(folder, step, None, commit)
