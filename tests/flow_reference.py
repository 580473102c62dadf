"""Closed-form weights and inputs with which the published Next-DiT was run once, and a summary of what it gave.

The published code: github.com/Alpha-VLLM/Lumina-T2X, in float32 on the CPU. Used by the tests of medgen/models/flow."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from medgen.models.flow.network import NextDiT
from medgen.models.flow.network_shape import NetworkShape

TOLERANCE = 2e-5

# of a parameter here -> of the same in published weights; a block's stand behind `blocks.<number>.` here and `layers.<number>.` there
PUBLISHED_NAMES = {
    "embed": "x_embedder",
    "time.first": "t_embedder.mlp.0",
    "time.second": "t_embedder.mlp.2",
    "caption_norm": "cap_embedder.0",
    "caption": "cap_embedder.1",
    "last.modulation": "final_layer.adaLN_modulation.1",
    "last.linear": "final_layer.linear",
    "padding": "pad_token",
}
PUBLISHED_NAMES_OF_BLOCKS = {
    "attention.queries": "attention.wq",
    "attention.keys": "attention.wk",
    "attention.values": "attention.wv",
    "attention.caption_keys": "attention.wk_y",
    "attention.caption_values": "attention.wv_y",
    "attention.query_norm": "attention.q_norm",
    "attention.key_norm": "attention.k_norm",
    "attention.caption_key_norm": "attention.ky_norm",
    "attention.gate": "attention.gate",
    "attention.out": "attention.wo",
    "feed_forward.gate": "feed_forward.w1",
    "feed_forward.out": "feed_forward.w2",
    "feed_forward.inner": "feed_forward.w3",
    "before_attention": "attention_norm1",
    "after_attention": "attention_norm2",
    "before_feed_forward": "ffn_norm1",
    "after_feed_forward": "ffn_norm2",
    "caption_norm": "attention_y_norm",
    "modulation": "adaLN_modulation.1",
}


def published_name(name: str) -> str:
    """Of a parameter of NextDiT."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    names, beginning, rest = (PUBLISHED_NAMES, "", name) if block is None else (PUBLISHED_NAMES_OF_BLOCKS, f"layers.{block[1]}.", block[2])
    if rest in names:
        return beginning + names[rest]
    layer, _, kind = rest.rpartition(".")
    return f"{beginning}{names[layer]}.{kind}"


@dataclass(frozen=True)
class Expected:
    """Of all numbers of a tensor, and the first and last of them; None where it was not noted."""

    mean_absolute: float
    mean: float | None = None
    std: float | None = None
    first: tuple[float, ...] = ()
    last: tuple[float, ...] = ()

    def check(self, tensor: Tensor) -> None:
        values = tensor.detach().double().flatten()
        assert float(values.abs().mean()) == pytest.approx(self.mean_absolute, abs=TOLERANCE)
        if self.mean is not None:
            assert float(values.mean()) == pytest.approx(self.mean, abs=TOLERANCE)
        if self.std is not None:
            assert float(values.std()) == pytest.approx(self.std, abs=TOLERANCE)
        assert values[: len(self.first)].tolist() == pytest.approx(self.first, abs=TOLERANCE)
        assert values[len(values) - len(self.last) :].tolist() == pytest.approx(self.last, abs=TOLERANCE)


def wave(shape: tuple[int, ...], number: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """offset + scale * sin(0.7 i + 1.3 number + 0.5) over the flat index."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (offset + scale * torch.sin(0.7 * index + 1.3 * number + 0.5)).float().reshape(shape)


def filled(network: NextDiT) -> NextDiT:
    """Each parameter is a wave of its number in the order of the published names, around 1 for the scales of norms."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(network.named_parameters(), key=lambda named: published_name(named[0]))):
            if parameter.dim() == 1:
                parameter.copy_(wave((len(parameter),), number, 0.1, 1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(wave(tuple(parameter.shape), number, 1 / math.sqrt(parameter.shape[1])))
    return network.eval()


def tiny_shape(**changed: object) -> NetworkShape:
    keys: dict[str, object] = {"channels_in": 4, "channels_out": 4, "caption_width": 32, "width": 64, "depth": 2, "heads": 4, "key_value_heads": 2, "multiple_of": 32,
                               "time_scale": 1.0, "as_published": True}  # fmt: skip
    return NetworkShape(**{**keys, **changed})  # type: ignore[arg-type]


def tiny_network(**changed: object) -> NextDiT:
    return filled(NextDiT(tiny_shape(**changed)))


IMAGES = wave((2, 4, 16, 16), 1)
TIMES = torch.tensor([0.1, 0.7])
CAPTIONS = wave((2, 7, 32), 2)
WORDS = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
TARGET = wave((2, 4, 16, 16), 9)
MASK = (wave((2, 1, 16, 16), 11) > 0).float()
GUIDED_IMAGE = wave((1, 4, 16, 16), 5)
WIDE_IMAGES = wave((2, 4, 12, 20), 7)

FORWARD = Expected(0.26480621, -0.13125886, 0.31927569, (-0.454836, -0.523261, -0.123602, -0.128014), (-0.167888, -0.003532))
WITHOUT_QK_NORM = Expected(0.46205308, 0.36499132, first=(0.569442, 0.642406))
UNSHARED_HEADS = Expected(0.28458987, -0.14283035, first=(-0.454794, -0.518267))
SECOND_OF_TWO_SIZES = Expected(0.15483900, -0.08644694)
GUIDED = Expected(1.12004170, -0.43843457, first=(-1.249249, -1.783632))
GUIDED_STRETCHED = Expected(1.12823056, first=(-1.270076,))
GUIDED_LONGER_PERIODS = Expected(1.12327859, first=(-1.195557,))
MASKED = Expected(0.19602501, -0.12989552, first=(0.056072, -0.008904))
LOSS, GRADIENT_NORM = 0.58890718, 7.36570505
GRADIENT_NORMS = {
    "x_embedder.weight": 0.33626939,
    "layers.0.attention.gate": 0.00232097,
    "layers.0.attention.wk_y.weight": 0.00261117,
    "cap_embedder.1.weight": 0.50821955,
    "final_layer.linear.weight": 1.99837276,
}
