"""The two players of DP-WGAN-GP against numbers that the published networks gave, with weights and inputs filled by a rule."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from medgen.models.dpwgan.networks import Critic, Generator


@dataclass(frozen=True)
class Golden:
    """Of networks with weights scale * sin(0.7 i + 0.3), 0.1 sin(...) where they have one dimension."""

    latent: int
    features: int
    size: int
    scale: float
    generator_parameters: int
    critic_parameters: int
    made_in_training: float
    made_after_it: float
    real: float
    weighted_penalty: float
    loss: float
    gradient: float


SMALL = Golden(8, 8, 32, 0.3, 46_064, 174_337, -12.3241868081, -7.3945913812, 0.2170687873, 2.9421606315, 2.9543040023, 181.0073159511)
PUBLISHED = Golden(128, 64, 128, 0.1, 7_047_040, 11_158_529, 1150.2643002440, 918.2866202634, 0.1119786745, 9.5921024423, 9.5952752686, 178.3472642346)


def waves(shape: tuple[int, ...], step: float, start: float) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + start).view(shape)


def filled(network: nn.Module, scale: float) -> None:
    network.double()
    for parameter in network.parameters():
        parameter.data = (0.1 if parameter.dim() == 1 else scale) * waves(tuple(parameter.shape), 0.7, 0.3)


def networks(golden: Golden) -> tuple[Generator, Critic]:
    return Generator(golden.latent, golden.features, golden.size, 1), Critic(golden.features, golden.size, 1)


@pytest.mark.parametrize("golden", [SMALL, PUBLISHED], ids=["small", "published"])
def test_parameters_are_as_many_as_published(golden: Golden) -> None:
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks(golden)]
    assert counts == [golden.generator_parameters, golden.critic_parameters]


@pytest.mark.parametrize("golden", [SMALL, PUBLISHED], ids=["small", "published"])
def test_images_scores_and_the_gradient_are_the_published_ones(golden: Golden) -> None:
    generator, critic = networks(golden)
    filled(generator, golden.scale)
    filled(critic, golden.scale)
    latent, real = waves((4, golden.latent), 0.37, 0.1), waves((4, 1, golden.size, golden.size), 0.37, 0.2)
    fake = generator(latent).detach()
    assert fake.sum().item() == pytest.approx(golden.made_in_training, abs=2e-10)
    generator.eval()
    assert generator(latent).sum().item() == pytest.approx(golden.made_after_it, abs=2e-10)
    assert critic(real).sum().item() == pytest.approx(golden.real, abs=1e-10)

    share = torch.rand((4, 1, 1, 1), generator=torch.Generator().manual_seed(7)).double()
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    penalty = 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    loss = critic(fake).mean() - critic(real).mean() + penalty
    loss.backward()
    assert (penalty.item(), loss.item()) == pytest.approx((golden.weighted_penalty, golden.loss), abs=1e-10)
    squares = [parameter.grad.square().sum() for parameter in critic.parameters() if parameter.grad is not None]
    assert torch.stack(squares).sum().sqrt().item() == pytest.approx(golden.gradient, abs=1e-9)


def test_running_statistics_follow_the_published_rule() -> None:
    generator, _ = networks(SMALL)
    filled(generator, SMALL.scale)
    assert generator(waves((4, SMALL.latent), 0.37, 0.1)).detach().sum().item() == pytest.approx(-12.3241868081, abs=2e-10)
    statistics = dict(generator.named_buffers())
    assert statistics["doublings.0.1.running_mean"][0].item() == pytest.approx(3.650468668895945e-04, rel=1e-12)
    assert statistics["doublings.0.1.running_var"][0].item() == pytest.approx(0.9006507891476069, rel=1e-12)


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (96, 2)])
def test_any_multiple_of_32_pixels_and_any_channels_work(size: int, channels: int) -> None:
    made = Generator(4, 2, size, channels)(torch.randn(3, 4))
    assert made.shape == (3, channels, size, size) and made.abs().max() <= 1
    assert Critic(2, size, channels)(made).shape == (3,)


def test_weights_start_from_torchs_generator_as_dcgan_says() -> None:
    def drawn(seed: int) -> tuple[Generator, Critic]:
        torch.manual_seed(seed)
        return Generator(8, 16, 32, 1), Critic(16, 32, 1)

    generator, critic = drawn(1)
    for network, again, other in zip((generator, critic), drawn(1), drawn(2), strict=True):
        for name, weights in network.state_dict().items():
            assert torch.equal(weights, again.state_dict()[name])
        assert not torch.equal(next(network.parameters()), next(other.parameters()))
    for weights in (generator.doublings[0][0].weight, critic.convolutions[3].weight):
        assert weights.std().item() == pytest.approx(0.02, rel=0.02) and abs(weights.mean().item()) < 0.001
    scales, shifts = generator.start[1].weight, generator.start[1].bias
    assert scales.mean().item() == pytest.approx(1, abs=0.005) and scales.std().item() == pytest.approx(0.02, rel=0.2)
    assert not shifts.any()
