"""The diffusion family's configuration. Read by spec.py on login nodes, so nothing here imports torch.

Defaults reproduce the reference U-Net study; the reason stands beside each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from medgen.models import plugin
from medgen.models.diffusion.modes import MODES, Mode, find_mode
from medgen.models.diffusion.network_settings import (
    MAX_LEVELS,
    UNET_DEFAULTS,
    DiTSettings,
    check_unet,
    check_unet_size,
    refuse_unet_keys,
    with_unet_defaults,
)
from medgen.models.settings import FamilyConfig, Settings

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec

# strategy -> its samplers, the first is the default; a strategy of your own lists them in its class
SAMPLERS: dict[str, tuple[str, ...]] = {"ddpm": ("ddpm", "ddim"), "rflow": ("euler",)}
PREVIEW_STEPS = 20
DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "euler": 25}  # euler: the optimum of 40 solver settings was 23-32

AtLeastOne = Annotated[int, Field(ge=1)]


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
    """Strategy (how) x mode (what), the network, and the optimizer."""

    strategy: str = "ddpm"  # ddpm | rflow | package.module:Name
    mode: str = "bravo"  # seg | bravo | dual | package.module:Name
    epochs: float = Field(500, gt=0)
    batch_size: int = Field(16, ge=1)  # global: over all GPUs and accumulation steps

    network: Literal["unet", "dit"] = "unet"
    # of the U-Net, one per level; where one number is given it stands for all levels. Defaults: UNET_DEFAULTS
    channels: tuple[AtLeastOne, ...] | None = Field(None, min_length=1, max_length=MAX_LEVELS)
    attention: tuple[bool, ...] | None = None
    res_blocks: tuple[AtLeastOne, ...] | None = None
    head_channels: tuple[AtLeastOne | None, ...] | None = None  # null at a level without attention
    dit: DiTSettings | None = None  # S/2, B/4, ... of the paper, or {depth, width, heads, patch, qk_norm}

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

    @model_validator(mode="before")
    @classmethod
    def _keys_of_the_network(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("network", "unet") == "unet":
            return with_unet_defaults(value)
        refuse_unet_keys(value)
        return value

    @model_validator(mode="after")
    def _one_network(self) -> Config:
        if self.network == "unet":
            if self.dit is not None:
                raise ValueError("dit has no effect with network: unet; write network: dit, or remove it")
            check_unet(*self.unet_levels)
        elif self.dit is None:
            raise ValueError("network: dit needs its size: dit: S/2, or dit: {depth: 12, width: 384, heads: 6, patch: 2}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Config:
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
        unets = {f"{strategy}_{mode}": {"strategy": strategy, "mode": mode, **tiny} for strategy in SAMPLERS for mode in MODES}
        without = {key: value for key, value in tiny.items() if key not in UNET_DEFAULTS}
        small = {"depth": 2, "width": 16, "heads": 2, "patch": 4}
        return {
            **unets,
            "rflow_dual_dit": {"strategy": "rflow", "mode": "dual", **without, "network": "dit", "dit": small},
            "ddpm_seg_dit": {"strategy": "ddpm", "mode": "seg", **without, "network": "dit", "dit": {**small, "qk_norm": True}},
        }

    @property
    def unet_levels(self) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...], tuple[int | None, ...]]:
        """channels, attention, res_blocks and head_channels, one per level. Only of a U-Net."""
        assert self.channels and self.attention is not None and self.res_blocks and self.head_channels
        return self.channels, self.attention, self.res_blocks, self.head_channels

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
        if self.dit is not None:
            self.dit.check_size(data.size)
        else:
            check_unet_size(self.unet_levels[0], data.size)

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
