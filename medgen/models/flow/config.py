"""The configuration of the flow transformer: images from captions and masks. Read by spec.py on login nodes, so nothing here imports torch.

Defaults follow Lumina-Next (arXiv:2406.18583) and what has been found since; what differs says why beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from medgen.models.denoising_settings import DenoisingConfig, DenoisingSampling
from medgen.models.diffusion.config import DEFAULT_STEPS, EVALUATIONS
from medgen.models.flow.network_settings import TextSettings, TransformerSettings
from medgen.models.flow.tokenizer import Tokenizer
from medgen.models.settings import check_weights
from medgen.names import ChannelName

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec

FLOW_SAMPLERS = ("midpoint", "ab2", "euler", "heun")  # the first is the default: at 24 to 50 evaluations Euler's error is ten times as large
SHIFT_AT = {256: 0.5, 4096: 1.15}  # logarithm of the shift by tokens of an image (Esser et al. 2024, arXiv:2403.03206, section 5.3.2, and its successors)
PREVIEW_STEPS = 10

Told = Literal["caption", "mask"]


class SamplingSettings(DenoisingSampling):
    """How a generate stage samples. `guidance` is by the caption, `mask_guidance` by the mask."""

    mask_guidance: float = Field(1.0, ge=0)
    longest: float | None = Field(None, gt=0)  # guided velocities are at most so many times as long as those without guidance
    time_shift: float | None = Field(None, ge=0.01, le=100)  # above 1 more steps near the noise; default: that of training

    @property
    def guides(self) -> bool:
        return self.guidance != 1 or self.mask_guidance != 1

    @model_validator(mode="after")
    def _longest_has_an_effect(self) -> SamplingSettings:
        if self.longest is not None and not self.guides:
            raise ValueError("longest has no effect without guidance; remove it")
        return self

    @property
    def evaluations(self) -> int:
        """How many times an image asks the network, where all that guides does so at every step."""
        solver = self.steps * EVALUATIONS.get(self.sampler, 1) - (1 if self.sampler == "heun" else 0)
        return solver * (1 + (self.guidance != 1) + (self.mask_guidance != 1))


class Config(DenoisingConfig):
    """Images from captions and masks: what is made and told, the networks, the path, and what is left out for guidance."""

    images: tuple[ChannelName, ...] = Field(("image",), min_length=1)  # channels that are made together: one, or red, green and blue
    told: tuple[Told, ...] = Field(("caption", "mask"), min_length=1)

    network: TransformerSettings = TransformerSettings.model_validate("tiny/8")
    text: TextSettings | None = None  # default where captions are told: 4 blocks of 384, 128 tokens

    weight_decay: float = Field(0.0, ge=0)  # none, as published

    times: Literal["logit_normal", "uniform"] = "logit_normal"
    time_shift: float | None = Field(None, ge=0.01, le=100)  # above 1 trains more near the noise; default: by the tokens of an image, 1 below 256

    # shares of samples that are trained without it, each by itself; guidance needs them
    caption_dropout: float | None = Field(None, ge=0, lt=1)  # default 0.1 where it is told
    mask_dropout: float | None = Field(None, ge=0, lt=1)  # the same
    region_weight: float = Field(0.0, ge=0, le=100)  # pixels of a region count so many times more than others: small ones are few pixels
    flip: bool = False  # half of the samples mirrored, left to right, mask and image alike

    @model_validator(mode="before")
    @classmethod
    def _usual_of_what_is_told(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        told = value.get("told", cls.model_fields["told"].default)
        if not isinstance(told, list | tuple):
            return value  # told by its own check
        usual: dict[str, Any] = {f"{name}_dropout": 0.1 for name in ("caption", "mask") if name in told}
        usual |= {"text": {}} if "caption" in told else {}
        return {**value, **{key: default for key, default in usual.items() if value.get(key) is None}}

    @field_validator("images", "told")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{list(value)} names one twice; name each once")
        return value

    @field_validator("images")
    @classmethod
    def _no_masks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in ("seg", "masked"):
            if name in value:
                raise ValueError(f"{name!r} is what images are made from; name channels of data.images")
        return value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Config:
        untold = [("caption", "text", self.text), ("caption", "caption_dropout", self.caption_dropout), ("mask", "mask_dropout", self.mask_dropout),
                  ("mask", "region_weight", self.region_weight or None)]  # fmt: skip
        for name, knob, value in untold:
            if value is not None and name not in self.told:
                raise ValueError(f"{knob} has no effect: the {name} is not told; remove it, or write told: [{', '.join((*self.told, name))}]")
        self.network.shape(len(self.images), 0, self.caption_width)
        return self

    @property
    def caption_width(self) -> int:
        """Numbers per token of a caption's features."""
        return self.text.width if self.text is not None else 1

    @property
    def output_kind(self) -> Literal["image", "mask"]:
        return "image"

    @property
    def output_channels(self) -> tuple[str, ...]:
        return self.images

    @property
    def input_channels(self) -> tuple[str, ...]:
        return (*self.images, "seg", "masked") if "mask" in self.told else self.images

    @property
    def uses_captions(self) -> bool:
        return "caption" in self.told

    def vocabulary(self, captions: Sequence[str], others: Sequence[str] = ()) -> dict[str, Any]:
        assert self.text is not None
        tokenizer = Tokenizer.built(captions, self.text.vocabulary)
        for caption in sorted({*captions, *others}):
            tokenizer.encode(caption, self.text.max_tokens)
        return tokenizer.to_json()

    @property
    def takes_regions(self) -> bool:
        return True

    @property
    def form(self) -> dict[str, Any]:
        names = ("images", "told", "network", "text")
        return {**{name: getattr(self, name) for name in names}, "ema": self.ema and tuple(self.ema.betas)}

    def shift_of(self, size: int) -> float:
        """How far the times of training are moved towards noise: more tokens say more of each other, and need more of it."""
        return self.time_shift if self.time_shift is not None else usual_shift(self.network.tokens(size))

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        self.network.check_size(data.size)

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        ema = {"beta": 0.9, "update_after_step": 1, "update_every": 1}
        network = {"depth": 2, "width": 16, "heads": 2, "key_value_heads": 1, "patch": 4}
        text = {"vocabulary": 300, "width": 8, "depth": 1, "heads": 2, "max_tokens": 64}
        tiny = {"epochs": 2, "batch_size": 4, "warmup_epochs": 1, "lr": 1e-3, "ema": ema, "network": network}
        return {
            "caption_mask": {**tiny, "text": text, "mask_dropout": 0.2, "region_weight": 2.0, "ema": {**ema, "more": [0.5]}},
            "caption_flip": {**tiny, "text": text, "told": ["caption"], "flip": True, "times": "uniform"},
            "mask_pair": {**tiny, "told": ["mask"], "images": ["first", "second"], "time_shift": 2.0, "ema": None},
        }

    def sampling(self, raw: dict[str, Any]) -> SamplingSettings:
        unknown = sorted(set(raw) - set(SamplingSettings.model_fields))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; the valid keys are: {', '.join(SamplingSettings.model_fields)}")
        sampler = raw.get("sampler", FLOW_SAMPLERS[0])
        if sampler not in FLOW_SAMPLERS:
            raise ValueError(f"sampler: {sampler!r} does not fit straight paths; use one of: {', '.join(FLOW_SAMPLERS)}")
        settings = SamplingSettings(**{"sampler": sampler, "steps": DEFAULT_STEPS[sampler], "weights": "ema" if self.ema is not None else "raw", **raw})
        self._check_sampling(settings)
        return settings

    def _check_sampling(self, settings: SamplingSettings) -> None:
        """Raises ValueError for what this training cannot give."""
        for key, name, scale, dropout in (("guidance", "caption", settings.guidance, self.caption_dropout), ("mask_guidance", "mask", settings.mask_guidance, self.mask_dropout)):
            if scale == 1:
                continue
            if name not in self.told:
                raise ValueError(f"{key} has no effect: this training is not told the {name} (told: [{', '.join(self.told)}]); remove it")
            if not dropout:
                raise ValueError(f"{key} needs a training with {name}_dropout (0.1, say): this one never saw images without their {name}")
        check_weights(settings.weights, self.ema)

    def preview_sampling(self) -> SamplingSettings:
        return self.sampling({"steps": PREVIEW_STEPS})


def usual_shift(tokens: int) -> float:
    """Its logarithm rises linearly with the tokens of an image; 1 below the fewest that it was found for."""
    (few, low), (many, high) = SHIFT_AT.items()
    return 1.0 if tokens < few else math.exp(low + (high - low) * (tokens - few) / (many - few))
