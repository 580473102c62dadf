"""PACGAN: the two players' updates, what is measured on held-out images, and sampling by class. Built by train.py and generate.py."""

from __future__ import annotations

from functools import cached_property, partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.errors import InputError
from medgen.models.base import (
    Batch,
    DataShape,
    Given,
    Phase,
    SampleNoise,
    StepContext,
    StepReport,
    count_parameters,
    joined,
)
from medgen.models.base import Model as Family
from medgen.models.pacgan.config import Config
from medgen.models.pacgan.losses import Weights, critic_loss, generator_loss, gradient_penalty
from medgen.models.pacgan.networks import Critic, Generator, Judged
from medgen.models.settings import Settings
from medgen.roc import area_under_curve

FIRST_ALPHA = 1e-5  # of a new block, before its first update
TYPICAL_DECAY = 0.99


class Grown(nn.Module):
    """How far both networks are grown: part of a checkpoint, so that it knows its size."""

    level: Tensor
    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.tensor(0))
        self.register_buffer("alpha", torch.tensor(1.0, dtype=torch.float64))


class Model(Family):
    """A generator and a critic that also classifies."""

    selection_metrics: ClassVar[dict[str, Literal["lower", "higher"]]] = {"auc": "higher"}

    def __init__(self, config: Config, shape: DataShape):
        self.config, self.classes = config, len(shape.classes)
        self.generator = Generator(config.latent, config.embedding, self.classes, len(config.channels), config.widths)
        self.critic = Critic(self.classes, len(config.channels), config.widths, config.std_group)
        self.grown = Grown()
        self.weights = Weights(config.penalty, config.aimed_class, config.other_class, config.drift)

    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic, "grown": self.grown}

    @cached_property
    def players(self) -> dict[str, torch.optim.Optimizer]:
        # fused: both have many weights for few pixels, and one pass over them is up to eight times faster than Adam's usual dozen
        return {name: torch.optim.Adam(module.parameters(), self.config.lr, self.config.betas, fused=True) for name, module in (("generator", self.generator), ("critic", self.critic))}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self.players

    def phases(self) -> list[Phase]:
        config = self.config
        return [
            Phase(f"{size}px", epochs, batch_size, size, "auc" if config.select else None, config.select_from)
            for size, epochs, batch_size in zip(config.sizes, config.epochs, config.batch_sizes, strict=True)
        ]

    def check_start(self) -> None:
        done, grown = self.config.done_phases, int(self.grown.level)
        if grown < done - 1:
            raise InputError(f"start_from: it is grown to {self.config.sizes[grown]} px, but epochs has 0 for the sizes up to {self.config.sizes[done - 1]} px; "
                             f"give {self.config.sizes[grown + 1]} px and what follows their epochs")  # fmt: skip

    def step(self, batch: Batch, context: StepContext) -> StepReport:
        """Some updates of the critic on the same real images, then one of the generator."""
        level = context.phase
        alpha = min(1.0, FIRST_ALPHA + context.phase_progress / self.config.fade_share) if level else 1.0
        self.grown.level.fill_(level)
        self.grown.alpha.fill_(alpha)
        for iteration in range(self.config.critic_iterations[level]):
            critic = self._update_critic(batch, context, level, alpha, iteration)
        generator = self._update_generator(batch, context, level, alpha)
        scalars = {f"critic_{name}": value for name, value in critic.items()} | {f"generator_{name}": value for name, value in generator.items()}
        return StepReport({"loss": critic["loss"] + generator["loss"], **scalars, "alpha": torch.tensor(alpha)})

    def _update_critic(self, batch: Batch, context: StepContext, level: int, alpha: float, iteration: int) -> dict[str, Tensor]:
        judge = partial(self.critic, step=level, alpha=alpha)
        sums: dict[str, Tensor] = {}
        for part, share in context.micro_batches(batch, self.critic):
            labels = _labels(part)
            latent, mix = part.normal(f"latent/{iteration}", (self.config.latent,)), part.uniform(f"mix/{iteration}")
            real = joined(part.channels, self.config.channels)
            with context.autocast():
                with torch.no_grad():
                    fake = self.generator(latent, labels, level, alpha).to(real.dtype)
                of_real, of_fake = judge(real), judge(fake)
            terms = critic_loss(_exact(of_real), _exact(of_fake), labels, gradient_penalty(judge, real, fake, mix), self.weights)
            (terms["loss"] * share).backward()
            sums = _added(sums, {**terms, "difference": of_real.differences.float().mean()}, share)
        self._update("critic", self.critic, context)
        self.critic.typical_difference.lerp_(context.mean(sums["difference"]), 1 - TYPICAL_DECAY)
        return sums

    def _update_generator(self, batch: Batch, context: StepContext, level: int, alpha: float) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        self.critic.requires_grad_(False)  # its own gradients are not asked for, which is a third of the work
        for part, share in context.micro_batches(batch, self.generator):
            labels, latent = _labels(part), part.normal("latent/generator", (self.config.latent,))
            with context.autocast():
                judged = self.critic(self.generator(latent, labels, level, alpha), level, alpha)
            terms = generator_loss(_exact(judged), labels, self.weights)
            (terms["loss"] * share).backward()
            sums = _added(sums, terms, share)
        self.critic.requires_grad_(True)
        self._update("generator", self.generator, context)
        return sums

    def _update(self, player: str, network: nn.Module, context: StepContext) -> None:
        context.reduce_gradients(list(network.parameters()))
        self.players[player].step()
        self.players[player].zero_grad(set_to_none=True)

    def validate(self, batch: Batch, context: StepContext) -> StepReport:
        """`loss`: cross entropy of the classes of real images. Each image is judged as if the others were not there."""
        labels = _labels(batch)
        fake = self._images(batch.normal("latent", (self.config.latent,)), labels)
        real_logits, fake_logits = self._judged(joined(batch.channels, self.config.channels)).logits, self._judged(fake).logits
        samples = {"label": labels, "real": real_logits.softmax(dim=1), "fake": fake_logits.softmax(dim=1)}
        return StepReport({"loss": functional.cross_entropy(real_logits, labels)}, samples=samples)

    def scores(self, samples: dict[str, Tensor]) -> dict[str, float]:
        """Area under the ROC curve over the whole split, of real images and of images made for the same classes; `auc` is their mean.

        The published system maximises their sum, of averages over batches."""
        areas = {f"auc_{kind}": area_under_curve(samples["label"].numpy(), samples[kind].numpy()) for kind in ("real", "fake")}
        known = {name: area for name, area in areas.items() if area is not None}
        return {**known, "auc": sum(known.values()) / 2} if len(known) == 2 else known

    def _judged(self, images: Tensor) -> Judged:
        """Each image as if the others were not there; images in [-1, 1] of the grown size."""
        judged: Judged = self.critic(images, int(self.grown.level), float(self.grown.alpha), alone=True)
        return judged

    def _images(self, latent: Tensor, labels: Tensor) -> Tensor:
        made: Tensor = self.generator(latent, labels, int(self.grown.level), float(self.grown.alpha))
        return made

    @torch.no_grad()
    def sample(self, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        assert given.labels is not None, "the family uses labels"
        images = (self._images(noise.normal((self.config.latent,)), given.labels) + 1) / 2
        return {name: images[:, place : place + 1].clamp(0, 1) for place, name in enumerate(self.config.channels)}

    @property
    def judged_size(self) -> int:
        return self.config.sizes[int(self.grown.level)]

    @torch.no_grad()
    def classify(self, channels: dict[str, Tensor]) -> Tensor:
        return self._judged(joined(channels, self.config.channels)).logits.softmax(dim=1)

    @torch.no_grad()
    def attack_scores(self, batch: Batch) -> Tensor:
        """How real the critic finds each image: it was taught so by the training images alone.

        Hayes et al., PoPETs 2019 (LOGAN, arXiv:1705.07663), section 4.1."""
        return self._judged(joined(batch.channels, self.config.channels)).scores.float()

    def describe(self, total_steps: int) -> list[str]:
        config = self.config
        return [
            f"{self.classes} classes, {config.sizes[0]} to {config.sizes[-1]} px, generator {count_parameters(self.generator):,} parameters, "
            f"critic {count_parameters(self.critic):,}"
        ]


def _exact(judged: Judged) -> Judged:
    """In float32: losses are not for mixed precision."""
    return Judged(*(tensor.float() for tensor in judged))


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None, "the family uses labels"
    return batch.labels


def _added(sums: dict[str, Tensor], terms: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: sums.get(name, torch.zeros_like(value)) + value.detach() * share for name, value in terms.items()}
