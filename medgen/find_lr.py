"""`medgen find-lr`: the learning rate that a train stage of a spec would find, without a run. Called by cli.py.

Data order, noise and initial weights are those of the run that the spec would make, so that `find_lr: true` finds the same there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from medgen import dist, document, files, lr_search, rundir, search_pictures, spec, train
from medgen.alone import alone
from medgen.errors import InputError
from medgen.launch import submit
from medgen.launch.submit import Prepared
from medgen.lr_curve import Curve
from medgen.models.settings import FamilyConfig, LrSearch
from medgen.plan import PlannedStage

RECORD = "find_lr.json"
SHOWN_RATES = 13  # of the curve, on the screen
BAR_WIDTH = 40


def find_lr(spec_path: Path, overrides: Sequence[str], stage_name: str | None, steps: int | None, out: Path) -> str:
    """Search, and write find_lr.json and find_lr.png into the new folder `out`; returns what to print. Raises InputError."""
    files.require_new(out)
    points = submit.prepare(spec_path, overrides, None, rundir.runs_root(), local=True)
    stage = _stage(points[0], stage_name)
    config: FamilyConfig = spec.family_config(stage.settings["config"])
    settings = _settings(stage, config, steps)
    work = alone(points[0].run, points[0].plan, stage, stage.tasks[0])
    with dist.joined_ranks(stage.threads) as ranks:
        training = train.prepare_search(work, ranks)
        work.say(f"{stage.name}: {settings.steps} learning rates on {len(training.rows):,} training slices of {training.store.size} px, on {ranks.device_name}")
        curve = lr_search.search(training, settings)
    written = stage.settings["config"].get("lr")
    facts = {"spec": str(spec_path), "overrides": list(overrides), "stage": stage.name, "run_id": points[0].plan.run_id, "device": ranks.device_name, "written_lr": written}
    with files.folder_in_one_move(out) as folder:
        lr_search.write(folder / RECORD, curve, facts)
    of_points = [f"the first of {len(points)} points of the sweep: {_values(points[0])}"] if len(points) > 1 else []
    return "\n".join([*of_points, *_screen(curve), "", *_advice(stage.name, curve, written), f"{out}: {RECORD}, {search_pictures.beside(Path(RECORD)).name}"])


def _stage(prepared: Prepared, name: str | None) -> PlannedStage:
    """The only train stage, or the one asked for. Raises InputError for one that repeats another."""
    stage = prepared.plan.only_stage("train", name)
    if stage.settings["repeat"] is not None:
        raise InputError(f"--stage {stage.name}: it repeats {stage.settings['repeat']}, with that stage's learning rate; name that one")
    return stage


def _settings(stage: PlannedStage, config: FamilyConfig, steps: int | None) -> LrSearch:
    """As the configuration has, or the option. Raises InputError where nothing can be found."""
    try:
        type(config).model_validate({key: value for key, value in config.model_dump(mode="json").items() if key != "lr"} | {"find_lr": True})
        return LrSearch(steps=steps) if steps is not None else config.find_lr or LrSearch()
    except ValidationError as error:
        raise InputError(f"{stage.name}: {document.told(error)}") from None


def _values(prepared: Prepared) -> str:
    return ", ".join(f"{key}={value}" for key, value in prepared.point.values.items())


def _screen(curve: Curve) -> list[str]:
    """The smoothed curve as bars, a line for every few rates; the suggestion is marked."""
    places = sorted({round(number * (len(curve.rates) - 1) / (SHOWN_RATES - 1)) for number in range(SHOWN_RATES)})
    highest = max(curve.smoothed[: curve.lowest + 1])
    nearest = min(places, key=lambda place: abs(math.log(curve.rates[place] / curve.suggestion)))
    lines = ["       lr  smoothed loss"]
    for place in places:
        value = curve.smoothed[place]
        bar = "#" * round(BAR_WIDTH * min(1.0, value / highest)) + (" ..." if value > highest else "") if math.isfinite(value) else "not finite"
        lines.append(f"  {curve.rates[place]:.1e}  {value:8.4f}  {bar}" + ("  <- suggestion" if place == nearest else ""))
    return lines


def _advice(stage: str, curve: Curve, written: float | None) -> list[str]:
    compared = "" if written is None else f"; the configuration has {written:.2e}"
    return [f"lr {curve.suggestion:.2e}: {curve.in_words}{compared}", f"in the configuration: lr: {curve.suggestion:.2e}",
            f"or: medgen submit ... -o stages.{stage}.config.lr={curve.suggestion:.2e}"]  # fmt: skip
