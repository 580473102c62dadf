"""Images from a checkpoint in Python: what users of a trained model call, and what they may get wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen import checkpoint
from medgen.errors import InputError
from medgen.generator import ImageGenerator
from medgen.models.base import DataShape, SampleNoise
from medgen.models.flow.config import Config
from medgen.training import build_model

SIZE = 16
REGIONS = ("haemorrhages", "hard_exudates")
CAPTIONS = ("a healthy eye", "an eye with exudates")


def saved(folder: Path, **more: object) -> Path:
    """A checkpoint of random weights, as a training writes it; its last layer is not 0, so that what is told shows."""
    written = {"model": "flow", **Config.examples()["caption_mask"], "images": ["red", "green", "blue"], **more}
    config = Config.model_validate({key: value for key, value in written.items() if key != "model"})
    shape = DataShape(config.input_channels, SIZE, (), REGIONS, vocabulary=config.vocabulary(CAPTIONS) if config.uses_captions else {})
    model = build_model("flow", config, shape, 1, "test")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.modules()["network"].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for average in model.averages.values():  # type: ignore[attr-defined]
        average.copy_params_from_model_to_ema()
    objects = {f"modules.{name}": module.state_dict() for name, module in model.modules().items()}
    state = {"config": {"model": "flow", **config.model_dump(mode="json", exclude={"loop"})}, "size": SIZE, "classes": [], "regions": REGIONS, "vocabulary": shape.vocabulary}
    return checkpoint.save(folder / "run" / "learn" / "ckpt", 10, objects, state, {}).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def generator(folder: Path) -> ImageGenerator:
    return ImageGenerator(folder, "cpu")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_a_caption_becomes_a_picture(generator: ImageGenerator) -> None:
    image = generator.generate("a healthy eye", steps=2, seed=42)
    assert image.size == (SIZE, SIZE) and image.mode == "RGB" and len(np.unique(pixels(image))) > 20
    assert np.array_equal(pixels(image), pixels(generator.generate("a healthy eye", steps=2, seed=42)))
    assert not np.array_equal(pixels(image), pixels(generator.generate("a healthy eye", steps=2, seed=43)))
    for more in ({"caption": "an eye with exudates"}, {"guidance_scale": 4.0}, {"steps": 3}, {"sampler": "euler"}, {"mask": np.ones((SIZE, SIZE))}, {"mask": np.zeros((SIZE, SIZE))}):
        assert not np.array_equal(pixels(image), pixels(generator.generate(**{"caption": "a healthy eye", "steps": 2, "seed": 42, **more}))), more  # type: ignore[arg-type]
    several = generator.generate_all(CAPTIONS, steps=2, seed=42)
    assert len(several) == 2 and np.abs(pixels(several[0]).astype(int) - pixels(image)).max() <= 1, "neighbours do not matter but for rounding"


def test_a_run_names_its_newest_checkpoint(folder: Path, generator: ImageGenerator) -> None:
    again = ImageGenerator(folder.parents[2])
    assert np.array_equal(pixels(again.generate("a healthy eye", steps=2)), pixels(generator.generate("a healthy eye", steps=2)))
    assert again.image_size == SIZE and again.regions == REGIONS


def test_masks_in_every_form_are_the_same(generator: ImageGenerator) -> None:
    numbers = np.zeros((SIZE, SIZE), np.uint8)
    numbers[2:6, 3:9], numbers[8:12, 8:12] = 1, 2
    large = np.kron(numbers, np.ones((4, 4), np.uint8))
    by_name = {name: Image.fromarray(255 * (large == number).astype(np.uint8)) for number, name in enumerate(REGIONS, 1)}
    wanted = pixels(generator.generate("a healthy eye", numbers, steps=2))
    for mask in (large, Image.fromarray(large), Image.merge("RGB", [Image.fromarray(large)] * 3), by_name):
        assert np.array_equal(pixels(generator.generate("a healthy eye", mask, steps=2)), wanted)


def test_other_sizes_than_trained(generator: ImageGenerator) -> None:
    large = generator.generate("a healthy eye", np.ones((5, 5)), image_size=2 * SIZE, steps=2)
    assert large.size == (2 * SIZE, 2 * SIZE) and generator.generate("a healthy eye", image_size=SIZE // 2, steps=2).size == (SIZE // 2, SIZE // 2)
    model = generator._model
    given = generator._channels(None, 2 * SIZE, 1)
    noise = SampleNoise(0, "t", [(0,)], torch.device("cpu"))
    assert given["seg"].shape == (1, 1, 2 * SIZE, 2 * SIZE) and len(noise) == 1 and model.shape.size == SIZE


def test_unknown_words_are_listed(generator: ImageGenerator) -> None:
    with pytest.warns(UserWarning, match="never read in training, so they mean nothing here: cataract, severe"):
        generator.generate("a severe cataract", steps=1)
    assert generator.unknown_words("an eye") == ()


@pytest.mark.parametrize(("more", "wanted"), [
    ({"caption": " "}, "caption: number 1 is empty"), ({"caption": "eye " * 100}, "more than the 64 that are read"), ({"image_size": 18}, "image_size: 18 given; a multiple of 4"),
    ({"image_size": 10**6}, "of 4 to 4096 pixels"), ({"mask": np.full((4, 4), 7)}, r"mask: holds 7; write 0 outside and the numbers of regions, 1 haemorrhages and 2 hard_exudates"),
    ({"mask": np.dstack([np.zeros((4, 4)), np.ones((4, 4)), np.zeros((4, 4))])}, "one number per pixel is needed, no colours"),
    ({"mask": {"cysts": np.ones((4, 4))}}, "mask: 'cysts' is no region of this model; the regions are: haemorrhages, hard_exudates"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_told(generator: ImageGenerator, more: dict[str, object], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        generator.generate(**{"caption": "a healthy eye", "steps": 1, **more})  # type: ignore[arg-type]


def test_what_is_no_checkpoint_of_such_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no checkpoint: name a folder such as"):
        ImageGenerator(tmp_path)
    mute = saved(tmp_path, told=["mask"], text=None, caption_dropout=None)
    with pytest.raises(InputError, match=r"its model \(flow\) reads no captions"):
        ImageGenerator(mute)
