"""`medgen evaluate SYNTHETIC REAL`: what the command line asks for, how far it is, and the scores as a terminal shows them. Called by cli.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from medgen import files, rundir
from medgen.errors import InputError
from medgen.evaluate import folders, scores
from medgen.evaluate.file_images import Reading
from medgen.evaluate.folders import METRICS_FILE, SUSPECTS_FILE, TABLE_FILE, Request
from medgen.evaluate.privacy import in_words
from medgen.prepare.page import Table
from medgen.report.words import number


def evaluate(
    synthetic: Path, real: Path, out: Path, *, train: Path | None, masks: tuple[Path | None, Path | None, Path | None], pair: Literal["name", "index"] | None,
    size: int | None, window: str | None, gray: bool, patient: str | None, unlike_files: bool, measures: dict[str, Any], seed: int,
) -> str:
    """Compare two folders and write the new folder `out`; returns the scores in words. `masks`: of the synthetic, real and training images. Raises InputError naming the option that is wrong."""
    reading = Reading(size, None if window is None else _window(window), gray, None if patient is None else _pattern(patient))
    cache = rundir.cache_root(rundir.runs_root())
    request = Request(synthetic, real, out, train, *masks, pair, reading, unlike_files, measures, seed, cache)
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(step: int, total: int, unit: str) -> None:
            if unit not in tasks:
                tasks[unit] = bar.add_task(unit, total=total)
            bar.update(tasks[unit], completed=step, total=total)

        try:
            folders.evaluate_folders(request, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True), progress)
        except ValidationError as error:
            raise InputError("; ".join(f"{'.'.join(map(str, item['loc'])) or 'metrics'}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors())) from None
    return _in_words(out)


def _window(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--window {text}: write two numbers, black and white: --window 0,1200") from None
    if not low < high:
        raise InputError(f"--window {text}: black must lie below white")
    return low, high


def _pattern(text: str) -> re.Pattern[str]:
    try:
        found = re.compile(text)
    except re.error as error:
        raise InputError(f"--patient {text}: not a regular expression ({error})") from None
    if found.groups != 1:
        raise InputError(f"--patient {text}: give one group, which is the patient, such as '(sub-[0-9]+)'")
    return found


def _in_words(out: Path) -> str:
    record = files.read_json(out / METRICS_FILE)
    shown = [item for item in scores.from_json(record["scores"]) if item.comparison in (None, "real-synthetic")]
    rows = tuple(
        (scores.MEANINGS[item.metric].title + (f", {item.group}" if item.group else ""), item.channel, number(item.value),
         "-" if item.floor is None else number(item.floor), "-" if item.ci is None else f"{number(item.ci[0])} to {number(item.ci[1])}", f"{item.n:,}")
        for item in shown
    )  # fmt: skip
    lines = [Table("", ("", "channel", "value", "real-real (floor)", "95% interval", "n"), rows).text(), ""] if rows else []
    lines += [f"not computed: {name}: {reason}" for name, reason in record["skipped"].items()]
    lines += ["", *in_words(record["privacy"])]
    return "\n".join([*lines, "", f"{out}: {METRICS_FILE}, {TABLE_FILE}, {SUSPECTS_FILE}"])
