"""The configuration of the semantic diffusion family. Read by spec.py on login nodes, so nothing here imports torch.

Defaults are the published system's (Wang et al. 2022, arXiv:2207.00050) and that of its cardiac successors; what differs says why beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from medgen.models.denoising_settings import DenoisingConfig, DenoisingSampling
from medgen.models.diffusion.config import DEFAULT_STEPS, PREVIEW_STEPS, SAMPLERS
from medgen.models.sdm.network_shape import MULTIPLIERS, NetworkShape, attention_at
from medgen.models.settings import Curves, Respacing, check_weights
from medgen.names import ChannelName

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec

BOUND_WEIGHT = 0.001  # lambda of Nichol & Dhariwal 2021 (arXiv:2102.09672, eq. 16), of the bound summed over all times
USUAL_DROPOUT = 0.1  # of the kind and the size: enough for guidance, at a tenth of the training
LEAST_KINDS = 2  # that can be told apart
OUTSIDE_AND_PADDING = 2  # classes of the label map beside the regions: no region, and no image

Told = Literal["kind", "size"]


class SamplingSettings(DenoisingSampling):
    """How a generate stage samples. `guidance` is by the label map; the others are by what is told beside it."""

    kind_guidance: float = Field(1.0, ge=0)
    size_guidance: float = Field(1.0, ge=0)

    @property
    def guides(self) -> bool:
        return any(scale != 1 for scale in (self.guidance, self.kind_guidance, self.size_guidance))

    @property
    def evaluations(self) -> int:
        """How many times an image asks the network, where all that guides does so at every step."""
        return self.steps * (1 + sum(scale != 1 for scale in (self.guidance, self.kind_guidance, self.size_guidance)))


class Config(DenoisingConfig):
    """Images from label maps: what is made and told, the network, the process, and what is left out for guidance."""

    images: tuple[ChannelName, ...] = Field(("image",), min_length=1)  # channels that are made together
    # beside the label map. kind: the class of each image, such as T1 and T2 maps; size: its spacing and field of view
    told: tuple[Told, ...] = ("kind", "size")

    weight_decay: float = Field(0.0, ge=0)  # none, as published

    channels: int = Field(64, ge=1)  # 46 million parameters at 128 px; published are 256, with 652 million at 256 px
    # per level; default: the published ones of data.size, and attention where features have 32 px per side or fewer
    multipliers: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, min_length=1)
    attention: tuple[bool, ...] | None = None
    res_blocks: int = Field(2, ge=1)  # per level of the encoder; the decoder has one more
    head_channels: int = Field(64, ge=1)
    spade_channels: int = Field(128, ge=1)  # between the label map and each scale and shift
    head_order: Literal["legacy", "new"] = "new"  # as the cardiac weights have it; legacy: those of the first paper

    timesteps: int = Field(1000, ge=2, le=100_000)
    schedule: Literal["cosine", "linear"] = "cosine"
    # published is epsilon, which needs a long training: at the last times of the cosine an image says nothing of what noise is in it
    prediction: Literal["epsilon", "v"] = "v"
    min_snr_gamma: float | None = Field(None, gt=0)  # 5 in its paper; default: every time counts alike
    bound_weight: float = Field(BOUND_WEIGHT, gt=0)  # of what teaches the variance: at 1000 timesteps the bits of a step count once

    # shares of samples that are trained without it, each by itself; guidance needs them
    mask_dropout: float = Field(0.1, ge=0, lt=1)
    kind_dropout: float | None = Field(None, ge=0, lt=1)  # default 0.1 where it is told
    size_dropout: float | None = Field(None, ge=0, lt=1)

    respacing: Respacing | None = None  # images at other spacings too, or spacing is known by the image's rows and columns

    @model_validator(mode="before")
    @classmethod
    def _usual_dropout_of_what_is_told(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        told = value.get("told", cls.model_fields["told"].default)
        if not isinstance(told, list | tuple):
            return value  # told by its own check
        filled = {name: USUAL_DROPOUT for name in ("kind_dropout", "size_dropout") if name.partition("_")[0] in told and value.get(name) is None}
        return {**value, **filled}

    @field_validator("images", "told")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{list(value)} names one twice; name each once")
        return value

    @field_validator("images")
    @classmethod
    def _no_masks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in ("seg", "valid"):
            if name in value:
                raise ValueError(f"{name!r} is what images are made from; name channels of data.images")
        return value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Config:
        for name, share in (("kind", self.kind_dropout), ("size", self.size_dropout)):
            if share is not None and name not in self.told:
                raise ValueError(f"{name}_dropout has no effect: the {name} is not told; remove it, or write told: [{', '.join((*self.told, name))}]")
        if self.respacing is not None and "size" not in self.told:
            raise ValueError(f"respacing has no effect where the size is not told: what is learned of spacing could not be asked for; remove it, or write told: [{', '.join((*self.told, 'size'))}]")
        if self.attention is not None and self.multipliers is None:
            raise ValueError("attention is per level, and the levels are those of multipliers: write multipliers too, or neither")
        if self.multipliers is not None:
            self._shape_of(self.multipliers, self.attention or (False,) * len(self.multipliers))
        return self

    @property
    def output_kind(self) -> Literal["image", "mask"]:
        return "image"

    @property
    def output_channels(self) -> tuple[str, ...]:
        return self.images

    @property
    def input_channels(self) -> tuple[str, ...]:
        return (*self.images, "seg", "valid")

    @property
    def uses_labels(self) -> bool:
        return "kind" in self.told

    @property
    def uses_sizes(self) -> bool:
        return "size" in self.told

    @property
    def takes_regions(self) -> bool:
        return True

    @property
    def respaces(self) -> Respacing | None:
        return self.respacing

    @property
    def weights_of_one_size(self) -> bool:
        """Unless the levels are written, data.size decides them."""
        return self.multipliers is None or self.attention is None

    @property
    def form(self) -> dict[str, Any]:
        names = ("images", "told", "channels", "multipliers", "attention", "res_blocks", "head_channels", "spade_channels", "head_order")
        return {**{name: getattr(self, name) for name in names}, "ema": self.ema and tuple(self.ema.betas)}

    @property
    def curves(self) -> tuple[Curves, ...]:
        return (Curves("Parts of the loss", "per number", {"mse": "squared error", "bits": "bits of a step"},
                       "The bits say how well the variance of a step is known; they rise where the squared error does, and by themselves only if the variance is learned badly."),)  # fmt: skip

    def network_shape(self, size: int, regions: int, kinds: int) -> NetworkShape:
        """Of the network for images of size x size pixels. Raises ValueError, naming the knob, where there is none.

        kinds: classes in the data, of no effect where the kind is not told."""
        multipliers = self.multipliers or MULTIPLIERS.get(size)
        if multipliers is None:
            raise ValueError(f"multipliers: the published ones are of {', '.join(map(str, sorted(MULTIPLIERS)))} px, and data.size is {size}; write them, one per level, such as [1, 1, 2, 3, 4]")
        shape = self._shape_of(multipliers, self.attention or attention_at(size, len(multipliers)), regions + OUTSIDE_AND_PADDING, kinds if "kind" in self.told else 0)
        if size % shape.factor:
            raise ValueError(f"multipliers: a network of {len(multipliers)} levels needs data.size divisible by {shape.factor}, got {size}")
        shape.check_size(size, size)
        return shape

    def _shape_of(self, multipliers: tuple[float, ...], attention: tuple[bool, ...], classes: int = OUTSIDE_AND_PADDING, kinds: int = 0) -> NetworkShape:
        return NetworkShape(
            classes=classes, image_channels=len(self.images), channels=self.channels, multipliers=multipliers, attention=attention, res_blocks=self.res_blocks,
            head_channels=self.head_channels, head_order=self.head_order, spade_channels=self.spade_channels, kinds=kinds, sizes="size" in self.told,
        )  # fmt: skip

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        if "kind" in self.told and data.types is not None and len(data.types) < LEAST_KINDS:
            raise ValueError(self.too_few_kinds(tuple(data.types)))
        self.network_shape(data.size, 1, LEAST_KINDS)

    def too_few_kinds(self, classes: tuple[str, ...]) -> str:
        """What is wrong with such data where the kind is told, in words."""
        others = [name for name in self.told if name != "kind"]
        found = f"all images are of the class {classes[0]}" if classes else "the images have no classes"
        return f"told: kind has no effect, since {found}; write told: [{', '.join(others)}]"

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        ema = {"beta": 0.9, "update_after_step": 1, "update_every": 1}
        network = {"channels": 8, "multipliers": [1, 2], "attention": [False, True], "res_blocks": 1, "head_channels": 8, "spade_channels": 8}
        tiny = {"epochs": 2, "batch_size": 4, "warmup_epochs": 1, "lr": 1e-3, "ema": ema, **network}
        return {
            "told_v": {**tiny, "mask_dropout": 0.2, "min_snr_gamma": 5.0, "ema": {**ema, "more": [0.5]}},
            "plain": {**tiny, "told": [], "prediction": "epsilon", "schedule": "linear", "mask_dropout": 0.0, "ema": None},
            "size_pair": {**tiny, "told": ["size"], "images": ["first", "second"], "head_order": "legacy"},
        }

    def sampling(self, raw: dict[str, Any]) -> SamplingSettings:
        unknown = sorted(set(raw) - set(SamplingSettings.model_fields))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; the valid keys are: {', '.join(SamplingSettings.model_fields)}")
        samplers = SAMPLERS["ddpm"]
        sampler = raw.get("sampler", samplers[0])
        if sampler not in samplers:
            raise ValueError(f"sampler: {sampler!r} does not fit discrete times; use one of: {', '.join(samplers)}")
        usual = {"sampler": sampler, "steps": min(DEFAULT_STEPS[sampler], self.timesteps), "weights": "ema" if self.ema is not None else "raw"}
        settings = SamplingSettings(**{**usual, **raw})
        self._check_sampling(settings)
        return settings

    def _check_sampling(self, settings: SamplingSettings) -> None:
        """Raises ValueError for what this training cannot give."""
        if settings.steps > self.timesteps:
            raise ValueError(f"steps: {settings.steps} is more than the {self.timesteps} timesteps trained")
        scales = {"guidance": ("mask", settings.guidance), "kind_guidance": ("kind", settings.kind_guidance), "size_guidance": ("size", settings.size_guidance)}
        for key, (name, scale) in scales.items():
            if scale == 1:
                continue
            if name != "mask" and name not in self.told:
                raise ValueError(f"{key} has no effect: this training is not told the {name} (told: [{', '.join(self.told)}]); remove it")
            if not getattr(self, f"{name}_dropout"):
                raise ValueError(f"{key} needs a training with {name}_dropout (0.1, say): this one never saw images without their {name}")
        check_weights(settings.weights, self.ema)

    def preview_sampling(self) -> SamplingSettings:
        return self.sampling({"sampler": "ddim", "steps": min(PREVIEW_STEPS, self.timesteps)})
