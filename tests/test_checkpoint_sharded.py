"""Checkpoints of state that is sharded over ranks (FSDP2): written by all, read by any number, and nothing half-written after a fault."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medgen import checkpoint
from medgen.launch.ports import job_id_with_free_port
from medgen.launch.script import FIRST_PORT, PORTS

WORKER = Path(__file__).with_name("sharded_worker.py")
said: list[str] = []


def run_ranks(count: int, folder: Path, out: Path, steps: int, *words: str, fault: str = "") -> list[tuple[int, str]]:
    """Exit code and words of every rank."""
    environment = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(FIRST_PORT + job_id_with_free_port() % PORTS), "MEDGEN_FAULT": fault}
    command = [sys.executable, str(WORKER), str(folder), str(out), str(steps), *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes) for rank in range(count)]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def trained(count: int, folder: Path, out: Path, steps: int, *words: str) -> dict[str, Any]:
    """Everything the ranks end with, whole."""
    ended = run_ranks(count, folder, out, steps, *words)
    assert [code for code, _ in ended] == [0] * count, ended
    return whole(out, steps)


def whole(out: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / f"{step}.pt", weights_only=True)
    return state


def assert_equal(one: Any, other: Any) -> None:
    """Bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    else:
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks train five steps without interruption: `ckpt`, and the whole states as they were in memory in `out`."""
    folder = tmp_path_factory.mktemp("straight")
    trained(2, folder / "ckpt", folder / "out", 5)
    return folder


@pytest.fixture
def three(straight: Path, tmp_path: Path) -> Path:
    """The first three checkpoints, to spoil or to go on from."""
    for step in (1, 2, 3):
        shutil.copytree(straight / "ckpt" / f"step-{step:06d}", tmp_path / "ckpt" / f"step-{step:06d}")
    return tmp_path / "ckpt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_rank_writes_its_part_and_the_commit_names_all_files(straight: Path) -> None:
    found = checkpoint.newest(straight / "ckpt", said.append)
    assert found is not None and found.step == 5
    parts = [f"{name}.dcp/{file}" for name in ("modules.network", "optimizers.network") for file in ("index.json", "rank-00000.bin", "rank-00001.bin")]
    assert sorted(found.files) == sorted([*parts, "modules.network.pt", "optimizers.network.pt", "state.json"])
    assert {str(path.relative_to(found.folder)) for path in found.folder.rglob("*") if path.is_file()} == {*found.files, "commit.json"}
    assert names(straight / "ckpt") == [f"step-{step:06d}" for step in range(1, 6)], "and no temporary"


def test_whole_tensors_need_no_process_group(three: Path, straight: Path) -> None:
    found = checkpoint.select(three, "best-val", said.append)
    assert found.step == 3 and found.state() == {"step": 3}
    assert_equal(dict(found.tensors("modules.network")), whole(straight / "out", 3)["model"])
    optimizer = found.tensors("optimizers.network")
    assert_equal(optimizer["state"], whole(straight / "out", 3)["optimizer"])
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_ranks_loads_the_same(three: Path, straight: Path, tmp_path: Path, count: int) -> None:
    assert_equal(trained(count, three, tmp_path / "out", 3), whole(straight / "out", 3))


def test_a_checkpoint_of_one_unsharded_process_goes_on_sharded(tmp_path: Path) -> None:
    alone = trained(1, tmp_path / "ckpt", tmp_path / "alone", 2, "plain")
    assert not list((tmp_path / "ckpt").rglob("*.dcp"))
    assert_equal(trained(2, tmp_path / "ckpt", tmp_path / "sharded", 2), alone)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "index"])
def test_a_damaged_part_is_noticed_and_the_one_before_used(three: Path, damage: str) -> None:
    part = three / "step-000003" / "optimizers.network.dcp" / ("index.json" if damage == "index" else "rank-00001.bin")
    content = bytearray(part.read_bytes())
    if damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "remove":
        part.unlink()
    else:
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    told: list[str] = []
    found = checkpoint.newest(three, told.append)
    assert found is not None and found.step == 2
    assert len(told) == 1 and f"optimizers.network.dcp/{part.name}" in told[0]
    checkpoint.set_aside_newer(three, found)
    assert names(three) == ["bad-step-000003", "step-000001", "step-000002"]
    assert checkpoint.prune(three, keep=1) == [three / "step-000001"]


def test_killed_ranks_leave_the_last_checkpoint_and_resumed_is_uninterrupted(three: Path, straight: Path, tmp_path: Path) -> None:
    """First rank 1 after its first of two parts, then rank 0 before the commit; what comes out at last is equal bit for bit."""
    ended = run_ranks(2, three, tmp_path / "out", 5, fault="site=ckpt.write,rank=1,nth=1,action=kill9")
    assert ended[1][0] == -9 and ended[0][0] not in (0, -9) and "ckpt.write kill9" in ended[1][1], ended
    ended = run_ranks(2, three, tmp_path / "out", 5, fault="site=ckpt.commit,rank=0,action=kill9")
    assert ended[0][0] == -9 and ended[1][0] not in (0, -9) and "ckpt.commit kill9" in ended[0][1], ended
    assert any(name.startswith(".step-000004.") for name in names(three)), "a killed process tidies nothing"
    found = checkpoint.newest(three, said.append)
    assert found is not None and found.step == 3
    assert_equal(trained(2, three, tmp_path / "out", 5), whole(straight / "out", 5))
    assert names(three) == [f"step-{step:06d}" for step in range(1, 6)], "and what was half-written is gone"
    last = [checkpoint.select(folder, "last", said.append).sha256 for folder in (three, straight / "ckpt")]
    assert last[0] == last[1], "equal weights and optimizer states have equal hashes"


def test_a_disk_that_is_full_for_one_rank_is_one_error_on_all(three: Path, tmp_path: Path) -> None:
    ended = run_ranks(2, three, tmp_path / "out", 5, fault="site=ckpt.write,rank=1,nth=2,action=enospc")
    assert [code for code, _ in ended] == [2, 2], ended
    told = [[line for line in text.splitlines() if line.startswith("told: ")] for _, text in ended]
    assert told[0] == told[1] and len(told[0]) == 1
    assert "step-000004: the disk is full; free some space and submit again; what was saved before is intact" in told[0][0]
    assert names(three) == ["step-000001", "step-000002", "step-000003"]
    found = checkpoint.newest(three, said.append)
    assert found is not None and found.step == 3


def test_any_other_failure_of_one_rank_is_told_by_all(three: Path, tmp_path: Path) -> None:
    ended = run_ranks(2, three, tmp_path / "out", 4, fault="site=ckpt.write,rank=1,action=raise")
    told = [[line for line in text.splitlines() if line.startswith("told: ")] for _, text in ended]
    assert [code for code, _ in ended] == [1, 1] and told[0] == told[1] and len(told[0]) == 1, ended
    assert "rank 1 could not write its part: InjectedFault: at ckpt.write" in told[0][0]
    assert "Traceback" in ended[1][1] and "Traceback" not in ended[0][1]
    assert names(three) == ["step-000001", "step-000002", "step-000003"]


def test_nan_in_one_part_is_saved_by_nobody(three: Path, tmp_path: Path) -> None:
    ended = run_ranks(2, three, tmp_path / "out", 4, "nan")
    assert all(code == 1 and "told: step 4: modules.network holds NaN or infinity; not saved" in text for code, text in ended), ended
    assert names(three) == ["step-000001", "step-000002", "step-000003"]
