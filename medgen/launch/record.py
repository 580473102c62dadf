"""What `medgen check` found out about a run, kept in the cache folder for submit. Written by checks/, read by preflight.py."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

from medgen import files
from medgen.rundir import RunDir


@dataclass(frozen=True)
class StageRecord:
    """`save_seconds`: one checkpoint into the folder of the caches; None where the model was too large to be tried."""

    checkpoint_bytes: int
    save_seconds: float | None


@dataclass(frozen=True)
class Record:
    """By training stage. `time` in unix seconds."""

    time: float
    stages: dict[str, StageRecord]


def path_of(run: RunDir) -> Path:
    return run.cache / "checked" / f"{run.run_id}.json"


def write(run: RunDir, known: Record) -> None:
    """A folder that cannot be written loses a hint, nothing else."""
    with contextlib.suppress(OSError):
        files.write_json(path_of(run), asdict(known))


def read(run: RunDir) -> Record | None:
    """None if this run has not been checked here."""
    try:
        facts = files.read_json(path_of(run))
        return Record(facts["time"], {name: StageRecord(**stage) for name, stage in facts["stages"].items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
