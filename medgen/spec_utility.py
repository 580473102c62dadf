"""The structure and utility stages of a job spec: networks trained on real and synthetic images, one task per trial. Used by spec.py and utility/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medgen.spec_base import StageName, StageSpec

FEWEST_SEEDS = 3  # of fewer, nobody can say whether a difference is more than the luck of one training
UNET_CHANNELS = [16, 32, 64, 128]
ArmKind = Literal["real", "duplicated", "augmented", "synthetic", "mixed"]
ARMS: tuple[ArmKind, ...] = ("real", "duplicated", "augmented", "synthetic", "mixed")
SIZED_BY_RATIOS = ("duplicated", "synthetic", "mixed")
RATIOS = [0.5, 1.0, 2.0]


class TrialStage(StageSpec):
    """What both share: a network is trained `seeds` times, each time as a task of its own."""

    of: StageName
    seeds: int = Field(FEWEST_SEEDS, ge=1, le=1000)
    allow_few_seeds: bool = False
    steps: int = Field(2000, ge=1)
    batch_size: int = Field(16, ge=2)  # batch normalisation knows no batch of one
    lr: float = Field(1e-3, gt=0)
    parallel: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _enough_seeds(self) -> TrialStage:
        if self.seeds < FEWEST_SEEDS and not self.allow_few_seeds:
            raise ValueError(f"seeds: {self.seeds}: trainings differ by luck, and fewer than {FEWEST_SEEDS} do not show by how much; write seeds: {FEWEST_SEEDS}, or allow_few_seeds: true")
        if self.seeds >= FEWEST_SEEDS and self.allow_few_seeds:
            raise ValueError(f"allow_few_seeds has no effect with seeds: {self.seeds}; remove it")
        return self

    def inputs(self) -> list[str]:
        return [*self.needs, self.of]

    @property
    def trials(self) -> int:
        """How many tasks it has."""
        return self.seeds


def _levels(channels: list[int]) -> list[int]:
    if len(channels) < 2 or min(channels) < 1:
        raise ValueError(f"channels are those of each level of the U-Net, two levels at least, such as {UNET_CHANNELS}; got {channels}")
    return channels


class StructureStage(TrialStage):
    """Do the images show what their masks say? Asked of a U-Net that was trained on real pairs. See docs/utility.md."""

    kind: Literal["structure"]
    against: Literal["val", "test"] = "test"
    channels: list[int] = UNET_CHANNELS

    _check_channels = field_validator("channels")(_levels)

    @property
    def unet_channels(self) -> list[int] | None:
        return self.channels


@dataclass(frozen=True)
class Arm:
    """One way to make the training set. `ratio`: synthetic images per real one, of mixed arms."""

    kind: ArmKind
    ratio: float | None = None

    @property
    def name(self) -> str:
        return self.kind if self.ratio is None else f"{self.kind} {self.ratio:g}"


def synthetic_count(ratio: float, real: int) -> int:
    """How many synthetic images come to that many real ones."""
    return max(1, round(ratio * real))


class UtilityStage(TrialStage):
    """What are the images worth to somebody who trains a classifier or segmenter? See docs/utility.md.

    `ratios`: synthetic images per real one; the largest is also how many extra duplicates, and synthetic images alone, there are."""

    kind: Literal["utility"]
    task: Literal["classification", "segmentation"]
    arms: list[ArmKind] = list(ARMS)
    ratios: list[float] = RATIOS
    network: Literal["resnet50", "resnet18"] | None = None  # of classification
    channels: list[int] | None = None  # of the U-Net of segmentation

    @model_validator(mode="before")
    @classmethod
    def _usual_network(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        usual = {"classification": ("network", "resnet50"), "segmentation": ("channels", UNET_CHANNELS)}.get(str(value.get("task")))
        return value if usual is None or value.get(usual[0]) is not None else {**value, usual[0]: usual[1]}

    @field_validator("arms")
    @classmethod
    def _real_is_among_them(cls, value: list[ArmKind]) -> list[ArmKind]:
        if "real" not in value:
            raise ValueError(f"arms: every other arm is compared with real, add it; got {', '.join(value) or 'none'}")
        if len(set(value)) < len(value) or len(value) < 2:
            raise ValueError(f"arms: name each once, and at least one beside real; the arms are: {', '.join(ARMS)}")
        return value

    @field_validator("ratios")
    @classmethod
    def _positive_and_different(cls, value: list[float]) -> list[float]:
        if not value or min(value) <= 0 or len(set(value)) < len(value):
            raise ValueError(f"ratios are synthetic images per real one, above 0 and different, such as {RATIOS}; got {value}")
        return sorted(value)

    _check_channels = field_validator("channels")(lambda channels: channels if channels is None else _levels(channels))

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> UtilityStage:
        if self.task == "segmentation" and self.network is not None:
            raise ValueError(f"network: {self.network} classifies; a segmentation takes channels of its U-Net, remove network")
        if self.task == "classification" and self.channels is not None:
            raise ValueError("channels are those of the U-Net of a segmentation; a classification takes network: resnet50 or resnet18, remove channels")
        if self.ratios != RATIOS and not set(self.arms) & set(SIZED_BY_RATIOS):
            raise ValueError(f"ratios has no effect without one of the arms {', '.join(SIZED_BY_RATIOS)}; remove it")
        return self

    @property
    def unet_channels(self) -> list[int] | None:
        return self.channels

    @property
    def all_arms(self) -> list[Arm]:
        """With one mixed arm for each ratio."""
        return [arm for kind in self.arms for arm in ([Arm(kind, ratio) for ratio in self.ratios] if kind == "mixed" else [Arm(kind)])]

    @property
    def trials(self) -> int:
        return len(self.all_arms) * self.seeds

    @property
    def most_ratio(self) -> float:
        return max(self.ratios)

    def shortage(self, real: int, there: int) -> str | None:
        """Why `there` synthetic images are too few beside `real` training slices, in words; None if they are enough for every arm."""
        wanted = synthetic_count(self.most_ratio, real)
        if not set(self.arms) & {"synthetic", "mixed"} or wanted <= there:
            return None
        return (f"ratios: {self.most_ratio:g} synthetic images for each of {real} real training slices are {wanted}, and {self.of} has {there}; "
                f"write ratios up to {int(100 * there / real) / 100:g}, or generate more")  # fmt: skip

    def trial(self, number: int) -> tuple[Arm, int]:
        """Arm and seed number of a task."""
        return self.all_arms[number // self.seeds], number % self.seeds
