"""PACGAN's networks and losses against numbers computed with the published system (https://github.com/aiformedresearch/PACGAN)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from medgen.models.base import count_parameters
from medgen.models.pacgan.losses import Weights, critic_loss, generator_loss, gradient_penalty
from medgen.models.pacgan.networks import Critic, EqualizedConv2d, Generator, Judged, differences, doubled, pixel_norm

WIDTHS = [512, 512, 256, 128, 64, 32, 16]
SMALL = [32, 32, 16, 8]
LABELS = torch.tensor([0, 1, 1, 0])
PUBLISHED = Weights(penalty=10, aimed=4, other=2, drift=0.001)


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def filled(network: nn.Module) -> nn.Module:
    """Weights that depend on nothing but their places, so that two implementations can be compared."""
    for tensor in network.parameters():
        scale = 0.1 if tensor.dim() == 1 else 1.0
        tensor.data = (scale * torch.sin(0.7 * torch.arange(tensor.numel()) + 0.3)).view_as(tensor)
    return network


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    return torch.sin(0.37 * torch.arange(math.prod(shape)) + phase).view(shape)


def small() -> tuple[nn.Module, nn.Module]:
    return filled(Generator(16, 3, 2, 1, SMALL)), filled(Critic(2, 1, SMALL))


def images(step: int) -> Tensor:
    return wave((4, 1, 4 * 2**step, 4 * 2**step), 0.2)


@pytest.mark.parametrize(
    ("latent", "embedding", "widths", "parameters"),
    [(512, 3, WIDTHS, 13_658_333), (100, 3, WIDTHS, 10_283_229), (300, 3, WIDTHS, 11_921_629), (512, 8, WIDTHS, 13_699_303), (16, 3, SMALL, 46_290)],
)
def test_parameters_of_the_generator(latent: int, embedding: int, widths: list[int], parameters: int) -> None:
    assert count_parameters(Generator(latent, embedding, 2, 1, widths)) == parameters


@pytest.mark.parametrize(("widths", "parameters"), [(WIDTHS, 16_075_621), (SMALL, 67_285)])
def test_parameters_of_the_critic(widths: list[int], parameters: int) -> None:
    assert count_parameters(Critic(2, 1, widths)) == parameters


def test_what_learns_at_each_step() -> None:
    """While the step fades in, its parameters, the old head's and those of all steps below; none of later ones."""
    generator, critic = Generator(512, 3, 2, 1, WIDTHS), Critic(2, 1, WIDTHS)
    learning = []
    for step in range(len(WIDTHS) - 2):  # 128 and 256 px take long
        for network in (generator, critic):
            network.zero_grad(set_to_none=True)
        image = generator(torch.randn(2, 512), LABELS[:2], step, 0.5)
        judged = critic(image, step, 0.5)
        (judged.scores.sum() + judged.logits.square().sum()).backward()
        learning.append([sum(tensor.numel() for tensor in network.parameters() if tensor.grad is not None) for network in (generator, critic)])
    assert learning == [[6_579_719, 6_638_021], [11_299_848, 11_358_661], [13_069_576, 14_898_117], [13_511_816, 15_782_597], [13_622_344, 16_003_653]]


@pytest.mark.parametrize(
    ("step", "alpha", "total"),
    [
        (0, 1.0, 42.7538375510), (1, 1e-5, 171.0169666581), (1, 0.3, 205.7484909834), (1, 1.0, 215.5813338154), (2, 1e-5, 862.3251311907),
        (2, 0.3, 847.0754836664), (2, 1.0, 542.3107539279), (3, 1e-5, 2169.2368014406), (3, 0.3, 1824.4064471923), (3, 1.0, 361.7993888777),
    ],
)  # fmt: skip
def test_images_of_the_published_generator(step: int, alpha: float, total: float) -> None:
    made = small()[0](wave((4, 16), 0.1), LABELS, step, alpha)
    assert made.shape == (4, 1, 4 * 2**step, 4 * 2**step)
    assert made.sum().item() == pytest.approx(total, abs=1e-8)
    if (step, alpha) == (3, 0.3):
        assert [made.flatten()[place].item() for place in (0, -1)] == pytest.approx([0.1569602774, 0.8874433989], abs=1e-9)


@pytest.mark.parametrize(
    ("step", "alpha", "scores", "logits"), [(0, 1.0, 1.9590723629, 2.9174727140), (3, 0.3, 0.5472309770, 3.0138073162), (3, 1.0, 0.0802312810, 3.0526471885)]
)
def test_judgements_of_the_published_critic(step: int, alpha: float, scores: float, logits: float) -> None:
    made = small()[1](images(step), step, alpha)
    assert [item.sum().item() for item in made[:2]] == pytest.approx([scores, logits], abs=1e-9)


def test_both_at_full_width() -> None:
    generator, critic = filled(Generator(512, 3, 2, 1, WIDTHS)), filled(Critic(2, 1, WIDTHS))
    with torch.no_grad():
        assert generator(wave((4, 512), 0.1), LABELS, 4, 0.3).sum().item() == pytest.approx(15790.3439985089, rel=1e-9)
        assert [item.sum().item() for item in critic(images(4), 4, 0.3)[:2]] == pytest.approx([3.9855874176, 4.2291107573], rel=1e-8)


def test_one_training_step_of_the_published_system() -> None:
    """Losses, gradients and the critic's weights after it; the mixing weights are those of its generator of random numbers."""
    generator, critic = small()
    mix = torch.tensor([0.53492254, 0.19880319, 0.65921170, 0.65689027])
    latent = wave((4, 16), 0.1)

    def judge(batch: Tensor) -> Judged:
        made: Judged = critic(batch, 3, 0.3)
        return made

    def norm(network: nn.Module) -> float:
        return math.sqrt(sum(tensor.grad.square().sum().item() for tensor in network.parameters() if tensor.grad is not None))

    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.999))
    real, fake = images(3), generator(latent, LABELS, 3, 0.3).detach()
    terms = critic_loss(judge(real), judge(fake), LABELS, gradient_penalty(judge, real, fake, mix), PUBLISHED)
    expected = {
        "loss": 10.5401992314, "real_score": 0.1368077442, "fake_score": 0.2289185474, "real_class": 0.8210024297, "fake_class": 0.8236604328,
        "penalty": 0.5516738791, "drift": 1.90524e-5 / 0.001,
    }  # fmt: skip
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=2e-6)
    assert terms["loss"].item() == pytest.approx(expected["loss"], abs=1e-6)
    terms["loss"].backward()
    assert norm(critic) == pytest.approx(16.9555019205, rel=1e-6)
    optimizer.step()
    assert sum(tensor.abs().sum().item() for tensor in critic.parameters()) == pytest.approx(42571.9728968595, rel=1e-9)
    terms = generator_loss(judge(generator(latent, LABELS, 3, 0.3)), LABELS, PUBLISHED)
    of_real_images = 1.6188701345  # in the published loss: it has no gradient
    assert terms["loss"].item() + of_real_images == pytest.approx(4.6363996260, abs=1e-6)
    terms["loss"].backward()
    assert norm(generator) == pytest.approx(58.9601499697, rel=1e-6)


def test_scale_of_layers_and_of_pixels() -> None:
    assert [EqualizedConv2d(inputs, 1, kernel).scale for inputs, kernel in ((512, 3), (512, 4), (1, 1))] == pytest.approx([0.0208333333, 0.015625, 1.4142135624])
    assert pixel_norm(torch.randn(2, 5, 3, 3)).square().mean(dim=1) == pytest.approx(torch.ones(2, 3, 3), abs=1e-6)
    assert torch.equal(doubled(torch.tensor([[[[1.0, 2.0]]]])), torch.tensor([[[[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]]))


def test_images_are_compared_in_groups() -> None:
    batch = torch.randn(5, 3, 4, 4)
    seen = differences(batch, 2)
    for group in (slice(0, 2), slice(2, 4)):
        assert torch.allclose(seen[group], batch[group].std(dim=0).mean().expand(2))
    assert seen[4] == 0, "alone it differs from nobody; the published system gives NaN"
    assert torch.allclose(differences(batch, None), batch.std(dim=0).mean().expand(5))


def test_what_is_said_of_an_image_alone_does_not_depend_on_others() -> None:
    critic = small()[1]
    critic.typical_difference.fill_(0.4)
    together = critic(images(3), 3, 0.3, alone=True)
    one_by_one = [critic(image[None], 3, 0.3, alone=True) for image in images(3)]
    assert torch.allclose(together.logits, torch.cat([item.logits for item in one_by_one]), atol=1e-12)
    assert not torch.allclose(together.logits, critic(images(3), 3, 0.3).logits, atol=1e-6)
