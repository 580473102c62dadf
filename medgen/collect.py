"""Collection: verify what every task of a stage made, then put it together: images to one dataset in one move, trials to scores.

Called by `medgen collect` through task.perform. Good files are linked, never rewritten; bad shards are set aside."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd

from medgen import collected, csv_files, files
from medgen.collected import EXPORT_PREFIX, INDEX, MANIFEST, SHA_SUFFIX
from medgen.data.image_files import read_slice
from medgen.errors import MedgenError
from medgen.gate import accounts
from medgen.plan import PlannedStage
from medgen.shards import read_manifest, set_aside, shard_problem
from medgen.task import Done, Work


def collect(work: Work) -> Done:
    """What the stage of this one is for. Raises MedgenError naming the tasks whose part is missing or corrupt; they count as not done."""
    source = work.plan.stage(work.stage.settings["of"])
    if source.kind == "generate":
        return _collect_images(work, source)
    return _collect_trials(work, source)


def _collect_trials(work: Work, source: PlannedStage) -> Done:
    """The scores of all trials together."""
    from medgen.evaluate import scores
    from medgen.utility.comparison import collect_utility
    from medgen.utility.consistency import collect_structure

    written = collect_utility(work, source) if source.kind == "utility" else collect_structure(work, source)
    found = scores.from_json(files.read_json(written[0])["scores"])
    return Done(written, {item.name: round(item.value, 5) for item in found})


def _collect_images(work: Work, source: PlannedStage) -> Done:
    """Publish <stage>/dataset."""
    work.await_done(source)
    manifests = _verified_manifests(work, source)
    target = work.run.dataset(source.name)
    table = _index(manifests)
    if target.exists():
        problem = _dataset_problem(target, table)
        if problem is None:
            work.say(f"{work.stage.name}: the dataset is there and verifies")
            return _done(target, table, manifests)
        aside = target.with_name(f"dataset.bad.{os.getpid()}")
        target.rename(aside)
        work.run.event("dataset_set_aside", stage=source.name, cause=problem)
        work.say(f"{work.stage.name}: {problem}; moved to {aside} and built again")
    with files.folder_in_one_move(target) as folder:
        for task, manifest in zip(source.tasks, manifests, strict=True):
            _link_images(work.run.shard(source.name, task.shard), folder, manifest)
        table.to_csv(folder / INDEX, index=False, lineterminator="\n")
        stacked = _write_stack(folder, table) if source.settings["stack"] else []
        files.write_json(folder / MANIFEST, _dataset_manifest(work, source, table, manifests, files.sha256_file(folder / INDEX), stacked))
    work.say(f"{work.stage.name}: {len(table)} images in {target}")
    _tell_rejected(work, source, manifests)
    return _done(target, table, manifests)


def _tell_rejected(work: Work, source: PlannedStage, manifests: list[dict[str, Any]]) -> None:
    """How many were rejected; an event if they are too many to trust the rest."""
    counts = _counts(manifests)
    if not counts["rejected"]:
        return
    gate = manifests[0]["gate"]
    work.say(f"{work.stage.name}: {accounts.in_words(counts)}" + (f"; {accounts.held_out_in_words(gate)}" if gate is not None else ""))
    alarm = accounts.alarm(counts)
    if alarm is not None:
        work.run.event("many_rejected", stage=source.name, cause=alarm)
        work.say(f"{work.stage.name}: warning: {alarm}")


def _verified_manifests(work: Work, source: PlannedStage) -> list[dict[str, Any]]:
    bad: dict[int, str] = {}
    for number, task in enumerate(source.tasks):
        problem = shard_problem(work.run.shard(source.name, task.shard), task)
        if problem is not None:
            bad[task.shard] = problem
        work.progress(number + 1, len(source.tasks), "shards")
    for shard, problem in bad.items():
        set_aside(work.run, source.name, shard, problem)
    if bad:
        listing = "; ".join(f"shard {shard}: {problem}" for shard, problem in list(bad.items())[:10])
        raise MedgenError(f"{len(bad)} of {len(source.tasks)} shards of {source.name} are missing or corrupt and must be made again: {listing}")
    manifests = [read_manifest(work.run.shard(source.name, task.shard)) for task in source.tasks]
    checkpoints = {manifest["checkpoint_sha256"] for manifest in manifests}
    if len(checkpoints) > 1:
        raise MedgenError(f"{source.name}: its shards come from {len(checkpoints)} different checkpoints; remove {work.run.stage(source.name) / 'shards'} and submit again")
    gates = {manifest["gate"]["sha256"] for manifest in manifests if manifest["gate"] is not None}
    if len(gates) > 1:
        raise MedgenError(f"{source.name}: its shards were judged by {len(gates)} different sets of thresholds; remove {work.run.stage(source.name) / 'shards'} and submit again")
    return manifests


def _index(manifests: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per image, in order: what made it, where its files are, their hashes. Can be read again as format: csv."""
    rows = []
    for manifest in manifests:
        for entry in manifest["images"]:
            row = {key: value for key, value in entry.items() if key not in ("files", "exports")}
            row = {"id": row.pop("id"), "patient": f"synthetic_{entry['id']}", **row, "checkpoint_sha256": manifest["checkpoint_sha256"]}
            for channel, facts in entry["files"].items():
                row |= {channel: facts["path"], channel + SHA_SUFFIX: facts["sha256"]}
            for what, facts in entry["exports"].items():
                row |= {EXPORT_PREFIX + what: facts["path"], EXPORT_PREFIX + what + SHA_SUFFIX: facts["sha256"]}
            rows.append(row)
    return pd.DataFrame(rows)


def _link_images(shard_folder: Path, dataset: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["images"]:
        for facts in (*entry["files"].values(), *entry["exports"].values()):
            target = dataset / facts["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(shard_folder / facts["path"], target)
            except OSError:  # a file system without hard links
                shutil.copyfile(shard_folder / facts["path"], target)


def _write_stack(folder: Path, table: pd.DataFrame) -> list[Path]:
    """All images in one file [W, H, channels, N] in [-1, 1], in the order of the index, which is that of the classes; and their labels."""
    channels = collected.channels(table)
    slices = [np.stack([read_slice(folder / row[channel]).array.T for channel in channels], axis=2) for _, row in table.iterrows()]
    size = slices[0].shape[0]
    stack, labels = folder / f"Generated{size}x{size}.nii.gz", folder / "labels_syn.csv"
    nibabel.save(nibabel.Nifti1Image(np.stack(slices, axis=3).astype(np.float32) * 2 - 1, np.eye(4)), stack)
    rows = [{"ID": number, "Label": row["label_number"], "Subject_ID": row["patient"]} for number, row in enumerate(table.to_dict("records"))]
    csv_files.write_rows(labels, ["ID", "Label", "Subject_ID"], rows)
    return [stack, labels]


def _counts(manifests: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(manifest["counts"][key] for manifest in manifests) for key in manifests[0]["counts"]}


def _dataset_manifest(work: Work, source: PlannedStage, table: pd.DataFrame, manifests: list[dict[str, Any]], index_sha256: str, stacked: list[Path]) -> dict[str, Any]:
    """Says the same for any number of shards."""
    return {
        "version": 1,
        "stage": source.name,
        "images": len(table),
        "seed": work.plan.seed,
        "checkpoint_sha256": manifests[0]["checkpoint_sha256"],
        "data_fingerprint": manifests[0]["data_fingerprint"],
        "made_on": manifests[0]["made_on"],
        "counts": _counts(manifests),
        "counts_by_class": accounts.by_class([entry for manifest in manifests for entry in manifest["images"]]),
        "gate": manifests[0]["gate"],
        "index_sha256": index_sha256,
        "stack_sha256": {path.name: files.sha256_file(path) for path in stacked},
    }


def _dataset_problem(dataset: Path, table: pd.DataFrame) -> str | None:
    """Why a published dataset is not what the shards say; None if every file verifies."""
    if not (dataset / INDEX).is_file() or not (dataset / MANIFEST).is_file():
        return f"{dataset}: index.csv or manifest.json is missing"
    expected = table.to_csv(index=False, lineterminator="\n")
    if (dataset / INDEX).read_text() != expected:
        return f"{dataset / INDEX} is not what the shards say"
    listed = [item for column in collected.file_columns(table) for item in zip(table[column], table[f"{column}{SHA_SUFFIX}"], strict=True)]
    for path, digest in [*listed, *_stacked(dataset).items()]:
        if not (dataset / path).is_file() or files.sha256_file(dataset / path) != digest:
            return f"{dataset / path} is missing or does not match its sha256"
    return None


def _stacked(dataset: Path) -> dict[str, str]:
    """Names and hashes of what was published beside the images; a manifest that cannot be read has lost them."""
    try:
        return dict(files.read_json(dataset / MANIFEST)["stack_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return {MANIFEST: ""}


def _done(dataset: Path, table: pd.DataFrame, manifests: list[dict[str, Any]]) -> Done:
    images = [dataset / path for column in collected.file_columns(table) for path in table[column]]
    return Done([dataset / INDEX, dataset / MANIFEST, *(dataset / name for name in _stacked(dataset)), *images], {"images": len(table), **_counts(manifests)})
