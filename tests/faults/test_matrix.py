"""The matrix is whole: every fault has a test that can be found, or a reason why it has none; and the page shows every row, failed ones too."""

from __future__ import annotations

import re
from pathlib import Path

from .matrix import ROWS
from .plugin import BEGIN, END, PAGE

TESTS = Path(__file__).parent.parent


def test_every_fault_has_a_test_or_a_reason() -> None:
    shown = {number for path in TESTS.rglob("test_*.py") for arguments in re.findall(r"mark\.fault\(([^)]*)\)", path.read_text()) for number in re.findall(r"F\d+", arguments)}
    assert [row.number for row in ROWS] == [f"F{number}" for number in range(1, 46)]
    assert shown <= {row.number for row in ROWS}
    assert not [row.number for row in ROWS if row.number not in shown and not row.not_here]
    assert not [row.number for row in ROWS if row.number in shown and row.not_here], "a reason that is none any more"


def test_the_page_shows_every_row() -> None:
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert re.findall(r"^\| (F\d+) \|", table, re.MULTILINE) == [row.number for row in ROWS]
