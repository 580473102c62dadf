"""`medgen prepare stack`: axial slices of registered volumes, or pictures, as one labelled stack per split at every size. Called by cli.py.

Slices and labels are made from one list and written with where each came from; what was written is read again before it gets its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgen import csv_files, files
from medgen.data import stacks
from medgen.data.image_files import FLAT_AFFINE
from medgen.data.phantoms import write_volume
from medgen.data.resize import pad_to_square
from medgen.data.volumes import slice_affine
from medgen.errors import InputError, MedgenError
from medgen.prepare import page, words
from medgen.prepare.page import Section, Table
from medgen.prepare.sources import AXIAL, Source, find_sources, read_slices
from medgen.prepare.table import Cohort, Columns, read_cohort
from medgen.report.pictures import Tile, tile
from medgen.spec_data import SPLITS

CENTRAL = "central"
NUMBERS = re.compile(r"\d{1,6}(,\d{1,6})*")
SHOWN_PER_CLASS = 8
SAY_EVERY = 100


@dataclass(frozen=True)
class Settings:
    """`numbers`: axial slices counted from the lowest, from 0 on; None: the central one. `root`: what relative paths count from."""

    path_column: str
    root: Path
    numbers: tuple[int, ...] | None
    size: int
    clip_negative: bool

    def __post_init__(self) -> None:
        if self.size < stacks.SMALLEST or self.size & (self.size - 1):
            raise InputError(f"--size {self.size}: the sizes go down to {stacks.SMALLEST} by halves; use a power of two such as 64, 128 or 256")

    @property
    def sizes(self) -> list[int]:
        """The largest first."""
        return [self.size // 2**step for step in range(self.size.bit_length()) if self.size // 2**step >= stacks.SMALLEST]


def slice_numbers(text: str) -> tuple[int, ...] | None:
    """`central`, or numbers with commas."""
    if text == CENTRAL:
        return None
    if not NUMBERS.fullmatch(text):
        raise InputError(f"--slices {text!r}: write {CENTRAL}, or numbers from 0 on with commas, such as 127 or 120,127,134")
    numbers = tuple(int(number) for number in text.split(","))
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--slices {text!r}: a slice stands twice; name each once")
    return numbers


@dataclass(frozen=True)
class Sample:
    """One slice of a stack."""

    source: Source
    number: int
    sha256: str


# slices


def fitted(plane: np.ndarray, size: int) -> np.ndarray:
    """[c, H, W] as [c, size, size]: zeros around it if it fits, which changes no pixel; else squared and shrunk, antialiased."""
    square = _padded(plane, size)
    return square if square.shape[1] == size else shrunk(square, size)


def _padded(plane: np.ndarray, size: int) -> np.ndarray:
    square = pad_to_square(plane)
    missing = max(0, size - square.shape[1])
    before = missing // 2
    return np.pad(square, ((0, 0), (before, missing - before), (before, missing - before)))


def shrunk(planes: np.ndarray, size: int) -> np.ndarray:
    """[n, S, S] float32 to [n, size, size]: a Gaussian blur against aliasing, then bilinear; values stay in their range.

    scikit-image's, not data/resize.py's: stacks made here and by the reference system are to be the same pixels."""
    from skimage.transform import resize

    smaller = [resize(plane, (size, size), order=1, preserve_range=True, anti_aliasing=True) for plane in planes.astype(np.float32, copy=False)]
    return np.stack(smaller).astype(np.float32, copy=False)


def scaled(plane: np.ndarray) -> np.ndarray:
    """(x - m/2) / (m/2) with the maximum m of this slice: from [0, m] to [-1, 1]."""
    half = float(plane.max()) / 2
    return ((plane.astype(np.float64) - half) / half).astype(np.float32)


def _prepared(source: Source, number: int, plane: np.ndarray, settings: Settings) -> np.ndarray:
    where = f"{source.path}, slice {number}"
    negative = int((plane < 0).sum())
    if negative and not settings.clip_negative:
        raise InputError(f"{where}: {negative} pixels are negative (down to {plane.min():g}) and would fall below -1; "
                         "set them to 0 with --clip-negative, or correct the volume")  # fmt: skip
    square = fitted(np.maximum(plane, 0), settings.size)
    if not square.max() > 0:
        raise InputError(f"{where}: nothing in it is above 0; choose another slice with --slices, or remove line {source.image.line} of the table")
    return scaled(square)


def _affine(sources: Sequence[Source], settings: Settings) -> np.ndarray:
    """(column, row, 0) of the largest size to patient mm, of the first slice taken; pictures carry no place, a pixel is 1 mm there."""
    header = sources[0].header
    if header is None or any(source.header is None or not np.allclose(source.header.affine, header.affine, atol=1e-2) for source in sources):
        return FLAT_AFFINE[:, [1, 0, 2, 3]]
    axis = header.slice_axis(AXIAL)
    side = max(count for other, count in enumerate(header.shape) if other != axis)
    padded = max(side, settings.size)
    scale = padded / settings.size
    fit = np.diag([scale, scale, 1.0, 1.0])
    fit[:2, 3] = 0.5 * scale - 0.5 - (padded - side) // 2
    return (slice_affine(header, axis, sources[0].numbers[0], side) @ fit)[:, [1, 0, 2, 3]]


# the verb


def stack(table: Path, out: Path, columns: Columns, settings: Settings, say: Callable[[str], None]) -> str:
    """Write a stack per split to `out`; returns what to print."""
    files.require_new(out)
    cohort = read_cohort(table, columns)
    sources = find_sources(cohort, settings.path_column, settings.root, settings.numbers)
    sides = [side for side in ("", *SPLITS) if any(source.side == side for source in sources)]
    _require_training_classes(cohort, sources)
    shown: dict[str, tuple[list[Sample], np.ndarray]] = {}
    with files.folder_in_one_move(out) as folder:
        for side in sides:
            own = [source for source in sources if source.side == side]
            samples, images = _read(own, settings, say)
            _write(folder / side, cohort, own, samples, images, settings)
            shown[side] = samples, images[_examples(cohort, samples)]
            say(f"{side or 'all'}: {len(samples)} slices, {settings.size} px to {stacks.SMALLEST} px, written and read again")
        counts = _counts(cohort, {side: samples for side, (samples, _) in shown.items()})
        files.write_json(folder / "report.json", _record(cohort, settings, {side: samples for side, (samples, _) in shown.items()}))
        files.write_text(folder / "report.html", _page(cohort, settings, counts, shown))
    folders = ", ".join(f"{side}/" for side in sides if side)
    return "\n\n".join(part for part in (words.left_out(cohort), counts.text(), f"{out}: {folders + ', ' if folders else ''}report.json, report.html") if part)


def _require_training_classes(cohort: Cohort, sources: Sequence[Source]) -> None:
    there = {source.image.group for source in sources if source.side in ("", "train")}
    for group in cohort.groups:
        if group not in there:
            raise InputError(f"{cohort.path}: no line of the split train is in the group {group!r}; a class cannot be learnt without images")


def _read(sources: Sequence[Source], settings: Settings, say: Callable[[str], None]) -> tuple[list[Sample], np.ndarray]:
    """Every slice of these sources and, in the same order, its pixels, float32 [n, c, size, size]."""
    samples: list[Sample] = []
    images = np.empty((sum(len(source.numbers) for source in sources), sources[0].channels, settings.size, settings.size), np.float32)
    for position, source in enumerate(sources):
        digest = files.sha256_file(source.path)
        for number, plane in zip(source.numbers, read_slices(source), strict=True):
            images[len(samples)] = _prepared(source, number, plane, settings)
            samples.append(Sample(source, number, digest))
        if (position + 1) % SAY_EVERY == 0:
            say(f"{position + 1} of {len(sources)} files read")
    return samples, images


def _write(folder: Path, cohort: Cohort, sources: Sequence[Source], samples: Sequence[Sample], images: np.ndarray, settings: Settings) -> None:
    """Raises MedgenError if what lies on the disk afterwards is not what it should be."""
    folder.mkdir(exist_ok=True)
    affine = _affine(sources, settings)
    for size in settings.sizes:
        write_volume(folder / f"Real{size}x{size}.nii.gz", _at_size(images, size).transpose(3, 2, 1, 0), affine @ _coarser(settings.size / size))
    files.write_json(folder / stacks.CLASSES, {group: number for number, group in enumerate(cohort.groups)})
    csv_files.write_rows(folder / stacks.LABELS, ("ID", "Label", "Subject_ID"), [
        {"ID": number, "Label": cohort.groups.index(sample.source.image.group), "Subject_ID": sample.source.image.subject} for number, sample in enumerate(samples)
    ])
    csv_files.write_rows(folder / "images.csv", ("ID", "file", "slice", "sha256", "group", "table_line"), [
        {"ID": number, "file": sample.source.named, "slice": sample.number, "sha256": sample.sha256,
         "group": sample.source.image.group, "table_line": sample.source.image.line} for number, sample in enumerate(samples)
    ])  # fmt: skip
    _verify(folder, cohort, samples, images, settings)


def _at_size(images: np.ndarray, size: int) -> np.ndarray:
    """[n, c, S, S] to [n, c, size, size], each size straight from the largest."""
    if images.shape[2] == size:
        return images
    return shrunk(images.reshape(-1, *images.shape[2:]), size).reshape(*images.shape[:2], size, size)


def _coarser(factor: float) -> np.ndarray:
    """Pixels of a smaller size to pixels of the largest: centre on centre."""
    matrix = np.diag([factor, factor, 1.0, 1.0])
    matrix[:2, 3] = 0.5 * factor - 0.5
    return matrix


def _verify(folder: Path, cohort: Cohort, samples: Sequence[Sample], images: np.ndarray, settings: Settings) -> None:
    written = stacks.open_stack(folder)
    expected = [(cohort.groups.index(sample.source.image.group), sample.source.image.subject) for sample in samples]
    same = list(zip(written.labels.tolist(), written.subjects, strict=True)) == expected and np.array_equal(written.images(settings.size), images)
    if not same or list(written.sizes) != settings.sizes[::-1]:
        raise MedgenError(f"{folder}: what was written does not read back as it was; nothing was kept. Is the disk in order?")
    for size in settings.sizes[1:]:
        written.images(size)


def _counts(cohort: Cohort, sides: dict[str, list[Sample]]) -> Table:
    rows = []
    for side, samples in sides.items():
        for label, group in enumerate(cohort.groups):
            own = [sample.source for sample in samples if sample.source.image.group == group]
            rows.append((f"{side} {group}".strip(), str(label), f"{len({source.image.subject for source in own}):,}",
                         f"{len({source.path for source in own}):,}", f"{len(own):,}"))  # fmt: skip
    return Table("", ("", "Label", "subjects", "files", "slices"), tuple(rows))


def _record(cohort: Cohort, settings: Settings, sides: dict[str, list[Sample]]) -> dict[str, Any]:
    return {
        "verb": "stack",
        "table": str(cohort.path),
        "table_sha256": files.sha256_file(cohort.path),
        "classes": {group: number for number, group in enumerate(cohort.groups)},
        "slices": CENTRAL if settings.numbers is None else list(settings.numbers),
        "sizes": settings.sizes,
        "scaling": "(x - m/2) / (m/2), m the maximum of the slice",
        "clip_negative": settings.clip_negative,
        "left_out_images": cohort.left_out,
        "sides": {side or "all": {group: {
            "subjects": len({sample.source.image.subject for sample in samples if sample.source.image.group == group}),
            "slices": sum(sample.source.image.group == group for sample in samples),
        } for group in cohort.groups} for side, samples in sides.items()},
    }  # fmt: skip


def _examples(cohort: Cohort, samples: Sequence[Sample]) -> list[int]:
    """Positions of the first slices of every class, each of another subject where there are enough."""
    found: list[int] = []
    for group in cohort.groups:
        own = [number for number, sample in enumerate(samples) if sample.source.image.group == group]
        firsts = {samples[number].source.image.subject: number for number in reversed(own)}
        others = [number for number in own if number not in firsts.values()]
        found += sorted([*sorted(firsts.values()), *others][:SHOWN_PER_CLASS])
    return found


def _page(cohort: Cohort, settings: Settings, counts: Table, shown: dict[str, tuple[list[Sample], np.ndarray]]) -> str:
    pictures = []
    for side, (samples, images) in shown.items():
        positions = _examples(cohort, samples)
        for group in cohort.groups:
            tiles = [_tile(samples[position], image) for position, image in zip(positions, images, strict=True) if samples[position].source.image.group == group]
            pictures.append((f"{side} {group}".strip(), tuple(tiles)))
    first = next(iter(shown.values()))[1][:1]
    sizes = [tile(_grey(_at_size(first, size)[0]), None, f"{size} px", "real", f"{size} x {size}") for size in settings.sizes]
    volumes = any(sample.source.header is not None for samples, _ in shown.values() for sample in samples)
    note = f"{SCALING} {DISPLAY}" if volumes else SCALING
    return page.render(
        title=f"{', '.join(cohort.groups)}: slices at {len(settings.sizes)} sizes",
        lead=f"{sum(len(samples) for samples, _ in shown.values())} slices, {settings.size} px down to {stacks.SMALLEST} px. {words.left_out(cohort)}".strip(),
        sections=[Section("What is there", note, (counts,), (), (), tuple(pictures)),
                  Section("The first slice at every size", "", (), (), (), (("", tuple(sizes)),))],
        table=cohort.path,
    )  # fmt: skip


def _tile(sample: Sample, image: np.ndarray) -> Tile:
    name = sample.source.image.subject
    return tile(_grey(image), None, name, "real", f"{name}, {sample.source.named}, slice {sample.number}")


def _grey(image: np.ndarray) -> np.ndarray:
    """[c, H, W] in [-1, 1] to [H, W] in [0, 1]."""
    return (image.mean(axis=0) + 1) / 2


SCALING = "Each slice is scaled by its own maximum to -1 .. 1, so the background is -1."
DISPLAY = "Shown as radiologists do: anterior on top, the patient's left to the right."
