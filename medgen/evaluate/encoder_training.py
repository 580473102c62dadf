"""The network of encoder.py and how it is trained: without labels, on two views of each slice (SimCLR, Chen et al. 2020, arXiv:2002.05709).

Two views of one slice, each flipped, moved, scaled, brightened, blurred and made noisy at random, shall be found among views of slices of
other patients. What a view may do is what somebody may have done to a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen import rng
from medgen.data.resize import resize_images

if TYPE_CHECKING:
    from medgen.evaluate.encoder import Settings, TrainingImages

BATCH = 64  # slices a step, two views of each
TEMPERATURE = 0.1
LEARNING_RATE = 2e-3
WARM_UP_SHARE = 0.05
WEIGHT_DECAY = 1e-4
PROJECTION = 64
LARGEST_SHIFT = 0.1  # of the width
LARGEST_SCALING = 0.15
LARGEST_GAIN = 0.25  # more or less contrast
LARGEST_OFFSET = 0.05  # of the window
LARGEST_BLUR = 0.6  # standard deviation in pixels
LARGEST_NOISE = 0.02  # standard deviation, of the window
MOST_STANDARDISED = 2048  # training slices that set the mean and spread of the features
SAID_EVERY = 100  # steps


class Encoder(nn.Module):
    """Four convolutions, each with a norm and ReLU, each halving the size. Features: the mean of each channel at the end, brought to mean 0
    and spread 1 over the training slices."""

    mean: Tensor
    spread: Tensor

    def __init__(self, width: int):
        super().__init__()
        widths = (1, width, 2 * width, 4 * width, 8 * width)
        kernels = (5, 3, 3, 3)
        self.blocks = nn.Sequential(*(_block(*shape) for shape in zip(widths, widths[1:], kernels, strict=False)))
        self.features = widths[-1]
        self.register_buffer("mean", torch.zeros(self.features))
        self.register_buffer("spread", torch.ones(self.features))

    def pooled(self, images: Tensor) -> Tensor:
        return self.blocks(2 * images[:, :1] - 1).mean((2, 3))

    def of_all_flips(self, images: Tensor) -> Tensor:
        """The mean over an image and its mirrors: a mirrored copy has exactly the features of its original."""
        return torch.stack([self.pooled(images.flip(axes)) for axes in ((), (2,), (3,), (2, 3))]).mean(dim=0)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 1 or 3, size, size] in [0, 1] to [n, features]; of gray images three channels say the same."""
        return (self.of_all_flips(images) - self.mean) / self.spread


def _block(before: int, after: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def train(training: TrainingImages, settings: Settings) -> Encoder:
    """A pure function of the slices, the settings and the seed, as far as the machine's arithmetic goes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        torch.manual_seed(rng.derive_seed(training.seed, "encoder_weights"))
        network = Encoder(settings.width).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        head = nn.Sequential(nn.Linear(network.features, 2 * PROJECTION), nn.ReLU(), nn.Linear(2 * PROJECTION, PROJECTION)).to(device)
        _fit(network, head, training, settings, device)
        _standardise(network, training, settings, device)
    return network.cpu().eval()


def _fit(network: Encoder, head: nn.Module, training: TrainingImages, settings: Settings, device: torch.device) -> None:
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=settings.steps, pct_start=WARM_UP_SHARE)
    codes = np.unique(training.groups, return_inverse=True)[1]
    for step in range(settings.steps):
        rows = rng.numpy_generator(training.seed, "encoder_rows", step).choice(training.count, min(BATCH, training.count), replace=False)
        slices = _resized(training, rows, settings.size)
        generator = rng.torch_generator(training.seed, "encoder_views", step)
        seen = torch.cat([view(slices, generator) for _ in range(2)]).to(device, memory_format=torch.channels_last)
        loss = contrast(head(network.pooled(seen)), torch.from_numpy(codes[rows]).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % SAID_EVERY == 0:
            training.say(f"encoder: step {step + 1} of {settings.steps}, loss {loss.item():.3f}")


def _resized(training: TrainingImages, rows: np.ndarray, size: int) -> Tensor:
    return torch.from_numpy(resize_images(training.read(rows), size))[:, None]


def contrast(projected: Tensor, patients: Tensor) -> Tensor:
    """NT-Xent of two views each [2n, d] of n slices: find the other view of the slice among those of other patients.

    Other slices of the same patient count neither as the same nor as others: neighbours are nearly copies."""
    count = len(patients)
    directions = functional.normalize(projected, dim=1)
    likeness = directions @ directions.T / TEMPERATURE
    place = torch.arange(2 * count, device=projected.device)
    whose = patients.repeat(2)
    partner = (place + count) % (2 * count)
    left_out = whose[:, None] == whose[None, :]
    left_out[place, partner] = False
    return functional.cross_entropy(likeness.masked_fill(left_out, -torch.inf), partner)


def view(slices: Tensor, generator: torch.Generator) -> Tensor:
    """What somebody may have made of slices [n, 1, s, s] in [0, 1]; each its own flip, shift, scale, contrast, brightness, blur and noise."""
    count, _, size, _ = slices.shape

    def uniform(largest: float) -> Tensor:
        return largest * (2 * torch.rand(count, generator=generator) - 1)

    def flip() -> Tensor:
        return 1.0 - 2.0 * torch.randint(2, (count,), generator=generator)

    matrix = torch.zeros(count, 2, 3)
    scale = 1 + uniform(LARGEST_SCALING)
    matrix[:, 0, 0], matrix[:, 1, 1] = scale * flip(), scale * flip()
    matrix[:, 0, 2], matrix[:, 1, 2] = uniform(2 * LARGEST_SHIFT), uniform(2 * LARGEST_SHIFT)  # grids go from -1 to 1
    grid = functional.affine_grid(matrix, [count, 1, size, size], align_corners=False)
    moved = functional.grid_sample(slices, grid, mode="bilinear", padding_mode="border", align_corners=False)
    gain, offset = 1 + uniform(LARGEST_GAIN), uniform(LARGEST_OFFSET)
    moved = _blurred(moved, LARGEST_BLUR * torch.rand(count, generator=generator)) * gain.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1)
    noise = torch.randn(moved.shape, generator=generator) * (LARGEST_NOISE * torch.rand(count, generator=generator)).view(-1, 1, 1, 1)
    return (moved + noise).clamp(0, 1)


def _blurred(slices: Tensor, widths_px: Tensor) -> Tensor:
    """Each slice with a Gaussian of its own width."""
    count, _, height, width = slices.shape
    places = torch.arange(-2, 3)
    line = torch.exp(-(places**2) / (2 * widths_px.clamp_min(1e-3)[:, None] ** 2))
    line = line / line.sum(dim=1, keepdim=True)
    padded = functional.pad(slices, (2, 2, 2, 2), mode="replicate").view(1, count, height + 4, width + 4)
    across = functional.conv2d(padded, line.view(count, 1, 1, 5), groups=count)
    return functional.conv2d(across, line.view(count, 1, 5, 1), groups=count).view(count, 1, height, width)


def _standardise(network: Encoder, training: TrainingImages, settings: Settings, device: torch.device) -> None:
    """The features' mean and spread over training slices: distances then do not hang on a few loud channels."""
    rows = np.sort(rng.permutation(training.count, training.seed, "encoder_standardise")[:MOST_STANDARDISED])
    network.eval()
    with torch.inference_mode():
        blocks = [network.of_all_flips(_resized(training, rows[start : start + BATCH], settings.size).to(device)) for start in range(0, len(rows), BATCH)]
        found = torch.cat(blocks).double()
        network.mean.copy_(found.mean(dim=0))
        network.spread.copy_(found.std(dim=0).clamp_min(1e-3))
