"""The mathematics of diffusion against closed forms: schedules, samplers, learning rate, EMA horizon."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medgen.models.base import SampleNoise
from medgen.models.diffusion.config import Config
from medgen.models.diffusion.model import ema_horizon, learning_rate
from medgen.models.diffusion.strategies import DDPM, RFlow, cosine_alpha_bar, posterior_std, sampling_times

CPU = torch.device("cpu")
TARGET_STD = 0.25


def exact_noise(strategy: DDPM) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible noise prediction if the data are N(0, 0.25^2): E[noise | noisy]."""

    def predict(noisy: Tensor, network_time: Tensor) -> Tensor:
        alpha_bar = float(strategy.alpha_bar[round(float(network_time[0]) * strategy.timesteps / 1000)])
        variance = alpha_bar * TARGET_STD**2 + 1 - alpha_bar
        return math.sqrt(1 - alpha_bar) / variance * noisy

    return predict


def closed_form_std(strategy: DDPM, steps: int, eta: float) -> float:
    """The standard deviation that the sampler's update must give for Gaussian data: every step is linear, so it is a product."""
    variance = 1.0
    times = sampling_times(strategy.timesteps, steps)
    for now, following in zip(times, [*times[1:], -1], strict=True):
        alpha_bar = float(strategy.alpha_bar[now])
        alpha_bar_next = float(strategy.alpha_bar[following]) if following >= 0 else 1.0
        total = alpha_bar * TARGET_STD**2 + 1 - alpha_bar
        clean, noise = math.sqrt(alpha_bar) * TARGET_STD**2 / total, math.sqrt(1 - alpha_bar) / total
        std = eta * posterior_std(alpha_bar, alpha_bar_next)
        factor = math.sqrt(alpha_bar_next) * clean + math.sqrt(1 - alpha_bar_next - std**2) * noise
        variance = factor**2 * variance + std**2
    return math.sqrt(variance)


@pytest.mark.parametrize(("steps", "low", "high"), [(1000, 0.24, 0.26), (250, 0.24, 0.26), (50, 0.22, 0.26)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samplers_reproduce_a_known_distribution(sampler: str, steps: int, low: float, high: float) -> None:
    """With the exact score the data's standard deviation, 0.25, must come out; strided samplers are often far off (0.55, 0.88)."""
    config = Config(strategy="ddpm", mode="seg")
    strategy = DDPM(config)
    noise = SampleNoise(1, "test", [(0,)], CPU)
    std = float(strategy.sample(exact_noise(strategy), noise, (1, 100, 200), config.sampling({"sampler": sampler, "steps": steps})).std())
    assert low < std < high
    assert std == pytest.approx(closed_form_std(strategy, steps, eta=1.0 if sampler == "ddpm" else 0.0), abs=0.004)


@pytest.mark.parametrize("steps", [25, 100])
def test_euler_reproduces_a_known_distribution(steps: int) -> None:
    strategy = RFlow(Config(strategy="rflow", mode="seg"))

    def exact_velocity(noisy: Tensor, network_time: Tensor) -> Tensor:
        time = float(network_time[0]) / 1000
        variance = (1 - time) ** 2 * TARGET_STD**2 + time**2
        return ((1 - time) * TARGET_STD**2 - time) / variance * noisy  # E[clean - noise | noisy]

    settings = strategy.config.sampling({"steps": steps})
    images = strategy.sample(exact_velocity, SampleNoise(1, "test", [(0,)], CPU), (1, 100, 200), settings)
    assert abs(float(images.std()) - TARGET_STD) < 0.02 if steps >= 100 else 0.05


def test_the_cosine_schedule() -> None:
    alpha_bar = cosine_alpha_bar(1000)
    expected = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(alpha_bar[499]) == pytest.approx(expected, rel=1e-9)
    assert 0 < float(alpha_bar[-1]) < 1e-5 and float(alpha_bar[0]) > 0.9999
    assert bool((alpha_bar[1:] < alpha_bar[:-1]).all())


def test_single_steps_have_the_variance_of_the_paper() -> None:
    alpha_bar = cosine_alpha_bar(1000)
    now, following = float(alpha_bar[500]), float(alpha_bar[499])
    beta = 1 - now / following
    assert posterior_std(now, following) ** 2 == pytest.approx((1 - following) / (1 - now) * beta)


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 1000), (1000, 50), (1000, 3), (10, 10), (7, 2)])
def test_sampling_starts_at_pure_noise_and_never_repeats(timesteps: int, steps: int) -> None:
    times = sampling_times(timesteps, steps)
    assert times[0] == timesteps - 1 and times[-1] >= 0 and len(times) == steps
    assert all(earlier > later for earlier, later in itertools.pairwise(times))


def test_noising_ends_where_it_should() -> None:
    clean, noise = torch.full((2, 1, 4, 4), 0.5), torch.randn(2, 1, 4, 4)
    ddpm, flow = DDPM(Config(mode="seg")), RFlow(Config(strategy="rflow", mode="seg"))
    noisy, target = ddpm.noised(clean, noise, torch.tensor([999, 999]))
    assert torch.allclose(noisy, noise, atol=0.01) and torch.equal(target, noise)
    noisy, velocity = flow.noised(clean, noise, torch.tensor([0.3, 0.9]))
    assert torch.allclose(noisy + torch.tensor([0.3, 0.9]).view(-1, 1, 1, 1) * velocity, clean, atol=1e-6)


def test_training_times() -> None:
    uniform = (torch.arange(10000) + 0.5) / 10000
    drawn = DDPM(Config(mode="seg")).times(uniform)
    assert int(drawn.min()) == 0 and int(drawn.max()) == 999 and bool((torch.bincount(drawn) == 10).all())
    logit = torch.logit(RFlow(Config(strategy="rflow", mode="seg")).times(uniform))
    assert abs(float(logit.mean())) < 0.01 and abs(float(logit.std()) - 1) < 0.01
    assert torch.equal(RFlow(Config(strategy="rflow", mode="seg", times="uniform")).times(uniform), uniform)


def test_learning_rate() -> None:
    config = Config(mode="seg", epochs=100, warmup_epochs=5, lr=1e-4, lr_min=1e-6)
    assert learning_rate(config, 0) == pytest.approx(1e-5)
    assert learning_rate(config, 2.5) == pytest.approx(5.5e-5)
    assert learning_rate(config, 5) == pytest.approx(1e-4)
    assert learning_rate(config, 52.5) == pytest.approx((1e-4 + 1e-6) / 2)
    assert learning_rate(config, 100) == learning_rate(config, 101) == pytest.approx(1e-6)


def test_the_ema_horizon_is_the_true_one() -> None:
    """The line in the log against what ema-pytorch really uses."""
    from ema_pytorch import EMA

    config = Config(mode="seg")
    assert "decay 0.99983" in ema_horizon(config, 438_500) and "57,7" in ema_horizon(config, 438_500)
    ema = EMA(torch.nn.Linear(1, 1), beta=config.ema.beta, update_after_step=config.ema.update_after_step)
    ema.step.fill_(438_500)
    assert f"decay {ema.get_current_decay():.5f}" in ema_horizon(config, 438_500)
    assert "a copy of the weights" in ema_horizon(config, 50)
