"""Exponential moving averages of a network's weights, by ema-pytorch. Used by the model.py of families with `ema` settings."""

from __future__ import annotations

from ema_pytorch import EMA
from torch import nn

from medgen.models.settings import EmaSettings


def averages_of(network: nn.Module, settings: EmaSettings | None) -> dict[str, EMA]:
    """By the names of `EmaSettings.betas`; `update` of each moves it on after a step, its `ema_model` is the averaged network."""
    if settings is None:
        return {}
    return {
        name: EMA(network, beta=beta, update_after_step=settings.update_after_step, update_every=settings.update_every, include_online_model=False, use_foreach=True)
        for name, beta in settings.betas.items()
    }


def keep_counters_on_cpu(averages: dict[str, EMA]) -> None:
    """ema-pytorch reads its counters every step: on the CPU that does not wait for the GPU."""
    for average in averages.values():
        average.step, average.initted = average.step.cpu(), average.initted.cpu()


def restart(averages: dict[str, EMA]) -> None:
    """As before the first step: of weights from elsewhere nothing is kept once averaging starts."""
    for average in averages.values():
        average.step.zero_()
        average.initted.fill_(False)


def horizons(settings: EmaSettings | None, total_steps: int) -> list[str]:
    """A line for each average that is kept."""
    if settings is None:
        return ["no EMA: the weights themselves are validated and sampled"]
    return [horizon(beta, settings, total_steps) for beta in settings.betas.values()]


def horizon(beta: float, settings: EmaSettings, total_steps: int) -> str:
    """What the average really covers at the end: beta is a ceiling that short runs never reach."""
    updates = max(0, total_steps - settings.update_after_step - 1)
    if updates == 0:
        return f"EMA: a copy of the weights, renewed every {settings.update_every} steps, since averaging starts after step {settings.update_after_step}"
    decay = min(beta, 1 - (1 + updates) ** (-2 / 3))
    reached_steps = settings.update_every / (1 - decay)
    reach = f"it averages about the last {reached_steps:,.0f} steps" if reached_steps < updates else "it still holds much of the weights that it began with: train longer, or write a smaller update_every"
    return f"EMA: decay {decay:.5f} every {settings.update_every} steps at the end of {total_steps:,} steps (ceiling {beta:g}), so {reach}"
