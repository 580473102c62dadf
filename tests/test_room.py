"""What a disk and a quota leave: asked of the kernel, of the `quota` command, and claimed before writing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, unavailable

from medgen import room

# what the kernel says where a quota is kept: user limits of 8 MiB (hard) and 100 files, of which 3 MiB and 90 files are used
KERNEL = r"""
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
struct answer { uint64_t hard_blocks, soft_blocks, used_bytes, hard_files, soft_files, used_files, bytes_end, files_end; uint32_t valid; };
int quotactl(int command, const char *device, int owner, void *out) {
    if (getenv("QUOTA") == NULL || command != ((0x800007 << 8) | 0) || strncmp(device, "/dev/", 5)) { errno = ESRCH; return -1; }
    struct answer told = { 8192, 0, 3 << 20, 100, 0, 90, 0, 0, 63 };
    memcpy(out, &told, sizeof told);
    return 0;
}
int fallocate(int file, int mode, long start, long length) {
    if (getenv("RESERVE_ERRNO") == NULL) return 0;
    errno = atoi(getenv("RESERVE_ERRNO"));
    return -1;
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that answers in place of the kernel, because few machines keep quotas."""
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "kernel.c").write_text(KERNEL)
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "kernel.so", folder / "kernel.c"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        unavailable("no C compiler here (gcc)")
    return folder / "kernel.so"


def run(code: str, folder: Path, kernel: Path, **variables: str) -> str:
    environment = {**os.environ, "LD_PRELOAD": str(kernel), **variables}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_without_a_quota_the_disk_counts(tmp_path: Path) -> None:
    free, facts = room.free_in(tmp_path), os.statvfs(tmp_path)
    assert free.limit == "" and free.files is not None and 0 < free.bytes <= facts.f_blocks * facts.f_frsize


def test_a_quota_that_leaves_less_than_the_disk(tmp_path: Path, kernel: Path) -> None:
    if not room.mount_of(tmp_path)[1].startswith("/dev/"):
        unavailable(f"{tmp_path} lies on no disk of this machine")
    code = "import sys; from pathlib import Path; from medgen import room; free = room.free_in(Path(sys.argv[1])); print(free.bytes, free.files, free.limit)"
    assert run(code, tmp_path, kernel, QUOTA="1") == f"{5 * 2**20} 10 quota of user {os.getuid()}\n"
    save = ("import sys, torch; from pathlib import Path; from medgen import checkpoint\n"
            "checkpoint.SPACE_RESERVE_BYTES = 0\n"
            "folder = Path(sys.argv[1])\n"
            "checkpoint.save(folder, 1, {'network': {'weight': torch.ones(1000)}}, {}, {})\n"
            "try:\n"
            "    checkpoint.save(folder, 2, {'network': {'weight': torch.ones(2_000_000)}}, {}, {})\n"
            "except checkpoint.InputError as error:\n"
            "    print(error)\n"
            "print(sorted(path.name for path in folder.iterdir()))\n")
    told = run(save, tmp_path, kernel, QUOTA="1").splitlines()
    assert told[-1] == "['step-000001']"
    assert f"the disk quota is used up (quota of user {os.getuid()}): a checkpoint needs 8 MiB with its reserve, 5 MiB are free" in told[0]


@pytest.mark.parametrize(("number", "told"), [(122, "the disk quota is used up"), (28, "the disk is full"), (95, "")])
def test_room_is_claimed_before_writing(tmp_path: Path, kernel: Path, number: int, told: str) -> None:
    """EDQUOT and ENOSPC come before the first byte; where a file system cannot reserve (EOPNOTSUPP), writing goes on."""
    save = ("import sys, torch; from pathlib import Path; from medgen import checkpoint\n"
            "try:\n"
            "    checkpoint.save(Path(sys.argv[1]) / 'ckpt', 1, {'network': {'weight': torch.ones(1000)}}, {}, {})\n"
            "except checkpoint.InputError as error:\n"
            "    print(error)\n"
            "print([path.name for path in (Path(sys.argv[1]) / 'ckpt').iterdir()])\n")
    lines = run(save, tmp_path, kernel, RESERVE_ERRNO=str(number)).splitlines()
    if told:
        assert lines[-1] == "[]" and f"step-000001: {told}; free some space and submit again" in lines[0]
    else:
        assert lines == ["['step-000001']"]


def test_a_file_takes_no_more_than_its_length(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as handle:
        room.reserve(handle, 50 * 2**20)
        assert os.fstat(handle.fileno()).st_size == 0
        handle.write(b"x" * 4096)
        room.give_back(handle, 4096)
    facts = (tmp_path / "file").stat()
    assert facts.st_size == 4096 and facts.st_blocks * 512 < 2**20


def test_a_soft_limit_counts_when_its_time_is_over() -> None:
    now = time.time()

    def limit(end: float) -> room.Limit:
        return room.Limit("", 6000, 5000, 9000, int(end), 1, 0, 0, 0)

    assert limit(0).free_bytes(now) == limit(now + 60).free_bytes(now) == 3000
    assert limit(now - 60).free_bytes(now) == 0
    assert limit(0).free_files(now) is None


def test_what_the_quota_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["Disk quotas for user kari (uid 1000): ", "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace",
            "server:/other 1 2 3 0 4 5 6 0", "server:/home 1234* 1000 6000 1700000000 10 0 0 0", "server:/home: nonsense"]
    script = tmp_path / "quota"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows) + "exit 1\n")  # its exit code for a limit that is exceeded
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert room._limits_of_server("server:/home") == [room.Limit("quota on server:/home", 1234 * 1024, 1000 * 1024, 6000 * 1024, 1700000000, 10, 0, 0, 0)]
    script.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(room, "COMMAND_SECONDS", 0.1)
    assert room._limits_of_server("server:/home") == []
