"""A collected dataset as it is read again: what collect.py published, verified. Used by generate (masks as conditions), evaluate and the report."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from medgen import files
from medgen import plan as planning
from medgen.errors import MedgenError
from medgen.rundir import RunDir

INDEX = "index.csv"
MANIFEST = "manifest.json"
SHA_SUFFIX = "_sha256"
EXPORT_PREFIX = "export_"  # of columns with files for others, which medgen does not read again
AGAIN = "submit the spec again, it is collected anew"


def file_columns(index: pd.DataFrame) -> list[str]:
    """Columns that hold files."""
    return [name for name in index.columns if f"{name}{SHA_SUFFIX}" in index.columns]


def channels(index: pd.DataFrame) -> list[str]:
    """Those of them that are images and masks in medgen's own form."""
    return [name for name in file_columns(index) if not name.startswith(EXPORT_PREFIX)]


class DamagedDataset(MedgenError):
    """It is not what was published; the message names the file."""


def read(dataset: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The index, every column as text, row i image i; and the manifest, which holds its hash. Raises DamagedDataset."""
    index = dataset / INDEX
    if not dataset.is_dir():
        raise DamagedDataset(f"{index}: no such file; {dataset.parent.name} has not been collected yet")
    try:
        manifest = files.read_json(dataset / MANIFEST)
        content = index.read_bytes()
        whole = files.sha256_bytes(content) == manifest["index_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedDataset(f"{index} is missing or has changed since it was collected (sha256); {AGAIN}")
    return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False), manifest


def verified_file(dataset: Path, record: pd.Series, channel: str) -> Path:
    """The file of an image, whose index row this is. Raises DamagedDataset."""
    path: Path = dataset / record[channel]
    try:
        unchanged = files.sha256_file(path) == record[channel + SHA_SUFFIX]
    except OSError as error:
        raise DamagedDataset(f"sample {record['id']}: {path} cannot be read: {error.strerror or error}; {AGAIN}") from None
    if not unchanged:
        raise DamagedDataset(f"sample {record['id']}: {path} has changed since it was collected (sha256); {AGAIN}")
    return path


@contextmanager
def made_again_if_damaged(run: RunDir, stage: str) -> Iterator[None]:
    """It then counts as not done: the next submit collects it anew, also where that compares sizes only."""
    try:
        yield
    except DamagedDataset as error:
        name = planning.collect_name(stage)
        run.outcome_file(name, 0).unlink(missing_ok=True)
        run.event("dataset_damaged", stage=name, cause=str(error))
        raise
