"""The page of match, split and stack: tables and charts in one HTML file that needs nothing else. Used by those three."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from medgen import __version__
from medgen.prepare.table import Subject
from medgen.report import charts, words
from medgen.report.charts import Series
from medgen.report.page import FOLDER as REPORT_FOLDER
from medgen.report.pictures import Tile

FOLDER = Path(__file__).parent
AGE_BINS = (1, 2, 5, 10)  # years
MOST_BINS = 24


@dataclass(frozen=True)
class Table:
    """Cells as text; a `folded` one opens on a click."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False

    def text(self) -> str:
        """For the terminal, in columns: the first to the left, the others to the right."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        return "\n".join(
            "  " + "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines
        )


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, tables, charts (caption, drawing), the names of their tones, and rows of pictures."""

    title: str
    note: str
    tables: tuple[Table, ...]
    charts: tuple[tuple[str, Markup], ...]
    keys: tuple[tuple[str, str], ...]
    pictures: tuple[tuple[str, tuple[Tile, ...]], ...] = ()


def render(title: str, lead: str, sections: Sequence[Section], table: Path) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    tones = sorted({tone for section in sections for _, tone in section.keys}, key=lambda tone: int(tone.removeprefix("tone")))
    return environment.get_template("page.html").render(
        title=title, lead=lead, sections=sections, table=str(table),
        style=Markup((REPORT_FOLDER / "style.css").read_text()), colours=[(tone, _colour(number)) for number, tone in enumerate(tones)],
        made=words.date(time.time()), version=__version__,
    )  # fmt: skip


def _colour(number: int) -> str:
    """The page's own two first; then hues that stay apart however many there are."""
    return ("var(--first)", "var(--second)")[number] if number < 2 else f"hsl({(number * 137.5 + 10) % 360:.0f} 45% 45%)"


def group_keys(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, f"tone{number}") for number, name in enumerate(names))


def age_charts(panels: Mapping[str, Mapping[str, Sequence[Subject]]], names: Sequence[str]) -> tuple[tuple[str, Markup], ...]:
    """One histogram of ages per panel, with the same bins, a line for each of `names`; none where ages are not known."""
    ages = {panel: {name: [subject.age_years for subject in sides[name] if subject.age_years is not None] for name in names} for panel, sides in panels.items()}
    everyone = [age for sides in ages.values() for side in sides.values() for age in side]
    if not everyone:
        return ()
    edges = _edges(min(everyone), max(everyone))
    return tuple((f"Age, {panel}", charts.line_chart([_steps(name, sides[name], edges, number) for number, name in enumerate(names)],
                                                     "age (years)", "% of the subjects")) for panel, sides in ages.items())  # fmt: skip


def _edges(low: float, high: float) -> np.ndarray:
    width = next((years for years in AGE_BINS if (high - low) / years <= MOST_BINS), AGE_BINS[-1])
    start = np.floor(low / width) * width
    return np.arange(start, high + width + 1e-9, width)


def _steps(name: str, ages: Sequence[float], edges: np.ndarray, number: int) -> Series:
    """The outline of a histogram, from zero to zero."""
    share = 100 * np.histogram(ages, edges)[0] / max(1, len(ages))
    x, y = np.repeat(edges, 2), np.concatenate([[0.0], np.repeat(share, 2), [0.0]])
    return Series(name, x.tolist(), y.tolist(), f"tone{number}", filled=True)
