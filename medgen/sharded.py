"""Tensors that are spread over ranks, in a folder: every rank writes its part, any number of ranks reads what it needs. Used by checkpoint.py.

torch.distributed.checkpoint plans who writes and reads what; the files are plain: bytes in rank-<n>.bin, places in index.json."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as planned
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.futures import Future

from medgen import dist, fault, files, room
from medgen.dist import Ranks
from medgen.errors import MedgenError

INDEX = "index.json"
FORMAT_VERSION = 1
ALIGNMENT_BYTES = 64

Place = tuple[str | int, ...]  # keys and positions that lead to a tensor inside dictionaries and lists


@dataclass(frozen=True)
class Chunk:
    """A block of one tensor, and where its bytes are."""

    offsets: list[int]
    sizes: list[int]
    file: str
    start_bytes: int


# --- inside dictionaries and lists -----------------------------------------------------------------------------------


def split(value: Any) -> tuple[Any, dict[str, DTensor]]:
    """The value with None for every sharded tensor, and those tensors by key. A value without any comes back itself."""
    shards = dict(_shards_in(value, ()))
    return (_without_shards(value), shards) if shards else (value, {})


def _shards_in(value: Any, path: Place) -> Iterator[tuple[str, DTensor]]:
    if isinstance(value, DTensor):
        yield _key(path), value
    elif isinstance(value, dict | list | tuple):
        for name, child in _children(value):
            found = list(_shards_in(child, (*path, name)))
            if found and isinstance(value, tuple):
                raise TypeError(f"a sharded tensor in a tuple cannot be saved: {_key((*path, name))}; use a list")
            yield from found


def _children(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else list(enumerate(value))


def _without_shards(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_shards(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_without_shards(child) for child in value]
    return None if isinstance(value, DTensor) else value


def _key(path: Place) -> str:
    return json.dumps(path)  # tells 0 from "0"


def put_back(value: Any, tensors: dict[str, Tensor]) -> None:
    """Undo `split`, in place."""
    for key, tensor in tensors.items():
        *parents, last = json.loads(key)
        holder = value
        for name in parents:
            holder = holder[name]
        holder[last] = tensor


def _layout(like: Any, path: Place) -> DTensor | None:
    """The sharded tensor in `like` at a path, or at the beginning of it: a parameter stands for its optimizer state."""
    name: Any
    for name in path:
        if isinstance(like, DTensor):
            break
        if not isinstance(like, dict | list) or name not in dict(_children(like)):
            return None
        like = like[name]
    return like if isinstance(like, DTensor) else None


def spread(value: Any, like: Any) -> Any:
    """The value with every whole tensor cut as the sharded one in the same place of `like`; each rank keeps its part."""
    return _spread(value, like, ())


def _spread(value: Any, like: Any, path: Place) -> Any:
    if isinstance(value, dict):
        return {name: _spread(child, like, (*path, name)) for name, child in value.items()}
    if isinstance(value, list):
        return [_spread(child, like, (*path, number)) for number, child in enumerate(value)]
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    layout = _layout(like, path)
    if layout is None or layout.shape != value.shape:
        return value
    return distribute_tensor(value.to(layout.device), layout.device_mesh, layout.placements, src_data_rank=None)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(folder: Path, shards: dict[str, DTensor], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Write the tensors into a folder that is there; returns size and hash of every file in it, of all ranks.

    Raises on all ranks, after all have stopped writing, what the first failing rank has met."""
    writer = _Writer(folder, ranks)
    planner = planned.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        planned.save(dict(shards), storage_writer=writer, planner=planner, process_group=dist.slow_group() if ranks.world_size > 1 else None)
    except CheckpointException as failure:
        rank, (error, stack) = min(failure.failures.items(), key=lambda item: item[0])
        if isinstance(error, OSError) and error.errno in room.FULL:
            raise error from None
        if rank == ranks.rank:
            # perhaps a defect: the log of the rank that has it says where; the error itself came without, through pickle
            print("Traceback (most recent call last):\n" + "".join(stack.format()) + f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise MedgenError(f"{folder.name}: rank {rank} could not write its part: {type(error).__name__}: {error}") from None
    written: dict[str, dict[str, Any]] = {}
    for facts in dist.gathered(writer.written, ranks):
        written |= facts
    return written


def _blocks(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer; numpy says so from Python 3.12 on


class _Writer(planned.StorageWriter):
    """One file per rank."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.name = folder, f"rank-{ranks.rank:05d}.bin"
        self.written: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            path = self.folder / self.name
            with open(path, "wb") as handle:
                room.reserve(handle, sum(_aligned(_size_bytes(item)) for item in plan.items))
                writer = files.HashingWriter(handle)
                for item in plan.items:
                    tensor, start_bytes = planner.resolve_data(item), writer.size_bytes
                    assert isinstance(tensor, Tensor) and item.tensor_data is not None
                    chunk = Chunk(list(item.tensor_data.chunk.offsets), list(item.tensor_data.chunk.sizes), self.name, start_bytes)
                    size_bytes = writer.write(_blocks(tensor))
                    writer.write(bytes(_aligned(size_bytes) - size_bytes))
                    results.append(WriteResult(index=item.index, size_in_bytes=size_bytes, storage_data=chunk))
                room.give_back(handle, writer.size_bytes)
                os.fsync(handle.fileno())
            self.written[f"{self.folder.name}/{self.name}"] = writer.facts
            if fault.ARMED:
                fault.at("ckpt.write", path)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all have written."""
        chunks: dict[str, list[Chunk]] = {}
        for result in (result for of_rank in results for result in of_rank):
            chunks.setdefault(result.index.fqn, []).append(result.storage_data)
        tensors = {}
        for key, facts in metadata.state_dict_metadata.items():
            assert isinstance(facts, TensorStorageMetadata)
            tensors[key] = {"dtype": str(facts.properties.dtype).removeprefix("torch."), "size": list(facts.size), "chunks": [asdict(chunk) for chunk in chunks[key]]}
        path = self.folder / INDEX
        files.write_json(path, {"version": FORMAT_VERSION, "tensors": tensors})
        self.written[f"{self.folder.name}/{INDEX}"] = {"sha256": files.sha256_file(path), "size_bytes": path.stat().st_size}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _size_bytes(item: Any) -> int:
    count = 1
    for size in item.tensor_data.chunk.sizes:
        count *= size
    return count * int(item.tensor_data.properties.dtype.itemsize)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path, like: Any) -> dict[str, Tensor]:
    """All tensors of a folder by key, on this rank: sharded as those in the same place of `like`, else whole and on the CPU.

    Ranks need not ask together, and no process group is needed for whole tensors."""
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    wanted: dict[str, Any] = {}
    for key, facts in metadata.state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)
        layout = _layout(like, tuple(json.loads(key)))
        if layout is None:
            wanted[key] = torch.empty(facts.size, dtype=facts.properties.dtype)
        else:
            wanted[key] = torch.empty_like(layout, dtype=facts.properties.dtype, requires_grad=False)
    planner = planned.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(wanted, metadata, is_coordinator=True)
    plan = planner.finish_plan(planner.create_local_plan())
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(plan, planner).wait()
    return wanted


class _Reader(planned.StorageReader):
    """Reads of each chunk the rows that are wanted."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.chunks: dict[MetadataIndex, Chunk] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, Chunk] = {}
        for key, facts in files.read_json(self.folder / INDEX)["tensors"].items():
            chunks = [Chunk(**chunk) for chunk in facts["chunks"]]
            dtype: torch.dtype = getattr(torch, facts["dtype"])
            boxes = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in chunks]
            tensors[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(facts["size"]), boxes)
            places |= {MetadataIndex(key, chunk.offsets): chunk for chunk in chunks}
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.chunks = metadata.storage_data
        self.dtypes = {key: facts.properties.dtype for key, facts in metadata.state_dict_metadata.items() if isinstance(facts, TensorStorageMetadata)}

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item)
            target.detach().copy_(self._read(item))
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, item: ReadItem) -> Tensor:
        """Rows lie one after the other, so only those asked for are read; of the other dimensions all."""
        chunk, dtype = self.chunks[item.storage_index], self.dtypes[item.storage_index.fqn]
        first, rows = (item.storage_offsets[0], item.lengths[0]) if chunk.sizes else (0, 1)
        row = torch.Size(chunk.sizes[1:])
        row_bytes = row.numel() * dtype.itemsize
        content = torch.empty(rows * row_bytes, dtype=torch.uint8)
        with open(self.folder / chunk.file, "rb") as handle:
            handle.seek(chunk.start_bytes + first * row_bytes)
            _fill(handle, memoryview(content.numpy()))  # type: ignore[arg-type]
        tensor = content.view(dtype).view(torch.Size([rows, *row]) if chunk.sizes else torch.Size([]))
        for dimension in range(1, len(chunk.sizes)):
            tensor = tensor.narrow(dimension, item.storage_offsets[dimension], item.lengths[dimension])
        return tensor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _fill(handle: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = handle.readinto(view[done : done + files.CHUNK_BYTES])
        if not count:
            raise EOFError(f"{handle.name} ends too early")
        done += count
