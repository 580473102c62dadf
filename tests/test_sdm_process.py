"""Learned variance: schedules and losses against the published values, sampling against a known distribution, guidance."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import sdm_reference as reference
import torch
from sdm_reference import CLEAN, NOISE, RINGS, filled, tiny_shape, tiny_unet
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from medgen.models.base import SampleNoise
from medgen.models.diffusion.config import SAMPLERS
from medgen.models.diffusion.samplers import discrete_times, even_times
from medgen.models.sdm.conditions import Conditions
from medgen.models.sdm.networks import SemanticUNet
from medgen.models.sdm.process import LearnedVariance, mean_of_sample, parts
from medgen.models.sdm.sampling import Guidance, guided, predictor
from medgen.models.sdm.variance import Steps, bits_of_a_step, grey_level_length, normal_divergence

CPU = torch.device("cpu")
TIMES = torch.tensor([10, 700])
ENDS = torch.tensor([0, 999])
LINEAR, COSINE = LearnedVariance(schedule="linear"), LearnedVariance(schedule="cosine")


class PublishedNoise:
    """The published noise instead of random numbers."""

    device = CPU

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return NOISE


def at(table: Tensor, *places: int) -> list[float]:
    return table[list(places)].tolist()


# --- schedules, in float64, against the published code's numbers --------------------------------------------------------


def test_the_linear_schedule_is_the_published_one() -> None:
    assert at(LINEAR.steps.beta, 0, 500, 999) == pytest.approx([1e-4, 0.01005995996, 0.02], rel=1e-9)
    expected = [0.9999, 0.9997800921, 0.8951415909, 0.5214230306, 0.07779665837, 0.003300158362, 4.035829765e-5]
    assert at(LINEAR.alpha_bar, 0, 1, 100, 250, 500, 750, 999) == pytest.approx(expected, rel=1e-9)
    assert float(LINEAR.alpha_bar.sum()) == pytest.approx(275.5132334, rel=1e-9)


def test_the_cosine_schedule_is_the_published_one() -> None:
    assert at(COSINE.steps.beta, 0, 1, 500, 998, 999) == pytest.approx([4.128422482e-5, 4.614175274e-5, 0.003155691442, 0.7499993929, 0.999], rel=1e-9)
    assert at(COSINE.alpha_bar, 500, 999) == pytest.approx([0.4922851724, 2.428766907e-9], rel=1e-9)
    assert float(COSINE.steps.beta.sum()) == pytest.approx(12.44149642, rel=1e-9)


def test_the_true_steps_are_the_published_ones() -> None:
    steps = LINEAR.steps
    assert at(steps.lowest_log_variance.exp(), 1, 2, 500, 999) == pytest.approx([5.453187661e-5, 8.548911523e-5, 0.01005133578, 0.01999998353], rel=1e-9)
    assert at(steps.lowest_log_variance, 0, 1) == pytest.approx([-9.816725135] * 2, rel=1e-9)
    assert at(steps.from_clean, 1, 500) == pytest.approx([0.5452914995, 0.003058057076], rel=1e-9)
    assert at(steps.from_noisy, 1, 500) == pytest.approx([0.454708499, 0.9941043508], rel=1e-9)
    assert at(COSINE.steps.lowest_log_variance, 0, 1) == pytest.approx([-10.73408253] * 2, rel=1e-9)


def test_fewer_times_make_longer_steps_as_published() -> None:
    rising = even_times(1000, 50)[::-1]
    assert rising[:4] == [0, 20, 41, 61] and rising[-3:] == [958, 979, 999]
    steps = Steps.of(LINEAR.alpha_bar[torch.tensor(rising)])
    assert at(steps.beta, 0, 1, 25, 49) == pytest.approx([1e-4, 0.006165187947, 0.1913015093, 0.3298090661], rel=1e-9)
    assert at(LINEAR.alpha_bar, rising[-1]) == pytest.approx([4.0358298e-5], rel=1e-7)
    of_250 = Steps.of(LINEAR.alpha_bar[torch.tensor(even_times(1000, 250)[::-1])])
    assert at(of_250.beta, 1, 125, 249) == pytest.approx([5.990655645e-4, 0.04929790363, 0.07751934499], rel=1e-9)
    assert even_times(1000, 1) == [999] and even_times(1000, 1000) == list(range(999, -1, -1))


# --- losses -------------------------------------------------------------------------------------------------------------

PUBLISHED_LOSSES = [
    (LINEAR, TIMES, [2.4666082859039307, 1.861115574836731], [0.2661289572715759, 0.019255608320236206]),
    (LINEAR, ENDS, [2.5700323581695557, 1.8274799585342407], [4.269748687744141, 0.026904070749878883]),
    (COSINE, TIMES, [2.5331878662109375, 2.092445135116577], [0.24681662023067474, 0.011737343855202198]),
    (COSINE, ENDS, [2.574347734451294, 1.8241794109344482], [3.5584919452667236, 1314.5526123046875]),
]


def tried(process: LearnedVariance, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy images, target, output) of the published network and images."""
    noisy, target = process.noised(CLEAN, NOISE, times)
    with torch.no_grad():
        return noisy, target, tiny_unet()(noisy, process.network_time(times), RINGS)


@pytest.mark.parametrize(("process", "times", "squared_error", "bits"), PUBLISHED_LOSSES)
def test_losses_are_the_published_ones(process: LearnedVariance, times: Tensor, squared_error: list[float], bits: list[float]) -> None:
    """The published bits are those of a predicted image that is not clamped."""
    noisy, target, output = tried(process, times)
    prediction, share = parts(output)
    found = mean_of_sample(bits_of_a_step(CLEAN, noisy, process.clean(noisy, prediction, times), share, times, process.steps), None)
    assert found.tolist() == pytest.approx(bits, rel=1e-5, abs=1e-6)
    assert process.losses(CLEAN, noisy, target, output, times).squared_error.tolist() == pytest.approx(squared_error, rel=1e-5)


def test_no_time_of_the_cosine_schedule_outweighs_the_others() -> None:
    noisy, target, output = tried(COSINE, ENDS)
    losses = COSINE.losses(CLEAN, noisy, target, output, ENDS)
    assert float(losses.bits[1]) < 1.0, "1314.6 bits when the predicted image is not clamped"
    assert torch.allclose(losses.loss, losses.squared_error + losses.bits), "at 1000 times the weight of 0.001 is one of a step's bits"
    lighter = LearnedVariance(schedule="cosine", bound_weight=1e-6).losses(CLEAN, noisy, target, output, ENDS)
    assert torch.allclose(lighter.loss, losses.squared_error + 0.001 * losses.bits)


def test_the_bits_teach_the_variance_alone() -> None:
    noisy, target, output = tried(LINEAR, ENDS)
    output.requires_grad_()
    LINEAR.losses(CLEAN, noisy, target, output, ENDS).bits.sum().backward()
    assert output.grad is not None
    assert float(output.grad[:, :1].abs().max()) == 0.0
    assert bool(output.grad[:, 1:].isfinite().all()) and float(output.grad[:, 1:].abs().min()) >= 0.0 and float(output.grad[:, 1:].abs().max()) > 0.0


def test_padding_does_not_count() -> None:
    """The same losses as of the images without it, and whatever is predicted there."""
    noisy, target, output = tried(LINEAR, TIMES)
    counted = torch.zeros(2, 1, 32, 32)
    counted[:, :, 4:28, 8:24] = 1
    padded = LINEAR.losses(CLEAN, noisy, target, torch.where(counted == 1, output, torch.tensor(50.0)), TIMES, counted)
    inner = (slice(None), slice(None), slice(4, 28), slice(8, 24))
    cropped = LINEAR.losses(CLEAN[inner], noisy[inner], target[inner], output[inner], TIMES)
    for mine, theirs in ((padded.squared_error, cropped.squared_error), (padded.bits, cropped.bits), (padded.loss, cropped.loss)):
        assert torch.allclose(mine, theirs, rtol=1e-5)


def test_the_divergence_is_that_of_normal_distributions() -> None:
    mean, other, log_variance, other_log_variance = torch.randn(4, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log_variance / 2).exp()))
    assert torch.allclose(normal_divergence(mean, log_variance, other, other_log_variance), expected)


@pytest.mark.parametrize("std", [0.002, 0.02, 0.5])
def test_the_grey_levels_are_all_there_is(std: float) -> None:
    """Their probabilities sum to 1, wherever the mean lies."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean in (-1.0, -0.3, 0.9):
        mean_there, log_variance = torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(std))
        assert float((-grey_level_length(levels, mean_there, log_variance)).exp().sum()) == pytest.approx(1.0, abs=1e-6)


# --- steps and sampling ---------------------------------------------------------------------------------------------------


def test_steps_and_guidance_are_the_published_ones() -> None:
    """From the published noise at both times: mean and variance of the step, and what guidance of 1.5 makes of the prediction alone."""
    network, times = tiny_unet(), LINEAR.network_time(TIMES)
    with torch.no_grad():
        told, nothing = network(NOISE, times, RINGS), network(NOISE, times, torch.zeros_like(RINGS))
    scaled = guided(told, [(nothing, 1.5)], image_channels=1)
    reference.GUIDED.check(parts(scaled)[0])
    for output, mean, clean in ((told, reference.STEP_MEAN, reference.STEP_CLEAN), (scaled, reference.GUIDED_STEP_MEAN, reference.GUIDED_STEP_CLEAN)):
        prediction, share = parts(output)
        predicted = LINEAR.clean(NOISE, prediction, TIMES).clamp(-1, 1)
        clean.check(predicted)
        mean.check(LINEAR.steps.mean(NOISE, predicted, TIMES))
        reference.STEP_LOG_VARIANCE.check(LINEAR.steps.log_variance(share, TIMES))


@pytest.mark.parametrize(("times", "mean", "std"), [
    (even_times(1000, 50), -0.09551690342686925, 0.9757065226322833),
    (list(range(980, -1, -20)), -0.09541312104738608, 0.9755529548740265),
])  # fmt: skip
def test_ddim_is_the_published_one(times: list[int], mean: float, std: float) -> None:
    network = tiny_unet()
    with torch.no_grad():
        images = LINEAR.sample(predictor(network, RINGS, None, Guidance()), PublishedNoise(), (1, 32, 32), "ddim", times)  # type: ignore[arg-type]
    assert float(images.mean()) == pytest.approx(mean, abs=1e-5) and float(images.std()) == pytest.approx(std, abs=1e-5)


MEAN, STD = 0.3, 0.25


def sampled(process: LearnedVariance, times: list[int], said: float | None, sampler: str = "ddpm") -> tuple[float, float]:
    """Mean and standard deviation of what comes out if the network were perfect for data of N(0.3, 0.25^2).

    said: the share of the variance for all steps; None: the true one, with what is not known of the clean image."""
    steps, rising = Steps.of(process.alpha_bar[torch.tensor(times[::-1])]), times[::-1]

    def predict(images: Tensor, network_time: Tensor) -> Tensor:
        time = round(float(network_time[0]) * process.timesteps / 1000)
        alpha_bar, place = float(process.alpha_bar[time]), rising.index(time)
        total = alpha_bar * STD**2 + 1 - alpha_bar
        clean = MEAN + math.sqrt(alpha_bar) * STD**2 / total * (images - math.sqrt(alpha_bar) * MEAN)
        noise = (images - math.sqrt(alpha_bar) * clean) / math.sqrt(1 - alpha_bar)
        target = math.sqrt(alpha_bar) * noise - math.sqrt(1 - alpha_bar) * clean if process.predicts_velocity else noise
        variance = float(steps.from_clean[place]) ** 2 * STD**2 * (1 - alpha_bar) / total
        if place > 0:
            variance += float(steps.lowest_log_variance[place].exp())
        low, high = float(steps.lowest_log_variance[place]), float(steps.highest_log_variance[place])
        share = (math.log(variance) - low) / (high - low) if said is None else said
        return torch.cat([target, torch.full_like(images, 2 * share - 1)], dim=1)

    images = process.sample(predict, SampleNoise(1, "test", [(0,)], CPU), (1, 100, 200), sampler, times)
    return float(images.mean()), float(images.std())


@pytest.mark.parametrize("steps", [1000, 250, 50])
@pytest.mark.parametrize(("schedule", "velocity"), [("linear", False), ("cosine", False), ("linear", True)])
def test_the_right_variance_gives_the_distribution_in_any_number_of_steps(steps: int, schedule: Literal["linear", "cosine"], velocity: bool) -> None:
    process = LearnedVariance(schedule=schedule, predicts_velocity=velocity)
    for times in (even_times(1000, steps), discrete_times(1000, steps)):
        mean, std = sampled(process, times, None)
        assert mean == pytest.approx(MEAN, abs=0.006) and std == pytest.approx(STD, abs=0.005)


@pytest.mark.parametrize(("steps", "said", "mean", "std"), [(250, 0.0, 0.301, 0.239), (50, 0.0, 0.299, 0.206), (50, 1.0, 0.298, 0.275)])
def test_the_bounds_of_the_variance_give_what_they_give_in_the_published_code(steps: int, said: float, mean: float, std: float) -> None:
    found = sampled(LINEAR, even_times(1000, steps), said)
    assert found[0] == pytest.approx(mean, abs=0.006) and found[1] == pytest.approx(std, abs=0.004)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_2m"])
def test_solvers_do_without_the_variance(sampler: str) -> None:
    assert sampler in SAMPLERS["ddpm"]
    times = discrete_times(1000, 50)
    first, second = (sampled(LINEAR, times, said, sampler) for said in (0.0, 1.0))
    assert first == second and first[0] == pytest.approx(MEAN, abs=0.01) and first[1] == pytest.approx(STD, abs=0.012)


def test_a_single_step_is_the_predicted_image() -> None:
    assert sampled(LINEAR, even_times(1000, 1), 0.5)[0] == pytest.approx(MEAN, abs=0.006)


def test_another_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="'euler' does not fit a learned variance; use one of: ddpm, ddim, dpm_solver_2m"):
        LINEAR.sample(lambda images, time: images, SampleNoise(1, "t", [(0,)], CPU), (1, 4, 4), "euler", [999, 0])


# --- the label map and conditions in sampling -----------------------------------------------------------------------------


def drawn(predict: object) -> Tensor:
    with torch.no_grad():
        return LINEAR.sample(predict, SampleNoise(1, "test", [(0,), (1,)], CPU), (1, 32, 32), "ddpm", even_times(1000, 4))  # type: ignore[arg-type]


def told_network() -> tuple[SemanticUNet, Conditions]:
    network = filled(SemanticUNet(tiny_shape(kinds=2, sizes=True)))
    assert isinstance(network, SemanticUNet)
    return network, Conditions.told(torch.tensor([0, 1]), torch.full((2, 2), 1.4), torch.full((2, 2), 320.0))


def test_images_are_the_same_with_the_modulation_made_once() -> None:
    """To the bit, over all steps, with and without guidance, against a network that is given the label map at every step."""
    network, conditions = told_network()
    null = torch.zeros_like(RINGS[:1])

    def by_hand(images: Tensor, time: Tensor) -> Tensor:
        told, without = network(images, time, RINGS, conditions), network(images, time, null, conditions)
        prediction, variance = told.chunk(2, dim=1)
        moved = prediction + 0.5 * (prediction - without[:, :1])
        return torch.cat([moved, variance], dim=1)

    with torch.no_grad():
        plain, scaled = predictor(network, RINGS, conditions, Guidance()), predictor(network, RINGS, conditions, Guidance(labels=1.5))
    assert torch.equal(drawn(plain), drawn(lambda images, time: network(images, time, RINGS, conditions)))
    assert torch.equal(drawn(scaled), drawn(by_hand))
    assert not torch.allclose(drawn(plain), drawn(scaled), atol=1e-3)


def test_each_condition_guides_by_itself_and_only_in_its_interval() -> None:
    network, conditions = told_network()
    with torch.no_grad():
        plain, kind, size, off = (drawn(predictor(network, RINGS, conditions, guidance)) for guidance in (
            Guidance(), Guidance(kind=3.0), Guidance(size=3.0), Guidance(labels=3.0, kind=3.0, interval=(0.4, 0.6))))  # fmt: skip
    assert torch.equal(plain, off), "none of the four times, 0, 333, 666 and 999, lies there"
    assert not torch.allclose(plain, kind, atol=1e-3) and not torch.allclose(plain, size, atol=1e-3) and not torch.allclose(kind, size, atol=1e-3)


def test_guidance_without_effect_is_refused() -> None:
    network = tiny_unet()
    for name in ("kind", "size"):
        with pytest.raises(ValueError, match=f"{name}: a guidance of 2 has no effect, since the network is not told the {name}; remove it"):
            predictor(network, RINGS, None, Guidance(**{name: 2.0}))
    with pytest.raises(ValueError, match=r"interval: times lie in 0 to 1 and rise, got \[0.5, 0.5\]"):
        Guidance(labels=2.0, interval=(0.5, 0.5))
