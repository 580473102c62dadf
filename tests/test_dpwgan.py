"""DP-WGAN-GP: what the critic's update releases, what of it depends on whom, what it costs, what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from conftest import tiny_spec
from launch_stub import create_run
from test_models import assert_same, context, make, state_of, train, training_batch

from medgen import checkpoint, files, records
from medgen.dp.accounting import epsilon
from medgen.dp.card import from_record
from medgen.dp.mechanism import steps_of
from medgen.dp.priced import Priced
from medgen.errors import InputError, MedgenError
from medgen.models.base import DataShape, Lot
from medgen.models.dpwgan.config import Config
from medgen.models.dpwgan.model import REPRODUCIBLE, Model
from medgen.models.settings import EmaSettings, RecordSampling
from medgen.training import build_model

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[..., Path]
TINY = {"latent": 4, "features": 4, "steps": 8, "batch_size": 4, "critic_steps": 2}


def model_of(dp: Any, people: int = 100, **changes: Any) -> Model:
    config = Config.model_validate({**TINY, "dp": dp, **changes})
    model = build_model("dpwgan", config, DataShape(("image",), 16, records=people), 1, "test")
    assert isinstance(model, Model)
    return model


def lot_of(people: int, slices: int = 2, number: int = 0, seed: int = 1) -> Lot:
    images = torch.rand((people, slices, 1, 16, 16), generator=torch.Generator().manual_seed(number))
    return Lot({"image": images}, list(range(people)), 4, seed, "test", number)


def gradient_of(model: Model, lot: Lot) -> torch.Tensor:
    """What the critic's optimizer is given, flat: the release of one update."""
    seen: list[torch.Tensor] = []

    def keep(optimizer: Any, *_: Any) -> None:
        seen.append(torch.cat([parameter.grad.flatten() for group in optimizer.param_groups for parameter in group["params"]]))

    hook = model.players["critic"].register_step_pre_hook(keep)
    model._update_critic(lot, context())
    hook.remove()
    return seen[0]


def test_the_noise_is_what_the_accountant_is_told() -> None:
    """Also of an update that by chance has no records: it releases noise, and is counted."""
    model = model_of({"noise_multiplier": 1.5, "clip_norm": 2.0, "delta": 0.001}, features=32)
    releases = torch.stack([gradient_of(model, lot_of(0, number=number)) for number in range(3)])
    assert float(releases.std()) == pytest.approx(1.5 * 2.0 / 4, rel=0.01) and abs(float(releases.mean())) < 0.01
    assert (releases.corrcoef() - torch.eye(3)).abs().max() < 0.01, "no update has the noise of another"
    [spent] = model.ledger.history
    assert (spent.noise_multiplier, spent.sampling_rate, spent.steps) == (1.5, 0.04, 3)


def test_the_noise_of_every_update_is_that_of_its_place_in_the_course() -> None:
    """Also of a model that begins in the middle of it, as after a resumption."""
    dp = {"noise_multiplier": 1.5, "noise_decay": 0.5, "clip_norm": 2.0, "clip_decay": 0.25, "delta": 0.001}
    model = model_of(dp, features=32)
    for number in range(16):
        share = number // 2 / 7
        found = gradient_of(model, lot_of(0, number=number))
        assert float(found.std()) == pytest.approx(1.5 * 0.5**share * 2.0 * 0.25**share / 4, rel=0.02), number
    assert model.ledger.history == model.spending.history and len(model.ledger.history) == 8
    assert model.facts()["privacy"]["last_clip_norm"] == 0.5
    later = model_of(dp, features=32)
    gradient_of(later, lot_of(0, number=15))
    assert later.ledger.history == (replace(model.spending.history[-1], steps=1),)


def test_one_record_moves_a_release_by_no_more_than_the_clip_norm() -> None:
    whole = lot_of(5)
    for gone in range(5):
        kept = [number for number in range(5) if number != gone]
        part = replace(whole, channels={"image": whole.channels["image"][kept]}, positions=kept)
        moved = [gradient_of(model_of({"noise_multiplier": 0.0, "clip_norm": 0.005, "delta": 0.001}), lot) for lot in (whole, part)]
        assert float((moved[0] - moved[1]).norm()) == pytest.approx(0.005 / 4, rel=1e-4), "divided by the expected number, not by that of those drawn"


@pytest.mark.parametrize(("number", "longest"), [(0, 0.005), (15, 0.0005)])
def test_a_clip_norm_that_falls_is_that_of_the_update(number: int, longest: float) -> None:
    dp = {"noise_multiplier": 0.0, "clip_norm": 0.005, "clip_decay": 0.1, "delta": 0.001}
    assert float(gradient_of(model_of(dp), lot_of(1, number=number)).norm()) == pytest.approx(longest / 4, rel=1e-4)


def test_what_is_made_beside_a_record_does_not_depend_on_the_others() -> None:
    """Batch statistics of the generator would tell every fake how many records were drawn."""
    whole, model = lot_of(5), model_of({"noise_multiplier": 0.0, "delta": 0.001})
    train(model, model.config, range(0))
    alone = replace(whole, channels={"image": whole.channels["image"][3:4]}, positions=[3])
    assert torch.equal(whole.normal("latent", (2, 4))[3], alone.normal("latent", (2, 4))[0])
    assert torch.equal(whole.uniform("mix", 2)[3], alone.uniform("mix", 2)[0])
    assert not model.generator.training
    fakes = [model.generator(lot.normal("latent", (2, 4)).flatten(0, 1)) for lot in (whole, alone)]
    torch.testing.assert_close(fakes[0][6:8], fakes[1], rtol=0, atol=1e-6)
    before = {name: tensor.clone() for name, tensor in model.generator.state_dict().items()}
    model._update_critic(whole, context())
    assert_same(before, model.generator.state_dict())


def test_without_dp_it_is_the_same_training_as_without_noise_and_clipping() -> None:
    lots = [lot_of(4, number=number) for number in range(4)]
    states = []
    for dp in ("none", {"noise_multiplier": 0.0, "clip_norm": None, "delta": 0.001}):
        model = model_of(dp)
        for lot in lots:
            model._update_critic(lot, context())
        states.append({name: state for name, state in state_of(model).items() if "ledger" not in name})
    assert_same(*states)


def test_what_is_logged_of_real_images_is_logged_without_dp_alone() -> None:
    private = {"noise_multiplier": 0.0, "clip_norm": None, "delta": 0.001}  # the same updates, and no less private a log
    told = [model_of(dp)._update_critic(lot_of(4), context()) for dp in ("none", private)]
    assert set(told[1]) == {"critic_of_fakes"} and torch.equal(told[0]["critic_of_fakes"], told[1]["critic_of_fakes"])
    model, real = model_of("none"), lot_of(4).channels["image"].flatten(0, 1) * 2 - 1
    torch.testing.assert_close(told[0]["critic_real_score"], model.critic(real).mean().detach())
    assert told[0]["wasserstein"] == told[0]["critic_real_score"] - told[0]["critic_fake_score"] and told[0]["critic_penalty"] >= 0
    for dp in ("none", private):
        drawn = {name for curves in model_of(dp).config.curves for name in curves.lines}
        assert drawn == (set(told[0]) - {"critic_of_fakes"} if dp == "none" else {"critic_of_fakes"})


def test_a_resumed_training_has_spent_what_an_uninterrupted_one_has() -> None:
    config, whole = make("dpwgan", "patients")
    train(whole, config, range(6))
    _, first = make("dpwgan", "patients")
    train(first, config, range(2))
    _, second = make("dpwgan", "patients", seed=9)
    assert isinstance(first, Model) and isinstance(second, Model) and isinstance(whole, Model)
    for name, module in second.modules().items():
        module.load_state_dict(first.modules()[name].state_dict())
    train(second, config, range(2, 6))
    assert whole.ledger.history == second.ledger.history and whole.ledger.history[0].steps == 12
    assert epsilon(second.ledger.history, 0.01) == epsilon(whole.ledger.history, 0.01) > epsilon(first.ledger.history, 0.01) > 0


def test_other_weights_that_were_private_before_are_counted_too() -> None:
    first, second = model_of({"noise_multiplier": 2.0, "delta": 0.001}), model_of({"noise_multiplier": 1.0, "delta": 0.001})
    first._update_critic(lot_of(3), context())
    second.ledger.load_state_dict(first.ledger.state_dict())
    for number in range(2):
        second._update_critic(lot_of(3, number=number), context())
    assert [(spent.noise_multiplier, spent.steps) for spent in second.ledger.history] == [(2.0, 1), (1.0, 2)]


def gone_on(past: list[dict[str, Any]], dp: dict[str, Any], tmp_path: Path) -> Model:
    """A training that starts from weights with this past: so many releases of other trainings."""
    model = model_of({"delta": 0.001, **dp}, steps=2, start_from=str(tmp_path / "step-000010"))
    for one in past:
        before = model_of({"delta": 0.001, "noise_multiplier": 2.0, **one})
        before.ledger.load_state_dict(model.ledger.state_dict())
        before._update_critic(lot_of(3), context())
        model.ledger.load_state_dict(before.ledger.state_dict())
    return model


def test_what_weights_have_cost_before_is_part_of_the_budget(tmp_path: Path) -> None:
    fits = gone_on([{}], {"noise_multiplier": 2.0, "epsilon": 1.0}, tmp_path)
    fits.check_start()
    with pytest.raises(InputError, match=r"dp.epsilon: 0.5 is less than start_from has spent and this training will, 0\.\d+ together at delta 0.001"):
        gone_on([{}, {}], {"epsilon": 0.5}, tmp_path).check_start()
    with pytest.raises(InputError, match="start_from: it has spent its privacy on slices, this training protects patients"):
        gone_on([{"unit": "slice"}], {"noise_multiplier": 2.0}, tmp_path).check_start()
    limits = gone_on([{"noise": "reproducible"}, {}], {"noise_multiplier": 2.0}, tmp_path).facts()["privacy"]["not_covered"]
    assert REPRODUCIBLE in limits and REPRODUCIBLE not in fits.facts()["privacy"]["not_covered"]


def test_averages_begin_with_the_training_that_goes_on(tmp_path: Path) -> None:
    ema = {"beta": 0.5, "update_after_step": 1, "update_every": 1}
    model = model_of("none", ema=ema, start_from=str(tmp_path / "step-000010"))
    train(model, model.config, range(4))
    model.check_start()
    train(model, model.config, range(1))
    for mine, raw in zip(model.generator_of("ema").parameters(), model.generator.parameters(), strict=True):
        assert torch.equal(mine, raw), "a copy, until averaging starts"
    assert Config.model_validate({**TINY, "dp": "none", "ema": {"update_after_step": 5}}).ema == EmaSettings(beta=0.999, update_every=1, update_after_step=5)


def test_the_budget_decides_the_noise_or_the_steps() -> None:
    by_budget = model_of({"epsilon": 3.0, "delta": 1e-4}, people=1000, steps=50)
    planned = by_budget.spending.history
    assert steps_of(planned) == 100 and 2.9 < epsilon(planned, 1e-4) <= 3.0
    cut = model_of({"epsilon": 1.0, "noise_multiplier": 0.8, "delta": 1e-4}, people=1000, steps=5000)
    [phase] = cut.phases()
    assert phase.steps == cut.spending.steps < 5000 and epsilon(cut.spending.history, 1e-4) <= 1.0
    assert "steps, after which the budget is spent" in " ".join(cut.describe(0))
    [only] = cut.spending.history
    assert epsilon((replace(only, steps=only.steps + 4),), 1e-4) > 0.985, "no budget is left over"
    falling = model_of({"epsilon": 1.0, "noise_multiplier": 1.2, "noise_decay": 0.3, "delta": 1e-4}, people=1000, steps=5000)
    begun, whole = falling.spending.history, falling.config.noise_profile.history(0.004, 1.2)
    assert steps_of(begun) == 2 * falling.spending.steps < 10_000 and epsilon(begun, 1e-4) <= 1.0 < epsilon(falling.config.noise_profile.first(steps_of(begun) + 10).history(0.004, 1.2), 1e-4)
    assert len(begun) > 1 and begun[:-1] == whole[: len(begun) - 1] and begun[-1].noise_multiplier == whole[len(begun) - 1].noise_multiplier, "the course is that of all steps"
    assert model_of({"epsilon": 900.0, "noise_multiplier": 50.0}).phases()[0].steps == model_of("none").phases()[0].steps == 8


@pytest.mark.parametrize(("dp", "people", "told"), [
    ({"epsilon": 0.01, "delta": 1e-4}, 10, r"dp\.epsilon: 0\.01 .*what would do: dp\.epsilon: "),
    ({"noise_multiplier": 1.0, "delta": 0.2}, 10, r"dp\.delta: 0\.2 is not below 1 / 10 records"),
    ({"noise_multiplier": 1.0}, 3, "batch_size: 4 patients in an update, but the training split has 3; write 3 or fewer"),
    ({"noise_multiplier": 0.3, "epsilon": 0.5, "delta": 0.01}, 10, "epsilon"),
])  # fmt: skip
def test_a_plan_that_cannot_be_is_refused_before_it_starts(dp: dict[str, Any], people: int, told: str) -> None:
    with pytest.raises(InputError, match=told):
        model_of(dp, people).phases()


@pytest.mark.parametrize(("changes", "told"), [
    ({}, r"dp\n.*say what is promised: dp: \{epsilon: 8\}, .* or dp: none, which guarantees nothing"),
    ({"dp": None}, r"dp\n.*say what is promised: dp: \{epsilon: 8\}, .* or dp: none, which guarantees nothing"),
    ({"dp": {}}, "write epsilon: the budget, from which the noise is found, or noise_multiplier"),
    ({"dp": {"noise_multiplier": 1, "clip_norm": None}}, "clip_norm: null leaves the influence of a record without limit"),
    ({"dp": {"noise_multiplier": 1, "unit": "slice", "slices": 2}}, "slices has no effect with unit: slice"),
    ({"dp": {"noise_multiplier": 0, "epsilon": 8}}, "noise_multiplier: 0 spends any epsilon in its first step"),
    ({"dp": {"noise_multiplier": 0, "noise_decay": 0.5}}, "noise_decay has no effect with noise_multiplier: 0"),
    ({"dp": {"epsilon": 8, "noise_decay": 1}}, "noise_decay: 1 has no effect: the end is as the start"),
    ({"dp": {"epsilon": 8, "clip_decay": 1.0}}, "clip_decay: 1 has no effect: the end is as the start"),
    ({"dp": {"noise_multiplier": 0, "clip_norm": None, "clip_decay": 0.5}}, "clip_decay has no effect with clip_norm: null"),
    ({"dp": {"epsilon": 8, "noise_decay": 0}}, "noise_decay"),
    ({"dp": {"epsilon": 8, "clip_decay": 0.5}, "steps": 1, "critic_steps": 1}, "noise_decay and clip_decay have no effect on a single update"),
    ({"dp": "none", "betas": [0.5, 1.0]}, r"both must lie in \[0, 1\)"),
    ({"dp": "none", "find_lr": True}, "find_lr has no effect"),
    ({"dp": "none", "loop": {"micro_batch": "auto"}}, "micro_batch: auto"),
    ({"dp": "none", "steps": 0}, "steps: 0 would make images of weights as chance made them"),
    ({"dp": "none", "frozen_critic_layers": 2}, "frozen_critic_layers: 2 would leave layers as chance made them; name what they were trained to in start_from"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Config.model_validate({**TINY, **changes})


@pytest.mark.parametrize("dp", ["none", {"epsilon": 8.0, "slices": 2}])
def test_the_resolved_form_reads_back(dp: Any) -> None:
    config = Config.model_validate({**TINY, "dp": dp})
    written = config.model_dump(mode="json")
    assert Config.model_validate(written) == config and (written["dp"] == "none" if dp == "none" else written["dp"]["epsilon"] == 8)


def test_frozen_layers_get_no_noise(tmp_path: Path) -> None:
    model = model_of({"noise_multiplier": 1.0, "delta": 0.001}, frozen_critic_layers=2, start_from=str(tmp_path / "step-000010"))
    before = {name: weight.clone() for name, weight in model.critic.named_parameters()}
    train(model, model.config, range(2))
    moved = {name for name, weight in model.critic.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == set(before) - {"convolutions.0.weight", "convolutions.1.weight"}


@pytest.mark.parametrize(("spoil", "told"), [
    (lambda critic: critic.convolutions.insert(1, torch.nn.BatchNorm2d(4)), r"convolutions\[1\] is BatchNorm2d.*, not a Conv2d"),
    (lambda critic: critic.register_forward_hook(lambda _, given, scores: scores - scores.mean()), "scores images unlike its convolutions"),
])  # fmt: skip
def test_a_critic_that_couples_records_is_refused_before_its_first_update(spoil: Callable[[Any], Any], told: str) -> None:
    model = model_of({"noise_multiplier": 1.0, "delta": 0.001})
    spoil(model.critic)
    with pytest.raises(MedgenError, match=f"cannot be trained with differential privacy: .*({told})"):
        model.noisy_critic.zero_grad()


def test_slices_in_turn_are_no_poisson_sample() -> None:
    config, model = make("dpwgan", "patients")
    with pytest.raises(MedgenError, match="records that are drawn for each update, not on slices in turn"):
        model.step(replace(training_batch(config, 0), lots=()), context())


# which records are drawn


@pytest.fixture
def people() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and patients: the first has one slice, the last forty."""
    counts = np.arange(1, 41)
    yield np.arange(counts.sum()) + 7, np.repeat(np.arange(40), counts)


def test_each_patient_is_drawn_by_itself_whatever_it_has(people: tuple[np.ndarray, np.ndarray]) -> None:
    rows, patients = people
    drawn = records.Records(RecordSampling("patient", 4, 8, 3, poisson=True, secret=True), rows, patients, 1, "test")
    assert len(drawn) == 40 and drawn.rate == 0.2
    table = np.zeros((4000, 40), bool)
    for number in range(4000):
        table[number, drawn.drawn(number)] = True
    deviation = math.sqrt(0.2 * 0.8 / 4000)
    assert np.abs(table.mean(axis=0) - 0.2).max() < 4.5 * deviation, "all alike, few slices or many"
    together = np.corrcoef(table.T)[~np.eye(40, dtype=bool)]
    assert np.abs(together).max() < 5 / math.sqrt(4000), "nobody comes with another"
    sizes = table.sum(axis=1)
    assert sizes.mean() == pytest.approx(8, abs=0.2) and sizes.var() == pytest.approx(40 * 0.16, rel=0.1)


def test_slices_are_of_their_record_and_depend_on_no_other(people: tuple[np.ndarray, np.ndarray]) -> None:
    rows, patients = people
    drawn = records.Records(RecordSampling("patient", 1, 8, 3, poisson=True, secret=True), rows, patients, 1, "test")
    chosen = drawn.rows(5, np.array([0, 3, 39]))
    assert chosen.shape == (3, 3) and (patients[chosen - 7] == [[0], [3], [39]]).all()
    assert np.array_equal(drawn.rows(5, np.array([39])), chosen[2:])
    seen = np.concatenate([drawn.rows(number, np.array([39])).ravel() for number in range(300)])
    assert len(np.unique(seen)) == 40


def test_without_dp_all_slices_come_before_one_comes_again(people: tuple[np.ndarray, np.ndarray]) -> None:
    rows, patients = people
    drawn = records.Records(RecordSampling("slice", 1, 20, 1, poisson=False, secret=False), rows, patients, 1, "test")
    epoch = np.concatenate([drawn.rows(number, drawn.drawn(number)).ravel() for number in range(41)])
    assert len(drawn) == 820 and sorted(epoch) == sorted(rows)


def test_a_key_makes_other_noise_of_other_data() -> None:
    key, config = "0" * 64, {"model": "dpwgan", "steps": 8}
    seeds = {records.secret_seed(*given) for given in ((key, "a", config), ("1" * 64, "a", config), (key, "b", config), (key, "a", {**config, "steps": 9}))}
    assert len(seeds) == 4 and records.secret_seed(key, "a", config) in seeds and max(seeds) > 2**240


def test_noise_depends_on_all_bits_of_its_seed() -> None:
    """Of a CPU generator torch itself keeps 32."""
    lots = [replace(lot_of(0), seed=seed) for seed in (5, 5 + 2**32, 5 + 2**200)]
    releases = [gradient_of(model_of({"noise_multiplier": 1.0, "delta": 0.001}, features=16), lot) for lot in lots]
    assert (torch.stack(releases).corrcoef() - torch.eye(3)).abs().max() < 0.05


def test_too_few_patients_are_told(people: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(InputError, match="batch_size: 64 patients in an update, but the training split has 40; write 40 or fewer"):
        records.Records(RecordSampling("patient", 1, 64, 1, poisson=True, secret=True), *people, 1, "test")


# through the command line


def spec_of(dp: Any, **changes: Any) -> dict[str, Any]:
    config = {"model": "dpwgan", "channels": ["t1_gd"], **TINY, "dp": dp, "loop": {"log_steps": 2, "preview_images": 2, "checkpoint_steps": 3, "validate_epochs": 1.4}, **changes}
    stages = {
        "train": {"kind": "train", "config": config, "resources": {"cpus": 1}},
        "images": {"kind": "generate", "from": "train", "count": 4},
        "evaluate": {"kind": "evaluate", "of": "images", "metrics": ["swd"]},
        "report": {"kind": "report"},
    }
    data = {"format": "phantom", "patients": 10, "size": 16, "window": {"percentiles": [2, 98], "per": "slice"}, "splits": {"train": 0.6, "val": 0.2, "test": 0.2}, "every": 3}
    return {**tiny_spec(name="private"), "data": data, "stages": stages}


def test_a_job_from_masks_to_report_tells_what_it_spent(medgen: Medgen, write_spec: WriteSpec, tmp_path: Path) -> None:
    medgen("submit", write_spec(spec_of({"noise_multiplier": 1.2, "delta": 0.01})), "--local")
    [run] = (tmp_path / "runs").glob("private-*")
    facts = files.read_json(run / "outcome" / "train.0.json")["facts"]
    card = facts["privacy"]
    assert card["unit"] == "patient" and card["records"] == 6 and card["critic_steps"] == 16 and card["delta"] == 0.01
    assert card["epsilon_prv"] == pytest.approx(epsilon(model_of({"noise_multiplier": 1.2, "delta": 0.01}, 6).spending.history, 0.01))
    assert list(facts["checkpoints"]) == ["last"], "nothing was chosen by real images"
    assert not (run / "train" / "noise.key").exists(), "nobody can take the noise away any more"
    lines = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} == {"step", "epoch", "loss", "critic_of_fakes", "seconds_per_step", "time"}, "nothing of real images"
    page = (run / "report" / "index.html").read_text()
    assert str(round(card["epsilon_prv"], 1)) in page
    assert "Nearest training images" not in page
    assert_nothing_names_the_data(run)
    assert "Critic&#39;s score of generated images" in page and "Wasserstein" not in page and "real images</span>" not in page
    assert list(grids_of(run)) == [f"step-{step:06d}.png" for step in (2, 4, 6, 8)] and "step 2</figcaption>" in page, "pictures cost nothing, and need no validation"


def assert_nothing_names_the_data(run: Path) -> None:
    """Whoever has all images but one could compute their fingerprint with it and without; and each voxel size is a patient's."""
    mark = files.read_json(run / "images" / "dataset" / "manifest.json")["data_fingerprint"]
    salt = run / "data.salt"
    [fingerprint] = {path.name for path in (run.parent / "cache").glob("slices-*")} or {""}
    assert salt.stat().st_mode & 0o777 == 0o600 and len(mark) == 64
    assert mark not in fingerprint and mark == files.read_json(run / "outcome" / "train.0.json")["facts"]["data"]
    [affine, *others] = [nibabel.load(path).affine for path in sorted((run / "images" / "dataset").rglob("*.nii.gz"))]
    assert np.array_equal(affine, np.eye(4)) and all(np.array_equal(other, affine) for other in others)


@pytest.mark.parametrize(("spec", "told"), [
    (spec_of({"noise_multiplier": 1}, batch_size=20), r"stages\.train\.config: batch_size: 20 patients in an update, but the training split has 6; write 6 or fewer"),
    (spec_of(None), r"private\.yaml:\d+:\d+: stages\.train\.config\.dp: say what is promised: dp: \{epsilon: 8\}"),
    (spec_of({"noise_multiplier": 1, "delta": 0.5}), r"stages\.train\.config: dp\.delta: 0\.5 is not below 1 / 6 records"),
    (spec_of({"noise_multiplier": 1}, frozen_critic_layers=5, start_from=str(Path(__file__))), "frozen_critic_layers: 5, but at 16 px the critic has 4 convolutions"),
    (spec_of({"noise_multiplier": 1, "unit": "slice"}) | {"data": {"format": "phantom", "size": 16}}, "dp.unit: slice needs data.window: {percentiles: [2, 98], per: slice}"),
])  # fmt: skip
def test_bad_plans_are_told_before_anything_is_queued(medgen: Medgen, write_spec: WriteSpec, spec: dict[str, Any], told: str) -> None:
    said = medgen("submit", write_spec(spec), "--local", expect=2).stderr
    assert re.search(told, said) or told in said, said


def test_nothing_is_chosen_by_images_that_are_not_counted(medgen: Medgen, write_spec: WriteSpec) -> None:
    spec = spec_of({"noise_multiplier": 1})
    spec["stages"]["images"]["checkpoint"] = "best-val"
    assert "stages.images.checkpoint: train is not judged by the val split" in medgen("submit", write_spec(spec), "--local", expect=2).stderr
    spec["stages"]["images"] |= {"checkpoint": "last", "from": "again"}
    spec["stages"]["again"] = {"kind": "train", "repeat": "train"}
    assert "stages.again.repeat: train is not judged by the val split" in medgen("submit", write_spec(spec), "--local", expect=2).stderr
    del spec["stages"]["again"]
    spec["stages"]["images"] |= {"from": "train", "accept": {"like": "train"}}
    assert "like: train compares with the training slices that train hides" in medgen("submit", write_spec(spec), "--local", expect=2).stderr


def test_public_weights_are_tuned_with_privacy(medgen: Medgen, write_spec: WriteSpec, tmp_path: Path) -> None:
    """From a training without it, with the first layers of the critic as they were, sampled by an average of the generator."""
    ema = {"beta": 0.5, "update_after_step": 1, "update_every": 1}
    public = spec_of("none", ema=ema) | {"name": "public", "seed": 3}
    medgen("submit", write_spec(public | {"stages": {"train": public["stages"]["train"]}}), "--local")
    [start] = (tmp_path / "runs").glob("public-*/train/ckpt/step-*8")
    private = spec_of({"noise_multiplier": 1}, ema=ema, start_from=str(start), frozen_critic_layers=2)
    images = private["stages"]["images"]
    private["stages"] = {"train": private["stages"]["train"], "images": images, "raw": {**images, "sampling": {"weights": "raw"}}}
    medgen("submit", write_spec(private), "--local")
    [run] = (tmp_path / "runs").glob("private-*")
    newest = checkpoint.newest(run / "train" / "ckpt", print)
    assert newest is not None
    before, after = (found.tensors("modules.critic") for found in (checkpoint.open_verified(start), newest))
    assert [torch.equal(before[f"convolutions.{number}.weight"], after[f"convolutions.{number}.weight"]) for number in range(4)] == [True, True, False, False]
    averaged, raw = (sorted((run / name / "dataset").rglob("*.nii.gz")) for name in ("images", "raw"))
    assert len(averaged) == len(raw) == 4 and averaged[0].read_bytes() != raw[0].read_bytes()
    as_it_is = spec_of({"noise_multiplier": 1}, ema=ema, start_from=str(newest.folder), steps=0)
    medgen("submit", write_spec(as_it_is | {"name": "more", "stages": {name: as_it_is["stages"][name] for name in ("train", "images")}}), "--local")
    [more] = (tmp_path / "runs").glob("more-*")
    assert files.read_json(more / "outcome" / "train.0.json")["facts"]["privacy"]["critic_steps"] == 16
    assert len(list((more / "images" / "dataset").rglob("*.nii.gz"))) == 4
    same = spec_of({"noise_multiplier": 1}, ema=ema, start_from=str(start)) | {"name": "same", "seed": 3}
    assert "was trained on the same images without differential privacy" in medgen("submit", write_spec(same), "--local", expect=1).stdout
    unlike = spec_of({"noise_multiplier": 1}, ema=None, start_from=str(start))
    assert "of another shape: averages of the weights (ema, ema.more): [ema] there, none here; give the same" in medgen("submit", write_spec(unlike | {"name": "unlike"}), "--local", expect=2).stderr
    larger = spec_of({"noise_multiplier": 1}, ema=ema, start_from=str(start)) | {"name": "larger"}
    larger["data"] = {**larger["data"], "size": 32}
    assert "of another shape: data.size 16 there, 32 here; give the same" in medgen("submit", write_spec(larger), "--local", expect=2).stderr


def grids_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "train" / "previews").iterdir())}


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run / "train" / "ckpt", print)
    assert newest is not None and newest.step == 8
    return {f"{name} {key}": tensor for name in ("modules.generator", "modules.critic", "modules.ledger") for key, tensor in newest.tensors(name).items()}


def test_two_ranks_or_a_resumed_training_release_the_same(write_spec: WriteSpec, medgen: Medgen, environment: dict[str, str], tmp_path: Path) -> None:
    """With noise and clipping that fall, and noise that can be drawn again; a secret one is another in every run, and the key of it outlives a kill."""
    found, grids = {}, {}
    for name, noise, resources in (("one", "reproducible", {"cpus": 1}), ("two", "reproducible", {"processes": 2, "cpus": 2}),
                                   ("cut", "reproducible", {"cpus": 1}), ("secret", "secret", {"cpus": 1})):  # fmt: skip
        dp = {"noise_multiplier": 1, "noise_decay": 0.5, "clip_decay": 0.5, "noise": noise}
        spec = spec_of(dp)
        spec |= {"name": name, "stages": {"train": spec["stages"]["train"] | {"resources": resources}}}
        if name in ("cut", "secret"):
            run = create_run(write_spec(spec), (), tmp_path / "runs")[0].root
            killed = subprocess.run([sys.executable, "-m", "medgen", "train", run], env={**environment, "MEDGEN_FAULT": "site=step,step=5,action=kill9"}, capture_output=True)
            assert killed.returncode == -signal.SIGKILL and (run / "train" / "noise.key").exists() == (noise == "secret")
            if noise == "secret":
                assert (run / "train" / "noise.key").stat().st_mode & 0o777 == 0o600
                assert "with this key the noise of a private training can be taken away again" in " ".join(medgen("fsck", run).stdout.split())
            if name == "cut":
                shutil.copy(run / "train" / "previews" / "step-000004.png", run / "train" / "previews" / "step-000007.png")  # of steps that it has not behind it any more
                stopped = subprocess.run([sys.executable, "-m", "medgen", "train", run], env={**environment, "MEDGEN_FAULT": "site=step,step=6,action=term"}, capture_output=True)
                assert stopped.returncode == 3 and list(grids_of(run)) == ["step-000002.png", "step-000004.png"], "no time for a picture"
            medgen("train", run)
        else:
            medgen("submit", write_spec(spec), "--local")
            [run] = (tmp_path / "runs").glob(f"{name}-*")
        found[name] = last_weights(run)
        grids[name] = grids_of(run)
    assert grids["cut"] == grids["one"] and list(grids["two"]) == list(grids["one"]) and len(set(grids["one"].values())) > 1
    for key, tensor in found["one"].items():
        torch.testing.assert_close(found["two"][key], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(found["cut"][key], tensor), key
    ledger = "modules.ledger spent"
    assert torch.equal(found["secret"][ledger][:, :4], found["one"][ledger][:, :4]) and found["one"][ledger][0].tolist() == [1.0, 4 / 6, 2.0, 0, 1]
    [run] = (tmp_path / "runs").glob("cut-*")
    planned = model_of(dp, 6).spending.history
    card = files.read_json(run / "outcome" / "train.0.json")["facts"]["privacy"]
    assert from_record(card).history == planned and len(planned) == 8 and card["epsilon_prv"] == epsilon(planned, card["delta"])
    assert not torch.equal(found["secret"]["modules.critic score.weight"], found["one"]["modules.critic score.weight"])


def test_releases_are_not_made_a_second_time_with_other_noise(write_spec: WriteSpec, medgen: Medgen, environment: dict[str, str], tmp_path: Path) -> None:
    """The ledger would count both once."""
    spec = spec_of({"noise_multiplier": 1})
    run = create_run(write_spec(spec | {"stages": {"train": spec["stages"]["train"]}}), (), tmp_path / "runs")[0].root
    subprocess.run([sys.executable, "-m", "medgen", "train", run], env={**environment, "MEDGEN_FAULT": "site=step,step=5,action=kill9"}, capture_output=True)
    key = run / "train" / "noise.key"
    kept = key.read_text()
    key.write_text("junk")
    assert "noise.key: not the key of a private training's noise" in medgen("train", run, expect=2).stderr
    key.unlink()
    assert "another key of its private noise" in medgen("train", run, expect=2).stderr
    key.write_text(kept)
    medgen("train", run)
    shutil.rmtree(max((run / "train" / "ckpt").glob("step-*")))
    assert not key.exists() and "another key of its private noise" in medgen("train", run, expect=2).stderr


def test_the_verb_that_prices_plans_knows_this_family() -> None:
    assert all(isinstance(model_of(dp).config, Priced) for dp in ("none", {"epsilon": 8, "delta": 1e-4}))


def test_check_tries_a_step_and_the_budget(medgen: Medgen, write_spec: WriteSpec) -> None:
    told = medgen("check", write_spec(spec_of({"noise_multiplier": 1})), "--local").stdout
    assert "8 steps" in told and "step, validation, sampling and save work" in told
    assert "dp.epsilon: 1e-05" in medgen("check", write_spec(spec_of({"epsilon": 1e-5})), "--local", expect=2).stdout


def test_a_card_tells_what_its_training_leaves_open(tmp_path: Path) -> None:
    cards = [model_of({"noise_multiplier": 1.0, "delta": 0.001, **noise}, **start).facts()["privacy"] for noise, start in (
        ({}, {}), ({"noise": "reproducible"}, {}), ({}, {"start_from": str(tmp_path / "step-000010")}))]  # fmt: skip
    plain, reproducible, started = (card["not_covered"] for card in cards)
    assert [text for text in reproducible if text not in plain] == [REPRODUCIBLE]
    assert [text.partition(":")[0] for text in started if text not in plain] == [f"Training began with the weights of {tmp_path / 'step-000010'}"]
    assert from_record(cards[1]).record() == cards[1] and any("dp.noise: secret" in line for line in from_record(cards[1]).words())
