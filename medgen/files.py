"""Files that are never half-written: beside the target, fsync, rename. Used by every module that writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from medgen.errors import InputError

SEAL = "seal.json"
LOCK_SECONDS = 5.0
CHUNK_BYTES = 64 * 2**20  # one os.write stops at 2,147,479,552 bytes; hashing and copying use the same block


def sync_directory(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, whatever the umask, and its missing parents likewise. One that is there keeps the
    rights it has: its owner may have shared it."""
    for path in [*reversed(folder.parents), folder]:
        try:
            path.mkdir(mode=0o700)
        except OSError:
            if not path.is_dir():
                raise


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Yield a unique path beside `target`; on success it is synced and renamed onto `target`, else removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        if error.filename is None:  # a write says only that there is no room, not where
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, content: bytes) -> None:
    with temporary_beside(target) as temporary, open(temporary, "wb") as handle:
        view = memoryview(content)
        for start in range(0, len(view), CHUNK_BYTES):
            handle.write(view[start : start + CHUNK_BYTES])


def write_text(target: Path, text: str) -> None:
    write_bytes(target, text.encode())


def write_private_text(target: Path, text: str) -> None:
    """Of a file that only this user can read, whatever the umask."""
    with temporary_beside(target) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            handle.write(text)


def write_once_private(target: Path, text: str) -> None:
    """The same, of several processes that come at once the first alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    write_private_text(beside, text)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(target.parent)


def write_json(target: Path, value: Any) -> None:
    write_text(target, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _lock_for_a_moment(descriptor: int) -> None:
    """Over NFS two appending clients could write to the same place. Released with the file; without locks the line is written as well."""
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:
            return


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write, so that lines of several processes never mix; a line cut by a crash is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _lock_for_a_moment(descriptor)
        size_bytes = os.fstat(descriptor).st_size
        cut = size_bytes > 0 and os.pread(descriptor, 1, size_bytes - 1) != b"\n"
        content = (("\n" if cut else "") + line + "\n").encode()
        if os.write(descriptor, content) < len(content):  # the system call says nothing where a disk has room for a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_new(out: Path) -> None:
    """Before hours of work, not after them."""
    if out.exists():
        raise InputError(f"{out} exists; name a new folder with --out, two results must not mix")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{out}: {parent} is not a folder that can be written to; name another with --out")


@contextmanager
def folder_in_one_move(target: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `target`; on success every file is synced and the folder renamed to `target`.

    Raises FileExistsError if `target` exists: a published folder is never written over."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(os.path.join(folder, name), "rb") as handle:
                    os.fsync(handle.fileno())
            sync_directory(Path(folder))
        if target.exists():
            raise FileExistsError(target)
        os.rename(temporary, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class HashingWriter(io.RawIOBase):
    """A file for whoever only calls write(): hashed on the way, and never more than one block to the system at once."""

    def __init__(self, handle: BinaryIO):
        self.handle, self.digest, self.size_bytes = handle, hashlib.sha256(), 0
        self.error: OSError | None = None  # kept, because what stands between may tell another one

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        try:
            for start in range(0, len(view), CHUNK_BYTES):
                block = view[start : start + CHUNK_BYTES]
                self.handle.write(block)
                self.digest.update(block)
        except OSError as error:
            self.error = error
            raise
        self.size_bytes += len(view)
        return len(view)

    @property
    def facts(self) -> dict[str, Any]:
        """What a commit or a seal says of the file."""
        return {"sha256": self.digest.hexdigest(), "size_bytes": self.size_bytes}


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write seal.json: size and sha256 of every file in the folder, for `broken_seal`."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(folder / SEAL, {str(path.relative_to(folder)): [path.stat().st_size, sha256_file(path)] for path in found})


def broken_seal(folder: Path) -> str | None:
    """Why a sealed folder is not what it was, in words; None if every file verifies."""
    try:
        expected = {name: (int(size_bytes), str(digest)) for name, (size_bytes, digest) in read_json(folder / SEAL).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{SEAL} is missing or not readable"
    for name, (size_bytes, digest) in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size_bytes or sha256_file(path) != digest:
            return f"{name} is missing or changed"
    return None


def sweep_temporaries(folder: Path, pattern: str) -> None:
    """Remove what a killed writer left: `.<pattern>.<8 hex>.tmp`. Only for folders that nobody else writes now."""
    for path in folder.glob(f".{pattern}.????????.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def with_own_hash(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a hash of the rest of it, for files whose every word counts and that no other file speaks for."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return {**rest, "sha256": sha256_json(rest)}


def own_hash_holds(record: dict[str, Any]) -> bool:
    """True if nothing in it was changed since `with_own_hash`."""
    return bool(record["sha256"] == with_own_hash(record)["sha256"])


def sha256_json(value: Any) -> str:
    """Hash of a JSON value that does not depend on key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
