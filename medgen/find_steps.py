"""`medgen find-steps`: how many sampling steps are enough for a generate stage of a run, by KID to a held-out split. Called by cli.py.

Every number of steps draws the same images: the same noise, conditions and classes. What was measured is in the run and is not
measured again, so that a search that was cut goes on, and a second sampler joins the table of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medgen import alone, dist, document, files, generate, lr_search, rundir, search_pictures, spec, step_search
from medgen import plan as planning
from medgen.data.store import open_store
from medgen.errors import InputError
from medgen.evaluate.features import Bench
from medgen.models.settings import FamilyConfig, SteppedSampling
from medgen.plan import Plan, PlannedStage, Shard, Task
from medgen.prepare.page import Table
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.spec_evaluate import Measures
from medgen.spec_stages import GenerateStage
from medgen.step_measure import Judge, Measured
from medgen.two_folders import extractor_asked

DEFAULT_EXTRACTOR = "encoder"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; None: as the run has it."""

    stage: str | None
    samplers: list[str] | None
    low: int
    high: int
    images: int
    against: str
    extractor: str | None


def find_steps(which: str, asked: Asked) -> str:
    """Search, and write find_steps.json and find_steps.png into the stage's folder; returns what to print. Raises InputError."""
    if asked.low > asked.high:
        raise InputError(f"--low {asked.low} is above --high {asked.high}")
    run = rundir.find_run(which)
    plan = planning.read(run)
    planned = _image_stage(run, plan, asked.stage)
    config: FamilyConfig = spec.family_config(plan.stage(planned.settings["from"]).settings["config"])
    _check_split(plan, planned, asked.against)
    settings = _settings(planned, config, asked)
    samplings = _Samplings(config, planned, asked)
    measures = _measures(plan, planned, asked)
    console = Console(stderr=True)
    stage = replace(planned, settings=settings.model_dump(mode="json", by_alias=True))
    work = alone.alone(run, plan, stage, Task(stage.name, 0, "", Shard(0, asked.images)))
    work.require(settings.source)
    with dist.joined_ranks(stage.threads) as ranks, Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:  # fmt: skip
        torch.use_deterministic_algorithms(True, warn_only=True)
        shown = bar.add_task("images", total=asked.images)
        made_by = generate.prepare(work, settings, ranks.device)
        store = open_store(DataSpec.model_validate(plan.data), plan.seed, run.cache, work.say)
        judge = Judge(made_by, samplings.first, store, asked.against, measures, Bench(run.cache, work.say, lambda *_: None), lambda done, of: bar.update(shown, completed=done, total=of))
        protocol = {
            "stage": stage.name, "checkpoint": made_by.checkpoint.sha256, "data": made_by.store.fingerprint, "images": asked.images, "against": asked.against,
            "reference": len(judge.sides.reference), "extractor": judge.extractor, "seed": plan.seed, "other_sampling": samplings.others, "noise": judge.units,
        }  # fmt: skip
        search = _Search(run, stage.name, protocol, judge, samplings, asked)
        for sampler in samplings.names:
            step_search.golden_section(partial(search.kid_at, sampler), asked.low, asked.high)
        search.down_to_the_smallest()
    return search.conclude()


# what is searched


def _image_stage(run: RunDir, plan: Plan, name: str | None) -> PlannedStage:
    """The only generate stage that draws images, or the one asked for. Raises InputError for one that draws masks."""
    drawing = {stage.name: stage for stage in plan.stages if stage.kind == "generate"}
    kinds = {key: spec.family_config(plan.stage(stage.settings["from"]).settings["config"]).output_kind for key, stage in drawing.items()}
    fitting = [key for key, kind in kinds.items() if kind == "image"]
    if name is not None and name in drawing and name not in fitting:
        raise InputError(f"--stage {name}: it draws masks, and KID compares the features of images; name a stage that draws images: {', '.join(fitting) or 'there is none'}")
    if name is not None and name not in drawing:
        kind = next((f"it is a {stage.kind} stage" for stage in plan.stages if stage.name == name), f"{run.run_id} has no such stage")
        raise InputError(f"--stage {name}: {kind}; those that draw images: {', '.join(fitting) or 'none'}")
    if name is None and len(fitting) != 1:
        raise InputError(f"{run.run_id}: say which stage with --stage; generate stages that draw images: {', '.join(fitting) or 'none'}")
    return drawing[name if name is not None else fitting[0]]


def _check_split(plan: Plan, stage: PlannedStage, against: str) -> None:
    if against == "test":
        raise InputError("--against test: what is chosen by the test split cannot be judged by it any more; choose by val, and let the evaluate stage compare with test")
    if against in plan.trained_on(stage.name) and against != "train":
        raise InputError(f"--against {against}: {stage.settings['from']} was trained on the {against} split too, so that nothing is left to choose by; "
                         "search in the stage that it repeats, and write the same steps here")  # fmt: skip


def _settings(planned: PlannedStage, config: FamilyConfig, asked: Asked) -> GenerateStage:
    """The stage with other images: real conditions of the split that they are compared with, evenly spread, in that one's pixels."""
    condition = asked.against if config.condition_channels else None
    changes: dict[str, Any] = {"count": asked.images, "per_class": None, "condition": condition, "shards": 1, "parallel": None, "spacing_mm": None, "export": []}
    return GenerateStage.model_validate({**planned.settings, **changes})


class _Samplings:
    """The sampling settings for a sampler and a number of steps; all else is as the stage has it. Raises InputError where there are no steps."""

    def __init__(self, config: FamilyConfig, stage: PlannedStage, asked: Asked):
        self._config, written = config, stage.settings["sampling"]
        usual = config.sampling(written)
        if not isinstance(usual, SteppedSampling):
            raise InputError(f"{stage.name}: {stage.settings['from']} samples in one go, so that there are no steps to choose")
        self.others = {key: value for key, value in written.items() if key not in ("sampler", "steps")}
        own = usual.model_dump()
        if asked.samplers is not None and "" in asked.samplers:
            raise InputError(f"--sampler {','.join(asked.samplers)!r}: an empty name among them; write names with commas between, as in euler,heun")
        if asked.samplers is not None and "sampler" not in own:
            raise InputError(f"--sampler {','.join(asked.samplers)}: {stage.settings['from']} has one way to sample; remove it")
        self.has_samplers = "sampler" in own
        self.names: list[str] = asked.samplers if asked.samplers is not None else [own["sampler"] if self.has_samplers else "sampler"]
        for name in self.names:
            for steps in (asked.low, asked.high):
                self.of(name, steps)

    @property
    def first(self) -> SteppedSampling:
        return self.of(self.names[0], 1)

    def to_write(self, sampler: str, steps: int) -> dict[str, Any]:
        """The settings in a spec, without what is the default."""
        chosen = self._chosen(sampler, steps)
        usual = self._config.sampling(chosen).model_dump(mode="json")
        return {**chosen, **{key: value for key, value in self.others.items() if value != usual[key]}}

    def _chosen(self, sampler: str, steps: int) -> dict[str, Any]:
        return {**({"sampler": sampler} if self.has_samplers else {}), "steps": steps}

    def of(self, sampler: str, steps: int) -> SteppedSampling:
        try:
            found = self._config.sampling({**self.others, **self._chosen(sampler, steps)})
        except ValidationError as error:
            raise InputError(f"{sampler} with steps: {steps} (--sampler, --low, --high): {document.told(error)}") from None
        except ValueError as error:
            raise InputError(f"{sampler} with steps: {steps} (--sampler, --low, --high): {error}") from None
        assert isinstance(found, SteppedSampling), "it has steps"
        return found


def _measures(plan: Plan, stage: PlannedStage, asked: Asked) -> Measures:
    """KID with the extractor asked for, that of the run's evaluation of these images, or the encoder."""
    if asked.extractor is not None:
        chosen = extractor_asked(asked.extractor)
    else:
        evaluating = [item.settings["extractor"] for item in plan.stages if item.kind == "evaluate" and item.settings["of"] == stage.name]
        chosen = next((extractor for extractor in evaluating if extractor is not None), DEFAULT_EXTRACTOR)
    try:
        return Measures.model_validate({"metrics": ["kid"], "extractor": chosen})
    except ValidationError as error:
        raise InputError(f"--extractor: {document.told(error)}") from None


# the search


@dataclass
class _Search:
    """All that was measured under one protocol; what earlier searches have left in the record joins in."""

    run: RunDir
    stage: str
    protocol: dict[str, Any]
    judge: Judge
    samplings: _Samplings
    asked: Asked
    measured: dict[tuple[str, int], Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.run.step_search(self.stage)
        record = _read(path)
        if record is not None and record["protocol"] != self.protocol:  # another question: its answer is kept under a name of its own
            for answer in (path, search_pictures.beside(path)):
                if answer.is_file():
                    answer.replace(_set_apart(answer, record["protocol"]))
            record = _read(_set_apart(path, self.protocol))
        if record is not None and record["protocol"] == self.protocol:
            self.measured = {(item["sampler"], item["steps"]): Measured(**{**item, "replicates": np.array(item["replicates"])}) for item in record["measured"]}

    def at(self, sampler: str, steps: int) -> Measured:
        key = sampler, steps
        if key not in self.measured:
            self.measured[key] = self.judge.measure(sampler, self.samplings.of(sampler, steps))
            self._write()
            self.judge.say(f"{_named(self.measured[key])}: KID {self.measured[key].kid:.5f}")
        return self.measured[key]

    @property
    def best(self) -> Measured:
        return min(self.measured.values(), key=lambda item: (item.kid, item.evaluations))

    @property
    def chosen(self) -> Measured:
        """The fewest evaluations of the network that are as good as the best; going down from it, the first worse number ends the way."""
        as_good = [self.measured[sampler, self._smallest(sampler, good)] for sampler, good in self._as_good().items()]
        return min(as_good, key=lambda item: (item.evaluations, item.kid))

    def kid_at(self, sampler: str, steps: int) -> float:
        return self.at(sampler, steps).kid

    def down_to_the_smallest(self) -> None:
        """Of every sampler that is as good as the best; again if a better one is found on the way."""
        best = None
        while best is not self.best:
            best = self.best
            for sampler, good in self._as_good().items():
                self._smallest(sampler, good)

    def _as_good(self) -> dict[str, int]:
        """The best number of steps of each sampler that has one as good as the best."""
        found = {}
        for sampler in dict.fromkeys(sampler for sampler, _ in self.measured):
            own = min((item for item in self.measured.values() if item.sampler == sampler), key=lambda item: item.kid)
            if not own.is_worse_than(self.best):
                found[sampler] = own.steps
        return found

    def _smallest(self, sampler: str, good: int) -> int:
        best = self.best
        tried = [steps for name, steps in self.measured if name == sampler]
        return step_search.smallest_as_good(lambda steps: self.at(sampler, steps).is_worse_than(best), tried, good, min(self.asked.low, good))

    def _write(self, **more: Any) -> None:
        """After every number: what is known survives a kill."""
        measured = [{**vars(item), "replicates": [round(float(value), 9) for value in item.replicates]} for item in self.in_order]
        files.write_json(self.run.step_search(self.stage), files.with_own_hash({"protocol": self.protocol, **more, "measured": measured}))

    @property
    def in_order(self) -> list[Measured]:
        return sorted(self.measured.values(), key=lambda item: (item.sampler, item.steps))

    def conclude(self) -> str:
        """Write the verdict and the picture; returns the screen."""
        best, chosen = self.best, self.chosen
        path = self.run.step_search(self.stage)
        sampling = self.samplings.to_write(chosen.sampler, chosen.steps)
        self._write(best=_key(best), chosen=_key(chosen), sampling=sampling)
        search_pictures.draw_steps(search_pictures.beside(path), self.in_order, best, chosen, self._subject)
        rows = tuple(
            (item.sampler, str(item.steps), str(item.evaluations), f"{item.kid:.5f}", _range(item.interval), "" if item is best else f"{item.above(best)[0]:+.5f}",
             "" if item is best else _range(item.above(best)[1]), _verdict(item, best, chosen))
            for item in self.in_order
        )  # fmt: skip
        table = Table("", ("", "steps", "evaluations", "KID", "95%", "above the best", "95%", ""), rows)
        lines = [f"{self.run.run_id}, {self.stage}: {self._subject}", f"features: {self.judge.extractor}", f"noise: paired bootstrap {self.judge.units}", "", table.text(), ""]
        lines += _verdict_in_words(best, chosen, self.asked)
        written = ", ".join(f"{key}: {value}" for key, value in sampling.items())
        options = " ".join(f"-o stages.{self.stage}.sampling.{key}={value}" for key, value in sampling.items() if key in ("sampler", "steps"))
        return "\n".join([*lines, f"in the spec: sampling: {{{written}}}", f"or: medgen submit ... {options}", "", f"{path}, {search_pictures.beside(path).name}"])

    @property
    def _subject(self) -> str:
        return f"{self.protocol['images']} images of each, against {self.protocol['reference']} real {self.protocol['against']} slices"


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None if there is none, or not as it was written."""
    try:
        record = lr_search.read(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if "protocol" in record else None


def _set_apart(path: Path, protocol: dict[str, Any]) -> Path:
    """find_steps.json is of the last search, find_steps-<key>.json of one that asked something else."""
    return path.with_stem(f"{path.stem}-{files.sha256_json(protocol)[:8]}")


def _key(item: Measured) -> dict[str, Any]:
    return {"sampler": item.sampler, "steps": item.steps}


def _named(item: Measured) -> str:
    return f"{item.sampler} {item.steps} steps"


def _range(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.5f}, {ends[1]:.5f}]"


def _verdict(item: Measured, best: Measured, chosen: Measured) -> str:
    words = ["best"] if item is best else ["worse"] if item.is_worse_than(best) else ["not told apart"]
    return ", ".join([*words, *(["fewest"] if item is chosen else [])])


def _verdict_in_words(best: Measured, chosen: Measured, asked: Asked) -> Sequence[str]:
    lines = []
    if chosen is best:
        fewer = "it is the fewest that were tried" if best.steps == asked.low else "fewer are worse beyond the noise"
        lines.append(f"{_named(best)} have the lowest KID, and {fewer}.")
    else:
        difference, (low, high) = chosen.above(best)
        lines.append(f"{_named(chosen)} cannot be told from the best, {_named(best)}: {difference:+.5f} [{low:.5f}, {high:.5f}], "
                     f"with {chosen.evaluations} instead of {best.evaluations} evaluations of the network per image.")  # fmt: skip
    if chosen.steps == asked.low > 1:
        known = "is the best" if chosen is best else "cannot be told from the best"
        lines.append(f"--low {asked.low} {known}: write a smaller --low, or more --images, to know the fewest.")
    if best.steps == asked.high:
        lines.append(f"The best is --high {asked.high} itself: more may be better still.")
    return lines
