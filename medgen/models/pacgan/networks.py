"""The two players of PACGAN: a class-conditional generator and a critic with a class head, both grown step by step. Used by model.py.

Progressive growing, equalised layers, pixel and minibatch normalisation: Karras et al., ICLR 2018; the class head: Odena et al., ICML 2017."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.models.pacgan.config import FIRST_SIZE

SLOPE = 0.2  # of the leaky ReLU below zero
HIDDEN = 150  # units of the class head, which are linear: it is a matrix of that rank at most
EPSILON = 1e-8


class EqualizedConv2d(nn.Module):
    """A convolution whose weights are N(0, 1) and scaled at run time by He's constant, so that all layers learn at one speed."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = math.sqrt(2 / (kernel * kernel * inputs))
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


def activate(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, SLOPE)


def pixel_norm(x: Tensor) -> Tensor:
    """Each position scaled to mean square 1 over its channels; [N, C, ...]."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + EPSILON)


def doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")


def differences(x: Tensor, group: int | None) -> Tensor:
    """How much the images of a group differ: standard deviation over the group, averaged over channels and places; [N], equal in a group.

    group: samples that are compared, in their order; None: all of them. The last group may be smaller; one image differs by 0."""
    parts = x.split(group or len(x))
    return torch.cat([(part.std(dim=0, unbiased=True).mean() if len(part) > 1 else x.new_zeros(())).expand(len(part)) for part in parts])


class Block(nn.Module):
    """Two 3x3 convolutions; `normalize`: PixelNorm after each, as in the generator."""

    def __init__(self, inputs: int, outputs: int, normalize: bool):
        super().__init__()
        self.first = EqualizedConv2d(inputs, outputs, 3, padding=1)
        self.second = EqualizedConv2d(outputs, outputs, 3, padding=1)
        self.after = pixel_norm if normalize else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(activate(self.second(self.after(activate(self.first(x))))))
        return out


class Generator(nn.Module):
    """Latent numbers and a class to an image in [-1, 1]. `widths`: channels at 4, 8, 16, ... pixels."""

    def __init__(self, latent: int, embedding: int, classes: int, image_channels: int, widths: Sequence[int]):
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.start = nn.ConvTranspose2d(latent + embedding, widths[0], FIRST_SIZE)
        self.start_conv = EqualizedConv2d(widths[0], widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(below, width, normalize=True) for below, width in itertools.pairwise(widths))
        self.to_image = nn.ModuleList(EqualizedConv2d(width, image_channels, 1) for width in widths)

    def forward(self, latent: Tensor, labels: Tensor, step: int, alpha: float) -> Tensor:
        """[N, channels, 4 * 2**step, same]. latent [N, Z]; labels int64 [N]; alpha: share of the newest block, 1 when grown."""
        x = torch.cat([latent, self.embedding(labels)], dim=1)[:, :, None, None]
        x = pixel_norm(activate(self.start_conv(activate(self.start(pixel_norm(x))))))
        below = x
        for block in self.blocks[:step]:
            below = x
            x = block(doubled(x))
        image: Tensor = self.to_image[step](x)
        if step > 0 and alpha < 1:  # a 1x1 head commutes with repeating pixels: the old one works on a quarter of them
            image = alpha * image + (1 - alpha) * doubled(self.to_image[step - 1](below))
        return torch.tanh(image)


class Judged(NamedTuple):
    """What the critic says of N images: how real each is [N], logits [N, classes], and how much it saw them differ [N]."""

    scores: Tensor
    logits: Tensor
    differences: Tensor


class Critic(nn.Module):
    """An image to a score of realness and to class logits. `widths` as in the generator, so the last one is of the largest image.

    `typical_difference`: of groups of real images; the one that is assumed where an image is judged alone."""

    typical_difference: Tensor

    def __init__(self, classes: int, image_channels: int, widths: Sequence[int], std_group: int | None = None):
        super().__init__()
        self.std_group = std_group
        self.from_image = nn.ModuleList(EqualizedConv2d(image_channels, width, 1) for width in widths)
        self.blocks = nn.ModuleList(Block(width, below, normalize=False) for below, width in itertools.pairwise(widths))
        self.end_conv = EqualizedConv2d(widths[0] + 1, widths[0], 3, padding=1)
        self.end_pool = EqualizedConv2d(widths[0], widths[0], FIRST_SIZE)
        self.score = EqualizedConv2d(widths[0], 1, 1)
        self.class_hidden = EqualizedConv2d(widths[0], HIDDEN, 1)
        self.class_logits = EqualizedConv2d(HIDDEN, classes, 1)
        self.register_buffer("typical_difference", torch.zeros(()))

    def forward(self, images: Tensor, step: int, alpha: float, alone: bool = False) -> Judged:
        """images [N, channels, 4 * 2**step, same] in [-1, 1]; `alone`: what is said of one does not depend on the others."""
        x = self._features(images, step, alpha)
        seen = self.typical_difference.expand(len(x)).to(x.dtype) if alone else differences(x, self.std_group)
        x = torch.cat([x, seen[:, None, None, None].expand(-1, 1, *x.shape[2:])], dim=1)
        x = activate(self.end_pool(activate(self.end_conv(x))))
        return Judged(self.score(x).flatten(), self.class_logits(self.class_hidden(x)).flatten(1), seen)

    def _features(self, images: Tensor, step: int, alpha: float) -> Tensor:
        x = activate(self.from_image[step](images))
        for level in range(step, 0, -1):
            x = functional.avg_pool2d(self.blocks[level - 1](x), 2)
            if level == step and alpha < 1:
                x = alpha * x + (1 - alpha) * activate(self.from_image[step - 1](functional.avg_pool2d(images, 2)))
        return x
