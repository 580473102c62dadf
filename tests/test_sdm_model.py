"""Semantic diffusion as a family: padding, what is left out for guidance, what is told, published sizes, what is refused."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, tiny_spec
from test_models import REGIONS, batch_of, context, make, train
from torch import Tensor

from medgen import spec
from medgen.errors import InputError
from medgen.models.base import Batch, DataShape, Given, SampleNoise, Sizes, count_parameters
from medgen.models.sdm.conditions import Conditions
from medgen.models.sdm.config import Config
from medgen.models.sdm.model import Model
from medgen.training import build_model

CPU = torch.device("cpu")
TINY: dict[str, Any] = {**Config.examples()["told_v"], "ema": None}
HEART = ("myocardium", "left_ventricle")
EVERYTHING = ("image", "seg", "valid")


def model_of(size: int, **changes: Any) -> Model:
    config = Config.model_validate({**TINY, **changes})
    model = build_model("sdm", config, DataShape(config.input_channels, size, ("T1", "T2") if config.uses_labels else (), REGIONS), 1, "test")
    assert isinstance(model, Model)
    return model


def batch_at(size: int, count: int, image: Tensor | None = None, labels: Tensor | None = None, spacing_mm: Tensor | None = None) -> Batch:
    """Without padding and regions; grey images, of kind 0 and 1.5 mm if nothing else is said."""
    channels = {name: torch.zeros(count, 1, size, size) for name in ("image", "seg")}
    if image is not None:
        channels["image"] = image.view(-1, 1, 1, 1).expand(-1, 1, size, size).contiguous()
    spacing_mm = spacing_mm if spacing_mm is not None else torch.full((count, 2), 1.5)
    labels = labels if labels is not None else torch.zeros(count, dtype=torch.long)
    return Batch({**channels, "valid": torch.ones(count, 1, size, size)}, list(range(count)), seed=1, labels=labels, sizes=Sizes(spacing_mm, spacing_mm * size))


# --- padding ----------------------------------------------------------------------------------------------------------


def with_other_padding(batch: Batch) -> Batch:
    """Images and masks that are noise where there is nothing."""
    padding, generator = batch.channels["valid"] == 0, torch.Generator().manual_seed(5)
    noise = {"image": torch.rand(padding.shape, generator=generator), "seg": torch.randint(3, padding.shape, generator=generator).float()}
    return replace(batch, channels={name: torch.where(padding, noise[name], channel) if name in noise else channel for name, channel in batch.channels.items()})


def test_padding_is_not_learnt_from() -> None:
    """To the bit, whatever lies there: losses, weights after a step, and what is said of an image."""
    found = []
    for change in (lambda batch: batch, with_other_padding):
        config, model = make("sdm", "told_v")
        batch = change(batch_of(config, 0))
        scalars = model.step(batch, context()).scalars
        train(model, config, range(1, 3))
        found.append([scalars["loss"], scalars["bits"], scalars["constant_loss"] if "constant_loss" in scalars else scalars["mse"], model.validate(batch, context()).scalars["loss"].detach(),
                      model.attack_scores(batch), *(parameter.detach() for parameter in model.modules()["network"].parameters())])  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(batch_of(config, 0).channels["image"], with_other_padding(batch_of(config, 0)).channels["image"])


def test_padding_is_not_drawn() -> None:
    """Images are 0 there, and what is drawn beside it does not depend on the noise or mask that lies there."""
    config, model = make("sdm", "told_v")
    train(model, config, range(3))
    whole = batch_of(config, 0)

    class OtherNoise(SampleNoise):
        """Ten times as much of it in padding."""

        def normal(self, shape: tuple[int, ...]) -> Tensor:
            drawn = super().normal(shape)
            return torch.where(whole.channels["valid"] == 1, drawn, 10 * drawn)

    images = []
    for noise, batch in ((SampleNoise, whole), (OtherNoise, with_other_padding(whole))):
        given = Given({name: batch.channels[name] for name in ("seg", "valid")}, batch.labels, batch.sizes)
        settings = config.sampling({"steps": 3, "guidance": 2.0})
        images.append(model.sample(noise(1, "test", [(number,) for number in range(4)], CPU), given, settings)["image"])
    assert torch.equal(*images)
    assert float((images[0] * (1 - whole.channels["valid"])).abs().max()) == 0.0 and float((images[0] * whole.channels["valid"]).std()) > 0.0


def test_the_label_map_has_one_class_per_pixel() -> None:
    config, model = make("sdm", "told_v")
    assert isinstance(model, Model)
    channels = batch_of(config, 0).channels
    found, seg, padding = model._label_map(channels), channels["seg"][:, 0], channels["valid"][:, 0] == 0
    assert found.shape[1] == 4 and torch.equal(found.sum(dim=1), torch.ones_like(seg))
    assert torch.equal(found.argmax(dim=1)[padding], torch.full((int(padding.sum()),), 3)) and torch.equal(found.argmax(dim=1)[~padding], seg[~padding].long())
    assert {0.0, 1.0, 2.0} <= set(seg.unique().tolist())


def test_the_loss_of_a_constant_is_that_of_a_network_that_predicts_nothing() -> None:
    """Before training the network predicts 0, and the mean of the velocity is all but that over images of all brightnesses."""
    config, model = make("sdm", "plain")
    where = context()
    where.step = where.total_steps
    scalars = model.step(batch_of(config, 0, size=64), where).scalars
    assert float(scalars["constant_loss"]) == pytest.approx(float(scalars["loss"]), rel=1e-3)
    assert float(scalars["loss"]) == pytest.approx(float(scalars["mse"]) + float(scalars["bits"]), rel=1e-5)


# --- what is left out for guidance --------------------------------------------------------------------------------------


def seen_in_a_step(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples the network was given without their mask, kind and size, bool [B] each."""
    calls: list[tuple[Tensor, Conditions]] = []
    hook = model.network.register_forward_pre_hook(lambda module, given: calls.append((given[2], given[3])))
    model.step(batch, context())
    hook.remove()
    [(labels, conditions)] = calls
    assert set(labels.unique().tolist()) <= {0.0, 1.0}
    return labels.sum(dim=(1, 2, 3)) == 0, conditions.without_kind, conditions.without_size


def test_each_is_left_out_at_its_share_by_itself_and_by_position_alone() -> None:
    count, shares = 3000, (0.1, 0.3, 0.5)
    model = model_of(4, mask_dropout=shares[0], kind_dropout=shares[1], size_dropout=shares[2])
    batch = batch_at(4, count)
    seen = seen_in_a_step(model, batch)
    for without, share in zip(seen, shares, strict=True):
        assert abs(float(without.float().mean()) - share) < 4 * (share * (1 - share) / count) ** 0.5
    correlations = torch.corrcoef(torch.stack(seen).float()) - torch.eye(3)
    assert float(correlations.abs().max()) < 4 / count**0.5
    later = list(batch.split(count - 700))[1]
    for without, again in zip(seen, seen_in_a_step(model, later), strict=True):
        assert torch.equal(without[-700:], again)


def test_all_is_told_in_validation_and_where_nothing_is_left_out() -> None:
    told = model_of(4, mask_dropout=0.0, kind_dropout=0.0, size_dropout=0.0)
    assert not any(bool(without.any()) for without in seen_in_a_step(told, batch_at(4, 100)))
    first, second = (model_of(4, mask_dropout=share).validate(batch_at(4, 100), context()).scalars["loss"] for share in (0.0, 0.9))
    assert torch.equal(first, second)


# --- what is told -------------------------------------------------------------------------------------------------------


def drawn(model: Model, batch: Batch, **sampling: Any) -> Tensor:
    given = Given({name: batch.channels[name] for name in ("seg", "valid")}, batch.labels, batch.sizes)
    noise = SampleNoise(1, "test", [(position,) for position in batch.positions], CPU)
    return model.sample(noise, given, model.config.sampling({"sampler": "ddim", "steps": 10, **sampling}))["image"]


@pytest.fixture(scope="module")
def taught() -> Model:
    """Images of kind 1 are 0.3 brighter, those of 2 mm 0.3 brighter than those of 1 mm."""
    model = model_of(4, lr=3e-2, epochs=8, min_snr_gamma=None, kind_dropout=0.2, size_dropout=0.2)
    generator = torch.Generator().manual_seed(1)
    where = context()
    for where.step in range(80):
        kinds, large = torch.randint(2, (16,), generator=generator), torch.randint(2, (16,), generator=generator)
        batch = batch_at(4, 16, 0.2 + 0.3 * kinds + 0.3 * large, kinds, (1.0 + large)[:, None].expand(-1, 2).contiguous())
        model.step(replace(batch, positions=list(range(16 * where.step, 16 * where.step + 16))), where)
    return model


def test_flipping_only_the_kind_or_only_the_size_changes_the_image_as_it_was_taught(taught: Model) -> None:
    count = 16
    ones, large = torch.ones(count, dtype=torch.long), torch.full((count, 2), 2.0)
    usual = drawn(taught, batch_at(4, count, spacing_mm=large / 2)).mean()
    of_kind_1, of_2_mm = (drawn(taught, batch).mean() for batch in (batch_at(4, count, labels=ones, spacing_mm=large / 2), batch_at(4, count, spacing_mm=large)))
    assert 0.1 < float(of_kind_1 - usual) < 0.5 and 0.1 < float(of_2_mm - usual) < 0.5


def test_guidance_moves_the_image_and_guidance_of_1_does_not(taught: Model) -> None:
    batch = batch_at(4, 4, labels=torch.ones(4, dtype=torch.long))
    plain = drawn(taught, batch)
    for name in ("guidance", "kind_guidance", "size_guidance"):
        assert torch.equal(drawn(taught, batch, **{name: 1.0}), plain)
        assert torch.allclose(drawn(taught, batch, **{name: 1.000001}), plain, atol=1e-4), "the guided way ends where the other does"
    assert float((drawn(taught, batch, kind_guidance=2.0) - plain).mean()) > 0.02, "kind 1 is the brighter one"
    settings = taught.config.sampling({"sampler": "ddim", "steps": 10, "guidance": 2, "size_guidance": 3})
    assert settings.evaluations == 30


# --- sizes of networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels", "parameters"), [(128, 64, 46_437_762), (256, 64, 59_621_634)])
def test_published_settings_give_published_networks(size: int, channels: int, parameters: int) -> None:
    with torch.device("meta"):
        model = Model(Config(told=(), channels=channels, ema=None), DataShape(EVERYTHING, size, (), HEART))
    assert count_parameters(model.network) == parameters


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/sdm").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_whole(path: Path, tmp_path: Path) -> None:
    """Each is read by the spec as a job would, fits the size in its name, and says the millions of parameters that it has."""
    size = int(path.stem.rpartition("_")[2])
    job = tmp_path / "job.yaml"
    job.write_text(f"version: 1\nname: one\ndata: {{format: cardiac, root: {tmp_path}, size: {size}}}\nstages: {{train: {{kind: train, config: {path}, resources: {{gpus: 1}}}}}}\n")
    config = spec.family_config(spec.load(job).stages["train"].config)  # type: ignore[union-attr]
    assert config.respaces is not None and Config.model_validate(config.model_dump(mode="json")) == config
    with torch.device("meta"):
        model = Model(config, DataShape(config.input_channels, size, ("T1", "T2"), HEART))
    said = re.search(r"(\d+) million parameters", path.read_text())
    if said is not None:
        assert round(count_parameters(model.network) / 1e6) == int(said[1])


# --- what is refused ------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"told": []}, {"kind_dropout": 0.1}, r"kind_dropout has no effect: the kind is not told; remove it, or write told: \[kind\]"),
    ({"told": ["kind"]}, {"size_dropout": 0.0}, r"size_dropout has no effect: the size is not told; remove it, or write told: \[kind, size\]"),
    ({"told": ["kind"]}, {"respacing": {}}, r"respacing has no effect where the size is not told: .* or write told: \[kind, size\]"),
    ({}, {"told": ["kind", "kind"]}, "names one twice"),
    ({}, {"told": ["age"]}, "'kind' or 'size'"),
    ({}, {"images": ["seg"]}, "'seg' is what images are made from; name channels of data.images"),
    ({}, {"images": []}, "images"),
    ({}, {"multipliers": None}, "attention is per level, and the levels are those of multipliers: write multipliers too, or neither"),
    ({}, {"attention": [True]}, "attention has 1 levels, multipliers has 2"),
    ({}, {"head_channels": 3}, "head_channels: 3 does not divide the 16 channels"),
    ({}, {"multipliers": [1, 1.3]}, "multipliers: 1.3 times 8 channels is no whole number of channels"),
    ({}, {"bound_weight": 0}, "bound_weight"),
    ({}, {"learned_variance": True}, "learned_variance"),
    ({}, {"lr_min": 1.0}, "lr_min: 1 is above lr: 0.001"),
]


@pytest.mark.parametrize(("base", "change", "words"), REFUSED)
def test_a_configuration_that_cannot_be_trained_is_refused(base: dict[str, Any], change: dict[str, Any], words: str) -> None:
    Config.model_validate({**TINY, **base})
    with pytest.raises(ValueError, match=words):
        Config.model_validate({**TINY, **base, **change})


DATA_REFUSED = [
    ({"format": "cardiac", "root": "/data", "size": 15}, {}, "multipliers: a network of 2 levels needs data.size divisible by 2, got 15"),
    ({"format": "cardiac", "root": "/data", "size": 96}, {"multipliers": None, "attention": None}, r"multipliers: the published ones are of 64, 128, 256, 512 px, and data.size is 96; write them"),
    ({"format": "cardiac", "root": "/data", "size": 64}, {"multipliers": None, "attention": None, "head_channels": 64}, "head_channels: 64 does not divide the 16 channels of level 2"),
    ({"format": "cardiac", "root": "/data", "size": 16, "types": ["T1"]}, {}, r"told: kind has no effect, since all images are of the class T1; write told: \[size\]"),
    ({"format": "phantom", "size": 16}, {"images": ["bravo"], "told": ["size"], "respacing": {}}, "respacing has no effect with format: phantom"),
    ({"format": "phantom", "size": 16}, {"told": []}, "needs data.images.image; the data have: bravo"),
]


@pytest.mark.parametrize(("data", "config", "words"), DATA_REFUSED)
def test_data_that_do_not_fit_are_refused(data: dict[str, Any], config: dict[str, Any], words: str) -> None:
    from medgen.spec_data import DataSpec

    with pytest.raises(ValueError, match=words):
        Config.model_validate({**TINY, **config}).check_data(DataSpec.model_validate(data))


@pytest.mark.parametrize(("classes", "words"), [(("T1",), "all images are of the class T1"), ((), "the images have no classes")])
def test_a_kind_that_tells_nothing_is_refused(classes: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=rf"told: kind has no effect, since {words}; write told: \[size\]"):
        Model(Config.model_validate(TINY), DataShape(EVERYTHING, 16, classes, HEART))


SAMPLING_REFUSED = [
    ({}, {"mask_dropout": 0.0}, {"guidance": 2}, r"guidance needs a training with mask_dropout \(0.1, say\): this one never saw images without their mask"),
    ({}, {"kind_dropout": 0.0}, {"kind_guidance": 2}, "kind_guidance needs a training with kind_dropout"),
    ({}, {"told": ["kind"]}, {"size_guidance": 2}, r"size_guidance has no effect: this training is not told the size \(told: \[kind\]\); remove it"),
    ({}, {}, {"guidance_interval": [0.2, 0.8]}, "guidance_interval has no effect with guidance: 1; remove it"),
    ({"kind_guidance": 2}, {}, {"guidance_interval": [0.8, 0.2]}, "guidance_interval: times lie in 0 to 1 and rise"),
    ({}, {}, {"eta": 0.5}, "eta has no effect with the ddpm sampler; remove it"),
    ({"sampler": "ddim"}, {}, {"steps": 1001}, "steps: 1001 is more than the 1000 timesteps trained"),
    ({}, {}, {"sampler": "euler"}, "sampler: 'euler' does not fit discrete times; use one of: ddpm, ddim, dpm_solver_2m"),
    ({}, {}, {"weights": "ema"}, "weights: 'ema' was not kept; this training has: raw"),
    ({}, {}, {"cfg": 2}, "unknown key 'cfg'; the valid keys are: steps, sampler, eta, guidance"),
]


@pytest.mark.parametrize(("base", "config", "change", "words"), SAMPLING_REFUSED)
def test_sampling_without_effect_is_refused(base: dict[str, Any], config: dict[str, Any], change: dict[str, Any], words: str) -> None:
    made = Config.model_validate({**TINY, **config})
    made.sampling(base)
    with pytest.raises(ValueError, match=words):
        made.sampling({**base, **change})


def test_the_usual_is_filled_in_and_reads_back() -> None:
    config = Config()
    assert (config.kind_dropout, config.size_dropout) == (0.1, 0.1)
    plain = Config(told=("size",))
    assert (plain.kind_dropout, plain.size_dropout) == (None, 0.1)
    for made in (config, plain, Config(told=(), timesteps=100)):
        assert Config.model_validate(made.model_dump(mode="json")) == made
        settings = made.sampling({})
        assert made.sampling(settings.model_dump(mode="json")) == settings
    assert {sampler: config.sampling({"sampler": sampler}).steps for sampler in ("ddpm", "ddim", "dpm_solver_2m")} == {"ddpm": 1000, "ddim": 50, "dpm_solver_2m": 25}
    assert Config(told=(), timesteps=100).sampling({}).steps == 100


def test_weights_go_to_another_size_only_where_the_levels_are_written() -> None:
    assert Config().weights_of_one_size and not Config.model_validate(TINY).weights_of_one_size
    assert Config().form != Config(head_order="legacy").form


# --- a job ------------------------------------------------------------------------------------------------------------------


def test_a_job_makes_images_from_masks_without_kinds_or_sizes(tmp_path: Path, medgen: Callable[..., subprocess.CompletedProcess[str]], write_spec: Callable[[dict[str, Any]], Path]) -> None:
    """Of brain phantoms, whose masks have one region and whose images have no padding."""
    config = {**TINY, "model": "sdm", "told": [], "images": ["bravo"], "epochs": 1, "batch_size": 8, "warmup_epochs": 0.5, "loop": {"log_steps": 1, "preview_images": 2, "validate_epochs": 1.0}}
    stages = {
        "train": {"kind": "train", "config": config, "resources": {"cpus": 1}},
        "images": {"kind": "generate", "from": "train", "condition": "test", "count": 2, "sampling": {"sampler": "dpm_solver_2m", "steps": 2, "guidance": 2}},
    }
    medgen("submit", write_spec({**tiny_spec(name="semantic"), "stages": stages}), "--local")
    (run,) = (tmp_path / "runs").glob("semantic-*")
    assert "label maps of foreground -> bravo, told nothing else" in medgen("logs", f"{run}/train").stdout
    assert sorted(path.name for path in (run / "images" / "dataset" / "images" / "000001").iterdir())[0] == "bravo.nii.gz"
