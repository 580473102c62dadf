"""What is left for this user on a disk: free bytes and files, and less than that under a quota. Used by checkpoint.py, sharded.py and launch/.

Quotas are asked of the kernel; of a network file system by the `quota` command, if there is one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a file that is cut short has its own length, not the reserved one
GET_QUOTA = 0x800007  # Q_GETQUOTA
KINDS = ("user", "group")  # USRQUOTA 0, GRPQUOTA 1
BLOCK_BYTES = 1024  # the unit of limits
COMMAND_SECONDS = 5.0
COMMAND_COLUMNS = 9  # file system, then used, soft, hard and grace of blocks and of files
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


@dataclass(frozen=True)
class Free:
    """`files` is None where nobody counts them; `limit` says which quota leaves so little, "" where it is the disk itself."""

    folder: Path
    bytes: int
    files: int | None
    limit: str = ""


@dataclass(frozen=True)
class Limit:
    """One quota: used and limits of bytes and of files, 0 for no limit; `ends`: unix seconds when more than the soft one is refused, 0 for not yet."""

    name: str
    used_bytes: int
    soft_bytes: int
    hard_bytes: int
    bytes_end: int
    used_files: int
    soft_files: int
    hard_files: int
    files_end: int

    def free_bytes(self, now: float) -> int | None:
        return _left(self.used_bytes, self.soft_bytes, self.hard_bytes, self.bytes_end, now)

    def free_files(self, now: float) -> int | None:
        return _left(self.used_files, self.soft_files, self.hard_files, self.files_end, now)


def _left(used: int, soft: int, hard: int, end: int, now: float) -> int | None:
    """What can still be written; None for no limit. Above the soft limit one may write until its time is over."""
    if soft and used > soft and 0 < end <= now:
        return 0
    return max(0, hard - used) if hard else None


def on_disk(folder: Path) -> Free:
    """What the disk alone leaves in a folder that is there: one system call, no quota is asked for."""
    facts = os.statvfs(folder)
    return Free(folder, facts.f_bavail * facts.f_frsize, facts.f_favail if facts.f_files else None)


def free_in(folder: Path) -> Free:
    """The least of what the disk and the quotas leave in a folder that is there."""
    free = on_disk(folder)
    now = time.time()
    for limit in _limits(folder):
        size, count = limit.free_bytes(now), limit.free_files(now)
        if size is not None and size < free.bytes:
            free = Free(folder, size, free.files, limit.name)
        if count is not None and (free.files is None or count < free.files):
            free = Free(folder, free.bytes, count, limit.name)
    return free


def reserve(handle: BinaryIO, size_bytes: int) -> None:
    """Claim the room for a file before it is written: a full disk or quota is told now, by an OSError, and not in the middle.

    The system call itself: the C library's posix_fallocate would write zeros where a file system cannot reserve. There nothing happens."""
    if sys.platform != "linux" or size_bytes == 0:
        return
    while _libc.fallocate(handle.fileno(), KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size_bytes)):
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in FULL:
            raise OSError(number, os.strerror(number), handle.name)
        return


def give_back(handle: BinaryIO, size_bytes: int) -> None:
    """What was reserved beyond the end of a finished file."""
    handle.flush()
    os.ftruncate(handle.fileno(), size_bytes)


_libc = ctypes.CDLL(None, use_errno=True)


class _Answer(ctypes.Structure):
    """struct if_dqblk of linux/quota.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("hard_blocks", "soft_blocks", "used_bytes", "hard_files", "soft_files", "used_files", "bytes_end", "files_end")] + [
        ("valid", ctypes.c_uint32)
    ]  # fmt: skip


def _limits(folder: Path) -> list[Limit]:
    source = mount_of(folder)[1]
    if ":" in source:
        return _limits_of_server(source)
    if not source.startswith("/dev/") or sys.platform != "linux":
        return []
    owners = (os.getuid(), folder.stat().st_gid)
    asked = (_ask_kernel(source, kind, owner) for kind, owner in zip(range(len(KINDS)), owners, strict=True))
    return [limit for limit in asked if limit is not None]


def _ask_kernel(device: str, kind: int, owner: int) -> Limit | None:
    """None where no quota of this kind is kept, or the kernel does not tell."""
    answer = _Answer()
    command = ctypes.c_int((GET_QUOTA << 8) | kind)
    if _libc.quotactl(command, os.fsencode(device), owner, ctypes.byref(answer)):
        return None
    return Limit(
        f"quota of {KINDS[kind]} {owner}", answer.used_bytes, answer.soft_blocks * BLOCK_BYTES, answer.hard_blocks * BLOCK_BYTES, answer.bytes_end,
        answer.used_files, answer.soft_files, answer.hard_files, answer.files_end,
    )  # fmt: skip


def _limits_of_server(source: str) -> list[Limit]:
    """As `quota` prints them in one line per file system; none if it is not there, does not answer or says something else."""
    if shutil.which("quota") is None:
        return []
    try:
        done = subprocess.run(["quota", "-w", "-p", "-u", "-g"], capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [limit for line in done.stdout.splitlines() if line.split()[:1] == [source] and (limit := _read_row(line)) is not None]


def _read_row(line: str) -> Limit | None:
    """`server:/home 1234* 5000 6000 0 10 0 0 0`: a star marks what is above its limit; sizes in KiB."""
    source, *cells = (cell.rstrip("*") for cell in line.split())
    if len(cells) != COMMAND_COLUMNS - 1 or not all(cell.isdigit() for cell in cells):
        return None
    used, soft, hard, end, used_files, soft_files, hard_files, files_end = (int(cell) for cell in cells)
    return Limit(f"quota on {source}", used * BLOCK_BYTES, soft * BLOCK_BYTES, hard * BLOCK_BYTES, end, used_files, soft_files, hard_files, files_end)


def mount_of(path: Path) -> tuple[str, str]:
    """Type and source of the file system that holds a path, such as ("ext4", "/dev/sda1"); empty where the kernel does not tell."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "", ""
    resolved, best, found = path.resolve(), Path("/"), ("", "")
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].replace("\\040", " "))
        if resolved.is_relative_to(point) and len(point.parts) >= len(best.parts):
            kind, source = right.split()[:2]
            best, found = point, (kind, source)
    return found
