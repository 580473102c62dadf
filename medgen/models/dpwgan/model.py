"""DP-WGAN-GP: the two players' updates, the noise and what it costs, sampling. Built by train.py and generate.py.

Only the critic sees real images. Its update releases the sum of clipped gradients of records with noise (the Poisson-subsampled Gaussian
mechanism); the generator learns from the released critic alone, which costs no privacy: it is post-processing."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medgen import rng
from medgen.dp.card import issue
from medgen.dp.mechanism import steps_of
from medgen.dp.priced import clip_norms
from medgen.errors import MedgenError
from medgen.models.averages import averages_of, horizons, keep_counters_on_cpu, restart
from medgen.models.base import (
    Batch,
    DataShape,
    Given,
    Lot,
    Phase,
    SampleNoise,
    StepContext,
    StepReport,
    count_parameters,
    joined,
)
from medgen.models.base import Model as Family
from medgen.models.dpwgan.config import Config, SamplingSettings
from medgen.models.dpwgan.cross_record import cross_record_problem
from medgen.models.dpwgan.ledger import Ledger
from medgen.models.dpwgan.networks import Critic, Generator
from medgen.models.dpwgan.plan import Spending, check_past, spending
from medgen.models.dpwgan.records import Records, told_of
from medgen.models.dpwgan.two_pass import clipped_sum, supports
from medgen.models.settings import Settings

if TYPE_CHECKING:
    from medgen.models.dpwgan.noise import NoisyOptimizer

REPRODUCIBLE = "The noise was drawn from the spec's seed: whoever knows that can take it away again, and nothing is promised. Train with dp.noise: secret before the model is given away."
STARTED_FROM = "Training began with the weights of {}: what these were trained on is covered only as far as it was noised and is counted above, and must be public else."
DIRECTIONS = 64  # of the sliced distance
CHUNK_SLICES = 16  # computed at once: more take more memory and hardly less time


class Model(Family):
    """A DCGAN generator and a convolutional critic."""

    def __init__(self, config: Config, shape: DataShape):
        self.config, self.shape = config, shape
        self.generator = Generator(config.latent, config.features, shape.size, len(config.channels)).eval()
        self.critic = Critic(config.features, shape.size, len(config.channels))
        for layer in self.critic.convolutions[: config.frozen_critic_layers]:
            layer.requires_grad_(False)
        self.averages = averages_of(self.generator, config.ema)
        self.ledger = Ledger()

    def modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, **self.averages, "critic": self.critic, "ledger": self.ledger}

    def generator_of(self, weights: str) -> nn.Module:
        """With the weights of that name: raw, or those of an average."""
        return self.generator if weights == "raw" else self.averages[weights].ema_model

    @cached_property
    def players(self) -> dict[str, torch.optim.Optimizer]:
        keep_counters_on_cpu(self.averages)
        return {name: torch.optim.Adam(module.parameters(), self.config.lr, self.config.betas, fused=True) for name, module in (("generator", self.generator), ("critic", self.critic))}

    @cached_property
    def spending(self) -> Spending:
        """Of a whole training. Raises InputError if its budget cannot be kept."""
        return spending(self.config, self.shape.records)

    @cached_property
    def noisy_critic(self) -> NoisyOptimizer:
        """The critic's optimizer, which adds the noise to the sum of clipped gradients that it finds in `.grad`. Raises MedgenError for a critic
        whose records' gradients would not be what is clipped: then the guarantee would be void, and nothing else would tell."""
        problem = supports(self.critic) or cross_record_problem(self.critic)
        if problem is not None:
            raise MedgenError(f"this critic cannot be trained with differential privacy: {problem}")
        from medgen.models.dpwgan.noise import NoisyOptimizer

        return NoisyOptimizer(self.players["critic"], self.config.batch_size)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return self.players

    def check_start(self) -> None:
        """The averages begin anew with this training; what it began with has its place in the ledger."""
        restart(self.averages)
        if self.config.dp is not None:
            check_past(self.spending, self.ledger)

    def phases(self) -> list[Phase]:
        config, records = self.config, self.shape.records
        steps = self.spending.steps if records and config.dp is not None else config.steps
        return [Phase("all", steps * config.batch_size / max(records, 1), config.batch_size, self.shape.size, steps=steps)]

    def step(self, batch: Batch, context: StepContext) -> StepReport:
        """An update of the critic on each lot of records, then one of the generator."""
        if not batch.lots:
            raise MedgenError("this family is trained on records that are drawn for each update, not on slices in turn")
        for lot in batch.lots:
            told = self._update_critic(lot, context)
        loss = self._update_generator(batch, context)
        return StepReport({"loss": loss, **told})

    def _update_critic(self, lot: Lot, context: StepContext) -> dict[str, Tensor]:
        """Returns what may be told of it. With dp that is nothing of real images: what is not noised is not accounted for."""
        real = joined({name: tensor.flatten(0, 1) for name, tensor in lot.channels.items()}, self.config.channels)
        slices = next(iter(lot.channels.values())).shape[1]
        latent, mix = lot.normal("latent", (slices, self.config.latent)), lot.uniform("mix", slices)
        self.generator.eval()  # also after a step that was broken off
        with torch.no_grad(), context.autocast():  # in evaluation mode: batch statistics would tell each image how many others were drawn
            fake = self.generator(latent.flatten(0, 1)).to(real.dtype)
        records = Records(real.unflatten(0, (len(lot), slices)), fake.unflatten(0, (len(lot), slices)), mix)
        scale = self.config.clip_norm * self.config.clip_profile.share(lot.number)
        clip_norm = scale if self.config.dp is not None and self.config.dp.clip_norm is not None else None
        summed = clipped_sum(self.critic, records, self.config.penalty, clip_norm, context.part_size(max(1, CHUNK_SLICES // slices)))
        gradients = list(summed.gradients.values())
        context.sum(gradients)
        if self.config.dp is not None:
            self.noisy_critic.zero_grad(set_to_none=True)  # it adds up sums until they are released
        for name, parameter in self.critic.named_parameters():
            parameter.grad = summed.gradients.get(name)  # none of those that are frozen
        if self.config.dp is None:
            for gradient in gradients:
                gradient /= lot.expected
            self.players["critic"].step()
        else:
            self.noisy_critic.generator = rng.secret_generator(lot.seed, f"{lot.stream}/noise", lot.number)
            release = self.spending.release(lot.number)
            self.noisy_critic.noise_multiplier, self.noisy_critic.max_grad_norm = release.noise_multiplier, scale
            self.ledger.add(release, self.config.unit, self.config.dp.noise == "reproducible")
            self.noisy_critic.step()
        self.players["critic"].zero_grad(set_to_none=True)
        openly = told_of(summed.terms) if self.config.dp is None else {}
        return {"critic_of_fakes": self._score_of_fakes(lot), **openly}

    @torch.no_grad()
    def _score_of_fakes(self, lot: Lot) -> Tensor:
        """Of images that no real one has had a part in, by the released critic."""
        latent = rng.normal_per_sample((self.config.latent,), 0, "score", [(lot.number, place) for place in range(4)])
        score: Tensor = self.critic(self.generator(latent.to(next(self.critic.parameters()).device))).mean()
        return score

    def _update_generator(self, batch: Batch, context: StepContext) -> Tensor:
        """The same on all ranks: its batch norm must see all images, and next to the critic's updates it costs little."""
        self.generator.train()
        with context.autocast():
            scores = self.critic(self.generator(batch.normal("latent/generator", (self.config.latent,))))
        loss: Tensor = -scores.float().mean()
        loss.backward(inputs=list(self.generator.parameters()))
        self.generator.eval()
        self.players["generator"].step()
        self.players["generator"].zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.update()
        return loss.detach()

    def validate(self, batch: Batch, context: StepContext) -> StepReport:
        """`loss`: sliced Wasserstein distance between real and generated images. The critic's own judgement starts at 0, before it knows anything.

        Rabin et al., SSVM 2011, with the same directions every time. Only without dp does the loop ask for it."""
        fake = self.generator_of(self.config.preview_sampling().weights)(batch.normal("latent", (self.config.latent,))).flatten(1)
        real = joined(batch.channels, self.config.channels).flatten(1)
        directions = rng.normal_per_sample((real.shape[1],), 0, "directions", [(number,) for number in range(DIRECTIONS)]).to(real)
        directions /= directions.norm(dim=1, keepdim=True)
        sides = [(images @ directions.T).sort(dim=0).values for images in (real, fake)]
        return StepReport({"loss": (sides[0] - sides[1]).abs().mean()})

    @torch.no_grad()
    def sample(self, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        assert isinstance(settings, SamplingSettings)
        images = (self.generator_of(settings.weights)(noise.normal((self.config.latent,))) + 1) / 2
        return {name: images[:, place : place + 1].clamp(0, 1) for place, name in enumerate(self.config.channels)}

    @torch.no_grad()
    def attack_scores(self, batch: Batch) -> Tensor:
        """How real the critic finds each image: it was taught so by the training images alone.

        Hayes et al., PoPETs 2019 (LOGAN, arXiv:1705.07663), section 4.1."""
        scores: Tensor = self.critic(joined(batch.channels, self.config.channels)).float()
        return scores

    def facts(self) -> dict[str, Any]:
        """The privacy card, from what was really released."""
        config, shape, dp = self.config, self.shape, self.config.dp
        if dp is None:
            return {}
        limits = [REPRODUCIBLE] if dp.noise == "reproducible" or self.ledger.reproducible else []
        limits += [STARTED_FROM.format(config.start_from)] if config.start_from is not None else []
        last_clip_norm = None if dp.clip_decay is None else clip_norms(config, steps_of(self.spending.history))[1]
        card = issue(config.unit, shape.records, shape.most_records, self.ledger.history, config.clip_norm, self.spending.delta, tuple(limits), last_clip_norm)
        return {"privacy": card.record()}

    def describe(self, total_steps: int) -> list[str]:
        lines = [f"generator {count_parameters(self.generator):,} parameters, critic {count_parameters(self.critic):,}, {self.config.critic_steps} critic updates per generator update", *horizons(self.config.ema, total_steps)]
        if self.config.dp is None:
            return [*lines, "no differential privacy: whoever has the weights may learn who was trained on"]
        return [*lines, *(self.spending.words if self.shape.records else [])]
