"""What a diffusion configuration says of its perceptual loss. Used by config.py; no torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from medgen.pretrained.settings import LPIPS_BACKBONES, SMALLEST_PIXELS, PublishedWeights

RADIMAGENET = "radimagenet"
NETS = (RADIMAGENET, *LPIPS_BACKBONES)


class PerceptualSettings(PublishedWeights):
    """A frozen network through which the predicted clean image is compared with the real one."""

    key: ClassVar[str] = "perceptual"
    without: ClassVar[str] = "or remove perceptual: the mean squared error alone needs no weights"

    net: Literal["radimagenet", "alex", "vgg", "squeeze"]
    weight: float = Field(1e-3, gt=0)  # as in the reference study
    # signal^2 / noise^2 of the times that count: with less signal the predicted clean image is a mean of many, and alike to none
    snr_at_least: float = Field(1.0, ge=0.01, le=100)

    @classmethod
    def published_name(cls, value: dict[str, Any]) -> str:
        if value.get("net") not in NETS:
            raise ValueError(f"net: which network; write one of {', '.join(NETS)}")
        return LPIPS_BACKBONES.get(value["net"], RADIMAGENET)

    @property
    def words(self) -> str:
        """For the log."""
        network = "the ResNet-50 of RadImageNet" if self.net == RADIMAGENET else f"LPIPS 0.1 of {self.net}"
        return f"perceptual loss: {self.weight:g} times the distance by {network}, at times with a signal-to-noise ratio of {self.snr_at_least:g} or more"

    def check_size(self, pixels: int) -> None:
        """Raise ValueError for images in which the network has nothing to see."""
        if pixels < SMALLEST_PIXELS[self.net]:
            fitting = [net for net in NETS if SMALLEST_PIXELS[net] <= pixels]
            advice = f"write net: {' or '.join(fitting)}" if fitting else "remove perceptual"
            raise ValueError(f"perceptual: {self.net} needs images of at least {SMALLEST_PIXELS[self.net]} px, data.size is {pixels}; {advice}")


def _by_name(value: Any) -> Any:
    return {"net": value} if isinstance(value, str) else value


Perceptual = Annotated[PerceptualSettings, BeforeValidator(_by_name)]
