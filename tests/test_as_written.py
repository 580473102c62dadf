"""Values of a spec are taken as they are written: nothing is turned into a number that is none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import tiny_spec
from pydantic import BeforeValidator, Field

from medgen import as_written

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[..., Path]
Parsed = Annotated[int, BeforeValidator(int)]


@pytest.mark.parametrize(("annotation", "value"), [
    (int, 5), (float, 5), (float | None, None), (bool, True), (Literal["auto"] | bool, "auto"), (Annotated[int, Field(ge=1)] | Literal["auto"] | None, "auto"),
    (tuple[int, ...], [1, 2]), (str, "5"), (int | str, "5"), (int | bool, True), (Parsed | None, "5"), (dict[str, Any], {"a": True}), (int, "five"), (str, True),
])  # fmt: skip
def test_what_is_of_the_kind_asked_for_passes_or_is_told_by_pydantic(annotation: Any, value: Any) -> None:
    assert as_written.problem(value, annotation) is None


@pytest.mark.parametrize(("annotation", "value", "words"), [
    (int, True, "write a number, got true"), (float | None, False, "write a number, got false"), (tuple[int, ...], [4, True], "write a number, got true"),
    (Annotated[int, Field(ge=1)] | Literal["auto"] | None, "5", "write 5 without quotes: this is text"), (float, "1e-4", "write 1e-4 without quotes: this is text"),
    (Literal["auto"] | bool, "yes", "write true or false, got 'yes'"), (bool, 1, "write true or false, got 1"),
])  # fmt: skip
def test_what_pydantic_would_turn_into_another_kind_is_refused(annotation: Any, value: Any, words: str) -> None:
    assert as_written.problem(value, annotation) == words


@pytest.mark.parametrize(("changes", "words"), [
    ({"loop": {"micro_batch": True}}, "loop: micro_batch: write a number, got true"),
    ({"loop": {"compile": "yes"}}, "loop: compile: write true or false, got 'yes'"),
    ({"loop": {"micro_batch": 9}}, "loop.micro_batch: 9 has no effect: it is more than batch_size: 8"),
    ({"epochs": "3"}, "epochs: write 3 without quotes: this is text"),
    ({"ema": True}, "ema: expected `key: value` lines below it, got True"),
    ({"channels": 16}, "channels: expected a list, as in [1, 2], got 16"),
])  # fmt: skip
def test_a_config_says_so(medgen: Medgen, write_spec: WriteSpec, changes: dict[str, Any], words: str) -> None:
    spec = tiny_spec()
    spec["stages"]["train_bravo"]["config"] |= changes
    told = medgen("submit", write_spec(spec), "--local", "--dry-run", expect=2).stderr
    assert f"stages.train_bravo.config.{words}" in told


@pytest.mark.parametrize(("stage", "changes", "words"), [
    ("images", {"sampling": {"sampler": "ddim", "steps": True}}, "stages.images.sampling: steps: write a number, got true"),
    ("masks", {"accept": {"min_pixels": 100}}, "stages.masks.accept: min_pixels: 100 is more than max_fraction: 0.25 of 16 x 16 pixels"),
    ("evaluate", {"metrics": ["registration"]}, "stages.evaluate.metrics: registration compares channels, and the model of train_bravo makes bravo alone"),
])  # fmt: skip
def test_a_stage_says_so(medgen: Medgen, write_spec: WriteSpec, stage: str, changes: dict[str, Any], words: str) -> None:
    spec = tiny_spec()
    spec["stages"][stage] |= changes
    assert words in medgen("submit", write_spec(spec), "--local", "--dry-run", expect=2).stderr
