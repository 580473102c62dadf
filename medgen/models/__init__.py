"""The model families: every package in this folder that has a config.py. Found by name, never listed by hand.

`config_class` is cheap and safe on a login node; `model_class` imports torch and runs in a stage only."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any


@functools.cache
def families() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/config.py")))


def config_class(family: str) -> Any:
    return importlib.import_module(f"medgen.models.{family}.config").Config


def model_class(family: str) -> Any:
    return importlib.import_module(f"medgen.models.{family}.model").Model
