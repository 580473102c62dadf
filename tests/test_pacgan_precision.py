"""Mixed precision and the gradient penalty: bf16 for the passes of both players, never for the term whose own gradient is a second derivative."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medgen.context import Context
from medgen.dist import ALONE
from medgen.models.base import Batch, DataShape
from medgen.models.pacgan import model as pacgan
from medgen.models.pacgan.config import Config
from medgen.models.pacgan.losses import Judge, gradient_penalty

SIZE, COUNT = 16, 8
TOLERANCE = 0.005  # of a loss with mixed precision, relative to the largest term

Penalty = Callable[[Judge, Tensor, Tensor, Tensor], Tensor]


class Operations(TorchDispatchMode):
    """Which kinds of floating numbers the operations take and give, those of a backward pass too, and of convolutions by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.of_convolutions: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kinds = [item.dtype for item in tree_leaves((args, kwargs, result)) if isinstance(item, Tensor) and item.is_floating_point()]
        self.dtypes.update(kinds)
        if "convolution" in str(function):
            self.of_convolutions += kinds
        return result


@dataclass
class Observed:
    """Calls a penalty inside a step, looks at every operation of it, and computes it again in float32 from the same images."""

    penalty: Penalty
    critic: nn.Module
    problems: list[str] = field(default_factory=list)
    convolutions: int = 0
    backward_passes: int = 0

    def __call__(self, judge: Judge, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        with Operations() as seen:
            value = self.penalty(judge, real, fake, mix)
            gradients = self._gradients(value)
        self.convolutions += len(seen.of_convolutions)
        if torch.bfloat16 in seen.dtypes:
            self.problems.append("bf16 numbers are in the penalty")
        with torch.autocast("cpu", enabled=False):
            exact = gradient_penalty(judge, real, fake, mix)
            expected = self._gradients(exact)
        if not torch.equal(value, exact):
            self.problems.append(f"its value is {value.item()}, in float32 {exact.item()}")
        if not all(torch.equal(found, wanted) for found, wanted in zip(gradients, expected, strict=True)):
            self.problems.append("its gradients are not those of float32")
        value.register_hook(self._backward_begins)
        return value

    def _gradients(self, value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(value, list(self.critic.parameters()), retain_graph=True, allow_unused=True)
        return [item for item in found if item is not None]

    def _backward_begins(self, gradient: Tensor) -> None:
        self.backward_passes += 1
        if torch.is_autocast_enabled("cpu"):
            self.problems.append("its second derivative is taken with mixed precision on")


def made() -> pacgan.Model:
    config = Config.model_validate({"in_channels": 32, "factors": [1, 1, 0.5], "latent": 16, "batch_sizes": COUNT, "critic_iterations": 2})
    torch.manual_seed(3)
    return pacgan.Model(config, DataShape(("image",), SIZE, ("CN", "AD")))


def batch() -> Batch:
    images = torch.rand((COUNT, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(5))
    return Batch({"image": images}, list(range(COUNT)), seed=1, labels=torch.arange(COUNT) % 2)


def context(bf16: bool) -> Context:
    """In the middle of the last fade-in. A user cannot ask a CPU for bf16, because it is slow there; its numbers are those of bf16 all the same."""
    here = Context(ALONE, "fp32", None)
    here.use_bf16 = bf16
    here.phase, here.phase_progress = 2, 0.25
    return here


def observed_step(monkeypatch: pytest.MonkeyPatch, penalty: Penalty) -> tuple[Observed, Operations]:
    model = made()
    observed = Observed(penalty, model.critic)
    monkeypatch.setattr(pacgan, "gradient_penalty", observed)
    with Operations() as seen:
        model.step(batch(), context(bf16=True))
    return observed, seen


def test_no_bf16_enters_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    observed, whole_step = observed_step(monkeypatch, gradient_penalty)
    assert torch.bfloat16 in whole_step.of_convolutions, "the rest of the step is in mixed precision, or this shows nothing"
    assert observed.convolutions > 0 and observed.backward_passes == 2, "it was looked at, in both updates of the critic"
    assert observed.problems == []


def test_a_penalty_with_mixed_precision_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(judge: Judge, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
        with context(bf16=True).autocast():
            return gradient_penalty(judge, real, fake, mix)

    problems = " ".join(observed_step(monkeypatch, broken)[0].problems)
    assert "bf16 numbers are in the penalty" in problems
    assert "in float32" in problems and "its gradients are not those of float32" in problems


def test_losses_with_mixed_precision_are_near_those_without() -> None:
    model = made()
    exact, mixed = (copy.deepcopy(model).step(batch(), context(bf16)).scalars for bf16 in (False, True))
    largest = max(abs(value.item()) for value in exact.values())
    differences = {name: abs(mixed[name].item() - value.item()) / largest for name, value in exact.items()}
    assert max(differences.values()) < TOLERANCE, differences
    assert max(differences.values()) > 0, "bf16 rounds"
    assert all(value.dtype in (torch.float32, torch.float64) for value in mixed.values()), "losses are added up in float32"
