"""`medgen check` and `medgen data`: try a spec for real before it is queued. Called by cli.py.

check reads every volume and takes one small step of every model: what would fail in three hours fails now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen import plan, rundir, site, spec
from medgen.errors import InputError
from medgen.launch import submit
from medgen.plan import Plan
from medgen.spec import Spec, TrainStage

TRIAL_SAMPLES = 2


@dataclass(frozen=True)
class Told:
    """The same answer for scripts (`record`) and for people (`text`)."""

    record: dict[str, Any]
    text: str


def check(spec_path: Path, overrides: Sequence[str], site_name: str | None) -> Told:
    """Spec, plan, data and one step of every model. Raises InputError for the first thing that is wrong."""
    checked = spec.load(spec_path, site.spec_overrides(overrides))
    planned = plan.make_plan(checked, site.load(site_name, overrides))
    submit.check_data(checked)
    store, summary = _open(checked)
    tasks = sum(len(stage.tasks) for stage in planned.stages)
    record: dict[str, Any] = {"run_id": planned.run_id, "stages": len(planned.stages), "tasks": tasks, "data": summary, "models": {}}
    lines = [f"{spec_path}: fine; run {planned.run_id}, {len(planned.stages)} stages, {tasks} tasks",
             f"  data: {_data_line(store)}"]
    for name, stage in checked.stages.items():
        if isinstance(stage, TrainStage):
            trial = _try_model(checked, planned, name, stage, store)
            record["models"][name] = trial
            lines.append(f"  {name}: {trial['parameters']:,} parameters, checkpoint {trial['checkpoint_mebibytes']:.0f} MiB, "
                         f"{trial['steps']:,} steps; one step, validation and sampling of {TRIAL_SAMPLES} images work ({trial['seconds']:.1f} s)")
    return Told(record, "\n".join(lines))


def show_data(spec_path: Path, overrides: Sequence[str], out: Path, as_json: bool) -> None:
    """Print what the data are and write contact_sheet.png and histogram.png into `out`."""
    import json

    from rich.console import Console

    from medgen.data import summary

    store, facts = _open(spec.load(spec_path, overrides))
    out.mkdir(parents=True, exist_ok=True)
    summary.contact_sheet(store, out / "contact_sheet.png")
    if store.channels:
        summary.histogram(store, out / "histogram.png")
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = Console()
    summary.print_summary(store, console)
    console.print(f"pictures: {out / 'contact_sheet.png'}" + (f", {out / 'histogram.png'}" if store.channels else ""), highlight=False)


def _open(checked: Spec) -> tuple[Any, dict[str, Any]]:
    import sys

    from medgen.data import summary
    from medgen.data.store import open_store

    if checked.data is None:
        raise InputError("this spec has no data to look at: every stage is a command")
    store = open_store(checked.data, checked.seed, rundir.cache_root(rundir.runs_root()), lambda text: print(text, file=sys.stderr))
    return store, summary.summarise(store)


def _data_line(store: Any) -> str:
    groups = store.rows.groupby("split", sort=False)
    return ", ".join(f"{split} {group.patient.nunique()} patients, {len(group):,} slices" for split, group in groups)


def _try_model(checked: Spec, planned: Plan, name: str, stage: TrainStage, store: Any) -> dict[str, Any]:
    """One step, one validation and one sampling of the stage's model on two slices, on the CPU."""
    import math

    import torch

    from medgen.context import Context
    from medgen.dist import Ranks
    from medgen.models.base import Batch, DataShape, SampleNoise
    from medgen.train import build_model, load_channel

    started = time.monotonic()
    config = spec.family_config(stage.config)
    rows = store.select("train", config.trains_positive_only(checked.data))
    cpu = torch.device("cpu")
    model = build_model(stage.config["model"], config, DataShape(config.input_channels, store.size), checked.seed, name)
    parameters = sum(parameter.numel() for optimizer in model.optimizers().values() for group in optimizer.param_groups for parameter in group["params"])
    sizes = sum(tensor.nbytes for module in model.modules().values() for tensor in module.state_dict().values())
    channels = {channel: load_channel(store, channel, rows[:TRIAL_SAMPLES], cpu) for channel in config.input_channels}
    batch = Batch(channels, list(range(len(rows[:TRIAL_SAMPLES]))), checked.seed)
    context = Context(Ranks(0, 1, 0, cpu), "fp32", None)
    loss = float(model.step(batch, context).scalars["loss"])
    with torch.no_grad():
        model.validate(batch, context)
    conditions = {channel: channels[channel] for channel in config.condition_channels}
    settings = config.preview_sampling().model_copy(update={"steps": 2})
    images = model.sample(SampleNoise(checked.seed, "check", [(number,) for number in range(len(batch))], cpu), conditions, settings)
    if not math.isfinite(loss) or not all(bool(torch.isfinite(tensor).all()) for tensor in images.values()):
        raise InputError(f"stages.{name}: the first step gives a loss of {loss}; look at the data with `medgen data`")
    ranks = planned.stage(name).ranks
    for phase in model.phases():
        if phase.batch_size % ranks:
            raise InputError(f"stages.{name}: batch_size: {phase.batch_size} cannot be shared evenly by {ranks} ranks; use a multiple")
    steps = sum(math.ceil(phase.epochs * len(rows) / phase.batch_size) for phase in model.phases())
    # weights and averages as they are, and Adam's two moments
    return {"parameters": parameters, "checkpoint_mebibytes": (sizes + 8 * parameters) / 2**20, "steps": steps,
            "first_loss": loss, "seconds": time.monotonic() - started}
