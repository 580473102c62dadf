"""The points of a sweep side by side: what was varied, how far each is, what came of it. Called by `medgen ls --sweep` and study.py."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from medgen import commits, files, plan
from medgen.errors import Exit, InputError
from medgen.evaluate.scores import from_json
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir, all_runs
from medgen.watch.state import RunState, read_state

SEED_OF_PROTOCOL = re.compile(r"; seed \d+$")  # another seed is another point, not another protocol


@dataclass(frozen=True)
class Score:
    """`better`: lower, higher, or closer to floor; `split`: of the real data that it was measured on."""

    value: float
    ci: tuple[float, float] | None
    floor: float | None
    unit: str
    better: str
    split: str
    protocol: str


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep. `selection`: what checkpoints are selected by on the val split, of the best one of the last phase so far;
    `scores`: what evaluate stages say. Both by column: the stage and the metric."""

    run_id: str
    sweep: str
    values: dict[str, Any]
    verdict: str
    fraction: float
    device_hours: float
    selection: dict[str, Score]
    scores: dict[str, Score]


def list_sweeps(name: str | None, as_json: bool = False) -> Exit:
    """A table per sweep, or of the one called `name`. Raises InputError if there is none."""
    chosen = all_points() if name is None else {name: points_of(name)}
    if as_json:
        print(json.dumps({key: [asdict(point) for point in points] for key, points in chosen.items()}, indent=1))
    elif not chosen:
        print("no sweeps here yet; write sweep: {key: [values]} into a spec and submit it")
    else:
        _print(chosen)
    return Exit.DONE


def all_points() -> dict[str, list[SweepPoint]]:
    """Of every sweep by its name, ordered by their values."""
    sweeps: dict[str, list[SweepPoint]] = {}
    for point in sorted(_points(), key=lambda item: [sortable(value) for value in item.values.values()]):
        sweeps.setdefault(point.sweep, []).append(point)
    return sweeps


def points_of(name: str) -> list[SweepPoint]:
    """Raises InputError if there is no such sweep."""
    sweeps = all_points()
    if name not in sweeps:
        raise InputError(f"no sweep called {name!r}; the sweeps here: {', '.join(sweeps) or 'none; write sweep: {key: [values]} into a spec'}")
    return sweeps[name]


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
    selection: dict[str, Score] = {}
    scores: dict[str, Score] = {}
    for stage in planned.stages:
        if stage.kind == "train":
            selection |= {f"{stage.name}: {metric}": score for metric, score in _selection(run, planned, stage.name).items()}
        elif (scored := _scored_by(planned, stage)) is not None and run.is_done(stage.name, 0, stage.tasks[0].hash):
            scores |= {f"{scored}: {metric}": score for metric, score in _evaluated(run, scored).items()}
    return SweepPoint(run.run_id, state.name, values, state.verdict, state.fraction, state.device_hours, selection, scores)


def _scored_by(planned: Plan, stage: PlannedStage) -> str | None:
    """The stage whose scores this one writes: its own, or those of the trials that it collects; None if it writes none."""
    if stage.kind == "evaluate":
        return stage.name
    of = planned.stage(stage.settings["of"]) if stage.kind == "collect" else None
    return of.name if of is not None and of.kind != "generate" else None


def _selection(run: RunDir, planned: Plan, stage: str) -> dict[str, Score]:
    """The metrics of the newest checkpoint that has any, which name the phase: what was reached at another size is not comparable."""
    found = commits.committed(run.checkpoints(stage))
    scored = [{name: facts for name, facts in item.metrics.items() if not name.startswith(commits.LAST)} for item in found]
    newest = next((metrics for metrics in scored if metrics), {})
    protocol = f"val split of data {files.sha256_json(planned.data)[:8]}, the best of the checkpoints"
    best = commits.best(found)
    return {name: Score(float(best[name].metrics[name]["value"]), None, None, "", newest[name]["better"], "val", protocol) for name in newest}


def _evaluated(run: RunDir, stage: str) -> dict[str, Score]:
    record = files.read_json(run.metrics(stage))
    return {
        f"{score.metric} {score.channel}".rstrip(): Score(score.value, score.ci, score.floor, score.unit, score.better, record["against"], SEED_OF_PROTOCOL.sub("", score.protocol))
        for score in from_json(record["scores"])
        if score.is_headline
    }


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
    for point in points:
        protocols = {column: score.protocol for column, score in _columns_of(point).items()}
        for known, members in groups:
            if all(known.get(column, protocol) == protocol for column, protocol in protocols.items()):
                known.update(protocols)
                members.append(point)
                break
        else:
            groups.append((protocols, [point]))
    for _, members in groups:
        yield _table(members)


def _columns_of(point: SweepPoint) -> dict[str, Score]:
    return {**point.selection, **point.scores}


def _table(points: list[SweepPoint]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from medgen.watch.view import VERDICT_STYLES, percent

    table = Table(box=None, header_style="bright_black", padding=(0, 2, 0, 0))
    keys = list(dict.fromkeys(key for point in points for key in point.values))
    columns = list(dict.fromkeys([*(column for point in points for column in point.selection), *(column for point in points for column in point.scores)]))
    for title in [*short(keys), "state", "", *columns]:
        table.add_column(title)
    table.add_column("run", no_wrap=True)
    for point in points:
        style = VERDICT_STYLES[point.verdict]
        table.add_row(
            *(Text(shown(point.values[key]) if key in point.values else "-", style="bold") for key in keys),
            Text(point.verdict, style=style), percent(point.fraction),
            *(_score(_columns_of(point)[column]) if column in _columns_of(point) else "-" for column in columns),
            Text(point.run_id, style="bright_black"),
        )  # fmt: skip
    floors = {column: score.floor for point in points for column, score in point.scores.items() if score.floor is not None}
    if floors:
        shown_floors = (Text(f"{floors[column]:.4g}" if column in floors else "", style="bright_black") for column in columns)
        table.add_row(*["" for _ in keys[1:]], Text("real against real", style="bright_black"), "", "", *shown_floors, "")
    return table


def short(keys: list[str]) -> list[str]:
    """The last words of the keys that tell them apart."""
    for words in range(1, 6):
        short = [".".join(key.split(".")[-words:]) for key in keys]
        if len(set(short)) == len(keys):
            return short
    return keys


def shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _score(score: Score) -> str:
    interval = f" [{score.ci[0]:.3g}, {score.ci[1]:.3g}]" if score.ci else ""
    return f"{score.value:.4g}{interval}"


def sortable(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (0, float(value), "")
    return (1, 0.0, shown(value))
