"""The model contract, run over every family and every variant that its config names. A new family needs no line here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medgen import models
from medgen.context import Context
from medgen.dist import Ranks
from medgen.models.base import Batch, DataShape, Given, Lot, Model, SampleNoise, Sizes
from medgen.records import Records
from medgen.training import build_model

CPU = torch.device("cpu")
SIZE = 16
REGIONS = ("wall", "cavity")
CAPTIONS = ("a bright disc", "a dark ring, wide", "no ring")
VARIANTS = [(family, name) for family in models.families() for name in models.config_class(family).examples()]


def make(family: str, name: str, seed: int = 1) -> tuple[Any, Model]:
    config = models.config_class(family).model_validate(models.config_class(family).examples()[name])
    classes = ("AD", "CN") if config.uses_labels else ()
    records = len(records_of(config)) if config.record_sampling is not None else 0
    vocabulary = config.vocabulary(CAPTIONS) if config.uses_captions else {}
    shape = DataShape(config.input_channels, SIZE, classes, REGIONS if config.takes_regions else ("foreground",), records, vocabulary=vocabulary)
    return config, build_model(family, config, shape, seed, "test")


def records_of(config: Any) -> Records:
    """Ten patients of two slices each."""
    return Records(config.record_sampling, np.arange(20), np.repeat(np.arange(10), 2), 1, "test")


def images_of(config: Any, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Smooth images, blob masks with a region within another where the family takes them, and padding, each other, where it is told."""
    channels = {}
    for name in config.input_channels:
        smooth = torch.nn.functional.interpolate(torch.rand(count, 1, 4, 4, generator=generator), SIZE, mode="bilinear")
        levels = (0.6, 0.75) if config.takes_regions else (0.6,)
        channels[name] = sum(((smooth > level).float() for level in levels), start=torch.zeros_like(smooth)) if name == "seg" else smooth
    if "masked" in channels:
        channels["masked"] = (torch.arange(count) % 3 > 0).float().view(-1, 1, 1, 1).expand(count, 1, SIZE, SIZE).contiguous()
    if "valid" not in channels:
        return channels
    valid = torch.zeros(count, 1, SIZE, SIZE)
    for number in range(count):
        valid[number, :, number % 3 : SIZE - 2, : SIZE - number % 4] = 1
    return {name: channel * valid if name != "valid" else valid for name, channel in channels.items()}


def sizes_of(config: Any, count: int, generator: torch.Generator) -> Sizes | None:
    """Pixels of 1 to 2 mm, and a field of view that goes with them."""
    if not config.uses_sizes:
        return None
    spacing_mm = 1 + torch.rand(count, 2, generator=generator)
    return Sizes(spacing_mm, spacing_mm * SIZE)


def training_batch(config: Any, step: int, size: int = 4, rank: int = 0, world_size: int = 1) -> Batch:
    """What the loop would feed to a rank: slices in turn, or records drawn for each update; the same for the same step."""
    if config.record_sampling is None:
        share = size // world_size
        return batch_of(config, step, size, rank * share, share)
    records, every = records_of(config), images_of(config, 20, torch.Generator().manual_seed(0))
    lots = []
    for number in range(step * records.sampling.updates, (step + 1) * records.sampling.updates):
        drawn = records.drawn(number)[rank::world_size]
        rows = torch.from_numpy(records.rows(number, drawn))
        channels = {name: images[rows] for name, images in every.items()}
        lots.append(Lot(channels, [number * len(records) + int(record) for record in drawn], records.sampling.size, 1, "test", number))
    return Batch({}, list(range(step * size, (step + 1) * size)), seed=1, lots=tuple(lots))


def batch_of(config: Any, step: int, size: int = 4, first: int = 0, count: int | None = None) -> Batch:
    """The same images for the same step; optionally only some of the batch."""
    generator = torch.Generator().manual_seed(step)
    channels = images_of(config, size, generator)
    labels = torch.randint(2, (size,), generator=generator) if config.uses_labels else None
    sizes = sizes_of(config, size, generator)
    captions = tuple(CAPTIONS[(step + number) % len(CAPTIONS)] for number in range(size)) if config.uses_captions else None
    part = slice(first, first + (count or size))
    positions = list(range(step * size, (step + 1) * size))[part]
    return Batch(
        {name: tensor[part] for name, tensor in channels.items()}, positions, seed=1,
        labels=labels[part] if labels is not None else None, sizes=sizes.mapped(lambda tensor: tensor[part]) if sizes is not None else None,
        captions=captions[part] if captions is not None else None,
    )  # fmt: skip


def within_last_phase(made: Context, phases: int) -> Context:
    """Where everything of a model takes part: a family that grows is not grown before."""
    made.total_steps, made.steps_per_epoch = 20, 10.0
    made.phase, made.phase_progress = phases - 1, 0.25
    return made


def context(phases: int = 1, micro_batch: int | None = None) -> Context:
    return within_last_phase(Context(Ranks(0, 1, 0, CPU), "fp32", micro_batch), phases)


def train(model: Model, config: Any, steps: range, where: Context | None = None, size: int = 4) -> list[float]:
    where = where or context(len(model.phases()))
    losses = []
    for where.step in steps:
        losses.append(float(model.step(training_batch(config, where.step, size), where).scalars["loss"]))
    return losses


def state_of(model: Model) -> dict[str, Any]:
    return {**{f"modules.{key}": module.state_dict() for key, module in model.modules().items()},
            **{f"optimizers.{key}": optimizer.state_dict() for key, optimizer in model.optimizers().items()}}


def load_into(model: Model, state: dict[str, Any]) -> None:
    for key, module in model.modules().items():
        module.load_state_dict(state[f"modules.{key}"])
    for key, optimizer in model.optimizers().items():
        optimizer.load_state_dict(state[f"optimizers.{key}"])


def sample(model: Model, config: Any, indices: list[int]) -> dict[str, torch.Tensor]:
    names = [name for name in config.input_channels if name not in config.output_channels]
    whole = batch_of(config, 0, size=8)
    labels = whole.labels[indices] if whole.labels is not None else None
    sizes = whole.sizes.mapped(lambda tensor: tensor[indices]) if whole.sizes is not None else None
    captions = tuple(whole.captions[index] for index in indices) if whole.captions is not None else None
    given = Given({name: whole.channels[name][indices] for name in names}, labels, sizes, captions)
    settings = config.preview_sampling()
    if "steps" in type(settings).model_fields:
        settings = settings.model_copy(update={"steps": 3})
    return model.sample(SampleNoise(1, "test", [(index,) for index in indices], CPU), given, settings)


def assert_same(left: Any, right: Any, path: str = "") -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{path}/{number}")
    else:
        assert left == right, path


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_config_is_frozen_and_complete(family: str, name: str) -> None:
    config, model = make(family, name)
    with pytest.raises(ValueError, match="frozen"):
        config.loop = None
    with pytest.raises(ValueError, match="no_such_key"):
        type(config).model_validate({**type(config).examples()[name], "no_such_key": 1})
    assert type(config).model_validate(config.model_dump(mode="json")) == config, "the resolved form in a run must read back"
    assert model.phases() and all(phase.epochs > 0 and phase.batch_size > 0 for phase in model.phases())
    assert all(isinstance(line, str) and line for line in model.describe(100))


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_training_lowers_the_loss_on_one_batch(family: str, name: str) -> None:
    config, model = make(family, name)
    where = context(len(model.phases()))
    where.steps_per_epoch = 100.0
    held_out = [model.validate(batch_of(config, 0), where).scalars["loss"].item()]
    for where.step in range(30):
        report = model.step(training_batch(config, 0), where)
        assert all(tensor.dim() == 0 and bool(torch.isfinite(tensor)) for tensor in report.scalars.values())
        for bins, values in report.binned.values():
            assert bins.shape == values.shape == (4,) and bool(((bins >= 0) & (bins < 10)).all())
    held_out.append(model.validate(batch_of(config, 0), where).scalars["loss"].item())
    assert held_out[1] < held_out[0]


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_stopped_and_resumed_is_uninterrupted(family: str, name: str, tmp_path: Any) -> None:
    config, whole = make(family, name)
    train(whole, config, range(7))
    _, first = make(family, name)
    train(first, config, range(3))
    torch.save(state_of(first), tmp_path / "state.pt")
    _, second = make(family, name, seed=99)
    load_into(second, torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, config, range(3, 7))
    assert_same(state_of(whole), state_of(second))


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_accumulated_micro_batches_are_the_whole_batch(family: str, name: str) -> None:
    config, whole = make(family, name)
    _, parts = make(family, name)
    whole_losses = train(whole, config, range(2), size=8)
    part_losses = train(parts, config, range(2), context(len(parts.phases()), micro_batch=6), size=8)
    assert part_losses == pytest.approx(whole_losses, rel=1e-5)


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_a_step_leaves_the_global_generator_alone(family: str, name: str) -> None:
    config, model = make(family, name)
    before = torch.get_rng_state()
    train(model, config, range(1))
    sample(model, config, [0, 1])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_samples_have_the_promised_form_and_their_own_noise(family: str, name: str) -> None:
    config, model = make(family, name)
    train(model, config, range(3))
    images = sample(model, config, [0, 1, 2])
    assert tuple(images) == config.output_channels
    for channel, tensor in images.items():
        assert tensor.shape == (3, 1, SIZE, SIZE) and tensor.dtype == torch.float32
        assert float(tensor.min()) >= 0 and float(tensor.max()) <= 1
        if channel == "seg":
            assert set(tensor.unique().tolist()) <= {0.0, 1.0}
    again = sample(model, config, [2, 1])
    for channel, tensor in images.items():
        assert torch.allclose(again[channel][0], tensor[2], atol=1e-4) and torch.allclose(again[channel][1], tensor[1], atol=1e-4)
        if channel != "seg":
            assert not torch.equal(tensor[0], tensor[1])


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_what_is_sampled_and_validated_are_the_averaged_weights(family: str, name: str) -> None:
    config, model = make(family, name)
    train(model, config, range(4))
    averaged = {key for key in model.modules() if key.startswith("ema")}
    if not averaged:
        pytest.skip("this variant averages nothing")

    def outputs() -> list[float]:
        loss = float(model.validate(batch_of(config, 9), context(len(model.phases()))).scalars["loss"])
        pixels = torch.cat([tensor.flatten() for tensor in sample(model, config, [0, 1]).values()])
        return [loss, float(pixels.sum()), float(pixels.square().sum())]

    before = outputs()
    _scramble(model, set(model.modules()) - averaged)
    assert outputs() == before, "raw weights are used somewhere"
    _scramble(model, averaged)
    assert outputs() != before, "the averaged weights are used nowhere"


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_curves_are_of_what_is_logged(family: str, name: str) -> None:
    config, model = make(family, name)
    asked = {line for curves in config.curves for line in curves.lines}
    if asked:
        where = context(len(model.phases()))
        logged = set(model.step(training_batch(config, 0), where).scalars)
        with torch.no_grad():
            held_out = model.validate(batch_of(config, 0, size=8), where)
        assert asked <= logged | {f"val_{scalar}" for scalar in (*held_out.scalars, *model.scores(held_out.samples))}
    assert all(1 <= len(curves.lines) <= 3 for curves in config.curves)


CLASSIFIERS = [(family, name) for family, name in VARIANTS if models.config_class(family).model_validate(models.config_class(family).examples()[name]).classifies]


@pytest.mark.parametrize(("family", "name"), CLASSIFIERS)
def test_classes_of_an_image_do_not_depend_on_the_others(family: str, name: str) -> None:
    config, model = make(family, name)
    train(model, config, range(3))
    channels = batch_of(config, 0).channels
    assert model.judged_size == SIZE
    together = model.classify(channels)
    assert together.shape == (4, 2) and not together.requires_grad
    torch.testing.assert_close(together.sum(dim=1), torch.ones(4))
    for number in range(4):
        alone = model.classify({key: tensor[number : number + 1] for key, tensor in channels.items()})
        torch.testing.assert_close(alone[0], together[number], rtol=0, atol=1e-6)
    assert together.std(dim=0).min() > 0


ATTACKABLE = [(family, name) for family, name in VARIANTS if models.config_class(family).model_validate(models.config_class(family).examples()[name]).attackable]


@pytest.mark.parametrize(("family", "name"), ATTACKABLE)
def test_what_a_model_says_of_a_suspected_training_image_does_not_depend_on_the_others(family: str, name: str) -> None:
    config, model = make(family, name)
    train(model, config, range(3))
    together = model.attack_scores(batch_of(config, 0))
    assert together.shape == (4,) and together.dtype == torch.float32 and not together.requires_grad
    assert bool(torch.isfinite(together).all()) and together.std() > 0
    for number in range(4):
        alone = batch_of(config, 0, first=number, count=1)
        alone.positions = [77]
        torch.testing.assert_close(model.attack_scores(alone)[0], together[number], rtol=0, atol=1e-5)


def _scramble(model: Model, keys: set[str]) -> None:
    with torch.no_grad():
        for key in keys:
            for parameter in model.modules()[key].parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(0))
