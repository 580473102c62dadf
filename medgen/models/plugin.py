"""User extensions named in a config as `package.module:Name`; loaded by families that allow them."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_plugin(name: str) -> bool:
    return ":" in name


def load(name: str, base: type) -> Any:
    """The class `package.module:Name`; the current folder is searched too. Raises ValueError saying what is wrong."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: write package.module:ClassName")
    module_name, _, class_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does while it is imported
        raise ValueError(f"{name!r}: cannot import {module_name}: {type(error).__name__}: {error}") from None
    if not hasattr(module, class_name):
        raise ValueError(f"{name!r}: {module_name} ({module.__file__}) has no {class_name}")
    found = getattr(module, class_name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name!r}: must be a subclass of {base.__module__}.{base.__qualname__}")
    return found
