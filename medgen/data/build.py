"""Building the slice cache: hashes of the sources, the cache folder's name, and the arrays in it; called by store.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medgen import files
from medgen.data import cardiac_build, jsonl_build
from medgen.data.array_files import ArrayFile
from medgen.data.index import MASK, SHOWN, Source, wanted_slices
from medgen.data.jsonl_lines import Problem, refuse
from medgen.data.maps import MAPS_VERSION
from medgen.data.resize import resize_images, resize_masks
from medgen.data.stacks import open_stack
from medgen.data.volumes import display_slices, read_header, read_volume, require_same_grid, slice_affine
from medgen.data.windows import window_of
from medgen.errors import InputError
from medgen.spec_data import SPLITS, DataSpec, Window

CACHE_VERSION = 1  # raise it when the same data and spec would give other slices
ROWS = "rows.json"
AFFINES = cardiac_build.AFFINES
HASHES = "hashes.json"
SMALLEST_SHARE = 0.1  # of a joint window that each of its channels must fill
LABEL_TOLERANCE = 1e-3  # float label files hold 2.9999998 for 3

Hashes = dict[Path, str]


# hashes


def _state(path: Path) -> str:
    """Size and time of the last change: if both are as remembered, the content is not read again."""
    status = path.stat()
    return f"{path}|{status.st_size}|{status.st_mtime_ns}"


def _remembered(cache_root: Path) -> dict[str, str]:
    try:
        return dict(files.read_json(cache_root / HASHES))
    except (OSError, ValueError, TypeError):  # none yet, or unreadable: hash again
        return {}


def known_hashes(cache_root: Path, sources: list[Source]) -> Hashes | None:
    """sha256 of every source file from memory, or None if any file is new or changed."""
    remembered = _remembered(cache_root)
    found = {path: remembered.get(_state(path)) for source in sources for path in source.paths}
    return {path: digest for path, digest in found.items() if digest} if all(found.values()) else None


def hash_sources(cache_root: Path, sources: list[Source], say: Callable[[str], None]) -> Hashes:
    """sha256 of every source file; only new or changed files are read."""
    remembered = _remembered(cache_root)
    paths = list(dict.fromkeys(path for source in sources for path in source.paths))
    new = [path for path in paths if _state(path) not in remembered]
    if new:
        say(f"hashing {len(new)} files ({sum(path.stat().st_size for path in new) / 1e6:.0f} MB)")
        for path in new:
            remembered[_state(path)] = _sha256(path)
        files.write_json(cache_root / HASHES, remembered)
    return {path: remembered[_state(path)] for path in paths}


def _sha256(path: Path) -> str:
    try:
        return files.sha256_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def fingerprint(data: DataSpec, sources: list[Source], hashes: Hashes) -> str:
    """sha256 of everything that decides the slices: contents, splits and how slices are made; not where files lie."""
    how = data.model_dump(mode="json", exclude={"format", "root", "splits", "patients", "images", "mask"})
    del how["patient_pattern"]  # it decides the patients, which are there below
    # as it was before there were such keys: caches stay valid
    if data.window.joint is None:
        del how["window"]["joint"]
    if data.window.per == "volume":
        del how["window"]["per"]
    if data.slices is None:
        del how["slices"]
    if data.format == "cardiac":
        how["cardiac"] = MAPS_VERSION
    else:
        del how["types"], how["windows_ms"]
    if data.format == "jsonl":
        how["jsonl"] = jsonl_build.JSONL_VERSION
    else:
        del how["regions"], how["mask_share"]
    del how["label_texts"]  # they decide captions, which are there below
    what = [
        [source.id, source.patient, source.split, source.label, source.caption,
         {role: hashes[path] for role, path in source.files.items()},
         *([source.entry.decides()] if source.entry is not None else []),
         *([{name: hashes[path] for name, path in (source.line.masks or {}).items()}] if source.line is not None else [])]
        for source in sources
    ]
    return files.sha256_json([CACHE_VERSION, data.channels, how, what])


def folder_of(data: DataSpec, sources: list[Source], hashes: Hashes, cache_root: Path) -> Path:
    return cache_root / f"slices-{fingerprint(data, sources, hashes)[:16]}"


# building


@dataclass
class Tally:
    """What the filters removed, for the message when nothing is left; `labels`: every label seen in the masks."""

    seen: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    labels: set[int] = field(default_factory=set)

    def add(self, split: str, seen: int, kept: int) -> None:
        self.seen[split] = self.seen.get(split, 0) + seen
        self.kept[split] = self.kept.get(split, 0) + kept


def build(data: DataSpec, sources: list[Source], hashes: Hashes, folder: Path, say: Callable[[str], None]) -> None:
    """Write the cache folder in one move. Raises InputError for unusable files; nothing is left behind then."""
    _require_no_copies(sources, hashes)
    say(f"building the slice cache {folder} from {len(sources)} volumes")
    with files.folder_in_one_move(folder) as temporary, contextlib.ExitStack() as stack:
        arrays = {
            name: ArrayFile(temporary / f"{name}.npy", tail, dtype) for name, (tail, dtype) in _array_shapes(data, any(source.has_mask for source in sources)).items()
        }
        for array in arrays.values():
            stack.callback(array.handle.close)
        rows: list[dict[str, Any]] = []
        tally, problems, of_lines = Tally(), list[str](), list[Problem]()
        for number, source in enumerate(sources):
            try:
                rows += _add_source(data, number, source, arrays, tally)
            except InputError as error:
                if source.entry is None and source.line is None:
                    raise
                # of a cohort of single images all are told at once
                if source.line is not None:
                    of_lines.append(Problem(source.line.file, source.line.number, str(error)))
                else:
                    problems.append(str(error))
        _require_no_problems(problems)
        refuse(of_lines)
        _require_slices(data, tally)
        if data.keeps_contours:
            cardiac_build.write_natives(temporary, rows)
        for array in arrays.values():
            array.finish()
        stack.close()  # what is sealed must be on disk
        files.write_json(temporary / ROWS, rows)
        files.seal(temporary)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    say(f"slice cache ready: {len(rows)} slices, {megabytes:.0f} MB")


def _array_shapes(data: DataSpec, has_masks: bool) -> dict[str, tuple[tuple[int, ...], type]]:
    """Name -> (shape of one entry, type) of the arrays in the cache."""
    square = (data.size, data.size)
    masks: dict[str, tuple[tuple[int, ...], type]] = {MASK: (square, np.uint8)} if has_masks else {}
    natives = cardiac_build.ARRAYS if data.keeps_contours else {}
    return {**dict.fromkeys(data.channels, (square, np.float32)), **masks, AFFINES: ((4, 4), np.float64), **natives}


def _add_source(
    data: DataSpec, number: int, source: Source, arrays: dict[str, ArrayFile], tally: Tally
) -> list[dict[str, Any]]:
    """Append the kept slices of one volume to the arrays and return their rows."""
    if source.number is not None:
        return _add_stacked(data, number, source, source.number, arrays, tally)
    if source.line is not None:
        row = jsonl_build.add_image(data, number, source, source.line, arrays)
        tally.add(source.split, 1, int(row is not None))
        return [row] if row is not None else []
    if source.entry is not None:
        tally.add(source.split, 1, 1)
        return [cardiac_build.add_image(data, number, source, source.entry, arrays)]
    headers = {role: read_header(path) for role, path in source.files.items()}
    first = next(iter(headers.values()))
    require_same_grid(f"patient {source.patient}", first, list(headers.values()))
    axis = first.slice_axis(data.axis)
    wanted = np.array(wanted_slices(data, source, first.shape[axis]))
    slices, content, windows = _scaled_channels(data, source, axis, wanted)
    if data.mask is not None:
        foreground = _foreground(source, read_volume(source.files[MASK]), data.mask_labels, tally)
        slices[MASK] = resize_masks(display_slices(foreground, axis)[wanted], data.size)
    mask_pixels = slices[MASK].sum(axis=(1, 2), dtype=np.int64) if data.mask is not None else None
    keep = content >= data.content
    if data.positive_only and mask_pixels is not None:
        keep &= mask_pixels > 0
    tally.add(source.split, first.shape[axis], int(keep.sum()))
    for role, block in slices.items():
        arrays[role].append(block[keep])
    rows = []
    for position in np.flatnonzero(keep):
        slice_number = int(wanted[position])
        affine = slice_affine(first, axis, slice_number, data.size)
        arrays[AFFINES].append(affine[None])
        spacing_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        rows.append({
            "id": f"{source.id}_{slice_number:03d}" if first.shape[axis] > 1 else source.id,
            "patient": source.patient,
            "split": source.split,
            "slice": slice_number,
            "label": source.label,
            "caption": source.caption,
            "mask_pixels": None if mask_pixels is None else int(mask_pixels[position]),
            "content": round(float(content[position]), 6),
            "spacing_x_mm": float(spacing_mm[1]),
            "spacing_y_mm": float(spacing_mm[0]),
            "thickness_mm": float(spacing_mm[2]),
            **{name: float(values[position]) for name, values in windows.items()},
            "source": number,
        })
    return rows


def _add_stacked(data: DataSpec, number: int, source: Source, place: int, arrays: dict[str, ArrayFile], tally: Tally) -> list[dict[str, Any]]:
    """The same for a slice of a stack, which says nothing of millimetres."""
    [path] = set(source.files.values())
    images = _stacked(path, data.size)
    for channel, of_file in data.images.items():
        arrays[channel].append((images[place, int(of_file)][None] + 1) / 2)
    arrays[AFFINES].append(np.eye(4)[None])
    tally.add(source.split, 1, 1)
    windows = {f"window_{end}_{channel}": value for channel in data.channels for end, value in (("low", -1.0), ("high", 1.0))}
    return [{
        "id": source.id, "patient": source.patient, "split": source.split, "slice": place, "label": source.label, "label_number": source.label_number, "caption": None, "mask_pixels": None,
        "content": 1.0, "spacing_x_mm": 1.0, "spacing_y_mm": 1.0, "thickness_mm": 1.0, **windows, "source": number,
    }]  # fmt: skip


@lru_cache(maxsize=2)
def _stacked(path: Path, size: int) -> np.ndarray:
    """[n, c, size, size] in [-1, 1]; sources follow each other file by file."""
    return np.clip(open_stack(path.parent).images(size), -1, 1)


def _scaled_channels(
    data: DataSpec, source: Source, axis: int, wanted: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """The wanted slices of every channel, windowed to [0, 1] and resized; their content; the windows used, one number per slice.

    Content is measured before resizing: the share of pixels that are above 0 in any channel."""
    slices: dict[str, np.ndarray] = {}
    windows: dict[str, np.ndarray] = {}
    not_empty: np.ndarray | None = None
    joint = _joint_window(source, data.window)
    for channel in data.channels:
        volume = read_volume(source.files[channel])
        chosen = display_slices(volume, axis)[wanted]
        if data.window.per == "slice":
            low, high = _windows_of_slices(source, source.files[channel], chosen, wanted, data)
        else:
            ends = joint[channel] if channel in joint else window_of(f"patient {source.patient}: {source.files[channel]}", volume, data.window)
            low, high = (np.full(len(wanted), end) for end in ends)
        windows[f"window_low_{channel}"], windows[f"window_high_{channel}"] = low, high
        scaled = np.clip((chosen - low[:, None, None]) / (high - low)[:, None, None], 0, 1)
        not_empty = scaled > 0 if not_empty is None else not_empty | (scaled > 0)
        slices[channel] = resize_images(scaled, data.size)
    content = np.ones(len(wanted)) if not_empty is None else not_empty.mean(axis=(1, 2))
    return slices, content, windows


def _windows_of_slices(source: Source, path: Path, chosen: np.ndarray, wanted: np.ndarray, data: DataSpec) -> tuple[np.ndarray, np.ndarray]:
    """The two intensities of each slice [n] that become 0 and 1: percentiles over all of its pixels.

    A slice of a single value becomes 0, and is left out as empty. Raises InputError if the spec wants empty ones too."""
    assert data.window.percentiles is not None, "the spec wants percentiles with this"
    low, high = np.percentile(chosen.reshape(len(chosen), -1), data.window.percentiles, axis=1)
    flat = np.flatnonzero(low >= high)
    if len(flat) and data.content == 0:
        raise InputError(f"patient {source.patient}: {path}: slice {wanted[flat[0]]} has a single value between its percentiles {list(data.window.percentiles)} "
                         f"({len(flat)} of {len(wanted)} slices have); write content: 0.05 to leave such slices out, or slices: [first, last]")  # fmt: skip
    largest = chosen.max(axis=(1, 2))
    return np.where(low >= high, largest, low), np.where(low >= high, largest + 1, high)


def _joint_window(source: Source, window: Window) -> dict[str, tuple[float, float]]:
    """The window of each joint channel: from the lowest end of their own windows to the highest, so that none is clipped more than alone.

    (Percentiles of all their voxels together would clip twice as much of the channel that enhances.) Volumes are read here once more than
    without: holding those of a patient together would take the memory of all. Raises InputError if they cannot be of one unit."""
    own = {channel: window_of(f"patient {source.patient}: {source.files[channel]}", read_volume(source.files[channel]), window) for channel in window.joint or ()}
    if not own:
        return {}
    low, high = min(ends[0] for ends in own.values()), max(ends[1] for ends in own.values())
    for channel, ends in own.items():
        if ends[1] - ends[0] < SMALLEST_SHARE * (high - low):
            told = ", ".join(f"{name} {first:g} to {last:g}" for name, (first, last) in own.items())
            raise InputError(
                f"patient {source.patient}: window.joint: {channel} would fill less than {SMALLEST_SHARE:.0%} of the window that it shares ({told}); "
                "these volumes are in other units: remove joint, or the patient"
            )
    return dict.fromkeys(own, (low, high))


def _foreground(source: Source, mask: np.ndarray, wanted: list[int] | None, tally: Tally) -> np.ndarray:
    """uint8 {0, 1}. Raises InputError if the mask holds fractions: it was interpolated and has lost its labels."""
    labels = np.rint(mask)
    if np.abs(mask - labels).max() > LABEL_TOLERANCE:
        raise InputError(
            f"patient {source.patient}: the mask {source.files[MASK]} holds fractions such as "
            f"{mask[np.abs(mask - labels) > LABEL_TOLERANCE][0]:g}; masks need whole labels (resample them with nearest neighbour)"
        )
    tally.labels.update(int(label) for label in np.unique(labels))
    return (np.isin(labels, wanted) if wanted is not None else labels != 0).astype(np.uint8)


def _require_slices(data: DataSpec, tally: Tally) -> None:
    present = ", ".join(str(label) for label in sorted(tally.labels))
    if data.mask_labels is not None and not tally.labels & set(data.mask_labels):
        raise InputError(f"data.mask_labels: none of {data.mask_labels} is in any mask; the labels there are: {present}")
    for split in SPLITS:
        if tally.seen.get(split, 0) and not tally.kept[split]:
            filters = f"content: {data.content}, every: {data.every}, positive_only: {str(data.positive_only).lower()}"
            raise InputError(f"no slice is left of {tally.seen[split]} in the split {split} with {filters}; loosen these filters of data")


def _require_no_problems(problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise InputError(f"{len(problems)} images cannot be used; mend them, or leave them out with a manifest or by moving their files:\n  {listed}{more}" if len(problems) > 1 else problems[0])


def _require_no_copies(sources: list[Source], hashes: Hashes) -> None:
    """The same image under two patients of two splits would leak the test set into training."""
    owner: dict[tuple[str, int | None], Source] = {}
    of_lines: list[Problem] = []
    for source in sources:
        for role, path in source.files.items():
            if role == MASK:
                continue  # two empty masks are equal files and no leak
            other = owner.setdefault((hashes[path], source.place), source)
            if other.split != source.split and source.line is not None and other.line is not None:
                told = f"{path} in {source.split} is the same image as {other.line.image} in {other.split} ({other.line.where}); remove one of them, or the test result is too good"
                of_lines.append(Problem(source.line.file, source.line.number, told))
            elif other.split != source.split:
                raise InputError(
                    f"patient {source.patient} ({source.split}) and patient {other.patient} ({other.split}) hold the same {role} image "
                    f"({path}); remove one of them, or the test result is too good"
                )
    refuse(of_lines)
