"""What the configuration of every model family shares. No torch here: specs are checked on login nodes.

A family's config.py defines `Config(FamilyConfig)`; medgen/spec.py checks it and train.py reads `loop`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from medgen.dp.enough import too_few
from medgen.names import absolute
from medgen.pretrained.settings import WeightsFile
from medgen.spec_base import Frozen

if TYPE_CHECKING:
    from medgen.spec_data import DataSpec


class Settings(Frozen):
    """Base of everything that a family lets be written."""


class SteppedSampling(Settings):
    """Of families that sample in steps, as many as one likes: what `medgen find-steps` chooses."""

    steps: int = Field(ge=1)

    @property
    def evaluations(self) -> int:
        """How many times an image asks the network."""
        return self.steps


class EmaSettings(Settings):
    """ema-pytorch's knobs. The decay ramps up as 1 - (1 + n)^(-2/3); the log states the horizon really reached."""

    beta: float = Field(0.9999, gt=0, lt=1)  # the average that is validated, and sampled unless a generate stage says otherwise
    more: tuple[float, ...] = ()  # further averages kept beside it, for `sampling: {weights: ema_0.999}`
    update_after_step: int = Field(100, ge=0)
    update_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _different_betas(self) -> EmaSettings:
        for beta in self.more:
            if not 0 < beta < 1:
                raise ValueError(f"more: a beta lies between 0 and 1, got {beta:g}")
        if len({self.beta, *self.more}) != 1 + len(self.more):
            raise ValueError(f"more: {list(self.more)} beside beta: {self.beta:g} names an average twice; name each once")
        return self

    @property
    def betas(self) -> dict[str, float]:
        """Name of each average, as in `weights` and in checkpoints -> its beta."""
        return {"ema": self.beta, **{f"ema_{beta}": beta for beta in self.more}}


def check_weights(name: str, ema: EmaSettings | None) -> None:
    """Raise ValueError if a training with these averages keeps no weights of that name: `raw`, or one of `EmaSettings.betas`."""
    kept = ["raw", *(ema.betas if ema is not None else {})]
    if name not in kept:
        raise ValueError(f"weights: {name!r} was not kept; this training has: {', '.join(kept)} (ema.more keeps further averages)")


class LoopSettings(Settings):
    """What the training loop does around the model's steps; the same for every family."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on GPUs with bf16 units, else fp32
    # samples per backward pass on one rank; default: the whole share; auto: as many as fit into the GPU, found by one trial per phase
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    checkpoint_activations: bool = False  # compute them twice instead of keeping them: less memory, about a third more work
    compile: Literal["auto"] | bool = "auto"  # torch.compile; auto: on GPUs, if enough steps are left that it pays
    read_ahead: Literal["auto"] | bool = "auto"  # a thread reads the next batch and draws its noise; auto: on GPUs, which leave the CPU idle
    validate_epochs: float | None = Field(None, gt=0)  # epochs between validations; default: 50 times per run, at least 50 steps apart
    validate_samples: int = Field(512, ge=1)  # validation slices used, spread evenly over the split
    checkpoint_minutes: float = Field(10.0, ge=0)  # also after every validation and at the end
    checkpoint_steps: int | None = Field(None, ge=1)  # additionally every so many steps
    keep: int = Field(2, ge=2)  # newest checkpoints kept, besides the best ones
    log_steps: int = Field(10, ge=1)
    preview_images: int = Field(8, ge=0)  # images drawn at each validation, for TensorBoard and the report; 0: none
    # stop when the loss stays this many times above its best ... (of no effect where players work against each other)
    divergence_factor: float = Field(5.0, gt=1)
    divergence_steps: int = Field(500, ge=1)  # ... for so many steps in a row
    spike_factor: float | None = Field(10.0, gt=1)  # skip a step whose gradient is so many times longer than their running mean; null: none
    spike_after_steps: int = Field(100, ge=1)  # steps whose gradients make the mean before the first is skipped
    collapse_steps: int | None = Field(2000, ge=1)  # stop when the network has predicted no more than a constant for so many steps; null: never

    @model_validator(mode="after")
    def _no_wait_for_what_is_off(self) -> LoopSettings:
        if self.spike_factor is None and self.spike_after_steps != type(self).model_fields["spike_after_steps"].default:
            raise ValueError("spike_after_steps has no effect with spike_factor: null, which skips nothing; remove it")
        return self


NO_IMAGES = ("seg", "valid", "masked")  # channels that no file of the data is named for: the mask, where there is an image, whether its mask is known
Offer = Literal["blocks", "compile", "spike_guard", "constant_loss"]
# what of the loop works only if the family's model takes part in it, and what it must offer for that
NEEDED_OFFERS: dict[str, Offer] = {
    "checkpoint_activations": "blocks", "compile": "compile", "spike_factor": "spike_guard", "spike_after_steps": "spike_guard", "collapse_steps": "constant_loss",
}  # fmt: skip
WITHOUT_OFFER: dict[Offer, str] = {
    "blocks": "this family names no blocks whose activations could be computed twice",
    "compile": "this family's networks are not compiled",
    "spike_guard": "this family skips no steps",
    "constant_loss": "this family does not say what predicting a constant would cost",
}


class LrSearch(Settings):
    """How the learning rate is searched before training; `find_lr: true` has these defaults. See lr_search.py."""

    steps: int = Field(100, ge=20, le=10_000)  # from 1e-7 to 1e-1


def _true_is_the_default(value: Any) -> Any:
    if isinstance(value, bool):
        return LrSearch() if value else None
    if value is None or isinstance(value, dict | LrSearch):
        return value
    raise ValueError(f"write find_lr: true, or how many learning rates it tries: find_lr: {{steps: 200}}; got {value!r}")


@dataclass(frozen=True)
class RecordSampling:
    """How the real images of a step are drawn by a family that updates several times per step, each time on fresh records.

    A record is what counts as one: all slices of a patient, of which some are drawn, or a slice."""

    unit: Literal["patient", "slice"]
    updates: int  # per step
    size: int  # records per update: so many, or on average so many if `poisson`
    slices: int  # of a record, drawn with replacement
    poisson: bool  # each record is drawn or not, by itself; else the records are shuffled, and none comes twice before all have come
    secret: bool  # what is drawn depends on a key of the run instead of the plan's seed

    def too_few(self, records: int) -> str | None:
        """Why so many records in the training split are not enough, in words; None if they are."""
        return too_few(self.size, self.unit, records)


class Respacing(Settings):
    """Training images at other spacings than their own, so that spacing means something by itself; masks are drawn again from the contours.

    A factor above 1 makes pixels larger; below 1 an image is interpolated, which adds no detail."""

    factors: tuple[float, float] = (1.0, 1.5)  # of the image's own spacing, drawn evenly in their logarithm
    share: float = Field(0.5, gt=0, le=1)  # of the samples; the others are seen as they were acquired

    @field_validator("factors")
    @classmethod
    def _rise(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.5 <= value[0] < value[1] <= 4:
            raise ValueError(f"factors: two numbers between 0.5 and 4 that rise, such as [1, 1.5]; got [{value[0]:g}, {value[1]:g}]")
        return value

    def factor_at(self, share: float) -> float:
        """The factor that this share of all samples stays below."""
        low, high = self.factors
        return float(low * (high / low) ** share)


@dataclass(frozen=True)
class Curves:
    """A chart of the report: scalars of the training log that are read together.

    lines: name in the log ("val_..." of validations) -> its words, three at most; what a log does not have is left out.
    reading: a sentence on what to look for, or nothing."""

    title: str
    y_label: str
    lines: dict[str, str]
    reading: str = ""


class FamilyConfig(Settings):
    """Base of every family's Config. Properties tell the planner what the model eats and makes."""

    offers: ClassVar[frozenset[Offer]] = frozenset()  # which parts of the loop its model takes part in, see models/base.py

    loop: LoopSettings = LoopSettings()
    find_lr: Annotated[LrSearch | None, BeforeValidator(_true_is_the_default)] = None  # search `lr` before training instead of writing it
    start_from: Path | None = None  # a checkpoint's folder, step-...: its weights (and optimizers, if it has them) instead of fresh ones

    start_sha256: str | None = None  # of what start_from holds; filled in at submit, so that other weights are another run

    @field_validator("start_from")
    @classmethod
    def _start_counts_from_here(cls, value: Path | None) -> Path | None:
        """Absolute, so that the run goes on from any folder."""
        return absolute(value) if value is not None else None

    @model_validator(mode="before")
    @classmethod
    def _lr_is_written_or_found(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("find_lr") in (None, False):
            return value
        if value.get("lr") is not None:
            raise ValueError(f"lr: {value['lr']} and find_lr contradict each other: find_lr searches the lr that is used; remove one of them (from the command line: lr=null)")
        return {key: given for key, given in value.items() if key != "lr"}

    @model_validator(mode="after")
    def _lr_can_be_found(self) -> FamilyConfig:
        if self.find_lr is not None and not self.loss_falls:
            raise ValueError("find_lr has no effect: the losses of players against each other rise and fall, so that no curve tells a good lr; remove it and write lr")
        if self.find_lr is not None and "lr" not in type(self).model_fields:
            raise ValueError("find_lr has no effect: this family has no single lr; remove it")
        return self

    @model_serializer(mode="wrap")
    def _without_an_lr_to_be_found(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that the resolved form reads back: what nobody wrote is no default either."""
        record: dict[str, Any] = fields(self)
        return record if self.find_lr is None else {key: value for key, value in record.items() if key != "lr"}

    @model_validator(mode="after")
    def _no_stop_where_none_is_possible(self) -> FamilyConfig:
        for name in ("divergence_factor", "divergence_steps"):
            if not self.loss_falls and getattr(self.loop, name) != LoopSettings.model_fields[name].default:
                raise ValueError(f"loop.{name} has no effect: the losses of players against each other rise and fall; remove it")
        return self

    @model_validator(mode="after")
    def _no_option_without_an_offer(self) -> FamilyConfig:
        for name, offer in NEEDED_OFFERS.items():
            if offer not in self.offers and getattr(self.loop, name) != LoopSettings.model_fields[name].default:
                raise ValueError(f"loop.{name} has no effect: {WITHOUT_OFFER[offer]}; remove it")
        return self

    @model_validator(mode="after")
    def _parts_of_a_batch(self) -> FamilyConfig:
        part, (knob, sizes) = self.loop.micro_batch, self.global_batch_sizes
        if isinstance(part, int) and part > max(sizes):
            raise ValueError(f"loop.micro_batch: {part} has no effect: it is more than {knob}: {max(sizes)}; remove it, or write a smaller number")
        return self

    @property
    def micro_batch_multiple(self) -> int:
        """Samples that must stay together in a backward pass."""
        return 1

    @property
    def weights_files(self) -> dict[str, WeightsFile]:
        """The files of other networks' weights that training needs, by key."""
        return {name: value for name, value in self if isinstance(value, WeightsFile)}

    @property
    def output_kind(self) -> Literal["image", "mask"]:
        raise NotImplementedError

    @property
    def output_channels(self) -> tuple[str, ...]:
        """Channel names of what sampling returns; "seg" is the mask."""
        raise NotImplementedError

    @property
    def input_channels(self) -> tuple[str, ...]:
        """Channel names each training batch must hold."""
        raise NotImplementedError

    @property
    def condition_channels(self) -> tuple[str, ...]:
        """What sampling needs: the inputs that are not outputs. Empty for unconditional models."""
        return tuple(name for name in self.input_channels if name not in self.output_channels)

    @property
    def uses_labels(self) -> bool:
        """True if each training image needs the label of its class, and each generated one is made for a class."""
        return False

    @property
    def uses_sizes(self) -> bool:
        """True if each image needs its spacing and field of view in mm."""
        return False

    @property
    def uses_captions(self) -> bool:
        """True if each training image needs a caption."""
        return False

    def vocabulary(self, captions: Sequence[str], others: Sequence[str] = ()) -> dict[str, Any]:
        """JSON that decides how captions are read, from those of the training split: part of every checkpoint. Empty of families that read none.

        others: those of the other splits. Raises ValueError for a caption that cannot be read."""
        return {}

    @property
    def takes_regions(self) -> bool:
        """True if the mask may have several regions; else it says where something is, and nothing more."""
        return False

    @property
    def respaces(self) -> Respacing | None:
        """How training images are brought to other spacings; None: each is seen as it was acquired."""
        return None

    @property
    def record_sampling(self) -> RecordSampling | None:
        """None: each step has one batch of slices, in shuffled order."""
        return None

    @property
    def looks_at_val(self) -> bool:
        """False if a training may not be judged by the val split either, because every look at real images must be accounted for."""
        return True

    @property
    def loss_falls(self) -> bool:
        """False where players work against each other: then a loss that rises says nothing, and training is stopped by a NaN alone."""
        return True

    @property
    def curves(self) -> tuple[Curves, ...]:
        """What the report draws of the training log beside the loss."""
        return ()

    @property
    def classifies(self) -> bool:
        """True if the model tells the class of an image."""
        return False

    @property
    def attackable(self) -> bool:
        """True if the model itself says how likely an image is one that it was trained on: evaluate then attacks it with that."""
        return False

    @property
    def form(self) -> dict[str, Any]:
        """The settings that decide the shapes of the weights, which start_from must share. Empty where nobody has listed them."""
        return {}

    @property
    def weights_of_one_size(self) -> bool:
        """True if data.size decides the shapes of the weights too, so that start_from must share it."""
        return False

    @property
    def global_batch_sizes(self) -> tuple[str, tuple[int, ...]]:
        """The knob, and its batch sizes over all ranks: one per phase of training."""
        raise NotImplementedError

    def trains_positive_only(self, data: DataSpec) -> bool:
        """True if training uses only slices whose mask is not empty."""
        return data.positive_only

    @classmethod
    def examples(cls) -> dict[str, dict[str, Any]]:
        """Tiny configurations by name that train in seconds, one per variant: the contract tests run over all of them."""
        raise NotImplementedError

    def check_data(self, data: DataSpec) -> None:
        """Raise ValueError, naming the knob, if the model cannot be trained on these data."""
        missing = [name for name in self.input_channels if name not in NO_IMAGES and name not in data.images]
        if missing:
            have = ", ".join(data.images) or "none"
            raise ValueError(f"needs data.images.{missing[0]}; the data have: {have}")
        if "seg" in self.input_channels and data.mask is None:
            raise ValueError("needs data.mask: the file name of the label volume")
        if "seg" in self.input_channels and data.has_regions and not self.takes_regions:
            several = "data.regions names several classes" if data.regions is not None else f"the contours of format: {data.format} bound several regions"
            raise ValueError(f"takes a mask of one thing, and {several}; use model: sdm")
        if self.respaces is not None and not data.keeps_contours:
            raise ValueError(f"respacing has no effect with format: {data.format}, whose masks cannot be drawn again at another spacing; remove it")

    def check_patients(self, patients: int) -> None:
        """Raise ValueError, naming the knob, if the model cannot be trained on so many patients in the training split."""
        return

    def sampling(self, raw: dict[str, Any]) -> Settings:
        """The checked form of a generate stage's `sampling`. Raises ValueError naming the key."""
        raise NotImplementedError

    def preview_sampling(self) -> Settings:
        """A quick setting for the pictures that a training draws on its way."""
        raise NotImplementedError
