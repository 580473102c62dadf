"""Nodes that failed medgen's tasks: remembered with the reason for a week, and kept away from. Used by attempt.py, submit.py and the verb `nodes`.

One file beside the slice caches, so that what one run has learned helps all runs of this folder."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from medgen import files
from medgen.errors import InputError
from medgen.launch import slurm
from medgen.launch.slurm import SlurmError
from medgen.rundir import RunDir

FILE = "nodes.jsonl"
BELIEVED_SECONDS = 7 * 86400  # nodes are repaired
NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Entry:
    """Why to keep away from a node; `reason` "" takes it back. `run_id` "": a person said so. Unix seconds."""

    node: str
    reason: str
    run_id: str
    time: float

    @property
    def until(self) -> float:
        return self.time + BELIEVED_SECONDS


def remember(cache: Path, node: str, reason: str, run_id: str) -> None:
    """Raises InputError for what is no name of a node: it goes to sbatch."""
    if not NODE_NAME.fullmatch(node):
        raise InputError(f"{node!r}: not the name of a node; `sinfo -N` lists them")
    files.append_line(cache / FILE, json.dumps(asdict(Entry(node, " ".join(reason.split())[:300], run_id, round(time.time(), 3)))))


def forget(cache: Path, node: str) -> None:
    """Raises InputError if nothing is held against it."""
    known = [entry.node for entry in believed(cache)]
    if node not in known:
        raise InputError(f"{node}: nothing is held against it; kept away from: {', '.join(known) or 'none'}")
    remember(cache, node, "", "")


def believed(cache: Path) -> list[Entry]:
    """The last word on each node, where that is bad and not too old. Damaged lines are left out."""
    try:
        lines = (cache / FILE).read_text(errors="replace").splitlines()
    except OSError:
        return []
    last: dict[str, Entry] = {}
    for line in lines:
        entry = _parse(line)
        if entry is not None:
            last[entry.node] = entry
    return [entry for _, entry in sorted(last.items()) if entry.reason and entry.until > time.time()]


def _parse(line: str) -> Entry | None:
    try:
        entry = Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None
    sound = all(isinstance(text, str) for text in (entry.node, entry.reason, entry.run_id)) and isinstance(entry.time, int | float)
    return entry if sound and NODE_NAME.fullmatch(entry.node) else None


def believed_here(cache: Path) -> list[Entry]:
    """`believed`, without nodes that this cluster does not have: the list may be older, or of another one."""
    entries = believed(cache)
    known = known_to_slurm({entry.node for entry in entries})
    return [entry for entry in entries if entry.node in known]


def known_to_slurm(names: set[str]) -> set[str]:
    """Those of the names that Slurm has as nodes; all of them where it does not answer."""
    try:
        return names & (slurm.node_names() or names) if names else names
    except SlurmError:
        return names


def guilty(run: RunDir, stage: str, shard: int, attempt: int, here: str) -> str:
    """The node of the rank that told of the failure first; `here`, that of the first rank, if none did."""
    told = [event for event in run.events() if event["event"] == "rank_failed" and (event.get("stage"), event.get("shard"), event.get("attempt")) == (stage, shard, attempt)]
    return str(told[0].get("node") or here) if told else here
