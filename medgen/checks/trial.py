"""One real step of every model before it is queued, on the CPU, and what the model will take of a GPU. Called by `medgen check`."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen import files, spec
from medgen.errors import InputError
from medgen.launch import record
from medgen.launch.findings import Finding
from medgen.launch.space import amount
from medgen.launch.submit import Prepared
from medgen.spec import Spec
from medgen.spec_stages import TrainStage

if TYPE_CHECKING:
    import numpy as np

    from medgen.data.store import SliceStore
    from medgen.models.base import Model
    from medgen.records import Records

TRIAL_SAMPLES = 2
TRIAL_SECONDS = 180.0  # longer ones are tried in shape only
FLOPS_PER_CORE = 15e9  # float32, a pessimistic core
ROUND_PASSES = 6  # forward passes that a round costs: step 3, validation 1, two sampling steps
GIB = 2**30
CONTEXT_BYTES, HEADROOM = GIB, 1.1  # CUDA itself; fragments and workspaces
BF16_SHARE = 0.6  # of the float32 activations: norms, softmax and losses stay float32


@dataclass(frozen=True)
class Size:
    """What a model takes, in bytes. `activations` and `flops` (of a forward pass) per sample, None where shapes alone do not tell."""

    parameters: int
    state: int  # everything a checkpoint holds of the modules: weights, averages, buffers
    activations: float | None
    flops: float | None

    @property
    def trained(self) -> int:
        """Modules, gradients and Adam's two moments, in float32."""
        return self.state + 12 * self.parameters


@dataclass(frozen=True)
class Trial:
    """One train stage of one point. `label`: the stage, and what a sweep has set."""

    item: Prepared
    name: str
    stage: TrainStage
    store: SliceStore
    label: str

    @property
    def ranks(self) -> int:
        return self.item.plan.stage(self.name).ranks

    @property
    def config(self) -> Any:
        return spec.family_config(self.stage.config)

    @cached_property
    def rows(self) -> np.ndarray:
        """Of the training slices in the store."""
        return self.store.select("train", self.config.trains_positive_only(self.item.spec.data))

    @cached_property
    def records(self) -> Records | None:
        """Of families that draw records. Raises InputError if there are too few."""
        from medgen.records import Records

        sampling, patients = self.config.record_sampling, self.store.rows["patient"].to_numpy()[self.rows]
        return Records(sampling, self.rows, patients, self.item.spec.seed, self.name) if sampling is not None else None


def data_key(checked: Spec) -> str:
    """Equal for points of a sweep that read the same slices."""
    return files.sha256_json([checked.data.model_dump(mode="json") if checked.data is not None else None, checked.seed])


def try_models(prepared: list[Prepared], stores: dict[str, SliceStore], say: Callable[[str], None]) -> list[Finding]:
    """A finding per distinct model; what was measured is kept for submit, under every run that has it."""
    known: dict[str, Finding] = {}
    for item in prepared:
        stages: dict[str, record.StageRecord] = {}
        complete = True
        for name, stage in item.spec.stages.items():
            if not isinstance(stage, TrainStage):
                continue
            data = data_key(item.spec)
            if data not in stores:
                complete = False
                continue
            key = files.sha256_json([stage.config, data, item.plan.stage(name).ranks])
            if key not in known:
                label = name if name not in {found.topic for found in known.values()} else f"{name} ({_point(item)})"
                known[key] = _try_or_tell(Trial(item, name, stage, stores[data], label), say)
            facts = known[key].facts
            complete = complete and known[key].mark != "wrong"
            if facts:
                stages[name] = record.StageRecord(facts["checkpoint_bytes"], facts["save_seconds"])
        if complete:
            record.write(item.run, record.Record(time.time(), stages))
    return list(known.values())


def _point(item: Prepared) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in item.point.values.items())


def _try_or_tell(trial: Trial, say: Callable[[str], None]) -> Finding:
    path = ("stages", trial.name)
    try:
        return _try_model(trial, say)
    except InputError as error:
        return Finding(trial.label, "wrong", str(trial.item.point.document.error(path, str(error))))
    except Exception as error:  # the code may be the user's own
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"one step fails: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        return Finding(trial.label, "wrong", str(trial.item.point.document.error((*path, "config"), words)))


def _try_model(trial: Trial, say: Callable[[str], None]) -> Finding:
    """One step, validation, sampling and save at full size on the CPU; where that would take too much, the shapes alone."""
    from medgen.training import steps_in

    rows, records = trial.rows, trial.records
    size = _measure_shapes(trial)
    steps = 0
    for phase in _build(trial, "meta").phases():
        steps += steps_in(phase, len(records) if records is not None else len(rows))
    facts: dict[str, Any] = {"parameters": size.parameters, "steps": steps, "first_loss": None, "step_seconds": None, "save_seconds": None,
                             "checkpoint_bytes": size.state + 8 * size.parameters}
    too_much, started = _too_much(size), time.monotonic()
    if too_much is None:
        say(f"{trial.label}: one step of {size.parameters:,} parameters on the CPU ...")
        measured, activations = _one_round(trial, rows)
        facts |= measured
        size = Size(size.parameters, size.state, activations, size.flops)
        done = f"step, validation, sampling and save work ({time.monotonic() - started:.1f} s, the save {facts['save_seconds']:.1f} s)"
    else:
        done = f"its shapes fit; not tried with numbers: {too_much}"
    facts["checkpoint_mebibytes"] = facts["checkpoint_bytes"] / 2**20
    facts["seconds"] = time.monotonic() - started
    text = f"{size.parameters:,} parameters, {steps:,} steps, checkpoint {amount(facts['checkpoint_bytes'])}; {done}"
    return _with_gpu_memory(trial, size, facts, text)


def _build(trial: Trial, device: str) -> Model:
    """`meta` builds shapes without numbers: no memory, no time."""
    import torch

    from medgen.training import build_model, shape_of
    config = trial.config
    with torch.device(device):
        return build_model(trial.stage.config["model"], config, shape_of(config, trial.store, trial.records), trial.item.spec.seed, trial.name)


def _measure_shapes(trial: Trial) -> Size:
    """From a model without numbers; a family whose forward pass looks at values tells its weights alone."""
    import torch

    from medgen.checks.shapes import FusedAttention, Kept, flop_counter
    from medgen.models.base import Batch

    model, config = _build(trial, "meta"), trial.config
    modules = list(model.modules().values())
    trained = {id(parameter): parameter.numel() for module in modules for parameter in module.parameters() if parameter.requires_grad}
    state = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
    size = Size(sum(trained.values()), state, None, None)
    for module in modules:
        module.requires_grad_(True)  # of averaged weights too: validation then keeps what a training step would
    channels = {name: torch.empty(TRIAL_SAMPLES, 1, trial.store.size, trial.store.size, device="meta") for name in config.input_channels}
    kept = Kept(model)
    try:
        with FusedAttention(), flop_counter() as flops, kept.counting():
            model.validate(Batch(channels, list(range(TRIAL_SAMPLES)), trial.item.spec.seed), _context(1))
    except Exception:  # whatever a family does with values that are not there
        return size
    return Size(size.parameters, state, kept.peak / TRIAL_SAMPLES, flops.get_total_flops() / TRIAL_SAMPLES)


def _context(steps_per_epoch: float) -> Any:
    import torch

    from medgen.context import Context
    from medgen.dist import Ranks

    context = Context(Ranks(0, 1, 0, torch.device("cpu")), "fp32", None)
    context.steps_per_epoch = steps_per_epoch
    return context


def _too_much(size: Size) -> str | None:
    """Why this machine should not try the model with numbers, in words."""
    memory, cores = free_memory_bytes(), len(os.sched_getaffinity(0))
    needed = size.trained + 2 * TRIAL_SAMPLES * (size.activations or 0)
    if needed > 0.7 * memory:
        return f"it takes about {amount(needed)} of memory, {amount(memory)} are free here"
    seconds = TRIAL_SAMPLES * (size.flops or 0) * ROUND_PASSES / (cores * FLOPS_PER_CORE)
    if seconds > TRIAL_SECONDS:
        return f"it would take about {seconds / 60:.0f} min on {cores} cores"
    return None


def free_memory_bytes() -> int:
    """What this process may still take: of the machine, and of its control group if that has a limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines()) if Path("/proc/meminfo").exists() else {}
    limits = [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else []
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no group of this kind, or `max`
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits, default=8 * GIB)


def _one_round(trial: Trial, rows: Any) -> tuple[dict[str, Any], float]:
    """Step, validate, sample and save on a few slices: what was measured, and the bytes kept per sample for the backward pass."""
    import torch

    from medgen.checks.shapes import Kept
    from medgen.models.base import Batch, Lot, SampleNoise
    from medgen.training import load_given

    model, config, cpu = _build(trial, "cpu"), trial.config, torch.device("cpu")
    chosen = rows[:TRIAL_SAMPLES]
    every = load_given(config, trial.store, chosen, cpu)
    batch = Batch(every.channels, list(range(len(chosen))), trial.item.spec.seed, labels=every.labels, sizes=every.sizes, captions=every.captions)
    trained = batch
    if config.record_sampling is not None:
        lot = Lot({name: images.unsqueeze(1) for name, images in every.channels.items()}, batch.positions, len(chosen), batch.seed, "check", 0)
        trained = Batch({}, batch.positions, batch.seed, lots=(lot,))
    kept, context, started = Kept(model), _context(len(rows) / model.phases()[0].batch_size), time.monotonic()
    with kept.counting():
        loss = float(model.step(trained, context).scalars["loss"])
    step_seconds = time.monotonic() - started
    with torch.no_grad():
        model.validate(batch, context)
    given = replace(every, channels={name: every.channels[name] for name in config.condition_channels})
    settings = config.preview_sampling().model_copy(update={"steps": 2})
    images = model.sample(SampleNoise(trial.item.spec.seed, "check", [(number,) for number in range(len(batch))], cpu), given, settings)
    if not math.isfinite(loss) or not all(bool(torch.isfinite(tensor).all()) for tensor in images.values()):
        raise InputError(f"the first step gives a loss of {loss}; look at the data with `medgen data`")
    checkpoint_bytes, save_seconds = _try_save(trial, model)
    measured = {"first_loss": loss if trial.config.looks_at_val else None, "step_seconds": step_seconds, "checkpoint_bytes": checkpoint_bytes, "save_seconds": save_seconds}
    return measured, kept.peak / len(chosen)


def _try_save(trial: Trial, model: Model) -> tuple[int, float]:
    """Bytes and seconds of one checkpoint, written where the caches are, read back and removed."""
    from medgen import checkpoint

    objects: dict[str, Any] = {f"modules.{name}": module.state_dict() for name, module in model.modules().items()}
    objects |= {f"optimizers.{name}": optimizer.state_dict() for name, optimizer in model.optimizers().items()}
    cache = trial.item.run.cache
    files.private_folder(cache)
    with tempfile.TemporaryDirectory(prefix=".check.", dir=cache) as folder:
        started = time.monotonic()
        saved = checkpoint.save(Path(folder), 1, objects, {}, {})
        seconds = time.monotonic() - started
        problem = checkpoint.problem_with(saved.folder)
        if problem is not None:
            raise InputError(f"a checkpoint in {cache} does not read back: {problem}; is the disk in order?")
        return saved.size_bytes, seconds


# --- memory of a GPU -------------------------------------------------------------------------------------------------


def _with_gpu_memory(trial: Trial, size: Size, facts: dict[str, Any], text: str) -> Finding:
    """The estimate beside what the GPUs that may come have. Never wrong, only a warning: it is an estimate."""
    if not trial.item.plan.stage(trial.name).gpus_per_node or size.activations is None:
        return Finding(trial.label, "fine", text, facts)
    loop = trial.config.loop
    share = max(-(-phase.batch_size // trial.ranks) for phase in _build(trial, "meta").phases())
    if loop.micro_batch == "auto":
        share = min(share, trial.config.micro_batch_multiple)  # the least it can choose
    samples = min(share, loop.micro_batch) if isinstance(loop.micro_batch, int) else share
    activations = samples * size.activations * (1.0 if loop.precision == "fp32" else BF16_SHARE)
    needed = (size.trained + activations) * HEADROOM + CONTEXT_BYTES
    bound = "at most" if loop.checkpoint_activations else "about"  # what is computed twice is not kept
    have = gpu_memory_bytes(trial.item, trial.name)
    facts |= {"gpu_needed_bytes": round(needed), "gpu_have_bytes": have}
    told = f"{bound} {amount(needed)} of GPU memory (model and optimizer {amount(size.trained)}, activations of {samples} samples {amount(activations)})"
    if have is None or needed <= have or loop.checkpoint_activations:
        return Finding(trial.label, "fine", f"{text}; {told}" + (f", and the GPU has {amount(have)}" if have else ""), facts)
    advice = f"ask for gpu: {{memory: {-(-round(needed) // GIB)}G}}" if trial.item.site.scheduler == "slurm" else "take a smaller model"
    if samples > 1:
        advice += f", or set loop.micro_batch below {samples}, which gives the same steps from smaller passes"
    if "blocks" in trial.config.offers:
        advice += ", or loop.checkpoint_activations: true, which computes activations twice instead of keeping them"
    message = f"{told} may not fit a GPU of {amount(have)}, which it may get; {advice}"
    return Finding(trial.label, "warning", f"{text}\n{trial.item.point.document.error(('stages', trial.name, 'resources', 'gpu'), message)}", facts)


def gpu_memory_bytes(item: Prepared, name: str) -> int | None:
    """Of the smallest GPU that the stage may get, None if nobody tells."""
    request = item.spec.stages[name].resources.gpu
    if item.site.scheduler != "slurm":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    if request is not None and request.memory is not None:
        return request.memory * 2**20
    names = request.any_of if request is not None and request.any_of else list(item.site.features)
    sizes = [min(sizes) for feature, sizes in item.site.features.items() if feature in names and sizes]
    return min(sizes) * 2**20 if sizes else None
