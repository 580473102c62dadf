"""Texts that become part of a file name, a path, a line of options or a terminal: what they may hold. Used by spec, site and cli."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from medgen.errors import InputError

CHANNEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,59}")
TAKEN_CHANNELS = ("affines",)  # of the slice cache's own files
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
UNFIT_IN_PATHS = re.compile(r"[\x00-\x1f\x7f\"\\:]")


def _channel_name(value: str) -> str:
    if not CHANNEL.fullmatch(value) or value in TAKEN_CHANNELS:
        raise ValueError(f"channel names are up to 60 letters, digits, _ and - (they name files), got {value[:80]!r}")
    return value


def _option_word(value: str) -> str:
    """The value of one option in a `#SBATCH` line: a space would begin another option, a newline another command."""
    if not value or CONTROL.search(value) or re.search(r"[\s\"'\\#`$;]", value):
        raise ValueError(f"not one word that can stand in a line of sbatch options: {value[:80]!r}; no spaces, quotes, $, ;, # or backslashes")
    return value


ChannelName = Annotated[str, AfterValidator(_channel_name)]
OptionWord = Annotated[str, AfterValidator(_option_word)]


def absolute(path: Path) -> Path:
    """With ~ replaced by the home folder, and not depending on the current folder. Raises InputError if there is no such home."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise InputError(f"{printable(str(path))}: no such home folder; write the path in full") from None


def runs_folder(path: Path) -> Path:
    """`absolute`, for a folder whose path stands in scripts, #SBATCH lines, PATH and PYTHONPATH. Raises InputError if it cannot."""
    found = absolute(path)
    bad = UNFIT_IN_PATHS.search(str(found))
    if bad is not None:
        raise InputError(f"{printable(str(found))}: runs cannot lie in a folder whose path holds {bad.group()!r}, "
                         "which PATH or Slurm would take for something else; set MEDGEN_RUNS to another folder")  # fmt: skip
    return found


def printable(text: str) -> str:
    """With every control character but the newline spelled out: text from a file cannot move the cursor or retitle the window."""
    return "\n".join(CONTROL.sub(lambda match: repr(match.group())[1:-1], line) for line in text.split("\n"))
