"""Reading files again: each file once, however often it is listed or linked, with a bar on a terminal. Used by fsck."""

from __future__ import annotations

import errno
import os
import shlex
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medgen import files


@dataclass(frozen=True)
class FileProblem:
    """`kind`: `size` is seen without reading it; `command`: what makes a file readable, or moves it out of the way."""

    words: str
    kind: Literal["size", "content", "unreadable"]
    command: str | None = None


def unreadable(path: Path, folder: Path, error: OSError) -> str:
    """The command that helps: a permission can be given to the `folder` and what is in it, or to the first above that lets nobody in; where the
    disk itself fails, what is gone is made again."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return shlex.join(["mv", str(path), f"{path}.unreadable"])
    closed = [above for above in (folder, *folder.parents) if not os.access(above, os.X_OK)]
    return shlex.join(["chmod", "-R", "u+rX", str(closed[-1] if closed else folder)])


class Hasher:
    """Says what is wrong with a file; a collected image and its shard's are one file on disk, and read once."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance
        self._known: dict[tuple[int, int, int, int], str] = {}
        self._started = time.monotonic()
        self.files = self.bytes = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def problem_with(self, path: Path, size_bytes: int, sha256: str) -> FileProblem | None:
        """None if the file is what was written."""
        try:
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                return FileProblem("is no file", "size")
            if facts.st_size != size_bytes:
                return FileProblem(f"has {facts.st_size:,} bytes, {size_bytes:,} were written", "size")
            return None if self._digest(path, facts) == sha256 else FileProblem("does not match its sha256", "content")
        except FileNotFoundError:
            return FileProblem("is missing", "size")
        except OSError as error:
            if error.errno == errno.ELOOP:  # to every reader it is simply not there
                return FileProblem("is a link that leads nowhere", "size")
            return FileProblem(f"cannot be read: {error.strerror or error}", "unreadable", unreadable(path, path.parent, error))

    def _digest(self, path: Path, facts: os.stat_result) -> str:
        key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if key not in self._known:
            self._known[key] = files.sha256_file(path)
            self.files += 1
            self.bytes += facts.st_size
            self._advance(facts.st_size)
        return self._known[key]


@contextmanager
def progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield what to call with the bytes that were read; draws a bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda size_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=total_bytes)
        yield lambda size_bytes: bar.advance(task, size_bytes)
