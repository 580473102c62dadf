"""One pass of a network over a set of images, a row of features per image, kept by content. Used by feature_scores.py and privacy.py.

Every metric of features takes its rows from here, so that each image is seen by the network once, in whatever run and for whatever metric."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medgen import files
from medgen.errors import InputError
from medgen.evaluate.extractors import Extractor

BATCH = 32
BLOCK = 512  # images whose features are kept in one file: what a kill costs
KEY_BYTES = 16

Say = Callable[[str], None]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Bench:
    """What metrics work with besides the images: where features are kept, and who is told. `progress` gets images done, of how many, unit."""

    cache: Path
    say: Say
    progress: Progress


@dataclass(frozen=True)
class Pictures:
    """Images of one side as a network sees them. `read(rows)`: float32 [n,H,W] gray or [n,3,H,W] colour, in [0,1].

    `contents(rows)`: texts that tell the content of each. `fingerprint`: of the whole set; names the folder of its features."""

    read: Callable[[np.ndarray], np.ndarray]
    contents: Callable[[np.ndarray], list[str]]
    fingerprint: str


def features(extractor: Extractor, pictures: Pictures, rows: np.ndarray, bench: Bench) -> np.ndarray:
    """Features [n, d] float32 of `rows`, mapped from a file: memory does not grow with the number of images.

    What the cache holds is taken from there; the rest is computed in blocks, each kept as soon as it is done, so that a pass
    that was cut goes on, and several tasks share one.
    Raises InputError for a network that does not return one finite row per image."""
    folder = bench.cache / "features" / _digest(extractor.name).hex()[:16] / _digest(pictures.fingerprint).hex()[:16]
    keys = [_digest(content) for content in pictures.contents(rows)]
    place_of: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        place_of.setdefault(key, []).append(place)
    table = _Table(len(rows), folder)
    for block_keys, found in _kept(folder, place_of.keys()):
        for key, row in zip(block_keys, found, strict=True):
            table.put(place_of.pop(key, []), row)
    missing = np.array([places[0] for places in place_of.values()], dtype=np.int64)
    for start in range(0, len(missing), BLOCK):
        bench.progress(len(rows) - len(missing) + start, len(rows), "images")
        places = missing[start : start + BLOCK]
        computed = _computed(extractor, pictures, rows[places])
        _keep(folder, [keys[place] for place in places], computed)
        for place, row in zip(places, computed, strict=True):
            table.put(place_of[keys[place]], row)
    bench.progress(len(rows), len(rows), "images")
    return table.whole()


class _Table:
    """Rows that come one by one, in a file without a name: it is gone with the process."""

    def __init__(self, count: int, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._count = count
        self._folder = folder
        self._rows: np.ndarray | None = None

    def put(self, places: list[int], row: np.ndarray) -> None:
        if self._rows is None:
            with tempfile.TemporaryFile(dir=self._folder) as unnamed:
                try:  # a full disk is told now, not by a signal at the first write to the mapping
                    os.posix_fallocate(unnamed.fileno(), 0, 4 * max(1, self._count) * len(row))
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self._folder)) from None
                self._rows = np.memmap(unnamed, dtype=np.float32, mode="w+", shape=(self._count, len(row)))
        self._rows[places] = row

    def whole(self) -> np.ndarray:
        return np.zeros((0, 0), dtype=np.float32) if self._rows is None else self._rows


def _computed(extractor: Extractor, pictures: Pictures, rows: np.ndarray) -> np.ndarray:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = extractor.network.to(device)
    parts = []
    # exact float32 on every device: 10 bits of mantissa would move a distance between similar sets
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for start in range(0, len(rows), BATCH):
            found = network(extractor.prepared(pictures.read(rows[start : start + BATCH])).to(device))
            parts.append(found.float().cpu().numpy())
    result = np.concatenate(parts)
    if result.shape != (len(rows), result.shape[-1]) or not np.isfinite(result).all():
        raise InputError(f"{extractor.name}: expected finite features [n, d], got shape {list(result.shape)}, {np.isnan(result).sum()} not a number; "
                         "an extractor returns one row per image")  # fmt: skip
    return result


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()


def _keep(folder: Path, keys: list[bytes], rows: np.ndarray) -> None:
    """One block as a zip, whose checksums tell a damaged file."""
    packed = io.BytesIO()
    np.savez(packed, keys=np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES), features=rows)
    files.write_bytes(folder / f"{_digest(b''.join(keys).hex()).hex()[:16]}.npz", packed.getvalue())


def _kept(folder: Path, wanted: Container[bytes]) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """The blocks of a set that hold any image of `wanted`; a damaged one is as good as none."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as block:
                keys = [key.tobytes() for key in block["keys"]]
                if any(key in wanted for key in keys):
                    yield keys, block["features"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
