"""The words of MEDGEN_FAULT, and that each place does what it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medgen import fault
from medgen.errors import InputError


def test_nothing_is_armed_without_the_variable() -> None:
    assert not fault.ARMED


def test_several_faults_with_filters() -> None:
    first, second = fault.parse("site=ckpt.write,rank=0,attempt=1,nth=2,action=truncate:50; site=step,stage=train,step=7,action=kill9;")
    assert (first.site, first.action, first.argument, first.filters) == ("ckpt.write", "truncate", 50.0, {"rank": 0, "attempt": 1, "nth": 2})
    assert (second.stage, second.filters, second.action) == ("train", {"step": 7}, "kill9")


@pytest.mark.parametrize(("text", "told"), [
    ("site=moon,action=kill9", "site=moon: it is one of: start"),
    ("site=step", "action=None: it is one of: kill9"),
    ("site=step,action=sleep", "action=sleep: it is one of"),
    ("site=step,action=kill9:3", "action=kill9:3: it is one of"),
    ("site=step,action=exit:soon", "are numbers"),
    ("site=step,nth=x,action=kill9", "are numbers"),
    ("site=step,colour=red,action=kill9", "'colour=red': write site="),
    ("site=step,site=step,action=kill9", "once each"),
    ("kill9", "'kill9': write site="),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=fault.VARIABLE) as refused:
        fault.parse(text)
    assert told in str(refused.value)


def passing(site: str, armed: str, tmp_path: Path, times: int = 3) -> subprocess.CompletedProcess[str]:
    """A process that passes a place several times, and says so."""
    code = f"from medgen import fault\nfrom pathlib import Path\nfor n in range({times}):\n    print(n, fault.at({site!r}, Path('file'), step=n), flush=True)"
    (tmp_path / "file").write_bytes(b"x" * 100)
    environment = {**os.environ, fault.VARIABLE: armed, fault.LOG_VARIABLE: str(tmp_path / "log")}
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("armed", "code", "passed"), [
    ("site=step,nth=2,action=kill9", -9, 1), ("site=step,nth=3,action=exit:85", 85, 2), ("site=step,action=raise", 1, 0),
    ("site=step,step=1,action=oom", 1, 1), ("site=step,action=sleep:0.01", 0, 3), ("site=step,action=hold:1", 0, 3), ("site=step,action=nan", 0, 3),
    ("site=step,action=term", -15, 0), ("site=step,action=enospc", 1, 0), ("site=step,rank=1,action=kill9", 0, 3), ("site=start,action=kill9", 0, 3),
])  # fmt: skip
def test_a_place_does_what_it_is_told_once_and_tells(tmp_path: Path, armed: str, code: int, passed: int) -> None:
    done = passing("step", armed, tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (code, passed), done.stderr
    fired = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
    assert len(fired) == ("rank=1" not in armed and "site=start" not in armed)
    assert ("0 nan" in done.stdout) == ("nan" in armed)


def test_a_file_is_cut(tmp_path: Path) -> None:
    passing("ckpt.write", "site=ckpt.write,nth=2,action=truncate:40", tmp_path)
    assert (tmp_path / "file").stat().st_size == 40


def test_the_command_line_refuses_a_wrong_fault_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import medgen.fault"], env={**os.environ, fault.VARIABLE: "site=moon"}, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "MEDGEN_FAULT: site=moon" in done.stderr
