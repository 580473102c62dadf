"""The evaluate stage of a job spec: metrics, extractors and their weights. Used by spec.py and evaluate/."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from medgen import weights
from medgen.pretrained.settings import LpipsBackbone, PublishedWeights, Sha256, WeightsFile
from medgen.spec_base import Frozen, StageName, StageSpec
from medgen.weights import INCEPTION_SHA256

USUAL_METRICS = ("mae", "psnr", "ssim", "ms_ssim", "ms_ssim_diversity", "swd")
FEATURE_METRICS = ("fid", "kid", "prdc", "cmmd")  # compare the features of an extractor
PERCEPTUAL_METRICS = ("lpips", "lpips_diversity")  # compare images by LPIPS
MASK_METRICS = ("dice", "iou", "hd95")  # of masks that belong together
METRICS = (*USUAL_METRICS, "mse", "psd", *FEATURE_METRICS, *PERCEPTUAL_METRICS, "ssim_pairs", "registration", "regions", "auc", *MASK_METRICS)


class InceptionExtractor(PublishedWeights):
    """InceptionV3 as torch-fidelity defines it, the network of the FID."""

    kind: Literal["inception"]
    sha256: Sha256 = INCEPTION_SHA256

    @classmethod
    def published_name(cls, value: dict[str, Any]) -> str:
        return "inception"


class Dinov2Extractor(PublishedWeights):
    """A vision transformer of DINOv2 with patches of 14 px: small, base or large, plain or with four registers."""

    kind: Literal["dinov2"]
    arch: Literal["vits14", "vitb14", "vitl14", "vits14_reg", "vitb14_reg", "vitl14_reg"] = "vits14"

    @classmethod
    def published_name(cls, value: dict[str, Any]) -> str:
        arch = value.get("arch", cls.model_fields["arch"].default)
        known = [name.removeprefix("dinov2_") for name in weights.REGISTRY if name.startswith("dinov2_")]
        if arch not in known:
            raise ValueError(f"arch: {arch!r} is no network of dinov2; those are: {', '.join(known)}")
        return f"dinov2_{arch}"


class ResNet50Extractor(PublishedWeights):
    """A ResNet-50: trained on photographs without labels (swav) or with them (resnet50), or on radiological images (radimagenet)."""

    kind: Literal["swav", "resnet50", "radimagenet"]

    @classmethod
    def published_name(cls, value: dict[str, Any]) -> str:
        return str(value["kind"])


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


class EncoderExtractor(Frozen):
    """A small network that the evaluation trains on the real training slices, without labels: needs no file."""

    kind: Literal["encoder"]
    size: int | None = Field(None, ge=16, le=256)  # pixels of a side; None: 64, or those of the data if they have fewer
    steps: int = Field(600, ge=50, le=100_000)
    width: int = Field(32, ge=4, le=256)  # channels of the first layers; the features are eight times as many


def _extractor_by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _backbone_by_name(value: Any) -> Any:
    return {"net": value} if isinstance(value, str) else value


AnyExtractor = InceptionExtractor | Dinov2Extractor | ResNet50Extractor | TorchScriptExtractor | EncoderExtractor | RandomConvExtractor
Extractor = Annotated[Annotated[AnyExtractor, Field(discriminator="kind")], BeforeValidator(_extractor_by_name)]


Grouping = Literal["class", "lesion_size"]


class Measures(Frozen):
    """What is measured, and how: the same for a stage of a run and for two folders. See docs/evaluation.md."""

    metrics: list[str] = Field(list(USUAL_METRICS), min_length=1)
    extractor: Extractor | None = None
    lpips: Annotated[LpipsBackbone, BeforeValidator(_backbone_by_name)] | None = None
    allow_small_n: bool = False  # a Frechet distance of few images, under a name that says so
    positive_only: bool | None = None  # only images whose mask is not empty; default: if every synthetic one has a lesion
    by: Grouping | None = None  # also each group alone; default: by class where the images were made by class

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
            raise ValueError(f"{' and '.join(asked)} {'compares' if len(asked) == 1 else 'compare'} features: add extractor: inception, dinov2, swav, resnet50 or radimagenet "
                             "(weights from a local file), encoder or random_conv (need no file), or {kind: torchscript, file: ..., size: ..., range: [0, 1]}")  # fmt: skip
        if self.extractor is not None and not asked:
            raise ValueError(f"extractor has no effect without {' or '.join(FEATURE_METRICS)} among the metrics; remove it")
        if self.allow_small_n and "fid" not in self.metrics:
            raise ValueError("allow_small_n has no effect without fid among the metrics; remove it")
        return self

    @model_validator(mode="after")
    def _sizes_are_of_lesions(self) -> Measures:
        if self.by == "lesion_size" and self.positive_only is False:
            raise ValueError("by: lesion_size compares slices with a lesion; remove positive_only: false")
        return self

    @model_validator(mode="after")
    def _lpips_needs_a_backbone(self) -> Measures:
        asked = [name for name in self.metrics if name in PERCEPTUAL_METRICS]
        if asked and self.lpips is None:
            raise ValueError(f"{' and '.join(asked)} {'needs' if len(asked) == 1 else 'need'} the weights of a network: add lpips: alex, vgg or squeeze (from a local file)")
        if self.lpips is not None and not asked:
            raise ValueError(f"lpips has no effect without {' or '.join(PERCEPTUAL_METRICS)} among the metrics; remove it")
        return self

    @property
    def problem_of_regions(self) -> str | None:
        """Why this cannot be measured where masks hold several regions, in words; None if it can."""
        asked = "by: lesion_size" if self.by == "lesion_size" else "positive_only" if self.positive_only is not None else None
        return None if asked is None else f"{asked} is of lesions, and the masks of these data hold several regions, none of them a lesion; remove it"

    def weights_files(self) -> list[WeightsFile]:
        """The files that must be there when this is measured."""
        return [item for item in (self.extractor, self.lpips) if isinstance(item, WeightsFile)]


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

    @model_validator(mode="after")
    def _masks_need_pairs(self) -> EvaluateStage:
        asked = [name for name in self.metrics if name in MASK_METRICS]
        if asked:
            raise ValueError(f"{asked[0]} is of masks that belong together, in two folders: medgen evaluate; in a job, a stage of kind structure tells how images follow their masks")
        return self

    def inputs(self) -> list[str]:
        return [*self.needs, self.of]


class FeaturesStage(StageSpec):
    """Never written by hand: the plan puts one in front of an evaluate stage with several shards, whose features its tasks take."""

    kind: Literal["features"]
    of: StageName
    parts: int
    parallel: int | None = None
