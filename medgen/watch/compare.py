"""`medgen compare RUN RUN...`: scores of several runs, or folders of `medgen evaluate`, side by side. Called by cli.py.

Only what was measured alike stands in one row: the same protocol, number of images and real data. The rest is listed with what differs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medgen import files, plan, rundir
from medgen.errors import InputError
from medgen.evaluate.scores import MEANINGS, METRICS_FILE, METRICS_SCHEMA, Score, from_json
from medgen.rundir import RunDir

MEASURING = ("evaluate", "structure", "utility")  # kinds of stages that write scores
SEED = re.compile(r"^seed \d+$")  # another seed draws other images of the same kind
OWN_FACTS = re.compile(r"^(threshold |.*: to the nearest of )")  # numbers that come out of the data
WITHIN_NOISE, NO_INTERVAL = "not shown", "no interval"


@dataclass(frozen=True)
class Measured:
    """A score, and the real side it was measured with: which split, of which data (their fingerprint)."""

    score: Score
    against: str
    data: str

    @property
    def name(self) -> tuple[str, str, str | None]:
        return (self.score.metric, self.score.channel, self.score.group)


@dataclass(frozen=True)
class Column:
    """All that was measured of one synthetic set: of a run, by its evaluate, structure and utility stages; or of a folder."""

    name: str
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Row:
    """One score of those columns that measured it alike, by column name; `lead`: which is better beyond the noise, or why none is said to be."""

    metric: str
    title: str
    channel: str
    group: str | None
    n: int
    better: str
    floor: float | None
    protocol: str
    values: dict[str, tuple[float, tuple[float, float] | None]]
    lead: str


@dataclass(frozen=True)
class Compared:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    apart: tuple[str, ...]  # what was measured, but not alike


def compare(names: Sequence[str], as_json: bool) -> None:
    """Print the table. Raises InputError for fewer than two columns, or one without scores."""
    found = compared(list(_columns(names)))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print(found)


def compared(columns: list[Column]) -> Compared:
    if len(columns) < 2:
        only = columns[0].name if columns else "nothing"
        raise InputError(f"{only}: a comparison needs two evaluations; name another run, or the folder that medgen evaluate made")
    twice = next((column.name for column in columns if [other.name for other in columns].count(column.name) > 1), None)
    if twice is not None:
        raise InputError(f"{twice} stands twice; name each evaluation once")
    alike: dict[tuple[Any, ...], dict[str, Score]] = {}
    for column in columns:
        for item in column.measured:
            alike.setdefault(_key(item), {})[column.name] = item.score
    rows = [_row(members) for members in alike.values() if len(members) > 1]
    return Compared(tuple(column.name for column in columns), tuple(rows), tuple(_apart(columns, alike)))


def _columns(names: Sequence[str]) -> Iterator[Column]:
    """Of a folder that holds metrics.json itself, or of every synthetic set of a run that was measured."""
    for name in names:
        if (Path(name) / METRICS_FILE).is_file():
            yield Column(name, tuple(_measured(Path(name) / METRICS_FILE)))
            continue
        if Path(name).is_dir() and not RunDir(Path(name)).plan.is_file():
            raise InputError(f"{name}: a folder without {METRICS_FILE}; name a run, or the folder that medgen evaluate made")
        run = rundir.find_run(name)
        stages = [stage for stage in plan.read(run).stages if stage.kind in MEASURING and run.metrics(stage.name).is_file()]
        if not stages:
            raise InputError(f"{run.run_id}: nothing of it is measured yet; medgen watch {run.run_id} tells how far it is")
        sets = list(dict.fromkeys(stage.settings["of"] for stage in stages))
        for of in sets:
            measured = [item for stage in stages if stage.settings["of"] == of for item in _measured(run.metrics(stage.name))]
            yield Column(run.run_id if len(sets) == 1 else f"{run.run_id}/{of}", tuple(measured))


def _measured(path: Path) -> list[Measured]:
    try:
        record = files.read_json(path)
        if record["schema"] != METRICS_SCHEMA:
            raise InputError(f"{path}: written by another version of medgen (schema {record['schema']}, here {METRICS_SCHEMA}); evaluate again")
        scores = [item for item in from_json(record["scores"]) if item.comparison in (None, "real-synthetic")]
        return [Measured(item, record["against"], record["inputs"]["data_fingerprint"]) for item in scores]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no scores of medgen ({type(error).__name__}: {error}); evaluate again") from None


def _parts(score: Score) -> list[str]:
    """The protocol without what may differ between two evaluations that were made alike."""
    return [part for part in score.protocol.split("; ") if not SEED.match(part) and not OWN_FACTS.match(part)]


def _key(item: Measured) -> tuple[Any, ...]:
    return (*item.name, item.score.n, item.against, item.data, *_parts(item.score))


def _row(members: dict[str, Score]) -> Row:
    first = next(iter(members.values()))
    values = {name: (score.value, score.ci) for name, score in members.items()}
    return Row(first.metric, MEANINGS[first.metric].title, first.channel, first.group, first.n, first.better, first.floor, "; ".join(_parts(first)), values, _lead(members))


def _lead(members: dict[str, Score]) -> str:
    """The best one, if its interval lies apart from all others': two that overlap may be the same."""
    if any(score.ci is None for score in members.values()):
        return NO_INTERVAL
    best = min(members, key=lambda name: _badness(members[name]))
    low, high = members[best].ci or (0.0, 0.0)
    others = [score.ci for name, score in members.items() if name != best and score.ci is not None]
    return best if all(high < other[0] or other[1] < low for other in others) else WITHIN_NOISE


def _badness(score: Score) -> float:
    if score.better == "higher":
        return -score.value
    return score.value if score.better == "lower" or score.floor is None else abs(score.value - score.floor)


def _apart(columns: list[Column], alike: dict[tuple[Any, ...], dict[str, Score]]) -> Iterator[str]:
    """What no two columns have alike: with the first thing that differs where another has it in another way, else that it stands alone."""
    told: set[tuple[str, str, str | None]] = set()
    for column in columns:
        for item in column.measured:
            if len(alike[_key(item)]) > 1 or item.name in told:
                continue
            told.add(item.name)
            others = [(other, its) for other in columns if other is not column for its in other.measured if its.name == item.name]
            what = " ".join(word for word in item.name if word)
            yield f"{what}: {_difference((column, item), others[0]) if others else f'only {column.name} has it'}"


def _difference(one: tuple[Column, Measured], other: tuple[Column, Measured]) -> str:
    (column, item), (another, its) = one, other
    facts = (("images", item.score.n, its.score.n), ("real data", item.data[:12], its.data[:12]), ("split", item.against, its.against))
    for what, left, right in facts:
        if left != right:
            return f"{what} {left} in {column.name}, {right} in {another.name}"
    parts = _parts(item.score), _parts(its.score)
    only = [[part for part in own if part not in theirs] for own, theirs in (parts, parts[::-1])]
    return f"{'; '.join(only[0]) or 'nothing more'} in {column.name}, {'; '.join(only[1]) or 'nothing more'} in {another.name}"


def _print(found: Compared) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160)
    if found.rows:
        table = Table(box=None, header_style="bright_black", padding=(0, 2, 0, 0))
        for title in ("", *found.columns, "real-real", "n", "better beyond the noise"):
            table.add_column(title, overflow="fold")
        for row in found.rows:
            cells = [_cell(row.values[name], name == row.lead) if name in row.values else Text("-") for name in found.columns]
            title = " ".join(word for word in (f"{row.title}, {row.group}" if row.group else row.title, row.channel) if word)
            table.add_row(title, *cells, "-" if row.floor is None else f"{row.floor:.4g}", f"{row.n:,}", Text(row.lead, style="bold" if row.lead in found.columns else "bright_black"))
        console.print(table)
    else:
        console.print("nothing was measured alike in two of them")
    if found.apart:
        console.print("\nnot in one table, because it was not measured alike:", style="bold")
        for line in found.apart:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _cell(value: tuple[float, tuple[float, float] | None], leads: bool) -> Any:
    from rich.text import Text

    number, interval = value
    return Text(f"{number:.4g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval is not None else ""), style="bold" if leads else "")
