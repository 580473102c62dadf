"""The two players of DP-WGAN-GP: a DCGAN generator and a critic without normalisation. Used by model.py.

DCGAN: Radford et al., ICLR 2016; a critic without BatchNorm: Gulrajani et al., NeurIPS 2017, section 4."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.models.dpwgan.config import critic_depth

SLOPE = 0.2  # of the leaky ReLU below zero
WEIGHT_STD = 0.02  # of all convolutions at the start, and of BatchNorm's scales around 1
DOUBLINGS = 4  # of the generator


def initialize(module: nn.Module) -> None:
    """DCGAN's start, from torch's global generator; linear layers keep torch's own."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, WEIGHT_STD)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, WEIGHT_STD)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """Latent numbers to an image in [-1, 1]. In training mode BatchNorm makes each image depend on the others of the call; in evaluation mode it does not.

    features: channels before the last layer; size: pixels per side. What is no multiple of 16 is cut out of the middle of a larger image."""

    def __init__(self, latent: int, features: int, size: int, channels: int):
        super().__init__()
        widths = [features * 2**level for level in range(DOUBLINGS - 1, -1, -1)]
        side = -(-size // 2**DOUBLINGS)
        self.start_shape = (widths[0], side, side)
        self.size, self.margin = size, (side * 2**DOUBLINGS - size) // 2
        values = widths[0] * self.start_shape[1] ** 2
        self.start = nn.Sequential(nn.Linear(latent, values), nn.BatchNorm1d(values), nn.LeakyReLU(SLOPE))
        self.doublings = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(SLOPE))
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.to_image = nn.ConvTranspose2d(features, channels, 4, 2, 1, bias=False)
        self.apply(initialize)

    def forward(self, latent: Tensor) -> Tensor:
        """[N, latent] to [N, channels, size, size]."""
        x = self.start(latent).view(-1, *self.start_shape)
        for doubling in self.doublings:
            x = doubling(x)
        inside = slice(self.margin, self.margin + self.size)
        return torch.tanh(self.to_image(x)[..., inside, inside])


class Critic(nn.Module):
    """An image to a score of realness, each image for itself: convolutions, a leaky ReLU after each, and one linear layer.

    Its layers are public because two_pass.py goes through them one by one. features: channels after the first; size: pixels per side, at least 2."""

    def __init__(self, features: int, size: int, channels: int):
        super().__init__()
        halvings = critic_depth(size)
        self.image_shape = (channels, size, size)
        self.slope = SLOPE
        widths = [channels, *(features * 2**level for level in range(halvings))]
        self.convolutions = nn.ModuleList(nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False) for inputs, outputs in itertools.pairwise(widths))
        self.score = nn.Linear(widths[-1] * (size // 2**halvings) ** 2, 1)
        self.apply(initialize)

    def forward(self, images: Tensor) -> Tensor:
        """[N, channels, size, size] to [N]."""
        x = images
        for convolution in self.convolutions:
            x = functional.leaky_relu(convolution(x), self.slope)
        scores: Tensor = self.score(x.flatten(1)).flatten()
        return scores
