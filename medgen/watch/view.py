"""The screen of a run: one line per stage, then what failed and why. Pure rendering; called by live.py.

Rich is imported here and only here, so that verbs which show nothing do not pay for it."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from medgen.watch.state import RunState, StageState, TaskState, Word

GLYPHS: dict[Word, tuple[str, str]] = {
    "pending": ("·", "bright_black"),
    "running": ("▶", "cyan"),
    "stalled": ("!", "yellow"),
    "done": ("✔", "green"),
    "failed": ("✘", "red"),
    "interrupted": ("‖", "yellow"),
    "blocked": ("○", "bright_black"),
}
VERDICT_STYLES = {"not started": "bright_black", "running": "cyan", "stopping": "yellow", "done": "green", "failed": "red", "interrupted": "yellow"}
SHOWN_TROUBLES = 4
SHOWN_LINES = 8
BAR_WIDTH, SHORTEST_BAR = 32, 20
WIDE_COLUMNS = 116
LIST_BAR_WIDTH = 12
NUMBER = re.compile(r"\d+")


def render(state: RunState, hint: str | None = None) -> RenderableType:
    """`hint`: one dim line at the end, such as which keys do what."""
    parts: list[RenderableType] = [_header(state), Text(""), _Stages(state)]
    troubles = _troubles(state)
    for trouble in troubles[:SHOWN_TROUBLES]:
        parts += [Text(""), _trouble(trouble)]
    if len(troubles) > SHOWN_TROUBLES:
        parts += [Text(""), Text(f"and {len(troubles) - SHOWN_TROUBLES} more; `medgen watch --once --json` lists all", style="bright_black")]
    footer = [line for line in (_next_step(state), hint) if line]
    if footer:
        parts += [Text(""), *(Text(line, style="bright_black") for line in footer)]
    return Padding(Group(*parts), (1, 2))


def _header(state: RunState) -> RenderableType:
    style = VERDICT_STYLES[state.verdict]
    line = Text.assemble((state.run_id, "bold"), "   ", (f" {state.verdict} ", f"bold reverse {style}"), "   ", no_wrap=True, overflow="ellipsis")
    line.append(duration(state.seconds), "bold")
    line.append("   ")
    line.append(f"{state.device_hours:.2f} {state.device_word}")
    if state.where:
        line.append(f"   {state.where}", "bright_black")
    return line


class _Stages:
    """One row per stage: with bars and aligned columns where there is room, else name, state, share and one line."""

    def __init__(self, state: RunState):
        self.state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - WIDE_COLUMNS
        yield _wide(self.state, min(BAR_WIDTH, SHORTEST_BAR + room)) if room >= 0 else _narrow(self.state)


def _wide(state: RunState, bar_width: int) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("bar", width=bar_width, no_wrap=True, overflow="ellipsis")
    table.add_column("percent", justify="right", no_wrap=True)
    for name in ("progress", "note", "left"):
        table.add_column(name, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for stage in state.stages:
        _, style = GLYPHS[stage.word]
        bar = ProgressBar(total=1.0, completed=stage.fraction, style="grey23", complete_style=style, finished_style=style)
        table.add_row(
            _name(stage), Text(stage.word, style=style), _waits(stage) if _is_waiting(stage) else bar, _share(stage),
            _progress(stage), _note(stage), _left(stage), Text(duration(stage.seconds) if stage.seconds else "", style="bright_black"),
        )  # fmt: skip
    return table


def _narrow(state: RunState) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=True)
    for name in ("stage", "state", "percent"):
        table.add_column(name, no_wrap=True, justify="right" if name == "percent" else "left")
    table.add_column("detail", no_wrap=True, overflow="ellipsis", ratio=1)
    for stage in state.stages:
        _, style = GLYPHS[stage.word]
        parts = [_waits(stage)] if _is_waiting(stage) else [_progress(stage), _note(stage), _left(stage)]
        table.add_row(_name(stage), Text(stage.word, style=style), _share(stage), Text("  ").join(part for part in parts if part))
    return table


def _is_waiting(stage: StageState) -> bool:
    return stage.word in ("pending", "blocked") and not stage.fraction


def _name(stage: StageState) -> Text:
    glyph, style = GLYPHS[stage.word]
    return Text.assemble((glyph, f"bold {style}"), " ", (stage.name, "bright_black" if _is_waiting(stage) else "bold"))


def _share(stage: StageState) -> Text:
    return Text("" if _is_waiting(stage) else percent(stage.fraction), style="green" if stage.word == "done" else "")


def _left(stage: StageState) -> Text:
    """How much longer, or for how long nothing was heard."""
    silent = max((task.age_seconds or 0 for task in stage.tasks if task.word == "stalled"), default=None)
    if silent is not None:
        return Text(f"silent for {duration(silent)}", style="yellow")
    known = stage.word == "running" and stage.eta_seconds is not None
    return Text(f"{duration(stage.eta_seconds or 0)} left" if known else "", style="cyan")


def _waits(stage: StageState) -> Text:
    if not stage.waits_for:
        return Text("next", style="bright_black")
    return Text(f"{'needs' if stage.word == 'blocked' else 'after'} {_listed(stage.waits_for)}", style="bright_black")


def _progress(stage: StageState) -> Text:
    """`420/900 steps` or `5/16 shards`."""
    if len(stage.tasks) > 1:
        return Text(f"{stage.counts.get('done', 0)}/{len(stage.tasks)} shards", style="bright_black" if _is_waiting(stage) else "")
    task = stage.tasks[0]
    if task.total:
        return Text(f"{task.total if task.word == 'done' else task.step}/{task.total} {task.unit}")
    return Text("starting" if task.word == "running" else "", style="bright_black")


def _note(stage: StageState) -> Text:
    """Of a single task its loss and attempt; of shards how many are in which state."""
    text = Text()
    if len(stage.tasks) > 1:
        for word in ("running", "stalled", "failed", "interrupted"):
            if stage.counts.get(word):
                text.append("  " if text else "").append(f"{stage.counts[word]} {word}", GLYPHS[word][1])
        return text
    task = stage.tasks[0]
    if task.loss is not None:
        text.append("loss ", "bright_black").append(f"{task.loss:.4g}")
    if task.attempt and task.word != "done":
        text.append("  " if text else "").append(f"attempt {task.attempt + 1}", "bright_black")
    return text


def _troubles(state: RunState) -> list[tuple[StageState, list[TaskState]]]:
    """Failed and silent tasks; shards of a stage with the same cause, numbers aside, together."""
    groups: dict[tuple[str, str, str], tuple[StageState, list[TaskState]]] = {}
    for stage in state.stages:
        for task in stage.tasks:
            if task.word in ("failed", "stalled"):
                same = NUMBER.sub("#", task.cause or "")
                groups.setdefault((stage.name, task.word, same), (stage, []))[1].append(task)
    return list(groups.values())


def _trouble(trouble: tuple[StageState, list[TaskState]]) -> RenderableType:
    """What happened, the guilty log, its last lines."""
    stage, tasks = trouble
    task = tasks[0]
    glyph, style = GLYPHS[task.word]
    where = stage.name
    if len(stage.tasks) > 1:
        numbers = ", ".join(str(item.shard) for item in tasks[:6]) + (f" and {len(tasks) - 6} more" if len(tasks) > 6 else "")
        where += f" shard{'s' if len(tasks) > 1 else ''} {numbers}"
    cause = task.cause or task.word
    lines: list[RenderableType] = [Text.assemble((f"{glyph} {where}", f"bold {style}"), "  ", cause)]
    if task.log:
        lines.append(Text(f"  {shortened(task.log)}", style="bright_black", no_wrap=True, overflow="fold"))
    shown = [line for line in task.last_lines if line.strip() not in cause and cause not in line]  # the last words are often the cause
    lines += [Text.assemble(("  │ ", style), (line, "bright_black"), no_wrap=True, overflow="ellipsis") for line in shown[-SHOWN_LINES:]]
    return Group(*lines)


def _next_step(state: RunState) -> str | None:
    if state.verdict == "stopping":
        return "Waiting for the running tasks to save. A second Ctrl-C kills them: they go on from their last checkpoint."
    if state.verdict in ("failed", "interrupted"):
        return "The same submit command goes on from here: what is done stays done."
    if state.verdict == "done" and any(stage.kind == "report" for stage in state.stages):
        return f"Report: {shortened(str(Path(state.path) / 'report' / 'index.html'))}"
    return None


def runs_table(states: list[RunState], now: float) -> RenderableType:
    """One row per run; the folder last, because it may be long."""
    table = Table(box=None, header_style="bright_black", padding=(0, 2, 0, 0), expand=True)
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("progress", no_wrap=True)
    table.add_column("last change", no_wrap=True, justify="right")
    table.add_column("device-hours", no_wrap=True, justify="right")
    table.add_column("folder", no_wrap=True, overflow="ellipsis", ratio=1)
    for state in states:
        style = VERDICT_STYLES[state.verdict]
        filled = int(state.fraction * LIST_BAR_WIDTH + 1e-9)
        bar = Text.assemble(("━" * filled, style), ("━" * (LIST_BAR_WIDTH - filled), "grey23"), f" {percent(state.fraction):>4}")
        table.add_row(
            Text(state.run_id, style="bold"), Text(state.verdict, style=style), bar, f"{duration(now - state.changed)} ago" if state.changed else "-",
            f"{state.device_hours:.2f}", Text(shortened(state.path), style="bright_black"),
        )  # fmt: skip
    return table


def _listed(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def percent(fraction: float) -> str:
    """Rounded down: 100% only when it is complete."""
    return f"{int(fraction * 100 + 1e-9)}%"


def duration(seconds: float) -> str:
    """`42s`, `3m 05s`, `2h 10m`, `3d 4h`: two units at most."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def shortened(path: str) -> str:
    """Relative to the current folder where that is shorter."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
