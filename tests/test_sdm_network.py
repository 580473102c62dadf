"""The semantic diffusion U-Net: parameter counts and values of the published code, the label map worked out once, conditions, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import sdm_reference as reference
import torch
from sdm_reference import filled, ring_maps, tiny_shape, tiny_unet, wave
from torch import Tensor, nn

from medgen.acceleration import recompute_activations
from medgen.models.base import count_parameters
from medgen.models.diffusion.dit import TimeEmbedding
from medgen.models.sdm.blocks import Attention, Residual, SemanticResidual, Spade
from medgen.models.sdm.conditions import Conditions, SizeEmbedding
from medgen.models.sdm.network_shape import NetworkShape
from medgen.models.sdm.networks import Modulation, SemanticUNet

TIMES = torch.tensor([10.0, 700.0])

# size, channels, classes, image channels -> all parameters, those of SPADE (counted in the published code)
COUNTS = [
    (256, 256, 151, 3, 660_608_518, 107_880_448),
    (256, 256, 20, 3, 653_062_918, 100_334_848),
    (256, 256, 36, 3, 653_984_518, 101_256_448),
    (256, 256, 183, 3, 662_451_718, 109_723_648),
    (256, 256, 5, 3, 652_198_918, 99_470_848),
    (256, 256, 7, 1, 652_300_290, 99_586_048),
    (256, 128, 7, 1, 188_237_826, 49_997_824),
    (256, 64, 7, 1, 59_794_434, 25_203_712),
    (128, 128, 7, 1, 145_348_866, 40_191_744),
    (128, 64, 7, 1, 46_582_914, 20_267_904),
    (64, 64, 7, 1, 44_010_562, 18_578_944),
]
SPADES = {256: 50, 128: 42, 64: 34}


def of_kind(network: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(("size", "channels", "classes", "image_channels", "total", "spade"), COUNTS)
def test_parameters_are_as_many_as_in_the_published_networks(size: int, channels: int, classes: int, image_channels: int, total: int, spade: int) -> None:
    with torch.device("meta"):
        network = SemanticUNet(NetworkShape.published(size, channels, classes, image_channels, "new"))
    spades = of_kind(network, Spade)
    assert count_parameters(network) == total
    assert (len(spades), sum(map(count_parameters, spades))) == (SPADES[size], spade)
    assert len(of_kind(network, Attention)) == 16


@pytest.mark.parametrize(("changed", "total"), [
    ({"classes": 4, "channels": 64}, 59_621_634), ({"learned_variance": False}, 652_297_985),
])  # fmt: skip
def test_parameters_of_variants(changed: dict[str, object], total: int) -> None:
    with torch.device("meta"):
        network = SemanticUNet(replace(NetworkShape.published(256, 256, 7, 1, "new"), **changed))  # type: ignore[arg-type]
    assert count_parameters(network) == total


def test_parts_of_the_largest_network() -> None:
    with torch.device("meta"):
        network = SemanticUNet(NetworkShape.published(256, 256, 7, 1, "new"))
    parts = {"time": 1_312_768, "middle": 55_629_824, "decoder": 431_925_760}
    assert {name: count_parameters(getattr(network, name)) for name in parts} == parts
    assert count_parameters(network.encoder) + count_parameters(network.stem) == 163_426_816
    assert count_parameters(network.last_norm) + count_parameters(network.last) == 5_122
    assert sum(map(count_parameters, of_kind(network, Attention))) == 51_463_168
    assert len(network.encoder) + 1 == len(network.decoder) == 18
    attends = [number for number, block in enumerate(network.encoder, start=1) if block.attention is not None]
    assert attends[0] == 10 and [number for number, block in enumerate(network.decoder) if block.upwards is not None] == [2, 5, 8, 11, 14]


# --- values of the published code -------------------------------------------------------------------------------------


def test_the_time_is_embedded_as_published() -> None:
    embedding = TimeEmbedding(256, 256)
    with torch.no_grad():
        embedding.first.weight.copy_(torch.eye(256))
        embedding.first.bias.fill_(100.0)  # where SiLU is the identity
        embedding.second.weight.copy_(torch.eye(256))
        embedding.second.bias.fill_(-100.0)
    features = embedding(torch.tensor([500.0]))[0].detach()
    assert features[[0, 127, 128, 255]].tolist() == pytest.approx([-0.8838493, 0.9985569, -0.4677718, 0.0537045], abs=2e-5)


def test_spade_is_the_published_one() -> None:
    spade = filled(Spade(32, 4, 128, 32, factor=2))
    assert isinstance(spade, Spade)
    x, rings = wave(0.01, 2, 32, 8, 8), ring_maps(16, 6, 3.5)
    assert rings.sum((0, 2, 3)).tolist() == [2 * 144, 2 * 80, 2 * 32, 0]
    reference.SPADE.check(spade(x, *spade.modulate(rings)))
    reference.SPADE_OF_NOTHING.check(spade(x, *spade.modulate(torch.zeros_like(rings))))


def test_residual_blocks_are_the_published_ones() -> None:
    x, embedding, rings = wave(0.01, 2, 32, 8, 8), wave(0.05, 2, 128, phase=0.3), ring_maps(16, 6, 3.5)
    for block, expected in ((SemanticResidual(32, 64, 128, 32, 4, 128, factor=2), reference.SEMANTIC_RESIDUAL),
                            (SemanticResidual(32, 32, 128, 32, 4, 128, factor=2, doubles=True), reference.SEMANTIC_RESIDUAL_UP)):  # fmt: skip
        filled(block)
        expected.check(block(x, embedding, block.modulate(rings)))
    reference.RESIDUAL.check(filled(Residual(32, 64, 128, 32))(x, embedding))
    reference.RESIDUAL_DOWN.check(filled(Residual(32, 32, 128, 32, halves=True))(x, embedding))


@pytest.mark.parametrize("head_order", ["legacy", "new"])
def test_attention_is_the_published_one_in_both_orders(head_order: Literal["legacy", "new"]) -> None:
    reference.ATTENTION[head_order].check(filled(Attention(64, 2, 32, head_order))(wave(0.013, 2, 64, 8, 8)))


@pytest.mark.parametrize("head_order", ["legacy", "new"])
def test_the_unet_is_the_published_one(head_order: str) -> None:
    network = tiny_unet(head_order=head_order)
    with torch.no_grad():
        reference.UNET[head_order].check(network(reference.CLEAN, TIMES, reference.RINGS))
        if head_order == "legacy":
            reference.UNET_OF_NOTHING.check(network(reference.CLEAN, TIMES, torch.zeros_like(reference.RINGS)))


def test_modulation_does_not_depend_on_the_area_of_a_region() -> None:
    """At the centre of a disc whatever its radius, which an instance norm of gamma and beta would break."""
    torch.manual_seed(0)
    spade = Spade(64, 4, 128, 32, factor=1)
    with torch.no_grad():
        at_centre = [spade.modulate(ring_maps(65, radius, -1.0, count=1))[0][0, :, 32, 32] for radius in (5.0, 10.0, 20.0, 30.0)]
    for gamma in at_centre[1:]:
        assert torch.allclose(gamma, at_centre[0], atol=1e-6)
    assert float(at_centre[0].abs().mean()) > 0.01


# --- the label map worked out once ------------------------------------------------------------------------------------


def test_the_modulation_made_once_is_that_of_every_pass() -> None:
    """To the bit, for label maps and for nothing; the published values above come from the same calls."""
    network = tiny_unet()
    with torch.no_grad():
        for labels in (reference.RINGS, torch.zeros_like(reference.RINGS)):
            modulation = network.modulate(labels)
            for times in (TIMES, TIMES + 200):
                assert torch.equal(network(reference.CLEAN, times, modulation), network(reference.CLEAN, times, labels))


def test_one_map_serves_all_images_of_it() -> None:
    network = tiny_unet()
    with torch.no_grad():
        one = network(reference.CLEAN, TIMES, network.modulate(reference.RINGS[:1]))
        assert torch.allclose(one, network(reference.CLEAN, TIMES, reference.RINGS), atol=1e-5)


def test_the_memory_of_a_modulation_is_told() -> None:
    """62 MiB for a map of 128 px at 64 channels in half precision, as counted from the published layers."""
    with torch.device("meta"):
        network = SemanticUNet(NetworkShape.published(128, 64, 7, 1, "new"))
        modulation = network.modulate(torch.zeros(1, 7, 128, 128))
    assert isinstance(modulation, Modulation) and modulation.bytes / 2**20 == pytest.approx(2 * 62, abs=1.5)  # here in float32
    assert sum(map(len, modulation.blocks)) == 2 * SPADES[128]


def gradients(network: SemanticUNet, run: Callable[[SemanticUNet], Tensor]) -> list[Tensor]:
    network.zero_grad()
    run(network).square().mean().backward()
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def test_blocks_computed_twice_give_the_same_gradients() -> None:
    """Also those of the layers that read the label map, which is what a block is given then."""
    plain, twice = tiny_unet(), tiny_unet()
    recompute_activations(twice.blocks)

    def run(network: SemanticUNet) -> Tensor:
        out: Tensor = network(reference.CLEAN, TIMES, reference.RINGS)
        return out

    kept, again = gradients(plain, run), gradients(twice, run)
    assert len(kept) == len(again) == len(list(plain.parameters()))
    for mine, theirs in zip(kept, again, strict=True):
        assert torch.equal(mine, theirs)


def test_blocks_computed_twice_keep_less() -> None:
    sizes = []
    for network in (tiny_unet(), tiny_unet()):
        if sizes:
            recompute_activations(network.blocks)
        kept: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in network.parameters()}

        def pack(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = network(reference.CLEAN, TIMES, reference.RINGS)
        sizes.append(sum(kept.values()))
        assert out.requires_grad
    assert sizes[1] < sizes[0] / 4


# --- conditions -------------------------------------------------------------------------------------------------------


def conditions_of(kinds: list[int], spacing: float = 1.4, field: float = 360.0) -> Conditions:
    lengths = torch.ones(len(kinds), 2)
    return Conditions.told(torch.tensor(kinds), spacing * lengths, field * lengths)


def test_conditions_have_no_effect_before_training() -> None:
    """The published value comes out whatever is told, and whatever is left out."""
    network = SemanticUNet(tiny_shape(kinds=2, sizes=True))
    for name, part in tiny_unet().named_children():
        getattr(network, name).load_state_dict(part.state_dict())
    told = conditions_of([0, 1], spacing=1.9, field=300.0)
    with torch.no_grad():
        for conditions in (told, told.leaving_out(kind=True, size=False), told.leaving_out(kind=False, size=True)):
            reference.UNET["legacy"].check(network(reference.CLEAN, TIMES, reference.RINGS, conditions))


def test_conditions_have_an_effect_after_training_and_are_left_out_apart() -> None:
    """Embeddings of four samples: told all, without kind, without size, without both."""
    embedding = SemanticUNet(tiny_shape(kinds=2, sizes=True)).conditions
    assert embedding is not None
    filled(embedding)
    told = conditions_of([1, 1, 1, 1])
    left_out = replace(told, without_kind=torch.tensor([False, True, False, True]), without_size=torch.tensor([False, False, True, True]))
    with torch.no_grad():
        alone, apart = embedding(told), embedding(left_out)
        assert torch.equal(apart[0], alone[0])
        for row in range(1, 4):
            assert not torch.allclose(apart[row], alone[row], atol=1e-3)
        assert torch.allclose(apart[1] + apart[2], apart[0] + apart[3], atol=1e-6), "kind and size add up, so each is left out by itself"
        other_kind, other_spacing = embedding(conditions_of([0] * 4)), embedding(conditions_of([1] * 4, spacing=1.9))
        assert not torch.allclose(other_kind, alone, atol=1e-3) and not torch.allclose(other_spacing, alone, atol=1e-3)
        hidden_kind = embedding(replace(conditions_of([0] * 4), without_kind=left_out.without_kind))
        assert torch.equal(hidden_kind[1], apart[1]), "a kind that is left out does not show"
        hidden_size = embedding(replace(conditions_of([1] * 4, spacing=1.9), without_size=left_out.without_size))
        assert torch.equal(hidden_size[2], apart[2])


def test_rows_and_columns_are_told_apart_and_only_ratios_count() -> None:
    embedding = SizeEmbedding(128)
    spacing = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.5, 1.5], [1.6, 1.6], [3.0, 3.0], [3.2, 3.2]])
    told = Conditions.told(torch.zeros(6, dtype=torch.long), spacing, torch.full((6, 2), 360.0))
    features = embedding.features(told)
    assert features.shape == (6, 256) and float((features[0] - features[1]).norm()) > 1.0
    near, far = (features[2] @ features[3]).item(), (features[4] @ features[5]).item()
    assert near == pytest.approx(far, abs=1e-2), "1.5 to 1.6 mm is as far as 3 to 3.2 mm"
    assert sum(parameter.numel() for parameter in embedding.parameters()) < 100_000


def test_half_precision_goes_through_with_and_without_the_modulation() -> None:
    network, conditions = tiny_unet(kinds=2, sizes=True), conditions_of([0, 1])
    with torch.no_grad():
        exact = network(reference.CLEAN, TIMES, reference.RINGS, conditions)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            modulation = network.modulate(reference.RINGS)
            half = network(reference.CLEAN, TIMES, reference.RINGS, conditions)
            assert torch.equal(network(reference.CLEAN, TIMES, modulation, conditions), half)
    assert half.dtype == torch.bfloat16 and modulation.blocks[0][0].dtype == torch.bfloat16
    assert float((half.float() - exact).abs().mean()) < 0.03 * float(exact.abs().mean())


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, object], str]] = [
    ({"classes": 0}, "classes: 0 given; it must be 1 or more"),
    ({"image_channels": 0}, "image_channels: 0 given"),
    ({"channels": 0}, "channels: 0 given"),
    ({"res_blocks": 0}, "res_blocks: 0 given"),
    ({"head_channels": 0}, "head_channels: 0 given"),
    ({"spade_channels": 0}, "spade_channels: 0 given"),
    ({"kinds": 1}, "kinds: 1 given; write 2 or more, or 0"),
    ({"kinds": -2}, "kinds: -2 given"),
    ({"attention": (True,)}, "attention has 1 levels, multipliers has 2"),
    ({"attention": (), "multipliers": ()}, "give one per level, of at least one"),
    ({"channels": 33, "head_channels": 33}, "channels: 33 must be even"),
    ({"multipliers": (1, 1.3)}, "multipliers: 1.3 times 32 channels is no whole number"),
    ({"multipliers": (1, 0)}, "multipliers: 0 times 32"),
    ({"head_channels": 48}, "head_channels: 48 does not divide the 64 channels of the middle"),
    ({"head_channels": 64, "attention": (True, True)}, "head_channels: 64 does not divide the 32 channels of level 1, which attends"),
]


@pytest.mark.parametrize(("changed", "told"), REFUSED)
def test_networks_that_do_not_fit_together_are_refused(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny_shape(**changed)


def test_what_does_not_fit_the_network_is_refused() -> None:
    network = tiny_unet()
    with pytest.raises(ValueError, match="rows and columns divisible by 2, got 32 x 31; pad them"):
        network.modulate(torch.zeros(1, 4, 32, 31))
    with pytest.raises(ValueError, match=r"\[N, 4, H, W\] needed, one channel per class, got \[1, 3, 32, 32\]"):
        network(reference.CLEAN, TIMES, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="some given, but the network was made for 0 kinds and no sizes"):
        network(reference.CLEAN, TIMES, reference.RINGS, conditions_of([0, 0]))
    with pytest.raises(ValueError, match="none given, but the network was made for 2 kinds and sizes"):
        tiny_unet(kinds=2, sizes=True)(reference.CLEAN, TIMES, reference.RINGS)
    with pytest.raises(ValueError, match="300 px is none of 64, 128, 256, 512"):
        NetworkShape.published(300, 64, 4, 1, "new")
    with pytest.raises(ValueError, match="at 2 px the last of 2 levels is one pixel"):
        tiny_shape(channels=2, multipliers=(1, 1), head_channels=2).check_size(2, 2)
