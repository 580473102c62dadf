"""Collects what the tests of the fault matrix saw and writes it into docs/reliability.md. Loaded by tests/conftest.py.

The page is written at the end of a run of all of them (`make test-faults`), from their own results."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .matrix import ROWS

SEEN = Path(__file__).parent / ".seen.jsonl"  # what the tests of this run saw so far: an interrupted run loses none of it
PAGE = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
WRITE_VARIABLE = "MEDGEN_WRITE_RELIABILITY"  # set by `make test-faults`
BEGIN, END = "<!-- the table below is written by `make test-faults` -->", "<!-- end of the table -->"

results: dict[str, list[dict[str, Any]]] = defaultdict(list)  # row -> one entry per test


def marked(item: pytest.Item) -> list[str]:
    return [str(number) for mark in item.iter_markers("fault") for number in mark.args]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A test of the matrix whose fault never happened has shown nothing: it fails."""
    report: Any = yield
    numbers = marked(item)
    if numbers and report.when == "call":
        report.user_properties.append(("fault", ",".join(numbers)))
        if report.passed and "fired" not in dict(item.user_properties):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: its fault was never seen to happen: record_property('fired', ...)"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    facts = dict(report.user_properties)
    if report.when == "call" and "fault" in facts:
        entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, **facts}
        if os.environ.get(WRITE_VARIABLE) == "1":
            with SEEN.open("a") as lines:
                lines.write(json.dumps(entry, default=str) + "\n")


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get(WRITE_VARIABLE) == "1" and not hasattr(session.config, "workerinput"):
        SEEN.unlink(missing_ok=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get(WRITE_VARIABLE) == "1" and not hasattr(session.config, "workerinput") and SEEN.exists():
        write_page()


def write_page() -> None:
    """The table of docs/reliability.md, from what the last run saw."""
    entries = [json.loads(line) for line in SEEN.read_text().splitlines()]
    for entry in {entry["test"]: entry for entry in entries}.values():  # a worker and its controller both tell
        for number in entry["fault"].split(","):
            results[number].append(entry)
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + "\n\n" + table() + "\n" + text[text.index(END) :])


def table() -> str:
    """Every row with what its tests saw in this run."""
    lines = [f"{time.strftime('%Y-%m-%d')}, {_slurm()}, Python {platform.python_version()}, {os.cpu_count()} cores.", ""]
    group = None
    for row in ROWS:
        if row.group != group:
            group = row.group
            lines += ["", f"**{group}**", "", "| | fault | injection | result | recovery |", "| --- | --- | --- | --- | --- |"]
        lines.append(f"| {row.number} | {row.fault} | {row.injection} | {_result(row.number, row.promise, row.not_here)} | {_recovery(row.number)} |")
    return "\n".join(lines) + "\n"


def _result(number: str, promise: str, not_here: str | None) -> str:
    seen = results.get(number, [])
    if not seen:
        return f"no test here: {not_here}" if not_here else "not in this run"
    failed = [entry["test"] for entry in seen if entry["outcome"] != "passed"]
    return f"**failed**: {', '.join(failed)}" if failed else f"{promise} ({len(seen)} {'test' if len(seen) == 1 else 'tests'})"


def _recovery(number: str) -> str:
    """From the fault to the moment that all was well again, where a test measured it."""
    seconds = [float(entry["recovery_seconds"]) for entry in results.get(number, []) if "recovery_seconds" in entry]
    return "" if not seconds else f"{seconds[0]:.0f} s" if len(seconds) == 1 else f"{min(seconds):.0f} to {max(seconds):.0f} s"


def _slurm() -> str:
    try:
        answer = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, timeout=10).stdout
    except OSError:
        return "no Slurm"
    return re.sub(r"slurm(-wlm)?", "Slurm", answer.strip()) or "no Slurm"
