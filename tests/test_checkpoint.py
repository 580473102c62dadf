"""Checkpoints: verified, selected, pruned, never half-written and never silently ignored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medgen import checkpoint
from medgen.errors import InputError, MedgenError

said: list[str] = []


def save(folder: Path, step: int, val: float | None = None, **metrics: Any) -> checkpoint.Checkpoint:
    objects = {"modules.network": {"weight": torch.full((3,), float(step))}}
    if val is not None:
        metrics["val"] = {"value": val, "better": "lower"}
    return checkpoint.save(folder, step, objects, {"step": step}, metrics)


def test_round_trip_with_plain_tensors(tmp_path: Path) -> None:
    saved = save(tmp_path, 5, val=0.5)
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 5 and found.sha256 == saved.sha256 and found.state() == {"step": 5}
    weights = torch.load(found.folder / "modules.network.pt", weights_only=True)
    assert torch.equal(weights["weight"], torch.full((3,), 5.0))
    assert torch.equal(found.tensors("modules.network")["weight"], weights["weight"])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "uncommit", "garble commit"])
@pytest.mark.fault("F35")
def test_a_bad_checkpoint_is_told_and_skipped(tmp_path: Path, damage: str, record_property: Callable[[str, object], None]) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2).folder
    weights = bad / "modules.network.pt"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "uncommit":
        (bad / "commit.json").unlink()
    else:
        (bad / "commit.json").write_text("{")
    messages: list[str] = []
    found = checkpoint.newest(tmp_path, messages.append)
    assert found is not None and found.step == 1
    record_property("fired", str(messages))
    assert len(messages) == 1 and "step-000002" in messages[0]


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, said.append) is None
    (save(tmp_path, 1).folder / "modules.network.pt").write_bytes(b"")
    with pytest.raises(MedgenError, match="none of them verifies; move them away to start from zero"):
        checkpoint.newest(tmp_path, said.append)


def test_selectors(tmp_path: Path) -> None:
    for step, val, auc in ((1, 0.5, 0.6), (2, 0.2, 0.9), (3, 0.4, 0.7)):
        save(tmp_path, step, val, auc={"value": auc, "better": "higher"})
    save(tmp_path, 4)
    chosen = {name: checkpoint.select(tmp_path, name, said.append).step for name in ("last", "best-val", "best-auc")}
    assert chosen == {"last": 4, "best-val": 2, "best-auc": 2}
    with pytest.raises(InputError, match="use one of: last, best-auc, best-val"):
        checkpoint.select(tmp_path, "best-kid", said.append)
    (tmp_path / "step-000002" / "modules.network.pt").write_bytes(b"")
    with pytest.raises(MedgenError, match="best-val checkpoint cannot be used"):
        checkpoint.select(tmp_path, "best-val", said.append)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, val in enumerate((0.9, 0.1, 0.5, 0.4, 0.6), start=1):
        save(tmp_path, step, val)
        checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004", "step-000005"]


def test_nan_is_never_committed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(MedgenError, match=r"modules\.network holds NaN or infinity; not saved"):
        checkpoint.save(tmp_path, 2, {"modules.network": {"weight": torch.tensor([1.0, float("nan")])}}, {}, {})
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 1


@pytest.mark.fault("F34")
def test_a_save_killed_at_any_moment_leaves_the_last_one(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A process that saves in a circle is killed; what it leaves must resume."""
    code = ("import sys, torch; from pathlib import Path; from medgen import checkpoint\n"
            "folder, step = Path(sys.argv[1]), 0\n"
            "while True:\n"
            "    step += 1\n"
            "    checkpoint.save(folder, step, {'modules.network': {'weight': torch.full((200_000,), float(step))}}, {}, {})\n"
            "    checkpoint.prune(folder, 2)\n"
            "    print(step, flush=True)\n")
    for round_number in range(3):
        folder = tmp_path / str(round_number)
        process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        finished = 0
        for line in process.stdout:
            finished = int(line)
            if finished == 3 + round_number:
                process.kill()
                break
        process.wait()
        record_property("fired", f"killed by signal {-process.returncode}")
        found = checkpoint.newest(folder, said.append)
        assert found is not None and found.step >= finished
        assert torch.equal(found.tensors("modules.network")["weight"], torch.full((200_000,), float(found.step)))


@pytest.mark.fault("F33")
def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, private_mounts: list[str], record_property: Callable[[str, object], None]) -> None:
    code = ("import sys, torch; from pathlib import Path; from medgen import checkpoint\n"
            "checkpoint.SPACE_RESERVE_BYTES = int(sys.argv[2])\n"
            "folder = Path(sys.argv[1])\n"
            "small = {'modules.network': {'weight': torch.ones(100_000)}}\n"
            "checkpoint.save(folder, 1, small, {}, {})\n"
            "try:\n"
            "    checkpoint.save(folder, 2, {'modules.network': {'weight': torch.ones(1_000_000)}}, {}, {})\n"
            "except checkpoint.MedgenError as error:\n"
            "    print(error)\n"
            "print(checkpoint.newest(folder, print).step, sorted(path.name for path in folder.iterdir()))\n")
    for reserve in (0, -10_000_000):  # told before writing; and, where the estimate was wrong, while writing
        command = 'mount -t tmpfs -o size=3m none "$2" && "$0" -c "$1" "$2" "$3"'
        arguments = [*private_mounts, "sh", "-c", command, sys.executable, code, str(tmp_path), str(reserve)]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert (done.stdout.splitlines() or [""])[-1] == "1 ['step-000001']", done.stdout + done.stderr
        record_property("fired", done.stdout.splitlines()[0])
        assert "the last checkpoint is intact" in done.stdout
