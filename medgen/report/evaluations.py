"""What one metrics.json says, as tables and charts of a page: scores by question, by class or arm, curves, notes. Used by build.py and folder_page.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from medgen.evaluate import scores
from medgen.evaluate.scores import Meaning, Score
from medgen.report import charts, topics, words
from medgen.report.charts import Series, line_chart

NOTHING = "-"
LONG_BREAKDOWN = 8  # rows from which the tables by class are folded
COMPARISON_HEADS = ("Real with real (floor)", "Real with synthetic", "Synthetic with synthetic")
CURVE_LABELS = {
    "intensity": ("Grey values", "grey value in the window", "share of foreground pixels"),
    "spectrum": ("Power spectrum", "spatial frequency (cycles per pixel)", "log10 power"),
    "mask_area": ("Mask area", "area (% of the slice)", "share of masks"),
}


@dataclass(frozen=True)
class ScoreRow:
    """One line of a table of scores, formatted."""

    score: Score
    meaning: Meaning
    value: str
    floor: str
    interval: str
    against_floor: str
    gauge: Markup
    note: int  # number of the protocol in the list below the tables


@dataclass(frozen=True)
class ScoreTable:
    """Scores that answer one question; no metric in it has two protocols."""

    title: str
    rows: list[ScoreRow]


@dataclass(frozen=True)
class BreakdownRow:
    """A class, an arm or all: (value, interval) under each head, and a gauge where there is one column only."""

    group: str
    cells: list[tuple[str, str]]
    gauge: Markup
    n: int


@dataclass(frozen=True)
class Breakdown:
    """One metric of one channel by group; one protocol and unit."""

    meaning: Meaning
    channel: str
    unit: str
    heads: tuple[str, ...]
    strong: int  # the column that is the score itself
    rows: list[BreakdownRow]
    note: int


@dataclass(frozen=True)
class Evaluation:
    """What one stage says about a set of images."""

    name: str
    compared: str
    tables: list[ScoreTable]
    comparisons: list[Breakdown]  # real with real, real with synthetic, synthetic with synthetic
    groups: list[Breakdown]  # by arm, or by size of the lesion
    remarks: list[str]
    protocols: list[str]
    meanings: list[Meaning]
    levels: list[dict[str, str]]
    curves: list[tuple[str, Markup]]
    skipped: list[tuple[str, str]]  # metrics, reason
    warning: str | None

    @property
    def folded(self) -> bool:
        return sum(len(table.rows) for table in self.comparisons) > LONG_BREAKDOWN


def evaluation(name: str, record: dict[str, Any]) -> Evaluation:
    """record: metrics.json of an evaluate, structure or utility stage, or of two folders."""
    found = topics.in_order(scores.from_json(record["scores"]))
    protocols = list(dict.fromkeys(item.protocol for item in found))
    details = record["details"]
    levels = [
        {"channel": channel, "pixels": f"{level['pixels']} px", "value": words.number(level["value"]),
         "floor": NOTHING if level["floor"] is None else words.number(level["floor"])}
        for channel, channel_levels in details.get("swd_levels", {}).items() for level in channel_levels
    ]  # fmt: skip
    return Evaluation(
        name, words.compared(record), _score_tables(found, protocols), _comparisons(found, protocols), _groups(found, protocols), _remarks(details),
        protocols, list(dict.fromkeys(topics.meaning_of(item) for item in found)), levels, _distribution_charts(details.get("curves", {})),
        words.grouped_by_reason(record["skipped"]), words.few_patients(record["counts"]),
    )  # fmt: skip


def _score_tables(found: list[Score], protocols: list[str]) -> list[ScoreTable]:
    """A table for each question; a second one where a metric of the same thing was measured under two protocols, which are not compared."""
    tables: list[tuple[str, dict[tuple[str, str], str], list[ScoreRow]]] = []
    for item in found:
        if not item.is_headline:
            continue
        title = topics.topic_of(item.metric).title
        measured = (item.metric, item.channel)
        fitting = [table for table in tables if table[0] == title and table[1].get(measured, item.protocol) == item.protocol]
        if not fitting:
            fitting = [(title, {}, [])]
            tables += fitting
        fitting[0][1][measured] = item.protocol
        fitting[0][2].append(_score_row(item, protocols.index(item.protocol) + 1))
    return [ScoreTable(title, rows) for title, _, rows in tables]


def _score_row(item: Score, note: int) -> ScoreRow:
    return ScoreRow(
        score=item,
        meaning=topics.meaning_of(item),
        value=words.number(item.value),
        floor=NOTHING if item.floor is None else words.number(item.floor),
        interval=words.interval(item) or NOTHING,
        against_floor=words.against_floor(item),
        gauge=charts.gauge(item.value, item.floor, item.ci),
        note=note,
    )


def _blocks(found: list[Score]) -> list[list[Score]]:
    """Those of one metric, channel, protocol and unit together."""
    blocks: dict[tuple[str, str, str, str], list[Score]] = {}
    for item in found:
        blocks.setdefault((item.metric, item.channel, item.protocol, item.unit), []).append(item)
    return list(blocks.values())


def _comparisons(found: list[Score], protocols: list[str]) -> list[Breakdown]:
    tables = []
    for block in _blocks([item for item in found if item.comparison is not None]):
        rows = []
        for group in dict.fromkeys(item.group for item in block):
            of_row = {item.comparison: item for item in block if item.group == group}
            cells = [_cell(of_row[name]) if name in of_row else (NOTHING, "") for name in scores.COMPARISONS]
            rows.append(BreakdownRow(group or "all", cells, Markup(""), next(iter(of_row.values())).n))
        tables.append(Breakdown(topics.meaning_of(block[0]), block[0].channel, block[0].unit, COMPARISON_HEADS, 1, rows, protocols.index(block[0].protocol) + 1))
    return tables


def _groups(found: list[Score], protocols: list[str]) -> list[Breakdown]:
    tables = []
    for block in _blocks([item for item in found if item.comparison is None and item.group is not None]):
        numbers = [number for item in block for number in (item.value, *(item.ci or ()), *(() if item.floor is None else (item.floor,)))]
        span = None if topics.topic_of(block[0].metric).name == "regions" else (min(numbers), max(numbers))  # T1 is ten times T2: each begins at 0
        has_floor = any(item.floor is not None for item in block)
        rows = [
            BreakdownRow(item.group or "all", [*([(NOTHING if item.floor is None else words.number(item.floor), "")] if has_floor else []), _cell(item)],
                         charts.gauge(item.value, item.floor, item.ci, span), item.n)
            for item in block
        ]  # fmt: skip
        heads = ("Floor", "Value") if has_floor else ("Value",)
        tables.append(Breakdown(topics.meaning_of(block[0]), block[0].channel, block[0].unit, heads, len(heads) - 1, rows, protocols.index(block[0].protocol) + 1))
    return tables


def _cell(item: Score) -> tuple[str, str]:
    return words.number(item.value), words.interval(item) or ""


def _remarks(details: dict[str, Any]) -> list[str]:
    """Sentences that the stage itself wrote: of regions how they vary, of structure what they mean, of utility what each arm gains."""
    told = [str(item["words"]) for item in details.get("regions", [])]
    told += [str(details["words"]), *map(str, details.get("warnings", []))] if "words" in details else []
    for item in details.get("comparisons", []):
        title = scores.MEANINGS[item["metric"]].title if item["metric"] in scores.MEANINGS else item["metric"]
        region = f", {item['region']}" if "region" in item else ""
        told.append(f"{title}{region}, {item['arm']} against {item['to']}: {item['words']}")
    return told


def _distribution_charts(curves: dict[str, Any]) -> list[tuple[str, Markup]]:
    drawn = []
    for channel, kinds in curves.items():
        for kind, curve in kinds.items():
            title, x_label, y_label = CURVE_LABELS[kind]
            filled = kind != "spectrum"
            series = [Series("real", curve["x"], curve["real"], "real", filled=filled),
                      Series("synthetic", curve["x"], curve["synthetic"], "synthetic")]
            drawn.append((f"{title}, {channel}", line_chart(series, x_label, y_label)))
    return drawn
