"""`medgen evaluate SYNTHETIC REAL`: what the command line asks for, how far it is, and the scores as a terminal shows them. Called by cli.py."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from medgen import files, rundir
from medgen.csv_files import write_rows
from medgen.data.image_looks import Reading
from medgen.errors import InputError
from medgen.evaluate import folders, scores
from medgen.evaluate.folders import Compared, Request
from medgen.evaluate.privacy import SUSPECT_COLUMNS, in_words
from medgen.evaluate.scores import METRICS_FILE
from medgen.prepare.page import Table
from medgen.report import folder_page, words
from medgen.spec_evaluate import AnyExtractor

TABLE_FILE, SUSPECTS_FILE, PAGE_FILE, CARD_FILE = "scores.csv", "suspects.csv", "report.html", "dataset_card.md"
FILES = (METRICS_FILE, TABLE_FILE, SUSPECTS_FILE, PAGE_FILE, CARD_FILE)


def evaluate(
    synthetic: Path, real: Path, out: Path, *, train: Path | None, masks: tuple[Path | None, Path | None, Path | None], pair: Literal["name", "index"] | None,
    size: int | None, window: str | None, gray: bool, patient: str | None, channel: str | None, unlike_files: bool, measures: dict[str, Any], seed: int,
) -> str:
    """Compare two folders and write the new folder `out`; returns the scores in words. `masks`: of the synthetic, real and training images. Raises InputError naming the option that is wrong."""
    if "extractor" in measures:
        measures = {**measures, "extractor": extractor_asked(measures["extractor"])}
    reading = Reading(size, None if window is None else _window(window), gray, None if patient is None else _pattern(patient))
    cache = rundir.cache_root(rundir.runs_root())
    files.require_new(out)
    request = Request(synthetic, real, train, *masks, pair, reading, channel, unlike_files, measures, seed, cache)
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(step: int, total: int, unit: str) -> None:
            if unit not in tasks:
                tasks[unit] = bar.add_task(unit, total=total)
            bar.update(tasks[unit], completed=step, total=total)

        try:
            compared = folders.evaluate_folders(request, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True), progress)
        except ValidationError as error:
            raise InputError("; ".join(f"{'.'.join(map(str, item['loc'])) or 'metrics'}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors())) from None
    _write(out, compared)
    return _in_words(out, compared.record)


def _write(out: Path, compared: Compared) -> None:
    """All files in one move."""
    files.require_new(out)  # another evaluation may have made it meanwhile
    with files.folder_in_one_move(out) as folder:
        files.write_json(folder / METRICS_FILE, compared.record)
        files.write_text(folder / TABLE_FILE, scores.to_csv([compared.record]))
        write_rows(folder / SUSPECTS_FILE, SUSPECT_COLUMNS, compared.suspects)
        files.write_text(folder / PAGE_FILE, folder_page.folder_page(compared.record, compared.sides))
        files.write_text(folder / CARD_FILE, folder_page.folder_card(compared.record, compared.sides))


def extractor_asked(text: str) -> Any:
    """A name, or a mapping in YAML."""
    known = [str(get_args(item.model_fields["kind"].annotation)[0]) for item in get_args(AnyExtractor)]
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if found in known or (isinstance(found, dict) and found.get("kind") in known):
        return found
    raise InputError(f"--extractor {text}: the extractors are: {', '.join(known)}; torchscript with what it takes: '{{kind: torchscript, file: F, size: 224, range: [0, 1]}}'")


def _window(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--window {text}: write two numbers, black and white: --window 0,1200") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"--window {text}: black and white are finite numbers")
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


def _in_words(out: Path, record: dict[str, Any]) -> str:
    shown = [item for item in scores.from_json(record["scores"]) if item.comparison in (None, "real-synthetic")]
    rows = tuple(
        (scores.MEANINGS[item.metric].title + (f", {item.group}" if item.group else ""), item.channel, words.number(item.value),
         "-" if item.floor is None else words.number(item.floor), words.interval(item) or "-", f"{item.n:,}")
        for item in shown
    )  # fmt: skip
    lines = [Table("", ("", "channel", "value", "real-real (floor)", "95% interval", "n"), rows).text(), ""] if rows else []
    lines += [f"not computed: {name}: {reason}" for name, reason in record["skipped"].items()]
    lines += ["", *in_words(record["privacy"])]
    return "\n".join([*lines, "", f"{out}: {', '.join(FILES)}"])
