"""The evaluate stage of a job spec: metrics, extractors and their weights. Used by spec.py and evaluate/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from medgen import files
from medgen.errors import InputError
from medgen.names import absolute
from medgen.spec_base import Frozen, StageName, StageSpec

USUAL_METRICS = ("mae", "psnr", "ssim", "ms_ssim", "ms_ssim_diversity", "swd")
FEATURE_METRICS = ("fid", "kid", "prdc", "cmmd")  # compare the features of an extractor
MASK_METRICS = ("dice", "iou", "hd95")  # of masks that belong together
METRICS = (*USUAL_METRICS, "mse", "psd", *FEATURE_METRICS, "ssim_pairs", "auc", *MASK_METRICS)
WEIGHTS_VARIABLE = "MEDGEN_WEIGHTS"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes it
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class WeightsFile(Frozen):
    """An extractor whose weights are a file on this machine: nothing is ever downloaded."""

    file: Path
    sha256: Sha256 | None = None

    @field_validator("file")
    @classmethod
    def _file_counts_from_here(cls, value: Path) -> Path:
        return absolute(value)

    def verified(self) -> str:
        """The sha256 of the file. Raises InputError if it is missing, or not the one that the spec expects."""
        try:
            found = files.sha256_file(self.file)
        except OSError as error:
            raise InputError(f"extractor: {self.file}: {error.strerror or error}; weights are never downloaded, docs/evaluation.md tells where they come from") from None
        if self.sha256 not in (None, found):
            raise InputError(f"extractor: {self.file} has the sha256 {found}, expected {self.sha256}; copy the file again, or write its own sha256: beside file:")
        return found


class InceptionExtractor(WeightsFile):
    """InceptionV3 as torch-fidelity defines it, the network of the FID."""

    kind: Literal["inception"]
    sha256: Sha256 = INCEPTION_SHA256

    @model_validator(mode="before")
    @classmethod
    def _usual_place(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "file" in value:
            return value
        if not os.environ.get(WEIGHTS_VARIABLE):
            raise ValueError(f"inception needs its weights: `export {WEIGHTS_VARIABLE}=<the folder that holds {INCEPTION_FILE}>`, or write {{kind: inception, file: <path>}}")
        return {**value, "file": Path(os.environ[WEIGHTS_VARIABLE]) / INCEPTION_FILE}


class TorchScriptExtractor(WeightsFile):
    """Any network saved by torch.jit: [n, 3, size, size] with values in `range` to features [n, d]."""

    kind: Literal["torchscript"]
    size: int = Field(ge=8, le=2048)
    range: tuple[float, float]

    @field_validator("range")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"range is what black and white become, such as [0, 1] or [-1, 1]; got [{value[0]:g}, {value[1]:g}]")
        return value


class RandomConvExtractor(Frozen):
    """A small network with fixed random weights that are part of medgen: needs no file, and is no FID."""

    kind: Literal["random_conv"]


def _extractor_by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyExtractor = InceptionExtractor | TorchScriptExtractor | RandomConvExtractor
Extractor = Annotated[Annotated[AnyExtractor, Field(discriminator="kind")], BeforeValidator(_extractor_by_name)]


class Measures(Frozen):
    """What is measured, and how: the same for a stage of a run and for two folders. See docs/evaluation.md."""

    metrics: list[str] = Field(list(USUAL_METRICS), min_length=1)
    extractor: Extractor | None = None
    allow_small_n: bool = False  # a Frechet distance of few images, under a name that says so
    positive_only: bool | None = None  # only images whose mask is not empty; default: if every synthetic one has a lesion
    by: Literal["class", "lesion_size"] | None = None  # also each group alone; default: by class where the images were made by class

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: list[str]) -> list[str]:
        unknown = [name for name in value if name not in METRICS]
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}; the metrics are: {', '.join(METRICS)}")
        twice = next((name for name in value if value.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} stands twice; keep one of them")
        return value

    @model_validator(mode="after")
    def _features_need_an_extractor(self) -> Measures:
        asked = [name for name in self.metrics if name in FEATURE_METRICS]
        if asked and self.extractor is None:
            raise ValueError(f"{' and '.join(asked)} {'compares' if len(asked) == 1 else 'compare'} features: add extractor: inception (weights from a local file), "
                             "random_conv (needs no file), or {kind: torchscript, file: ..., size: ..., range: [0, 1]}")  # fmt: skip
        if self.extractor is not None and not asked:
            raise ValueError(f"extractor has no effect without {' or '.join(FEATURE_METRICS)} among the metrics; remove it")
        if self.allow_small_n and "fid" not in self.metrics:
            raise ValueError("allow_small_n has no effect without fid among the metrics; remove it")
        return self


class EvaluateStage(StageSpec, Measures):
    """`shards`: how many tasks share the features of the images before they are compared; 1: the stage takes them itself."""

    kind: Literal["evaluate"]
    of: StageName
    against: Literal["train", "val", "test"] = "test"
    shards: int = Field(1, ge=1, le=10_000)
    parallel: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _shards_take_features(self) -> EvaluateStage:
        if self.shards > 1 and self.extractor is None:
            raise ValueError(f"shards share the features of images, and none of the metrics compares any; add {' or '.join(FEATURE_METRICS)}, or remove shards")
        if self.parallel is not None and self.shards == 1:
            raise ValueError("parallel limits the shards, and there is one; remove it")
        return self

    def inputs(self) -> list[str]:
        return [*self.needs, self.of]


class FeaturesStage(StageSpec):
    """Never written by hand: the plan puts one in front of an evaluate stage with several shards, whose features its tasks take."""

    kind: Literal["features"]
    of: StageName
    parts: int
    parallel: int | None = None
