"""The perceptual loss: its value against the lpips package and MONAI, where it counts, what is refused, and a training with it. Weights from a hash."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_weights
import pytest
import torch
from conftest import TINY_NET, tiny_spec
from torch import Tensor

from medgen import planning, spec
from medgen.context import Context
from medgen.dist import Ranks
from medgen.errors import InputError
from medgen.files import sha256_file
from medgen.models.base import Batch, DataShape, Given, SampleNoise
from medgen.models.diffusion import perceptual
from medgen.models.diffusion.config import Config
from medgen.models.diffusion.model import Model
from medgen.models.diffusion.perceptual import PerceptualLoss
from medgen.models.diffusion.strategies import RFlow, Strategy, make_strategy
from medgen.pretrained import torchvision_operators
from medgen.pretrained.perceptual import of_norm_one
from medgen.training import build_model

CPU = torch.device("cpu")
SIZE = 32
TINY = {"epochs": 2, "batch_size": 4, "channels": [8, 16], "attention": [False, True], "head_channels": 8, "warmup_epochs": 1,
        "ema": {"beta": 0.9, "update_after_step": 1, "update_every": 1}}


@functools.cache
def package(net: str) -> Any:
    """The model of the package lpips as it comes, but for its weights."""
    torchvision_operators.make_importable()
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    model.net.load_state_dict(made_weights.state_of(model.net))
    return model


@functools.cache
def resnet() -> torch.nn.Module:
    """Its first convolution ten times as strong: else the norms' shifts say more than the image."""
    torchvision_operators.make_importable()
    from torchvision.models import resnet50

    network = resnet50(weights=None).eval()
    state = made_weights.state_of(network)
    network.load_state_dict({**state, "conv1.weight": 10 * state["conv1.weight"]})
    return network


def backbone(net: str, folder: Path) -> Path:
    """A file in the layout of the published one."""
    if net != "radimagenet":
        state = package(net).net.state_dict()
        return made_weights.saved(folder / f"{net}.pth", {f"features.{name.partition('.')[2]}": value for name, value in state.items()})
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    state = {name: value for name, value in resnet().state_dict().items() if not name.startswith("fc.")}
    return made_weights.saved(folder / "ResNet50.pt", {f"backbone.{numbers[name.split('.')[0]]}.{name.partition('.')[2]}": value for name, value in state.items()})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The settings of a network, whose file is made once."""
    folder, made = tmp_path_factory.mktemp("weights"), dict[str, dict[str, str]]()

    def settings(net: str) -> dict[str, str]:
        if net not in made:
            file = backbone(net, folder)
            made[net] = {"net": net, "file": str(file), "sha256": sha256_file(file)}
        return made[net]

    return settings


def config_of(settings: dict[str, Any] | None, **changes: Any) -> Config:
    return Config.model_validate({"strategy": "rflow", "mode": "bravo", **TINY, "perceptual": settings, **changes})


def images_of(seed: int, count: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")


class Exact(RFlow):
    """The prediction is the clean image: what is compared is in the test's hand."""

    def clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        return prediction


def loss_of(settings: dict[str, Any], mode: str = "bravo", **changes: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(real images, predicted images, times) -> the loss of each sample."""
    config = config_of({**settings, **changes}, mode=mode)
    assert config.perceptual is not None
    loss = PerceptualLoss(config.perceptual, Exact(config), config.mode_class.targets, CPU)
    return lambda real, predicted, times: loss(real, torch.zeros_like(real), predicted, times, loss.counted(times))


def by_the_package(net: str, first: Tensor, second: Tensor) -> Tensor:
    """As the package lpips and MONAI's RadImageNetPerceptualSimilarity compare, with networks that we did not build."""
    first, second = (side.expand(-1, 3, -1, -1) for side in (first, second))
    with torch.no_grad():
        if net != "radimagenet":
            return package(net)(first, second).flatten()  # type: ignore[no-any-return]
        from monai.losses.perceptual import normalize_tensor, spatial_average

        trunk = torch.nn.Sequential(*list(resnet().children())[:-2])
        squared = (normalize_tensor(trunk(first)) - normalize_tensor(trunk(second))) ** 2
        return spatial_average(squared.sum(dim=1, keepdim=True)).flatten()


@pytest.mark.parametrize("net", ["alex", "squeeze", "radimagenet"])
def test_the_value_is_that_of_the_package_sample_by_sample(net: str, files: Callable[[str], dict[str, str]]) -> None:
    loss, early = loss_of(files(net)), torch.full((3,), 0.1)
    real, predicted = images_of(1, 3), images_of(2, 3)
    found = loss(real, predicted, early)
    assert found.shape == (3,) and found.dtype == torch.float32 and float(found.min()) > 1e-4
    torch.testing.assert_close(found, by_the_package(net, predicted, real), rtol=1e-5, atol=1e-6)
    assert torch.equal(loss(real, real, early), torch.zeros(3))
    changed = torch.cat([predicted[:2], predicted[:1]])
    torch.testing.assert_close(loss(real, changed, early)[:2], found[:2], rtol=1e-5, atol=1e-7)  # what stands beside does not matter


def test_two_images_of_a_sample_are_averaged_and_masks_left_out(files: Callable[[str], dict[str, str]]) -> None:
    real, predicted = images_of(1, 2, channels=2), images_of(2, 2, channels=2)
    early = torch.full((2,), 0.1)
    found = loss_of(files("alex"), mode="dual")(real, predicted, early)
    single = [by_the_package("alex", predicted[:, place : place + 1], real[:, place : place + 1]) for place in (0, 1)]
    torch.testing.assert_close(found, (single[0] + single[1]) / 2, rtol=1e-5, atol=1e-6)
    config = config_of(files("alex"))
    assert config.perceptual is not None
    loss = PerceptualLoss(config.perceptual, Exact(config), ("bravo", "seg"), CPU)
    torch.testing.assert_close(loss(real, real, predicted, early, torch.arange(2)), single[0], rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_package_and_finite_where_features_vanish(files: Callable[[str], dict[str, str]]) -> None:
    real, predicted = images_of(1, 2), images_of(2, 2)
    ours, theirs = predicted.clone().requires_grad_(), predicted.clone().requires_grad_()
    loss_of(files("alex"))(real, ours, torch.full((2,), 0.1)).sum().backward()
    package("alex")(theirs.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1)).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * float(theirs.grad.abs().max()))
    before_relu = torch.tensor([[-1.0, 2.0], [-3.0, 0.5]]).view(1, 2, 1, 2).requires_grad_()  # the first place is all 0 behind it
    (of_norm_one(torch.relu(before_relu)) - 1).square().sum().backward()
    assert before_relu.grad is not None and bool(torch.isfinite(before_relu.grad).all()) and torch.equal(before_relu.grad[..., 0], torch.zeros(1, 2, 1))


@pytest.mark.parametrize(("strategy", "changes", "last"), [("rflow", {}, 0.5), ("ddpm", {}, 495), ("rflow", {"snr_at_least": 4.0}, 0.3333)])
def test_only_times_of_enough_signal_count(strategy: str, changes: dict[str, float], last: float, files: Callable[[str], dict[str, str]]) -> None:
    """rflow: (1 - t)^2 / t^2 is 1 at t = 0.5 and 4 at 1/3; ddpm: alpha_bar of the cosine schedule falls below 1/2 after step 495 of 1000."""
    config = config_of({**files("alex"), **changes}, strategy=strategy)
    assert config.perceptual is not None
    strategy_made = make_strategy(config)
    loss = PerceptualLoss(config.perceptual, strategy_made, ("bravo",), CPU)
    times = torch.tensor([last * 0.2, last, last * 1.01 if strategy == "rflow" else last + 1, last * 1.9])
    times = times.long() if strategy == "ddpm" else times
    clean, noise = images_of(1, 4), torch.randn(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    noisy, target = strategy_made.noised(clean, noise, times)
    prediction = (target + 0.3 * noise.flip(0)).requires_grad_()
    found = loss(clean, noisy, prediction, times, loss.counted(times))
    assert bool((found[:2] > 0).all()) and torch.equal(found[2:], torch.zeros(2))
    found.sum().backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad[2:], torch.zeros(2, 1, SIZE, SIZE)), "exactly 0, not almost"
    assert bool((prediction.grad[:2].abs().amax(dim=(1, 2, 3)) > 0).all())
    late = loss(clean[2:], noisy[2:], prediction[2:], times[2:], loss.counted(times[2:]))
    assert torch.equal(late, torch.zeros(2)), "a micro-batch of such times alone"


# --- in a model -------------------------------------------------------------------------------------------------------


def batch_of(config: Config, step: int = 0, size: int = 8) -> Batch:
    channels = {name: (images_of(10 * step + place, size) + 1) / 2 for place, name in enumerate(config.input_channels)}
    channels["seg"] = (channels["seg"] > 0.6).float()
    return Batch(channels, list(range(step * size, (step + 1) * size)), seed=1)


def context(micro_batch: int | None = None) -> Context:
    made = Context(Ranks(0, 1, 0, CPU), "fp32", micro_batch)
    made.total_steps, made.steps_per_epoch = 20, 10.0
    return made


def model_of(config: Config) -> Model:
    model = build_model("diffusion", config, DataShape(config.input_channels, SIZE), 1, "test")
    assert isinstance(model, Model)
    return model


def test_a_rehearsal_takes_the_most_that_a_step_may_take(files: Callable[[str], dict[str, str]]) -> None:
    """The memory that a part of a batch needs is measured by steps, and must not depend on the times that were drawn for them."""
    config = config_of(files("alex"))
    where, seen = context(), list[int]()
    model = model_of(config)
    assert model.perceptual is not None
    model.perceptual._network.register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    for where.rehearsing in (False, True):
        model.step(batch_of(config), where)
    model.perceptual._network._forward_hooks.clear()
    assert seen == [5, 5, 8, 8], "the real images and the predicted ones; five of the eight times have enough signal"


@pytest.mark.parametrize("mode", ["bravo", "dual"])
def test_a_step_reports_its_parts_and_micro_batches_change_nothing(mode: str, files: Callable[[str], dict[str, str]]) -> None:
    config = config_of({**files("alex"), "weight": 0.5}, mode=mode)
    whole, parts = model_of(config), model_of(config)
    where, small = context(), context(micro_batch=4)
    for where.step in (0, 2):
        small.step = where.step
        reports = [model.step(batch_of(config, where.step), here).scalars for model, here in ((whole, where), (parts, small))]
        for name in ("loss", "mse", "perceptual", "grad_norm"):
            assert float(reports[1][name]) == pytest.approx(float(reports[0][name]), rel=1e-4), name
        assert float(reports[0]["loss"]) == pytest.approx(float(reports[0]["mse"]) + 0.5 * float(reports[0]["perceptual"]), rel=1e-6)
        assert float(reports[0]["perceptual"]) > 1e-3


def test_the_network_is_no_part_of_the_model_and_the_validation_no_part_of_the_loss(files: Callable[[str], dict[str, str]]) -> None:
    config, without = config_of({**files("alex"), "weight": 10.0}), config_of(None)
    model, plain = model_of(config), model_of(without)
    assert torch.equal(*(torch.cat([value.flatten() for value in made.network.state_dict().values()]) for made in (model, plain)))
    found = [made.validate(batch_of(config), context()) for made in (model, plain)]
    model.sample(SampleNoise(1, "test", [(0,)], CPU), Given({"seg": batch_of(config).channels["seg"][:1]}), config.sampling({"steps": 1}))
    assert set(found[0].scalars) == {"loss"} and torch.equal(found[0].scalars["loss"], found[1].scalars["loss"])
    assert "perceptual" not in vars(model), "neither validation nor sampling read the weights"
    for made in (model, plain):
        made.step(batch_of(config), context())
    assert not all(torch.equal(one, other) for one, other in zip(model.network.parameters(), plain.network.parameters(), strict=True))
    for one, other in zip(model.modules().values(), plain.modules().values(), strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
    optimised = [parameter for group in model.optimizer.param_groups for parameter in group["params"]]
    assert len(optimised) == len(list(model.network.parameters()))
    assert model.perceptual is not None and not any(parameter.requires_grad for parameter in model.perceptual._network.parameters())
    again = model_of(config)
    again.step(batch_of(config), context())
    assert again.perceptual is not None and again.perceptual._network is model.perceptual._network, "read once in a process"
    assert any("perceptual loss: 10 times the distance by LPIPS 0.1 of alex, at times with a signal-to-noise ratio of 1 or more" in line for line in model.describe(20))


# --- what is refused --------------------------------------------------------------------------------------------------


class SaysNothing(Strategy):
    """A strategy that was written before there were losses on images."""

    def times(self, uniform: Tensor) -> Tensor:
        return uniform

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return clean + noise, noise

    def network_time(self, times: Tensor) -> Tensor:
        return times

    def time_fraction(self, times: Tensor) -> Tensor:
        return times

    def sample(self, predict: Any, noise: Any, shape: tuple[int, ...], settings: Any) -> Tensor:
        raise NotImplementedError


class OtherPath(RFlow):
    """Another way to noise, and the clean image of the old one."""

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        share = times.view(-1, 1, 1, 1).square()
        return (1 - share) * clean + share * noise, clean - noise


class Breaks(RFlow):
    def clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        raise KeyError("sigma")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "seg"}, "perceptual: mode seg makes masks, and the networks know images; remove it"),
        ({"strategy": "test_perceptual:SaysNothing"}, "perceptual: SaysNothing does not define clean and snr, from which the loss is computed; define it, or remove perceptual"),
        ({"strategy": "test_perceptual:OtherPath"}, "OtherPath.clean is off by 0.35 when it is given the very target of its own noised; mend it"),
        ({"strategy": "test_perceptual:Breaks"}, "Breaks fails when its clean is tried: KeyError: 'sigma'"),
        ({"perceptual": {"net": "resnet"}}, "net: which network; write one of radimagenet, alex, vgg, squeeze"),
        ({"perceptual": {"weight": 0.01}}, "net: which network"),
        ({"perceptual": {"net": "alex", "weight": 0}}, "greater than 0"),
        ({"perceptual": {"net": "alex", "snr_at_least": 1000}}, "less than or equal to 100"),
        ({"perceptual": {"net": "alex", "layers": 3}}, "layers"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"strategy": "rflow", "mode": "bravo", **TINY, "perceptual": "alex", **changes})


def test_a_strategy_of_ones_own_that_says_its_clean_image_is_taken(files: Callable[[str], dict[str, str]]) -> None:
    assert config_of(files("alex"), strategy="medgen.models.diffusion.strategies:RFlow").perceptual is not None


def test_changed_and_wrong_files_are_refused_by_the_job_too(tmp_path: Path) -> None:
    file = backbone("squeeze", tmp_path)
    config = config_of({"net": "squeeze", "file": str(file), "sha256": "0" * 64})
    with pytest.raises(InputError, match=f"perceptual: {file} has the sha256 {sha256_file(file)}, expected 0000"):
        model_of(config).step(batch_of(config), context())
    made_weights.saved(file, {"features.12.expand3x3.weight": torch.zeros(1)})
    config = config_of({"net": "squeeze", "file": str(file), "sha256": sha256_file(file)})
    with pytest.raises(InputError, match=r"perceptual: \S+ does not hold the weights of torchvision's squeezenet: there is no features.0.weight"):
        model_of(config).step(batch_of(config), context())


# --- through the command line -----------------------------------------------------------------------------------------


def one_stage(settings: Any, size: int = SIZE) -> dict[str, Any]:
    written = copy.deepcopy(tiny_spec())
    written["data"]["size"] = size
    written["stages"] = {"train": {"kind": "train", "config": {**TINY_NET, "strategy": "rflow", "mode": "bravo", "perceptual": settings}, "resources": {"cpus": 1}}}
    return written


def test_submit_tells_what_is_missing_wrong_or_changed(medgen: Callable[..., Any], environment: dict[str, str], write_spec: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    def told(settings: Any, size: int = SIZE) -> str:
        return " ".join(medgen("submit", write_spec(one_stage(settings, size)), "--local", expect=2).stderr.split())

    found = told("alex")
    assert "stages.train.config.perceptual: alexnet needs its weights, and there is no folder for weights: `export MEDGEN_WEIGHTS=<a folder that jobs can read>`" in found
    assert "from https://download.pytorch.org/models/alexnet-owt-7be5be79.pth; or write file: <path>; or remove perceptual: the mean squared error alone needs no weights" in found
    environment["MEDGEN_WEIGHTS"] = str(tmp_path)
    found = told("radimagenet")
    assert f"stages.train.config.perceptual: {tmp_path}/ResNet50.pt: No such file or directory; weights are never downloaded (docs/weights.md): put there ResNet50.pt from RadImageNet_pytorch/ResNet50.pt in https://drive.google.com/" in found
    assert "then `medgen weights add` records it; or remove perceptual" in found
    made_weights.saved(tmp_path / "ResNet50.pt", {"layer4.2.conv3.weight": torch.zeros(3)})
    assert f"stages.train.config.perceptual: {tmp_path}/ResNet50.pt does not hold the weights of radimagenet: there is no backbone.7.2.conv3.weight in it. Fetch ResNet50.pt from" in told("radimagenet")
    made_weights.saved(tmp_path / "alexnet-owt-7be5be79.pth", {"features.10.weight": torch.zeros(3)})
    assert "expected 7be5be79...; copy the file again, or write its own sha256: beside file:; published as alexnet-owt-7be5be79.pth from https://download" in told("alex")
    (tmp_path / "ResNet50.pt").write_bytes(made_weights.saved(tmp_path / "other.pt", {"backbone.7.2.conv3.weight": torch.zeros(3)}).read_bytes())
    (tmp_path / "ResNet50.pt.json").write_text(json.dumps({"sha256": "1" * 64, "size_bytes": 1}))
    assert f"and was recorded with {'1' * 64} (ResNet50.pt.json); copy it again, or `medgen weights add` the new one" in told("radimagenet")
    assert "perceptual: radimagenet needs images of at least 32 px, data.size is 16; write net: vgg" in told("radimagenet", size=16)
    assert not (tmp_path / "runs").exists()


def test_a_training_from_the_spec_to_its_log(medgen: Callable[..., Any], files: Callable[[str], dict[str, str]], write_spec: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    given = files("squeeze")
    medgen("submit", write_spec(one_stage(given)), "--local")
    run = next((tmp_path / "runs").iterdir())
    kept = json.loads((run / "plan.json").read_text())["stages"][0]["settings"]["config"]["perceptual"]
    assert kept == {**given, "weight": 0.001, "snr_at_least": 1.0}
    lines = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    steps, validated = [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]
    assert steps and validated and not any("val_perceptual" in line for line in validated)
    assert any(line["perceptual"] > 0 for line in steps)
    for line in steps:
        assert line["loss"] == pytest.approx(line["mse"] + 0.001 * line["perceptual"], rel=1e-5)


def test_other_weights_are_another_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_spec: Callable[[dict[str, Any]], Path]) -> None:
    monkeypatch.setenv("MEDGEN_WEIGHTS", str(tmp_path))
    file, runs = tmp_path / "ResNet50.pt", []
    for number in range(2):
        made_weights.saved(file, {"backbone.7.2.conv3.weight": torch.full((3,), float(number))})
        found = spec.load(write_spec(one_stage("radimagenet")))
        assert spec.family_config(found.stages["train"].config).perceptual.sha256 == sha256_file(file)
        runs.append(planning.run_id_of(found))
    assert runs[0] != runs[1]
    monkeypatch.delenv("MEDGEN_WEIGHTS")
    file.unlink()
    assert spec.family_config(found.stages["train"].config).perceptual.net == perceptual.RADIMAGENET, "the resolved form reads back where the weights are not"
