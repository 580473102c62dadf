"""A small disk of its own for tests that fill it up: mounted where only commands started through it see it. Used by test_storage.py."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BLOCK_BYTES = 4096


class SmallDisk:
    """`mount` is what commands see, `inside` the same folder for this process, which does not have it mounted."""

    def __init__(self, mount: Path, holder: int, environment: dict[str, str]):
        self.mount, self.inside, self.holder, self.environment = mount, Path(f"/proc/{holder}/root{mount}"), holder, environment
        environment.update(MEDGEN_RUNS=str(mount / "runs"))

    def start(self, *arguments: object, output: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        """medgen, in the folder beside the disk."""
        enter = ["nsenter", f"--target={self.holder}", "--user", "--mount", "--preserve-credentials", "bash", "-c", 'cd "$0" && exec "$@"', str(self.mount.parent)]
        command = [*enter, sys.executable, "-m", "medgen", *(str(argument) for argument in arguments)]
        return subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, text=True)

    def medgen(self, *arguments: object, expect: int = 0) -> str:
        """What it says; its exit code is checked, and that no traceback reaches a user."""
        process = self.start(*arguments)
        said = process.communicate(timeout=600)[0]
        assert process.returncode == expect and "Traceback" not in said, f"medgen {arguments}: exit {process.returncode}\n{said}"
        return said

    def fill(self, leave_bytes: int = 0) -> int:
        """Write until nothing is left but this; returns how much is free then. `empty` takes it away again."""
        with open(self.inside / "filler", "ab", buffering=0) as filler:
            for block in (b"x" * 2**20, b"x" * BLOCK_BYTES):
                try:
                    while self.free_bytes() - len(block) >= leave_bytes and filler.write(block) == len(block):
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC
        return self.free_bytes()

    def empty(self) -> None:
        (self.inside / "filler").unlink()

    def free_bytes(self) -> int:
        facts = os.statvfs(self.inside)
        return facts.f_bavail * facts.f_frsize

    @property
    def run(self) -> Path:
        [found] = [path for path in (self.inside / "runs").glob("*-*") if (path / "plan.json").exists()]
        return found

    def temporaries(self) -> list[Path]:
        """What a writer that was stopped must not leave."""
        return [path for path in (self.inside / "runs").rglob("*") if path.name.endswith(".tmp")]


@contextmanager
def small_disk(prefix: list[str], mount: Path, options: str, environment: dict[str, Any]) -> Iterator[SmallDisk]:
    """`prefix`: of conftest's private_mounts; `options`: of tmpfs."""
    mount.mkdir()
    script = f'mount -t tmpfs -o {options} none "$0" && echo mounted && exec sleep 3600'
    with subprocess.Popen([*prefix, "bash", "-c", script, str(mount)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "mounted\n"
            disk = SmallDisk(mount, holder.pid, environment)
            (disk.inside / "runs").mkdir()
            yield disk
        finally:
            holder.kill()
