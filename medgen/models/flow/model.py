"""The flow transformer: images from captions and masks along straight paths. Built by train.py and generate.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medgen.captions import LEFT_RIGHT, sides_named
from medgen.errors import InputError
from medgen.models.averages import horizons
from medgen.models.base import Batch, DataShape, Given, SampleNoise, StepContext, count_parameters, joined
from medgen.models.denoising import DenoisingModel, SampleLosses
from medgen.models.flow.config import Config, SamplingSettings
from medgen.models.flow.network import NextDiT
from medgen.models.flow.positions import AS_TRAINED, Scaling, scaling_at
from medgen.models.flow.sampling import Guidance, guided
from medgen.models.flow.text_encoder import TextEncoder, as_batch
from medgen.models.flow.tokenizer import Tokenizer
from medgen.models.settings import Settings
from medgen.models.straight_path import StraightPath, solved

NOTHING_TOLD = 1  # tokens and numbers of a caption where none is ever told


class FlowNetwork(nn.Module):
    """The encoder of captions and the transformer as one network: (images and mask [N, C, H, W], time [N], ids, valid, dropped) -> velocity.

    time: 0 clean to 1 noise, as samplers.py counts. ids, valid [N, T] and dropped [N] as of TextEncoder; None of a network without captions.
    scaling, trained_tokens: of larger images than trained, as of NextDiT."""

    def __init__(self, transformer: NextDiT, encoder: TextEncoder | None):
        super().__init__()
        self.transformer, self.encoder = transformer, encoder

    def forward(self, images: Tensor, time: Tensor, ids: Tensor | None, valid: Tensor | None, dropped: Tensor | None,
                scaling: Scaling = AS_TRAINED, trained_tokens: int | None = None) -> Tensor:  # fmt: skip
        if self.encoder is None:
            features = torch.zeros(len(images), NOTHING_TOLD, NOTHING_TOLD, device=images.device)
            words = torch.zeros(len(images), NOTHING_TOLD, dtype=torch.bool, device=images.device)
        else:
            features, words = self.encoder(ids, valid, dropped)
        velocity: Tensor = self.transformer(images, 1 - time, features, words, scaling, trained_tokens)
        return velocity


class Model(DenoisingModel):
    """A Next-DiT with its own reader of captions. The mask goes in beside the noisy image: a channel per region, and whether it is known."""

    config: Config
    network: FlowNetwork

    def __init__(self, config: Config, shape: DataShape):
        self.regions = len(shape.regions) if "mask" in config.told else 0
        mask_channels = self.regions + 1 if self.regions else 0
        self.tokenizer = Tokenizer.from_json(dict(shape.vocabulary)) if config.text is not None else None
        if config.flip and self.tokenizer is not None:
            _refuse_sides(self.tokenizer)
        encoder = TextEncoder(config.text.shape(self.tokenizer.size)) if config.text is not None and self.tokenizer is not None else None
        transformer = NextDiT(config.network.shape(len(config.images), mask_channels, config.caption_width))
        self.path = StraightPath(config.times, config.shift_of(shape.size))
        super().__init__(config, shape, FlowNetwork(transformer, encoder), self.path)

    def blocks(self) -> list[nn.Module]:
        encoder = list(self.network.encoder.blocks) if self.network.encoder is not None else []
        return [*encoder, *self.network.transformer.blocks]

    def losses(self, network: nn.Module, batch: Batch, times: Tensor, context: StepContext) -> SampleLosses:
        without: dict[str, Tensor] = {name: self._dropped(batch, name) for name in self.config.told}
        mirrored = batch.uniform("flip") < 0.5 if self.config.flip else None
        with context.autocast():
            velocity, target = self._tried(network, batch, times, without, None, mirrored)
        weight = self._weight(batch, mirrored)
        error = (velocity.float() - target).square()
        loss, squared = (error * weight).flatten(1).mean(dim=1), error.flatten(1).mean(dim=1)
        best = target.mean(dim=(0, 2, 3), keepdim=True)
        constant = ((best - target).square() * weight).flatten(1).mean(dim=1)
        return SampleLosses(loss, squared, constant, self.path.time_fraction(times))

    def squared_errors(self, network: nn.Module, batch: Batch, times: Tensor, noise: Tensor | None = None) -> Tensor:
        velocity, target = self._tried(network, batch, times, {}, noise, None)
        return (velocity.float() - target).square().flatten(1).mean(dim=1)

    def _tried(self, network: nn.Module, batch: Batch, times: Tensor, without: dict[str, Tensor], noise: Tensor | None, mirrored: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is predicted, and the velocity that it should be. without: which samples are not told it, bool [B]; mirrored: the same."""
        clean, mask = joined(batch.channels, self.config.images), self._mask(batch.channels, without.get("mask"))
        if mirrored is not None:
            clean, mask = (_mirrored(part, mirrored) for part in (clean, mask))
        noisy, target = self.path.noised(clean, batch.normal("noise", self.image_shape) if noise is None else noise, times)
        read = self._read(batch.captions, len(batch), clean.device, without.get("caption"))
        velocity: Tensor = network(torch.cat([noisy, mask], dim=1), times, *read)
        return velocity, target

    def _mask(self, channels: dict[str, Tensor], without: Tensor | None = None) -> Tensor:
        """[N, regions + 1, H, W] float32: 1 in each region, and 1 all over where the mask is known; all 0 where it is not, or left out."""
        if not self.regions:
            first = next(iter(channels.values()))
            return first.new_zeros(len(first), 0, *first.shape[2:])
        known = channels["masked"] if without is None else channels["masked"] * ~without[:, None, None, None]
        numbers = torch.arange(1, 1 + self.regions, device=known.device).view(1, -1, 1, 1)
        return torch.cat([(channels["seg"] == numbers).float() * known, known], dim=1)

    def _weight(self, batch: Batch, mirrored: Tensor | None) -> Tensor:
        """How much each pixel counts, [N, 1, H, W]."""
        if not self.config.region_weight:
            return torch.ones(len(batch), 1, 1, 1, device=batch.device)
        weight = 1 + self.config.region_weight * (batch.channels["seg"] > 0).float()
        return weight if mirrored is None else _mirrored(weight, mirrored)

    def _dropped(self, batch: Batch, name: str) -> Tensor:
        """Which samples are trained without it, bool [B], by their positions alone."""
        share = self.config.caption_dropout if name == "caption" else self.config.mask_dropout
        return batch.uniform(f"without_{name}") < (share or 0.0)

    def _read(self, captions: Sequence[str | None] | None, count: int, device: torch.device, without: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(ids, valid, dropped) of captions, on the device. Raises InputError for one that is too long."""
        if self.tokenizer is None or self.config.text is None:
            return None, None, None
        assert captions is not None and len(captions) == count
        try:
            ids, valid = as_batch(self.tokenizer, [caption or "" for caption in captions], self.config.text.max_tokens)
        except ValueError as error:
            raise InputError(str(error)) from None
        dropped = torch.tensor([caption is None for caption in captions])
        ids, valid, dropped = (part.to(device, non_blocking=True) for part in (ids, valid, dropped))
        return ids, valid, dropped if without is None else dropped | without

    def sample(self, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        return self.sample_at(self.shape.size, noise, given, settings)

    @torch.no_grad()
    def sample_at(self, size: int, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        """Images of size x size pixels, also larger than trained: positions are stretched while they are noise, and then keep their distances."""
        assert isinstance(settings, SamplingSettings)
        network, count, factor = self.weights(settings.weights).eval(), len(noise), size / self.shape.size
        trained_tokens = self.config.network.tokens(self.shape.size) if factor > 1 else None
        drawn = noise.normal((len(self.config.images), size, size))
        mask = self._mask(given.channels) if self.regions else drawn.new_zeros(count, 0, *drawn.shape[2:])
        ids, valid, dropped = self._read(given.captions, count, drawn.device)
        every = torch.ones(count, dtype=torch.bool, device=drawn.device)

        def ask(images: Tensor, time: float, caption: bool, masked: bool) -> Tensor:
            seen, times = mask if masked else torch.zeros_like(mask), torch.full((count,), time, device=images.device)
            scaling = scaling_at(1 - time, factor) if factor > 1 else AS_TRAINED
            velocity: Tensor = network(torch.cat([images, seen], dim=1), times, ids, valid, dropped if caption else every, scaling, trained_tokens)
            return velocity.float()

        guidance = Guidance(settings.guidance, settings.mask_guidance, settings.guidance_interval, settings.longest)
        shift = settings.time_shift if settings.time_shift is not None else self.config.shift_of(size)
        images = solved(guided(ask, guidance, self.regions > 0), settings.sampler, settings.steps, shift, drawn)
        images = ((images + 1) / 2).clamp(0, 1)
        return {name: images[:, place : place + 1] for place, name in enumerate(self.config.images)}

    def describe(self, total_steps: int) -> list[str]:
        config, transformer = self.config, self.network.transformer
        told = {"caption": "captions", "mask": f"masks of {', '.join(self.shape.regions)}"}
        shape, tokens = transformer.shape, config.network.tokens(self.shape.size)
        lines = [
            f"{' and '.join(told[name] for name in config.told)} -> {', '.join(config.images)}",
            f"Next-DiT of {shape.depth} blocks, {shape.width} wide, {shape.heads} heads ({shape.key_value_heads} of keys and values), {tokens} tokens of {shape.patch} x {shape.patch} px, {count_parameters(transformer):,} parameters",
        ]
        if self.network.encoder is not None and self.tokenizer is not None:
            lines.append(f"captions read by {count_parameters(self.network.encoder):,} parameters: {self.tokenizer.size:,} tokens, {len(self.tokenizer.words):,} words")
        return [*lines, f"straight paths, {config.times.replace('_', '-')} times, shifted {self.path.shift:.3g} times towards noise", *horizons(config.ema, total_steps)]


def _refuse_sides(tokenizer: Tokenizer) -> None:
    """A mirrored image of what a caption calls left is right."""
    named = sides_named(" ".join(sorted(tokenizer.words)), LEFT_RIGHT)
    if named:
        raise InputError(f"flip: captions name sides ({', '.join(named)}), which are wrong of mirrored images; remove it, or the sides from the captions")


def _mirrored(images: Tensor, which: Tensor) -> Tensor:
    """[N, C, H, W], those left to right of which it says so. 2D"""
    return torch.where(which[:, None, None, None], images.flip(-1), images)
