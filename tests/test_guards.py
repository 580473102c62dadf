"""Guards of a training: gradient spikes are skipped, and told; one that predicts a constant is stopped. Through the command line where it decides."""

from __future__ import annotations

import copy
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_NET, tiny_spec
from test_models import assert_same, batch_of, context, make, state_of, train

from medgen import commits, files, models
from medgen.models.guard import SpikeGuard
from medgen.models.settings import LoopSettings
from medgen.rundir import Heartbeat
from medgen.watch.ranks import unwell_in_words

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]

# in one sample of ten the target is a thousand times too large; in the other strategy it has nothing to do with what the network sees
MINE = """
import torch
from medgen.models.diffusion.strategies import DDPM

class Spiky(DDPM):
    def noised(self, clean, noise, times):
        noisy, target = super().noised(clean, noise, times)
        return noisy, target * torch.where(noise.mean(dim=(1, 2, 3), keepdim=True) > 0.09, 1000.0, 1.0)

class Hopeless(DDPM):
    def noised(self, clean, noise, times):
        noisy, target = super().noised(clean, noise, times)
        return noisy, target[torch.randperm(len(target), generator=torch.Generator().manual_seed(0))].flip(2)
"""


def guard(after_steps: int = 100) -> SpikeGuard:
    return SpikeGuard(LoopSettings(spike_after_steps=after_steps))


def decisions(asked: SpikeGuard, norms: list[float]) -> list[bool]:
    return [asked.allows(torch.tensor(norm), context()) for norm in norms]


def test_a_spike_is_skipped_once_the_mean_is_known() -> None:
    fresh = guard()
    assert all(decisions(fresh, [1.0] * 50 + [30.0] + [1.0] * 49)), "the first hundred steps make the mean"
    before = float(fresh.mean)
    assert 1 < before < 1.5
    assert decisions(fresh, [9.9 * before, 1.0]) == [True, True]
    assert decisions(fresh, [10.1 * float(fresh.mean), 1.0]) == [False, True]


def test_what_is_not_finite_is_skipped_from_the_first_step_and_teaches_nothing() -> None:
    fresh = guard()
    assert decisions(fresh, [math.nan, math.inf, 1.0, math.inf]) == [False, False, True, False]
    assert float(fresh.mean) == 1.0 and int(fresh.seen) == 1


def test_the_mean_adapts_while_steps_are_skipped() -> None:
    """Gradients thirty times longer for good: a mean that stood still would skip all steps to the end."""
    known = guard()
    decisions(known, [1.0] * 200)
    after = decisions(known, [30.0] * 100)
    assert after.index(True) == 13, "1.09^13 = 3.07"
    assert all(after[13:])


def test_its_numbers_stay_in_full_precision_where_they_are() -> None:
    moved = guard().to(torch.bfloat16)
    assert moved.mean.dtype == torch.float64
    off = SpikeGuard(LoopSettings(spike_factor=None))
    assert decisions(off, [math.inf, 1e30]) == [True, True]


@pytest.mark.parametrize("strength", [1e4, math.inf])
def test_a_skipped_step_changes_no_weight_no_moment_and_no_average(strength: float) -> None:
    config, model = make("diffusion", "ddpm_bravo")
    model.guard.after_steps = 2  # type: ignore[attr-defined]
    train(model, config, range(3))
    before = copy.deepcopy(state_of(model))
    spiky = batch_of(config, 3)
    model.strategy.loss_weight = lambda times: torch.full((len(times),), strength)  # type: ignore[attr-defined]
    where = context()
    where.step = 3
    report = model.step(spiky, where)
    assert report.scalars["skipped"] == 1
    assert ("grad_norm" in report.scalars) == math.isfinite(strength), "one that is not finite would hide the others of its logging window"
    after = state_of(model)
    del before["modules.guard"], after["modules.guard"], before["optimizers.network"]["param_groups"], after["optimizers.network"]["param_groups"]
    assert_same(before, after)
    del model.strategy.loss_weight  # type: ignore[attr-defined]
    assert model.step(batch_of(config, 4), where).scalars["skipped"] == 0
    assert not torch.equal(state_of(model)["modules.network"]["out.2.conv.weight"], before["modules.network"]["out.2.conv.weight"])


def job(name: str, strategy: str, epochs: float, batch_size: int = 8, **loop: Any) -> dict[str, Any]:
    """With this seed no noise is Spiky's in the first 15 steps of 4 samples, which make the mean."""
    config = {**TINY_NET, "strategy": f"mine:{strategy}", "mode": "bravo", "epochs": epochs, "batch_size": batch_size, "warmup_epochs": 0.1,
              "loop": {"log_steps": 1, "preview_images": 0, "validate_epochs": 1000.0, **loop}}
    return {**tiny_spec(name=name, seed=50), "stages": {"train": {"kind": "train", "config": config, "resources": {"cpus": 1}}}}


def run_of(tmp_path: Path, name: str) -> Path:
    [run] = (tmp_path / "runs").glob(f"{name}-*")
    return run


def saved(run: Path) -> dict[str, Any]:
    [folder] = {path.parent for path in (run / "train" / "ckpt").glob("step-*/commit.json") if (path.parent / "modules.network.pt").exists()} & {
        sorted((run / "train" / "ckpt").glob("step-*"))[-1]}
    return {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def curve(run: Path) -> list[dict[str, float]]:
    """The lines of the log without what the clock on the wall says."""
    lines = map(json.loads, (run / "train" / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ("time", "seconds_per_step")} for line in lines]


def test_killed_among_skipped_steps_and_resumed_is_uninterrupted_and_the_alarm_is_told(tmp_path: Path, medgen: Medgen, environment: dict[str, str], write_spec: WriteSpec) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    whole_job, killed_job = (job(name, "Spiky", 14, batch_size=4, spike_after_steps=8, checkpoint_steps=7, log_steps=2) for name in ("whole", "killed"))
    medgen("submit", write_spec(whole_job), "--local")
    environment["MEDGEN_FAULT"] = "site=step,step=27,attempt=0,action=kill9"
    medgen("submit", write_spec(killed_job), "--local")
    whole, killed = run_of(tmp_path, "whole"), run_of(tmp_path, "killed")
    assert_same(saved(whole), saved(killed))
    skipped = [line["skipped"] for line in map(json.loads, (whole / "train" / "log.jsonl").read_text().splitlines()) if "skipped" in line]
    assert 2 * sum(skipped[:13]) > 3 and 2 * sum(skipped[14:]) > 3, "steps were skipped before and after the kill"
    clocks = [files.read_json(sorted((run / "train" / "ckpt").glob("step-*"))[-1] / commits.STATE)["clock"] for run in (whole, killed)]
    assert clocks[0] == clocks[1] and clocks[0]["skipped"] > 3, "a window that was cut counts what it had seen before"
    assert curve(whole) == curve(killed)
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text().splitlines()]
    assert any(event["event"] == "task_ended" and event["status"] != "done" for event in events), "it was killed"
    for run in (whole, killed):
        told = [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == "steps_skipped"]
        assert told[0]["cause"].startswith(("11 of the last ", "12 of the last ")) and "far longer than usual" in told[0]["cause"]
    log = (whole / "logs" / "train" / "s0" / "r0.a0.log").read_text()
    assert log.count("steps were skipped") == 1, "once per window"
    (whole / "outcome" / "train.0.json").unlink()
    assert "steps were skipped" in medgen("why", whole, expect=1).stdout, "of what is not done, why tells it"


def test_watch_says_that_steps_are_skipped() -> None:
    beat = Heartbeat("train", 0, 0, 40, 90, "steps", 0.1, 0.0, "n1", 1)
    assert unwell_in_words(beat, ()) is None
    assert unwell_in_words(replace(beat, skipped={"steps": 11, "of": 40}), ()) == "11 of the last 40 steps were skipped; `medgen why` says more"


def test_a_training_that_predicts_a_constant_is_stopped(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    failed = medgen("submit", write_spec(job("hopeless", "Hopeless", 14, collapse_steps=20)), "--local", expect=1)
    words = "collapsed: for 20 steps"
    assert words in failed.stdout + failed.stderr and "loop.collapse_steps: null goes on regardless" in failed.stdout + failed.stderr
    spec = job("hopeful", "Hopeless", 14, collapse_steps=20)
    spec["stages"]["train"]["config"]["strategy"] = "ddpm"
    medgen("submit", write_spec(spec), "--local")
    lines = [json.loads(line) for line in (run_of(tmp_path, "hopeful") / "train" / "log.jsonl").read_text().splitlines()]
    assert all(line["constant_loss"] == pytest.approx(1, abs=0.15) for line in lines[3:] if "constant_loss" in line), "the noise's variance"


@pytest.mark.parametrize(("family", "loop", "words"), [
    ("diffusion", {"spike_factor": None, "spike_after_steps": 5}, "spike_after_steps has no effect with spike_factor: null, which skips nothing; remove it"),
    ("diffusion", {"spike_factor": 1.0}, "greater than 1"),
    ("pacgan", {"spike_factor": 20.0}, "loop.spike_factor has no effect: this family skips no steps; remove it"),
    ("pacgan", {"spike_after_steps": 20}, "loop.spike_after_steps has no effect: this family skips no steps; remove it"),
    ("pacgan", {"collapse_steps": 20}, "loop.collapse_steps has no effect: this family does not say what predicting a constant would cost; remove it"),
])  # fmt: skip
def test_what_has_no_effect_is_refused(family: str, loop: dict[str, Any], words: str) -> None:
    config = models.config_class(family)
    with pytest.raises(ValueError, match=words):
        config.model_validate({**next(iter(config.examples().values())), "loop": loop})
