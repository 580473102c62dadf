"""Images in any folder: pictures, NIfTI slices and volumes, npy, stacks, or a dataset that medgen collected. Used by folders.py.

Nothing is read before it is needed but headers, so that a folder may hold more than the memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medgen import collected, files
from medgen.data import stacks
from medgen.data.image_looks import (
    CONTENT,
    LOSSY,
    PICTURES,
    SUFFIXES,
    VOLUMES,
    Look,
    Reading,
    gray_of,
    in_window,
    labels_of,
    look_at,
    stem_of,
    suffix_of,
    values_of,
)
from medgen.data.resize import resize_images, resize_masks
from medgen.errors import InputError
from medgen.evaluate.inputs import COLOURS, MASK

GRAY = "image"
SHOWN = 3
SMALLEST_PIXELS, LARGEST_PIXELS = 8, 2048


@dataclass(frozen=True)
class ImageFolder:
    """One side. `items` has a row per image: id, file, number (in its file), patient, label, slice, and file_seg where a dataset has masks."""

    root: Path
    items: pd.DataFrame
    looks: dict[str, Look]
    reading: Reading
    masks_root: Path | None = None
    to_eight_bits: bool = False  # the other side has no more
    left_out: int = 0  # slices of volumes that are almost empty
    _last: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # the file that was read last: the slices of a volume come one after the other

    @property
    def channels(self) -> list[str]:
        return list(COLOURS) if self._first.channels == 3 and not self.reading.gray else [GRAY]

    @property
    def _first(self) -> Look:
        return next(iter(self.looks.values()))

    @cached_property
    def size(self) -> int:
        """Pixels per side of every image. Raises InputError if they differ and no size was asked for."""
        if self.reading.size is not None:
            return self.reading.size
        shapes = Counter((look.height, look.width) for look in self.looks.values())
        if len(shapes) > 1:
            told = ", ".join(f"{height}x{width} ({count})" for (height, width), count in shapes.most_common(SHOWN))
            raise InputError(f"{self.root}: images of different sizes: {told}; bring all to one with --size, such as --size {min(max(shape) for shape in shapes)}")
        size = max(next(iter(shapes)))
        if not SMALLEST_PIXELS <= size <= LARGEST_PIXELS:
            raise InputError(f"{self.root}: images of {size} px; from {SMALLEST_PIXELS} to {LARGEST_PIXELS} are compared: bring them to that with --size")
        return size

    @property
    def eight_bits(self) -> bool:
        return any(look.eight_bits for look in self.looks.values())

    @property
    def unlike_inside(self) -> str | None:
        """What its own files differ in; None if they are alike."""
        depths, lossy = {look.eight_bits for look in self.looks.values()}, {name.lower().endswith(LOSSY) for name in self.looks}
        return "some of 8 bits a value, some of more" if len(depths) > 1 else "some JPEG, some not" if len(lossy) > 1 else None

    @property
    def takes_window(self) -> bool:
        return any(not look.is_stack and suffix_of(look.path.name) not in PICTURES for look in self.looks.values())

    @property
    def lossy(self) -> bool:
        return any(path.lower().endswith(LOSSY) for path in self.looks)

    def images(self, channel: str, rows: np.ndarray) -> np.ndarray:
        """float32 [n, size, size] in [0, 1]."""
        place = self.channels.index(channel)
        return np.stack([self._of_file(str(self.items["file"].iloc[row]))[int(self.items["number"].iloc[row]), place] for row in rows])

    def masks(self, rows: np.ndarray) -> np.ndarray:
        """uint8 {0,1} [n, size, size]: every label above 0 is foreground."""
        return np.stack([self._mask(int(row)) for row in rows])

    @cached_property
    def has_masks(self) -> bool:
        return self.masks_root is not None or "file_seg" in self.items.columns

    def spacings_mm(self) -> np.ndarray | None:
        """Of the images as they are read, between rows and between columns, [n, 2]; None if any file does not say."""
        found = [(self.looks[name].spacing_mm, max(self.looks[name].height, self.looks[name].width) / self.size) for name in self.items["file"]]
        steps = [(spacing[0] * scale, spacing[1] * scale) for spacing, scale in found if spacing is not None]
        return np.array(steps) if len(steps) == len(found) else None

    @cached_property
    def digests(self) -> dict[str, str]:
        return {name: files.sha256_file(look.path) for name, look in self.looks.items()}

    @property
    def fingerprint(self) -> str:
        """Of the contents of all its files, and of how they are read."""
        return files.sha256_json([sorted(self.digests.values()), self.preparation])

    @property
    def preparation(self) -> str:
        window = "0 to 1" if self.reading.window is None else f"{self.reading.window[0]:g} to {self.reading.window[1]:g}"
        return f"{self.size} px, window {window}{', gray' if self.reading.gray else ''}{', rounded to 8 bits' if self.to_eight_bits else ''}"

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        places = zip(self.items["file"].to_numpy()[rows], self.items["number"].to_numpy()[rows], strict=True)
        return [f"{self.digests[name]} {number} {channel} {self.preparation}" for name, number in places]

    def _of_file(self, name: str) -> np.ndarray:
        """All images of a file, [n, C, size, size]."""
        if self._last.get("file") != name:
            look = self.looks[name]
            values = in_window(values_of(look), look, self.reading)
            if self.reading.gray and values.shape[1] == 3:
                values = gray_of(values)
            square = resize_images(values.reshape(-1, *values.shape[2:]), self.size).reshape(len(values), -1, self.size, self.size)
            if self.to_eight_bits:
                square = np.rint(square * 255) / np.float32(255)
            self._last.update(file=name, images=square.astype(np.float32))
        found: np.ndarray = self._last["images"]
        return found

    def _mask(self, row: int) -> np.ndarray:
        item = self.items.iloc[row]
        path = self._mask_path(item)
        if self._last.get("mask") != path:
            look = look_at(path)
            self._last.update(mask=path, labels=resize_masks(labels_of(look), self.size))
        labels: np.ndarray = self._last["labels"]
        if len(labels) <= item["number"]:
            raise InputError(f"{path}: {len(labels)} slices, but {item['file']} has more; give each image its mask")
        return (labels[int(item["number"])] > 0).astype(np.uint8)

    def _mask_path(self, item: pd.Series) -> Path:
        if self.masks_root is None:
            return Path(item["file_seg"])
        return _namesake(self.masks_root, str(item["file"]))


def open_folder(root: Path, reading: Reading, masks: Path | None = None) -> ImageFolder:
    """The images of a folder, or of one NIfTI stack [W, H, channels, N]. Raises InputError naming what is wrong with it."""
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"{root}: no permission to read this folder")
    if root.is_file():
        looks, items = _stack_file(root)
    elif (root / collected.INDEX).is_file() and (root / collected.MANIFEST).is_file():
        looks, items = _dataset(root)
    elif (root / stacks.LABELS).is_file():
        looks, items = _stack_folder(root, reading)
    elif root.is_dir():
        looks, items = _loose_files(root, reading)
    else:
        raise InputError(f"{root}: no such folder")
    _check_colours(root, looks, reading)
    left_out = sum(look.count for look in looks.values()) - len(items)
    return ImageFolder(root, pd.DataFrame(items), looks, reading, masks, left_out=left_out)


def by_content(folder: ImageFolder) -> ImageFolder:
    """In an order that no name changes, and files that stand for themselves named by what they hold: what is drawn at random
    is then drawn from the images, whatever they are called."""
    items = folder.items.assign(digest=folder.items["file"].map(folder.digests))
    alone = items["patient"] == items["file"]
    items = items.assign(patient=np.where(alone, items["digest"], items["patient"])).sort_values(["digest", "number"], kind="stable")
    return replace(folder, items=items.drop(columns="digest").reset_index(drop=True))


# --- what is in a folder ----------------------------------------------------------------------------------------------

Found = tuple[dict[str, Look], list[dict[str, Any]]]


def _loose_files(root: Path, reading: Reading) -> Found:
    names = sorted(_names_below(root))
    kept = [name for name in names if suffix_of(name) is not None]
    if not kept:
        others = Counter(Path(name).suffix or "no suffix" for name in names)
        there = f"; it holds {', '.join(f'{count} {suffix}' for suffix, count in others.most_common(SHOWN))}" if others else "; it is empty"
        raise InputError(f"{root}: no images{there}; known are {', '.join(SUFFIXES)}")
    looks = {name: look_at(root / name) for name in kept}
    items = []
    for name, look in looks.items():
        patient, label = _patient(name, reading), name.split("/")[0] if "/" in name else ""
        for number in _slices(look, reading):
            items.append({"id": name if look.count == 1 else f"{name}#{number}", "file": name, "number": number, "patient": patient, "label": label, "slice": number})
    if not items:
        raise InputError(f"{root}: every slice of its volumes is almost empty (less than {CONTENT:.0%} of the pixels above 0)")
    return looks, items


def _names_below(root: Path) -> Iterator[str]:
    """Of all files that are not hidden. Raises InputError for what cannot be read: a number of a part of the images would be no answer."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; every folder inside {root} must be readable")

    for folder, below, files_here in os.walk(root, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in files_here:
            path = Path(folder) / name
            if name.startswith("."):
                continue
            if suffix_of(name) is not None and not path.is_file():
                raise InputError(f"{path}: the name of an image, but no file that can be read; is it a link to nowhere?")
            yield str(path.relative_to(root))


def _patient(name: str, reading: Reading) -> str:
    """From the pattern, else the subfolder, else the file: each stands for itself."""
    if reading.patient is None:
        return name.split("/")[0] if "/" in name else name
    found = reading.patient.search(name)
    if found is None:
        raise InputError(f"{name}: --patient {reading.patient.pattern!r} finds no patient in this name")
    return found[1]


def _slices(look: Look, reading: Reading) -> Sequence[int]:
    """All images of a file; of a volume the slices that show something."""
    if not look.is_volume or reading.content == 0:
        return range(look.count)
    shares = (values_of(look)[:, 0] > 0).mean(axis=(1, 2))
    return [int(number) for number in np.flatnonzero(shares >= reading.content)]


def _dataset(root: Path) -> Found:
    """What medgen collected: its index says which files are images and which masks."""
    index, _ = collected.read(root)
    channels = collected.channels(index)
    pictures = [name for name in channels if name != MASK]
    if len(pictures) != 1:
        raise InputError(f"{root}: a dataset of {', '.join(channels) or 'nothing'}; one image channel is compared: copy its files to a folder of their own")
    looks, items = {}, []
    for number, record in index.iterrows():
        name = str(record[pictures[0]])
        looks[name] = look_at(collected.verified_file(root, record, pictures[0]))
        item = {"id": record["id"], "file": name, "number": 0, "patient": record["id"], "label": record["label"] if "label" in index.columns else "", "slice": number}
        items.append(item | ({"file_seg": str(root / record[MASK])} if MASK in channels else {}))
    if not items:
        raise InputError(f"{root}: a dataset without images")
    return looks, items


def _stack_folder(root: Path, reading: Reading) -> Found:
    stack = stacks.open_stack(root)
    size = reading.size if reading.size in stack.files else max(stack.files)
    look = _stack_look(stack.files[size])
    names = [stack.class_names[label] for label in stack.labels]
    items = [{"id": f"{look.path.name}#{number}", "file": look.path.name, "number": number, "patient": subject, "label": label, "slice": 0}
             for number, (subject, label) in enumerate(zip(stack.subjects, names, strict=True))]  # fmt: skip
    return {look.path.name: look}, items


def _stack_file(path: Path) -> Found:
    if suffix_of(path.name) not in VOLUMES:
        raise InputError(f"{path}: a file; give a folder of images, or a NIfTI stack [W, H, channels, N]")
    look = _stack_look(path)
    items = [{"id": f"{path.name}#{number}", "file": path.name, "number": number, "patient": f"{path.name}#{number}", "label": "", "slice": 0} for number in range(look.count)]
    return {path.name: look}, items


def _stack_look(path: Path) -> Look:
    count, channels, height, width = stacks.read_images(path).shape
    return Look(path, count, channels, height, width, eight_bits=False, is_stack=True)


def _check_colours(root: Path, looks: dict[str, Look], reading: Reading) -> None:
    kinds = {look.channels: name for name, look in looks.items()}
    if len(kinds) > 1 and not reading.gray:
        gray, colour = kinds[min(kinds)], kinds[max(kinds)]
        raise InputError(f"{root}: {colour} is in colour and {gray} is gray; bring all to gray with --gray")


def _namesake(folder: Path, name: str) -> Path:
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem_of(name)}{suffix}").is_file()]
    if len(found) != 1:
        raise InputError(f"{folder}: {'no mask' if not found else 'several masks'} for {name}; masks have the names of their images ({stem_of(name)}.*)")
    return found[0]
