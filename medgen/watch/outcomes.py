"""What the tasks of a run have left: outcomes and heartbeats, read again only where something changed. Called by state.py.

The files of an outcome are looked at once, and again when the outcome or a folder of theirs has changed;
their contents are re-hashed by submit, by collect and by whoever reads them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from typing import Any

from medgen import files
from medgen.rundir import Heartbeat, RankBeat, RunDir
from medgen.watch import poll

MANY = 1000  # verified outcomes from which on they are remembered from one watch to the next
SETTLED_SECONDS = 2.0  # a second change within one tick of the file system's clock would not be seen
KEEP_SECONDS = 60.0
CACHE_VERSION = 1

Signature = tuple[int, int, int]  # modification time in ns, size, inode


@dataclass(slots=True)
class Left:
    """One outcome. `folders`: modification times (ns) of those its files are in; None unless all were there with the right size."""

    signature: Signature
    run_id: str
    task_hash: str
    status: str
    attempt: int
    cause: str | None
    started: float  # unix seconds
    ended: float
    devices: int
    folders: dict[str, int] | None = None


class Outcomes:
    """The outcomes and heartbeats of one run: `refresh`, then ask."""

    def __init__(self, run: RunDir):
        self.run = run
        self._root = str(run.root)
        self._folder = str(run.outcome_file("", 0).parent)
        self._beats_folder = str(run.heartbeat_file("", 0).parent)
        self._known: dict[str, Left] | None = None  # by file name
        self._beating: set[str] = set()
        self._folder_times: dict[str, int] = {}
        self._cache = poll.cache_folder() / f"outcomes-{files.sha256_bytes(str(run.root.resolve()).encode())[:12]}.json"
        self._kept, self._keep_next = 0, 0.0

    def refresh(self) -> None:
        """Look at both folders and read what is new."""
        self._folder_times = {}
        self._beating = _names(self._beats_folder)
        found = _signatures(self._folder)
        before = self._known if self._known is not None else self._load() if len(found) >= MANY else {}
        self._known = {}
        for name, signature in found.items():
            known = before.get(name)
            left = known if known is not None and known.signature == signature else self._read(name, signature)
            if left is not None:
                self._known[name] = left

    def of(self, stage: str, shard: int, task_hash: str) -> Left | None:
        """The last outcome of exactly this task, or None if there is none or it is not readable."""
        left = (self._known or {}).get(f"{stage}.{shard}.json")
        return left if left is not None and left.task_hash == task_hash and left.run_id == self.run.run_id else None

    def is_done(self, stage: str, shard: int, left: Left) -> bool:
        """True if an outcome says DONE and its files are there with the right size."""
        if left.status != "done":
            return False
        if left.folders is None or any(self._folder_time(folder) != then for folder, then in left.folders.items()):
            left.folders = self._verified(_read_json(f"{self._folder}/{stage}.{shard}.json"))
        return left.folders is not None

    def beat(self, stage: str, shard: int) -> Heartbeat | None:
        return self.run.read_heartbeat(stage, shard) if f"{stage}.{shard}.json" in self._beating else None

    def rank_beats(self, stage: str, shard: int, ranks: int, attempt: int) -> tuple[RankBeat, ...]:
        """Of one attempt at a task of several ranks, as far as they have told."""
        names = {rank: f"{stage}.{shard}.r{rank}.json" if rank else f"{stage}.{shard}.json" for rank in range(ranks)}
        found = (self.run.read_rank_beat(stage, shard, rank) for rank, name in names.items() if name in self._beating)
        return tuple(beat for beat in found if beat is not None and beat.attempt == attempt)

    def keep(self) -> None:
        """Remember what was verified, so that the next watch of a big run starts fast. Writes nothing for a small one."""
        verified = {name: left for name, left in (self._known or {}).items() if left.folders is not None}
        if len(verified) < MANY or len(verified) == self._kept or time.monotonic() < self._keep_next:
            return
        self._kept, self._keep_next = len(verified), time.monotonic() + KEEP_SECONDS
        record = {name: [getattr(left, field) for field in Left.__slots__] for name, left in verified.items()}  # `astuple` copies deeply
        poll.write_private(self._cache, json.dumps({"version": CACHE_VERSION, "root": self._root, "outcomes": record}))

    def _load(self) -> dict[str, Left]:
        try:
            record = json.loads(self._cache.read_text())
            if record["version"] != CACHE_VERSION or record["root"] != self._root:
                return {}
            known = {name: Left(tuple(signature), *values) for name, (signature, *values) in record["outcomes"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        self._kept = len(known)
        return known

    def _read(self, name: str, signature: Signature) -> Left | None:
        record = _read_json(f"{self._folder}/{name}", signature[1])
        try:
            left = Left(
                signature, record["run_id"], record["task_hash"], record["status"], record["attempt"], record["cause"],
                float(record["started"]), float(record["ended"]), record["devices"],
            )  # fmt: skip
        except (TypeError, KeyError, ValueError):
            return None
        sound = isinstance(left.attempt, int) and isinstance(left.devices, int) and isinstance(left.cause, str | None)
        if not sound or not all(isinstance(text, str) for text in (left.run_id, left.task_hash, left.status)):
            return None
        if left.status == "done":
            left.folders = self._verified(record)
        return left

    def _verified(self, record: Any) -> dict[str, int] | None:
        """The folders of an outcome's files if these are all there with the right size, else None."""
        try:
            expected = {item["path"]: item["size_bytes"] for item in record["files"]}
            folders = {path.rpartition("/")[0] for path in expected}
        except (TypeError, KeyError, AttributeError):
            return None
        times = {folder: self._folder_time(folder) for folder in folders}
        try:
            complete = bool(expected) and all(os.stat(f"{self._root}/{path}").st_size == size for path, size in expected.items())  # noqa: PTH116  see above
        except OSError:
            complete = False
        if not complete:
            return None
        settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        return {folder: changed if changed < settled else -2 for folder, changed in times.items()}  # -2: look again next time

    def _folder_time(self, folder: str) -> int:
        if folder not in self._folder_times:
            try:
                self._folder_times[folder] = os.stat(f"{self._root}/{folder}").st_mtime_ns  # noqa: PTH116  a Path for each of 10,000 takes longer than the rest
            except OSError:
                self._folder_times[folder] = -1
        return self._folder_times[folder]


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208  a Path for each of 20,000
    except OSError:  # there is none yet
        return set()


def _signatures(folder: str) -> dict[str, Signature]:
    """Of the JSON files in a folder, half-written ones left out."""
    found = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # there may be no folder yet
        for entry in entries:
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                with contextlib.suppress(OSError):  # it went away at this moment
                    status = entry.stat()
                    found[entry.name] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return found


def _read_json(path: str, expected_bytes: int = 1 << 16) -> Any:
    """None if it is not there or not JSON. Without the layers of `open`: there may be 10,000."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            content = os.read(descriptor, expected_bytes + 1)
            if len(content) > expected_bytes:
                content += b"".join(iter(lambda: os.read(descriptor, 1 << 20), b""))
        finally:
            os.close(descriptor)
        return json.loads(content.decode())
    except (OSError, ValueError):
        return None
