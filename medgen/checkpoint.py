"""Checkpoints: one folder per step, commit.json with the hashes written last, the newest that verifies is used.

train.py saves and resumes; generate.py selects. Files hold plain tensors and load with weights_only=True; what is
sharded over ranks is written by all of them, see sharded.py; the form of commit.json is that of commits.py."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from medgen import commits, dist, fault, files, room
from medgen.commits import STATE, Commit
from medgen.dist import ALONE, Ranks
from medgen.errors import InputError, MedgenError

SPACE_RESERVE_BYTES = 16 * 2**20  # what must stay free beside the checkpoint itself
FINITE_BLOCK = 2**24  # values looked at together


@dataclass(frozen=True)
class Checkpoint(Commit):
    """A committed checkpoint, and what its files hold."""

    def tensors(self, name: str, like: Any = None) -> Any:
        """The object saved under `name`: whole tensors on the CPU, whoever wrote them, except where `like` has a sharded
        tensor in the same place: that rank's part of it. No process group is needed for whole tensors."""
        path = self.folder / f"{name}.pt"
        try:
            value = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's own words advise to switch the protection off
            raise MedgenError(f"{path}: it holds more than weights, so it was not loaded: medgen has not written this file") from None
        shards = self.folder / f"{name}.dcp"
        if not shards.is_dir() and not _may_be_sharded():
            return value
        from medgen import sharded

        if shards.is_dir():
            sharded.put_back(value, sharded.read(shards, like))
        return sharded.spread(value, like) if _holds_shards(like) else value

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = files.read_json(self.folder / STATE)
        return state


def save(
    folder: Path, step: int, objects: dict[str, Any], state: dict[str, Any], metrics: dict[str, Any], ranks: Ranks = ALONE
) -> Checkpoint:  # fmt: skip
    """Write step-<step> and commit it; called by all ranks at once. `objects`: name -> state dict; `state`: JSON.

    Rank 0 writes plain tensors, every rank its part of sharded ones. Raises on all ranks alike, InputError if the disk is full
    and MedgenError if a weight is not finite; what was there before stays untouched, and nothing half-written stays."""
    target = folder / commits.folder_name(step)
    written: dict[str, dict[str, Any]] = {}
    dist.agree(_not_finite(objects, step, ranks), ranks)
    dist.on_main(lambda: _prepare(target, objects), ranks)
    problem: Exception | None = None
    try:
        with contextlib.ExitStack() as of_main:
            temporary = dist.on_main(lambda: of_main.enter_context(files.folder_in_one_move(target)), ranks)
            written |= _write(temporary, objects, state, ranks)
            if ranks.is_main:
                if fault.ARMED:
                    fault.at("ckpt.commit")
                commits.write(temporary, step, written, metrics)
    except Exception as error:
        problem = _explained(error, target)
    dist.agree(problem, ranks)
    return Checkpoint(target, step, written, metrics)


def _explained(error: Exception, target: Path) -> Exception:
    if isinstance(error, OSError) and error.errno in room.FULL:
        return InputError(f"{target}: {room.FULL[error.errno]}; free some space and submit again; what was saved before is intact")
    return error


def _write(temporary: Path, objects: dict[str, Any], state: dict[str, Any], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """All files but commit.json; returns size and hash of each, on all ranks."""
    split = {name: _split(value) for name, value in objects.items()}
    written = dist.on_main(lambda: _write_plain(temporary, {name: rest for name, (rest, _) in split.items()}, state), ranks)
    for name, (_, shards) in split.items():
        if shards:
            from medgen import sharded

            shard_folder = temporary / f"{name}.dcp"
            dist.on_main(shard_folder.mkdir, ranks)
            written |= sharded.write(shard_folder, shards, ranks)
    return written


def _write_plain(temporary: Path, values: dict[str, Any], state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    written = {f"{name}.pt": _write_tensors(temporary / f"{name}.pt", value) for name, value in values.items()}
    path = temporary / STATE
    files.write_json(path, state)
    return {**written, STATE: {"sha256": files.sha256_file(path), "size_bytes": path.stat().st_size}}


def _write_tensors(path: Path, value: Any) -> dict[str, Any]:
    """torch.save through the hashing writer; returns what commit.json says of the file."""
    with open(path, "wb") as handle:
        room.reserve(handle, _size_bytes(value))
        writer = files.HashingWriter(handle)
        try:
            torch.save(value, writer)  # type: ignore[arg-type]  # torch only calls write()
        except RuntimeError:
            if writer.error is not None:  # torch closes its archive on the way out and complains about that instead
                raise writer.error from None
            raise
        room.give_back(handle, writer.size_bytes)
    if fault.ARMED:
        fault.at("ckpt.write", path)
    return writer.facts


def _may_be_sharded() -> bool:
    """False where nothing can be: then that part of torch is not even loaded, which would cost half a second."""
    return "torch.distributed.tensor" in sys.modules


def _split(value: Any) -> tuple[Any, dict[str, Any]]:
    """What rank 0 writes of an object, and the sharded tensors in it."""
    if not _may_be_sharded():
        return value, {}
    from medgen import sharded

    return sharded.split(value)


def _holds_shards(value: Any) -> bool:
    return bool(_split(value)[1])


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for child in children for tensor in _tensors_in(child)]


def _size_bytes(value: Any) -> int:
    """Of all tensors, the parts of other ranks included; tensors that share their memory are written once."""
    whole = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors_in(_split(value)[0])}
    return sum(whole.values()) + sum(tensor.numel() * tensor.element_size() for tensor in _split(value)[1].values())


def _not_finite(objects: dict[str, Any], step: int, ranks: Ranks) -> MedgenError | None:
    """What must not be saved, in words: rank 0 looks at plain tensors, every rank at its part of sharded ones."""
    for name, value in objects.items():
        rest, shards = _split(value)
        mine = [*(_tensors_in(rest) if ranks.is_main else []), *(tensor.to_local() for tensor in shards.values())]
        for tensor in mine:
            if tensor.is_floating_point() and not _is_finite(tensor):
                return MedgenError(f"step {step}: {name} holds NaN or infinity; not saved, the last good checkpoint stays")
    return None


def _is_finite(tensor: Tensor) -> bool:
    """Block by block: at once it would take twice the tensor's own memory."""
    return all(bool(torch.isfinite(block).all()) for block in tensor.detach().flatten().split(FINITE_BLOCK))


def _prepare(target: Path, objects: dict[str, Any]) -> None:
    """Clear what stands in the way of a new checkpoint, and look whether it fits."""
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep_temporaries(folder, "step-*")
    if target.exists():
        shutil.rmtree(target)  # only an unverifiable one: resuming would have started from a good one
    needed_bytes = sum(_size_bytes(value) for value in objects.values()) + SPACE_RESERVE_BYTES
    needed_files = 2 * len(objects) + 4  # without the parts of other ranks: few, too
    if _short_of(folder, needed_bytes, needed_files) is not None:
        for path in folder.glob(commits.SET_ASIDE):  # set aside for a look; the training that goes on is worth more
            shutil.rmtree(path, ignore_errors=True)
    short = _short_of(folder, needed_bytes, needed_files)
    if short is not None:
        raise InputError(f"{folder}: {short}; free some space and submit again; what was saved before is intact")


def _short_of(folder: Path, needed_bytes: int, needed_files: int) -> str | None:
    """What there is too little of, in words; None if a checkpoint fits."""
    free = room.free_in(folder)
    full = f"the disk quota is used up ({free.limit})" if free.limit else "the disk is full"
    if free.bytes < needed_bytes:
        return f"{full}: a checkpoint needs {needed_bytes / 2**20:,.0f} MiB with its reserve, {free.bytes / 2**20:,.0f} MiB are free"
    if free.files is not None and free.files < needed_files:
        return f"{full}: a checkpoint needs {needed_files} files, {free.files} can still be made"
    return None


def layout_of(optimizer: Optimizer) -> dict[str, dict[int, nn.Parameter]]:
    """How an optimizer's state is to be sharded: each parameter in the place of its state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {"state": dict(enumerate(parameters))}


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, in words; None if every file matches its commit."""
    try:
        commit = commits.read(folder)
    except FileNotFoundError:
        return commits.UNCOMMITTED
    except (OSError, ValueError):
        return commits.UNREADABLE
    for name, facts in commit.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {facts['size_bytes']}"
        if files.sha256_file(path) != facts["sha256"]:
            return f"{name} does not match its sha256"
    return None


def open_verified(folder: Path) -> Checkpoint:
    """The one in this folder. Raises InputError if it does not verify."""
    problem = problem_with(folder)
    if problem is not None:
        raise InputError(f"{folder}: this checkpoint cannot be used: {problem}")
    return _open(folder)


def _open(folder: Path) -> Checkpoint:
    """One that `problem_with` has nothing to say against."""
    return Checkpoint(**vars(commits.read(folder)))


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; bad ones are reported and skipped. None if there never was one.

    Raises InputError if checkpoints exist but none verifies: training never silently starts over, and another try would end the same."""
    found = commits.step_folders(folder)
    for step, path in found:
        if fault.ARMED:
            fault.at("ckpt.load", step=step)
        problem = problem_with(path)
        if problem is None:
            return _open(path)
        say(f"skipping checkpoint {path}: {problem}")
    if found:
        raise InputError(f"{folder}: {len(found)} checkpoints, none of them verifies; to start from zero: mv {folder} {commits.set_aside(folder)}")
    return None


def set_aside_newer(folder: Path, good: Checkpoint) -> None:
    """Rename what `newest` skipped to bad-step-..., so that it neither counts as kept nor as progress; clear half-written ones."""
    files.sweep_temporaries(folder, "step-*")
    for step, path in commits.step_folders(folder):
        if step > good.step:
            shutil.rmtree(commits.set_aside(path), ignore_errors=True)
            path.rename(commits.set_aside(path))


def select(folder: Path, selector: str, say: Callable[[str], None]) -> Checkpoint:
    """`last`, `last-<phase>` or `best-<metric>`; verified. Raises MedgenError if there is none, InputError for an unknown one."""
    if selector == "last":
        chosen = newest(folder, say)
        if chosen is None:
            raise MedgenError(f"{folder}: no checkpoint yet; train first")
        return chosen
    best = _by_selector(folder)
    if selector not in best:
        raise InputError(f"checkpoint: {selector}: there is none; use one of: {', '.join(['last', *best])}")
    path = best[selector].folder
    problem = problem_with(path)
    if problem is not None:
        raise MedgenError(f"{path}: the {selector} checkpoint cannot be used: {problem}; choose another with checkpoint: last")
    return _open(path)


def selectable(folder: Path, say: Callable[[str], None]) -> dict[str, Checkpoint]:
    """What every selector stands for now: `last`, and one for every metric there is."""
    return {selector: select(folder, selector, say) for selector in ["last", *_by_selector(folder)]}


def _by_selector(folder: Path) -> dict[str, Commit]:
    best = commits.best(commits.committed(folder))
    return {f"last-{name.removeprefix(commits.LAST)}" if name.startswith(commits.LAST) else f"best-{name}": found for name, found in best.items()}


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest and the best of every metric; returns what was deleted."""
    doomed = [item.folder for item in commits.beyond_policy(commits.committed(folder), keep)]
    for path in doomed:
        shutil.rmtree(path, ignore_errors=True)
    return doomed
