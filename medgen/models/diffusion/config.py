"""The diffusion family's configuration. Read by spec.py on login nodes, so nothing here imports torch.

Defaults reproduce the reference U-Net study; the reason stands beside each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from medgen.models import plugin
from medgen.models.diffusion.modes import MODES, Mode, find_mode
from medgen.models.settings import FamilyConfig, Offer, Settings

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec

# strategy -> its samplers, the first is the default; a strategy of your own lists them in its class
SAMPLERS: dict[str, tuple[str, ...]] = {"ddpm": ("ddpm", "ddim"), "rflow": ("euler",)}
PREVIEW_STEPS = 20
DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "euler": 25}  # euler: the optimum of 40 solver settings was 23-32


class EmaSettings(Settings):
    """ema-pytorch's knobs. The decay ramps up as 1 - (1 + n)^(-2/3); the log states the horizon really reached."""

    beta: float = Field(0.9999, gt=0, lt=1)
    update_after_step: int = Field(100, ge=0)
    update_every: int = Field(10, ge=1)


class SamplingSettings(Settings):
    """How a generate stage samples."""

    sampler: str
    steps: int = Field(ge=1)
    eta: float = Field(0.0, ge=0, le=1)  # ddim: 0 deterministic, 1 as noisy as ddpm

    @model_validator(mode="after")
    def _eta_has_an_effect(self) -> SamplingSettings:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta has no effect with the {self.sampler} sampler; remove it")
        return self


class Config(FamilyConfig):
    """Strategy (how) x mode (what), the U-Net, and the optimizer."""

    offers: ClassVar[frozenset[Offer]] = frozenset({"blocks", "compile", "spike_guard", "constant_loss"})

    strategy: str = "ddpm"  # ddpm | rflow | package.module:Name
    mode: str = "bravo"  # seg | bravo | dual | package.module:Name
    epochs: float = Field(500, gt=0)
    batch_size: int = Field(16, ge=1)  # global: over all GPUs and accumulation steps

    channels: tuple[int, ...] = (128, 256, 256)
    attention: tuple[bool, ...] = (False, True, True)  # full resolution attends too slowly to pay
    res_blocks: int = Field(1, ge=1)
    head_channels: int = Field(256, ge=1)  # one head at the default widths

    lr: float = Field(1e-4, gt=0)
    lr_min: float = Field(1e-6, gt=0)
    warmup_epochs: float = Field(5, ge=0)  # linear from 0.1 x lr, then cosine to lr_min
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema: EmaSettings = EmaSettings()

    timesteps: int | None = Field(None, ge=2)  # ddpm; default 1000
    times: Literal["logit_normal", "uniform"] | None = None  # rflow; default logit_normal

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        if not plugin.is_plugin(value) and value not in SAMPLERS:
            raise ValueError(f"unknown strategy {value!r}; the strategies are: {', '.join(SAMPLERS)}, or package.module:Name of your own")
        if plugin.is_plugin(value):
            from medgen.models.diffusion.strategies import Strategy

            plugin.load(value, Strategy)
        return value

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        find_mode(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention has {len(self.attention)} levels, channels has {len(self.channels)}; give one per level")
        for width, attends in zip(self.channels, self.attention, strict=True):
            if attends and width % self.head_channels:
                raise ValueError(f"head_channels: {self.head_channels} does not divide the {width} channels of an attention level")
        if self.timesteps is not None and self.strategy == "rflow":
            raise ValueError("timesteps has no effect with strategy rflow, whose time is continuous; remove it")
        if self.times is not None and self.strategy == "ddpm":
            raise ValueError("times has no effect with strategy ddpm, whose steps are drawn uniformly; remove it")
        if self.lr_min > self.lr:
            raise ValueError(f"lr_min: {self.lr_min:g} is above lr: {self.lr:g}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs:g} must be below epochs: {self.epochs:g}")
        return self

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        tiny = {"epochs": 2, "batch_size": 4, "channels": [8, 16], "attention": [False, True], "head_channels": 8, "warmup_epochs": 1,
                "ema": {"beta": 0.9, "update_after_step": 1, "update_every": 1}}
        return {f"{strategy}_{mode}": {"strategy": strategy, "mode": mode, **tiny} for strategy in SAMPLERS for mode in MODES}

    @property
    def global_batch_sizes(self) -> tuple[str, tuple[int, ...]]:
        return "batch_size", (self.batch_size,)

    @property
    def mode_class(self) -> type[Mode]:
        return find_mode(self.mode)

    @property
    def output_kind(self) -> Literal["image", "mask"]:
        return self.mode_class.output_kind()

    @property
    def output_channels(self) -> tuple[str, ...]:
        return self.mode_class.targets

    @property
    def input_channels(self) -> tuple[str, ...]:
        return (*self.mode_class.targets, *self.mode_class.conditions)

    @property
    def attackable(self) -> bool:
        return True

    def trains_positive_only(self, data: DataSpec) -> bool:
        return self.mode_class.positive_only or data.positive_only

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        factor = 2 ** (len(self.channels) - 1)
        if data.size % factor:
            raise ValueError(f"a U-Net of {len(self.channels)} levels needs data.size divisible by {factor}, got {data.size}")

    @property
    def samplers(self) -> tuple[str, ...]:
        if plugin.is_plugin(self.strategy):
            from medgen.models.diffusion.strategies import Strategy

            return tuple(plugin.load(self.strategy, Strategy).samplers)
        return SAMPLERS[self.strategy]

    def sampling(self, raw: dict[str, Any]) -> SamplingSettings:
        unknown = sorted(set(raw) - set(SamplingSettings.model_fields))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; the valid keys are: {', '.join(SamplingSettings.model_fields)}")
        sampler = raw.get("sampler", self.samplers[0])
        if sampler not in self.samplers:
            raise ValueError(f"sampler: {sampler!r} does not fit strategy {self.strategy}; use one of: {', '.join(self.samplers)}")
        settings = SamplingSettings(**{"sampler": sampler, "steps": DEFAULT_STEPS.get(sampler, 50), **raw})
        if self.strategy == "ddpm" and settings.steps > (self.timesteps or 1000):
            raise ValueError(f"steps: {settings.steps} is more than the {self.timesteps or 1000} timesteps trained")
        return settings

    def preview_sampling(self) -> SamplingSettings:
        return self.sampling({"sampler": "ddim" if self.strategy == "ddpm" else self.samplers[0], "steps": PREVIEW_STEPS})
