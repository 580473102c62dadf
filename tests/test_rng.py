"""Draws depend on (seed, stream, index) and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from medgen import rng


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=6, unique=True))
def test_a_sample_has_its_noise_whatever_its_neighbours(indices: list[int]) -> None:
    together = rng.normal_per_sample((2, 3), 1, "stream", [(index,) for index in indices])
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, rng.normal_per_sample((2, 3), 1, "stream", [(index,)])[0])


def test_streams_seeds_and_indices_are_independent() -> None:
    keys = [(seed, stream, index) for seed in range(3) for stream in ("a", "b", "a/1") for index in ((1,), (1, 1), (11,), ())]
    assert len({rng.derive_seed(seed, stream, *index) for seed, stream, index in keys}) == len(keys)


def test_values_are_frozen() -> None:
    """Changing these changes every image ever generated: raise the plan version if you must."""
    assert rng.derive_seed(42, "masks", 17, 0) == 2520109763598381645
    assert rng.permutation(6, 42, "order", 0).tolist() == [1, 4, 0, 2, 3, 5]


def test_distributions() -> None:
    uniform = rng.uniform_per_sample(1, "time", [(index,) for index in range(20000)])
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 0.01 and abs(float(uniform.std()) - 12**-0.5) < 0.01
    normal = rng.normal_per_sample((100,), 1, "noise", [(index,) for index in range(500)])
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.01
    assert abs(np.corrcoef(normal[0].numpy(), normal[1].numpy())[0, 1]) < 0.35


def test_noise_that_must_not_be_guessed_depends_on_all_bits() -> None:
    drawn = [torch.randn(20_000, generator=rng.secret_generator(seed, "noise", 3)) for seed in (7, 7 + 2**32, 7 + 2**255)]
    assert (torch.stack(drawn).corrcoef() - torch.eye(3)).abs().max() < 0.03
    assert torch.equal(drawn[0], torch.randn(20_000, generator=rng.secret_generator(7, "noise", 3)))
    assert abs(float(drawn[0].mean())) < 0.03 and abs(float(drawn[0].std()) - 1) < 0.02


def test_no_global_generator_is_touched() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    rng.normal_per_sample((4,), 1, "noise", [(1,)])
    rng.permutation(10, 1, "order")
    assert torch.equal(torch_state, torch.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])  # type: ignore[index]
