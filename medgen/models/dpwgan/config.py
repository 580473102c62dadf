"""The DP-WGAN-GP family's configuration. Read by spec.py on login nodes, so nothing here imports torch.

Defaults are the published system's, except where its differential privacy guaranteed nothing; what differs says why beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    model_validator,
)

from medgen.dp.budget import TooLarge, steps_within
from medgen.dp.priced import Unit, delta_of
from medgen.dp.profile import Profile, constant, geometric
from medgen.models.adversarial import (
    GRADIENT_PENALTY,
    SCORES_OF_THE_CRITIC,
    AdversarialConfig,
    Betas,
)
from medgen.models.settings import (
    Curves,
    EmaSettings,
    RecordSampling,
    Settings,
    check_weights,
)

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec


HALVINGS = 5  # of the critic, where images are large enough
USUAL_SLICES = 4  # of a patient: more of them tell more of the patient, and cost time


def critic_depth(size: int) -> int:
    """How many convolutions judge images of so many pixels per side; each halves them."""
    return min(HALVINGS, size.bit_length() - 1)


class DpSettings(Settings):
    """What is protected, and how much of it may be learnt. Either `epsilon`, from which the noise is found, or `noise_multiplier`, or both:
    then training stops when epsilon is spent."""

    unit: Literal["patient", "slice"] = "patient"  # whose presence is hidden; slice: a patient with many slices is hardly protected
    epsilon: float | None = Field(None, gt=0, le=1000)
    delta: float | None = Field(None, gt=0, lt=1)  # default: 1 / (10 x records)
    noise_multiplier: float | None = Field(None, ge=0, le=1000)  # standard deviation of the noise over clip_norm; 0: no guarantee at all
    clip_norm: float | None = Field(1.0, gt=0)  # the longest gradient of a record; null only without noise
    # noise multiplier and clip norm in the last updates, as shares of those in the first; the clip norm's course costs nothing
    noise_decay: float | None = Field(None, ge=0.01, le=100)
    clip_decay: float | None = Field(None, ge=0.01, le=100)
    slices: int | None = Field(None, ge=1)  # of a patient, drawn at random each time; their mean loss is the record's; default 4
    # secret: from a key that only the run's folder has, until training ends. reproducible: from the spec's seed, which its readers know
    noise: Literal["secret", "reproducible"] = "secret"

    @model_validator(mode="after")
    def _consistent(self) -> DpSettings:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("write epsilon: the budget, from which the noise is found, or noise_multiplier")
        if self.clip_norm is None and self.noise_multiplier != 0:
            raise ValueError("clip_norm: null leaves the influence of a record without limit, and noise without scale; give it a number")
        if self.epsilon is not None and self.noise_multiplier == 0:
            raise ValueError("noise_multiplier: 0 spends any epsilon in its first step; leave one of them out")
        if self.noise_multiplier == 0 and self.noise_decay is not None:
            raise ValueError("noise_decay has no effect with noise_multiplier: 0, where there is no noise; remove it")
        if self.clip_norm is None and self.clip_decay is not None:
            raise ValueError("clip_decay has no effect with clip_norm: null, which clips nothing; remove it")
        for name, last_share in (("noise_decay", self.noise_decay), ("clip_decay", self.clip_decay)):
            if last_share == 1:
                raise ValueError(f"{name}: 1 has no effect: the end is as the start; remove it, or write another share, such as 0.5")
        if self.unit == "slice" and self.slices is not None:
            raise ValueError("slices has no effect with unit: slice, where a record is one slice; remove it")
        return self

    @property
    def slices_of_a_record(self) -> int:
        return 1 if self.unit == "slice" else self.slices or USUAL_SLICES


USUAL_AVERAGE: dict[str, Any] = {"beta": 0.999, "update_every": 1}  # of the generator's weights


def _usual_average(value: Any) -> Any:
    """What of it is not written is as usual in this family."""
    return {**USUAL_AVERAGE, **value} if isinstance(value, dict) else value


def _none_is_said(value: Any) -> Any:
    """What is left out comes here as None too."""
    if value is None:
        raise ValueError("say what is promised: dp: {epsilon: 8}, a budget for which the noise is found, or dp: none, which guarantees nothing")
    return None if value == "none" else value


def _none_is_written(value: DpSettings | None, settings: SerializerFunctionWrapHandler) -> Any:
    """So that the resolved form reads back."""
    return "none" if value is None else settings(value)


class Config(AdversarialConfig):
    """A DCGAN generator and a convolutional critic with gradient penalty, trained with or without differential privacy."""

    latent: int = Field(128, ge=1)
    features: int = Field(64, ge=1)  # of the widest image; doubled at every halving

    # generator updates; each comes after critic_steps updates of the critic, and each of these draws fresh records
    steps: int = Field(20_000, ge=0)  # 0: images of start_from's weights as they are
    batch_size: int = Field(32, ge=1)  # records of a critic update: the mean of a random number with dp; images of a generator update
    critic_steps: int = Field(4, ge=1)
    lr: float = Field(1e-4, gt=0)
    betas: Betas = (0.5, 0.9)
    penalty: float = Field(10.0, ge=0)

    # averages of the generator's weights, which cost no privacy; noise makes the weights themselves wander
    ema: Annotated[EmaSettings | None, BeforeValidator(_usual_average)] = EmaSettings(**USUAL_AVERAGE)
    frozen_critic_layers: int = Field(0, ge=0)  # the critic's first convolutions, which stay as start_from has them: less to add noise to

    # {epsilon: 8, delta: 1e-5}, or `none`: nothing is guaranteed. Neither is the default
    dp: Annotated[DpSettings | None, BeforeValidator(_none_is_said), WrapSerializer(_none_is_written)] = Field(None, validate_default=True)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.steps == 0 and self.start_from is None:
            raise ValueError("steps: 0 would make images of weights as chance made them; name a checkpoint in start_from, or write how many steps to train")
        if self._updates <= 1 and self.dp is not None and (self.dp.noise_decay or self.dp.clip_decay) is not None:
            raise ValueError("dp: noise_decay and clip_decay have no effect on a single update; remove them, or write more steps")
        if self.loop.micro_batch == "auto":
            raise ValueError("loop.micro_batch: auto would search for a batch, and records come in batches of chance; write how many are computed at once, or leave it out")
        if self.frozen_critic_layers and self.start_from is None:
            raise ValueError(f"frozen_critic_layers: {self.frozen_critic_layers} would leave layers as chance made them; name what they were trained to in start_from, or remove it")
        return self

    @property
    def global_batch_sizes(self) -> tuple[str, tuple[int, ...]]:
        return "batch_size", (self.batch_size,)

    @property
    def record_sampling(self) -> RecordSampling:
        if self.dp is None:
            return RecordSampling("slice", self.critic_steps, self.batch_size, 1, poisson=False, secret=False)
        return RecordSampling(self.dp.unit, self.critic_steps, self.batch_size, self.dp.slices_of_a_record, poisson=True, secret=self.dp.noise == "secret")

    # what medgen/dp must know to count: see dp/priced.py

    @property
    def unit(self) -> Unit:
        return self.dp.unit if self.dp is not None else "slice"

    @property
    def budget(self) -> float | None:
        """The epsilon after which training stops at the latest."""
        return self.dp.epsilon if self.dp is not None else None

    @property
    def epsilon(self) -> float | None:
        """The one that the noise is found for."""
        return self.budget if self.noise_multiplier is None else None

    @property
    def noise_multiplier(self) -> float | None:
        return self.dp.noise_multiplier if self.dp is not None else None

    @property
    def noise_profile(self) -> Profile:
        return self._profile(self.dp.noise_decay if self.dp is not None else None)

    @property
    def clip_profile(self) -> Profile:
        return self._profile(self.dp.clip_decay if self.dp is not None else None)

    def _profile(self, last_share: float | None) -> Profile:
        return constant(self._updates) if last_share is None else geometric(self._updates, last_share)

    @property
    def _updates(self) -> int:
        """Of the critic, if no budget ends them earlier."""
        return self.steps * self.critic_steps

    @property
    def delta(self) -> float | None:
        return self.dp.delta if self.dp is not None else None

    @property
    def clip_norm(self) -> float:
        """The scale of the noise; 1 where there is none."""
        return self.dp.clip_norm or 1.0 if self.dp is not None else 1.0

    @property
    def expected_batch(self) -> int:
        return self.batch_size

    def critic_steps_total(self, records: int) -> int:
        """As many as the steps need, or whole steps of what the budget allows with a noise that is given too."""
        wanted = self._updates
        if self.budget is None or not self.noise_multiplier:
            return wanted
        try:
            within = steps_within(self.budget, delta_of(self, records), self.batch_size / records, self.noise_multiplier, self.noise_profile)
        except TooLarge:  # of more steps than anybody takes
            return wanted
        return min(wanted, within // self.critic_steps * self.critic_steps)

    @property
    def looks_at_val(self) -> bool:
        return self.dp is None

    @property
    def weights_of_one_size(self) -> bool:
        return True

    @property
    def form(self) -> dict[str, Any]:
        return {"channels": self.channels, "latent": self.latent, "features": self.features, "ema": self.ema and tuple(self.ema.betas)}

    @property
    def curves(self) -> tuple[Curves, ...]:
        if self.dp is not None:
            return (Curves("Critic's score of generated images", "score", {"critic_of_fakes": "generated images"}, "What it says of real images is private, and is not logged."),)
        estimate = Curves("Critic's estimate of the Wasserstein distance", "score", {"wasserstein": "estimate"}, "While the critic keeps up, it falls as images get better.")
        return (SCORES_OF_THE_CRITIC, estimate, GRADIENT_PENALTY)

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        tiny: dict[str, Any] = {"latent": 4, "features": 4, "steps": 8, "batch_size": 4, "critic_steps": 2, "lr": 1e-3}
        private = {"noise_multiplier": 0.3, "noise": "reproducible"}
        ema = {"beta": 0.5, "more": [0.9], "update_after_step": 1, "update_every": 1}
        return {"plain": {**tiny, "dp": "none", "ema": ema}, "patients": {**tiny, "dp": {**private, "slices": 2}}, "slices": {**tiny, "dp": {**private, "unit": "slice"}}}

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        if self.frozen_critic_layers > critic_depth(data.size):
            raise ValueError(f"frozen_critic_layers: {self.frozen_critic_layers}, but at {data.size} px the critic has {critic_depth(data.size)} convolutions")
        if self.dp is not None and self.dp.unit == "slice" and data.window.percentiles is not None and data.window.per != "slice":
            raise ValueError("dp.unit: slice needs data.window: {percentiles: [2, 98], per: slice} or fixed: a window of the whole volume lets every slice of it depend on the others")

    def check_patients(self, patients: int) -> None:
        if self.dp is None or self.dp.unit != "patient":
            return  # slices are counted when they are made
        problem = self.record_sampling.too_few(patients)
        if problem is not None:
            raise ValueError(problem)
        try:
            delta_of(self, patients)
        except ValueError as error:
            raise ValueError(str(error)) from None

    def sampling(self, raw: dict[str, Any]) -> SamplingSettings:
        unknown = sorted(set(raw) - set(SamplingSettings.model_fields))
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; the valid keys are: {', '.join(SamplingSettings.model_fields)}")
        settings = SamplingSettings(**{"weights": "ema" if self.ema is not None else "raw", **raw})
        check_weights(settings.weights, self.ema)
        return settings

    def preview_sampling(self) -> SamplingSettings:
        return self.sampling({})


class SamplingSettings(Settings):
    """How a generate stage samples."""

    weights: str  # ema | ema_<beta> of ema.more | raw: of the generator
