"""Classical augmentation: flips, shifts, rotation, scaling, intensity. Used by learners.py for the arm `augmented`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from medgen import rng

SHIFT = 0.1  # of the width, each way
DEGREES = 15.0
SCALE = 0.1  # 0.9 to 1.1 times as large
GAIN = 0.2  # 0.8 to 1.2 times as bright, about the middle of the window
OFFSET = 0.1  # of the window


def classical(images: Tensor, masks: Tensor | None, seed: int, stream: str, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """images [n, channels, H, W] in [0, 1] and their masks [n, regions, H, W], changed alike; sample i depends on positions[i] alone.

    Half are mirrored left to right. Outside the image is 0. All channels of an image get the same intensity."""
    drawn = torch.stack([rng.uniform_per_sample(seed, f"{stream}/{number}", [(position,) for position in positions]) for number in range(7)], dim=1)
    spread = 2 * drawn - 1
    mirrored = torch.where(drawn[:, 0] < 0.5, -1.0, 1.0)
    angle, scale = spread[:, 1] * math.radians(DEGREES), 1 + SCALE * spread[:, 2]
    shift_x, shift_y = 2 * SHIFT * spread[:, 3], 2 * SHIFT * spread[:, 4]  # the grid goes from -1 to 1
    rows = [
        torch.stack([mirrored * angle.cos() / scale, -angle.sin() / scale, shift_x], dim=1),
        torch.stack([mirrored * angle.sin() / scale, angle.cos() / scale, shift_y], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    gain, offset = (1 + GAIN * spread[:, 5])[:, None, None, None], (OFFSET * spread[:, 6])[:, None, None, None]
    changed = ((moved - 0.5) * gain + 0.5 + offset).clamp(0, 1)
    return changed, None if masks is None else functional.grid_sample(masks, grid, mode="nearest", padding_mode="zeros", align_corners=False)
