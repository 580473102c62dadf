"""The screen of a run: its stages as a graph, one line each, then what failed and why. Pure rendering; called by live.py.

Rich is imported here and only here, so that verbs which show nothing do not pay for it."""

from __future__ import annotations

import re
import time
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from medgen.watch.graph import rails
from medgen.watch.judge import Word
from medgen.watch.state import TROUBLED, RunState, StageState, TaskState
from medgen.watch.words import clock, duration, percent

GLYPHS: dict[Word, tuple[str, str]] = {
    "pending": ("·", "bright_black"),
    "queued": ("◦", "blue"),
    "held": ("■", "yellow"),
    "running": ("▶", "cyan"),
    "stalled": ("!", "yellow"),
    "lost": ("?", "red"),
    "suspended": ("‖", "yellow"),
    "requeued": ("↻", "cyan"),
    "done": ("✔", "green"),
    "failed": ("✘", "red"),
    "interrupted": ("‖", "yellow"),
    "blocked": ("○", "bright_black"),
}
NOTED: tuple[Word, ...] = ("running", "stalled", "lost", "suspended", "failed", "interrupted")
WAITING: tuple[Word, ...] = ("pending", "queued", "held", "requeued", "blocked")
VERDICT_STYLES = {
    "not started": "bright_black", "queued": "blue", "running": "cyan", "stopping": "yellow", "done": "green", "failed": "red", "interrupted": "yellow",
}  # fmt: skip
SHOWN_TROUBLES, SHOWN_SETBACKS = 4, 3
SHOWN_LINES = 8
NARROW_COLUMNS = 72
BAR_WIDTH, SHORTEST_BAR, NARROW_BAR = 44, 12, 8
LIST_BAR_WIDTH = 12
DIM = "bright_black"
SILENT_SECONDS = 60
NUMBER = re.compile(r"\d+")


def render(state: RunState, hint: str | None = None) -> RenderableType:
    """`hint`: one dim line at the end, such as which keys do what."""
    now = time.time()
    parts: list[RenderableType] = [_Header(state)]
    if state.silence:
        parts.append(Text(f"{state.silence}; what it told before is shown", style="yellow"))
    parts += [Text(""), _Stages(state, now)]
    setbacks = _notes(state) + _setbacks(state)
    if setbacks:
        parts += [Text(""), *setbacks]
    troubles = _troubles(state)
    for trouble in troubles[:SHOWN_TROUBLES]:
        parts += [Text(""), _trouble(trouble)]
    if len(troubles) > SHOWN_TROUBLES:
        parts += [Text(""), Text(f"and {len(troubles) - SHOWN_TROUBLES} more; `medgen watch --once --json` lists all", style=DIM)]
    footer = [line for line in (_next_step(state), hint) if line]
    if footer:
        parts += [Text(""), *(Text(line, style=DIM) for line in footer)]
    return Padding(Group(*parts), (1, 2))


class _Header:
    """Run, verdict, time and cost; who runs it behind them, or below where there is no room."""

    def __init__(self, state: RunState):
        self.state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        state = self.state
        style = VERDICT_STYLES[state.verdict]
        line = Text.assemble((state.run_id, "bold"), "   ", (f" {state.verdict} ", f"bold reverse {style}"), "   ", no_wrap=True, overflow="ellipsis")
        line.append(duration(state.seconds), "bold")
        line.append("   ")
        line.append(f"{state.device_hours:.2f} {state.device_word}")
        where = Text(state.where or "", style=DIM, no_wrap=True, overflow="ellipsis")
        if line.cell_len + 3 + where.cell_len <= options.max_width:
            yield line.append("   ").append(where)
        else:
            yield line
            yield where


class _Stages:
    """A line per stage: where it stands in the graph, its state, and a bar with numbers, or what it waits for."""

    def __init__(self, state: RunState, now: float):
        self.stages = state.stages
        self.now = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        graph = rails({stage.name: stage.needs for stage in self.stages})
        names = [_name(stage, graph[stage.name].node) for stage in self.stages]
        times = [Text(duration(stage.seconds) if stage.seconds else "", style=DIM) for stage in self.stages]
        taken = sum(max(cell.cell_len for cell in cells) + 2 for cells in (names, [Text(stage.word) for stage in self.stages], times))
        widths = _widths(self.stages)
        bar_width = min(BAR_WIDTH, options.max_width - taken - sum(widths) - 14)
        in_columns = bar_width >= SHORTEST_BAR
        if not in_columns:
            bar_width = 0 if options.max_width < NARROW_COLUMNS else SHORTEST_BAR if options.max_width > 100 else NARROW_BAR
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column("stage", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("detail", no_wrap=True, overflow="ellipsis", ratio=1)
        if in_columns:
            table.add_column("time", no_wrap=True, justify="right")
        for stage, name, spent in zip(self.stages, names, times, strict=True):
            if _is_waiting(stage):
                detail = self._waits(stage)
            else:
                detail = self._in_columns(stage, bar_width, widths) if in_columns else self._in_brief(stage, bar_width)
            table.add_row(name, Text(stage.word, style=GLYPHS[stage.word][1]), detail, *([spent] if in_columns else []))
            behind = self._behind(stage)
            if behind:
                table.add_row(Text(graph[stage.name].below, style=DIM), "", Text(behind, style=DIM))
        yield table

    def _waits(self, stage: StageState) -> Text:
        """What it waits for; of a job in Slurm's queue the reason, and when Slurm expects it to start."""
        if stage.waits_for and stage.word in ("pending", "queued", "blocked"):
            return Text(f"{'needs' if stage.word == 'blocked' else 'after'} {_listed(stage.waits_for)}", style=DIM)
        if stage.word == "pending":
            return Text("next", style=DIM)
        held = next((task.cause for task in stage.tasks if task.word == "held"), None) if stage.word == "held" else None
        parts = [held or self._begins(stage), stage.reason if not held else None]
        return Text("  ").join(Text(part, style=style) for part, style in zip(parts, ("", DIM), strict=True) if part)

    def _begins(self, stage: StageState) -> str | None:
        if stage.starts is None:
            return None
        return f"starts {'again ' if stage.word == 'requeued' else ''}about {clock(stage.starts, self.now)}"

    def _behind(self, stage: StageState) -> str | None:
        """Under a stage that has begun: why the rest of it waits."""
        waiting = sum(stage.counts.get(word, 0) for word in ("queued", "requeued", "held"))
        if _is_waiting(stage) or not waiting:
            return None
        if len(stage.tasks) == 1:
            return ", ".join(part for part in (self._begins(stage), stage.reason) if part)
        begins = f"next about {clock(stage.starts, self.now)}" if stage.starts is not None else None
        return ", ".join(part for part in (f"{waiting} queued", begins, stage.reason) if part)

    def _in_columns(self, stage: StageState, bar_width: int, widths: tuple[int, int, int]) -> Text:
        """Bar, percent, progress, note, time left."""
        line = _bar(stage, bar_width)
        for part, width in zip((_progress(stage), _note(stage), _left(stage)), widths, strict=True):
            line.append("  ").append(part).append(" " * (width - part.cell_len))
        return line

    def _in_brief(self, stage: StageState, bar_width: int) -> Text:
        """The same without columns; what matters most comes first, the rest may be cut off."""
        parts = (_bar(stage, bar_width), _progress(stage, brief=True), _left(stage), _note(stage))
        return Text("  ").join(part for part in parts if part)


def _bar(stage: StageState, width: int) -> Text:
    """`width` 0: only the percent."""
    filled = min(width, int(stage.fraction * width + 1e-9))
    share = Text(f"{percent(stage.fraction):>4}", style="green" if stage.word == "done" else "")
    if not width:
        return share
    return Text.assemble(("━" * filled, GLYPHS[stage.word][1]), ("━" * (width - filled), "grey23"), "  ", share)


def _widths(stages: list[StageState]) -> tuple[int, int, int]:
    shown = [stage for stage in stages if not _is_waiting(stage)]
    progress, note, left = (max((cell(stage).cell_len for stage in shown), default=0) for cell in (_progress, _note, _left))
    return progress, note, left


def _is_waiting(stage: StageState) -> bool:
    return stage.word in WAITING and not stage.fraction


def _name(stage: StageState, rail: str) -> Text:
    glyph, style = GLYPHS[stage.word]
    before, _, after = rail.partition("●")
    return Text.assemble((before, DIM), (glyph, f"bold {style}"), (after, DIM), " ", (stage.name, DIM if _is_waiting(stage) else "bold"))


def _left(stage: StageState) -> Text:
    """How much longer, or for how long nothing was heard."""
    silent = max((task.age_seconds or 0 for task in stage.tasks if task.word in ("stalled", "lost")), default=0)
    if silent >= SILENT_SECONDS:
        return Text(f"silent {duration(silent)}", style="yellow")
    known = stage.word == "running" and stage.eta_seconds is not None
    return Text(f"{duration(stage.eta_seconds or 0)} left" if known else "", style="cyan")


def _progress(stage: StageState, brief: bool = False) -> Text:
    """`420/900 steps` or `5/16 shards`; `brief`: without the unit of a single task."""
    if len(stage.tasks) > 1:
        return Text(f"{stage.counts.get('done', 0)}/{len(stage.tasks)} shards", style=DIM if _is_waiting(stage) else "")
    task = stage.tasks[0]
    if task.total:
        return Text(f"{task.total if task.word == 'done' else task.step}/{task.total}" + ("" if brief else f" {task.unit}"))
    began = task.age_seconds is not None  # a command tells no steps
    return Text("starting" if task.word == "running" and not began else "", style=DIM)


def _note(stage: StageState) -> Text:
    """Of a single task its loss and attempt; of shards how many are in which state."""
    text = Text()
    if len(stage.tasks) > 1:
        for word in NOTED:
            if stage.counts.get(word) and stage.word != "done":
                text.append("  " if text else "").append(f"{stage.counts[word]} {word}", GLYPHS[word][1])
        return text
    task = stage.tasks[0]
    if task.loss is not None:
        text.append("loss ", DIM).append(f"{task.loss:.4g}")
    if task.attempt and task.word != "done":
        text.append("  " if text else "").append(f"try {task.attempt + 1}", DIM)
    return text


def _notes(state: RunState) -> list[Text]:
    """A line for what is not well though it runs."""
    noted = [(stage, task) for stage in state.stages for task in stage.tasks if task.note]
    return [
        Text.assemble(("! ", "yellow"), _where(stage, [task]), "  ", (task.note or "", "yellow"), no_wrap=True, overflow="ellipsis")
        for stage, task in noted[:SHOWN_SETBACKS]
    ]


def _setbacks(state: RunState) -> list[Text]:
    """A line for what failed and is tried again; shards with the same cause, numbers aside, together."""
    groups: dict[tuple[str, str], tuple[StageState, list[TaskState]]] = {}
    for stage in state.stages:
        for task in stage.tasks:
            if task.last_cause and task.word in ("running", "requeued", "queued", "suspended"):
                groups.setdefault((stage.name, NUMBER.sub("#", task.last_cause)), (stage, []))[1].append(task)
    lines = []
    for stage, tasks in list(groups.values())[:SHOWN_SETBACKS]:
        left = tasks[0].tries_left
        tries = "" if left is None else "  (its last try)" if left <= 1 else f"  ({left} tries left)"
        line = Text.assemble(("↻ ", "cyan"), _where(stage, tasks), "  ", (f"failed before: {tasks[0].last_cause}", DIM), no_wrap=True, overflow="ellipsis")
        lines.append(line.append(tries, "yellow"))
    return lines


def _where(stage: StageState, tasks: list[TaskState]) -> str:
    """`masks shards 3, 4 and 2 more`."""
    if len(stage.tasks) == 1:
        return stage.name
    numbers = ", ".join(str(item.shard) for item in tasks[:6]) + (f" and {len(tasks) - 6} more" if len(tasks) > 6 else "")
    return f"{stage.name} shard{'s' if len(tasks) > 1 else ''} {numbers}"


def _troubles(state: RunState) -> list[tuple[StageState, list[TaskState]]]:
    """Failed, interrupted, silent and lost tasks; shards of a stage with the same cause, numbers aside, together."""
    groups: dict[tuple[str, str, str], tuple[StageState, list[TaskState]]] = {}
    for stage in state.stages:
        for task in stage.tasks:
            if task.word in TROUBLED or (task.word == "interrupted" and task.cause):
                same = NUMBER.sub("#", task.cause or "")
                groups.setdefault((stage.name, task.word, same), (stage, []))[1].append(task)
    return list(groups.values())


def _trouble(trouble: tuple[StageState, list[TaskState]]) -> RenderableType:
    """What happened, the guilty log, its last lines."""
    stage, tasks = trouble
    task = tasks[0]
    glyph, style = GLYPHS[task.word]
    cause = task.cause or task.word
    lines: list[RenderableType] = [Text.assemble((f"{glyph} {_where(stage, tasks)}", f"bold {style}"), "  ", cause)]
    if task.log:
        lines.append(Text(f"  {shortened(task.log)}", style=DIM, no_wrap=True, overflow="fold"))
    shown = [line for line in task.last_lines if line.strip() not in cause and cause not in line]  # the last words are often the cause
    lines += [Text.assemble(("  │ ", style), (line, DIM), no_wrap=True, overflow="ellipsis") for line in shown[-SHOWN_LINES:]]
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
    table = Table(box=None, header_style=DIM, padding=(0, 2, 0, 0), expand=True)
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
            f"{state.device_hours:.2f}", Text(shortened(state.path), style=DIM),
        )  # fmt: skip
    return table


def _listed(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def shortened(path: str) -> str:
    """Relative to the current folder where that is shorter."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
