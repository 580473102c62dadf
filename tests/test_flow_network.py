"""The flow transformer: parameter counts and values of the published code, positions, sizes, masks, captions, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import flow_reference as reference
import pytest
import torch
from flow_reference import CAPTIONS, IMAGES, MASK, TIMES, WORDS, filled, published_name, tiny_network, tiny_shape, wave
from torch import Tensor

from medgen.acceleration import recompute_activations
from medgen.models.base import count_parameters
from medgen.models.diffusion.dit import TimeEmbedding
from medgen.models.flow.blocks import attend, shared_heads
from medgen.models.flow.network import NextDiT, from_patches, masked_mean, to_patches
from medgen.models.flow.network_shape import NetworkShape
from medgen.models.flow.positions import AS_TRAINED, Scaling, attention_scale, rotation, scaling_at

CPU = torch.device("cpu")

LARGE = NetworkShape(4, 4, 2048, 2304, 24, 32, 8, as_published=True)
TINY, SMALL = NetworkShape(4, 4, 384, 384, 12, 6, 2, as_published=True), NetworkShape(4, 4, 768, 768, 12, 12, 4, as_published=True)
BASE = NetworkShape(4, 4, 2048, 1024, 24, 16, 4, as_published=True)
# as counted in the published code
COUNTS = [
    (LARGE, 1_627_386_400),
    (replace(LARGE, qk_norm=False), 1_627_220_512),
    (replace(LARGE, channels_in=16, channels_out=16), 1_627_718_272),
    (replace(LARGE, key_value_heads=32), 1_988_524_576),
    (replace(LARGE, key_value_heads=32, qk_norm=False), 1_988_192_800),
    (replace(LARGE, key_value_heads=32, caption_width=5120), 2_331_488_800),
    (TINY, 27_751_016),
    (replace(TINY, key_value_heads=6, caption_width=256), 31_251_304),
    (replace(TINY, key_value_heads=6), 32_481_896),
    (SMALL, 110_650_544),
    (BASE, 401_197_472),
    (tiny_shape(), 166_952),
    (tiny_shape(channels_in=5), 167_208),
]


def on_meta(shape: NetworkShape) -> NextDiT:
    with torch.device("meta"):
        return NextDiT(shape)


@pytest.mark.parametrize(("shape", "total"), COUNTS)
def test_parameters_are_as_many_as_in_the_published_networks(shape: NetworkShape, total: int) -> None:
    network = on_meta(shape)
    assert count_parameters(network) == total
    # the token for padding and half of the last layer
    unused = shape.width + (shape.width + 1) * shape.patch**2 * shape.channels_out
    assert count_parameters(on_meta(replace(shape, as_published=False))) == total - unused


def test_names_of_published_weights_are_those_of_the_networks() -> None:
    names = [published_name(name) for name, _ in on_meta(tiny_shape()).named_parameters()]
    assert len(set(names)) == len(names) == 61
    assert (min(names), max(names)) == ("cap_embedder.0.bias", "x_embedder.weight")
    assert {"layers.1.attention.ky_norm.bias", "layers.0.feed_forward.w3.weight", "pad_token", "t_embedder.mlp.2.bias"} <= set(names)


@pytest.mark.parametrize(("width", "inner"), [(384, 1024), (768, 2048), (1024, 2816), (1536, 4096), (2304, 6144), (3072, 8192), (4096, 11008)])
def test_the_feed_forward_layer_is_as_wide_as_published(width: int, inner: int) -> None:
    assert replace(TINY, width=width, heads=8).feed_forward_width == inner


# --- values of the published code -------------------------------------------------------------------------------------


def test_positions_turn_as_published() -> None:
    """Rows turn the pairs 0, 2, .., columns the others; the first number of a pair is the cosine."""
    turns = rotation(384, 384, 72, AS_TRAINED, CPU).unflatten(0, (384, 384))
    frequencies = turns[1, 0, ::2]
    angles = torch.atan2(frequencies[:, 1], frequencies[:, 0])
    assert angles[[0, 1, 2, -2, -1]].tolist() == pytest.approx([1, 0.599484205, 0.359381378, 0.000278255931, 0.000166810103], rel=1e-6)
    expected = [-0.98999250, 0.14112000, 0.28366220, -0.95892429, -0.22569491, 0.97419804, -0.98962528, 0.14367270]
    assert turns[3, 5, :4].flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert turns[3, 5, 35].tolist() == pytest.approx([0.99999964, 0.00083405041], abs=1e-7)
    assert turns.dtype == torch.float32 and torch.equal(turns[:8, :12].flatten(0, 1), rotation(8, 12, 72, AS_TRAINED, CPU))


def test_positions_of_larger_images_turn_as_published() -> None:
    """Divided by the factor as long as the image is noise, and with longer periods from the watershed on."""
    for time, first, third in ((0.29, (0.07073720, 0.99749500), (0.62221581, 0.78284574)), (0.3, (-0.98999250, 0.14112000), (-0.15903953, 0.98727220))):
        turns = rotation(4, 6, 72, scaling_at(time, 2.0), CPU)[3 * 6 + 5]
        assert [*turns[0].tolist(), *turns[2].tolist()] == pytest.approx([*first, *third], abs=1e-6)
    assert scaling_at(0.5, 2.0, watershed=0.6) == Scaling(stretch=2.0) and scaling_at(0.9, 1.0) == AS_TRAINED


def test_positions_first_asked_for_without_gradients_serve_a_training() -> None:
    scaling = Scaling(stretch=1.0625)  # of no other test
    with torch.inference_mode():
        rotation(8, 8, 16, scaling, CPU)
    network = tiny_network()
    network(IMAGES, TIMES, CAPTIONS, WORDS, scaling).sum().backward()
    assert rotation(8, 8, 16, scaling, CPU) is rotation(8, 8, 16, scaling, CPU), "worked out once"


def test_attention_to_more_tokens_is_scaled_as_published() -> None:
    assert attention_scale(1024, 1024, 72) == pytest.approx(0.117851, abs=1e-6)
    assert attention_scale(4096, 1024, 72) == pytest.approx(0.129099, abs=1e-6)
    with pytest.raises(ValueError, match="trained_tokens: 1 given; it must be 2 or more"):
        attention_scale(64, 1, 72)


def test_the_time_is_embedded_as_published() -> None:
    embedding = TimeEmbedding(256)
    with torch.no_grad():
        embedding.first.weight.copy_(torch.eye(256))
        embedding.first.bias.fill_(100.0)  # where SiLU is the identity
        embedding.second.weight.copy_(torch.eye(256))
        embedding.second.bias.fill_(-100.0)
        features = embedding(torch.tensor([0.25, 1.0]))
    assert features[0, [0, 1, 127, 128, 129, 255]].tolist() == pytest.approx([0.96891242, 0.97306043, 1, 0.24740396, 0.23055014, 2.68652e-5], abs=2e-5)
    assert features.double().sum(dim=1).tolist() == pytest.approx([131.35461248, 138.00299445], abs=2e-3)


def test_patches_are_ordered_as_published_and_otherwise_on_the_way_out() -> None:
    ramp = torch.arange(64.0)
    assert to_patches(ramp.reshape(1, 4, 4, 4), 2)[0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21, 32, 33, 36, 37, 48, 49, 52, 53]
    out = from_patches(ramp.reshape(1, 4, 16), (2, 2), 2)
    assert out.shape == (1, 4, 4, 4) and out[0, 0].tolist() == [[0, 4, 16, 20], [8, 12, 24, 28], [32, 36, 48, 52], [40, 44, 56, 60]]


@pytest.mark.parametrize(("rows", "columns", "patch"), [(6, 10, 2), (9, 3, 3), (4, 4, 1)])
def test_patches_of_any_grid_come_back(rows: int, columns: int, patch: int) -> None:
    images = wave((2, 3, rows, columns), 0)
    patches = to_patches(images, patch).unflatten(2, (3, patch, patch)).permute(0, 1, 3, 4, 2).flatten(2)  # the order of the way out
    assert torch.equal(from_patches(patches, (rows // patch, columns // patch), patch), images)


@pytest.mark.parametrize(("changed", "expected"), [
    ({}, reference.FORWARD), ({"qk_norm": False}, reference.WITHOUT_QK_NORM), ({"key_value_heads": 4}, reference.UNSHARED_HEADS),
])  # fmt: skip
def test_the_network_is_the_published_one(changed: dict[str, object], expected: reference.Expected) -> None:
    with torch.no_grad():
        expected.check(tiny_network(**changed)(IMAGES, TIMES, CAPTIONS, WORDS))


def test_images_of_two_sizes_come_out_as_if_they_were_alone() -> None:
    network, smaller = tiny_network(), IMAGES[1, :, :8, :12]
    with torch.no_grad():
        first, second = network([IMAGES[0], smaller], TIMES, CAPTIONS, WORDS)
        reference.SECOND_OF_TWO_SIZES.check(second)
        for number, (image, together) in enumerate(((IMAGES[0], first), (smaller, second))):
            alone = network(image[None], TIMES[[number]], CAPTIONS[[number]], WORDS[[number]])[0]
            assert together.shape == image.shape and torch.allclose(together, alone, atol=2e-6)


def test_words_that_do_not_count_change_nothing() -> None:
    network, others = tiny_network(), torch.where(WORDS[:, :, None], CAPTIONS, 7.0)
    with torch.no_grad():
        plain = network(IMAGES, TIMES, CAPTIONS, WORDS)
        assert torch.equal(network(IMAGES, TIMES, others, WORDS), plain)
        everything = network(IMAGES, TIMES, CAPTIONS, torch.ones_like(WORDS))
    assert torch.equal(everything[0], plain[0]) and not torch.allclose(everything[1], plain[1], atol=1e-3)


def squared_error(network: NextDiT) -> Tensor:
    error: Tensor = (network(IMAGES, TIMES, CAPTIONS, WORDS) - reference.TARGET).square().mean()
    return error


def test_gradients_are_the_published_ones() -> None:
    network = tiny_network()
    loss = squared_error(network)
    loss.backward()
    assert loss.item() == pytest.approx(reference.LOSS, abs=reference.TOLERANCE)
    norms = {published_name(name): float(parameter.grad.norm()) for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert math.hypot(*norms.values()) == pytest.approx(reference.GRADIENT_NORM, rel=reference.TOLERANCE)
    for name, expected in reference.GRADIENT_NORMS.items():
        assert norms[name] == pytest.approx(expected, rel=1e-4, abs=1e-7), name
    assert "pad_token" not in norms and len(norms) == 60


def published_guidance(network: NextDiT, time: float, **larger: object) -> Tensor:
    """At scale 4, of three channels alone as in the published sampler, which forgets the fourth; the first sample is told, the second is not."""
    out = network(reference.GUIDED_IMAGE.repeat(2, 1, 1, 1), torch.full((2,), time), CAPTIONS, WORDS, **larger)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    told, null = out[:, :3].chunk(2)
    return torch.cat([(null + 4 * (told - null)).repeat(2, 1, 1, 1), out[:, 3:]], dim=1)


def test_guided_velocities_are_the_published_ones_on_larger_images_too() -> None:
    network = tiny_network()
    with torch.no_grad():
        reference.GUIDED.check(published_guidance(network, 0.1))
        for time, expected in ((0.1, reference.GUIDED_STRETCHED), (0.6, reference.GUIDED_LONGER_PERIODS)):
            expected.check(published_guidance(network, time, scaling=scaling_at(time, 2.0), trained_tokens=16))


# --- sizes, masks, captions -------------------------------------------------------------------------------------------


def swapped(turns: Tensor) -> Tensor:
    return turns.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def rows_first(turns: Tensor) -> Tensor:
    return torch.cat([turns[:, ::2], turns[:, 1::2]], dim=1)


# how positions could be wrong -> by how much the published code's output moved at most then, of 16 x 16 and of 12 x 20
MISTAKES: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "left out": (lambda turns: torch.tensor([1.0, 0.0]).expand_as(turns), 0.209, 0.363),
    "rows and columns swapped": (swapped, 0.187, 0.389),
    "all rows, then all columns": (rows_first, 0.237, 0.460),
}


def run(network: NextDiT, images: Tensor) -> Tensor:
    with torch.no_grad():
        out = network(images, TIMES, CAPTIONS, WORDS)
    assert isinstance(out, Tensor) and out.shape == images.shape
    return out


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_positions_show_as_much_as_published(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which says that the output without them is the published one also where the image is not square."""
    network, images = tiny_network(), (IMAGES, reference.WIDE_IMAGES)
    right = [run(network, image) for image in images]
    wrong_turns, *expected = MISTAKES[mistake]
    monkeypatch.setattr("medgen.models.flow.network.rotation", lambda *grid: wrong_turns(rotation(*grid)))
    moved = [float((run(network, image) - before).abs().max()) for image, before in zip(images, right, strict=True)]
    assert moved == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("part", "expected"), [("attention.gate", (0.034, 0.180)), ("caption.weight", (0.865,))])
def test_captions_show_as_much_as_published(part: str, expected: tuple[float, ...]) -> None:
    """By the attention to them, and by what all of the network is told of them; of 16 x 16 and of 12 x 20."""
    network, without = tiny_network(), tiny_network()
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            if name.endswith(part):
                parameter.zero_()
        if part == "caption.weight":
            without.caption.bias.zero_()
    for images, most in zip((IMAGES, reference.WIDE_IMAGES), expected, strict=False):
        assert float((run(without, images) - run(network, images)).abs().max()) == pytest.approx(most, abs=1e-3)


def test_a_mask_is_seen_after_the_channels_of_the_image() -> None:
    """The reference values were noted with captions in which every word counts."""
    assert int(MASK.sum()) == 261
    with torch.no_grad():
        network = tiny_network(channels_in=5)
        reference.MASKED.check(network(torch.cat([IMAGES, MASK], dim=1), TIMES, CAPTIONS, torch.ones_like(WORDS)))


def test_a_network_made_for_masks_begins_without_seeing_them() -> None:
    """Text-only weights give the same velocity to the bit, whatever the mask is, and the mask's columns learn from the first step on."""
    plain, masked = tiny_network(), NextDiT(tiny_shape(channels_in=5))
    assert not masked.embed.weight[:, 16:].any() and masked.embed.weight[:, :16].all()
    columns = masked.embed.weight.detach().clone()
    state = plain.state_dict()
    masked.load_state_dict({**state, "embed.weight": torch.cat([state["embed.weight"], columns[:, 16:]], dim=1)})
    with torch.no_grad():
        text_only = plain(IMAGES, TIMES, CAPTIONS, WORDS)
        for mask in (MASK, 1 - MASK, torch.zeros_like(MASK)):
            assert torch.equal(masked(torch.cat([IMAGES, mask], dim=1), TIMES, CAPTIONS, WORDS), text_only)
    masked(torch.cat([IMAGES, MASK], dim=1), TIMES, CAPTIONS, WORDS).square().mean().backward()
    assert masked.embed.weight.grad is not None and masked.embed.weight.grad[:, 16:].any()


def test_a_caption_without_words_says_nothing_and_harms_nobody() -> None:
    """Its features have no effect, gradients stay finite, and the other sample is as it was."""
    network, words = tiny_network(), torch.stack([WORDS[0], torch.zeros(7, dtype=torch.bool)])
    captions = CAPTIONS.clone().requires_grad_()
    out = network(IMAGES, TIMES, captions, words)
    out.square().mean().backward()
    assert captions.grad is not None and captions.grad[0].any() and not captions.grad[1].any()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)
    with torch.no_grad():
        assert torch.equal(network(IMAGES, TIMES, torch.where(words[:, :, None], CAPTIONS, -3.0), words), out)
        assert torch.equal(network(IMAGES, TIMES, CAPTIONS, WORDS)[0], out[0])
        for block in network.blocks:
            block.attention.gate.zero_()
        assert torch.equal(network(IMAGES, TIMES, CAPTIONS, words)[1], out[1]), "its text attention adds 0"
    assert masked_mean(CAPTIONS, words)[1].eq(0).all() and torch.allclose(masked_mean(CAPTIONS, WORDS)[1], CAPTIONS[1, :4].mean(dim=0), atol=1e-6)


def test_before_training_the_velocity_is_0_and_everything_can_learn() -> None:
    torch.manual_seed(0)
    network = NextDiT(tiny_shape(as_published=False, time_scale=1000.0))
    with torch.no_grad():
        assert not network(IMAGES, TIMES, CAPTIONS, WORDS).any()
    # what a velocity of 0 costs is then known: noise and image add up
    noise = torch.randn(4, 4, 64, 64)
    for variance in (1.0, 0.25):
        images = math.sqrt(variance) * torch.randn(4, 4, 64, 64)
        velocity = network(0.5 * images + 0.5 * noise, torch.full((4,), 0.5), CAPTIONS[:1].expand(4, -1, -1), WORDS[:1].expand(4, -1))
        loss = (images - noise - velocity).square().mean()
        assert loss.item() == pytest.approx(1 + variance, rel=0.03)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        squared_error(network).backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters()), "no parameter stays where it was"


def test_blocks_computed_twice_give_the_same_gradients() -> None:
    """Also those of the captions, by which their encoder learns; blocks keep less then."""
    kept, gradients = [], []
    for twice in (False, True):
        network, captions = tiny_network(), CAPTIONS.clone().requires_grad_()
        if twice:
            recompute_activations(network.blocks)
        saved: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in network.parameters()}

        def pack(tensor: Tensor, saved: dict[int, int] = saved, own: set[int] = own) -> Tensor:
            if tensor.data_ptr() not in own:
                saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = network(IMAGES, TIMES, captions, WORDS)
        out.square().mean().backward()
        kept.append(sum(saved.values()))
        gradients.append([captions.grad, *(parameter.grad for parameter in network.parameters() if parameter.requires_grad)])
    assert len(gradients[0]) == 61 and kept[1] < kept[0] / 4
    for first, second in zip(*gradients, strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_half_precision_goes_through() -> None:
    network = tiny_network()
    with torch.no_grad():
        exact = network(IMAGES, TIMES, CAPTIONS, WORDS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = network(IMAGES, TIMES, CAPTIONS, WORDS)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).abs().mean()) < 0.03 * float(exact.abs().mean())


@pytest.mark.filterwarnings("error:Dynamo")
def test_it_can_be_compiled_in_one_piece() -> None:
    network = tiny_network()
    compiled = torch.compile(network, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IMAGES, TIMES, CAPTIONS, WORDS), network(IMAGES, TIMES, CAPTIONS, WORDS))


def test_shared_heads_are_neighbours_by_either_way() -> None:
    queries, keys, values = wave((2, 6, 5, 8), 0), wave((2, 2, 7, 8), 1), wave((2, 2, 7, 8), 2)
    which = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])[:, None, None]
    plain = torch.nn.functional.scaled_dot_product_attention(queries, shared_heads(keys, 6), shared_heads(values, 6), which, scale=0.3)
    assert torch.allclose(attend(queries, keys, values, which, 0.3), plain, atol=1e-6)
    assert shared_heads(keys, 6)[0, :, 0, 0].tolist() == [keys[0, number // 3, 0, 0].item() for number in range(6)]


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, object], str]] = [
    *[({name: 0}, f"{name}: 0 given; it must be 1 or more") for name in ("channels_in", "channels_out", "caption_width", "width", "depth", "heads", "key_value_heads", "patch", "multiple_of")],
    ({"channels_in": 3}, "channels_in: 3 given, fewer than channels_out: 4"),
    ({"heads": 6}, "heads: 6 do not divide the width of 64"),
    ({"heads": 32}, "heads: 32 of width 64 have 2 numbers each, which must be divisible by 4"),
    ({"key_value_heads": 3}, "key_value_heads: 3 do not divide the 4 heads"),
    ({"key_value_heads": 8}, "key_value_heads: 8 do not divide the 4 heads"),
    ({"time_scale": 0.0}, "time_scale: 0 given; it must be above 0 and finite"),
    ({"time_scale": math.inf}, "time_scale: inf given"),
]


@pytest.mark.parametrize(("changed", "told"), REFUSED)
def test_networks_that_do_not_fit_together_are_refused(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny_shape(**changed)


def test_what_does_not_fit_the_network_is_refused() -> None:
    network = filled(NextDiT(tiny_shape(channels_in=5)))
    with pytest.raises(ValueError, match=r"5 channels needed, 4 of the image and 1 of the mask, got \[channels, H, W\] = \[4, 16, 16\]"):
        network(IMAGES, TIMES, CAPTIONS, WORDS)
    network = tiny_network()
    with pytest.raises(ValueError, match="patch: 2 does not divide an image of 16 x 15; pad it"):
        network([IMAGES[0], IMAGES[1, :, :, :15]], TIMES, CAPTIONS, WORDS)
    with pytest.raises(ValueError, match="trained_tokens: images of 48 to 64 tokens given"):
        network([IMAGES[0], IMAGES[1, :, :12]], TIMES, CAPTIONS, WORDS, trained_tokens=16)
    for changed in ({"stretch": 0.0}, {"period": -1.0}, {"stretch": math.nan}):
        with pytest.raises(ValueError, match="must be above 0 and finite, 1 leaves positions as they are"):
            Scaling(**changed)
