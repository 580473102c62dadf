"""The stages of a job spec, each with what may be written in it; evaluate, structure and utility have their own modules. Used by spec.py and planning.py."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medgen.spec_accept import Accept
from medgen.spec_base import StageName, StageSpec, VariableName
from medgen.spec_data import SPLITS
from medgen.spec_evaluate import EvaluateStage, FeaturesStage
from medgen.spec_utility import StructureStage, UtilityStage

SUBMITS_ITSELF = re.compile(r"^[^#\n]*\bsbatch\b[^#\n]*[\s\"']\$\{?0\b", re.MULTILINE)


class TrainStage(StageSpec):
    """`repeat`: another train stage, instead of a configuration: what it chose by the val split is trained again, on train and
    val together, each phase for as many epochs as its best checkpoint had there. `config` is then that stage's.

    `segments`: into how many time limits the training may be cut; it saves before each and goes on after it.

    None: into as many as it takes, for as long as it progresses."""

    kind: Literal["train"]
    config: dict[str, Any] = {}
    repeat: StageName | None = None
    segments: int | None = Field(None, ge=1)
    launcher: Literal["srun", "torchrun"] = "srun"  # one srun task per GPU, or one torchrun agent per node

    @model_validator(mode="after")
    def _config_or_repeat(self) -> TrainStage:
        if self.repeat is None and not self.config:
            raise ValueError("config is missing: a YAML file, or its keys; or repeat: another train stage")
        if self.repeat is not None and self.config:
            raise ValueError(f"config has no effect beside repeat: {self.repeat}, which trains with that stage's; remove one of them")
        return self

    def inputs(self) -> list[str]:
        return [*self.needs, *([self.repeat] if self.repeat is not None else [])]


class GenerateStage(StageSpec):
    kind: Literal["generate"]
    source: StageName = Field(alias="from")
    count: int = Field(ge=1)
    per_class: list[int] | None = None  # images of each class, in the order of the classes; default: as equal as count allows
    condition: str | None = None  # a generate stage of masks, or a split of the real data
    captions: list[str] | None = Field(None, min_length=1)  # told in turn, instead of those of the split; without condition they are all that is told
    without: list[Literal["caption", "mask"]] = []  # what of each slice of the split is not told
    checkpoint: str = "last"  # last | last-<phase> | best-val | best-<metric>
    sampling: dict[str, Any] = {}  # checked by the model family
    chunk: int = Field(16, ge=1)  # images drawn together; fixed, so that bytes do not depend on shards
    shards: int = Field(1, ge=1, le=1_000_000)
    parallel: int | None = Field(None, ge=1)
    format: Literal["nifti", "png", "npy"] = "nifti"
    spacing_mm: float | tuple[float, float] | None = None  # of the images, or between rows and between columns; default: that of the slice whose contours are drawn on
    export: list[Literal["dicom", "nifti"]] = []  # also each image as a file for others: in its unit, without padding; cardiac maps
    stack: bool = False  # also all images in one file, sorted by class, and labels_syn.csv, as `format: stack` data are kept
    accept: Accept | None = None  # masks: default by size; images: default all of them

    @field_validator("checkpoint")
    @classmethod
    def _known_selector(cls, value: str) -> str:
        if value == "last" or re.fullmatch(r"(best|last)-[a-z0-9_]+", value):
            return value
        raise ValueError(f"write last, last-<phase>, best-val or best-<metric>, got {value!r}")

    @model_validator(mode="before")
    @classmethod
    def _classes_make_the_count(cls, value: Any) -> Any:
        counts = value.get("per_class") if isinstance(value, dict) else None
        if not isinstance(counts, list) or not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            return value  # what it is instead is told field by field
        if not counts or min(counts) < 0 or sum(counts) == 0:
            raise ValueError(f"per_class: give how many images of each class, such as [100, 100], got {counts}")
        if value.get("count", sum(counts)) != sum(counts):
            raise ValueError(f"per_class makes {sum(counts)} images, but count is {value['count']}; remove count")
        return {**value, "count": sum(counts)}

    @field_validator("spacing_mm", mode="before")
    @classmethod
    def _spacing_can_be(cls, value: object) -> object:
        """Before its two forms are tried, each of which would say something else."""
        steps = value if isinstance(value, list | tuple) else [value, value]
        numbers = [step for step in steps if isinstance(step, int | float) and not isinstance(step, bool)]
        if value is not None and not (len(steps) == len(numbers) == 2 and all(0.05 <= step <= 20 for step in numbers)):
            raise ValueError(f"0.05 to 20 mm from one pixel to the next, such as 1.5, or [1.5, 1.2] between rows and between columns; got {value}")
        return value

    @field_validator("captions")
    @classmethod
    def _captions_say_something(cls, value: list[str] | None) -> list[str] | None:
        for place, caption in enumerate(value or ()):
            if not caption.strip():
                raise ValueError(f"captions: number {place + 1} is empty; write what the image shows, or without: [caption] to tell none")
        return value

    @model_validator(mode="after")
    def _what_is_told_is_told_once(self) -> GenerateStage:
        if self.captions is not None and "caption" in self.without:
            raise ValueError("captions and without: [caption] contradict each other; remove one of them")
        if self.without and self.condition is None:
            raise ValueError("without has no effect where there is no condition: nothing of a slice is told; remove it")
        return self

    @field_validator("export", "without")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError(f"name each once, got {value}")
        return value

    @property
    def spacing(self) -> tuple[float, float] | None:
        """Between rows and between columns."""
        return (self.spacing_mm, self.spacing_mm) if isinstance(self.spacing_mm, float) else self.spacing_mm

    @model_validator(mode="after")
    def _no_empty_shard(self) -> GenerateStage:
        chunks = -(-self.count // self.chunk)
        if self.shards > chunks:
            raise ValueError(
                f"shards: {self.shards} is more than the {chunks} chunks of {self.chunk} that make {self.count} images; "
                f"use at most {chunks} shards or a smaller chunk"
            )
        return self

    def inputs(self) -> list[str]:
        conditions = [self.condition] if self.condition and self.condition not in SPLITS else []
        return [*self.needs, self.source, *conditions]


class CommandStage(StageSpec):
    """Any bash text as a stage: `run` is executed by bash in the folder where submit was called.

    `foreach` makes one task per item, told by MEDGEN_ITEM and MEDGEN_INDEX. `outputs`: globs that must match a file at the
    end, from that same folder. MEDGEN_OUT names a folder inside the run for what it makes."""

    kind: Literal["command"]
    run: str = Field(min_length=1)
    foreach: list[str] = Field([], max_length=1_000_000)
    parallel: int | None = Field(None, ge=1)
    segments: int = Field(1, ge=1)
    env: dict[VariableName, str] = {}
    outputs: list[str] = []

    @field_validator("run", "foreach", "env")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else list(value.values()) if isinstance(value, dict) else value
        if any("\0" in text for text in texts):
            raise ValueError("bash takes no NUL character; remove it")
        return value

    @model_validator(mode="after")
    def _parallel_counts_items(self) -> CommandStage:
        if self.parallel is not None and not self.foreach:
            raise ValueError("parallel limits the items of foreach, and there are none; remove it")
        return self


    @property
    def submits_itself(self) -> str | None:
        """Why the text cannot work here, in words, if it gives its own file to sbatch; None if it does not."""
        if not SUBMITS_ITSELF.search(self.run):
            return None
        return "it gives its own file ($0) to sbatch, and here it has none; write segments: N for a chain, foreach: [...] for a loop, and remove the sbatch"


class ReportStage(StageSpec):
    kind: Literal["report"]


class CollectStage(StageSpec):
    """Never written by hand: the plan adds one behind every stage whose tasks make parts of one thing."""

    kind: Literal["collect"]
    of: StageName

    def inputs(self) -> list[str]:
        return [*self.needs, self.of]


Stage = TrainStage | GenerateStage | EvaluateStage | StructureStage | UtilityStage | ReportStage | CommandStage
Collected = GenerateStage | StructureStage | UtilityStage
AnyStage = Stage | CollectStage | FeaturesStage
