"""Where a token of an image is: rotations of queries and keys by its row and column (2-D axial RoPE), also on larger grids than were trained.

Used by network.py. Grids are 2D and need not be square."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from medgen.models.flow.network_shape import ROTATED_TOGETHER

MAX_PERIOD = 10_000.0
KEPT = 64  # grids whose rotations are kept: a few MB each at the largest
WATERSHED = 0.3  # time before which an image is so noisy that it has large structures alone


@dataclass(frozen=True)
class Scaling:
    """How positions of a larger grid than trained are made to look like trained ones (Lumina-Next, arXiv:2406.18583).

    stretch: positions are divided by it. period: the longest period is multiplied by it, which leaves near tokens apart (NTK-aware)."""

    stretch: float = 1.0
    period: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("stretch", self.stretch), ("period", self.period)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: {value:g} given; it must be above 0 and finite, 1 leaves positions as they are")


AS_TRAINED = Scaling()


def scaling_at(time: float, factor: float, watershed: float = WATERSHED) -> Scaling:
    """For a time of sampling in 0 (noise)..1 (image). factor: rows of the image, or the root of its area, per those of training.

    Large structures come first and are spread over the whole image; details come then and keep the distances that were trained."""
    return Scaling(stretch=factor) if time < watershed else Scaling(period=factor)


def attention_scale(tokens: int, trained_tokens: int, head_width: int) -> float:
    """What products of queries and keys are multiplied by on another number of tokens than trained, so that as many are attended to.

    sqrt(log of tokens to the base of trained_tokens, over head_width) (Jin et al. 2023, arXiv:2306.08645)."""
    if trained_tokens < 2:
        raise ValueError(f"trained_tokens: {trained_tokens} given; it must be 2 or more, the base of a logarithm")
    return math.sqrt(math.log(tokens, trained_tokens) / head_width)


def rotation(rows: int, columns: int, head_width: int, scaling: Scaling, device: torch.device) -> Tensor:
    """Cosines and sines by which the pairs of a head turn, float32 [rows * columns, head_width / 2, 2]; rows of the grid follow each other.

    Pairs turn by the row and by the column in turns, and two pairs have the same frequency. Not to be written to: later calls get it too."""
    if torch.compiler.is_compiling():  # a compiler looks through what is kept, and makes the few numbers on the way
        return _worked_out(rows, columns, head_width, scaling, device)
    with torch.inference_mode(False):  # what is kept may be asked for by a training later
        return _kept(rows, columns, head_width, scaling, device)


def _worked_out(rows: int, columns: int, head_width: int, scaling: Scaling, device: torch.device) -> Tensor:
    count = head_width // ROTATED_TOGETHER
    frequencies = (MAX_PERIOD * scaling.period) ** (-torch.arange(count, dtype=torch.float64, device=device) / count)
    row_angles, column_angles = (torch.arange(length, dtype=torch.float64, device=device)[:, None] / scaling.stretch * frequencies for length in (rows, columns))
    angles = torch.stack([row_angles[:, None].expand(rows, columns, count), column_angles.expand(rows, columns, count)], dim=-1)
    angles = angles.reshape(rows * columns, 2 * count)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


_kept = functools.lru_cache(maxsize=KEPT)(_worked_out)


def rotated(heads: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys [N, heads, T, head_width] as float32, each pair of neighbouring numbers turned; turns: of `rotation`, [T, ..] or [N, 1, T, ..]."""
    first, second = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns.unbind(-1)
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)
