"""The points of a sweep side by side: what was varied, how far each is, what came of it. Called by `medgen ls --sweep`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from medgen import files, plan
from medgen.errors import Exit, InputError
from medgen.evaluate.scores import from_json
from medgen.rundir import RunDir, all_runs
from medgen.watch.state import RunState, read_state

SEED_OF_PROTOCOL = re.compile(r"; seed \d+$")  # another seed is another point, not another protocol


@dataclass(frozen=True)
class Score:
    value: float
    ci: tuple[float, float] | None
    floor: float | None
    protocol: str


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep. `val_loss`: stage -> the lowest so far; `scores`: column -> score."""

    run_id: str
    sweep: str
    values: dict[str, Any]
    verdict: str
    fraction: float
    device_hours: float
    val_loss: dict[str, float]
    scores: dict[str, Score]


def list_sweeps(name: str | None, as_json: bool = False) -> Exit:
    """A table per sweep, or of the one called `name`. Raises InputError if there is none."""
    sweeps: dict[str, list[SweepPoint]] = {}
    for point in _points():
        sweeps.setdefault(point.sweep, []).append(point)
    if name is not None and name not in sweeps:
        raise InputError(f"no sweep called {name!r}; the sweeps here: {', '.join(sweeps) or 'none; write sweep: {key: [values]} into a spec'}")
    chosen = {key: points for key, points in sweeps.items() if name in (None, key)}
    if as_json:
        print(json.dumps({key: [asdict(point) for point in points] for key, points in chosen.items()}, indent=1))
    elif not chosen:
        print("no sweeps here yet; write sweep: {key: [values]} into a spec and submit it")
    else:
        _print(chosen)
    return Exit.DONE


def _points() -> Iterator[SweepPoint]:
    for run in all_runs():
        try:
            values = files.read_json(run.manifest)["sweep"]
            if values:
                yield _point(run, read_state(run), values)
        except (OSError, ValueError, KeyError):
            continue  # made by hand or half made: `medgen ls` shows it
        except InputError as error:
            print(error, file=sys.stderr)


def _point(run: RunDir, state: RunState, values: dict[str, Any]) -> SweepPoint:
    planned = plan.read(run)
    val_loss = {stage.name: lowest for stage in planned.stages if stage.kind == "train" and (lowest := _lowest_val_loss(run, stage.name)) is not None}
    scores = {}
    for stage in planned.stages:
        if stage.kind == "evaluate" and run.is_done(stage.name, 0, stage.tasks[0].hash):
            for score in from_json(files.read_json(run.metrics(stage.name))["scores"]):
                if score.is_headline:
                    column = f"{stage.name}: {score.metric} {score.channel}".rstrip()
                    scores[column] = Score(score.value, score.ci, score.floor, SEED_OF_PROTOCOL.sub("", score.protocol))
    return SweepPoint(run.run_id, state.name, values, state.verdict, state.fraction, state.device_hours, val_loss, scores)


def _lowest_val_loss(run: RunDir, stage: str) -> float | None:
    losses = []
    try:
        for line in run.training_log(stage).read_text().splitlines():
            if '"val_loss"' in line:
                losses.append(float(json.loads(line)["val_loss"]))
    except (OSError, ValueError):  # not there yet, or its last line is being written
        pass
    return min(losses, default=None)


def _print(sweeps: dict[str, list[SweepPoint]]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160)
    for name, points in sweeps.items():
        done = sum(point.verdict == "done" for point in points)
        console.print(Text.assemble((name, "bold"), f"   {done} of {len(points)} points done, {sum(point.device_hours for point in points):.2f} device-hours"))
        for table in _tables(points):
            console.print(table)
        console.print()


def _tables(points: list[SweepPoint]) -> Iterator[Any]:
    """Scores of different protocols never share a table: a point of another protocol starts another one."""
    groups: list[tuple[dict[str, str], list[SweepPoint]]] = []
    for point in sorted(points, key=lambda item: [_sortable(value) for value in item.values.values()]):
        protocols = {column: score.protocol for column, score in point.scores.items()}
        for known, members in groups:
            if all(known.get(column, protocol) == protocol for column, protocol in protocols.items()):
                known.update(protocols)
                members.append(point)
                break
        else:
            groups.append((protocols, [point]))
    for _, members in groups:
        yield _table(members)


def _table(points: list[SweepPoint]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from medgen.watch.view import VERDICT_STYLES, percent

    table = Table(box=None, header_style="bright_black", padding=(0, 2, 0, 0))
    keys = list(dict.fromkeys(key for point in points for key in point.values))
    losses = list(dict.fromkeys(stage for point in points for stage in point.val_loss))
    columns = list(dict.fromkeys(column for point in points for column in point.scores))
    for title in [*_short(keys), "state", "", *(f"{stage}: val loss" for stage in losses), *columns]:
        table.add_column(title)
    table.add_column("run", no_wrap=True)
    for point in points:
        style = VERDICT_STYLES[point.verdict]
        table.add_row(
            *(Text(_shown(point.values[key]) if key in point.values else "-", style="bold") for key in keys),
            Text(point.verdict, style=style), percent(point.fraction),
            *(f"{point.val_loss[stage]:.4g}" if stage in point.val_loss else "-" for stage in losses),
            *(_score(point.scores[column]) if column in point.scores else "-" for column in columns),
            Text(point.run_id, style="bright_black"),
        )  # fmt: skip
    floors = {column: next((f"{point.scores[column].floor:.4g}" for point in points if column in point.scores and point.scores[column].floor is not None), "-") for column in columns}
    if columns:
        table.add_row(*["" for _ in keys[1:]], Text("real against real", style="bright_black"), "", "", *("" for _ in losses), *(Text(floors[column], style="bright_black") for column in columns), "")
    return table


def _short(keys: list[str]) -> list[str]:
    """The last words of the keys that tell them apart."""
    for words in range(1, 6):
        short = [".".join(key.split(".")[-words:]) for key in keys]
        if len(set(short)) == len(keys):
            return short
    return keys


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _score(score: Score) -> str:
    interval = f" [{score.ci[0]:.3g}, {score.ci[1]:.3g}]" if score.ci else ""
    return f"{score.value:.4g}{interval}"


def _sortable(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, _shown(value))
