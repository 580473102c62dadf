"""The slice cache: built once from volumes under a lock, then memory-mapped and shared by all ranks and runs.

Called by train, generate and evaluate through open_store; submit calls index.check_headers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medgen import files
from medgen.cardiac.rasterise import LABELS
from medgen.data import build, cardiac_build, index, jsonl_build
from medgen.data.array_files import forget_maps, mapped
from medgen.data.cardiac_build import read_natives
from medgen.data.index import HeaderReport, Source, check_headers
from medgen.data.maps import NativeMaps
from medgen.errors import InputError, MedgenError
from medgen.spec_data import DataSpec

if TYPE_CHECKING:
    import pandas

LOCK_TIMEOUT_S = 4 * 3600  # the first build of a large set on a slow disk; a dead builder frees its lock at once

__all__ = ["HeaderReport", "SliceStore", "check_headers", "open_store"]


@dataclass(frozen=True)
class SliceStore:
    """All slices of a data set. `rows` has one line per slice (see docs of open_store); arrays live in a memory map."""

    rows: pandas.DataFrame
    channels: list[str]
    size: int
    fingerprint: str
    folder: Path
    has_masks: bool
    notes: list[str]
    regions: tuple[str, ...] = ("foreground",)  # what the labels 1, 2, ... of the masks mean
    maps: NativeMaps | None = None  # the images as they were acquired and their contours, of formats that keep them

    def select(self, split: str, positive_only: bool = False) -> np.ndarray:
        """Row numbers of a split in the order of `rows`. Raises InputError if there are none."""
        wanted = self.rows["split"].to_numpy() == split
        if wanted.any() and positive_only:
            self._require_masks()
            wanted = wanted & (self.rows["mask_pixels"].to_numpy() > 0)
        if not wanted.any():
            counts = self.rows["split"].value_counts()
            known = ", ".join(f"{name}: {count}" for name, count in counts.items())
            what = "slices with a non-empty mask" if positive_only else "slices"
            raise InputError(f"the split {split!r} has no {what}; slices per split: {known}")
        return np.flatnonzero(wanted)

    def images(self, channel: str, rows: np.ndarray) -> np.ndarray:
        """float32 [n, size, size] in [0, 1], a copy. Raises InputError for an unknown channel."""
        if channel not in self.channels:
            raise InputError(f"no channel {channel!r} in the data; the channels are: {', '.join(self.channels) or 'none'}")
        return mapped(self.folder, channel)[rows]

    def masks(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size] with the number of each pixel's region, 0 outside, a copy. Raises InputError if the spec names no mask."""
        self._require_masks()
        return mapped(self.folder, index.MASK)[rows]

    def valid(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size], 1 where there is an image, 0 in the padding around it."""
        if self.maps is None:
            return np.ones((len(rows), self.size, self.size), np.uint8)
        return self.maps.valid(rows, self.size)

    def masked(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, size, size], 1 all over an image whose mask is known, 0 where nobody has drawn one: then its mask is 0 too, and says nothing."""
        return np.broadcast_to(self.mask_known(rows).astype(np.uint8)[:, None, None], (len(rows), self.size, self.size))

    def mask_known(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: False where nobody has drawn one."""
        return self.rows["masked"].to_numpy(dtype=bool)[rows] if "masked" in self.rows else np.full(len(rows), self.has_masks)

    def labelled(self, rows: np.ndarray) -> np.ndarray:
        """bool [n]: False of slices without a class."""
        return self.rows["label"].notna().to_numpy()[rows]

    def captions(self, rows: np.ndarray) -> list[str]:
        """One text per slice. Raises InputError if one has none."""
        found = self.rows["caption"].to_numpy()[rows]
        bare = [row for row, caption in zip(rows, found, strict=True) if caption is None]
        if bare:
            raise InputError(f"{len(bare)} of {len(rows)} slices have no caption, the first is {self.rows['id'][bare[0]]}; give each line of the data a caption")
        return list(found)

    def sizes_mm(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, 2, 2]: spacing, and field of view without padding, each of rows and of columns."""
        spacing = self.rows[["spacing_y_mm", "spacing_x_mm"]].to_numpy(dtype=np.float32)[rows]
        pixels = np.full_like(spacing, self.size) if self.maps is None else self.maps.inside_pixels(rows)
        return np.stack([spacing, spacing * pixels], axis=1)

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        """What tells the content of each slice, for what is derived from it and kept: the data, and its place in them."""
        return [f"{self.fingerprint} {channel} {row}" for row in rows]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels there are, in order; a class is known by its place. Raises InputError if no slice has one."""
        labelled = self.rows[self.rows["label"].notna()]
        if not len(labelled):
            raise InputError(f"none of {len(self.rows)} slices has a label; give the lines of the data labels")
        if "label_number" in self.rows:
            return tuple(labelled.drop_duplicates("label").sort_values("label_number")["label"])
        return tuple(sorted(set(labelled["label"]), key=index.numbers_first))

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n], the number of each slice's class. Raises InputError if one has no label."""
        bare = rows[~self.labelled(rows)]
        if len(bare):
            raise InputError(f"{len(bare)} of {len(rows)} slices have no label, the first is {self.rows['id'][bare[0]]}; give each line of the data a label")
        return np.array([self.classes.index(label) for label in self.rows["label"].to_numpy()[rows]], dtype=np.int64)

    def affine(self, row: int) -> np.ndarray:
        """4x4 float64: (row, column, 0) of a [size, size, 1] image to the patient's millimetres (RAS)."""
        return mapped(self.folder, build.AFFINES)[row].copy()

    @cached_property
    def aliases(self) -> np.ndarray:
        """What every output calls the rows: an id is often a patient's name, and outputs are given away.

        Hashes under a key made of the files' contents: equal for equal data, so that evaluate finds the slice a condition
        was, and of no use to whoever has a list of names but not the data."""
        contents = sorted({digest for column in self.rows.columns if column.startswith("sha256_") for digest in self.rows[column].dropna()})
        key = bytes.fromhex(files.sha256_json(contents))
        return np.array([f"real_{blake2b(str(name).encode(), key=key, digest_size=8).hexdigest()}" for name in self.rows["id"]])

    def _require_masks(self) -> None:
        if not self.has_masks:
            raise InputError("the data have no masks; add mask: <label file> to data in the spec, or mask_path to lines of a JSONL file")


def open_store(data: DataSpec, seed: int, cache_root: Path, say: Callable[[str], None] = print) -> SliceStore:
    """The slices of `data`, from the cache under `cache_root` or built there now (`say` tells which and what was assumed).

    Columns of `rows`: id, patient, split, slice, label, caption, mask_pixels, content, spacing_x_mm (between columns),
    spacing_y_mm (between rows), thickness_mm, window_low_<channel>, window_high_<channel> (in the file's units),
    file_<channel or seg>, sha256_<channel or seg>. `content` is 1 where the spec has no images to measure it on.
    Of format jsonl also masked (whether a mask was given: without one nothing is known), masks_of (the classes that have one),
    overlap_pixels, lost (classes of which no pixel is left) and line (<file>:<number>).
    Safe to call from many processes at once: one builds, the others wait. Raises InputError for unusable data and
    MedgenError if the cache cannot be written."""
    cache_root = Path(cache_root).absolute()
    if data.format == "phantom":
        sources, notes = index.read_index(data, seed, _phantoms(data, seed, cache_root, say))
    else:
        sources, notes = index.read_index(data, seed)
    for note in notes:
        say(note)
    known = build.known_hashes(cache_root, sources)
    if known is not None and files.broken_seal(folder := build.folder_of(data, sources, known, cache_root)) is None:
        return _load(data, sources, known, folder, notes, say)
    with locked(cache_root):
        hashes = build.hash_sources(cache_root, sources, say)
        folder = build.folder_of(data, sources, hashes, cache_root)
        _discard_broken(folder, say)
        if not folder.is_dir():
            build.build(data, sources, hashes, folder, say)
    return _load(data, sources, hashes, folder, notes, say)


def _load(data: DataSpec, sources: list[Source], hashes: build.Hashes, folder: Path, notes: list[str], say: Callable[[str], None]) -> SliceStore:
    import pandas

    rows = pandas.DataFrame(files.read_json(folder / build.ROWS))
    for column in ("label", "caption"):  # pandas turns a missing text into NaN
        rows[column] = rows[column].astype(object).where(rows[column].notna(), None)
    # where the files lie is not part of the cache: a moved data set is still the same data
    source_of = rows.pop("source").to_numpy()
    unused = _unused(data, sources, set(source_of))
    for note in unused:
        say(note)
    for role in sources[0].files:
        rows[f"file_{role}"] = [str(sources[number].files[role]) for number in source_of]
        rows[f"sha256_{role}"] = [hashes[sources[number].files[role]] for number in source_of]
    fingerprint = build.fingerprint(data, sources, hashes)
    store = SliceStore(rows, data.channels, data.size, fingerprint, folder, any(source.has_mask for source in sources), [*notes, *unused])
    if data.format == "jsonl":
        return _with_lines(data, sources, source_of, store, say)
    if not data.keeps_contours:
        return store
    regions = tuple(name for name in LABELS[1:] if rows[f"mean_{name}"].notna().any())
    maps = NativeMaps(folder, read_natives(folder), data.size)
    hearts = [*cardiac_build.cut_hearts(maps), *cardiac_build.dark_blood(rows), *cardiac_build.dull_windows(rows)]
    for note in hearts:
        say(note)
    return replace(store, regions=regions, maps=maps, notes=[*store.notes, *hearts])


def _with_lines(data: DataSpec, sources: list[Source], source_of: np.ndarray, store: SliceStore, say: Callable[[str], None]) -> SliceStore:
    """Of format jsonl: what the numbers of masks mean, and which line each image is."""
    lines = [source.line for source in sources]
    store.rows["line"] = [f"{line.file.name}:{line.number}" for line in (lines[number] for number in source_of) if line is not None]
    notes = jsonl_build.notes(data, store.rows)
    for note in notes:
        say(note)
    return replace(store, regions=data.region_names, notes=[*store.notes, *notes])


def _unused(data: DataSpec, sources: list[Source], used: set[int]) -> list[str]:
    """A note on the volumes that gave no slice; nothing if all did."""
    empty = [source for number, source in enumerate(sources) if number not in used]
    if not empty:
        return []
    content = [f"data.content: {data.content:g} of its pixels above the low end of the window (a slice of a single value has none)"] if data.content > 0 and data.images else []
    wanted = " and ".join([*content, *(["a mask that is not empty (data.positive_only)"] if data.positive_only else [])])
    named = ", ".join(f"{source.patient} ({next(iter(source.files.values()))})" for source in empty[: index.SHOWN])
    more = f" and {len(empty) - index.SHOWN} more" if len(empty) > index.SHOWN else ""
    return [f"{len(empty)} of {len(sources)} volumes gave no slice, since none of theirs has {wanted}: {named}{more}"]


def _phantoms(data: DataSpec, seed: int, cache_root: Path, say: Callable[[str], None]) -> Path:
    """The folder of the phantoms, drawn now if they are not there."""
    from medgen.data.phantoms import PHANTOM_VERSION, write_phantoms

    fractions = data.splits.model_dump()
    patients = index.phantom_patients(data)
    key = files.sha256_json([PHANTOM_VERSION, patients, seed, fractions])[:12]
    folder = cache_root / f"phantoms-{key}"
    if files.broken_seal(folder) is None:
        return folder
    with locked(cache_root):
        _discard_broken(folder, say)
        if not folder.is_dir():
            say(f"drawing {patients} phantoms in {folder}")
            with files.folder_in_one_move(folder) as temporary:
                write_phantoms(temporary, patients, seed, fractions=fractions)
                files.seal(temporary)
    return folder


def _discard_broken(folder: Path, say: Callable[[str], None]) -> None:
    """Remove a cache that is not what was written: it is made again from its sources. Under the lock."""
    problem = files.broken_seal(folder) if folder.is_dir() else None
    if problem is not None:
        say(f"{folder}: {problem}; it is built again")
        shutil.rmtree(folder)
        forget_maps()


@contextmanager
def locked(cache_root: Path) -> Iterator[None]:
    """One builder at a time. A full or read-only disk becomes a MedgenError that names the folder."""
    import filelock

    try:
        files.private_folder(cache_root)
        with filelock.FileLock(cache_root / "build.lock", timeout=LOCK_TIMEOUT_S):
            yield
    except filelock.Timeout:
        raise MedgenError(f"{cache_root}: another process has been building this cache for {LOCK_TIMEOUT_S // 3600} hours; look for a hung job") from None
    except OSError as error:
        raise InputError(f"{cache_root}: the slice cache cannot be written: {error.strerror or error} ({error.filename or cache_root}); free space or give a writable folder, nothing half-built was left") from error
