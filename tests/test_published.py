"""What the published PACGAN leaves becomes medgen's: config.json a spec that submits, weights a checkpoint that computes the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pacgan_run import write_side
from test_structure import HEAVY
from torch import Tensor, nn
from torch.nn import functional

from medgen import checkpoint, spec
from medgen.data.image_files import read_slice
from medgen.errors import InputError
from medgen.importing import run_import
from medgen.models.base import SampleNoise
from medgen.models.pacgan.networks import Critic, Generator
from medgen.published.expressions import ExpressionError, evaluate

Medgen = Callable[..., subprocess.CompletedProcess[str]]
# every option of its README, with the defaults that stand there
DEFAULT: dict[str, Any] = json.loads((REPOSITORY / "tests" / "imported" / "config.json").read_text())
SMALL = {"FACTORS": [1, 1, "1/2"], "BATCH_SIZES": "[4]*3", "CRITIC_ITERATIONS": "[1]*len(FACTORS)", "IN_CHANNELS": 8, "Z_DIM": 6}


def write_config(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({key: value for key, value in {**DEFAULT, **changes}.items() if value is not None}))
    return path


def imported(tmp_path: Path, **changes: Any) -> tuple[spec.Spec, str]:
    """The spec that the defaults with some changes become, and what was said of it."""
    out = tmp_path / "spec.yaml"
    out.unlink(missing_ok=True)
    told = run_import([write_config(tmp_path, **changes)], out, False, None)
    return spec.load(out), told


# ----- expressions


OPTIONS = {"FACTORS": [1, 1, 0.5], "LAMBDA_CLS1": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/2", 0.5), ("[100]*7", [100] * 7), ("3*[1] + [2]", [1, 1, 1, 2]), ("LAMBDA_CLS1/2", 2.0), ("[10]*len(FACTORS)", [10] * 3), ("-(2 - 5)*2", 6), ("1, 2", [1, 2]),
        ("True", True), ("1e-3", 0.001), (" 7 ", 7),
    ],
)  # fmt: skip
def test_what_python_would_make_of_it(text: str, value: Any) -> None:
    assert evaluate(text, OPTIONS.__getitem__) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "open('x')", "FACTORS.append(1)", "[x for x in FACTORS]", "lambda: 1", "'a'*3", "9**9", "[0]*10**9", "[1]*101", "FACTORS*FACTORS", "len(3)",
        "len(FACTORS, 1)", "1/0", "1 if True else 2", "FACTORS[0]", "f'{1}'", "1 +", "", "(" * 300, "1" * 400, "1e999", "x := 3", "1; 2", "[1]*-1", "[1]*1.5", "-[1]", "True + 1", "None",
    ],
)  # fmt: skip
def test_nothing_else_is_worked_out(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(text, OPTIONS.__getitem__)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["1", "0", "2.5", "[", "]", "(", ")", ",", "+", "-", "*", "/", "len(", "FACTORS", "LAMBDA_CLS1", " ", "True", "e9", "'a'", ".", "None"]), max_size=14).map("".join) | st.text(max_size=20))
def test_any_text_is_worked_out_or_refused(text: str) -> None:
    with contextlib.suppress(ExpressionError, KeyError):
        evaluate(text, OPTIONS.__getitem__)


# ----- config.json


def test_the_published_defaults_become_a_spec_that_submits(tmp_path: Path, medgen: Medgen) -> None:
    told = medgen("import", write_config(tmp_path)).stdout
    assert "jobs/pacgan_ADNI.yaml: 29 of 29 options; train (4 to 256 px), 200 images, evaluate, report" in told
    assert "check PROGRESSIVE_EPOCHS: 100*len(FACTORS) is read as 100 at each of the 7 sizes" in told
    medgen("submit", "jobs/pacgan_ADNI.yaml", "--local", "--dry-run")
    made = spec.load(tmp_path / "jobs" / "pacgan_ADNI.yaml")
    train = made.stages["train"].config  # type: ignore[union-attr]
    published = spec.document.load(REPOSITORY / "configs" / "pacgan" / "pacgan_256.yaml").data
    assert {key: train[key] for key in published} == published
    assert (train["std_group"], train["betas"], train["drift"], train["select"], train["loop"]["precision"]) == (None, [0.5, 0.999], 0.001, True, "fp32")
    assert made.data is not None and made.data.root is not None
    assert (made.data.root.name, made.data.size, made.data.splits.model_dump()) == ("ADNI", 256, {"train": 0.8, "val": 0.2, "test": 0})
    assert made.stages["images"].per_class == [100, 100]  # type: ignore[union-attr]
    again = medgen("import", "config.json", expect=2).stderr
    assert "jobs/pacgan_ADNI.yaml: exists and is not overwritten" in again


def test_every_option_is_named_in_the_spec(tmp_path: Path) -> None:
    for changes in ({}, {"VALIDATE": False, "GENERATE": False, "LOAD_MODEL": True}):
        imported(tmp_path, **changes)
        text = (tmp_path / "spec.yaml").read_text()
        assert [name for name in DEFAULT if name not in text] == []


def test_a_configuration_is_read_without_anything_heavy(tmp_path: Path, environment: dict[str, str]) -> None:
    code = f"import sys; from pathlib import Path; from medgen.importing import run_import; run_import([Path('config.json')], None, False, None); print([name for name in {HEAVY!r} if name in sys.modules])"
    write_config(tmp_path)
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("modes", "stages", "selects", "shares"),
    [
        ({"VALIDATE": False, "TESTING": True}, ["train", "final"], True, (0.8, 0.2)), ({"VALIDATE": True}, ["train"], True, (0.8, 0.2)),
        ({"VALIDATE": "True", "TESTING": "True"}, ["train"], True, (0.8, 0.2)),
        ({"VALIDATE": False, "TESTING": True, "TEST_USING_BEST_MODEL": False}, ["train"], False, (1, 0)), ({"VALIDATE": False}, ["train"], False, (1, 0)),
    ],
)  # fmt: skip
def test_modes(tmp_path: Path, modes: dict[str, Any], stages: list[str], selects: bool, shares: tuple[float, float]) -> None:
    made, _ = imported(tmp_path, **modes, GENERATE=False)
    assert list(made.stages) == [*stages, "report"]
    assert made.stages["train"].config["select"] is selects  # type: ignore[union-attr]
    assert made.data is not None and (made.data.splits.train, made.data.splits.val) == shares
    if "final" in stages:
        made, told = imported(tmp_path, **modes)
        assert "medgen classify pacgan_ADNI data/ADNI/ADNI_test --stage final" in told
        assert made.stages["final"].repeat == "train" and made.stages["images"].source == "final"  # type: ignore[union-attr]


def test_going_on_from_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made, told = imported(tmp_path, LOAD_MODEL="True", START_TRAIN_AT_IMG_SIZE=64)
    config = made.stages["train"].config  # type: ignore[union-attr]
    assert config["epochs"] == [0, 0, 0, 0, 100, 100, 100]
    assert config["start_from"] == str(tmp_path / "weights" / "pacgan_32px" / "step-000000")
    assert "medgen import generator_best.pt discriminator_best.pt --size 32 --out weights/pacgan_32px" in told
    made, told = imported(tmp_path, START_TRAIN_AT_IMG_SIZE=64)
    assert made.stages["train"].config["start_from"] is None and "START_TRAIN_AT_IMG_SIZE: counts only with LOAD_MODEL" in told  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("counts", "classes", "per_class"), [("[1000]", 2, [500, 500]), (5, 2, [2, 3]), ([200, 800], 2, [200, 800]), ("[10]", 3, [3, 3, 4]), ([1, 2, 3], 3, [1, 2, 3])]
)
def test_images_per_class(tmp_path: Path, counts: Any, classes: int, per_class: list[int]) -> None:
    made, _ = imported(tmp_path, N_IMAGES_GENERATED=counts, CLASS_SIZE=classes)
    assert made.stages["images"].per_class == per_class  # type: ignore[union-attr]


def test_what_has_no_place_is_told(tmp_path: Path) -> None:
    made, told = imported(tmp_path, LAMDA_GP=5, LAMBDA_GP=None, NOISE="a", IN_CHANNELS=100, GPUS_N=[0, 1, 2], IMAGE_CHANNELS=3, START_CHECK_AT=60)
    train = made.stages["train"]
    assert "check LAMDA_GP: no option of the published system (5); did you mean LAMBDA_GP?" in told
    assert "check NOISE: no option of the published system (a); nothing stands for it in the spec" in told
    assert "check LAMBDA_GP: not given; taken is 10" in told and train.config["penalty"] == 10  # type: ignore[union-attr]
    assert "check GPUS_N: 3 GPUs cannot share batches" in told and train.resources.gpus == 1
    assert train.config["factors"][4] == 0.12, "as the published system cuts 12.5 channels"  # type: ignore[union-attr]
    assert train.config["channels"] == ["red", "green", "blue"] and train.config["select_from"] == 0.6  # type: ignore[union-attr]
    assert "LAMDA_GP" in (tmp_path / "spec.yaml").read_text()
    two, _ = imported(tmp_path, GPUS_N="[0, 1]")
    assert [two.stages[name].resources.gpus for name in ("train", "images")] == [2, 1], "an image stage has one GPU"
    cpu, _ = imported(tmp_path, DEVICE="cpu")
    assert [cpu.stages[name].resources.gpus for name in ("train", "images")] == [None, None]


@pytest.mark.parametrize(
    ("folders", "root", "commands"),
    [
        ({}, "data/ADNI", []), ({"DATA_TEST_DIRECTORY": None, "LABEL_TEST_DIRECTORY": None}, "data/ADNI/ADNI_train", []),
        ({"DATA_TRAIN_DIRECTORY": "..\\data\\ADNI_train", "LABEL_TRAIN_DIRECTORY": "..\\data\\ADNI_train\\labels.csv", "DATA_TEST_DIRECTORY": "../data/ADNI_test", "LABEL_TEST_DIRECTORY": None}, "../data", []),
        ({"DATA_TEST_DIRECTORY": "other/ADNI_test", "LABEL_TEST_DIRECTORY": None}, "data/ADNI_linked", ["ln -sr data/ADNI/ADNI_train data/ADNI_linked/train", "ln -sr other/ADNI_test data/ADNI_linked/test"]),
        ({"LABEL_TRAIN_DIRECTORY": "my labels.csv"}, "data/ADNI_linked", ["ln -sr data/ADNI/ADNI_train/Real*.nii* data/ADNI_linked/train/", "ln -sr 'my labels.csv' data/ADNI_linked/train/labels.csv"]),
    ],
)  # fmt: skip
def test_folders_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Any], root: str, commands: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    made, told = imported(tmp_path, **folders)
    assert made.data is not None and made.data.root == Path(root).absolute()
    assert [line.strip() for line in commands if line not in told] == []


def test_the_commands_for_links_make_what_is_read(tmp_path: Path, medgen: Medgen) -> None:
    write_side(tmp_path / "data" / "adni" / "adni_train", range(24))
    write_side(tmp_path / "data" / "adni" / "adni test", range(24, 32))
    labels = tmp_path / "all labels.csv"
    (tmp_path / "data" / "adni" / "adni_train" / "labels.csv").rename(labels)
    config = write_config(tmp_path, **SMALL, DATA_TRAIN_DIRECTORY="data/adni/adni_train", LABEL_TRAIN_DIRECTORY=labels.name,
                          DATA_TEST_DIRECTORY="data/adni/adni test", LABEL_TEST_DIRECTORY="data/adni/adni test/labels.csv", DEVICE="cpu")  # fmt: skip
    told = medgen("import", config).stdout
    for line in told.splitlines():
        if line.strip().startswith(("mkdir", "ln")):
            subprocess.run(["bash", "-ec", line], cwd=tmp_path, check=True)
    shown = medgen("data", "jobs/pacgan_adni.yaml").stdout
    assert "8" in shown and "test" in shown, shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"FACTORS": "[1, open('x')]"}, "PROGRESSIVE_EPOCHS: goes by FACTORS, which cannot be read"), ({"PROGRESSIVE_EPOCHS": "list(range(7))"}, "PROGRESSIVE_EPOCHS: list(range(7)) is not worked out; allowed are numbers"),
        ({"BATCH_SIZES": "[32, 32]"}, "BATCH_SIZES: has 2 entries, FACTORS has 7; write one per size, from 4 to 256 px"),
        ({"LEARNING_RATE": "fast"}, "LEARNING_RATE: fast is neither a number nor an option"), ({"Z_DIM": "1/2"}, "Z_DIM: 0.5 is not a whole number"),
        ({"LAMBDA_CLS1": "LAMBDA_CLS2*2"}, "it needs itself: LAMBDA_CLS1 -> LAMBDA_CLS2 -> LAMBDA_CLS1"), ({"CRITIC_ITERATIONS": 2}, "CRITIC_ITERATIONS: 2 is one value for 7 sizes"),
        ({"N_IMAGES_GENERATED": [1, 2, 3]}, "N_IMAGES_GENERATED: counts 3 classes, CLASS_SIZE is 2"), ({"IMAGE_CHANNELS": 2}, "IMAGE_CHANNELS: 2 channels; allowed are 1 (grey) and 3"),
        ({"DATA_TRAIN_DIRECTORY": None}, "DATA_TRAIN_DIRECTORY: not given"), ({"DEVICE": "tpu"}, "DEVICE: tpu names neither cuda nor cpu"), ({"VALIDATE": 3}, "VALIDATE: 3 is neither true nor false"),
        ({"START_TRAIN_AT_IMG_SIZE": 100}, "START_TRAIN_AT_IMG_SIZE: 100 px is none of the sizes"), ({"LAMBDA_GP": float("nan")}, "LAMBDA_GP: the number is larger"),
        ({"LEARNING_RATE": -1}, "medgen does not take what it says"), ({"DATA_TRAIN_DIRECTORY": 3}, "DATA_TRAIN_DIRECTORY: 3 is not a text"), ({"Z_DIM": {"a": 1}, "a": 2}, "a stands twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_its_option(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refused:
        imported(tmp_path, **changes)
    assert words in str(refused.value) and "config.json" in str(refused.value)
    assert not (tmp_path / "spec.yaml").exists()


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[1]", "expected an object"), ('{"a": 1}', "none of the published system's options"), ('{"Z_DIM": 1, "Z_DIM": 2}', "Z_DIM stands twice"), ("\xff", "")])
def test_files_that_are_no_configuration(tmp_path: Path, medgen: Medgen, text: str, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    assert words in medgen("import", path, expect=2).stderr


# ----- weights: the published networks, written down from their description alone


class Scaled(nn.Module):
    """An equalised convolution whose bias stands outside."""

    def __init__(self, inputs: int, outputs: int, kernel: int, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.gain = math.sqrt(2 / (kernel**2 * inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * self.gain) + self.bias.view(1, -1, 1, 1)


class PixelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(dim=1, keepdim=True) + 1e-8)


class TwoConvs(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: bool):
        super().__init__()
        self.conv1, self.conv2 = Scaled(inputs, outputs, 3, 1), Scaled(outputs, outputs, 3, 1)
        self.after = PixelNorm() if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2):
            x = self.after(functional.leaky_relu(layer(x), 0.2))
        return x


class PublishedGenerator(nn.Module):
    def __init__(self, z: int, table: int, classes: int, colours: int, widths: list[int]):
        super().__init__()
        self.embed = nn.Embedding(classes, table)
        self.initial_block = nn.Sequential(PixelNorm(), nn.ConvTranspose2d(z + table, widths[0], 4), nn.LeakyReLU(0.2), Scaled(widths[0], widths[0], 3, 1), nn.LeakyReLU(0.2), PixelNorm())
        self.initial_layer = Scaled(widths[0], colours, 1)
        self.last_layer = nn.ModuleList([self.initial_layer, *(Scaled(width, colours, 1) for width in widths[1:])])
        self.prog_blocks = nn.ModuleList(TwoConvs(a, b, True) for a, b in itertools.pairwise(widths))

    def forward(self, z: Tensor, labels: Tensor, step: int, alpha: float) -> Tensor:
        x = self.initial_block(torch.cat([z, self.embed(labels)], dim=1)[:, :, None, None])
        if step == 0:
            return torch.tanh(self.initial_layer(x))
        for block in self.prog_blocks[:step]:
            large = functional.interpolate(x, scale_factor=2, mode="nearest")
            x = block(large)
        return torch.tanh(alpha * self.last_layer[step](x) + (1 - alpha) * self.last_layer[step - 1](large))


class PublishedCritic(nn.Module):
    def __init__(self, classes: int, colours: int, widths: list[int]):
        super().__init__()
        down = list(reversed(widths))
        self.from_img4 = Scaled(colours, widths[0], 1)
        self.from_img = nn.ModuleList([*(Scaled(colours, width, 1) for width in down[:-1]), self.from_img4])
        self.prog_blocks = nn.ModuleList(TwoConvs(a, b, False) for a, b in itertools.pairwise(down))
        self.final_block = nn.Sequential(Scaled(widths[0] + 1, widths[0], 3, 1), nn.LeakyReLU(0.2), Scaled(widths[0], widths[0], 4), nn.LeakyReLU(0.2))
        self.adv_layer, self.aux_FC1, self.aux_layer = Scaled(widths[0], 1, 1), Scaled(widths[0], 150, 1), Scaled(150, classes, 1)

    def forward(self, x: Tensor, step: int, alpha: float) -> tuple[Tensor, Tensor]:
        place = len(self.prog_blocks) - step
        seen = functional.leaky_relu(self.from_img[place](x), 0.2)
        for block in self.prog_blocks[place:]:
            seen = functional.avg_pool2d(block(seen), 2)
            if block is self.prog_blocks[place]:
                seen = alpha * seen + (1 - alpha) * functional.leaky_relu(self.from_img[place + 1](functional.avg_pool2d(x, 2)), 0.2)
        spread = torch.std(seen, dim=0).mean().repeat(len(x), 1, 4, 4)
        end = self.final_block(torch.cat([seen, spread], dim=1))
        return self.adv_layer(end).view(len(x), -1), self.aux_layer(self.aux_FC1(end)).view(len(x), -1)


WIDTHS = [8, 8, 4]
Pair = tuple[nn.Module, nn.Module]


def published(classes: int = 2, colours: int = 1, trained: int = 2) -> Pair:
    """Both networks after some training: `trained` doublings of 4 px; what is above has not been touched."""
    torch.manual_seed(5)
    pair = PublishedGenerator(6, 3, classes, colours, WIDTHS), PublishedCritic(classes, colours, WIDTHS)
    for network in pair:
        for name, parameter in network.named_parameters():
            untouched = isinstance(network, PublishedGenerator) and any(name.startswith(f"prog_blocks.{level}.") for level in range(trained, 2))
            parameter.data = torch.zeros_like(parameter) if untouched and name.endswith("bias") else torch.randn_like(parameter)
    return pair


def write_pair(folder: Path, pair: Pair, prefix: str = "", bare: bool = False) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "generator_best.pt", folder / "discriminator_best.pt"]
    for path, network in zip(paths, pair, strict=True):
        state = {prefix + key: value for key, value in network.state_dict().items()}
        optimizer = torch.optim.Adam(network.parameters()).state_dict()
        torch.save(state if bare else {"epoch": 87, "model_state_dict": state, "optimizer_state_dict": optimizer}, path)
    return paths


def opened(folder: Path, classes: int = 2, colours: int = 1) -> tuple[Generator, Critic, dict[str, Any]]:
    """medgen's networks with the weights of a checkpoint that verifies, comparing whole batches as published."""
    found = checkpoint.select(folder, "last", print)
    generator, critic = Generator(6, 3, classes, colours, WIDTHS), Critic(classes, colours, WIDTHS, std_group=None)
    generator.load_state_dict(found.tensors("modules.generator"))
    critic.load_state_dict(found.tensors("modules.critic"))
    return generator, critic, found.state() | {"grown": found.tensors("modules.grown")}


@pytest.mark.parametrize(("classes", "colours", "prefix", "bare"), [(2, 1, "", False), (3, 3, "module.", True)])
def test_converted_networks_compute_the_same(tmp_path: Path, classes: int, colours: int, prefix: str, bare: bool) -> None:
    theirs = published(classes, colours)
    paths = write_pair(tmp_path, theirs, prefix, bare)
    run_import(paths[::-1] if bare else paths, tmp_path / "out", False, None)
    generator, critic, _ = opened(tmp_path / "out", classes, colours)
    latent, labels = torch.randn(6, 6), torch.arange(6) % classes
    for step, alpha in itertools.product(range(3), (1e-5, 0.3, 0.75, 1.0)):
        made, wanted = generator(latent, labels, step, alpha), theirs[0](latent, labels, step, alpha)
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
        images = torch.rand(6, colours, 4 * 2**step, 4 * 2**step) * 2 - 1
        judged, (scores, logits) = critic(images, step, alpha), theirs[1](images, step, alpha)
        torch.testing.assert_close(judged.scores[:, None], scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(judged.logits, logits, rtol=1e-4, atol=1e-5)


def test_what_a_checkpoint_of_weights_says(tmp_path: Path, medgen: Medgen) -> None:
    paths = write_pair(tmp_path / "PACGAN_16x16", published())
    told = medgen("import", *paths, write_config(tmp_path, **SMALL, LAMBDA_CLS1=5), "--out", "weights").stdout
    assert "weights/step-000000: generator" in told and "from generator_best.pt (epoch 87) and discriminator_best.pt (epoch 87)" in told
    assert "grown to 16 px: the folder PACGAN_16x16 says so" in told and "typical difference" in told
    assert "to go on, in a train stage: config: {model: pacgan, start_from: weights/step-000000, in_channels: 8, factors: [1.0, 1.0, 0.5], latent: 6}" in told
    _, critic, state = opened(tmp_path / "weights")
    assert (int(state["grown"]["level"]), float(state["grown"]["alpha"])) == (2, 1.0)
    assert state["config"]["model"] == "pacgan" and (state["size"], state["classes"]) == (16, ["0", "1"])
    assert (state["config"]["aimed_class"], state["config"]["other_class"], state["config"]["latent"], state["config"]["factors"]) == (5, 2.5, 6, [1, 1, 0.5])
    assert float(critic.typical_difference) > 0
    assert "exists and is not overwritten" in medgen("import", *paths, "--out", "weights", expect=2).stderr


def test_training_and_images_from_published_weights(tmp_path: Path, medgen: Medgen) -> None:
    """The way of the page: convert, go on where the published system stopped, and images of the weights as they are."""
    write_side(tmp_path / "adni_train", range(12))
    write_side(tmp_path / "adni_test", range(12, 16))
    theirs = published()
    config = write_config(tmp_path, **SMALL, DATA_TRAIN_DIRECTORY=str(tmp_path / "adni_train"))
    for size in (8, 16):
        told = run_import([*write_pair(tmp_path / f"PACGAN_{size}x{size}", theirs), config], tmp_path / "weights" / f"pacgan_{size}px", False, None)
        assert "classes CN, AD, grey images" in told, "as the folder names them"
    folders = {f"{kind}_{side.upper()}_DIRECTORY": f"adni_{side}" for kind in ("DATA", "LABEL") for side in ("train", "test")}
    modes = {"VALIDATE": False, "LOAD_MODEL": True, "START_TRAIN_AT_IMG_SIZE": 16, "GENERATE": False, "DEVICE": "cpu"}
    medgen("import", write_config(tmp_path, **SMALL, **folders, **modes, PROGRESSIVE_EPOCHS=[1, 1, 1]), "--out", "go_on.yaml")
    medgen("submit", "go_on.yaml", "--local")
    (run,) = (tmp_path / "runs").glob("pacgan_adni-*")
    state = checkpoint.select(run / "train" / "ckpt", "last", print).state()
    assert state["clock"]["phase"] == 2 and state["epochs"] == {"4px": 0, "8px": 0, "16px": 1}

    record = spec.document.load(tmp_path / "go_on.yaml").data
    record["stages"]["train"]["config"] |= {"epochs": 0, "start_from": "weights/pacgan_16px/step-000000"}
    record["stages"] = {"train": record["stages"]["train"], "images": {"kind": "generate", "from": "train", "per_class": [1, 2]}}
    (tmp_path / "as_they_are.yaml").write_text(json.dumps({**record, "name": "as_they_are"}))
    medgen("submit", "as_they_are.yaml", "--local")
    (run,) = (tmp_path / "runs").glob("as_they_are-*")
    latent = SampleNoise(42, "images", [(number, 0) for number in range(3)], torch.device("cpu")).normal((6,))
    wanted = (theirs[0](latent, torch.tensor([0, 1, 1]), 2, 1.0) + 1) / 2
    for number, path in enumerate(sorted((run / "images" / "dataset" / "images").rglob("*.nii.gz"))):
        torch.testing.assert_close(torch.tensor(read_slice(path).array).squeeze(), wanted[number, 0].detach(), rtol=0, atol=1e-4)
    assert "8 images of adni_test/Real16x16.nii.gz" in medgen("classify", "weights/pacgan_16px/step-000000", "adni_test").stdout


def test_the_size_that_weights_were_trained_to(tmp_path: Path) -> None:
    paths = write_pair(tmp_path, published(trained=1))
    assert "grown to 8 px: the largest size that was trained" in run_import(paths, tmp_path / "a", False, None)
    assert "the layers of 16 px look untrained" in run_import(paths, tmp_path / "b", False, 16)
    assert "training went on to 8 px" in run_import(paths, tmp_path / "c", False, 4)
    with pytest.raises(InputError, match="--size 32: these networks have 4, 8, 16 px"):
        run_import(paths, tmp_path / "d", False, 32)


def _changed(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    stored = torch.load(path, weights_only=True)
    state = {key: value.clone() for key, value in stored["model_state_dict"].items()}  # a layer of two names is one tensor in the file
    change(state)
    torch.save({**stored, "model_state_dict": state}, path)


@pytest.mark.parametrize(
    ("which", "change", "words"),
    [
        (0, lambda state: state["initial_layer.bias"].add_(1), "initial_layer.bias and last_layer.0.bias are one layer and must be equal"),
        (1, lambda state: state["from_img4.conv.weight"].add_(1), "from_img4.conv.weight and from_img.2.conv.weight are one layer"),
        (0, lambda state: state.pop("prog_blocks.1.conv2.bias"), "missing: prog_blocks.1.conv2.bias"),
        (1, lambda state: state.update(extra=torch.zeros(3)), "not of the published system: extra"),
        (1, lambda state: state.update({"aux_layer.conv.weight": torch.zeros(3, 150, 1, 1), "aux_layer.bias": torch.zeros(3)}), "knows 2 classes, "),
        (1, lambda state: state.update({"aux_FC1.conv.weight": torch.zeros(100, 8, 1, 1)}), "aux_FC1 has 100 units"),
        (0, lambda state: state["last_layer.1.bias"].fill_(math.nan), "last_layer.1.bias is no tensor of finite"),
        (0, lambda state: state.update({"prog_blocks.0.conv1.conv.weight": torch.zeros(8, 8, 5, 5)}), "prog_blocks.0.conv1.conv.weight has shape [8, 8, 5, 5]; with the other layers it would be [8, 8, 3, 3]"),
        (1, lambda state: state.update({"from_img.0.conv.weight": torch.zeros(2, 1, 1, 1)}), "they are not of one training"),
        (0, lambda state: state.pop("embed.weight"), "expected one table of the classes' numbers"),
    ],
)  # fmt: skip
def test_weights_that_are_not_whole_are_refused(tmp_path: Path, which: int, change: Callable[[dict[str, Tensor]], None], words: str) -> None:
    paths = write_pair(tmp_path, published())
    _changed(paths[which], change)
    with pytest.raises(InputError) as refused:
        run_import(paths, tmp_path / "out", False, None)
    assert words in str(refused.value) and paths[which].name in str(refused.value)
    assert not (tmp_path / "out").exists()


class Harmful:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_files_that_are_no_weights(tmp_path: Path, medgen: Medgen) -> None:
    generator, critic = write_pair(tmp_path, published())

    def refused(*paths: Path, portable: bool = False) -> str:
        with pytest.raises(InputError) as error:
            run_import(paths, tmp_path / "out", portable, None)
        return str(error.value)

    assert "generators; give one generator_best.pt and the discriminator_best.pt" in medgen("import", generator, generator, expect=2).stderr
    assert "1 file of weights; give one generator_best.pt" in refused(generator)
    assert "Z_DIM: 7 there, 6 in the weights" in refused(generator, critic, write_config(tmp_path, **{**SMALL, "Z_DIM": 7}))
    bad = tmp_path / "bad.pt"
    bad.write_bytes(critic.read_bytes()[:-3000])
    assert "bad.pt: cannot be read as a file of torch" in medgen("import", generator, bad, expect=2).stderr
    harm = tmp_path / "harm_was_done"
    for content in (pickle.dumps(Harmful(harm)), pickle.dumps({"a": Harmful(harm)}, protocol=2)):
        bad.write_bytes(content)
        assert "bad.pt: it holds more than tensors and numbers" in medgen("import", generator, bad, expect=2).stderr
    torch.save({"model_state_dict": Harmful(harm)}, bad)
    assert "bad.pt: it holds more than tensors and numbers" in refused(generator, bad)
    assert not harm.exists()
    torch.save([1, 2], bad)
    assert "expected tensors by name" in refused(generator, bad)
    torch.save({"a": torch.zeros(2)}, bad)
    assert "neither a generator nor a critic of the published system" in refused(generator, bad)
    assert "imported apart" in refused(generator, critic, Path("train.slurm"))
    assert "--portable is about the directives" in refused(generator, critic, portable=True)
    assert "no such file" in refused(generator, Path("nowhere.pt"))
