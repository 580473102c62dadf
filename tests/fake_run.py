"""A finished run with realistic files and no training: phantoms, and their blurred slices as the synthetic images.

Used by the tests of evaluate and report; `python tests/fake_run.py FOLDER` makes one to look at."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from medgen import files, rng
from medgen.data.image_files import Kind, write_slice
from medgen.data.store import SliceStore, open_store
from medgen.plan import PLAN_VERSION, Place, Plan, PlannedStage, Shard, Task
from medgen.rundir import Outcome, RunDir
from medgen.spec_data import DataSpec, SplitFractions

SEED = 7
START = 1_760_000_000.0
PLACE = Place("local", [], [], None, 180, {"mail": None, "webhook": None, "command": None, "on": []}, 600)


def quiet(_: str) -> None:
    """A `say` for tests."""


def planned(name: str, kind: str, needs: list[str], settings: dict[str, Any], images: int | None = None, tasks: int = 1) -> PlannedStage:
    all_tasks = [Task(name, number, f"{name}-hash" + (f"-{number}" if number else ""), None if images is None else Shard(0, images)) for number in range(tasks)]
    return PlannedStage(
        name=name, kind=kind, needs=needs, nodes=1, ranks_per_node=1, gpus_per_node=0, threads=1, time_minutes=60,
        mem_mebibytes=None, parallel=1, segments=1, chain=1, launcher="srun", setup=[], command_setup=[], directives=[], left_out=[], settings={"kind": kind, **settings}, tasks=all_tasks,
    )


def make_run(root: Path, data: DataSpec, stages: list[PlannedStage]) -> RunDir:
    """A run folder with spec, plan and manifest."""
    run = RunDir(root / "brain_demo-0123456789")
    plan = Plan(PLAN_VERSION, run.run_id, "brain_demo", SEED, "local", PLACE, data.model_dump(mode="json"), stages)
    files.write_json(run.plan, asdict(plan))
    files.write_text(run.spec, "version: 1\nname: brain_demo\nseed: 7\ndata: {format: phantom}\n")
    files.write_json(run.manifest, {
        "created": START, "user": "ada", "host": "node-7", "python": "3.11.7",
        "versions": {"torch": "2.13.0", "monai": "1.6.1", "numpy": "2.4.6"},
        "git": {"medgen": {"commit": "4f1c0de9b7a2", "dirty": False, "patch_sha256": None, "changed_files": []}, "folder": None}, "command": "medgen submit jobs/brain_demo.yaml --local",
    })
    return run


def finish(run: RunDir, stage: str, start_s: float, seconds: float, facts: dict[str, Any] | None = None, status: str = "done",
           cause: str | None = None, attempt: int = 1) -> None:
    """Write the outcome of a stage's only task."""
    outcome = Outcome(run.run_id, stage, 0, f"{stage}-hash", attempt, status, cause, "node-7", "cpu", 1,  # type: ignore[arg-type]
                      START + start_s, START + start_s + seconds, [run.produced(run.plan)] if status == "done" else [], facts or {})
    run.write_outcome(outcome)
    files.append_line(run.events_file, json.dumps({
        "time": outcome.ended, "event": "task_ended", "host": "node-7", "stage": stage, "shard": 0, "attempt": attempt,
        "status": status, "rc": 0 if status == "done" else 1, "cause": cause, "seconds": seconds, "devices": 1, "next": "done" if status == "done" else "not tried again", "again": False,
    }))


def write_log(run: RunDir, stage: str, steps: int = 400) -> None:
    """A training log that falls as such logs do."""
    noise = rng.numpy_generator(SEED, f"log/{stage}").normal(size=steps + 1)
    for step in range(10, steps + 1, 10):
        loss = 0.03 + 0.6 * math.exp(-step / 60)
        line = {"step": step, "epoch": step / 20, "loss": loss * (1 + 0.08 * noise[step]), "lr": 1e-4, "seconds_per_step": 0.31}
        line |= {f"loss_t{number}": loss * (2.2 - 0.2 * number) for number in range(10)}
        if step % 50 == 0:
            line["val_loss"] = loss * 1.1
        files.append_line(run.training_log(stage), json.dumps(line))


def write_dataset(run: RunDir, stage: str, images: dict[str, np.ndarray], conditions: list[str] | None, kind: str, labels: list[str] | None = None) -> None:
    """A collected dataset. images: channel -> [n,H,W]; conditions: ids or None; kind: none | real | synthetic; labels: classes."""
    folder = run.dataset(stage)
    records = []
    for number in range(len(next(iter(images.values())))):
        record: dict[str, Any] = {
            "id": f"{stage}-{number:06d}", "index": number, "condition": conditions[number] if conditions else "", "condition_kind": kind,
        }
        if labels is not None:
            record["label"] = labels[number]
        for channel, arrays in images.items():
            path = folder / channel / f"{number:06d}.nii.gz"
            stored: Kind = "image" if channel != "seg" else "labels" if arrays.max() > 1 else "mask"
            write_slice(path, arrays[number], stored, np.eye(4))
            record |= {channel: str(path.relative_to(folder)), f"{channel}_sha256": files.sha256_file(path)}
        records.append(record | {"spacing_x_mm": 1.0, "spacing_y_mm": 1.0, "seed": SEED, "checkpoint_sha256": "c0ffee" * 10, "tries": 1})
    pd.DataFrame(records).to_csv(folder / "index.csv", index=False)
    marker = run.root / "fingerprint"  # left by full_run: of the data the set was made from
    files.write_json(folder / "manifest.json", {"data_fingerprint": marker.read_text() if marker.exists() else "", "index_sha256": files.sha256_file(folder / "index.csv")})


def blurred(images: np.ndarray, sigma_pixels: float = 0.7) -> np.ndarray:
    """What a half-trained model gives: soft, a little too dark, faintly noisy."""
    soft = np.stack([gaussian_filter(image, sigma_pixels) for image in images])
    noise = rng.numpy_generator(SEED, "fake_noise").normal(scale=0.01, size=images.shape)
    return np.clip(0.94 * soft + noise * (soft > 0.03), 0, 1).astype(np.float32)


def shifted_masks(masks: np.ndarray) -> np.ndarray:
    return np.roll(masks[:, ::-1, :], 2, axis=1)


def full_run(root: Path, cache: Path, patients: int = 8, size: int = 32, count: int = 16) -> tuple[RunDir, SliceStore]:
    """Masks, images on those masks, pairs on real test masks, and their evaluations (not yet run)."""
    data = DataSpec(format="phantom", patients=patients, size=size, splits=SplitFractions(train=0.5, val=0.2, test=0.3))
    store = open_store(data, SEED, cache, quiet)
    evaluate = {"against": "test", "metrics": ["mae", "psnr", "ssim", "ms_ssim", "ms_ssim_diversity", "swd"], "extractor": None}
    config = {"model": "diffusion", "strategy": "rflow", "mode": "bravo"}
    stages = [
        planned("train_seg", "train", [], {"config": {**config, "mode": "seg"}, "repeat": None}),
        planned("train_bravo", "train", [], {"config": config, "repeat": None}),
        planned("masks", "generate", ["train_seg"], {"from": "train_seg", "count": count, "condition": None}, count),
        planned("collect_masks", "collect", ["masks"], {"of": "masks"}),
        planned("images", "generate", ["train_bravo", "collect_masks"], {"from": "train_bravo", "count": count, "condition": "masks"}, count),
        planned("collect_images", "collect", ["images"], {"of": "images"}),
        planned("pairs", "generate", ["train_bravo"], {"from": "train_bravo", "count": count, "condition": "test"}, count),
        planned("collect_pairs", "collect", ["pairs"], {"of": "pairs"}),
        *(planned(f"evaluate_{name}", "evaluate", [f"collect_{name}"], {"of": name, **evaluate}) for name in ("masks", "images", "pairs")),
        planned("report", "report", [f"evaluate_{name}" for name in ("masks", "images", "pairs")], {}),
    ]
    run = make_run(root, data, stages)
    train, test = store.select("train", positive_only=True), store.select("test", positive_only=True)
    order = rng.permutation(len(train), SEED, "fake_masks")
    picked = train[order[np.arange(count) % len(train)]]
    tested = test[np.arange(count) * 7 % len(test)]
    (run.root / "fingerprint").write_text(store.fingerprint)
    write_dataset(run, "masks", {"seg": shifted_masks(store.masks(picked))}, None, "none")
    write_dataset(run, "images", {"bravo": blurred(store.images("bravo", picked)), "seg": store.masks(picked)},
                  [f"masks-{number:06d}" for number in range(count)], "synthetic")
    write_dataset(run, "pairs", {"bravo": blurred(store.images("bravo", tested)), "seg": store.masks(tested)},
                  [str(store.aliases[row]) for row in tested], "real")
    for stage, start_s, seconds in (("train_seg", 0, 900), ("train_bravo", 30, 1500)):
        write_log(run, stage)
        finish(run, stage, start_s, seconds, {"steps": 400, "best_val_loss": 0.041})
    finish(run, "masks", 905, 120, {"accepted": count, "rejected_empty": 3, "rejected_large": 1})
    finish(run, "images", 1600, 240, {"accepted": count})
    finish(run, "pairs", 1600, 230, {"accepted": count})
    for name in ("masks", "images", "pairs"):
        finish(run, f"collect_{name}", 1850, 8, {"files": count})
    return run, store


if __name__ == "__main__":
    from medgen.evaluate.run import evaluate_run
    from medgen.report.build import build_report

    target = Path(sys.argv[1])
    fake, _ = full_run(target, target / "cache", patients=16, size=64, count=48)
    for number, name in enumerate(("evaluate_masks", "evaluate_images", "evaluate_pairs")):
        evaluate_run(fake, name, target / "cache", print, lambda *_: None)
        finish(fake, name, 1900 + 20 * number, 15)
    print(build_report(fake, "report", target / "cache", print))
