"""What the configurations of families share in which a generator learns from a critic of real images. Base of pacgan's and dpwgan's config.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from medgen.models.settings import Curves, FamilyConfig


def _below_one(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"both must lie in [0, 1), got {list(betas)}")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(_below_one)]  # Adam's


SCORES_OF_THE_CRITIC = Curves("Scores of the critic", "score", {"critic_real_score": "real images", "critic_fake_score": "generated images"},
                              "The gap is the critic's estimate of the Wasserstein distance between both.")  # fmt: skip
GRADIENT_PENALTY = Curves("Gradient penalty", "penalty", {"critic_penalty": "without its weight"}, "0 where the critic's gradient is 1 long, as it should be.")


class AdversarialConfig(FamilyConfig):
    """Images from noise, of the channels that the critic sees."""

    channels: tuple[str, ...] = Field(("image",), min_length=1)  # names of data.images: one for grey images, three for colours

    @property
    def output_kind(self) -> Literal["image", "mask"]:
        return "image"

    @property
    def output_channels(self) -> tuple[str, ...]:
        return self.channels

    @property
    def input_channels(self) -> tuple[str, ...]:
        return self.channels

    @property
    def loss_falls(self) -> bool:
        return False

    @property
    def attackable(self) -> bool:
        """By the critic, which was taught by the training images alone what is real."""
        return True
