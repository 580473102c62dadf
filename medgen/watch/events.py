"""The events of a run, read once each however often one asks. Called by state.py and live.py."""

from __future__ import annotations

import json
from typing import Any

from medgen.rundir import RunDir, is_sound


class EventLog:
    """All events so far, in order; lines that are cut or damaged are left out, as in `RunDir.events`."""

    def __init__(self, run: RunDir):
        self.run = run
        self.records: list[dict[str, Any]] = []
        self.changes = 0  # how often something was new
        self._read_bytes = 0

    def refresh(self) -> int:
        """Read what was appended since; returns how many events are new. A file that has become shorter is read anew."""
        try:
            with self.run.events_file.open("rb") as handle:
                if handle.seek(0, 2) < self._read_bytes:
                    self.records, self._read_bytes = [], 0
                handle.seek(self._read_bytes)
                text = handle.read()
        except OSError:
            return 0
        complete = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        new = [record for record in _parsed(complete.decode(errors="replace").splitlines()) if is_sound(record)]
        self.records += new
        self.changes += bool(new)
        return len(new)


def _parsed(lines: list[str]) -> list[Any]:
    try:
        return list(json.loads(f"[{','.join(lines)}]"))  # all at once is twice as fast
    except ValueError:
        return [record for line in lines for record in _one(line)]


def _one(line: str) -> list[Any]:
    try:
        return [json.loads(line)]
    except ValueError:
        return []
