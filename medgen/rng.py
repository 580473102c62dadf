"""Randomness that belongs to the sample, not to the rank: every draw is a function of (seed, stream, index).

Used by data order, training noise, generation and evaluation. No global generator is ever touched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


MERSENNE_WORDS = 624
MERSENNE_START = 24  # bytes of torch's state before the words of 8 bytes each: first seed, words left, whether seeded, next word


def derive_seed(seed: int, stream: str, *index: int) -> int:
    """A 63-bit seed from (seed, stream, index...), the same on every machine and Python version."""
    return int.from_bytes(_digest(seed, stream, index, 8), "little") >> 1


def _digest(seed: int, stream: str, index: tuple[int, ...], size_bytes: int) -> bytes:
    text = f"{seed}|{stream}|" + "/".join(str(number) for number in index)
    return hashlib.blake2b(text.encode(), digest_size=size_bytes).digest()


def numpy_generator(seed: int, stream: str, *index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(derive_seed(seed, stream, *index)))


def torch_generator(seed: int, stream: str, *index: int) -> torch.Generator:
    """A CPU generator: noise is drawn on the CPU and moved, so that it is equal on every device."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, stream, *index))


def secret_generator(seed: int, stream: str, *index: int) -> torch.Generator:
    """A CPU generator for noise that somebody may want to take away: its whole state comes of (seed, stream, index), of which seed may have any
    number of bits. torch's own seeding of a CPU generator keeps 32 of them, which can be tried one by one."""
    import torch

    words = np.random.SeedSequence(list(np.frombuffer(_digest(seed, stream, index, 64), np.uint32)), pool_size=8).generate_state(MERSENNE_WORDS, np.uint32)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    place = state.numpy()[MERSENNE_START : MERSENNE_START + 8 * MERSENNE_WORDS].view(np.uint64)
    if not np.array_equal(place, _legacy_words(0)):
        raise RuntimeError(f"torch {torch.__version__} keeps the state of its CPU generator elsewhere than this module knows; use the version in constraints.txt")
    place[:] = words
    return generator.set_state(state)


def _legacy_words(seed: int) -> np.ndarray:
    """The Mersenne Twister's state for a seed of 32 bits: torch and numpy's RandomState have the same."""
    state = np.random.RandomState(seed).get_state(legacy=False)
    words: np.ndarray = np.asarray(state["state"]["key"], np.uint64)
    return words


def permutation(count: int, seed: int, stream: str, *index: int) -> np.ndarray:
    """A permutation of range(count)."""
    return numpy_generator(seed, stream, *index).permutation(count)


def sample_order(positions: Sequence[int], samples: int, seed: int, stream: str) -> np.ndarray:
    """Which sample stands at each position of a training: a fresh permutation per epoch; a batch may reach into the next epoch."""
    return np.array([_epoch_order(samples, seed, stream, position // samples)[position % samples] for position in positions])


@lru_cache(maxsize=4)
def _epoch_order(samples: int, seed: int, stream: str, epoch: int) -> np.ndarray:
    return permutation(samples, seed, stream, epoch)


def normal_per_sample(shape: tuple[int, ...], seed: int, stream: str, indices: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Standard normal noise [len(indices), *shape], float32; row i depends on indices[i] alone."""
    import torch

    rows = torch.empty((len(indices), *shape))
    for row, index in zip(rows, indices, strict=True):
        row.normal_(generator=torch_generator(seed, stream, *index))
    return rows


def uniform_per_sample(seed: int, stream: str, indices: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Uniform numbers in [0, 1), shape [len(indices)], float32; entry i depends on indices[i] alone."""
    import torch

    # 24 bits: the largest draw stays below 1 in float32
    return torch.tensor([(derive_seed(seed, stream, *index) >> 39) / 2**24 for index in indices])
