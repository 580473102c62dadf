"""The files that a table names, checked by name and header, and their axial slices; used by stack.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medgen import csv_files
from medgen.data.volumes import Header, display_slices, read_header, read_volume, require_same_grid
from medgen.errors import InputError
from medgen.prepare.split import COLUMN as SPLIT_COLUMN
from medgen.prepare.table import Cohort, Image
from medgen.spec_data import SPLITS

AXIAL = 2
PICTURES = (".png", ".jpg", ".jpeg")
PICTURE_MODES = {"L": 1, "I;16": 1, "RGB": 3}  # channels of what Pillow calls the mode
SHOWN = 5


@dataclass(frozen=True)
class Source:
    """One row of the table: the file, the split, and which slices are taken. `header` is None for a picture."""

    image: Image
    side: str
    path: Path
    named: str  # as the table names the file
    numbers: tuple[int, ...]
    channels: int
    header: Header | None


def find_sources(cohort: Cohort, column: str, root: Path, numbers: tuple[int, ...] | None) -> list[Source]:
    """In the order of the table. Raises InputError for files that are missing, named twice or on different grids, and for subjects in two splits."""
    csv_files.require_columns(cohort.path, cohort.header, {"the files": column})
    named = [_named_file(cohort, column, root, row, image) for row, image in zip(cohort.rows, cohort.images, strict=True)]
    _require_files(cohort.path, named)
    sources = [
        _source(numbers, image, _side(cohort, row, image), text, path)
        for (row, image), (text, path) in zip(zip(cohort.rows, cohort.images, strict=True), named, strict=True)
    ]
    _require_one_side(cohort.path, sources)
    _require_same_channels(cohort.path, sources)
    volumes = [source.header for source in sources if source.header is not None and source.header.shape[source.header.slice_axis(AXIAL)] > 1]
    if volumes:
        require_same_grid(f"{cohort.path}: the volumes must be registered", volumes[0], volumes[1:])
    return sources


def _named_file(cohort: Cohort, column: str, root: Path, row: dict[str, str], image: Image) -> tuple[str, Path]:
    text = row[column].strip()
    if not text:
        raise InputError(f"{cohort.path}:{image.line}: {column} is empty; give a file or remove the line")
    return text, root / Path(text).expanduser()


def _require_files(table: Path, named: list[tuple[str, Path]]) -> None:
    missing = [path for _, path in named if not path.is_file()]
    if missing:
        listed = "\n".join(f"  {path}" for path in missing[:SHOWN]) + (f"\n  and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        raise InputError(f"{table}: {len(missing)} file(s) are missing:\n{listed}\nRelative paths count from the table's folder; for another one use --root")
    twice = [path for path, count in Counter(path.resolve() for _, path in named).items() if count > 1]
    if twice:
        raise InputError(f"{table}: {twice[0]} stands in more than one line; keep one of them")


def _side(cohort: Cohort, row: dict[str, str], image: Image) -> str:
    """Its split, or nothing if the table knows none."""
    if SPLIT_COLUMN not in cohort.header:
        return ""
    side = row[SPLIT_COLUMN].strip()
    if side not in SPLITS:
        raise InputError(f"{cohort.path}:{image.line}: {SPLIT_COLUMN} is {side!r}; write one of {', '.join(SPLITS)}")
    return side


def _source(wanted: tuple[int, ...] | None, image: Image, side: str, text: str, path: Path) -> Source:
    if path.suffix.lower() in PICTURES:
        return Source(image, side, path, text, (0,), _picture_channels(path), None)
    header = read_header(path)
    count = header.shape[header.slice_axis(AXIAL)]
    numbers = ((count - 1) // 2,) if wanted is None or count == 1 else wanted
    if max(numbers) >= count:
        raise InputError(f"{path}: no axial slice {max(numbers)}; it has {count}, numbered 0 to {count - 1}: choose with --slices")
    return Source(image, side, path, text, numbers, 1, header)


def _picture_channels(path: Path) -> int:
    from PIL import Image as Pictures

    try:
        with Pictures.open(path) as picture:
            mode = picture.mode
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); is the file cut short?") from None
    if mode not in PICTURE_MODES:
        raise InputError(f"{path}: is a {mode} picture; allowed are grey (L, I;16) and RGB: convert it")
    return PICTURE_MODES[mode]


def _require_one_side(table: Path, sources: Sequence[Source]) -> None:
    first: dict[str, Source] = {}
    for source in sources:
        known = first.setdefault(source.image.subject, source)
        if known.side != source.side:
            raise InputError(f"{table}:{source.image.line}: subject {source.image.subject} is in {source.side}, but in {known.side} in line {known.image.line}; "
                             "the test result would be too good: keep each subject in one split")  # fmt: skip


def _require_same_channels(table: Path, sources: Sequence[Source]) -> None:
    for source in sources:
        if source.channels != sources[0].channels:
            raise InputError(f"{table}: {source.path} has {source.channels} channel(s), but {sources[0].path} has {sources[0].channels}; "
                             "make all of them grey or all of them RGB")  # fmt: skip


def read_slices(source: Source) -> np.ndarray:
    """Its slices as they are displayed, float32 [numbers, channels, H, W]: anterior on top, the patient's left to the right."""
    if source.header is None:
        from PIL import Image as Pictures

        try:
            with Pictures.open(source.path) as picture:
                pixels = np.asarray(picture, np.float32)
        except OSError as error:
            raise InputError(f"{source.path}: cannot be read ({error}); is the file cut short?") from None
        return pixels.reshape(*pixels.shape[:2], source.channels).transpose(2, 0, 1)[None]
    planes = display_slices(read_volume(source.path), source.header.slice_axis(AXIAL))
    return planes[list(source.numbers)][:, None]
