"""The mathematics of diffusion against closed forms: schedules, samplers, learning rate, EMA horizon."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medgen.context import Context
from medgen.dist import Ranks
from medgen.models.averages import horizon
from medgen.models.base import Batch, DataShape, Given, SampleNoise
from medgen.models.denoising import learning_rate
from medgen.models.diffusion.config import Config, SamplingSettings
from medgen.models.diffusion.discrete import cosine_alpha_bar, linear_alpha_bar
from medgen.models.diffusion.model import Model
from medgen.models.diffusion.samplers import (
    Level,
    adams_bashforth_2,
    ancestral,
    discrete_times,
    euler,
    flow_times,
    heun,
    midpoint,
    posterior_std,
)
from medgen.models.diffusion.strategies import DDPM, RFlow, Strategy
from medgen.models.settings import EmaSettings

CPU = torch.device("cpu")
TARGET_STD = 0.25
SHAPE = (1, 100, 200)


def exact_prediction(strategy: DDPM) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible prediction if the data are N(0, 0.25^2): E[target | noisy]."""

    def predict(noisy: Tensor, network_time: Tensor) -> Tensor:
        alpha_bar = float(strategy.alpha_bar[round(float(network_time[0]) * strategy.timesteps / 1000)])
        variance = alpha_bar * TARGET_STD**2 + 1 - alpha_bar
        noise, clean = math.sqrt(1 - alpha_bar) / variance * noisy, math.sqrt(alpha_bar) * TARGET_STD**2 / variance * noisy
        return math.sqrt(alpha_bar) * noise - math.sqrt(1 - alpha_bar) * clean if strategy.predicts_velocity else noise

    return predict


def exact_velocity(noisy: Tensor, network_time: Tensor) -> Tensor:
    """E[clean - noise | noisy] on the straight path, for the same data."""
    time = float(network_time[0]) / 1000
    return ((1 - time) * TARGET_STD**2 - time) / ((1 - time) ** 2 * TARGET_STD**2 + time**2) * noisy


def sampled_std(config: Config, **sampling: object) -> float:
    made, predict = (DDPM(config), None) if config.strategy == "ddpm" else (RFlow(config), exact_velocity)
    predict = predict or exact_prediction(made)  # type: ignore[arg-type]
    return float(made.sample(predict, SampleNoise(1, "test", [(0,)], CPU), SHAPE, config.sampling(dict(sampling))).std())


def closed_form_ddim_std(strategy: DDPM, steps: int) -> float:
    """What DDIM must give for Gaussian data: every step is linear, so it is a product."""
    factor, times = 1.0, discrete_times(strategy.timesteps, steps)
    for now, following in zip(times, [*times[1:], -1], strict=True):
        alpha_bar = float(strategy.alpha_bar[now])
        alpha_bar_next = float(strategy.alpha_bar[following]) if following >= 0 else 1.0
        total = alpha_bar * TARGET_STD**2 + 1 - alpha_bar
        clean, noise = math.sqrt(alpha_bar) * TARGET_STD**2 / total, math.sqrt(1 - alpha_bar) / total
        factor *= math.sqrt(alpha_bar_next) * clean + math.sqrt(1 - alpha_bar_next) * noise
    return factor


@pytest.mark.parametrize("steps", [1000, 250, 50, 25, 10])
@pytest.mark.parametrize(("schedule", "prediction"), [("cosine", "epsilon"), ("cosine", "v"), ("linear", "epsilon"), ("linear", "v")])
def test_ancestral_sampling_reproduces_a_known_distribution(steps: int, schedule: str, prediction: str) -> None:
    """With the exact score the data's standard deviation, 0.25, must come out of any number of steps (others give 0.55 at 250, 0.88 at 50)."""
    config = Config(strategy="ddpm", mode="seg", schedule=schedule, prediction=prediction)
    assert 0.24 < sampled_std(config, sampler="ddpm", steps=steps) < 0.26


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("sampler", "steps", "tolerance"), [
    ("ddim", 1000, 0.003), ("ddim", 250, 0.004), ("ddim", 50, 0.012), ("dpm_solver_2m", 250, 0.002), ("dpm_solver_2m", 50, 0.002), ("dpm_solver_2m", 25, 0.008),
])  # fmt: skip
def test_deterministic_samplers_reproduce_it(schedule: str, sampler: str, steps: int, tolerance: float) -> None:
    config = Config(strategy="ddpm", mode="seg", schedule=schedule)
    std = sampled_std(config, sampler=sampler, steps=steps)
    assert std == pytest.approx(TARGET_STD, abs=tolerance)
    if sampler == "ddim":
        assert std == pytest.approx(closed_form_ddim_std(DDPM(config), steps), abs=0.002)


@pytest.mark.parametrize(("sampler", "steps", "tolerance"), [
    ("euler", 100, 0.007), ("euler", 25, 0.025), ("midpoint", 6, 0.003), ("ab2", 25, 0.004), ("heun", 25, 0.005),
])  # fmt: skip
@pytest.mark.parametrize("time_shift", [0.5, 1.0])
def test_flow_samplers_reproduce_it(sampler: str, steps: int, tolerance: float, time_shift: float) -> None:
    assert sampled_std(Config(strategy="rflow", mode="seg"), sampler=sampler, steps=steps, time_shift=time_shift) == pytest.approx(TARGET_STD, abs=tolerance)


def test_flow_solvers_have_the_order_they_claim() -> None:
    """dx/ds = -2 x with s = 1 - t from 1 to 0: the exact end is exp(-2); half the step, a half or a quarter of the error."""

    def decay(images: Tensor, time: float) -> Tensor:
        return -2 * images

    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for solver, order in ((euler, 1), (midpoint, 2), (adams_bashforth_2, 2)):
        errors = [abs(float(solver(decay, flow_times(steps, 1.0), one)) - math.exp(-2)) for steps in (64, 128)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15), solver.__name__
    uneven = abs(float(adams_bashforth_2(decay, flow_times(128, 2.0), one)) - math.exp(-2))
    assert uneven < 3e-4, "the weights of two steps in a row follow their lengths"
    before_last = flow_times(64, 1.0)[:-1]  # the last step of heun is Euler's
    finer = [1 - (1 - before_last[-1]) * number / 126 for number in range(127)]
    truth = math.exp(-2 * (1 - before_last[-1]))
    errors = [abs(float(heun(decay, times, one)) - truth) for times in (before_last, finer)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


def test_what_an_image_becomes_does_not_depend_on_the_others() -> None:
    """The variance of an ancestral step is estimated, but from that image alone."""
    levels = [Level(0.1, math.sqrt(1 - 0.01)), Level(0.8, 0.6)]

    def denoise(images: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return images * 0.3, images * torch.linspace(0.2, 0.9, 3).view(-1, 1, 1, 1)[: len(images)]

    together = ancestral(denoise, levels, SampleNoise(1, "test", [(0,), (1,), (2,)], CPU), (1, 8, 8))
    alone = ancestral(denoise, levels, SampleNoise(1, "test", [(0,)], CPU), (1, 8, 8))
    assert torch.equal(together[:1], alone)


def test_the_cosine_schedule() -> None:
    alpha_bar = cosine_alpha_bar(1000)
    expected = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(alpha_bar[499]) == pytest.approx(expected, rel=1e-9)
    assert 0 < float(alpha_bar[-1]) < 1e-5 and float(alpha_bar[0]) > 0.9999
    assert bool((alpha_bar[1:] < alpha_bar[:-1]).all())


def test_the_linear_schedule() -> None:
    """Betas from 1e-4 to 0.02 at 1000 timesteps."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(linear_alpha_bar(1000), torch.cumprod(1 - betas, 0))
    assert 1e-5 < float(linear_alpha_bar(100)[-1]) < 5e-5, "longer steps, as much noise at the end"


def test_single_steps_have_the_variance_of_the_paper() -> None:
    alpha_bar = cosine_alpha_bar(1000)
    now, following = float(alpha_bar[500]), float(alpha_bar[499])
    beta = 1 - now / following
    levels = [Level(math.sqrt(value), math.sqrt(1 - value)) for value in (now, following)]
    assert posterior_std(*levels) ** 2 == pytest.approx((1 - following) / (1 - now) * beta)


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 1000), (1000, 999), (1000, 500), (1000, 50), (1000, 3), (1000, 1), (10, 10), (7, 2), (2, 1)])
def test_sampling_starts_at_pure_noise_and_never_repeats(timesteps: int, steps: int) -> None:
    times = discrete_times(timesteps, steps)
    assert times[0] == timesteps - 1 and times[-1] >= 0 and len(times) == steps
    assert all(earlier > later for earlier, later in itertools.pairwise(times))


def test_noising_ends_where_it_should() -> None:
    clean, noise = torch.full((2, 1, 4, 4), 0.5), torch.randn(2, 1, 4, 4)
    ddpm, flow = DDPM(Config(mode="seg")), RFlow(Config(strategy="rflow", mode="seg"))
    noisy, target = ddpm.noised(clean, noise, torch.tensor([999, 999]))
    assert torch.allclose(noisy, noise, atol=0.01) and torch.equal(target, noise)
    noisy, velocity = flow.noised(clean, noise, torch.tensor([0.3, 0.9]))
    assert torch.allclose(noisy + torch.tensor([0.3, 0.9]).view(-1, 1, 1, 1) * velocity, clean, atol=1e-6)


STRATEGIES: list[Strategy] = [DDPM(Config(mode="seg")), DDPM(Config(mode="seg", prediction="v", schedule="linear")), RFlow(Config(strategy="rflow", mode="seg"))]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_right_prediction_amounts_to_the_clean_image(strategy: Strategy) -> None:
    clean, noise = torch.rand(6, 2, 8, 8) * 2 - 1, torch.randn(6, 2, 8, 8)
    times = strategy.times(torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.9]))
    noisy, target = strategy.noised(clean, noise, times)
    assert torch.allclose(strategy.clean(noisy, target, times), clean, atol=2e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_signal_to_noise_ratio_is_that_of_the_noised_images(strategy: Strategy) -> None:
    times = strategy.times(torch.tensor([0.1, 0.5, 0.9]))
    one, none = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    signal, noise = strategy.noised(one, none, times)[0].flatten(), strategy.noised(none, one, times)[0].flatten()
    assert torch.allclose(strategy.snr(times), (signal / noise).square(), rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weights_are_those_of_the_paper(prediction: str) -> None:
    """In float64 from the betas; the weight of every single time, and none without gamma."""
    strategy = DDPM(Config(mode="seg", prediction=prediction, min_snr_gamma=5.0))
    alpha_bar = cosine_alpha_bar(1000)
    snr = alpha_bar / (1 - alpha_bar)
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    every = torch.arange(1000)
    assert torch.allclose(strategy.loss_weight(every).double(), expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(DDPM(Config(mode="seg", prediction=prediction)).loss_weight(every), torch.ones(1000))


def test_min_snr_weighs_each_sample_and_not_the_batch() -> None:
    """The gradient of one step against the one worked out by hand from each sample's own error and weight."""
    config = Config.model_validate({**Config.examples()["ddpm_bravo"], "min_snr_gamma": 5.0, "clip_norm": 1e9})
    torch.manual_seed(0)
    model = Model(config, DataShape(config.input_channels, 16))
    batch = Batch({name: torch.rand(4, 1, 16, 16) for name in config.input_channels}, [0, 1, 2, 3], seed=1)
    times = model.strategy.times(batch.uniform("time"))
    errors = model.squared_errors(model.network, batch, times)
    by_hand = sum(float(model.strategy.loss_weight(times)[row]) * errors[row] for row in range(4)) / 4
    assert isinstance(by_hand, Tensor)
    expected = torch.autograd.grad(by_hand, list(model.network.parameters()), allow_unused=True)
    by_hand = by_hand.detach()
    kept: list[Tensor | None] = []
    model.optimizer.register_step_pre_hook(lambda *_: kept.extend(parameter.grad.clone() if parameter.grad is not None else None for parameter in model.network.parameters()))
    report = model.step(batch, whole_batch())
    assert float(report.scalars["loss"]) == pytest.approx(float(by_hand), rel=1e-5)
    by_batch = errors.detach().mean() * model.strategy.loss_weight(times).mean()
    assert float(by_hand) != pytest.approx(float(by_batch), rel=1e-4)
    for mine, theirs in zip(kept, expected, strict=True):
        assert (mine is None and theirs is None) or torch.allclose(mine, theirs, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(report.binned["loss_t"][1], errors.detach(), rtol=1e-5), "the loss by time is the plain error"


def whole_batch() -> Context:
    made = Context(Ranks(0, 1, 0, CPU), "fp32", None)
    made.total_steps, made.steps_per_epoch = 20, 10.0
    return made


def guided_model() -> Model:
    config = Config.model_validate({**Config.examples()["rflow_bravo"], "condition_dropout": 0.3})
    torch.manual_seed(0)
    model = Model(config, DataShape(config.input_channels, 16))
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for average in model.averages.values():
        average.copy_params_from_model_to_ema()
    return model


def test_guidance_is_the_formula_and_reaches_where_it_should() -> None:
    model = guided_model()
    given = Given({"seg": (torch.rand(2, 1, 16, 16) > 0.7).float()})
    images, time = torch.randn(2, 1, 16, 16), torch.tensor([400.0, 400.0])
    network = model.weights("ema")
    with torch.no_grad():
        conditional = network(torch.cat([images, given.channels["seg"] * 2 - 1, torch.ones(2, 1, 16, 16)], 1), time)
        unconditional = network(torch.cat([images, torch.zeros(2, 2, 16, 16)], 1), time)
        found = model._guided(network, images, time, given, 3.0)
    assert torch.allclose(found, unconditional + 3 * (conditional - unconditional), atol=1e-5)

    def drawn(**sampling: object) -> Tensor:
        return model.sample(SampleNoise(1, "test", [(0,), (1,)], CPU), given, model.config.sampling({"steps": 4, **sampling}))["bravo"]

    plain = drawn()
    assert not torch.allclose(drawn(guidance=3.0), plain, atol=1e-3)
    assert torch.equal(drawn(guidance=3.0, guidance_interval=[0.3, 0.45]), plain), "none of the four steps lies there"
    assert not torch.equal(drawn(guidance=3.0, guidance_interval=[0.3, 0.6]), plain)


def test_dropped_conditions_are_drawn_by_sample_and_tell_that_they_are_absent() -> None:
    model = guided_model()
    batch = Batch({"bravo": torch.zeros(400, 1, 4, 4), "seg": torch.ones(400, 1, 4, 4)}, list(range(400)), seed=1)
    conditioned = model._conditioned(batch)
    assert conditioned is not None and 0.62 < float(conditioned.mean()) < 0.78
    seen = model._network_input(torch.zeros(400, 1, 4, 4), batch.channels, conditioned)
    assert torch.equal(seen[:, 1].amax((1, 2)), conditioned) and torch.equal(seen[:, 2].amin((1, 2)), conditioned)
    later = Batch({name: channel[200:] for name, channel in batch.channels.items()}, list(range(200, 400)), seed=1)
    assert torch.equal(conditioned[200:], model._conditioned(later)), "whatever the batch or the rank"  # type: ignore[arg-type]


def test_several_averages_are_kept_and_chosen_by_name() -> None:
    config = Config.model_validate({**Config.examples()["rflow_seg"], "ema": {"beta": 0.99, "more": [0.5], "update_after_step": 0, "update_every": 1}})
    torch.manual_seed(0)
    model = Model(config, DataShape(config.input_channels, 16))
    batch, where = Batch({"seg": (torch.rand(4, 1, 16, 16) > 0.5).float()}, [0, 1, 2, 3], seed=1), whole_batch()
    for where.step in range(12):
        model.step(batch, where)
    far = [float(torch.cat([(mine - raw).flatten() for mine, raw in zip(model.weights(name).parameters(), model.network.parameters(), strict=True)]).norm())
           for name in ("raw", "ema_0.5", "ema")]
    assert far[0] == 0 and 0 < far[1] < far[2], "the longer the average, the further behind"
    drawn = {name: model.strategy.sample(lambda images, time, name=name: model.weights(name)(images, time), SampleNoise(1, "t", [(0,)], CPU), (1, 16, 16),  # type: ignore[misc]
                                         config.sampling({"steps": 3, "weights": name})) for name in ("raw", "ema", "ema_0.5")}
    assert not torch.equal(drawn["raw"], drawn["ema"]) and not torch.equal(drawn["ema"], drawn["ema_0.5"])


REFUSED = [
    ({"strategy": "rflow", "timesteps": 100}, "timesteps has no effect with strategy rflow, whose time is continuous"),
    ({"strategy": "rflow", "min_snr_gamma": 5}, "min_snr_gamma has no effect with strategy rflow, where weights by the signal-to-noise ratio have no theory"),
    ({"strategy": "rflow", "prediction": "v"}, "prediction has no effect with strategy rflow"),
    ({"strategy": "rflow", "schedule": "linear"}, "schedule has no effect with strategy rflow"),
    ({"times": "uniform"}, "times has no effect with strategy ddpm"),
    ({"time_shift": 2}, "time_shift has no effect with strategy ddpm"),
    ({"mode": "seg", "condition_dropout": 0.1}, "condition_dropout has no effect in mode seg"),
    ({"ema": {"beta": 0.9, "more": [0.9]}}, "names an average twice"),
    ({"ema": {"more": [1.5]}}, "a beta lies between 0 and 1"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_keys_without_effect_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"strategy": "ddpm", "mode": "bravo", **keys})


REFUSED_SAMPLING = [
    ({}, {"sampler": "heun"}, "'heun' does not fit strategy ddpm; use one of: ddpm, ddim, dpm_solver_2m"),
    ({}, {"sampler": "ddpm", "eta": 0.5}, "eta has no effect with the ddpm sampler"),
    ({}, {"time_shift": 2.0}, "time_shift has no effect with the ddpm sampler"),
    ({}, {"guidance": 2.0}, "guidance needs a training with condition_dropout"),
    ({"condition_dropout": 0.1}, {"guidance_interval": [0.1, 0.5]}, "guidance_interval has no effect with guidance: 1"),
    ({"condition_dropout": 0.1}, {"guidance": 2.0, "guidance_interval": [0.5, 0.1]}, "times lie in 0 to 1 and rise"),
    ({}, {"weights": "ema_0.5"}, "weights: 'ema_0.5' was not kept; this training has: raw, ema "),
    ({"ema": None}, {"weights": "ema"}, "this training has: raw "),
    ({"timesteps": 20}, {"steps": 21}, "21 is more than the 20 timesteps trained"),
]


@pytest.mark.parametrize(("keys", "sampling", "message"), REFUSED_SAMPLING)
def test_sampling_without_effect_is_refused(keys: dict[str, object], sampling: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"strategy": "ddpm", "mode": "bravo", **keys}).sampling(sampling)


def test_averages_that_differ_late_have_names_that_differ() -> None:
    assert list(EmaSettings(more=(0.999, 0.9999991, 0.9999992)).betas) == ["ema", "ema_0.999", "ema_0.9999991", "ema_0.9999992"]


def test_evaluations_of_the_network_are_counted() -> None:
    flow, calls = Config(strategy="rflow", mode="seg"), []

    def counting(images: Tensor, time: Tensor) -> Tensor:
        calls.append(float(time[0]))
        return images * 0

    for sampler in RFlow.samplers:
        calls.clear()
        settings = flow.sampling({"sampler": sampler, "steps": 5})
        RFlow(flow).sample(counting, SampleNoise(1, "t", [(0,)], CPU), (1, 4, 4), settings)
        assert len(calls) == settings.evaluations, sampler
    assert isinstance(settings, SamplingSettings)


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

    settings = EmaSettings()
    told = horizon(settings.beta, settings, 438_500)
    assert "decay 0.99983" in told and "57,7" in told
    ema = EMA(torch.nn.Linear(1, 1), beta=settings.beta, update_after_step=settings.update_after_step)
    ema.step.fill_(438_500)
    assert f"decay {ema.get_current_decay():.5f}" in told
    assert "a copy of the weights" in horizon(settings.beta, settings, 50)
