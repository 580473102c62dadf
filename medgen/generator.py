"""Images from a checkpoint in Python, one call at a time: captions, masks, a seed. Imported by users, and by the page of `medgen demo`.

What a job draws is drawn by generate.py; here the same model is asked without a run, a spec or data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medgen import checkpoint, commits, spec
from medgen.data.resize import shares_of
from medgen.errors import InputError
from medgen.models.base import DataShape, Given, SampleNoise
from medgen.models.flow.config import Config
from medgen.models.flow.model import Model
from medgen.training import trained_model

STREAM = "generator"  # of noise: none that a job has
OWNED = 0.5  # share of a pixel that a region must cover to own it
MOST_PIXELS = 4096  # per side

Mask = Image.Image | np.ndarray
Masks = Mask | Mapping[str, Mask]


class ImageGenerator:
    """Draws images from captions and masks with a trained checkpoint: `ckpt/step-...` of a run, or the run's folder.

    Raises InputError for what is no checkpoint of a model that reads captions, MedgenError if it is damaged. The same call with the same
    seed gives the same images on one kind of device."""

    def __init__(self, checkpoint_folder: str | Path, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        folder = _checkpoint_in(Path(checkpoint_folder))
        found = checkpoint.open_verified(folder)
        state = found.state()
        config = spec.family_config(state["config"])
        if not isinstance(config, Config) or not config.uses_captions:
            raise InputError(f"{folder}: its model ({state['config']['model']}) reads no captions; give a checkpoint of model: flow with told: [caption, ...]")
        shape = DataShape(config.input_channels, state["size"], (), tuple(state["regions"]), vocabulary=state["vocabulary"])
        model = trained_model(found, state["config"]["model"], config, shape, self.device)
        assert isinstance(model, Model)
        self._model, self._config = model, config

    @property
    def image_size(self) -> int:
        """Pixels per side of the images that it was trained on."""
        return self._model.shape.size

    @property
    def regions(self) -> tuple[str, ...]:
        """What a mask may show, in the order of its numbers from 1; empty of a model that takes no masks."""
        return self._model.shape.regions if "mask" in self._config.told else ()

    def unknown_words(self, caption: str) -> tuple[str, ...]:
        """Words of a caption that the model has never read: what they mean it cannot know."""
        assert self._model.tokenizer is not None
        return self._model.tokenizer.unknown_words(caption)

    def generate(
        self, caption: str, mask: Masks | None = None, image_size: int | None = None, steps: int | None = None,
        guidance_scale: float | None = None, seed: int = 0, mask_guidance_scale: float | None = None, sampler: str | None = None,
    ) -> Image.Image:  # fmt: skip
        """An image of 8 bits, gray or RGB; the rest as of `generate_all`."""
        return self.generate_all([caption], mask, image_size, steps, guidance_scale, seed, mask_guidance_scale, sampler)[0]

    def generate_all(
        self, captions: Sequence[str], mask: Masks | None = None, image_size: int | None = None, steps: int | None = None,
        guidance_scale: float | None = None, seed: int = 0, mask_guidance_scale: float | None = None, sampler: str | None = None,
    ) -> list[Image.Image]:  # fmt: skip
        """An image per caption, drawn together; the first is that of `generate` with its caption.

        mask: numbers of `regions` per pixel, 0 outside, or by region what is inside; the same for all captions, brought to the images' size.
        image_size: larger than trained is tried, and looks less sure. The rest as in a generate stage. Warns of unknown words."""
        _check_captions(captions)
        unknown = sorted({word for text in captions for word in self.unknown_words(text)})
        if unknown:
            warnings.warn(f"never read in training, so they mean nothing here: {', '.join(unknown)}", stacklevel=2)
        size = self._checked_size(image_size)
        settings = self._config.sampling({key: value for key, value in (
            ("sampler", sampler), ("steps", steps), ("guidance", guidance_scale), ("mask_guidance", mask_guidance_scale)) if value is not None})  # fmt: skip
        noise = SampleNoise(seed, STREAM, [(number,) for number in range(len(captions))], self.device)
        given = Given(self._channels(mask, size, len(captions)), captions=tuple(captions))
        drawn = self._model.sample_at(size, noise, given, settings)
        return [_picture([drawn[name][number, 0] for name in self._config.images]) for number in range(len(captions))]

    def _checked_size(self, wanted: int | None) -> int:
        size, patch = wanted if wanted is not None else self.image_size, self._config.network.patch
        if not patch <= size <= MOST_PIXELS or size % patch:
            raise InputError(f"image_size: {size} given; a multiple of {patch}, of {patch} to {MOST_PIXELS} pixels per side, is needed")
        return size

    def _channels(self, mask: Masks | None, size: int, count: int) -> dict[str, torch.Tensor]:
        if not self.regions:
            if mask is not None:
                raise InputError("mask: this model takes none; it was trained with told: [caption]")
            return {}
        numbers = np.zeros((size, size), np.float32) if mask is None else _numbers(mask, self.regions, size)
        seg = torch.from_numpy(numbers).to(self.device).expand(count, 1, size, size)
        return {"seg": seg, "masked": torch.full_like(seg, float(mask is not None))}


def _checkpoint_in(folder: Path) -> Path:
    """Itself, or the newest one of a run that has a single training."""
    if (folder / commits.COMMIT).is_file():
        return folder
    trainings = sorted(path for path in folder.glob("*/ckpt") if any(path.glob("step-*")))
    if len(trainings) == 1:
        return max(path for path in trainings[0].glob("step-*") if (path / commits.COMMIT).is_file())
    several = f"it has {len(trainings)} trainings: {', '.join(path.parent.name for path in trainings)}; " if trainings else ""
    raise InputError(f"{folder} is no checkpoint: {several}name a folder such as runs/<run>/<stage>/ckpt/step-001000, which holds a {commits.COMMIT}")


def _check_captions(captions: Sequence[str]) -> None:
    if not captions:
        raise InputError("caption: none given; write what the image shows")
    for number, text in enumerate(captions):
        if not text.strip():
            raise InputError(f"caption: number {number + 1} is empty; write what the image shows")


def _numbers(mask: Masks, regions: tuple[str, ...], size: int) -> np.ndarray:
    """float32 [size, size], the number of each pixel's region; where several are, the later one has it."""
    if isinstance(mask, Mapping):
        unknown = sorted(set(mask) - set(regions))
        if unknown:
            raise InputError(f"mask: {unknown[0]!r} is no region of this model; the regions are: {', '.join(regions)}")
        inside = {regions.index(name) + 1: _flat(part, f"mask of {name}") != 0 for name, part in mask.items()}
    else:
        flat = _flat(mask, "mask")
        values = set(np.unique(flat).tolist())
        if len(regions) == 1 and len(values - {0}) == 1:
            flat, values = (flat != 0).astype(np.uint8), {0, 1}
        if not values <= set(range(len(regions) + 1)):
            shown = ", ".join(f"{value:g}" for value in sorted(values)[:5])
            raise InputError(f"mask: holds {shown}; write 0 outside and the numbers of regions, 1 {' and '.join(f'{number} {name}' for number, name in enumerate(regions, 1))[2:]}, "
                             "or a mask by region: {name: mask}")  # fmt: skip
        inside = {number: flat == number for number in range(1, len(regions) + 1)}
    found = np.zeros((size, size), np.float32)
    for number, part in sorted(inside.items()):
        found[shares_of(part, size) >= OWNED] = number
    return found


def _flat(mask: Mask, name: str) -> np.ndarray:
    """[H, W]. Colours do not say which region they mean."""
    array = np.asarray(mask)
    if array.ndim == 3 and array.shape[2] in (3, 4) and (array[..., :3] == array[..., :1]).all():
        array = array[..., 0]
    if array.ndim != 2:
        raise InputError(f"{name}: has the shape {array.shape}; one number per pixel is needed, no colours")
    return array


def _picture(channels: Sequence[torch.Tensor]) -> Image.Image:
    values = np.rint(255 * np.stack([channel.float().cpu().numpy() for channel in channels], axis=-1)).astype(np.uint8)
    return Image.fromarray(values if len(channels) == 3 else values[..., 0])
