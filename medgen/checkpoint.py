"""Checkpoints: one folder per step, commit.json with the hashes written last, the newest that verifies is used.

train.py saves and resumes; generate.py selects. Files hold plain tensors and load with weights_only=True."""

from __future__ import annotations

import errno
import io
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from medgen import fault, files
from medgen.errors import InputError, MedgenError

FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step-(\d{6,})")
SPACE_RESERVE_BYTES = 16 * 2**20  # what must stay free beside the checkpoint itself


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `metrics`: name -> {"value": float, "better": "lower" | "higher"}."""

    folder: Path
    step: int
    commit: dict[str, Any]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        metrics: dict[str, dict[str, Any]] = self.commit["metrics"]
        return metrics

    @property
    def sha256(self) -> str:
        """One hash over all weights and optimizer states; what was logged on the way is not part of it."""
        return files.sha256_json({name: facts["sha256"] for name, facts in self.commit["files"].items() if name.endswith(".pt")})

    def tensors(self, name: str) -> Any:
        """The object saved under `name`, on the CPU."""
        return torch.load(self.folder / f"{name}.pt", map_location="cpu", weights_only=True)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = files.read_json(self.folder / "state.json")
        return state


class _HashingWriter(io.RawIOBase):
    """A file for torch.save that hashes on the way and never writes more than one block at once."""

    def __init__(self, handle: BinaryIO):
        self.handle, self.digest, self.size_bytes = handle, sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        try:
            for start in range(0, len(view), files.CHUNK_BYTES):
                self.handle.write(view[start : start + files.CHUNK_BYTES])
        except OSError as error:
            self.error = error
            raise
        self.digest.update(view)
        self.size_bytes += len(view)
        return len(view)


def _write_tensors(path: Path, value: Any) -> dict[str, Any]:
    """torch.save through the hashing writer; returns what commit.json says of the file."""
    with open(path, "wb") as handle:
        writer = _HashingWriter(handle)
        try:
            torch.save(value, writer)  # type: ignore[arg-type]  # torch only calls write()
        except RuntimeError:
            if writer.error is not None:  # torch closes its archive on the way out and complains about that instead
                raise writer.error from None
            raise
    if fault.ARMED:
        fault.at("ckpt.write", path)
    return {"sha256": writer.digest.hexdigest(), "size_bytes": writer.size_bytes}


def save(folder: Path, step: int, objects: dict[str, Any], state: dict[str, Any], metrics: dict[str, Any]) -> Checkpoint:
    """Write step-<step> and commit it. `objects`: name -> state dict of plain tensors; `state`: JSON.

    Raises MedgenError if a weight is not finite or the disk is full; what was there before stays untouched."""
    _refuse_non_finite(objects, step)
    _refuse_full_disk(folder, objects)
    target = folder / f"step-{step:06d}"
    if target.exists():
        shutil.rmtree(target)  # only an unverifiable one: resuming would have started from a good one
    try:
        with files.folder_in_one_move(target) as temporary:
            hashes = {f"{name}.pt": _write_tensors(temporary / f"{name}.pt", value) for name, value in objects.items()}
            files.write_json(temporary / "state.json", state)
            state_file = temporary / "state.json"
            hashes["state.json"] = {"sha256": files.sha256_file(state_file), "size_bytes": state_file.stat().st_size}
            commit = {"version": FORMAT_VERSION, "step": step, "metrics": metrics, "files": hashes}
            if fault.ARMED:
                fault.at("ckpt.commit")
            files.write_json(temporary / "commit.json", commit)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MedgenError(f"{target}: the disk is full; free some space and submit again, the last checkpoint is intact") from None
        raise
    return Checkpoint(target, step, commit)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for child in children for tensor in _tensors_in(child)]


def _refuse_non_finite(objects: dict[str, Any], step: int) -> None:
    for name, value in objects.items():
        for tensor in _tensors_in(value):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise MedgenError(f"step {step}: {name} holds NaN or infinity; not saved, the last good checkpoint stays")


def _refuse_full_disk(folder: Path, objects: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for value in objects.values() for tensor in _tensors_in(value)) + SPACE_RESERVE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MedgenError(
            f"{folder}: a checkpoint needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; "
            "free some space and submit again, the last checkpoint is intact"
        )


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, in words; None if every file matches its commit."""
    try:
        commit = _read_commit(folder)
    except FileNotFoundError:
        return "it was never committed (no commit.json)"
    except (OSError, ValueError):
        return "commit.json is not readable"
    for name, facts in commit["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {facts['size_bytes']}"
        if files.sha256_file(path) != facts["sha256"]:
            return f"{name} does not match its sha256"
    return None


def _read_commit(folder: Path) -> dict[str, Any]:
    """commit.json in the form that `save` writes. Raises ValueError if it has any other, OSError if it cannot be read."""
    try:
        commit: dict[str, Any] = files.read_json(folder / "commit.json")
        well_formed = (
            commit["version"] == FORMAT_VERSION
            and folder.name == f"step-{commit['step']:06d}"
            and "state.json" in commit["files"]
            and all(isinstance(facts["size_bytes"], int) and isinstance(facts["sha256"], str) for facts in commit["files"].values())
            and all(isinstance(facts["value"], int | float) and facts["better"] in ("lower", "higher") for facts in commit["metrics"].values())
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: not a commit: {error}") from None
    if not well_formed:
        raise ValueError(f"{folder}: not a commit of this checkpoint")
    return commit


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    found = [(match, path) for path in folder.glob("step-*") if (match := STEP_FOLDER.fullmatch(path.name))]
    return sorted(((int(match.group(1)), path) for match, path in found), reverse=True)


def _committed(folder: Path) -> list[Checkpoint]:
    """Checkpoints with a readable commit, newest first; contents not verified."""
    checkpoints = []
    for step, path in _step_folders(folder):
        try:
            checkpoints.append(Checkpoint(path, step, _read_commit(path)))
        except (OSError, ValueError):
            continue
    return checkpoints


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; bad ones are reported and skipped. None if there never was one.

    Raises MedgenError if checkpoints exist but none verifies: training never silently starts over."""
    found = _step_folders(folder)
    for step, path in found:
        if fault.ARMED:
            fault.at("ckpt.load", step=step)
        problem = problem_with(path)
        if problem is None:
            return Checkpoint(path, step, _read_commit(path))
        say(f"skipping checkpoint {path}: {problem}")
    if found:
        raise MedgenError(f"{folder}: {len(found)} checkpoints, none of them verifies; to start from zero: mv {folder} {folder.with_name(f'bad-{folder.name}')}")
    return None


def set_aside_newer(folder: Path, good: Checkpoint) -> None:
    """Rename what `newest` skipped to bad-step-..., so that it neither counts as kept nor as progress; clear half-written ones."""
    files.sweep_temporaries(folder, "step-*")
    for step, path in _step_folders(folder):
        if step > good.step:
            target = folder / f"bad-{path.name}"
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)


def _best(checkpoints: list[Checkpoint], metric: str) -> Checkpoint | None:
    scored = [item for item in checkpoints if metric in item.metrics]
    if not scored:
        return None
    sign = -1 if scored[0].metrics[metric]["better"] == "higher" else 1
    return min(scored, key=lambda item: (sign * item.metrics[metric]["value"], item.step))


def select(folder: Path, selector: str, say: Callable[[str], None]) -> Checkpoint:
    """`last`, or `best-<metric>`; verified. Raises MedgenError if there is none, InputError for an unknown metric."""
    if selector == "last":
        chosen = newest(folder, say)
        if chosen is None:
            raise MedgenError(f"{folder}: no checkpoint yet; train first")
        return chosen
    metric = selector.removeprefix("best-")
    checkpoints = _committed(folder)
    chosen = _best(checkpoints, metric)
    if chosen is None:
        known = sorted({f"best-{name}" for item in checkpoints for name in item.metrics})
        raise InputError(f"checkpoint: {selector}: no checkpoint has this metric; use one of: {', '.join(['last', *known])}")
    problem = problem_with(chosen.folder)
    if problem is not None:
        raise MedgenError(f"{chosen.folder}: the {selector} checkpoint cannot be used: {problem}; choose another with checkpoint: last")
    return chosen


def selectable(folder: Path, say: Callable[[str], None]) -> dict[str, Checkpoint]:
    """What every selector stands for now: `last`, and `best-<metric>` for every metric there is."""
    metrics = sorted({name for item in _committed(folder) for name in item.metrics})
    return {selector: select(folder, selector, say) for selector in ["last", *(f"best-{name}" for name in metrics)]}


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest and the best of every metric; returns what was deleted."""
    checkpoints = _committed(folder)
    metrics = {name for item in checkpoints for name in item.metrics}
    protected = {item.folder for item in checkpoints[:keep]}
    protected |= {best.folder for name in metrics if (best := _best(checkpoints, name)) is not None}
    doomed = [item.folder for item in checkpoints if item.folder not in protected]
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)
    return doomed
