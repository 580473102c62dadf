"""The job spec: what a user writes. Read by plan.py; every stage reads its resolved form from the run folder."""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from medgen import commits, document, files, models, sbatch_options
from medgen.document import Document
from medgen.errors import InputError
from medgen.models.settings import FamilyConfig
from medgen.names import CONTROL, ChannelName, OptionWord, absolute
from medgen.units import Mebibytes, Minutes

STAGE_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED_STAGE_NAMES = {"code", "submissions", "logs", "outcome", "hb", "data"}
PROJECT = Path(__file__).parent.parent  # a checkout's own configs/, for specs that were copied elsewhere
SUBMITS_ITSELF = re.compile(r"^[^#\n]*\bsbatch\b[^#\n]*[\s\"']\$\{?0\b", re.MULTILINE)
MOST_POINTS = 1000  # of a sweep
BASH_KEYS = ("run", "setup")  # text for bash: its ${NAME} are not ours to replace


class Frozen(BaseModel):
    """Base of everything a user can write: unknown keys refused, values fixed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def _directive(value: str) -> str:
    """One line of sbatch options such as `--partition=GPUQ`, without the `#SBATCH`."""
    text = value.strip().removeprefix("#SBATCH").strip()
    if not text.startswith("-") or CONTROL.search(text):
        raise ValueError(f"not a line of sbatch options: {value!r}; write for example --partition=GPUQ")
    sbatch_options.options_of(text)  # raises ValueError for an open quote
    return text


Directive = Annotated[str, AfterValidator(_directive)]


class GpuRequest(Frozen):
    """Which GPUs will do; the site profile turns the names into features."""

    any_of: list[OptionWord] = []
    prefer: OptionWord | None = None
    memory: Mebibytes | None = None

    @model_validator(mode="after")
    def _prefer_is_allowed(self) -> GpuRequest:
        if self.prefer and self.any_of and self.prefer not in self.any_of:
            raise ValueError(f"prefer: {self.prefer} is not among any_of: {', '.join(self.any_of)}")
        return self


class Resources(Frozen):
    """What one task of a stage needs. Never part of a run's identity: other resources, same run."""

    nodes: int = Field(1, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    gpus: int | None = Field(None, ge=0)
    processes: int | None = Field(None, ge=1)  # ranks per node where there is no GPU (gloo)
    gpu: GpuRequest | None = None
    time: Minutes | None = None
    mem: Mebibytes | None = None
    cpus: int | None = Field(None, ge=1)
    setup: list[str] = []  # lines after those of the site, before the command
    slurm: list[Directive] = []  # directives as sbatch reads them; each takes the place of medgen's own for that option

    @model_validator(mode="after")
    def _gpu_needs_gpus(self) -> Resources:
        if self.gpu is not None and self.gpus_asked == 0:
            raise ValueError("gpu says which GPUs will do, but no GPU is asked for; remove gpu, or write gpus: 1")
        return self

    @model_validator(mode="after")
    def _one_way_to_count_gpus(self) -> Resources:
        if self.gpus is not None and self.gpus_per_node is not None:
            raise ValueError("gpus and gpus_per_node both given; keep gpus_per_node for several nodes, gpus for one")
        if self.gpus is not None and self.nodes > 1:
            raise ValueError("gpus counts the GPUs of one node; with nodes write gpus_per_node")
        if self.processes is not None and self.gpus_asked:
            raise ValueError("processes is for runs without GPUs; with GPUs there is one process per GPU")
        return self

    @property
    def gpus_asked(self) -> int | None:
        """GPUs per node, or None if nothing was said."""
        return self.gpus_per_node if self.gpus_per_node is not None else self.gpus


class Window(Frozen):
    """How voxel values become [0, 1]: percentiles of each volume's non-zero voxels, or two fixed values."""

    percentiles: tuple[float, float] | None = None
    fixed: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Window:
        if (self.percentiles is None) == (self.fixed is None):
            raise ValueError("give percentiles: [0.5, 99.5] or fixed: [low, high]")
        low, high = self.percentiles or self.fixed or (0.0, 0.0)
        if not low < high:
            raise ValueError(f"the lower end must be below the upper one, got [{low}, {high}]")
        if self.percentiles and not (low >= 0 and high <= 100):
            raise ValueError(f"percentiles lie between 0 and 100, got [{low}, {high}]")
        return self


class SplitFractions(Frozen):
    """Shares of patients, used when the data come without train/val/test folders or column."""

    train: float = Field(0.7, gt=0, le=1)
    val: float = Field(0.15, ge=0, lt=1)
    test: float = Field(0.15, ge=0, lt=1)

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitFractions:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + val + test must be 1, got {total:g}")
        return self


class DataSpec(Frozen):
    """Where the volumes are and how slices are made from them."""

    format: Literal["nifti", "csv", "stack", "phantom"] = "nifti"
    # nifti: <root>/[<split>/]<patient>/<file>; csv: the CSV file; stack: a folder of labels.csv and Real*x*.nii.gz, or of such folders
    root: Path | None = None
    images: dict[ChannelName, str] = {}  # channel name -> file name (nifti), column (csv), or place of the channel (stack; default image: 0)
    mask: str | None = None  # file name or column of the label volume
    mask_labels: list[int] | None = None  # labels that count as foreground; default: every non-zero one
    size: int = Field(128, ge=4, le=2048)  # pixels; slices become size x size
    window: Window = Window(percentiles=(0.0, 99.5))
    axis: int = Field(2, ge=0, le=2)  # 0 sagittal, 1 coronal, 2 axial slices
    content: float = Field(0.05, ge=0, lt=1)  # smallest share of non-background pixels a slice must have
    positive_only: bool = False  # keep only slices whose mask is not empty
    every: int = Field(1, ge=1)  # keep every n-th slice
    splits: SplitFractions = SplitFractions()
    patients: int | None = Field(None, ge=3, le=100_000)  # phantom: how many patients to draw; default 16

    @model_validator(mode="before")
    @classmethod
    def _some_name_their_own_files(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("format") == "phantom" and not value.get("images") and not value.get("mask"):
            return {**value, **PHANTOM_FILES}
        if isinstance(value, dict) and value.get("format") == "stack":
            images = value.get("images", {"image": 0})
            places = {name: str(place) if type(place) is int else place for name, place in images.items()} if isinstance(images, dict) else images
            return {"content": 0.0, "window": {"fixed": [-1.0, 1.0]}, **value, "images": places}
        return value

    @model_validator(mode="after")
    def _complete_for_its_format(self) -> DataSpec:
        if self.format == "phantom":
            if self.root is not None or self.mask_labels is not None:
                raise ValueError(f"format: phantom draws its own data; remove {'root' if self.root is not None else 'mask_labels'}")
            return self
        if self.root is None:
            wanted = {"nifti": "a folder of patients", "csv": "the CSV file", "stack": "the folder with labels.csv, or with train and test"}
            raise ValueError(f"format: {self.format} needs root: {wanted[self.format]}")
        if self.format == "stack":
            self._check_stack()
        if self.patients is not None:
            raise ValueError("patients counts phantoms and has no effect here; remove it")
        if not self.images and self.mask is None:
            raise ValueError("nothing to read: give images: {name: file} or mask: file")
        if self.positive_only and self.mask is None:
            raise ValueError("positive_only needs mask: the name of the label file")
        if "seg" in self.images:
            raise ValueError("images: the name 'seg' is kept for the mask; write mask: ...")
        return self

    def _check_stack(self) -> None:
        """Slices of a stack are made already: what makes slices of volumes has no effect."""
        for name in ("mask", "mask_labels", "axis", "content", "positive_only", "every", "window"):
            usual = {"content": 0.0, "window": Window(fixed=(-1.0, 1.0))}.get(name, type(self).model_fields[name].default)
            if getattr(self, name) != usual:
                raise ValueError(f"{name} has no effect with format: stack, whose slices are made already; remove it")
        places = list(self.images.values())
        if places != [str(place) for place in range(len(places))] or len(places) not in (1, 3):
            raise ValueError(f"images names the channels of a stack by their places: {{image: 0}}, or {{red: 0, green: 1, blue: 2}}; got {self.images}")

    @field_validator("root")
    @classmethod
    def _root_counts_from_here(cls, value: Path | None) -> Path | None:
        """Absolute, so that the run goes on from any folder."""
        return absolute(value) if value is not None else None

    @property
    def channels(self) -> list[str]:
        """Image names in the order of the spec."""
        return list(self.images)


PHANTOM_PATIENTS = 16
PHANTOM_FILES: dict[str, Any] = {
    "images": {"bravo": "bravo.nii.gz", "t1_pre": "t1_pre.nii.gz", "t1_gd": "t1_gd.nii.gz"},
    "mask": "seg.nii.gz",
}


def _stage_name(value: str) -> str:
    if not STAGE_NAME.fullmatch(value):
        raise ValueError(f"stage names are up to 60 lower-case letters, digits and _, got {value[:80]!r}")
    return value


def _variable_name(value: str) -> str:
    if not VARIABLE_NAME.fullmatch(value):
        raise ValueError(f"not a name for a shell variable: {value!r}")
    return value


StageName = Annotated[str, AfterValidator(_stage_name)]
VariableName = Annotated[str, AfterValidator(_variable_name)]


class StageSpec(Frozen):
    """What all stages share."""

    needs: list[StageName] = []
    resources: Resources = Resources()

    def inputs(self) -> list[str]:
        """The stages that must be finished before this one."""
        return list(self.needs)


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


class Accept(Frozen):
    """Which generated masks count: others are drawn again, counted and reported."""

    min_pixels: int = Field(1, ge=0)
    max_fraction: float = Field(0.25, gt=0, le=1)
    tries: int = Field(20, ge=1)


class GenerateStage(StageSpec):
    kind: Literal["generate"]
    source: StageName = Field(alias="from")
    count: int = Field(ge=1)
    per_class: list[int] | None = None  # images of each class, in the order of the classes; default: as equal as count allows
    condition: str | None = None  # a generate stage of masks, or a split of the real data
    checkpoint: str = "last"  # last | last-<phase> | best-val | best-<metric>
    sampling: dict[str, Any] = {}  # checked by the model family
    chunk: int = Field(16, ge=1)  # images drawn together; fixed, so that bytes do not depend on shards
    shards: int = Field(1, ge=1, le=1_000_000)
    parallel: int | None = Field(None, ge=1)
    format: Literal["nifti", "png", "npy"] = "nifti"
    stack: bool = False  # also all images in one file, sorted by class, and labels_syn.csv, as `format: stack` data are kept
    accept: Accept | None = None

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


SPLITS = ("train", "val", "test")
USUAL_METRICS = ("mae", "psnr", "ssim", "ms_ssim", "ms_ssim_diversity", "swd")
FEATURE_METRICS = ("fid", "kid")  # compare the features of an extractor
METRICS = (*USUAL_METRICS, *FEATURE_METRICS, "ssim_pairs", "auc")
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


class EvaluateStage(StageSpec):
    """`extractor` and `allow_small_n` are of the metrics that compare features, see docs/evaluation.md."""

    kind: Literal["evaluate"]
    of: StageName
    against: Literal["train", "val", "test"] = "test"
    metrics: list[str] = Field(list(USUAL_METRICS), min_length=1)
    extractor: Extractor | None = None
    allow_small_n: bool = False  # a Frechet distance of few images, under a name that says so

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: list[str]) -> list[str]:
        unknown = [name for name in value if name not in METRICS]
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}; the metrics are: {', '.join(METRICS)}")
        return value

    @model_validator(mode="after")
    def _features_need_an_extractor(self) -> EvaluateStage:
        asked = [name for name in self.metrics if name in FEATURE_METRICS]
        if asked and self.extractor is None:
            raise ValueError(f"{' and '.join(asked)} {'compares' if len(asked) == 1 else 'compare'} features: add extractor: inception (weights from a local file), "
                             "random_conv (needs no file), or {kind: torchscript, file: ..., size: ..., range: [0, 1]}")  # fmt: skip
        if self.extractor is not None and not asked:
            raise ValueError(f"extractor has no effect without {' or '.join(FEATURE_METRICS)} among the metrics; remove it")
        if self.allow_small_n and "fid" not in self.metrics:
            raise ValueError("allow_small_n has no effect without fid among the metrics; remove it")
        return self

    def inputs(self) -> list[str]:
        return [*self.needs, self.of]


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
    """Never written by hand: the plan adds one behind every generate stage."""

    kind: Literal["collect"]
    of: StageName

    def inputs(self) -> list[str]:
        return [*self.needs, self.of]


Stage = TrainStage | GenerateStage | EvaluateStage | ReportStage | CommandStage
AnyStage = Stage | CollectStage


class Spec(Frozen):
    """A whole job. `config` of every train stage is already read and checked."""

    version: Literal[1]
    name: str
    seed: int = Field(42, ge=0, lt=2**63)
    data: DataSpec | None = None  # needless where every stage is a command
    stages: dict[StageName, Annotated[Stage, Field(discriminator="kind")]] = Field(min_length=1)

    @model_validator(mode="after")
    def _data_where_needed(self) -> Spec:
        needing = [name for name, stage in self.stages.items() if not isinstance(stage, CommandStage)]
        if self.data is None and needing:
            raise ValueError(f"data is missing: {needing[0]} is a {self.stages[needing[0]].kind} stage, and only command stages do without")
        return self

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if not RUN_NAME.fullmatch(value):
            raise ValueError(f"use up to 60 letters, digits, _ and - (it names a folder), got {value!r}")
        return value


@dataclass(frozen=True)
class Point:
    """One spec out of a file: `values` are what the sweep sets in it, empty where the file has no sweep."""

    values: dict[str, Any]
    spec: Spec
    document: Document  # where every key stands


def load_points(path: Path, overrides: Sequence[str] = ()) -> list[Point]:
    """Read, override and check a spec; with `sweep: {key: [values]}` one spec for every combination of values.

    Raises InputError listing every problem as file:line:column: key: message."""
    spec_document = document.load(path, verbatim=BASH_KEYS)
    document.override(spec_document, [text for text in overrides if ".config." not in text])
    sweep = _take_sweep(spec_document)
    _graft_configs(spec_document, path.parent)
    document.override(spec_document, [text for text in overrides if ".config." in text])
    points = []
    for values in itertools.product(*sweep.values()):
        point = copy.deepcopy(spec_document)
        chosen = dict(zip(sweep, values, strict=True))
        for key, value in chosen.items():
            document.set_value(point, key, value, spec_document.where(("sweep", key)))
        points.append(Point(chosen, check(point), point))
    return points


def load(path: Path, overrides: Sequence[str] = ()) -> Spec:
    """`load_points` where one spec is wanted: the first point of a sweep."""
    return load_points(path, overrides)[0].spec


def _take_sweep(spec_document: Document) -> dict[str, list[Any]]:
    """Remove `sweep` from the document and return it checked; its keys may reach into configs."""
    if "sweep" not in spec_document.data:
        return {}
    sweep = spec_document.data.pop("sweep")
    if not isinstance(sweep, dict) or not sweep:
        raise spec_document.error(("sweep",), "write keys and their values: {stages.train.config.lr: [1.0e-4, 3.0e-4]}")
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise spec_document.error(("sweep", key), f"give a list of values, got {values!r}")
        if len({repr(value) for value in values}) < len(values):
            raise spec_document.error(("sweep", key), f"a value stands twice in {values!r}; keep one of them")
        if key.split(".")[0] not in ("seed", "data", "stages"):
            raise spec_document.error(("sweep", key), "a sweep changes seed, data or stages; every point keeps the name")
    if math.prod(len(values) for values in sweep.values()) > MOST_POINTS:
        raise spec_document.error(("sweep",), f"more than {MOST_POINTS:,} points; each is a run of its own")
    return sweep


def check(spec_document: Document) -> Spec:
    spec = document.check(Spec, spec_document)
    for name, stage in spec.stages.items():
        if name in RESERVED_STAGE_NAMES or name.startswith("collect_"):
            raise spec_document.error(("stages", name), "this name is used inside the run folder; choose another")
        if isinstance(stage, TrainStage) and stage.repeat is None:
            _check_config(spec, spec_document, name)
    for name, stage in spec.stages.items():
        if isinstance(stage, TrainStage) and stage.repeat is not None:
            _take_config(spec, spec_document, name, stage.repeat, stage.config)
    for name, stage in spec.stages.items():
        _check_references(spec, spec_document, name, stage)
    _check_cycles(spec, spec_document)
    reports = [name for name, stage in spec.stages.items() if isinstance(stage, ReportStage)]
    if len(reports) > 1:
        raise spec_document.error(("stages", reports[1]), f"a run has one report, and {reports[0]} is it; remove one of them")
    return spec


def _graft_configs(spec_document: Document, spec_folder: Path) -> None:
    """Replace `config: file.yaml` by the file's content; paths count from the spec's folder, then from the current one."""
    stages = spec_document.data.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if not isinstance(stage, dict) or not isinstance(stage.get("config"), str):
            continue
        written = Path(stage["config"])
        candidates = [spec_folder / written, spec_folder.parent / written, Path.cwd() / written, PROJECT / written]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            looked = ", ".join(str(candidate) for candidate in dict.fromkeys(candidates))
            raise spec_document.error(("stages", name, "config"), f"no such file: {written} (looked at {looked})")
        spec_document.graft(("stages", name, "config"), document.load(found))


def family_config(config: dict[str, Any]) -> Any:
    """The family's frozen Config from a checked `config` mapping (its `model` key names the family)."""
    return models.config_class(config["model"]).model_validate({key: value for key, value in config.items() if key != "model"})


def _check_config(spec: Spec, spec_document: Document, name: str) -> None:
    path = ("stages", name, "config")
    config = spec_document.data["stages"][name]["config"]
    if "model" not in config:
        raise spec_document.error(path, f"'model' is missing; the models are: {', '.join(models.families())}")
    if config["model"] not in models.families():
        raise spec_document.error((*path, "model"), f"unknown model {config['model']!r}; the models are: {', '.join(models.families())}")
    stripped = Document(spec_document.source, {key: value for key, value in config.items() if key != "model"})
    stripped.positions = {
        where[3:]: place for where, place in spec_document.positions.items() if where[:3] == path
    }
    try:
        checked = document.check(models.config_class(config["model"]), stripped)
    except InputError as error:
        raise InputError(_with_prefix(str(error), document.dotted(path))) from None
    assert spec.data is not None  # a train stage is there
    try:
        checked.check_data(spec.data)
    except ValueError as error:
        raise spec_document.error(path, str(error)) from None
    checked = _with_start(checked)
    # the resolved form, defaults filled in: a later change of a default cannot reach this run
    resolved = {"model": config["model"], **checked.model_dump(mode="json")}
    spec.stages[name].config.clear()  # type: ignore[union-attr]
    spec.stages[name].config.update(resolved)  # type: ignore[union-attr]


def _with_start(checked: FamilyConfig) -> FamilyConfig:
    """Knowing what it starts from. Whether that is there at all is asked by submit: a spec can be written before the weights are."""
    if checked.start_from is None or checked.start_sha256 is not None:
        return checked
    try:
        return checked.model_copy(update={"start_sha256": commits.read(checked.start_from).sha256})
    except (OSError, ValueError):
        return checked


def _take_config(spec: Spec, spec_document: Document, name: str, repeated: str, config: dict[str, Any]) -> None:
    """Fill in the configuration of the stage that is repeated."""
    source = spec.stages.get(repeated)
    path = ("stages", name, "repeat")
    if not isinstance(source, TrainStage):
        trains = ", ".join(other for other, stage in spec.stages.items() if isinstance(stage, TrainStage) and other != name)
        raise spec_document.error(path, f"{repeated} is no train stage; name one of: {trains or 'none is there'}")
    if source.repeat is not None:
        raise spec_document.error(path, f"{repeated} repeats {source.repeat} itself; name a stage with a config")
    config.update(source.config)


def _with_prefix(message: str, prefix: str) -> str:
    """Insert the path of the stage's config before the key in each `place: key: message` line."""
    lines = []
    for line in message.splitlines():
        place, separator, rest = line.partition(": ")
        lines.append(f"{place}{separator}{prefix}.{rest}")
    return "\n".join(lines)


def _check_references(spec: Spec, spec_document: Document, name: str, stage: AnyStage) -> None:
    path = ("stages", name)
    for needed in stage.inputs():
        if needed not in spec.stages:
            raise spec_document.error(path, f"there is no stage {needed!r}; the stages are: {', '.join(spec.stages)}")
    if isinstance(stage, GenerateStage):
        _check_generate(spec, spec_document, name, stage)
    if isinstance(stage, EvaluateStage):
        _check_evaluate(spec, spec_document, name, stage)


def _check_evaluate(spec: Spec, spec_document: Document, name: str, stage: EvaluateStage) -> None:
    path, drawn = ("stages", name), spec.stages[stage.of]
    if not isinstance(drawn, GenerateStage):
        raise spec_document.error((*path, "of"), f"{stage.of} is a {drawn.kind} stage; name a generate stage")
    source = spec.stages.get(drawn.source)
    if not isinstance(source, TrainStage):
        return  # told where the generate stage is checked
    if source.repeat is not None and stage.against == "val":
        raise spec_document.error((*path, "against"), f"{drawn.source} was trained on the val split too; compare its images with the test split")
    if "auc" in stage.metrics and not family_config(source.config).classifies:
        raise spec_document.error((*path, "metrics"), f"auc: the model of {drawn.source} tells no classes apart; remove it")


def _check_generate(spec: Spec, spec_document: Document, name: str, stage: GenerateStage) -> None:
    path = ("stages", name)
    source = spec.stages[stage.source]
    if not isinstance(source, TrainStage):
        raise spec_document.error((*path, "from"), f"{stage.source} is a {source.kind} stage; name a train stage")
    config = family_config(source.config)
    if config.condition_channels and stage.condition is None:
        needed = ", ".join(config.condition_channels)
        raise spec_document.error(path, f"the model of {stage.source} is conditioned on {needed}; add condition: test or a generate stage of masks")
    if not config.condition_channels and stage.condition is not None:
        raise spec_document.error((*path, "condition"), f"the model of {stage.source} takes no condition; remove it")
    if stage.per_class is not None and not config.uses_labels:
        raise spec_document.error((*path, "per_class"), f"the model of {stage.source} knows no classes; write count: {stage.count}")
    if stage.stack and not config.uses_labels:
        raise spec_document.error((*path, "stack"), f"a stack is sorted by class, and the model of {stage.source} knows no classes; remove it")
    if stage.accept is not None and config.output_kind != "mask":
        raise spec_document.error((*path, "accept"), f"accept judges masks; the model of {stage.source} makes images")
    if stage.condition in spec.stages:
        giver = spec.stages[stage.condition]
        if not isinstance(giver, GenerateStage):
            raise spec_document.error((*path, "condition"), f"{stage.condition} is a {giver.kind} stage; name a generate stage of masks, or one of {', '.join(SPLITS)}")
        if config.condition_channels != ("seg",):
            needed = ", ".join(config.condition_channels)
            raise spec_document.error((*path, "condition"), f"{stage.condition} makes masks, the model of {stage.source} needs {needed}; write condition: test")
        giver_source = spec.stages[giver.source]
        if isinstance(giver_source, TrainStage) and family_config(giver_source.config).output_kind != "mask":
            raise spec_document.error((*path, "condition"), f"{stage.condition} makes images, not masks")
        if giver.count < stage.count:
            raise spec_document.error((*path, "count"), f"{stage.count} images need as many masks, but {stage.condition} makes {giver.count}")
    try:
        config.sampling(stage.sampling)
    except ValueError as error:
        text = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()) if hasattr(error, "errors") else str(error)
        raise spec_document.error((*path, "sampling"), text) from None


def _waits_for(spec: Spec, name: str) -> list[str]:
    """The stages that must end before this one; a report waits for all others."""
    stage = spec.stages[name]
    if isinstance(stage, ReportStage):
        return [*stage.needs, *(other for other, item in spec.stages.items() if not isinstance(item, ReportStage))]
    return stage.inputs()


def _check_cycles(spec: Spec, spec_document: Document) -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circle = " -> ".join((*trail[trail.index(name):], name))
            raise spec_document.error(("stages", name), f"the stages wait for each other: {circle}")
        if name not in done:
            for needed in _waits_for(spec, name):
                visit(needed, (*trail, name))
            done.add(name)

    for name in spec.stages:
        visit(name, ())
