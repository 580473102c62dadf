"""The job spec: what a user writes, read and checked as a whole. Read by planning.py; every stage reads its resolved form from the run folder.

Its parts are in spec_base.py, spec_data.py, spec_stages.py, spec_evaluate.py and spec_utility.py."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from medgen import commits, document, models, spec_accept
from medgen.document import Document
from medgen.models.settings import FamilyConfig
from medgen.spec_base import Frozen, StageName
from medgen.spec_data import SPLITS, DataSpec
from medgen.spec_evaluate import EvaluateStage
from medgen.spec_stages import AnyStage, CommandStage, GenerateStage, ReportStage, Stage, TrainStage
from medgen.spec_utility import StructureStage, UtilityStage

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}")
RESERVED_STAGE_NAMES = {"code", "submissions", "logs", "outcome", "hb", "data"}
PROJECT = Path(__file__).parent.parent  # a checkout's own configs/, for specs that were copied elsewhere
MOST_POINTS = 1000  # of a sweep
BASH_KEYS = ("run", "setup")  # text for bash: its ${NAME} are not ours to replace


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
        if name in RESERVED_STAGE_NAMES or name.startswith(("collect_", "features_")):
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
    stripped = spec_document.part(path, {key: value for key, value in config.items() if key != "model"})
    checked = document.check(models.config_class(config["model"]), stripped)
    assert spec.data is not None  # a train stage is there
    try:
        checked.check_data(spec.data)
    except ValueError as error:
        raise spec_document.error(path, str(error)) from None
    checked = _with_hashes(_with_start(checked))
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


def _with_hashes(checked: FamilyConfig) -> FamilyConfig:
    """Knowing what its files of weights hold; like `_with_start`, submit asks whether they are there."""
    return checked.model_copy(update={name: file.with_hash() for name, file in checked.weights_files.items()})


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


def _check_references(spec: Spec, spec_document: Document, name: str, stage: AnyStage) -> None:
    path = ("stages", name)
    for needed in stage.inputs():
        if needed not in spec.stages:
            raise spec_document.error(path, f"there is no stage {needed!r}; the stages are: {', '.join(spec.stages)}")
    _check_blind(spec, spec_document, name, stage)
    if isinstance(stage, GenerateStage):
        _check_generate(spec, spec_document, name, stage)
    if isinstance(stage, EvaluateStage):
        _check_evaluate(spec, spec_document, name, stage)
    if isinstance(stage, StructureStage | UtilityStage):
        _check_trials(spec, spec_document, name, stage)


def _drawn_by(spec: Spec, spec_document: Document, name: str, of: str) -> tuple[GenerateStage, TrainStage | None]:
    """The generate stage that a stage is `of`, and what trained its model; None if that is no train stage, which is told elsewhere."""
    drawn = spec.stages[of]
    if not isinstance(drawn, GenerateStage):
        raise spec_document.error(("stages", name, "of"), f"{of} is a {drawn.kind} stage; name a generate stage")
    if drawn.spacing_mm is not None:
        raise spec_document.error(("stages", name, "of"), f"the images of {of} have a spacing of their own (spacing_mm), and those of the data cannot be compared with them pixel by pixel; name a stage without it")
    source = spec.stages.get(drawn.source)
    return drawn, source if isinstance(source, TrainStage) else None


def _check_trials(spec: Spec, spec_document: Document, name: str, stage: StructureStage | UtilityStage) -> None:
    drawn, source = _drawn_by(spec, spec_document, name, stage.of)
    if source is None:
        return
    config = family_config(source.config)
    if config.output_kind == "mask":
        raise spec_document.error(("stages", name, "of"), f"{stage.of} makes masks; name a generate stage of images")
    problem = _structure_problem(stage, drawn, source, config) if isinstance(stage, StructureStage) else _utility_problem(stage, drawn, config)
    if problem is not None:
        raise spec_document.error(("stages", name, problem[0]), problem[1])
    assert spec.data is not None  # a train stage is there
    levels, size = len(stage.unet_channels or [1]), spec.data.size
    if size % 2 ** (levels - 1) or size < 2**levels:
        raise spec_document.error(("stages", name, "channels"), f"a U-Net of {levels} levels halves its images {levels - 1} times, which {size} pixels do not allow; use fewer levels")


def _structure_problem(stage: StructureStage, drawn: GenerateStage, source: TrainStage, config: FamilyConfig) -> tuple[str, str] | None:
    """The key to blame, and why; None if there is nothing."""
    if _draws_without_mask(drawn, config):
        return "of", f"{stage.of} is drawn on no masks, so there is none that its images could agree with; remove this stage"
    if "seg" not in config.condition_channels:
        return "of", f"the model of {drawn.source} is given no mask, so there is none that its images could agree with; remove this stage"
    if source.repeat is not None and stage.against == "val":
        return "against", f"{drawn.source} was trained on the val split too; write against: test"
    return None


def _draws_without_mask(drawn: GenerateStage, config: FamilyConfig) -> bool:
    """Of models that may."""
    return "masked" in config.condition_channels and (drawn.condition is None or "mask" in drawn.without)


def _utility_problem(stage: UtilityStage, drawn: GenerateStage, config: FamilyConfig) -> tuple[str, str] | None:
    """The key to blame, and why; None if there is nothing."""
    if drawn.condition in ("val", "test"):
        used = "tested on" if drawn.condition == "test" else "chosen by"
        return "of", f"{stage.of} was drawn on masks of the {drawn.condition} split, which the arms are {used}; draw images to train on with condition: train, or on generated masks"
    if stage.task == "classification" and config.uses_captions and not config.uses_labels and drawn.per_class is None:
        return "task", f"the images of {stage.of} may be of no class: write per_class, and condition: train, in {stage.of}; or task: segmentation here"
    if stage.task == "classification" and not config.uses_labels and not config.uses_captions:
        return "task", f"the model of {drawn.source} knows no classes, so its images have no labels to learn; write task: segmentation"
    if stage.task == "segmentation" and ("seg" not in config.input_channels or _draws_without_mask(drawn, config)):
        return "task", f"the images of {stage.of} come without masks, so there is nothing to learn from them; write task: classification"
    return None


def _check_evaluate(spec: Spec, spec_document: Document, name: str, stage: EvaluateStage) -> None:
    path = ("stages", name)
    drawn, source = _drawn_by(spec, spec_document, name, stage.of)
    if source is None:
        return
    if source.repeat is not None and stage.against == "val":
        raise spec_document.error((*path, "against"), f"{drawn.source} was trained on the val split too; compare its images with the test split")
    config = family_config(source.config)
    if "auc" in stage.metrics and not config.classifies:
        raise spec_document.error((*path, "metrics"), f"auc: the model of {drawn.source} tells no classes apart; remove it")
    if spec.data is not None and spec.data.has_regions and stage.problem_of_regions is not None:
        raise spec_document.error(path, stage.problem_of_regions)
    if "registration" in stage.metrics and len(config.output_channels) == 1:
        raise spec_document.error((*path, "metrics"), f"registration compares channels, and the model of {drawn.source} makes {config.output_channels[0]} alone; remove it")


def _check_generate(spec: Spec, spec_document: Document, name: str, stage: GenerateStage) -> None:
    path = ("stages", name)
    source = spec.stages[stage.source]
    if not isinstance(source, TrainStage):
        raise spec_document.error((*path, "from"), f"{stage.source} is a {source.kind} stage; name a train stage")
    config = family_config(source.config)
    if stage.condition is None and config.uses_captions and stage.captions is None:
        raise spec_document.error(path, f"the model of {stage.source} is told captions; add condition: test, for those of that split and their masks, or captions: [...]")
    if stage.condition is None and config.condition_channels and not config.uses_captions:
        needed = ", ".join(config.condition_channels)
        raise spec_document.error(path, f"the model of {stage.source} is conditioned on {needed}; add condition: test or a generate stage of masks")
    if not config.condition_channels and not config.uses_captions and stage.condition is not None:
        raise spec_document.error((*path, "condition"), f"the model of {stage.source} takes no condition; remove it")
    problem = _told_problem(stage, config)
    if problem is not None:
        raise spec_document.error((*path, problem[0]), problem[1])
    if stage.per_class is not None and config.uses_captions and (stage.condition not in SPLITS or stage.captions is not None or "caption" in stage.without):
        raise spec_document.error((*path, "per_class"), f"the model of {stage.source} is told captions: per_class chooses those of each class of a split; write condition: train, without captions of your own, or count: {stage.count}")
    if stage.per_class is not None and not config.uses_labels and not config.uses_captions:
        raise spec_document.error((*path, "per_class"), f"the model of {stage.source} knows no classes; write count: {stage.count}")
    if stage.stack and not config.uses_labels:
        raise spec_document.error((*path, "stack"), f"a stack is sorted by class, and the model of {stage.source} knows no classes; remove it")
    problem = _map_problem(stage, config, spec.data) if spec.data is not None else None
    if problem is not None:
        raise spec_document.error((*path, problem[0]), problem[1])
    unfit = spec_accept.problem(stage.accept, config, spec.data.size, stage.source) if stage.accept is not None and spec.data is not None else None
    if unfit is not None:
        raise spec_document.error((*path, "accept"), unfit)
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
        sampling = config.sampling(stage.sampling)
    except ValueError as error:
        raise spec_document.error((*path, "sampling"), document.told(error) if isinstance(error, ValidationError) else str(error)) from None
    stage.sampling.clear()
    stage.sampling.update(sampling.model_dump(mode="json"))  # the resolved form, like that of a training


def _told_problem(stage: GenerateStage, config: FamilyConfig) -> tuple[str, str] | None:
    """The key to blame, and why, of what only models can be told that read captions; None if there is nothing."""
    if stage.captions is not None and not config.uses_captions:
        return "captions", f"the model of {stage.source} reads no captions; remove it"
    if "caption" in stage.without and not config.uses_captions:
        return "without", f"the model of {stage.source} is told no caption; remove it"
    if "mask" in stage.without and "masked" not in config.condition_channels:
        return "without", f"the model of {stage.source} cannot draw without a mask; remove it" if "seg" in config.condition_channels else f"the model of {stage.source} is told no mask; remove it"
    return None


def _map_problem(stage: GenerateStage, config: FamilyConfig, data: DataSpec) -> tuple[str, str] | None:
    """The key to blame, and why, of what only images with contours can be made with; None if there is nothing."""
    if stage.format == "png" and data.has_regions:
        return "format", "png holds neither the regions of a mask nor millimetres; write nifti or npy"
    if stage.spacing_mm is not None and not data.keeps_contours:
        return "spacing_mm", f"the masks of format: {data.format} are made already, and cannot be drawn again at another spacing; remove it"
    if stage.spacing_mm is not None and not config.uses_sizes:
        return "spacing_mm", f"the model of {stage.source} is not told the size of pixels; remove it"
    if stage.export and data.format != "cardiac":
        return "export", f"format: {data.format} says no unit that its images could be written in; remove it"
    if stage.export and stage.condition is None:
        return "export", "images that are drawn on no contours have no place in a patient; remove it"
    return None


def _check_blind(spec: Spec, spec_document: Document, name: str, stage: AnyStage) -> None:
    """A training that may not look at the val split chooses nothing by it."""
    path = ("stages", name)
    if isinstance(stage, TrainStage) and stage.repeat is not None and not family_config(stage.config).looks_at_val:
        raise spec_document.error((*path, "repeat"), f"{stage.repeat} is not judged by the val split, so that there are no best epochs to repeat; remove this stage")
    if isinstance(stage, GenerateStage) and stage.checkpoint.startswith("best-"):
        source = spec.stages.get(stage.source)
        if isinstance(source, TrainStage) and not family_config(source.config).looks_at_val:
            raise spec_document.error((*path, "checkpoint"), f"{stage.source} is not judged by the val split, so that it has no {stage.checkpoint}; write checkpoint: last")


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
