"""The diffusion family's configuration. Read by spec.py on login nodes, so nothing here imports torch.

Defaults reproduce the reference U-Net study; the reason stands beside each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from medgen.models import plugin
from medgen.models.denoising_settings import DenoisingConfig, DenoisingSampling
from medgen.models.diffusion.modes import MODES, Mode, find_mode
from medgen.models.diffusion.network_settings import (
    MAX_LEVELS,
    DiTSettings,
    check_unet,
    check_unet_size,
    refuse_unet_keys,
    with_unet_defaults,
)
from medgen.models.diffusion.perceptual_settings import Perceptual
from medgen.models.settings import check_weights

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec

# strategy -> its samplers, the first is the default; a strategy of your own lists them in its class
SAMPLERS: dict[str, tuple[str, ...]] = {"ddpm": ("ddpm", "ddim", "dpm_solver_2m"), "rflow": ("euler", "midpoint", "ab2", "heun")}
PREVIEW_STEPS = 20
# euler: the optimum of 40 solver settings was 23-32; midpoint and heun ask the network twice a step
DEFAULT_STEPS = {"ddpm": 1000, "ddim": 50, "dpm_solver_2m": 25, "euler": 25, "ab2": 25, "midpoint": 12, "heun": 13}
EVALUATIONS = {"midpoint": 2, "heun": 2}  # of the network per step; 1 where nothing else is said
OWN_STRATEGY = "own"
ONLY_WITH = {"ddpm": ("timesteps", "prediction", "schedule", "min_snr_gamma"), "rflow": ("times", "time_shift")}
WHY_NOT = {
    "timesteps": "whose time is continuous",
    "min_snr_gamma": "where weights by the signal-to-noise ratio have no theory: its weighting is the choice of times",
    "times": "whose steps are drawn uniformly",
}

AtLeastOne = Annotated[int, Field(ge=1)]


class SamplingSettings(DenoisingSampling):
    """How a generate stage samples."""

    time_shift: float = Field(1.0, ge=0.01, le=100)  # rflow: above 1 more steps near the noise

    @model_validator(mode="after")
    def _time_shift_has_an_effect(self) -> SamplingSettings:
        if self.time_shift != 1 and self.sampler in SAMPLERS["ddpm"]:
            raise ValueError(f"time_shift has no effect with the {self.sampler} sampler, whose times are those of training; remove it")
        return self

    @property
    def evaluations(self) -> int:
        """How many times an image asks the network, without guidance, which asks twice as often where it guides."""
        per_step = EVALUATIONS.get(self.sampler, 1)
        return self.steps * per_step - (1 if self.sampler == "heun" else 0)  # the last step of heun is Euler's


class Config(DenoisingConfig):
    """Strategy (how) x mode (what), and the network."""

    strategy: str = "ddpm"  # ddpm | rflow | package.module:Name
    mode: str = "bravo"  # seg | bravo | dual | package.module:Name

    network: Literal["unet", "dit"] = "unet"
    # of the U-Net, one per level; where one number is given it stands for all levels. Defaults: network_settings.py
    channels: tuple[AtLeastOne, ...] | None = Field(None, min_length=1, max_length=MAX_LEVELS)
    attention: tuple[bool, ...] | None = None
    res_blocks: tuple[AtLeastOne, ...] | None = None
    head_channels: tuple[AtLeastOne | None, ...] | None = None  # null at a level without attention
    dit: DiTSettings | None = None  # S/2, B/4, ... of the paper, or {depth, width, heads, patch, qk_norm}

    condition_dropout: float = Field(0.0, ge=0, lt=1)  # share of samples trained without their condition, for guidance
    perceptual: Perceptual | None = None  # radimagenet | alex | vgg | squeeze: a loss on the predicted clean image, beside the squared error

    timesteps: int | None = Field(None, ge=2, le=100_000)  # ddpm; default 1000
    prediction: Literal["epsilon", "v"] | None = None  # ddpm; default epsilon
    schedule: Literal["cosine", "linear"] | None = None  # ddpm; default cosine
    min_snr_gamma: float | None = Field(None, gt=0)  # ddpm; 5 in the paper; default: every time counts alike
    times: Literal["logit_normal", "uniform"] | None = None  # rflow; default logit_normal
    time_shift: float = Field(1.0, ge=0.01, le=100)  # rflow: above 1 trains and samples more near the noise

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
        if value["network"] == "dit":  # what is no network at all is told by its own check
            refuse_unet_keys(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_perceptual_loss_of_masks(cls, value: Any) -> Any:
        """Before the weights are looked for, which nobody should fetch in vain."""
        if not isinstance(value, dict) or value.get("perceptual") is None or not isinstance(value.get("mode"), str):
            return value
        try:
            kind = find_mode(value["mode"]).output_kind()
        except ValueError:
            return value  # told by the mode's own check
        if kind == "mask":
            raise ValueError(f"perceptual: mode {value['mode']} makes masks, and the networks know images; remove it")
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
        self._refuse_keys_of_the_other_strategy()
        if self.condition_dropout and not self.mode_class.conditions:
            raise ValueError(f"condition_dropout has no effect in mode {self.mode}, which has no condition; remove it")
        return self

    @model_validator(mode="after")
    def _perceptual_can_be_had(self) -> Config:
        if self.perceptual is None:
            return self
        if plugin.is_plugin(self.strategy):
            from medgen.models.diffusion.perceptual import why_not
            from medgen.models.diffusion.strategies import make_strategy

            problem = why_not(make_strategy(self))
            if problem is not None:
                raise ValueError(f"perceptual: {problem}")
        return self

    def _refuse_keys_of_the_other_strategy(self) -> None:
        other = {"ddpm": "rflow", "rflow": "ddpm"}.get(self.strategy_kind)
        for name in ONLY_WITH[other] if other else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                why = f", {WHY_NOT[name]}" if name in WHY_NOT else ""
                raise ValueError(f"{name} has no effect with strategy {self.strategy}{why}; remove it")

    @property
    def strategy_kind(self) -> str:
        """ddpm or rflow, which a strategy of one's own may descend from; "own" if it does from neither."""
        if not plugin.is_plugin(self.strategy):
            return self.strategy
        from medgen.models.diffusion.strategies import STRATEGIES, Strategy

        found = plugin.load(self.strategy, Strategy)
        return next((name for name, known in STRATEGIES.items() if issubclass(found, known)), OWN_STRATEGY)

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        ema = {"beta": 0.9, "update_after_step": 1, "update_every": 1}
        shared = {"epochs": 2, "batch_size": 4, "warmup_epochs": 1, "ema": ema}
        tiny = {**shared, "channels": [8, 16], "attention": [False, True], "head_channels": 8}
        everything = {f"{strategy}_{mode}": {"strategy": strategy, "mode": mode, **tiny} for strategy in SAMPLERS for mode in MODES}
        v = {"prediction": "v", "min_snr_gamma": 5.0, "schedule": "linear", "condition_dropout": 0.2}
        averages = {"ema": {**ema, "more": [0.5]}}
        transformer = {**shared, "network": "dit", "dit": {"depth": 2, "width": 16, "heads": 2, "patch": 4, "qk_norm": True}}
        return {
            **everything,
            "ddpm_bravo_v": {**everything["ddpm_bravo"], **v, **averages},
            "rflow_bravo_raw": {**everything["rflow_bravo"], "ema": None},
            "rflow_dual_dit": {"strategy": "rflow", "mode": "dual", **transformer},
            "ddpm_bravo_v_dit": {"strategy": "ddpm", "mode": "bravo", **v, **transformer},
        }

    @property
    def unet_levels(self) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...], tuple[int | None, ...]]:
        """channels, attention, res_blocks and head_channels, one per level. Only of a U-Net."""
        assert self.channels and self.attention is not None and self.res_blocks and self.head_channels
        return self.channels, self.attention, self.res_blocks, self.head_channels

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

    def trains_positive_only(self, data: DataSpec) -> bool:
        return self.mode_class.positive_only or data.positive_only

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        if self.dit is not None:
            self.dit.check_size(data.size)
        else:
            check_unet_size(self.unet_levels[0], data.size)
        if self.perceptual is not None:
            self.perceptual.check_size(data.size)

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
        usual = {"steps": DEFAULT_STEPS.get(sampler, 50), "time_shift": self.time_shift, "weights": "ema" if self.ema is not None else "raw"}
        settings = SamplingSettings(**{"sampler": sampler, **usual, **raw})
        self._check_sampling(settings)
        return settings

    def _check_sampling(self, settings: SamplingSettings) -> None:
        """Raises ValueError for what this training cannot give."""
        if self.strategy_kind == "ddpm" and settings.steps > (self.timesteps or 1000):
            raise ValueError(f"steps: {settings.steps} is more than the {self.timesteps or 1000} timesteps trained")
        if settings.guidance != 1 and not self.condition_dropout:
            raise ValueError("guidance needs a training with condition_dropout (0.1, say): this one never saw images without their condition")
        check_weights(settings.weights, self.ema)

    def preview_sampling(self) -> SamplingSettings:
        sampler = "ddim" if self.strategy_kind == "ddpm" and "ddim" in self.samplers else self.samplers[0]
        return self.sampling({"sampler": sampler, "steps": min(PREVIEW_STEPS, self.timesteps or PREVIEW_STEPS)})
