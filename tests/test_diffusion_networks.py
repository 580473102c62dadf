"""The networks of the diffusion family: U-Nets of any depth, and the transformer against one written out by hand."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY_NET, tiny_spec
from torch import nn

from medgen import spec
from medgen.models.base import DataShape
from medgen.models.diffusion.config import Config
from medgen.models.diffusion.dit import DiT
from medgen.models.diffusion.network_settings import DiTSettings
from medgen.models.diffusion.networks import build_network, describe_network
from medgen.spec_data import DataSpec
from medgen.training import build_model

SMALL = {"depth": 2, "width": 16, "heads": 2, "patch": 4}
TIMES = torch.tensor([0.0, 321.5, 1000.0])


def images_of(channels: int, size: int) -> torch.Tensor:
    return torch.randn(len(TIMES), channels, size, size, generator=torch.Generator().manual_seed(5))


def made_random(network: nn.Module) -> nn.Module:
    """Weights of training's size everywhere, so that nothing is hidden behind a layer that begins at 0."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / math.sqrt(max(1, parameter[0].numel())))
    return network


# --- the U-Net --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", range(1, 7))
def test_unets_of_one_to_six_levels_go_forward_and_backward(levels: int) -> None:
    """With the residual blocks per level of the reference's deepest one, and attention in the last two."""
    res_blocks = [1, 1, 1, 2, 2, 2][-levels:]
    config = Config(
        mode="dual", channels=[8, 8, 16, 16, 32, 32][:levels], attention=[level >= max(0, levels - 2) for level in range(levels)],
        res_blocks=res_blocks, head_channels=8,
    )  # fmt: skip
    config.check_data(DataSpec(format="phantom", size=32))
    network = made_random(build_network(config, 3, 2, 32))
    predicted = network(images_of(3, 32), TIMES)
    assert predicted.shape == (3, 2, 32, 32)
    assert not torch.allclose(predicted[0], network(images_of(3, 32), TIMES + 200)[0]), "the time has no effect"
    predicted.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
    assert [len(block.resnets) for block in network.down_blocks] == res_blocks
    assert [len(block.resnets) for block in network.up_blocks] == [count + 1 for count in reversed(res_blocks)]


def test_one_number_stands_for_all_levels_and_reaches_the_network() -> None:
    config = Config(channels=[8, 16, 32], attention=[False, True, True], res_blocks=2, head_channels=8)
    assert config.res_blocks == (2, 2, 2) and config.head_channels == (None, 8, 8)
    per_level = Config(channels=[8, 16, 32], attention=[False, True, True], res_blocks=2, head_channels=[None, 8, 16])
    for made, heads in ((config, [2, 4]), (per_level, [2, 2])):
        network = build_network(made, 2, 1, 16)
        assert [block.attentions[0].attn.num_heads for block in list(network.down_blocks)[1:]] == heads
        assert network.middle_block.attention.attn.num_heads == heads[-1]


def test_the_reference_unet_is_as_it_was() -> None:
    """The parameters of the default network before its keys could be given per level."""
    config = Config()
    assert config.channels == (128, 256, 256) and config.attention == (False, True, True)
    words = describe_network(config, build_network(config, 2, 1, 128), 128)
    assert words == "U-Net 128-256-256, residual blocks 1-1-1, attention at 2, 3, 18,502,145 parameters"


THREE = {"channels": [8, 16, 24], "attention": [False, False, True], "head_channels": 8}
REFUSED = [
    ({**THREE, "res_blocks": [1, 2]}, "res_blocks has 2 levels, channels has 3"),
    ({**THREE, "res_blocks": "x"}, "res_blocks: write one number, or one per level; got 'x'"),
    ({**THREE, "res_blocks": [1, 0, 1]}, "greater than or equal to 1"),
    ({**THREE, "head_channels": 7}, "head_channels: 7 does not divide the 24 channels of an attention level"),
    ({**THREE, "head_channels": [None, 8]}, "head_channels has 2 levels, channels has 3"),
    ({**THREE, "head_channels": [8, None, 8]}, "head_channels: 8 has no effect at level 1, which has no attention; write null there"),
    ({**THREE, "head_channels": [None, None, None]}, "head_channels: null at level 3, but it is an attention level"),
    ({**THREE, "attention": [False, False, False], "head_channels": 16}, "does not divide the 24 channels of the middle, which always attends"),
    ({**THREE, "attention": [False, True]}, "attention has 2 levels, channels has 3"),
    ({"channels": [1], "attention": [False], "head_channels": 1}, "channels: the first level needs 2 or more"),
    ({"channels": [8] * 9, "attention": [False] * 9, "head_channels": 8}, "at most 8 items"),
    ({"channels": []}, "at least 1 item"),
    ({"network": "vit"}, "'unet' or 'dit'"),
    ({"dit": "S/2"}, "dit has no effect with network: unet; write network: dit, or remove it"),
    ({"network": "dit"}, "network: dit needs its size: dit: S/2, or"),
    ({"network": "dit", "dit": "S/2", "channels": [128, 256, 256]}, "channels is of the U-Net and has no effect with network: dit"),
    ({"network": "dit", "dit": "S/2", "attention": [False]}, "attention is of the U-Net"),
    ({"network": "dit", "dit": "S/2", "res_blocks": [1]}, "res_blocks is of the U-Net"),
    ({"network": "dit", "dit": "S/2", "head_channels": 64}, "head_channels is of the U-Net"),
    ({"network": "dit", "dit": "M/2"}, "'M/2' is no size/patch of the paper: sizes S, B, L, XL, patches 2, 4, 8"),
    ({"network": "dit", "dit": "S/3"}, r"or give your own as \{depth: 12, width: 384, heads: 6, patch: 2\}"),
    ({"network": "dit", "dit": {**SMALL, "heads": 3}}, "heads: 3 do not divide the width of 16"),
    ({"network": "dit", "dit": {**SMALL, "width": 18}}, "width: 18 must be divisible by 4"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "told"), REFUSED, ids=[told[:40] for _, told in REFUSED])
def test_networks_that_do_not_fit_together_are_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config.model_validate(keys)


SIZES = [
    (THREE, 18, "a U-Net of 3 levels needs data.size divisible by 4, got 18"),
    ({**THREE, "channels": [8, 8, 8]}, 4, "channels: at 4 px the last of 3 levels is a single pixel, and its norms, of 8 groups with one channel each"),
    ({"network": "dit", "dit": SMALL}, 18, "dit.patch: 4 does not divide data.size: 18"),
    ({"network": "dit", "dit": "S/2"}, 384, "dit.patch: 2 cuts 384 px into 36,864 tokens, more than 16,384, .*; use patch 3"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "size", "told"), SIZES, ids=[told[:40] for _, _, told in SIZES])
def test_image_sizes_that_a_network_cannot_take_are_refused(keys: dict[str, Any], size: int, told: str) -> None:
    config = Config.model_validate({"mode": "seg", **keys})
    with pytest.raises(ValueError, match=told):
        config.check_data(DataSpec(format="phantom", size=size))


# --- the transformer --------------------------------------------------------------------------------------------------


def by_hand(weights: dict[str, np.ndarray], settings: DiTSettings, images: np.ndarray, time: float, channels_out: int) -> np.ndarray:
    """One image [C, H, W] through the transformer, in loops and float64, after the text of arXiv:2212.09748."""
    patch, width, side = settings.patch, settings.width, images.shape[-1] // settings.patch

    def linear(name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(inputs: np.ndarray) -> np.ndarray:
        return inputs / (1 + np.exp(-inputs))

    def normed(inputs: np.ndarray) -> np.ndarray:
        return (inputs - inputs.mean(-1, keepdims=True)) / np.sqrt(inputs.var(-1, keepdims=True) + 1e-6)

    def waves(place: float, count: int) -> list[float]:
        return [place / 10000 ** (number / count) for number in range(count)]

    tokens = np.empty((side * side, width))
    for row in range(side):
        for column in range(side):
            pixels = images[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].ravel()
            position = [function(angle) for place in (column, row) for function in (math.sin, math.cos) for angle in waves(place, width // 4)]
            tokens[row * side + column] = weights["embed.weight"].reshape(width, -1) @ pixels + weights["embed.bias"] + position
    condition = linear("time.second", silu(linear("time.first", np.array([function(angle) for function in (math.cos, math.sin) for angle in waves(time, 128)]))))

    for number in range(settings.depth):
        name, head_width = f"blocks.{number}", width // settings.heads
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.modulation", silu(condition)).reshape(6, width)
        inputs = linear(f"{name}.attention.queries_keys_values", normed(tokens) * (1 + scale1) + shift1)
        attended = np.empty_like(tokens)
        for head in range(settings.heads):
            queries, keys, values = (inputs[:, part * width + head * head_width :][:, :head_width] for part in range(3))
            if settings.qk_norm:
                queries = queries / np.sqrt((queries**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.attention.query_norm.weight"]
                keys = keys / np.sqrt((keys**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.attention.key_norm.weight"]
            exponentials = np.exp(queries @ keys.T / math.sqrt(head_width))
            attended[:, head * head_width : (head + 1) * head_width] = exponentials / exponentials.sum(-1, keepdims=True) @ values
        tokens = tokens + gate1 * linear(f"{name}.attention.out", attended)
        hidden = linear(f"{name}.mlp.0", normed(tokens) * (1 + scale2) + shift2)
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        tokens = tokens + gate2 * linear(f"{name}.mlp.2", hidden)

    shift, scale = linear("last.modulation", silu(condition)).reshape(2, width)
    numbers = linear("last.linear", normed(tokens) * (1 + scale) + shift)
    predicted = np.empty((channels_out, *images.shape[1:]))
    for row in range(side):
        for column in range(side):
            square = numbers[row * side + column].reshape(patch, patch, channels_out)
            predicted[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = square.transpose(2, 0, 1)
    return predicted


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_transformer_is_the_one_written_out_by_hand(qk_norm: bool) -> None:
    settings = DiTSettings(**SMALL, qk_norm=qk_norm)
    network, images = made_random(DiT(settings, 3, 2, 16)), images_of(3, 16)
    with torch.no_grad():
        found = network(images, TIMES).numpy()
    weights = {name: value.double().numpy() for name, value in network.state_dict().items()}
    for number, time in enumerate(TIMES.tolist()):
        expected = by_hand(weights, settings, images[number].double().numpy(), time, 2)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found[number], expected, atol=2e-5)


def test_an_untrained_transformer_says_zero_and_its_blocks_change_nothing() -> None:
    network = DiT(DiTSettings(**SMALL), 3, 2, 16)
    assert torch.equal(network(images_of(3, 16), TIMES), torch.zeros(3, 2, 16, 16))
    tokens = torch.randn(3, 16, 16)
    for block in network.blocks:
        assert torch.equal(block(tokens, network.time(TIMES)), tokens)
    network(images_of(3, 16), TIMES).sum().backward()
    assert float(network.last.linear.weight.grad.abs().max()) > 0, "it cannot leave 0"


def test_every_input_matters_and_neighbours_do_not() -> None:
    network, images = made_random(DiT(DiTSettings(**SMALL), 3, 2, 16)), images_of(3, 16)
    with torch.no_grad():
        together = network(images, TIMES)
        for channel in range(3):
            changed = images.clone()
            changed[:, channel, 0, 0] += 1
            assert float((network(changed, TIMES) - together)[:, :, -1, -1].abs().min()) > 0, "a patch must see the others"
        assert float((network(images, TIMES + 100) - together).abs().max()) > 1e-3
        for number in range(3):
            alone = network(images[number : number + 1], TIMES[number : number + 1])
            torch.testing.assert_close(alone[0], together[number], rtol=0, atol=1e-5)
        # the same patches elsewhere are another image: without positions the prediction would only move with them
        moved = network(images.roll(4, dims=3), TIMES).roll(-4, dims=3)
    assert float((moved - together).abs().max()) > 1e-2


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_transformer_learns_under_bf16_autocast(qk_norm: bool) -> None:
    network, images = made_random(DiT(DiTSettings(**SMALL, qk_norm=qk_norm), 3, 2, 16)), images_of(3, 16)
    exact = network(images, TIMES).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(images, TIMES)
    assert 0 < float((rough.detach().float() - exact).abs().max()) < 0.1 * float(exact.abs().max())
    rough.float().square().mean().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters())


def parameters_of(settings: DiTSettings, channels_in: int, channels_out: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(settings, channels_in, channels_out, 32).parameters())


# depth x (18 width^2 + 15 width): attention 4, MLP 8 and modulation 6 matrices; their biases 4, 5 and 6. Time: (256 + 1 + 1) width
# + width^2. Patches: (in x patch^2 + 1) width. Last layer: 2 width^2 + 2 width + (width + 1) x patch^2 x out. Worked out on paper:
COUNTED = {"S/2": 32_466_820, "S/8": 32_536_000, "B/2": 129_519_364, "L/2": 456_778_756, "L/4": 456_815_632, "XL/2": 673_640_068}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_counted_on_paper(name: str) -> None:
    assert parameters_of(DiTSettings.model_validate(name), 2, 1) == COUNTED[name]


@pytest.mark.parametrize(("name", "published"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_with_the_papers_inputs_parameters_are_those_it_prints(name: str, published: int) -> None:
    """Millions, of arXiv:2212.09748: with 4 channels in, 8 out and 1001 class embeddings."""
    settings = DiTSettings.model_validate(name)
    assert round((parameters_of(settings, 4, 8) + 1001 * settings.width) / 1e6) == published


def test_weights_depend_on_the_seed_alone_and_positions_are_no_weights() -> None:
    config = Config(mode="seg", network="dit", dit=SMALL)
    first, again, other = (build_model("diffusion", config, DataShape(("seg",), 16), seed, "train").network.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert "positions" not in first
    limit = math.sqrt(6 / (16 + 16))  # xavier: of one channel of 4 x 4 pixels to 16 numbers
    assert 0.9 * limit < float(first["embed.weight"].abs().max()) <= limit


def test_a_log_says_the_network_in_words() -> None:
    config = Config(network="dit", dit={**SMALL, "qk_norm": True})
    words = build_model("diffusion", config, DataShape(("bravo", "seg"), 32), 1, "train").describe(100)[0]
    assert "DiT of 2 blocks, width 16, 2 heads with normed queries and keys, 64 tokens of 4 x 4 px, " in words


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/diffusion").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_whole(path: Path, tmp_path: Path) -> None:
    """Each is read by the spec as a job would, and fits the size in its name."""
    named = re.search(r"_(\d+)$", path.stem)
    data = {"format": "phantom", "size": int(named[1]) if named else 48}
    job = tmp_path / "job.yaml"
    job.write_text(f"version: 1\nname: one\ndata: {data}\nstages: {{train: {{kind: train, config: {path}, resources: {{gpus: 1}}}}}}\n".replace("'", ""))
    checked = spec.load(job)
    assert spec.family_config(checked.stages["train"].config).network == ("dit" if path.stem.startswith("sit") else "unet")


def test_a_transformer_goes_through_a_job(tmp_path: Path, medgen: Callable[..., subprocess.CompletedProcess[str]], write_spec: Callable[[dict[str, Any]], Path]) -> None:
    net = {key: value for key, value in TINY_NET.items() if key not in ("channels", "attention", "head_channels")}
    stages = {
        "train": {"kind": "train", "config": {**net, "strategy": "rflow", "mode": "bravo", "network": "dit", "dit": SMALL}, "resources": {"cpus": 1}},
        "images": {"kind": "generate", "from": "train", "condition": "test", "count": 2, "sampling": {"steps": 2}},
    }
    medgen("submit", write_spec({**tiny_spec(name="transformer"), "stages": stages}), "--local")
    (run,) = (tmp_path / "runs").glob("transformer-*")
    assert "DiT of 2 blocks, width 16" in medgen("logs", f"{run}/train").stdout
    assert len(list((run / "images" / "dataset" / "images").iterdir())) == 2
