"""Folders as the two sides that metrics know (inputs.py): real images with those that a model was trained on, and synthetic ones. Made by folders.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from medgen import files
from medgen.errors import InputError
from medgen.evaluate.file_images import ImageFolder
from medgen.evaluate.inputs import MASK

SPLIT = "images"  # what the real folder is called where a job says test


@dataclass(frozen=True)
class RealFolder:
    """The real images, and those that a model was trained on where they are given, as one set with splits."""

    images_folder: ImageFolder
    train_folder: ImageFolder | None
    has_classes: bool

    @property
    def _folders(self) -> list[ImageFolder]:
        return [self.images_folder, *([self.train_folder] if self.train_folder is not None else [])]

    @cached_property
    def rows(self) -> pd.DataFrame:
        parts = [folder.items.assign(split=split) for folder, split in zip(self._folders, (SPLIT, "train"), strict=False)]
        pixels = [self._mask_pixels(folder) for folder in self._folders]
        return pd.concat(parts, ignore_index=True).assign(mask_pixels=np.concatenate(pixels))

    def _mask_pixels(self, folder: ImageFolder) -> np.ndarray:
        """Of images without a mask 1: nobody knows that they show nothing."""
        every = np.arange(len(folder.items))
        return np.array([int(folder.masks(every[row : row + 1]).sum()) for row in every]) if folder.has_masks else np.ones(len(every), dtype=np.int64)

    @property
    def channels(self) -> list[str]:
        return self.images_folder.channels

    @property
    def size(self) -> int:
        return self.images_folder.size

    @cached_property
    def fingerprint(self) -> str:
        return files.sha256_json([folder.fingerprint for folder in self._folders])

    @property
    def has_masks(self) -> bool:
        return all(folder.has_masks for folder in self._folders)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.images_folder.items["label"]))) if self.has_classes else ()

    @property
    def regions(self) -> tuple[str, ...]:
        return ("foreground",)

    @property
    def aliases(self) -> np.ndarray:
        """Their own names, with the folder in front where both folders may have the same."""
        rows = self.rows
        return np.array([f"{'real' if split == SPLIT else 'train'}/{name}" for name, split in zip(rows["id"], rows["split"], strict=True)])

    def select(self, split: str, positive_only: bool = False) -> np.ndarray:
        wanted = (self.rows["split"] == split).to_numpy()
        if positive_only:
            wanted = wanted & (self.rows["mask_pixels"] > 0).to_numpy()
        if not wanted.any():
            raise InputError(f"{self.images_folder.root}: no image{' with a lesion' if positive_only else ''}")
        return np.flatnonzero(wanted)

    def images(self, channel: str, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.size, self.size), dtype=np.float32)
        for folder, places, inside in self._shares(rows):
            found[places] = folder.images(channel, inside)
        return found

    def masks(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.size, self.size), dtype=np.uint8)
        for folder, places, inside in self._shares(rows):
            found[places] = folder.masks(inside)
        return found

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        found = np.empty(len(rows), dtype=object)
        for folder, places, inside in self._shares(rows):
            found[places] = folder.contents(channel, inside)
        return [str(text) for text in found]

    def _shares(self, rows: np.ndarray) -> Iterator[tuple[ImageFolder, np.ndarray, np.ndarray]]:
        """Which of the rows are of which folder: their places in `rows`, and their numbers in the folder."""
        first = 0
        for folder in self._folders:
            places = np.flatnonzero((rows >= first) & (rows < first + len(folder.items)))
            if len(places):
                yield folder, places, rows[places] - first
            first += len(folder.items)


@dataclass(frozen=True)
class SyntheticFolder:
    """The synthetic images; `index` says which real image each belongs to, where pairs were asked for."""

    images_folder: ImageFolder
    index: pd.DataFrame
    channel: str | None = None  # what its only channel is called on the real side; None: as it is
    shows_masks: bool = False  # the files are masks themselves

    @property
    def name(self) -> str:
        return str(self.images_folder.root)

    @property
    def image_channels(self) -> list[str]:
        if self.shows_masks:
            return []
        return self.images_folder.channels if self.channel is None else [self.channel]

    @property
    def outputs(self) -> list[str]:
        return [MASK] if self.shows_masks else self.image_channels

    @property
    def tells_regions(self) -> bool:
        return False

    @property
    def files(self) -> list[str]:
        return [*self.image_channels, *([MASK] if self.images_folder.has_masks else [])]

    @property
    def fingerprint(self) -> str:
        return self.images_folder.fingerprint

    def read(self, channel: str, rows: np.ndarray) -> np.ndarray:
        return self.images_folder.masks(rows) if channel == MASK else self.images_folder.images(self._own(channel), rows)

    def contents(self, channel: str, rows: np.ndarray) -> list[str]:
        return self.images_folder.contents(self._own(channel), rows)

    def _own(self, channel: str) -> str:
        return channel if self.channel is None else self.images_folder.channels[0]
