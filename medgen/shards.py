"""A shard of generated images: its manifest, whether it is whole, and setting it aside. Loads no torch; used by generate.py and collect.py."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgen import files
from medgen.plan import Task
from medgen.rundir import RunDir

MANIFEST = "manifest.json"
MANIFEST_VERSION = 4


@dataclass
class Counts:
    """How the drawn images (or masks) were judged. by_rule: how many broke each rule; an image may break several."""

    accepted: int = 0
    rejected: int = 0
    by_rule: dict[str, int] = field(default_factory=dict)

    def add(self, broken: Sequence[str]) -> None:
        """One drawn image, and the rules that it breaks."""
        self.accepted += not broken
        self.rejected += bool(broken)
        for rule in broken:
            self.by_rule[rule] += 1

    @property
    def facts(self) -> dict[str, int]:
        return {"drawn": self.accepted + self.rejected, "accepted": self.accepted, "rejected": self.rejected,
                **{f"rejected_{rule}": count for rule, count in self.by_rule.items()}}  # fmt: skip


def read_manifest(shard_folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = files.read_json(shard_folder / MANIFEST)
    return manifest


def files_listed(manifest: dict[str, Any]) -> list[dict[str, str]]:
    """Path and sha256 of every file of a shard."""
    of_images = [facts for entry in manifest["images"] for facts in (*entry["files"].values(), *entry["exports"].values())]
    return [*of_images, *(facts for entry in manifest["rejected_shown"] for facts in entry["files"].values())]


def shard_problem(folder: Path, task: Task) -> str | None:
    """Why a shard folder cannot be used, in words; None if it is exactly what the plan asks for and every file verifies."""
    assert task.images is not None
    try:
        manifest = read_manifest(folder)
        if not files.own_hash_holds(manifest):
            return "manifest.json does not match its sha256"
        if manifest["task_hash"] != task.hash:
            return "it was made for another plan"
        if [entry["index"] for entry in manifest["images"]] != list(range(task.images.first, task.images.stop)):
            return f"it does not hold exactly images {task.images.first} to {task.images.stop - 1}"
        written = [(str(facts["path"]), facts["sha256"]) for facts in files_listed(manifest)]
        complete = written and manifest["counts"]["accepted"] == len(manifest["images"]) and manifest["data_fingerprint"]
    except FileNotFoundError:
        return "manifest.json is missing" if folder.exists() else "the shard is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is not readable"
    if not complete:
        return "manifest.json is not complete"
    for name, digest in written:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if files.sha256_file(folder / name) != digest:
            return f"{name} does not match its sha256"
    return None


def set_aside(run: RunDir, stage: str, shard: int, problem: str) -> None:
    """Move a bad shard out of the way and forget its outcome, so that it counts as not done."""
    folder = run.shard(stage, shard)
    if folder.exists():
        target = run.quarantine(stage, shard)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, target)
    run.outcome_file(stage, shard).unlink(missing_ok=True)
    run.event("shard_set_aside", stage=stage, shard=shard, cause=problem)
