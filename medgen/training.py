"""What the modules of a training share: its clock, its parts, and how data and model are made. Used by train.py, validation.py, resume.py.

Also by whoever loads a trained model: generate.py, classify.py, checks/."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgen import models, rng
from medgen.acceleration import CompiledForward
from medgen.checkpoint import Checkpoint
from medgen.context import Context
from medgen.data.store import SliceStore, open_store
from medgen.dist import Ranks
from medgen.errors import InputError
from medgen.models.base import Batch, DataShape, Given, Lot, Model, Phase, Sizes
from medgen.models.settings import FamilyConfig, Respacing
from medgen.records import Records
from medgen.spec_data import DataSpec
from medgen.task import Work
from medgen.train_log import Averages


@dataclass
class Clock:
    """Where training stands. Everything here is in the checkpoint's state.json.

    position: samples consumed since the phase began; epoch = position / samples in the training split."""

    step: int = 0
    phase: int = 0
    phase_start_step: int = 0
    window_steps: int = 0  # since the last line of the log; its sums are in the checkpoint too
    best_loss: float = math.inf  # of the logged windows; for the divergence stop
    steps_above: int = 0
    steps_constant: int = 0  # running, whose loss is that of a constant
    skipped: int = 0  # of the last skip_steps, for the alarm
    skip_steps: int = 0


@dataclass
class Training:
    """The parts that the loop's helpers share."""

    work: Work
    ranks: Ranks
    config: FamilyConfig
    stores: dict[int, SliceStore]  # by size in pixels; the same slices in each
    rows: np.ndarray
    val_rows: np.ndarray
    model: Model
    shape: DataShape  # that the model was made for
    phases: list[Phase]
    context: Context
    clock: Clock = field(default_factory=Clock)
    averages: Averages = field(default_factory=Averages)  # of the logging window that is under way
    grace_looked_at: bool = False
    found_lr: float | None = None  # the learning rate that was searched, where none was written
    accelerated: dict[str, Any] = field(default_factory=dict)  # how, by phase, for the outcome's facts
    compiled: list[CompiledForward] | None = None  # None: not tried yet
    records: Records | None = None  # of families that draw records instead of slices in turn

    @property
    def folder(self) -> Path:
        return self.work.run.checkpoints(self.work.stage.name)

    @property
    def phase(self) -> Phase:
        return self.phases[self.clock.phase]

    @property
    def samples(self) -> int:
        """How many records or slices an epoch has."""
        return len(self.records) if self.records is not None else len(self.rows)

    @property
    def selects(self) -> bool:
        """True if the phase hands on its best checkpoint by the val split, else its last."""
        return self.phase.select is not None and len(self.val_rows) > 0

    @property
    def store(self) -> SliceStore:
        """The slices at full size."""
        return self.stores[max(self.stores)]

    def batch(self, rows: np.ndarray, positions: list[int], stream: str, device: torch.device | None = None) -> Batch:
        """Slices by row number, of the phase's size, as one batch; noise will be drawn by position and stream. `device`: the training's by default."""
        given = load_given(self.config, self.stores[self.phase.size], rows, device or self.ranks.device)
        return Batch(given.channels, positions, self.work.plan.seed, f"{self.work.stage.name}/{stream}", given.labels, given.sizes, given.captions)

    def batch_of_step(self, step: int, device: torch.device | None = None) -> Batch:
        """This rank's share of the global batch at a step of the phase, counted from 0. `device`: as of `batch`."""
        if self.records is not None:
            return self._batch_of_records(step, self.records, device or self.ranks.device)
        share = self.phase.batch_size // self.ranks.world_size
        first = step * self.phase.batch_size + self.ranks.rank * share
        positions = list(range(first, first + share))  # in the order of the whole phase
        rows = self.rows[rng.sample_order(positions, len(self.rows), self.work.plan.seed, f"{self.work.stage.name}/order/{self.clock.phase}")]
        batch = self.batch(rows, positions, f"train/{self.clock.phase}", device)
        return batch if self.config.respaces is None else self._respaced(batch, rows, self.config.respaces)

    def _respaced(self, batch: Batch, rows: np.ndarray, respacing: Respacing) -> Batch:
        """Some of the samples, which and how by their positions alone, at another spacing and not in the middle."""
        maps = self.stores[self.phase.size].maps
        assert maps is not None and batch.sizes is not None, "check_data wants data that keep contours"
        chances = rng.uniform_per_sample(batch.seed, f"{batch.stream}/respacing", [(position, number) for position in batch.positions for number in range(4)]).view(-1, 4)
        changed = [place for place, chance in enumerate(chances.tolist()) if chance[0] < respacing.share]
        for place in changed:
            _, factor, down, right = chances[place].tolist()
            placed = maps.respaced(int(rows[place]), respacing.factor_at(factor), (2 * down - 1, 2 * right - 1))
            seen = {"image": placed.image, "seg": placed.labels, "valid": placed.canvas.valid()}
            for name, channel in batch.channels.items():
                channel[place, 0] = torch.from_numpy(seen[name]).to(channel)
            batch.sizes.spacing_mm[place] = torch.tensor(placed.canvas.grid.spacing_mm)
            batch.sizes.field_mm[place] = torch.tensor(placed.canvas.field_mm)
        return batch

    def _batch_of_records(self, step: int, records: Records, device: torch.device) -> Batch:
        """This rank's share of the records of every update; the positions are those of all ranks, as what is made without real images is not shared."""
        updates = records.sampling.updates
        lots = tuple(self._lot(step * updates + update, records, device) for update in range(updates))
        positions = list(range(step * self.phase.batch_size, (step + 1) * self.phase.batch_size))
        return Batch({}, positions, self.work.plan.seed, f"{self.work.stage.name}/train/{self.clock.phase}", lots=lots)

    def _lot(self, number: int, records: Records, device: torch.device) -> Lot:
        mine = records.drawn(number)[self.ranks.rank :: self.ranks.world_size]
        rows = records.rows(number, mine)
        store = self.stores[self.phase.size]
        channels = {name: load_channel(store, name, rows.reshape(-1), device).unflatten(0, rows.shape) for name in self.config.input_channels}
        positions = [number * len(records) + int(record) for record in mine]
        return Lot(channels, positions, records.sampling.size, records.seed, records.stream, number)

    def given(self, rows: np.ndarray) -> Given:
        """What images like these slices are made from, of the phase's size."""
        batch = self.batch(rows, [], "preview")
        return Given({name: batch.channels[name] for name in self.config.condition_channels}, batch.labels, batch.sizes, batch.captions)


def load_given(config: FamilyConfig, store: SliceStore, rows: np.ndarray, device: torch.device) -> Given:
    """Everything that a family eats of these slices, on the device: images among the channels."""
    channels = {name: load_channel(store, name, rows, device) for name in config.input_channels}
    labels = torch.from_numpy(store.labels(rows)).to(device) if config.uses_labels else None
    sizes = sizes_of(store.sizes_mm(rows), device) if config.uses_sizes else None
    return Given(channels, labels, sizes, tuple(store.captions(rows)) if config.uses_captions else None)


def sizes_of(sizes_mm: np.ndarray, device: torch.device) -> Sizes:
    """From float32 [N, 2, 2]: spacing and field of view, each of rows and of columns."""
    both = torch.from_numpy(sizes_mm).to(device, non_blocking=True)
    return Sizes(both[:, 0], both[:, 1])


def load_channel(store: SliceStore, name: str, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """[N, 1, H, W] float32 on the device: images in [0, 1], "seg" the mask, "valid" where there is an image, "masked" whether its mask is known."""
    made = {"seg": store.masks, "valid": store.valid, "masked": store.masked}.get(name)
    array = made(rows).astype(np.float32) if made is not None else store.images(name, rows)
    return torch.from_numpy(np.ascontiguousarray(array)).unsqueeze(1).to(device, non_blocking=True)


def steps_in(phase: Phase, samples: int) -> int:
    return phase.steps if phase.steps is not None else math.ceil(phase.epochs * samples / phase.batch_size)


def of_phase(training: Training, phase: Phase, score: str) -> str:
    """The name of a metric in checkpoints: with the phase's if there are several, as what is good at one size says nothing of another."""
    name = "val" if score == "loss" else score
    return f"{name}_{phase.name}" if len(training.phases) > 1 else name


def shape_of(config: FamilyConfig, store: SliceStore, records: Records | None = None) -> DataShape:
    """`records`: of the training split, for whoever trains."""
    counts = {"records": len(records), "most_records": records.most_of_a_patient} if records is not None else {}
    vocabulary = _vocabulary(config, store) if config.uses_captions else {}
    if config.uses_labels:
        store.labels(np.arange(len(store.rows)))  # of all splits: not after hours, when the turn of one without comes
    return DataShape(config.input_channels, store.size, store.classes if config.uses_labels else (), store.regions, vocabulary=vocabulary, **counts)


def _vocabulary(config: FamilyConfig, store: SliceStore) -> dict[str, Any]:
    """Raises InputError if a caption of any split cannot be read: not after hours, when its turn comes."""
    trained = store.rows["split"].to_numpy() == "train"
    try:
        return config.vocabulary(store.captions(np.flatnonzero(trained)), store.captions(np.flatnonzero(~trained)))
    except ValueError as error:
        raise InputError(str(error)) from None


def of_size(work: Work, data: DataSpec, size: int, full: SliceStore) -> SliceStore:
    """The same slices at another size. Raises InputError if other ones are left there."""
    store = open_store(data.model_copy(update={"size": size}), work.plan.seed, work.run.cache, work.say)
    if not store.rows["id"].equals(full.rows["id"]):
        raise InputError(f"data: at {size} px not the same slices are left as at {full.size} px, because small lesions vanish; write positive_only: false")
    return store


def build_model(family: str, config: FamilyConfig, shape: DataShape, seed: int, stream: str) -> Model:
    """A model with initial weights that depend on (seed, stream) alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(seed, f"{stream}/init"))
        model: Model = models.model_class(family)(config, shape)
    return model


def trained_model(found: Checkpoint, family: str, config: FamilyConfig, shape: DataShape, device: torch.device) -> Model:
    """A model with the weights of a checkpoint."""
    model = build_model(family, config, shape, 0, "loaded")
    for name, module in model.modules().items():
        module.load_state_dict(found.tensors(f"modules.{name}"))
        module.to(device)
    return model
