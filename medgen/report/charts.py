"""Small SVG charts whose colours come from the page's CSS, so that they follow light, dark and print. Used by build.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 12, 40
LOG_FROM_RATIO = 10  # a curve that spans more than this is drawn on a logarithmic axis


@dataclass(frozen=True)
class Series:
    """One line. `tone` is a CSS class: real, synthetic, first, second; `faint` lines lie behind; `filled` down to zero."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str
    faint: bool = False
    filled: bool = False


class Axis:
    """Maps values to pixels and finds round tick values."""

    def __init__(self, low: float, high: float, start: float, stop: float, logarithmic: bool = False):
        if not high > low:
            low, high = low - 0.5, high + 0.5
        self.logarithmic = logarithmic
        self.low, self.high = (math.log10(low), math.log10(high)) if logarithmic else (low, high)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        place = math.log10(value) if self.logarithmic else value
        return round(self.start + (place - self.low) / (self.high - self.low) * (self.stop - self.start), 2)

    def ticks(self, count: int) -> list[float]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        low, high = (10**self.low, 10**self.high) if self.logarithmic else (self.low, self.high)
        if self.logarithmic:
            decades = self.high - self.low
            found = LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)).tick_values(low, high)
        else:
            found = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)
        slack = 1e-9 * (high - low)
        return [float(tick) for tick in found if low - slack <= tick <= high + slack]


def line_chart(series: Sequence[Series], x_label: str, y_label: str, allow_logarithmic: bool = False) -> Markup:
    """An SVG line chart; empty markup if there is nothing to draw."""
    drawn = [item for item in series if len(item.x) > 0]
    if not drawn:
        return Markup("")
    values = [float(value) for item in drawn for value in item.y]
    positions = [float(value) for item in drawn for value in item.x]
    low, high = min(values), max(values)
    logarithmic = allow_logarithmic and low > 0 and high / low > LOG_FROM_RATIO
    if any(item.filled for item in drawn) or (allow_logarithmic and not logarithmic and low >= 0):
        low = 0.0
    margin = 1.1 if logarithmic else 1
    x_axis = Axis(min(positions), max(positions), LEFT, WIDTH - RIGHT)
    y_axis = Axis(low / margin, high * margin if logarithmic else high + 0.05 * (high - low), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [*_grid(x_axis, y_axis), *(_path(item, x_axis, y_axis) for item in sorted(drawn, key=lambda item: not item.faint)),
             _text(WIDTH - RIGHT, HEIGHT - 6, x_label, "end", "label"), _turned(y_label + (" (log scale)" if logarithmic else ""))]
    return _svg(parts, f"{y_label} against {x_label}: {', '.join(item.name for item in drawn)}")


def bar_chart(values: Sequence[float], names: Sequence[str], x_label: str, y_label: str) -> Markup:
    """An SVG bar chart of non-negative values."""
    y_axis = Axis(0, max(values) * 1.05, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(values)
    parts = _grid(None, y_axis)
    for number, (value, name) in enumerate(zip(values, names, strict=True)):
        left, top = round(LEFT + (number + 0.15) * step, 2), y_axis(value)
        parts.append(f'<rect class="bar" x="{left}" y="{top}" width="{round(0.7 * step, 2)}" height="{round(HEIGHT - BOTTOM - top, 2)}"/>')
        parts.append(_text(LEFT + (number + 0.5) * step, HEIGHT - BOTTOM + 15, name, "middle", "tick"))
    parts += [_text(WIDTH - RIGHT, HEIGHT - 6, x_label, "end", "label"), _turned(y_label)]
    return _svg(parts, f"{y_label} by {x_label}")


def gauge(value: float, floor: float | None, interval: tuple[float, float] | None, span: tuple[float, float] | None = None) -> Markup:
    """A value as a dot, its interval as a bar and the floor as a tick on one line. `span`: its ends, for lines that are compared; else it starts at 0."""
    numbers = [value, floor if floor is not None else 0.0, *(interval or ())]
    axis = Axis(min(0.0, *numbers), max(1e-12, *numbers) * 1.12, 2, 158) if span is None else Axis(*span, 6, 154)
    parts = ['<line class="track" x1="2" x2="158" y1="11" y2="11"/>']
    if interval is not None:
        parts.append(f'<line class="interval" x1="{axis(interval[0])}" x2="{axis(interval[1])}" y1="11" y2="11"/>')
    if floor is not None:
        parts.append(f'<line class="floor" x1="{axis(floor)}" x2="{axis(floor)}" y1="3" y2="19"/>')
    parts.append(f'<circle class="value" cx="{axis(value)}" cy="11" r="4.5"/>')
    return Markup(f'<svg class="gauge" viewBox="0 0 160 22" aria-hidden="true">{"".join(parts)}</svg>')


def _grid(x_axis: Axis | None, y_axis: Axis) -> list[str]:
    parts: list[str] = []
    for tick in y_axis.ticks(5):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_axis(tick)}" y2="{y_axis(tick)}"/>')
        parts.append(_text(LEFT - 8, y_axis(tick) + 4, f"{tick:.4g}", "end", "tick"))
    if x_axis is None:
        return parts
    for tick in x_axis.ticks(6):
        parts.append(_text(x_axis(tick), HEIGHT - BOTTOM + 15, f"{tick:,.6g}", "middle", "tick"))
    return parts


def _path(item: Series, x_axis: Axis, y_axis: Axis) -> str:
    points = [f"{x_axis(float(x))},{y_axis(float(y))}" for x, y in zip(item.x, item.y, strict=True)]
    faint = " faint" if item.faint else ""
    line = f'<polyline class="line {item.tone}{faint}" points="{" ".join(points)}"><title>{escape(item.name)}</title></polyline>'
    if len(points) == 1:
        line = f'<circle class="dot {item.tone}" cx="{x_axis(item.x[0])}" cy="{y_axis(item.y[0])}" r="3"/>'
    if not item.filled:
        return line
    base = y_axis(0.0)
    corners = [f"{x_axis(float(item.x[0]))},{base}", *points, f"{x_axis(float(item.x[-1]))},{base}"]
    return f'<polygon class="area {item.tone}" points="{" ".join(corners)}"/>{line}'


def _text(x: float, y: float, text: str, anchor: str, css: str) -> str:
    return f'<text class="{css}" x="{round(x, 2)}" y="{round(y, 2)}" text-anchor="{anchor}">{escape(text)}</text>'


def _turned(text: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return f'<text class="label" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(text)}</text>'


def _svg(parts: list[str], title: str) -> Markup:
    return Markup(f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>')
