"""Whether what a run will write fits: bytes and files of images, checkpoints and slice cache against what is free. Called by preflight.py.

Estimates from the plan alone; the size of a checkpoint comes from one that is there, or from `medgen check`."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medgen import commits, files, spec
from medgen.errors import InputError
from medgen.launch import record
from medgen.launch.findings import Finding, undone
from medgen.launch.submit import Prepared
from medgen.room import Free, free_in, mount_of
from medgen.rundir import RunDir
from medgen.spec_data import DataSpec
from medgen.spec_stages import GenerateStage, TrainStage
from medgen.spec_utility import StructureStage, UtilityStage

if TYPE_CHECKING:
    from medgen.data.index import Source

BLOCK_BYTES = 4096  # what the smallest file takes
RUN_BYTES, RUN_FILES = 32 * 2**20, 500  # of a run that makes nothing
CACHE_FILES = 20
WRITING = 2  # checkpoints beside the newest ones kept: the best by validation loss, and the one that is being written
SNAPSHOTS = 3  # of a trial: two that are kept, and the one that is being written
RESNET_PARAMETERS = {"resnet50": 25_600_000, "resnet18": 11_700_000}
UNET_PARAMETERS = 30  # at most, for each squared number of channels of a level
MEMORY_TYPES = {"tmpfs", "ramfs", "devtmpfs"}
NODE_FOLDERS = [Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm", "/run")]
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """What is still to be written. `unknown`: training stages whose checkpoints have a size that nobody knows yet."""

    images_bytes: int = 0
    checkpoint_bytes: int = 0
    cache_bytes: int = 0
    rest_bytes: int = 0  # code, logs, curves, report
    files: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def of_runs(self) -> dict[str, int]:
        return {"images": self.images_bytes, "checkpoints": self.checkpoint_bytes, "the rest": self.rest_bytes}

    def __add__(self, other: Need) -> Need:
        return Need(
            self.images_bytes + other.images_bytes, self.checkpoint_bytes + other.checkpoint_bytes, self.cache_bytes + other.cache_bytes,
            self.rest_bytes + other.rest_bytes, self.files + other.files, (*self.unknown, *(name for name in other.unknown if name not in self.unknown)),
        )  # fmt: skip


def look(prepared: Sequence[Prepared]) -> list[Finding]:
    """A finding for the runs folder, and one for the space in it (and in that of the cache, if it lies elsewhere)."""
    written = _try_to_write(prepared[0].run)
    if written.mark == "wrong":
        return [written]
    need = total_need(prepared)
    runs, cache = existing(prepared[0].run.root), existing(prepared[0].run.cache)
    if runs.stat().st_dev == cache.stat().st_dev:
        return [written, compare({**need.of_runs, "slice cache": need.cache_bytes}, need.files, free_in(runs), need.unknown)]
    return [written, compare(need.of_runs, need.files, free_in(runs), need.unknown), compare({"slice cache": need.cache_bytes}, CACHE_FILES, free_in(cache))]


def existing(path: Path) -> Path:
    """The path, or its nearest parent that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _try_to_write(run: RunDir) -> Finding:
    """Create, sync, rename, remove: what every task of the run does all the time."""
    folder = existing(run.root)
    first, second = folder / f".check.{uuid.uuid4().hex[:8]}.tmp", folder / f".check.{uuid.uuid4().hex[:8]}.tmp"
    try:
        files.write_bytes(first, b"medgen looks whether it may write here\n")
        os.replace(first, second)
        second.unlink()
    except OSError as error:
        words = InputError(f"{run.root}: cannot be written: {error.strerror or error}; mend that, or set MEDGEN_RUNS to a folder that can")
        return Finding("runs folder", "wrong", str(words))
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return Finding("runs folder", "fine", f"{run.root.parent} can be written", {"folder": str(run.root.parent)})


def total_need(prepared: Sequence[Prepared]) -> Need:
    """Of all points of a sweep, which share the caches of equal data."""
    need = sum((run_need(item) for item in prepared), Need())
    data = {files.sha256_json([item.spec.data.model_dump(mode="json"), item.spec.seed]): item for item in prepared if item.spec.data is not None}
    return need + Need(cache_bytes=sum(_cache_bytes(item) for item in data.values()))


def run_need(item: Prepared) -> Need:
    need = Need(rest_bytes=RUN_BYTES, files=RUN_FILES)
    for stage in item.plan.stages:
        left = undone(item.run, stage)
        asked = item.spec.stages.get(stage.name)
        if isinstance(asked, GenerateStage):
            need += _images(item.spec, asked, sum(task.images.stop - task.images.first for task in left if task.images is not None))
        if isinstance(asked, TrainStage) and left:
            need += _checkpoints(item.run, stage.name, asked)
        if isinstance(asked, StructureStage | UtilityStage):
            need += _snapshots(asked, min(stage.parallel, len(left)))
    return need


def _snapshots(stage: StructureStage | UtilityStage, at_once: int) -> Need:
    """Of the trials that run at once; one that is done keeps none. Weights, the best weights, and two moments of each."""
    resnet = stage.network if isinstance(stage, UtilityStage) else None
    parameters = RESNET_PARAMETERS[resnet] if resnet is not None else UNET_PARAMETERS * sum(width**2 for width in stage.unet_channels or [])
    kept = SNAPSHOTS * at_once
    return Need(checkpoint_bytes=kept * 4 * 4 * parameters, files=kept * 5)


def _images(checked: spec.Spec, stage: GenerateStage, count: int) -> Need:
    """Shards hold the files, the dataset links to them; each has a folder per image."""
    source = checked.stages[stage.source]
    assert isinstance(source, TrainStage) and checked.data is not None
    config = spec.family_config(source.config)
    channels = {*config.output_channels, *(name for name in config.condition_channels if name == "seg")}
    pixels = checked.data.size**2
    value_bytes = 4 if stage.format == "npy" else 2
    exports = [*(2 * pixels for _ in stage.export), *([pixels] if stage.export else [])]  # 16 bits each, and the labels
    sizes = [*(pixels * (1 if name == "seg" else value_bytes) for name in channels), *exports]
    blocks = sum(-(-size // BLOCK_BYTES) for size in sizes) + 2
    return Need(images_bytes=count * blocks * BLOCK_BYTES, files=count * (len(sizes) + 2))


def _checkpoints(run: RunDir, name: str, stage: TrainStage) -> Need:
    size, present = checkpoint_bytes(run, name), _bytes_in(run.checkpoints(name))
    if size is None:
        return Need(unknown=(name,))
    count = _most_checkpoints(stage)
    return Need(checkpoint_bytes=max(size, count * size - present), files=10 * count)


def _most_checkpoints(stage: TrainStage) -> int:
    """At one moment."""
    return spec.family_config(stage.config).loop.keep + WRITING


def retention(prepared: Sequence[Prepared]) -> list[str]:
    """What every training stage keeps and how large that becomes, a line each."""
    lines = []
    for item in prepared:
        for name, stage in item.spec.stages.items():
            if not isinstance(stage, TrainStage):
                continue
            size, count = checkpoint_bytes(item.run, name), _most_checkpoints(stage)
            if size is None:
                told = f"at most {count} at a time, of a size that `medgen check {item.spec_path}` measures"
            else:
                told = f"at most {count} x {amount(size)} = {amount(count * size)}, with the one that is being written"
            lines.append(f"{name} keeps its {spec.family_config(stage.config).loop.keep} newest checkpoints and the best of each metric: {told}")
    return list(dict.fromkeys(lines))


def checkpoint_bytes(run: RunDir, stage: str) -> int | None:
    """Of the newest checkpoint there is, or as `medgen check` measured it; None if neither is there."""
    newest = commits.newest(run.checkpoints(stage))
    if newest is not None:
        return _bytes_in(newest[1])
    known = record.read(run)
    return known.stages[stage].checkpoint_bytes if known is not None and stage in known.stages else None


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a run that goes on removes old checkpoints
            total += path.stat().st_size if path.is_file() else 0
    return total


def _cache_bytes(item: Prepared) -> int:
    """Upper bound: every slice before any filter. 0 if the cache is there."""
    from medgen.data import build, index

    data = item.spec.data
    assert data is not None
    of_a_slice = data.size**2 * (4 * len(data.channels) + (data.mask is not None))
    if data.format == "phantom":
        from medgen.data.phantoms import DEFAULT_SHAPE

        return index.phantom_patients(data) * DEFAULT_SHAPE[data.axis] * of_a_slice
    sources, _ = index.read_index(data, item.spec.seed)
    known = build.known_hashes(item.run.cache, sources)
    if known is not None and build.folder_of(data, sources, known, item.run.cache).is_dir():
        return 0
    as_acquired = sum(4 * source.entry.header.rows * source.entry.header.columns for source in sources if source.entry is not None)
    return _slices(data, sources) * of_a_slice + as_acquired


def _slices(data: DataSpec, sources: list[Source]) -> int:
    """As if all volumes were like the first: one header read, not all of them again."""
    from medgen.data.volumes import read_header

    if data.format in ("stack", "cardiac", "jsonl"):
        return len(sources)
    header = read_header(next(iter(sources[0].files.values())))
    return len(sources) * int(header.shape[header.slice_axis(data.axis)])


def compare(parts: dict[str, int], needed_files: int, free: Free, unknown: Sequence[str] = ()) -> Finding:
    """Wrong if it cannot fit, a warning if less than twice as much is free: estimates are estimates, and others write too."""
    needed = sum(parts.values())
    told = ", ".join(f"{name} {amount(size)}" for name, size in parts.items() if size >= 0.1 * needed)
    left_out = f", without the checkpoints of {', '.join(unknown)}, whose size `medgen check` measures" if unknown else ""
    files_free = "" if free.files is None else f" and {free.files:,} files"
    limit = f" under the {free.limit}" if free.limit else ""
    text = f"about {amount(needed)} ({told}) and {needed_files:,} files{left_out}; {free.folder} has {amount(free.bytes)}{files_free} free{limit}"
    facts = {"needed_bytes": needed, "needed_files": needed_files, "free_bytes": free.bytes, "free_files": free.files, "folder": str(free.folder), "limit": free.limit}

    def exceeds(factor: int) -> bool:
        return factor * needed > free.bytes or (free.files is not None and factor * needed_files > free.files)

    if exceeds(1):
        return Finding("space", "wrong", f"not enough room: this run needs {text}; free some, or set MEDGEN_RUNS (and MEDGEN_CACHE) to a larger disk", facts)
    return Finding("space", "warning", f"little room: this run needs {text}", facts) if exceeds(2) else Finding("space", "fine", f"needs {text}", facts)


def amount(size_bytes: float) -> str:
    return f"{size_bytes / GIB:,.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:,.0f} MiB"


def why_only_here(path: Path) -> str | None:
    """Why other nodes will hardly see this path, in words; None if nothing speaks against it."""
    resolved = path.resolve()
    kind, _ = mount_of(resolved)
    if kind in MEMORY_TYPES:
        return f"it lies in the memory of this machine ({kind})"
    local = next((folder for folder in NODE_FOLDERS if resolved.is_relative_to(folder)), None)
    return f"{local} is usually a disk of each node by itself" if local is not None else None
