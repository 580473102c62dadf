"""What the configurations of families share that train one network to denoise. Base of diffusion's and sdm's config.py; no torch here."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from medgen.models.settings import EmaSettings, FamilyConfig, Offer, SteppedSampling


class DenoisingSampling(SteppedSampling):
    """How a generate stage samples. Times are shares of the way from clean (0) to noise (1)."""

    sampler: str
    eta: float = Field(0.0, ge=0, le=1)  # ddim: 0 deterministic, 1 as noisy as ddpm
    guidance: float = Field(1.0, ge=0)  # classifier-free: 1 as trained, above 1 more of what the condition asks for
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which it guides
    weights: str = "ema"  # ema | ema_<beta> of ema.more | raw

    @property
    def guides(self) -> bool:
        return self.guidance != 1

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> DenoisingSampling:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta has no effect with the {self.sampler} sampler; remove it")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval: times lie in 0 to 1 and rise, got [{low:g}, {high:g}]")
        if not self.guides and (low, high) != (0.0, 1.0):
            raise ValueError("guidance_interval has no effect with guidance: 1; remove it")
        return self


class DenoisingConfig(FamilyConfig):
    """One network, AdamW, and averages of the weights; the learning rate rises in a warm-up and falls in a cosine."""

    offers: ClassVar[frozenset[Offer]] = frozenset({"blocks", "compile", "spike_guard", "constant_loss"})

    epochs: float = Field(500, gt=0)
    batch_size: int = Field(16, ge=1)  # global: over all GPUs and accumulation steps

    lr: float = Field(1e-4, gt=0)
    lr_min: float = Field(1e-6, gt=0)
    warmup_epochs: float = Field(5, ge=0)  # linear from 0.1 x lr, then cosine to lr_min
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema: EmaSettings | None = EmaSettings()  # null: none, the weights themselves are sampled

    @model_validator(mode="after")
    def _learning_rate_rises_and_falls(self) -> DenoisingConfig:
        if self.find_lr is None and self.lr_min > self.lr:
            raise ValueError(f"lr_min: {self.lr_min:g} is above lr: {self.lr:g}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs:g} must be below epochs: {self.epochs:g}")
        return self

    @property
    def global_batch_sizes(self) -> tuple[str, tuple[int, ...]]:
        return "batch_size", (self.batch_size,)

    @property
    def attackable(self) -> bool:
        """By how well an image is denoised."""
        return True
