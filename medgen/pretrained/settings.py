"""Weights that a spec names: where their file lies, and what it must be. Used by spec_evaluate.py and by families' configs; no torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from medgen import weights
from medgen.errors import InputError
from medgen.names import absolute
from medgen.spec_base import Frozen
from medgen.weights import Published

LPIPS_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet"}  # their names in weights.py
SMALLEST_PIXELS = {"alex": 31, "vgg": 16, "squeeze": 17, "radimagenet": 32}  # in smaller images the last layers have nothing to see
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class WeightsFile(Frozen):
    """Weights that are a file on this machine: nothing is ever downloaded."""

    key: ClassVar[str] = "extractor"  # where in the spec it stands, for messages
    without: ClassVar[str] = weights.WITHOUT  # what can be done where there are no weights, for messages

    file: Path
    sha256: Sha256 | None = None

    @field_validator("file")
    @classmethod
    def _file_counts_from_here(cls, value: Path) -> Path:
        return absolute(value)

    @property
    def published(self) -> Published | None:
        """What medgen knows of the file that its authors publish; None if it may be anybody's."""
        return None

    def verified(self) -> str:
        """The sha256 of the file. Raises InputError if it is missing, or not the one that the spec, its publisher or its record tells."""
        return weights.verified(self.file, self.sha256, self.published, self.key, self.without)

    def with_hash(self) -> WeightsFile:
        """The same with the sha256 of the file, so that other weights are another run; as it is if `verified` has something to say."""
        if self.sha256 is not None:
            return self
        try:
            return self.model_copy(update={"sha256": self.verified()})
        except InputError:
            return self


class PublishedWeights(WeightsFile):
    """Weights that lie in $MEDGEN_WEIGHTS under the name of their publisher, unless `file` names another place."""

    @classmethod
    def published_name(cls, value: dict[str, Any]) -> str:
        """Which entry of weights.REGISTRY the settings ask for; raises ValueError for a setting that names none."""
        raise NotImplementedError

    @property
    def published(self) -> Published:
        return weights.REGISTRY[self.published_name(self.model_dump())]

    @model_validator(mode="before")
    @classmethod
    def _usual_place(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "file" in value:
            return value
        try:
            return {**value, "file": weights.usual_file(weights.REGISTRY[cls.published_name(value)], cls.without)}
        except InputError as error:
            raise ValueError(str(error)) from None


class LpipsBackbone(PublishedWeights):
    """The network whose features LPIPS compares, trained on ImageNet; what LPIPS puts on top comes with its package."""

    key: ClassVar[str] = "lpips"

    net: Literal["alex", "vgg", "squeeze"]

    @classmethod
    def published_name(cls, value: dict[str, Any]) -> str:
        if "net" not in value or value["net"] not in LPIPS_BACKBONES:
            raise ValueError(f"net: which network; write one of {', '.join(LPIPS_BACKBONES)}")
        return LPIPS_BACKBONES[value["net"]]
