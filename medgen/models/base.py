"""The contract between the training loop, generation and a model family. Every family implements `Model`.

The loop (train.py) moves data and time; the model moves weights. Neither knows the other's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from medgen import rng
from medgen.models.settings import Settings

Draw = tuple[str, tuple[int, ...]]  # noise by name and shape of one sample
BINS = 10  # of every binned quantity in a StepReport: deciles of the diffusion time, say


@dataclass(frozen=True)
class DataShape:
    """What the data decide for a model: channel names, pixels per side, and the classes by name (empty unless it uses labels)."""

    channels: tuple[str, ...]
    size: int
    classes: tuple[str, ...] = ()
    regions: tuple[str, ...] = ("foreground",)  # what the labels 1, 2, ... of the mask mean; read by families that take regions
    records: int = 0  # in the training split, of families that draw records; 0 where nothing is trained
    most_records: int = 1  # of one patient
    vocabulary: Mapping[str, Any] = field(default_factory=dict)  # of the training captions, as the config makes it; empty unless it reads them


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch size and resolution. Most families have one."""

    name: str
    epochs: float
    batch_size: int  # global: over all ranks and accumulation steps
    size: int
    select: str | None = None  # a metric of `selection_metrics`: the next phase starts from the checkpoint that is best by it
    select_from: float = 0.0  # checkpoints count for that from this share of the phase on
    steps: int | None = None  # where these are given instead of epochs, which are then what comes of them


@dataclass(frozen=True)
class Lot:
    """The records that one update is made on, by one rank; see RecordSampling of models/settings.py.

    channels: name -> [N, k, 1, H, W] float32 in [0, 1], k slices of each record; N may be 0.
    positions: the place of each record among all records of all updates: noise is drawn by position.
    expected: records of this update over all ranks, on average.
    seed: what all randomness of this update depends on; number: of this update since the training began."""

    channels: dict[str, Tensor]
    positions: list[int]
    expected: int
    seed: int
    stream: str
    number: int

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Noise [N, *shape]; the same for a record whatever the number of ranks, of records or of interruptions."""
        drawn = rng.normal_per_sample(shape, self.seed, f"{self.stream}/{name}", [(position,) for position in self.positions])
        return drawn.to(next(iter(self.channels.values())).device)

    def uniform(self, name: str, count: int) -> Tensor:
        """Numbers in [0, 1), [N, count]; per record like `normal`."""
        indices = [(position, number) for position in self.positions for number in range(count)]
        drawn = rng.uniform_per_sample(self.seed, f"{self.stream}/{name}", indices).view(-1, count)
        return drawn.to(next(iter(self.channels.values())).device)


@dataclass(frozen=True)
class Sizes:
    """How large pixels and images are, both float32 [N, 2] in mm, of rows and of columns.

    spacing_mm: from one row to the next; field_mm: of all rows together that are no padding."""

    spacing_mm: Tensor
    field_mm: Tensor

    def mapped(self, move: Callable[[Tensor], Tensor]) -> Sizes:
        return Sizes(move(self.spacing_mm), move(self.field_mm))


@dataclass
class Batch:
    """One rank's share of a global batch.

    channels: name -> [B, 1, H, W] float32 in [0, 1] on the training device, H = W = the phase's size. "seg": 0 or 1, or the number of each
    pixel's region for families that take regions; "valid": 1 where there is an image, 0 in the padding around it; "masked": 1 all over an
    image whose mask is known, 0 where nobody has drawn one.
    positions: the place of each sample in the whole run's order; noise is drawn by position (see `normal`).
    labels: int64 [B], the number of each sample's class; None unless the family's config says that it uses labels.
    sizes, captions: what the family's config says that it uses, else None: see Sizes; one text per sample, or None that says nothing."""

    channels: dict[str, Tensor]
    positions: list[int]
    seed: int
    stream: str = "train"
    labels: Tensor | None = None
    sizes: Sizes | None = None
    captions: tuple[str | None, ...] | None = None
    drawn: dict[Draw, Tensor] = field(default_factory=dict)  # noise that was drawn ahead, [B, *shape]
    asked: set[Draw] = field(default_factory=set)  # what noise the model wanted; shared with the parts
    lots: tuple[Lot, ...] = ()  # of families that draw records: the real images of each update, this rank's share; `channels` is then empty

    @property
    def device(self) -> torch.device:
        every = (self.channels, *(lot.channels for lot in self.lots))
        return next(tensor for channels in every for tensor in channels.values()).device

    def __len__(self) -> int:
        return len(self.positions)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Noise [B, *shape]; the same for a sample whatever the number of ranks or interruptions."""
        self.asked.add((name, shape))
        if (name, shape) in self.drawn:
            return self.drawn[name, shape].to(self.device, non_blocking=True)
        indices = [(position,) for position in self.positions]
        return rng.normal_per_sample(shape, self.seed, f"{self.stream}/{name}", indices).to(self.device)

    def uniform(self, name: str) -> Tensor:
        """Numbers in [0, 1), shape [B]; per sample like `normal`."""
        indices = [(position,) for position in self.positions]
        return rng.uniform_per_sample(self.seed, f"{self.stream}/{name}", indices).to(self.device)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The same with its images and labels elsewhere."""
        lots = tuple(replace(lot, channels={name: move(tensor) for name, tensor in lot.channels.items()}) for lot in self.lots)
        channels = {name: move(tensor) for name, tensor in self.channels.items()}
        labels = move(self.labels) if self.labels is not None else None
        sizes = self.sizes.mapped(move) if self.sizes is not None else None
        return replace(self, channels=channels, labels=labels, sizes=sizes, lots=lots)

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            channels = {name: tensor[part] for name, tensor in self.channels.items()}
            labels = self.labels[part] if self.labels is not None else None
            sizes = Sizes(self.sizes.spacing_mm[part], self.sizes.field_mm[part]) if self.sizes is not None else None
            captions = self.captions[part] if self.captions is not None else None
            drawn = {draw: tensor[part] for draw, tensor in self.drawn.items()}
            yield Batch(channels, self.positions[part], self.seed, self.stream, labels, sizes, captions, drawn, self.asked)


@dataclass
class StepReport:
    """What a step or a validation tells the loop. Tensors stay on the device: reading them is the loop's choice.

    scalars: 0-dim tensors; must have "loss". Two more mean something to the loop: "skipped", 1 if the step was skipped (see guard.py),
    and "constant_loss", what the loss would be if the network predicted the best constant; it is left out in the warm-up.
    binned: name -> (bin number of each sample [B] int64 in range(BINS), value of each sample [B]); averaged per bin.
    samples: of a validation: name -> a row per sample [B, ...]; brought together over the whole split for `Model.scores`."""

    scalars: dict[str, Tensor]
    binned: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)


class StepContext(Protocol):
    """What the loop offers a model's `step`. `step` counts finished optimizer updates of the main network.

    `phase`: its number; `phase_progress`: the share of it that is finished, in [0, 1).
    `rehearsing`: the step leaves no trace and shows what steps take; where that depends on chance, it must take the most."""

    step: int
    total_steps: int
    steps_per_epoch: float
    phase: int
    phase_progress: float
    rehearsing: bool

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for a forward pass; second derivatives belong outside of it."""
        ...

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module wrapped for data parallelism: one forward, one backward. Not for gradient penalties."""
        ...

    def micro_batches(self, batch: Batch, module: nn.Module) -> Iterator[tuple[Batch, float]]:
        """Parts of the batch for accumulation, each with its share of the rank's batch.

        Gradients of `module` (from `parallel`) are exchanged in the last part's backward pass only."""
        ...

    def part_size(self, samples: int) -> int:
        """Of so many samples, how many are computed at once: for families that accumulate by themselves."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks."""
        ...

    def reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Average .grad over ranks: for families whose losses DDP's wrapper cannot carry."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a 0-dim tensor over ranks, for what every rank must know alike."""
        ...


class SampleNoise:
    """Noise for a batch of images to be generated; image i has its own generator, so neighbours do not matter."""

    def __init__(self, seed: int, stream: str, indices: Sequence[tuple[int, ...]], device: torch.device):
        self._generators = [rng.torch_generator(seed, stream, *index) for index in indices]
        self.device = device

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """The next standard normal draw of every image, [N, *shape] float32."""
        rows = torch.empty((len(self), *shape))
        for row, generator in zip(rows, self._generators, strict=True):
            row.normal_(generator=generator)
        return rows.to(self.device)


@dataclass(frozen=True)
class Given:
    """What images are made from. channels: name -> [N, 1, H, W] as in a Batch, empty for unconditional models.

    labels: int64 [N], the number of each image's class; None unless the family's config says that it uses labels. sizes, captions: the same."""

    channels: dict[str, Tensor]
    labels: Tensor | None = None
    sizes: Sizes | None = None
    captions: tuple[str | None, ...] | None = None


class Model(ABC):
    """A model family. Built from (config, shape); the loop moves `modules()` to the device before training."""

    # what `scores` returns, name -> "lower" or "higher": checkpoints may be selected by these besides "val"
    selection_metrics: ClassVar[dict[str, Literal["lower", "higher"]]] = {}

    @abstractmethod
    def __init__(self, config: Any, shape: DataShape): ...

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights or buffers, by name, EMA included: this is what a checkpoint holds."""

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By name; created on first use, after the modules are on their device."""

    @abstractmethod
    def phases(self) -> list[Phase]: ...

    def blocks(self) -> list[nn.Module]:
        """The parts of the trained network, in order, whose activations may be computed twice instead of being kept.

        Only of families whose config offers "blocks". A block is a function of its arguments and weights alone."""
        raise NotImplementedError

    def compiled_networks(self) -> list[nn.Module]:
        """The networks whose forward passes are worth compiling. Only of families whose config offers "compile"."""
        raise NotImplementedError

    def check_start(self) -> None:
        """Raise InputError if weights of another training, which were loaded now, are not what this one can go on from."""
        return

    @abstractmethod
    def step(self, batch: Batch, context: StepContext) -> StepReport:
        """One optimizer update of the main network, with whatever passes the family needs around it."""

    @abstractmethod
    def validate(self, batch: Batch, context: StepContext) -> StepReport:
        """Per-sample means on held-out data, with the weights that will be sampled. Runs without gradients."""

    def scores(self, samples: dict[str, Tensor]) -> dict[str, float]:
        """The selection metrics of a whole validation split, from all its samples in the order of the split, on the CPU.

        One that cannot be computed from these samples is left out."""
        return {}

    @abstractmethod
    def sample(self, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        """Images by channel name, [N, 1, H, W] float32 in [0, 1] (masks exactly 0 or 1), from averaged weights."""

    @property
    def judged_size(self) -> int:
        """Pixels per side of the images that `classify` takes now. Only of families whose config says that they classify."""
        raise NotImplementedError

    def classify(self, channels: dict[str, Tensor]) -> Tensor:
        """Probabilities of the classes, [N, classes]; channels as in a Batch. What is said of an image does not depend on the others.

        Only of families whose config says that they classify."""
        raise NotImplementedError

    def attack_scores(self, batch: Batch) -> Tensor:
        """How likely each image is one that the model was trained on, float32 [B], higher is more likely; only the order counts.

        Images of full size, with conditions and labels as in training. What is said of an image does not depend on the others,
        nor on its position. Only of families whose config says that they are attackable."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """JSON that belongs into the outcome of a training that has ended."""
        return {}

    @abstractmethod
    def describe(self, total_steps: int) -> list[str]:
        """Lines for the log at the start: parameters, the EMA's true horizon, the schedule."""


def joined(channels: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """[0, 1] channels by name as one [-1, 1] tensor [N, C, H, W]."""
    return torch.cat([channels[name] for name in names], dim=1) * 2 - 1


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


Say = Callable[[str], None]
