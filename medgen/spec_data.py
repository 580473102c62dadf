"""The `data` part of a job spec: where the volumes are, and how slices are made from them. Used by spec.py and data/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from medgen.cardiac.map_type import MapType
from medgen.names import ChannelName, absolute
from medgen.spec_base import Frozen

SPLITS = ("train", "val", "test")


class Window(Frozen):
    """How voxel values become [0, 1]: percentiles of each volume's non-zero voxels, or two fixed values."""

    percentiles: tuple[float, float] | None = None
    fixed: tuple[float, float] | None = None
    joint: tuple[ChannelName, ...] | None = None  # channels that share one window per patient, so that they can be compared with each other
    # slice: percentiles of all pixels of each slice, which then depends on no other; it can no longer be compared with its neighbours
    per: Literal["volume", "slice"] = "volume"

    @model_validator(mode="after")
    def _per_slice_has_an_effect(self) -> Window:
        if self.per == "slice" and self.fixed is not None:
            raise ValueError("per: slice has no effect with fixed, which is the same window for every slice; remove it")
        if self.per == "slice" and self.joint is not None:
            raise ValueError("per: slice and joint contradict each other: a joint window is that of a patient's volumes; remove one of them")
        return self

    @model_validator(mode="after")
    def _joint_has_an_effect(self) -> Window:
        if self.joint is None:
            return self
        if self.fixed is not None:
            raise ValueError("joint has no effect with fixed, which is the same window for every channel; remove it")
        if len(set(self.joint)) != len(self.joint) or len(self.joint) < 2:
            raise ValueError(f"joint names two or more different channels of images that share a window, got {list(self.joint)}")
        return self

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


def _label(value: Any) -> Any:
    """Labels are texts; a table of them may be written with whole numbers."""
    return str(value) if type(value) is int else value


Label = Annotated[str, BeforeValidator(_label)]


class DataSpec(Frozen):
    """Where the volumes are and how slices are made from them."""

    format: Literal["nifti", "csv", "stack", "cardiac", "jsonl", "phantom"] = "nifti"
    # nifti: <root>/[<split>/]<patient>/<file>; csv: the CSV file; stack: a folder of labels.csv and Real*x*.nii.gz, or of such folders;
    # cardiac: DICOM with contours, a folder in a known layout or a manifest (docs/cardiac_data.md);
    # jsonl: a file with a line per image, its caption and masks, or a folder of train.jsonl, val.jsonl, test.jsonl (docs/jsonl_data.md)
    root: Path | None = None
    images: dict[ChannelName, str] = {}  # channel name -> file name (nifti), column (csv), or place of the channel (stack, jsonl; default image: 0)
    mask: str | None = None  # file name or column of the label volume
    mask_labels: list[int] | None = None  # labels that count as foreground; default: every non-zero one
    size: int = Field(128, ge=4, le=2048)  # pixels; slices become size x size
    window: Window = Window(percentiles=(0.0, 99.5))
    axis: int = Field(2, ge=0, le=2)  # 0 sagittal, 1 coronal, 2 axial slices
    content: float = Field(0.05, ge=0, lt=1)  # smallest share of non-background pixels a slice must have
    positive_only: bool = False  # keep only slices whose mask is not empty
    every: int = Field(1, ge=1)  # keep every n-th slice
    slices: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = None  # first and last along the axis, counted from 0; default: all
    patient_pattern: str | None = None  # csv without a column patient: a regular expression whose group is the patient in a file's name, else in its path
    splits: SplitFractions = SplitFractions()
    patients: int | None = Field(None, ge=3, le=100_000)  # phantom: how many patients to draw; default 16
    types: tuple[MapType, ...] | None = None  # cardiac: only images of these; default: all
    windows_ms: dict[MapType, tuple[float, float]] = {}  # cardiac: what becomes 0 and 1 of maps; default: WINDOWS_MS. Of cine frames `window` says it

    regions: tuple[ChannelName, ...] | None = None  # jsonl: classes of masks in the order of their numbers 1, 2, ...; default: one, "foreground"
    mask_share: float = Field(0.5, gt=0, le=1)  # jsonl: smallest share of a pixel that a class must cover to own it
    label_texts: dict[Label, str] = {}  # jsonl: captions of lines without one, by their label

    @model_validator(mode="before")
    @classmethod
    def _some_name_their_own_files(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("format") == "phantom" and not value.get("images") and not value.get("mask"):
            return {**value, **PHANTOM_FILES}
        if isinstance(value, dict) and value.get("format") == "stack":
            return {"content": 0.0, "window": {"fixed": [-1.0, 1.0]}, **value, "images": _places(value)}
        if isinstance(value, dict) and value.get("format") == "jsonl":
            if value.get("mask") not in (None, JSONL_MASK):
                raise ValueError("mask has no effect with format: jsonl, where mask_path of each line says it; remove it")
            return {"content": 0.0, **value, "images": _places(value), "mask": JSONL_MASK}
        if isinstance(value, dict) and value.get("format") == "cardiac":
            _refuse_file_names(value)
            windows = value.get("windows_ms", {})
            return {"content": 0.0, **value, **CARDIAC_FILES, "windows_ms": {**WINDOWS_MS, **windows} if isinstance(windows, dict) else windows}
        return value

    @model_validator(mode="after")
    def _range_of_slices_rises(self) -> DataSpec:
        if self.slices is not None and self.slices[0] > self.slices[1]:
            raise ValueError(f"slices: the first, {self.slices[0]}, is above the last, {self.slices[1]}")
        return self

    @model_validator(mode="after")
    def _pattern_names_a_patient(self) -> DataSpec:
        if self.patient_pattern is None:
            return self
        if self.format != "csv":
            raise ValueError(f"patient_pattern has no effect with format: {self.format}, which knows its patients; remove it")
        try:
            groups = re.compile(self.patient_pattern).groups
        except re.error as error:
            raise ValueError(f"patient_pattern: not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"patient_pattern: {self.patient_pattern!r} has {groups} groups; put parentheses around the patient, and nothing else, as in '(sub-[0-9]+)'")
        return self

    @model_validator(mode="after")
    def _joint_channels_are_there(self) -> DataSpec:
        for name in self.window.joint or ():
            if name not in self.images:
                raise ValueError(f"window.joint: there is no image {name!r}; the images are: {', '.join(self.images) or 'none'}")
        return self

    @model_validator(mode="after")
    def _complete_for_its_format(self) -> DataSpec:
        if self.format == "phantom":
            if self.root is not None or self.mask_labels is not None:
                raise ValueError(f"format: phantom draws its own data; remove {'root' if self.root is not None else 'mask_labels'}")
            return self
        if self.root is None:
            wanted = {"nifti": "a folder of patients", "csv": "the CSV file", "stack": "the folder with labels.csv, or with train and test",
                      "cardiac": "the folder with the patients, or a manifest", "jsonl": "the JSONL file, or a folder with train.jsonl"}  # fmt: skip
            raise ValueError(f"format: {self.format} needs root: {wanted[self.format]}")
        if self.format == "stack":
            self._check_stack()
        if self.format == "cardiac":
            self._check_cardiac()
        if self.format == "jsonl":
            self._check_jsonl()
        if self.patients is not None:
            raise ValueError("patients counts phantoms and has no effect here; remove it")
        if not self.images and self.mask is None:
            raise ValueError("nothing to read: give images: {name: file} or mask: file")
        if self.positive_only and self.mask is None:
            raise ValueError("positive_only needs mask: the name of the label file")
        if "seg" in self.images:
            raise ValueError("images: the name 'seg' is kept for the mask; write mask: ...")
        for name, meaning in (("valid", "where there is an image"), ("masked", "where a mask is known")):
            if name in self.images:
                raise ValueError(f"images: the name {name!r} is kept for {meaning}; choose another")
        return self

    def _check_stack(self) -> None:
        """Slices of a stack are made already: what makes slices of volumes has no effect."""
        for name in ("mask", "mask_labels", "axis", "content", "positive_only", "every", "slices", "window"):
            usual = {"content": 0.0, "window": Window(fixed=(-1.0, 1.0))}.get(name, type(self).model_fields[name].default)
            if getattr(self, name) != usual:
                raise ValueError(f"{name} has no effect with format: stack, whose slices are made already; remove it")
        self._check_places("a stack")

    def _check_places(self, of: str) -> None:
        places = list(self.images.values())
        if places != [str(place) for place in range(len(places))] or len(places) not in (1, 3):
            raise ValueError(f"images names the channels of {of} by their places: {{image: 0}}, or {{red: 0, green: 1, blue: 2}}; got {self.images}")

    def _check_jsonl(self) -> None:
        """Images are single ones with masks of their own size: what chooses slices of volumes, or labels, has no effect."""
        for name in ("mask_labels", "axis", "content", "every", "slices"):
            usual = 0.0 if name == "content" else type(self).model_fields[name].default
            if getattr(self, name) != usual:
                raise ValueError(f"{name} has no effect with format: jsonl, whose lines are single images; remove it")
        self._check_places("images")
        if self.window.joint is not None or self.window.per != "volume":
            raise ValueError(f"window: {'joint' if self.window.joint is not None else 'per'} has no effect with format: jsonl, whose lines are single images; remove it")
        if self.regions is not None and not 1 <= len(set(self.regions)) == len(self.regions) <= MOST_REGIONS:
            raise ValueError(f"regions names 1 to {MOST_REGIONS} different classes of masks, such as [haemorrhages, hard_exudates]; got {list(self.regions)}")
        if "background" in (self.regions or ()):
            raise ValueError("regions: the name 'background' is kept for what is in no mask, the number 0; remove it")
        empty = [label for label, text in self.label_texts.items() if not text.strip() or not label.strip()]
        if empty:
            raise ValueError(f"label_texts: the {'caption' if empty[0].strip() else 'label'} of {empty[0]!r} is empty; write {{0: \"no retinopathy\"}}, or remove it")

    def _check_cardiac(self) -> None:
        """Images are single slices with contours: what chooses slices of volumes, or lesions, has no effect."""
        for name in ("mask_labels", "axis", "content", "positive_only", "every", "slices"):
            usual = 0.0 if name == "content" else type(self).model_fields[name].default
            if getattr(self, name) != usual:
                raise ValueError(f"{name} has no effect with format: cardiac, whose images are single slices with contours; remove it")
        if self.types is not None and (not self.types or len(set(self.types)) < len(self.types)):
            raise ValueError(f"types names each of {', '.join(get_args(MapType))} at most once, and one at least; got {list(self.types)}")
        for kind, (low, high) in self.windows_ms.items():
            if kind == "cine":
                raise ValueError("windows_ms: cine frames have no ms; window: {percentiles: [0, 99.5]} says what becomes 0 and 1 of them")
            if not 0 <= low < high:
                raise ValueError(f"windows_ms.{kind}: two numbers of ms that rise, such as {list(WINDOWS_MS[kind])}; got [{low:g}, {high:g}]")
        if self.window.fixed is not None or self.window.per != "volume":
            raise ValueError("window: with format: cardiac it is of cine frames, whose brightness has no unit: write percentiles; of maps, windows_ms says it")

    @model_validator(mode="after")
    def _some_are_of_one_format(self) -> DataSpec:
        of_one = {"types": ("cardiac", "it is of cardiac maps"), "windows_ms": ("cardiac", "it is of cardiac maps"),
                  **dict.fromkeys(("regions", "mask_share", "label_texts"), ("jsonl", "it is of images with captions, format: jsonl"))}  # fmt: skip
        for name, (own, told) in of_one.items():
            if self.format != own and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with format: {self.format}; {told}, remove it")
        return self

    @property
    def has_regions(self) -> bool:
        """True if a mask says which of several regions each pixel is in, and not only where something is."""
        return self.format == "cardiac" or len(self.region_names) > 1

    @property
    def region_names(self) -> tuple[str, ...]:
        """What the numbers 1, 2, ... of masks mean, as far as the spec says it: those of cardiac images are found in their contours."""
        return self.regions or ("foreground",)

    @property
    def keeps_contours(self) -> bool:
        """True if masks can be drawn again at any spacing."""
        return self.format == "cardiac"

    @field_validator("root")
    @classmethod
    def _root_counts_from_here(cls, value: Path | None) -> Path | None:
        """Absolute, so that the run goes on from any folder."""
        return absolute(value) if value is not None else None

    @property
    def channels(self) -> list[str]:
        """Image names in the order of the spec."""
        return list(self.images)


def _places(value: dict[str, Any]) -> Any:
    """`images` of a format whose channels are in one file: places may be written as numbers."""
    images = value.get("images", {"image": 0})
    return {name: str(place) if type(place) is int else place for name, place in images.items()} if isinstance(images, dict) else images


def _refuse_file_names(value: dict[str, Any]) -> None:
    """What the resolved form has is no writing of the user's."""
    for name in ("images", "mask"):
        if value.get(name) not in (None, {}, CARDIAC_FILES[name]):
            raise ValueError(f"{name} has no effect with format: cardiac, where folders and headers, or a manifest, say which file is what; remove it")


PHANTOM_PATIENTS = 16
JSONL_MASK = "mask_path"
MOST_REGIONS = 255  # numbers of a byte
CARDIAC_FILES: dict[str, Any] = {"images": {"image": "DICOM"}, "mask": "contours"}
WINDOWS_MS: dict[MapType, tuple[float, float]] = {"T1": (0.0, 2500.0), "T2": (0.0, 200.0)}  # native blood has about 1,500 and 150; fluid saturates
PHANTOM_FILES: dict[str, Any] = {
    "images": {"bravo": "bravo.nii.gz", "t1_pre": "t1_pre.nii.gz", "t1_gd": "t1_gd.nii.gz"},
    "mask": "seg.nii.gz",
}
