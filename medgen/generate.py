"""Generation: one shard of images, drawn in fixed chunks so that bytes do not depend on the number of shards.

Called by `medgen generate` through task.perform; what a shard is and when it is whole: shards.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgen import checkpoint, dist, fault, files, rng, spec
from medgen import plan as planning
from medgen.checkpoint import Checkpoint
from medgen.conditions import Classes, Condition, classes_of, conditions_of, require_possible
from medgen.data.image_files import Kind, write_slice
from medgen.data.store import SliceStore, open_store
from medgen.errors import InputError, Interrupted, MedgenError
from medgen.exports import Exports
from medgen.gate import accounts, fit
from medgen.gate.judge import OF_ALL_CLASSES, Gate, Verdict, judge_mask
from medgen.models.base import Given, Model, SampleNoise, Sizes
from medgen.models.settings import FamilyConfig, Settings
from medgen.plan import PlannedStage
from medgen.resume import check_identity
from medgen.shards import MANIFEST, MANIFEST_VERSION, Counts, files_listed, read_manifest, set_aside, shard_problem
from medgen.spec_accept import AcceptImages, AcceptMasks
from medgen.spec_data import SPLITS, DataSpec
from medgen.spec_stages import GenerateStage
from medgen.task import Done, Work
from medgen.training import of_size, shape_of, sizes_of, trained_model

SUFFIX = {"nifti": ".nii.gz", "png": ".png", "npy": ".npy"}
MOST_SHOWN = 8  # rejected images of a shard that are kept, for the report
Channels = dict[str, np.ndarray]  # channel -> [H, W] of one image


@dataclass
class Generation:
    """The parts that a shard needs."""

    work: Work
    stage: PlannedStage
    config: FamilyConfig
    model: Model
    sampling: Settings
    checkpoint: Checkpoint
    accept: AcceptMasks | AcceptImages | None
    conditions: dict[int, Condition]
    classes: Classes | None
    affine: np.ndarray  # of images without a condition, at the full size
    full_size: int  # pixels
    device: torch.device
    store: SliceStore
    exports: Exports
    counts: Counts
    gates: dict[int, Gate] = field(default_factory=dict)  # by pixels per side: known when the first image is there


@dataclass(frozen=True)
class Drawn:
    """One drawing of an image; `attempt` counts from 0."""

    index: int
    attempt: int
    channels: Channels
    verdict: Verdict


def generate(work: Work) -> Done:
    """Make one shard; a shard that is already there and verifies is kept as it is."""
    settings = GenerateStage.model_validate(work.stage.settings)
    work.require(settings.source)
    if settings.condition and settings.condition not in SPLITS:
        work.require(planning.collect_name(settings.condition))
    target = work.run.shard(work.stage.name, work.task.shard)
    files.sweep_temporaries(target.parent, target.name)
    if target.exists():
        problem = shard_problem(target, work.task)
        if problem is None:
            work.say(f"{work.stage.name}: shard {work.task.shard} is complete and verifies; kept")
            return _done(target)
        set_aside(work.run, work.stage.name, work.task.shard, problem)
    with dist.joined_ranks(work.stage.threads) as ranks:
        work.device_name = ranks.device_name
        torch.use_deterministic_algorithms(True, warn_only=True)
        generation = prepare(work, settings, ranks.device)
        try:
            with files.folder_in_one_move(target) as folder:
                entries, shown = _draw_shard(generation, folder)
                files.write_json(folder / MANIFEST, files.with_own_hash(_manifest(generation, entries, shown)))
                if fault.ARMED:
                    fault.at("shard.commit")
        except OSError:  # where locks do not hold, another process may have published it meanwhile
            if shard_problem(target, work.task) is not None:
                raise
            work.say(f"{work.stage.name}: another process has finished shard {work.task.shard} first; that one is kept")
    return _done(target)


def prepare(work: Work, settings: GenerateStage, device: torch.device) -> Generation:
    """The parts for the images of `work.task`. Raises InputError for other data, MedgenError if the checkpoint is lost."""
    stage = work.stage
    source = work.plan.stage(settings.source)
    config: FamilyConfig = spec.family_config(source.settings["config"])
    data = DataSpec.model_validate(work.plan.data)
    store = open_store(data, work.plan.seed, work.run.cache, work.say)
    chosen = _promised_checkpoint(work, source.name, settings.checkpoint)
    check_identity(chosen, chosen.state(), {"data": work.run.data_mark(store.fingerprint), "size": store.size})
    model = trained_model(chosen, source.settings["config"]["model"], config, shape_of(config, store), device)
    accept = settings.accept or (AcceptMasks() if config.output_kind == "mask" else None)
    assert work.task.images is not None
    indices = range(work.task.images.first, work.task.images.stop)
    classes = classes_of(settings, store, config)
    require_possible(settings, config, store)
    conditions = conditions_of(work, settings, data, config, store, indices, classes)
    work.say(f"{stage.name}: images {indices.start} to {indices.stop - 1} from {chosen.folder.name} of {source.name} ({settings.checkpoint})")
    exports = Exports.of(settings.export, data, store, f"{work.run.run_id}/{stage.name}/{chosen.sha256}")
    return Generation(work, stage, config, model, config.sampling(settings.sampling), chosen, accept, conditions, classes,
                      _plain_affine(store, config), store.size, device, store, exports, Counts(by_rule=dict.fromkeys(_rules(accept, config), 0)))


def _rules(accept: AcceptMasks | AcceptImages | None, config: FamilyConfig) -> tuple[str, ...]:
    if isinstance(accept, AcceptImages):
        return accept.rules_of(len(config.output_channels))
    return accept.rules if accept is not None else ()


def _label(generation: Generation, index: int, condition: Condition | None) -> dict[str, Any]:
    """The class that an image was made for; of models that read captions, that of the slice whose caption it has."""
    if generation.classes is not None:
        number = generation.classes.of(index)
        return {"label": generation.classes.names[number], "label_number": number}
    if condition is None or condition.label is None:
        return {}
    return {"label": condition.label, "label_number": generation.store.classes.index(condition.label)}


def _promised_checkpoint(work: Work, source: str, selector: str) -> Checkpoint:
    """The checkpoint that the finished training ended with. Raises MedgenError if it is not there any more.

    An older one must not take its place in silence: the training counts as not done, and makes the lost one again."""
    folder = work.run.checkpoints(source)
    outcome = work.run.read_outcome(source, 0)
    promised = outcome.facts["checkpoints"] if outcome is not None else {}
    if selector not in promised:
        raise InputError(f"checkpoint: {selector}: {source} has none; use one of: {', '.join(promised)}")
    try:
        chosen = checkpoint.select(folder, selector, work.say)
    except MedgenError as error:
        problem = str(error)
    else:
        if chosen.sha256 == promised[selector]:
            return chosen
        problem = f"{folder}: the {selector} checkpoint that {source} ended with is damaged"
    work.run.outcome_file(source, 0).unlink(missing_ok=True)
    work.run.event("checkpoint_lost", stage=source, cause=problem)
    raise MedgenError(f"{problem}; submit the spec again: training goes on from the last good one")


def _plain_affine(store: SliceStore, config: FamilyConfig) -> np.ndarray:
    """Spacing of the training data, no position: for images that belong to no patient. 1 mm where nothing of a patient may be told uncounted."""
    if not config.looks_at_val:
        return np.eye(4)
    row = store.rows.iloc[int(store.select("train")[0])]
    return np.diag([row.spacing_y_mm, row.spacing_x_mm, row.thickness_mm, 1.0])  # axis 0 runs over rows


def _draw_shard(generation: Generation, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw and write all chunks; returns the manifest's entry of every image, and of the first rejected ones."""
    work, entries = generation.work, []
    shown: list[dict[str, Any]] = []
    assert work.task.images is not None
    total = work.task.images.stop - work.task.images.first
    for indices in chunks_of(work.task.images, generation.stage.settings["chunk"]):
        accepted, rejected = _draw_chunk(generation, indices)
        for drawn in accepted:
            earlier = [other.verdict.rules for other in rejected if other.index == drawn.index]
            entries.append(_write_image(generation, folder, drawn, earlier))
            if fault.ARMED:
                fault.at("shard.write", folder / next(iter(entries[-1]["files"].values()))["path"])
        shown += [_write_rejected(generation, folder, drawn) for drawn in rejected[: MOST_SHOWN - len(shown)]]
        work.progress(len(entries), total, "images")
        if work.stop.is_set and len(entries) < total:
            raise Interrupted(f"stopped by {work.stop.signal_name}; this shard starts again next time")
    if generation.counts.rejected:
        work.say(f"{work.stage.name}: {accounts.in_words(generation.counts.facts)}")
    return entries, shown


def chunks_of(images: planning.Shard, chunk: int) -> Iterator[list[int]]:
    """Image numbers in groups that start at multiples of `chunk`, whatever the shard."""
    for first in range(images.first, images.stop, chunk):
        yield list(range(first, min(first + chunk, images.stop)))


def _draw_chunk(generation: Generation, indices: list[int]) -> tuple[list[Drawn], list[Drawn]]:
    """An acceptable drawing of every image, and those that were rejected before, by image and attempt.

    A new attempt is a new noise for the same image: its condition and its class stay."""
    accepted: dict[int, Drawn] = {}
    rejected: list[Drawn] = []
    limit = generation.accept.tries if generation.accept else 1
    for attempt in range(limit):
        pending = [index for index in indices if index not in accepted]
        if not pending:
            break
        images = sample(generation, pending, attempt)
        for index, channels, verdict in zip(pending, images, _judged(generation, pending, images), strict=True):
            generation.counts.add(verdict.rules)
            drawn = Drawn(index, attempt, channels, verdict)
            if verdict.rules:
                rejected.append(drawn)
            else:
                accepted[index] = drawn
    missing = [index for index in indices if index not in accepted]
    if missing:
        raise InputError(_hopeless(generation, missing[0], limit))  # the same noise would give the same images: trying again is useless
    return [accepted[index] for index in indices], sorted(rejected, key=lambda drawn: (drawn.index, drawn.attempt))


def _hopeless(generation: Generation, index: int, limit: int) -> str:
    """What to say when no try was good: which rule was against it most, and what to do."""
    told = accounts.in_words(generation.counts.facts)
    if isinstance(generation.accept, AcceptMasks):
        return f"image {index}: no acceptable mask in {limit} tries (so far {told}); train the mask model longer, or relax accept"
    worst = accounts.worst_first(generation.counts.facts)[0]
    condition = generation.conditions.get(index)
    of = f" (condition {condition.id})" if condition else ""
    return (f"image {index}{of}: no acceptable image in {limit} tries (so far {told}); {worst} rejects most: train longer or look at what the model draws without accept; "
            f"if those images are good, leave {worst} out of accept.rules or write a larger accept.margin")  # fmt: skip


def _judged(generation: Generation, indices: list[int], images: list[Channels]) -> list[Verdict]:
    if isinstance(generation.accept, AcceptMasks):
        return [judge_mask(generation.accept, channels["seg"] > 0.5) for channels in images]
    if generation.accept is None:
        return [Verdict(())] * len(images)
    classes = generation.classes
    labels = [classes.names[classes.of(index)] if classes is not None else OF_ALL_CLASSES for index in indices]
    drawn = {name: np.stack([channels[name] for channels in images]) for name in generation.config.output_channels}
    return _gate(generation, generation.accept, images[0][generation.config.output_channels[0]].shape[0]).judge(drawn, labels)


def _gate(generation: Generation, accept: AcceptImages, size: int) -> Gate:
    """Of images of this size: a model that grows may draw smaller ones than the data have."""
    if size not in generation.gates:
        work, config = generation.work, generation.config
        data = DataSpec.model_validate(work.plan.data)
        store = generation.store if size == generation.store.size else of_size(work, data, size, generation.store)
        sources = fit.sources_of(store, config.output_channels, config.trains_positive_only(data), work.plan.trained_on(work.stage.name), config.uses_labels)
        generation.gates[size] = fit.open_gate(sources, accept, work.run.cache, work.say)
    return generation.gates[size]


def sample(generation: Generation, indices: list[int], attempt: int) -> list[dict[str, np.ndarray]]:
    """Channel name -> [H, W] of every image; noise depends on an image's number and the attempt alone. Raises MedgenError for NaN."""
    noise = SampleNoise(generation.work.plan.seed, generation.stage.name, [(index, attempt) for index in indices], generation.device)
    condition = {}
    for name in generation.config.condition_channels:
        stacked = np.stack([generation.conditions[index].channels[name] for index in indices])
        condition[name] = torch.from_numpy(stacked).unsqueeze(1).to(generation.device)
    classes = generation.classes
    labels = torch.tensor([classes.of(index) for index in indices], device=generation.device) if classes is not None else None
    captions = tuple(generation.conditions[index].caption for index in indices) if generation.config.uses_captions else None
    images = generation.model.sample(noise, Given(condition, labels, _sizes(generation, indices), captions), generation.sampling)
    arrays = {name: tensor[:, 0].float().cpu().numpy() for name, tensor in images.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise MedgenError(f"images {indices[0]} to {indices[-1]}: channel {name} holds NaN; the checkpoint is not usable, choose another")
    return [{name: array[place] for name, array in arrays.items()} for place in range(len(indices))]


def _sizes(generation: Generation, indices: list[int]) -> Sizes | None:
    if not generation.config.uses_sizes:
        return None
    known = [generation.conditions[index].sizes_mm for index in indices]
    return sizes_of(np.stack([size for size in known if size is not None]), generation.device)


def _write_image(generation: Generation, folder: Path, drawn: Drawn, earlier: list[tuple[str, ...]]) -> dict[str, Any]:
    """Write one image's channels (and the mask it was made from) and return its manifest entry. `earlier`: the rules that each try before broke."""
    index, name = drawn.index, f"{drawn.index:06d}"
    condition = generation.conditions.get(index)
    affine = _affine_of(generation, drawn)
    mask = {"seg": condition.mask} if condition is not None and condition.mask is not None else {}
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    label = _label(generation, index, condition)
    below = Path("images") / name
    return {
        "id": name,
        "index": index,
        "seed": rng.derive_seed(generation.work.plan.seed, generation.stage.name, index, drawn.attempt),
        "tries": drawn.attempt + 1,
        **({"rejected_for": "; ".join("+".join(rules) for rules in earlier)} if generation.accept is not None else {}),
        "condition": condition.id if condition else "",
        "condition_kind": condition.kind if condition else "none",
        **label,
        **({"caption": condition.caption or ""} if condition is not None and generation.config.uses_captions else {}),
        "spacing_x_mm": round(float(spacing[1]), 6),  # between columns
        "spacing_y_mm": round(float(spacing[0]), 6),  # between rows
        "thickness_mm": round(float(spacing[2]), 6),
        "files": _write_channels(generation, folder, below, {**drawn.channels, **mask}, affine),
        "exports": _write_exports(generation, folder, below, drawn, label, name),
    }


def _write_exports(generation: Generation, folder: Path, below: Path, drawn: Drawn, label: dict[str, Any], name: str) -> dict[str, dict[str, str]]:
    condition = generation.conditions.get(drawn.index)
    if condition is None:
        return {}
    return generation.exports.write(folder, below, next(iter(drawn.channels.values())), condition, label.get("label"), name)


def _write_rejected(generation: Generation, folder: Path, drawn: Drawn) -> dict[str, Any]:
    """One that does not count, kept to be looked at, and why."""
    name = f"{drawn.index:06d}.{drawn.attempt}"
    return {
        "index": drawn.index,
        "attempt": drawn.attempt,
        "rules": list(drawn.verdict.rules),
        "reasons": list(drawn.verdict.reasons),
        "files": _write_channels(generation, folder, Path("rejected") / name, drawn.channels, _affine_of(generation, drawn)),
    }


def _write_channels(generation: Generation, folder: Path, below: Path, channels: Channels, affine: np.ndarray) -> dict[str, dict[str, str]]:
    written = {}
    for channel, array in channels.items():
        relative = below / f"{channel}{SUFFIX[generation.stage.settings['format']]}"
        write_slice(folder / relative, array, _kind_of(channel, generation.store), affine)
        written[channel] = {"path": str(relative), "sha256": files.sha256_file(folder / relative)}
    return written


def _kind_of(channel: str, store: SliceStore) -> Kind:
    if channel != "seg":
        return "image"
    return "mask" if len(store.regions) == 1 else "labels"


def _affine_of(generation: Generation, drawn: Drawn) -> np.ndarray:
    condition = generation.conditions.get(drawn.index)
    return condition.affine if condition is not None and condition.affine is not None else _of_pixels(generation.affine, generation.full_size, next(iter(drawn.channels.values())).shape[0])


def _of_pixels(affine: np.ndarray, full_size: int, size: int) -> np.ndarray:
    """The same field of view in fewer pixels."""
    return affine @ np.diag([full_size / size, full_size / size, 1.0, 1.0])


def _manifest(generation: Generation, entries: list[dict[str, Any]], shown: list[dict[str, Any]]) -> dict[str, Any]:
    work = generation.work
    return {
        "version": MANIFEST_VERSION,
        "run_id": work.run.run_id,
        "stage": work.stage.name,
        "task_hash": work.task.hash,
        "checkpoint_sha256": generation.checkpoint.sha256,
        "data_fingerprint": work.run.data_mark(generation.store.fingerprint),
        "made_on": {"device": work.device_name, "threads": work.stage.threads, "chunk": generation.stage.settings["chunk"], "torch": torch.__version__},
        "gate": next((gate.record for gate in generation.gates.values()), None),
        "counts": generation.counts.facts,
        "rejected_shown": shown,
        "images": entries,
    }


def _done(target: Path) -> Done:
    manifest = read_manifest(target)
    produced = [target / facts["path"] for facts in files_listed(manifest)]
    return Done([target / MANIFEST, *produced], {"images": len(manifest["images"]), **manifest["counts"]})
