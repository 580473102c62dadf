"""The PACGAN family's configuration. Read by spec.py on login nodes, so nothing here imports torch.

Defaults are the published system's (Lai et al., Scientific Reports 2025); what differs says why beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from medgen.models.adversarial import (
    GRADIENT_PENALTY,
    SCORES_OF_THE_CRITIC,
    AdversarialConfig,
    Betas,
)
from medgen.models.settings import Curves, Settings

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec

FIRST_SIZE = 4  # pixels per side of the first phase; each phase doubles it
FACTORS = (1.0, 1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
PER_PHASE: dict[str, tuple[float, ...]] = {  # what the published system trains 4, 8, ... 256 px with
    "epochs": (100.0,) * 7, "batch_sizes": (32, 32, 32, 16, 16, 16, 16), "critic_iterations": (1, 1, 1, 1, 1, 2, 2),
}  # fmt: skip


class SamplingSettings(Settings):
    """How a generate stage samples: there is nothing to choose. The size is that of the checkpoint's phase."""


class Config(AdversarialConfig):
    """Generator and critic, grown from 4 pixels; one entry per phase in the tuples."""

    in_channels: int = Field(512, ge=8)
    factors: tuple[float, ...] = Field(FACTORS, min_length=1)  # of in_channels, per phase
    latent: int = Field(512, ge=1)
    embedding: int = Field(3, ge=1)  # numbers that stand for a class beside the latent ones

    epochs: tuple[float, ...]  # 0: that size is left to start_from
    batch_sizes: tuple[int, ...]  # global: over all GPUs and accumulation steps
    critic_iterations: tuple[int, ...]  # critic updates per generator update, on the same real images
    fade_share: float = Field(0.5, gt=0, le=1)  # of a phase, in which the new layers are blended in
    lr: float = Field(1e-3, gt=0)
    betas: Betas = (0.5, 0.999)
    penalty: float = Field(10.0, ge=0)
    aimed_class: float = Field(4.0, ge=0)  # weight of the classification that a player is to get right: lambda_cls1
    other_class: float = Field(2.0, ge=0)  # of the critic's classification of generated images: lambda_cls2
    drift: float = Field(0.001, ge=0)
    # images whose differences the critic sees together; null: all of a rank's batch, as published. Four, as in the paper that
    # introduced it, do not depend on the number of ranks
    std_group: int | None = Field(4, ge=2)
    select: bool = True  # each phase goes on from its best epoch by AUC on the val split; false: from its last
    select_from: float = Field(0.6, ge=0, lt=1)  # share of a phase from which on epochs are looked at

    @model_validator(mode="before")
    @classmethod
    def _published_phases(cls, value: Any) -> Any:
        """What is not given per phase is as published; one number stands for all phases."""
        if not isinstance(value, dict):
            return value
        count = len(value.get("factors", FACTORS))
        filled = {name: value.get(name, published[:count]) for name, published in PER_PHASE.items()}
        return {**value, **{name: [given] * count if isinstance(given, int | float) else given for name, given in filled.items()}}

    @model_validator(mode="after")
    def _one_entry_per_phase(self) -> Config:
        for name in PER_PHASE:
            entries = getattr(self, name)
            if len(entries) != len(self.factors):
                raise ValueError(f"{name} has {len(entries)} entries, factors has {len(self.factors)}; give one per phase, or one number for all")
            if min(entries) <= 0 and name != "epochs":
                raise ValueError(f"{name}: {min(entries):g} is not above 0")
        self._check_epochs()
        for size, factor in zip(self.sizes, self.factors, strict=True):
            width = self.in_channels * factor
            if width < 1 or not math.isclose(width, round(width)):
                raise ValueError(f"factors: {factor:g} x in_channels {self.in_channels} is {width:g} channels at {size} px; it must be a whole number")
        if self.std_group is not None:
            self._check_groups(self.std_group)
        elif self.loop.micro_batch == "auto":
            raise ValueError("loop.micro_batch: auto would make the training depend on the GPU, because std_group: null compares all images of a part; give std_group a number")
        if not self.select and self.select_from != type(self).model_fields["select_from"].default:
            raise ValueError("select_from has no effect with select: false; remove it")
        return self

    def _check_epochs(self) -> None:
        """A 0 says that start_from has that size behind it, which can only be true of the first sizes."""
        if min(self.epochs) < 0:
            raise ValueError(f"epochs: {min(self.epochs):g} is below 0")
        if 0 in self.epochs and self.start_from is None:
            raise ValueError(f"epochs: 0 at {self.sizes[self.epochs.index(0)]} px leaves that size to start_from, which is not given; name a checkpoint grown that far")
        if 0 in self.epochs[self.done_phases :]:
            raise ValueError(f"epochs: {list(self.epochs)}: only the first sizes can be left to start_from, and each later one needs epochs above 0")

    def _check_groups(self, group: int) -> None:
        for size, batch_size in zip(self.sizes, self.batch_sizes, strict=True):
            if batch_size % group:
                raise ValueError(f"batch_sizes: {batch_size} at {size} px is no multiple of std_group: {group}")
        if isinstance(self.loop.micro_batch, int) and self.loop.micro_batch % group:
            raise ValueError(f"loop.micro_batch: {self.loop.micro_batch} is no multiple of std_group: {group}")

    @property
    def micro_batch_multiple(self) -> int:
        return self.std_group or 1

    @property
    def global_batch_sizes(self) -> tuple[str, tuple[int, ...]]:
        return "batch_sizes", self.batch_sizes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pixels per side of every phase."""
        return tuple(FIRST_SIZE * 2**level for level in range(len(self.factors)))

    @property
    def done_phases(self) -> int:
        """How many phases start_from has behind it."""
        return next((level for level, epochs in enumerate(self.epochs) if epochs > 0), len(self.epochs))

    @property
    def widths(self) -> list[int]:
        """Channels of both networks at each size."""
        return [round(self.in_channels * factor) for factor in self.factors]

    @property
    def uses_labels(self) -> bool:
        return True

    @property
    def form(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("channels", "in_channels", "factors", "latent", "embedding")}

    @property
    def curves(self) -> tuple[Curves, ...]:
        return (
            SCORES_OF_THE_CRITIC,
            Curves("Losses of the players", "loss", {"critic_loss": "critic", "generator_loss": "generator"}),
            GRADIENT_PENALTY,
            Curves("Errors of the classification", "cross entropy", {"critic_real_class": "real images", "generator_class": "generated images"}),
            Curves("Classes told apart on the val split", "AUC", {"val_auc_real": "real images", "val_auc_fake": "generated images"}),
        )

    @property
    def classifies(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        tiny = {"in_channels": 8, "factors": [1, 1, 0.5], "latent": 8, "epochs": 2, "batch_sizes": 4, "critic_iterations": 1, "std_group": 2}
        return {"grey": tiny, "colour": {**tiny, "channels": ["red", "green", "blue"], "critic_iterations": [1, 1, 2]}}

    def check_data(self, data: DataSpec) -> None:
        super().check_data(data)
        if data.size != self.sizes[-1]:
            raise ValueError(f"factors has {len(self.factors)} phases, which end at {self.sizes[-1]} px, but data.size is {data.size}; make them agree")

    def sampling(self, raw: dict[str, Any]) -> SamplingSettings:
        if raw:
            raise ValueError(f"unknown key {min(raw)!r}: this family has nothing to choose; the checkpoint decides the size")
        return SamplingSettings()

    def preview_sampling(self) -> SamplingSettings:
        return SamplingSettings()
