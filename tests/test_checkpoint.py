"""Checkpoints: verified, selected, pruned, never half-written and never silently ignored."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_NET

from medgen import checkpoint, commits, files
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


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "uncommit", "garble commit", "lead outside"])
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
    elif damage == "garble commit":
        (bad / "commit.json").write_text("{")
    else:
        found = commits.read(bad)
        commits.write(bad, 2, {**found.files, "../step-000001/modules.network.pt": found.files["modules.network.pt"]}, {})
    messages: list[str] = []
    newest = checkpoint.newest(tmp_path, messages.append)
    assert newest is not None and newest.step == 1
    record_property("fired", str(messages))
    assert len(messages) == 1 and "step-000002" in messages[0]


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, said.append) is None
    (save(tmp_path, 1).folder / "modules.network.pt").write_bytes(b"")
    with pytest.raises(InputError, match="none of them verifies; to start from zero: mv "):
        checkpoint.newest(tmp_path, said.append)


def test_a_folder_that_cannot_be_listed_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "ckpt").symlink_to("ckpt")
    with pytest.raises(OSError, match="Too many levels"):
        checkpoint.newest(tmp_path / "ckpt", said.append)


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


def on_a_small_disk(private_mounts: list[str], options: str, code: str, *arguments: object) -> str:
    """What `code` prints, with the first of `arguments` a fresh disk; `options`: of tmpfs."""
    command = f'mount -t tmpfs -o {options} none "$2" && "$0" -c "$@"'
    words = [*private_mounts, "sh", "-c", command, sys.executable, code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
        told, *_, left = on_a_small_disk(private_mounts, "size=3m", code, tmp_path, reserve).splitlines()
        record_property("fired", told)
        assert "what was saved before is intact" in told and left == "1 ['step-000001']"


class Recorder(io.BytesIO):
    """A file that remembers how much it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def write(self, content: Any) -> int:
        self.sizes.append(len(content))
        return super().write(content)


def test_no_write_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux takes at most 2,147,479,552 bytes at once; benchmarks/checkpoint_sharded.py saves a tensor that has more."""
    assert files.CHUNK_BYTES < 2_147_479_552
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    handle, value = Recorder(), {"weight": torch.arange(100_000)}
    writer = files.HashingWriter(handle)
    torch.save(value, writer)  # type: ignore[arg-type]  # torch only calls write()
    assert max(handle.sizes) == 1000 and sum(handle.sizes) == writer.facts["size_bytes"] > 800_000
    assert files.sha256_bytes(handle.getvalue()) == writer.facts["sha256"]
    handle.seek(0)
    assert torch.equal(torch.load(handle, weights_only=True)["weight"], value["weight"])


def test_no_pointer_decides_which_checkpoint_is_the_newest(tmp_path: Path) -> None:
    """Whatever somebody's `latest` says, dangling or not, and whatever else lies there."""
    save(tmp_path, 1)
    save(tmp_path, 1_000_000)
    (tmp_path / "latest").symlink_to("step-000007")
    (tmp_path / "step-000009").symlink_to("nowhere")
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "latest.txt").write_bytes(b"\xff\x00")
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 1_000_000


def test_a_half_written_one_and_what_was_set_aside_make_room(tmp_path: Path, private_mounts: list[str]) -> None:
    """Nothing that nobody uses keeps a new checkpoint from fitting."""
    code = ("import sys, torch; from pathlib import Path; from medgen import checkpoint\n"
            "checkpoint.SPACE_RESERVE_BYTES = 0\n"
            "folder = Path(sys.argv[1])\n"
            "for name in ('.step-000003.0123abcd.tmp', 'bad-step-000002'):\n"
            "    (folder / name).mkdir()\n"
            "    (folder / name / 'part').write_bytes(bytes(1_400_000))\n"
            "checkpoint.save(folder, 3, {'network': {'weight': torch.ones(500_000)}}, {}, {})\n"
            "print(sorted(path.name for path in folder.iterdir()))\n")
    assert on_a_small_disk(private_mounts, "size=3m", code, tmp_path) == "['step-000003']\n"


def test_files_count_as_bytes_do(tmp_path: Path, private_mounts: list[str]) -> None:
    code = ("import sys, torch; from pathlib import Path; from medgen import checkpoint\n"
            "try:\n"
            "    checkpoint.save(Path(sys.argv[1]), 1, {'network': {'weight': torch.ones(4)}}, {}, {})\n"
            "except checkpoint.InputError as error:\n"
            "    print(error)\n"
            "print([path.name for path in Path(sys.argv[1]).iterdir()])\n")
    told, left = on_a_small_disk(private_mounts, "size=100m,nr_inodes=5", code, tmp_path).splitlines()
    assert "the disk is full: a checkpoint needs 6 files, " in told and left == "[]"


def test_fewer_than_two_kept_is_refused(medgen: Callable[..., subprocess.CompletedProcess[str]], training: Path) -> None:
    assert "keep" in medgen("submit", training, "-o", "stages.train.config.loop.keep=1", "--dry-run", expect=2).stderr


@pytest.fixture
def training(write_spec: Callable[[dict[str, Any]], Path]) -> Path:
    """A spec that trains a tiny model and saves after every step."""
    config = {**TINY_NET, "strategy": "rflow", "mode": "seg", "loop": {**TINY_NET["loop"], "checkpoint_steps": 1, "keep": 3}}
    data = {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2}
    return write_spec({"version": 1, "name": "saves", "data": data, "stages": {"train": {"kind": "train", "config": config, "resources": {"cpus": 1}}}})


def test_a_training_that_cannot_save_ends_at_once_and_is_not_tried_again(
    tmp_path: Path, medgen: Callable[..., subprocess.CompletedProcess[str]], training: Path, environment: dict[str, str]
) -> None:  # fmt: skip
    environment["MEDGEN_FAULT"] = "site=ckpt.write,nth=9,action=enospc"  # three or four files each: in the third
    medgen("submit", training, "--local", expect=1)
    (run,) = [path.parent for path in (tmp_path / "runs").glob("*/plan.json")]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("task_started") == 1, "another try would write to the same full disk"
    [ended] = [event for event in events if event["event"] == "task_ended"]
    assert ended["status"] == "refused" and "the disk is full; free some space and submit again; what was saved before is intact" in ended["cause"]
    assert "DISK_FULL" in medgen("why", "saves", expect=1).stdout
    folder = run / "train" / "ckpt"
    left = sorted(path.name for path in folder.iterdir())
    assert left and all(name.startswith("step-") for name in left)
    assert checkpoint.problem_with(folder / left[-1]) is None

    del environment["MEDGEN_FAULT"]
    planned = json.loads((run / "plan.json").read_text())
    planned["place"] |= {"scheduler": "slurm", "grace_seconds": 60}  # as a job of a cluster would find it
    (run / "plan.json").write_text(json.dumps(planned))
    done = medgen("train", run, "--attempt", 1)
    assert f"resuming from {folder / left[-1]}" in done.stdout
    assert done.stdout.count("the grace of 60 s is short for a step (") == 1
    [told] = [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == "grace_short"]
    assert told["stage"] == "train" and told["grace_seconds"] == 60 < told["needed_seconds"]
    assert told["option"] == f"site.grace={told['needed_seconds'] + 29}s" and f"submit with -o {told['option']}" in done.stdout

    # what is kept, and how large it is, is told before anything is queued: now that one is there
    assert "train keeps its 3 newest checkpoints and the best of each metric: at most 5 x " in medgen("submit", training, "--dry-run").stderr
