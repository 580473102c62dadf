"""The `accept` part of a generate stage: which drawn images count; others are drawn again. Used by spec_stages.py and the gate.

Masks are judged by their size, images by what the training slices look like: two kinds of rules that share one key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from medgen.spec_base import Frozen

if TYPE_CHECKING:
    from medgen.models.settings import FamilyConfig

Rule = Literal["blank", "contrast", "noise", "blur", "outside", "pieces", "holes", "seam", "shape", "unlike", "registration"]
RULES: tuple[str, ...] = get_args(Rule)
OF_SEVERAL_CHANNELS = "registration"


class AcceptMasks(Frozen):
    """Which generated masks count."""

    min_pixels: int = Field(1, ge=0)
    max_fraction: float = Field(0.25, gt=0, le=1)
    tries: int = Field(20, ge=1)

    @property
    def rules(self) -> tuple[str, ...]:
        return ("empty", "large")


class AcceptImages(Frozen):
    """Which generated images count: those whose measures lie where the training slices have theirs (medgen/gate).

    `margin`: by how many times its distance from the median a bound is moved outwards; default: the smallest with which
    training slices of patients left out pass."""

    like: Literal["train"]
    rules: tuple[Rule, ...] | None = None  # default: all that the stage's channels allow
    margin: float | None = Field(None, ge=0, le=100)
    tries: int = Field(20, ge=1)

    @field_validator("rules")
    @classmethod
    def _some_and_each_once(cls, value: tuple[Rule, ...] | None) -> tuple[Rule, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError(f"name each rule once, and one at least, or remove rules for all of them: {', '.join(RULES)}")
        return value

    def rules_of(self, channels: int) -> tuple[str, ...]:
        """The rules in force for images of so many channels, in the order of RULES."""
        wanted = RULES if self.rules is None else self.rules
        return tuple(rule for rule in RULES if rule in wanted and (channels > 1 or rule != OF_SEVERAL_CHANNELS))


def _judges_images(value: Any) -> bool:
    return isinstance(value, AcceptImages) or (isinstance(value, dict) and "like" in value)


def _keys_of_one_kind(value: Any) -> Any:
    """Raises ValueError for a key that has no effect on what is judged; pydantic would name those of both kinds."""
    if not isinstance(value, dict):
        return value
    images = _judges_images(value)
    kinds = (AcceptImages, AcceptMasks) if images else (AcceptMasks, AcceptImages)
    valid, other = (set(kind.model_fields) for kind in kinds)
    for key in value:
        if key in valid:
            continue
        if key in other:
            raise ValueError(f"{key} judges masks, and like: train judges images; remove one of them" if images else
                             f"{key} judges images, and only beside like: train; add that, or remove {key}")  # fmt: skip
        raise ValueError(f"unknown key {str(key)[:60]!r}; the keys that judge {'images' if images else 'masks'} are: {', '.join(sorted(valid))}")
    return value


Accept = Annotated[
    Annotated[AcceptMasks, Tag("accept_masks")] | Annotated[AcceptImages, Tag("accept_images")],
    Discriminator(lambda value: "accept_images" if _judges_images(value) else "accept_masks"),
    BeforeValidator(_keys_of_one_kind),
]


def problem(accept: AcceptMasks | AcceptImages, config: FamilyConfig, size: int, source: str) -> str | None:
    """Why these rules cannot judge images of size x size pixels that the model of `source` makes, in words; None if they can."""
    output_kind, channels = config.output_kind, config.output_channels
    if isinstance(accept, AcceptMasks) and output_kind == "image":
        return f"min_pixels, max_fraction and tries alone judge masks, and the model of {source} makes images; write accept: {{like: train}}, or remove it"
    if isinstance(accept, AcceptMasks) and accept.min_pixels > accept.max_fraction * size**2:
        return f"min_pixels: {accept.min_pixels} is more than max_fraction: {accept.max_fraction:g} of {size} x {size} pixels, so that no mask could pass; lower min_pixels"
    if isinstance(accept, AcceptImages) and not config.looks_at_val:
        return f"like: train compares with the training slices that {source} hides: what passes would tell of them without being counted; remove accept"
    if isinstance(accept, AcceptImages) and output_kind == "mask":
        return f"like: train judges images, and the model of {source} makes masks; write accept: {{min_pixels: 1, max_fraction: 0.25}}, or remove it"
    if isinstance(accept, AcceptImages) and accept.rules is not None and OF_SEVERAL_CHANNELS in accept.rules and len(channels) == 1:
        return f"rules: {OF_SEVERAL_CHANNELS} compares channels, and the model of {source} makes {channels[0]} alone; remove it from rules"
    return None
