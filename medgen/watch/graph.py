"""The lines of a graph beside its nodes, one node a row, as version control tools draw theirs. Pure; called by view.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOST_LANES = 6  # more lines than that help nobody
NODE = "●"


@dataclass(frozen=True)
class Rail:
    """`node`: the row of a node, which is ●; `below`: a row between it and the next node. Equally wide in all rows."""

    node: str
    below: str


def rails(needs: Mapping[str, Sequence[str]]) -> dict[str, Rail]:
    """Lines from each node to those that need it; every node comes after what it needs, and needs nothing twice over.

    Just the nodes where the graph has too many lines side by side."""
    last_reader = {needed: name for name, wanted in needs.items() for needed in wanted}
    lanes: list[str | None] = []  # the node each line comes from
    rows = []
    for name, wanted in needs.items():
        before = list(lanes)
        ending = [lane for lane, source in enumerate(lanes) if source in wanted and last_reader[source or ""] == name]
        free = [lane for lane, source in enumerate(lanes) if source is None]
        mine = ending[0] if ending else free[0] if free else len(lanes)
        for lane in ending:
            lanes[lane] = None
        if mine == len(lanes):
            lanes.append(None)
        lanes[mine] = name if name in last_reader else None
        joined = {lane for lane, source in enumerate(before) if source in wanted and lane != mine}
        rows.append((mine, joined, before, list(lanes)))
    width = len(lanes)
    if width > MOST_LANES:
        return {name: Rail(NODE, " ") for name in needs}
    return {name: Rail(_row(width, *row), _between(width, row[3])) for name, row in zip(needs, rows, strict=True)}


def _row(width: int, mine: int, joined: set[int], before: list[str | None], after: list[str | None]) -> str:
    """Lanes stand two columns apart; the columns between carry what joins this node from the side."""
    left, right = min(joined | {mine}), max(joined | {mine})
    text = ""
    for lane in range(width):
        passes = lane < len(before) and before[lane] is not None and lane < len(after) and after[lane] == before[lane]
        if lane == mine:
            text += NODE
        elif lane in joined:
            text += ("├" if lane < mine else "┤") if passes else ("╰" if lane < mine else "╯")
        elif passes:
            text += "┼" if left < lane < right else "│"
        else:
            text += "─" if left < lane < right else " "
        text += "─" if left <= lane < right else " "
    return text[:-1]


def _between(width: int, after: list[str | None]) -> str:
    return " ".join("│" if lane < len(after) and after[lane] is not None else " " for lane in range(width))
