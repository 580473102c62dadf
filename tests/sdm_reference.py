"""Closed-form weights and inputs with which the published semantic diffusion code was run once, and a summary of what it gave.

The published code: github.com/WeilunWang/semantic-diffusion-model, in float32 on the CPU. Used by the tests of medgen/models/sdm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from medgen.models.sdm.blocks import GroupNorm
from medgen.models.sdm.network_shape import NetworkShape
from medgen.models.sdm.networks import SemanticUNet


@dataclass(frozen=True)
class Expected:
    """Of all numbers of a tensor, and the first of them."""

    mean: float
    std: float
    absolute_sum: float
    first: tuple[float, ...]

    def check(self, tensor: Tensor) -> None:
        values = tensor.detach().double().flatten()
        assert float(values.mean()) == pytest.approx(self.mean, abs=1e-5)
        assert float(values.std()) == pytest.approx(self.std, abs=1e-5)
        assert float(values.abs().sum()) == pytest.approx(self.absolute_sum, rel=1e-5)
        assert values[: len(self.first)].tolist() == pytest.approx(self.first, abs=1e-5)


def filled(module: nn.Module) -> nn.Module:
    """Parameter number k, in the order of `named_parameters`, holds sin(0.7 i + 1.3 k) scaled by its size."""
    norms = {id(norm.weight) for norm in module.modules() if isinstance(norm, GroupNorm)}
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            values = torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + 1.3 * number).reshape(parameter.shape)
            if id(parameter) in norms:
                values = 1 + 0.1 * values
            else:
                values = 0.1 * values if parameter.dim() == 1 else values / math.sqrt(math.prod(parameter.shape[1:]))
            parameter.copy_(values)
    return module.eval()


def wave(frequency: float, *shape: int, phase: float = 0.0) -> Tensor:
    """sin(frequency i + phase) over the flat index."""
    return torch.sin(frequency * torch.arange(math.prod(shape), dtype=torch.float64) + phase).float().reshape(shape)


def ring_maps(size: int, outer: float, inner: float, classes: int = 4, count: int = 2) -> Tensor:
    """One-hot label maps [count, classes, size, size]: class 2 within `inner` of the centre, class 1 within `outer`, class 0 elsewhere."""
    places = torch.arange(size) - (size - 1) / 2
    distance = (places[:, None].square() + places.square()).sqrt()
    labels = (distance <= outer).long() + (distance <= inner).long()
    return nn.functional.one_hot(labels, classes).permute(2, 0, 1).float().expand(count, -1, -1, -1).contiguous()


def tiny_shape(**changed: object) -> NetworkShape:
    keys: dict[str, object] = {"classes": 4, "image_channels": 1, "channels": 32, "multipliers": (1, 2), "attention": (False, True), "res_blocks": 1, "head_channels": 32,
                               "head_order": "legacy"}  # fmt: skip
    return NetworkShape(**{**keys, **changed})  # type: ignore[arg-type]


def tiny_unet(**changed: object) -> SemanticUNet:
    network = filled(SemanticUNet(tiny_shape(**changed)))
    assert isinstance(network, SemanticUNet)
    return network


CLEAN = wave(0.02, 2, 1, 32, 32)
NOISE = math.sqrt(2) * wave(0.31, 2, 1, 32, 32, phase=1.0)
RINGS = ring_maps(32, 11, 7)

SPADE = Expected(0.012972110868190612, 1.1735503556091618, 3673.5918758730404, (-2.406528, -2.06889, -1.862354, -1.798336))
SPADE_OF_NOTHING = Expected(0.010406690821923803, 1.0067736549322122, 3513.2989566349424, (-2.097099, -2.119298, -2.052114, -1.984942))
SEMANTIC_RESIDUAL = Expected(-0.013024675163251231, 2.1308891394523894, 14530.799051597714, (1.759695, 1.253553, 0.982183, 1.025947))
SEMANTIC_RESIDUAL_UP = Expected(0.053519015793483504, 1.3511321944712038, 16202.310372476466, (-1.237236, -2.557482, -3.232571, -3.300942))
RESIDUAL = Expected(0.006826230020806179, 2.073860783068721, 14220.643552338704, (1.379181, 2.056855, 2.281193, 2.097471))
RESIDUAL_DOWN = Expected(0.05425857023510616, 0.9406318610584199, 794.4605627208948, (0.093209, 0.477318, 0.588871, 0.420173))
ATTENTION = {
    "legacy": Expected(0.040667529853863016, 1.138900816752885, 7501.789652844891, (0.257452, 0.301747, 0.34506, 0.387364)),
    "new": Expected(0.015330391829422751, 0.7567476593231857, 5141.30933326995, (0.149804, 0.167497, 0.185161, 0.202786)),
}
UNET = {
    "legacy": Expected(0.03916890135565154, 1.158821105444165, 2351.824254006613, (0.043756, 0.02108, 0.000979, -0.014513)),
    "new": Expected(0.03807746707131133, 1.1484470943441558, 2421.989682213869, (0.044877, 0.021959, 0.002244, -0.011581)),
}
UNET_OF_NOTHING = Expected(0.020350934761722783, 1.2220869203815208, 2365.1999726057984, (0.024291, 0.00092, 0.015689, 0.025335))
STEP_MEAN = Expected(-8.950948043207063e-05, 0.9848939198914354, 1819.2530765188276, (1.164124, 1.316461, 1.356287, 1.279806))
STEP_CLEAN = Expected(-0.04689439055891853, 0.909711571270198, 1788.6552548222244, (1.0, 1.0, 1.0, 1.0))
STEP_LOG_VARIANCE = Expected(-6.222196405055001, 1.9575865736889344, 12743.058237552643, (-8.263877, -8.322291, -8.346273, -8.339804))
GUIDED = Expected(0.15363081452846927, 0.9678035041996946, 993.9959363876842, (-1.345221, -2.018453, -2.167939, -1.906822))
GUIDED_STEP_MEAN = Expected(-0.0001324350313609557, 0.9848653710264629, 1819.1811801244621, (1.164124, 1.316461, 1.356287, 1.279806))
GUIDED_STEP_CLEAN = Expected(-0.050057796521628006, 0.908480410178582, 1785.2767038072925, (1.0, 1.0, 1.0, 1.0))
