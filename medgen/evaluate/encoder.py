"""A small encoder that the evaluation trains itself, on the real training slices. Called by extractors.py where no weights can be brought.

Its weights are kept beside the data's cache, so that many evaluations of the same data train one encoder; encoder_training.py trains it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from medgen import files
from medgen.errors import InputError, MedgenError
from medgen.pretrained.folding import folded

if TYPE_CHECKING:
    import torch

VERSION = 1  # of the network and how it is trained; part of the key and of the name
FEWEST_SLICES = 8
WEIGHTS = "encoder.pt"
LOCK_TIMEOUT_S = 2 * 3600  # a training on one slow core; a dead trainer frees its lock at once


@dataclass(frozen=True)
class TrainingImages:
    """The real training slices, as the encoder sees them.

    `read(rows)` gives float32 [k, H, W] in [0, 1] for rows in 0..count-1; `groups` [count] are names of patients, `size` the
    pixels of a side, `fingerprint` the hash of the data with everything that decides which slices these are (channel, split),
    `cache` a folder that lasts, `say` tells the user what takes long."""

    read: Callable[[np.ndarray], np.ndarray]
    count: int
    groups: np.ndarray
    size: int
    fingerprint: str
    cache: Path
    seed: int
    say: Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What the spec may change: pixels of a side that the encoder sees, steps of training, channels of its first layer."""

    size: int
    steps: int
    width: int


@dataclass(frozen=True)
class Trained:
    """`network` takes [n, 3, size, size] in [0, 1] and returns [n, d]; `sha256` is of its weights."""

    network: torch.nn.Module
    features: int
    sha256: str


def trained(training: TrainingImages, settings: Settings) -> Trained:
    """The encoder of these slices, from the cache or trained now. Processes at once wait for the first; a damaged file is made again.

    Raises InputError for too few slices or patients, MedgenError if another process trains for longer than two hours."""
    import torch

    from medgen.evaluate import encoder_training

    patients = len(np.unique(training.groups))
    if training.count < FEWEST_SLICES or patients < 2:
        raise InputError(f"extractor: encoder learns to tell patients apart, and the training split has {training.count} slices of {patients} "
                         f"(at least {FEWEST_SLICES} of 2 are needed); write extractor: random_conv")  # fmt: skip
    folder = training.cache / f"encoder-{_key(training, settings)}"
    training.cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=LOCK_TIMEOUT_S):
            broken = files.broken_seal(folder) if folder.exists() else None
            if broken is not None:
                training.say(f"{folder}: {broken}; it is trained again")
                shutil.rmtree(folder)
            if not folder.exists():
                training.say(f"encoder: {settings.steps} steps on {training.count} training slices at {settings.size} px; kept in {folder}")
                network = encoder_training.train(training, settings)
                with files.folder_in_one_move(folder) as fresh:
                    torch.save(network.state_dict(), fresh / WEIGHTS)
                    files.seal(fresh)
    except TimeoutError:
        raise MedgenError(f"{folder}: another process has trained this encoder for {LOCK_TIMEOUT_S // 3600} hours; try again") from None
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    network = encoder_training.Encoder(settings.width)
    network.load_state_dict(state)
    return Trained(folded(network), network.features, _digest(state))


def _key(training: TrainingImages, settings: Settings) -> str:
    facts = {**asdict(settings), "data": training.fingerprint, "count": training.count, "seed": training.seed, "version": VERSION}
    return files.sha256_json(facts)[:16]


def _digest(state: dict[str, torch.Tensor]) -> str:
    """Of names and values: the bytes of a file also tell which version of torch wrote it."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
