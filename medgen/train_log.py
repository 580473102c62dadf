"""What training writes while it runs: log.jsonl, TensorBoard, sample grids, plain lines or a progress bar. Used by train.py."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from medgen import dist, files
from medgen.dist import Ranks
from medgen.models.base import BINS, Say, StepReport
from medgen.previews import as_png, sample_grid
from medgen.rundir import RunDir

PLAIN_LINE_SECONDS = 15.0


class Averages:
    """Sums step reports on the device and reads them once per window, so that steps do not wait for the GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._bin_sums: dict[str, Tensor] = {}

    def add(self, report: StepReport, weight: float = 1.0) -> None:
        for name, value in report.scalars.items():
            self._sums[name] = self._sums[name] + value.detach() * weight if name in self._sums else value.detach() * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight
        for name, (bins, values) in report.binned.items():
            sums = self._bin_sums.setdefault(name, torch.zeros(2, BINS, device=values.device))
            sums[0].index_add_(0, bins, values.detach().float())
            sums[1].index_add_(0, bins, torch.ones_like(values, dtype=torch.float32))

    def state(self) -> dict[str, Any]:
        """This rank's sums as JSON (numbers as texts, which may be nan), so that a window that a signal has cut goes on where it was; see `restored`."""
        return {"sums": {name: str(float(value)) for name, value in self._sums.items()}, "weights": dict(self._weights),
                "bin_sums": {name: [str(value) for value in sums.flatten().tolist()] for name, sums in self._bin_sums.items()}}  # fmt: skip

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> Averages:
        """From `state`: the same numbers in the same precision."""
        made = cls()
        made._sums = {name: torch.tensor(float(value), device=device) for name, value in state["sums"].items()}
        made._weights = dict(state["weights"])
        made._bin_sums = {name: torch.tensor([float(value) for value in sums], device=device).view(2, BINS) for name, sums in state["bin_sums"].items()}
        return made

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Means over everything added on all ranks; empty bins are left out. Every rank must call it."""
        return self.means_and_all(ranks, lambda: 0.0)[0]

    def means_and_all(self, ranks: Ranks, own: Callable[[], float]) -> tuple[dict[str, float], list[float]]:
        """The same with one number of each rank's own beside it, in the same message; `own` is asked when the GPU has been waited for."""
        names = list(self._sums)
        scalars = torch.stack([self._sums[name].double().cpu() for name in names])
        weights = torch.tensor([self._weights[name] for name in names], dtype=torch.float64)
        bins = [sums.double().cpu().flatten() for sums in self._bin_sums.values()]
        numbers = torch.zeros(ranks.world_size, dtype=torch.float64)
        numbers[ranks.rank] = own()
        total = dist.sum_over_ranks(torch.cat([scalars, weights, *bins, numbers]), ranks)
        means = {name: float(total[place] / total[len(names) + place]) for place, name in enumerate(names)}
        start = 2 * len(names)
        for name in self._bin_sums:
            sums, counts = total[start : start + BINS], total[start + BINS : start + 2 * BINS]
            means |= {f"{name}{number}": float(sums[number] / counts[number]) for number in range(BINS) if counts[number] > 0}
            start += 2 * BINS
        return means, total[start:].tolist()


class TrainingLog:
    """Rank 0's records. What an interrupted attempt wrote of steps after `start_step` is dropped: no step is logged twice."""

    def __init__(self, run: RunDir, stage: str, start_step: int, total_steps: int, say: Say, bar: bool):
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._stage = run, stage
        self._file, self._say, self._total_steps = run.training_log(stage), say, total_steps
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.touch()
        _drop_lines_after(self._file, start_step)
        _drop_previews_after(run, stage, start_step)
        self._writer = SummaryWriter(str(run.tensorboard(stage)), purge_step=start_step + 1 if start_step else None)
        self._bar = _progress_bar() if bar else None
        self._bar_task = self._bar.add_task("training", total=total_steps, completed=start_step, loss=math.nan) if self._bar else None
        if self._bar:
            self._bar.start()
        self._last_line_time = 0.0

    def record(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line in log.jsonl and one point per value in TensorBoard."""
        line: dict[str, Any] = {"step": step, "epoch": round(epoch, 4), **values, "time": round(time.time(), 3)}
        with open(self._file, "a") as handle:  # not synced: a curve may lose its last lines in a power cut, a step may not wait
            handle.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(_tensorboard_name(name), value, step)
        self._show(step, epoch, values)

    def images(self, name: str, images: Tensor, step: int) -> None:
        """A grid of [N, 1, H, W] images in [0, 1]."""
        self._writer.add_images(f"preview/{name}", images.cpu(), step)

    def grid(self, channels: dict[str, Tensor], step: int) -> None:
        """One PNG of the images [N, 1, H, W] in [0, 1] of every channel."""
        drawn = sample_grid([images.squeeze(1).float().cpu().numpy() for images in channels.values()])
        files.write_bytes(self._run.preview(self._stage, step), as_png(drawn))

    def has_grid(self, step: int) -> bool:
        return self._run.preview(self._stage, step).is_file()

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            self._say(text)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        self._writer.close()

    def _show(self, step: int, epoch: float, values: dict[str, float]) -> None:
        if "val_loss" in values:
            self.say(f"step {step}/{self._total_steps}  epoch {epoch:.1f}  val_loss {values['val_loss']:.5f}")
            return
        if self._bar and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=step, loss=values["loss"])
        elif time.monotonic() - self._last_line_time > PLAIN_LINE_SECONDS or step == self._total_steps:
            self._last_line_time = time.monotonic()
            self._say(f"step {step}/{self._total_steps}  epoch {epoch:.1f}  loss {values['loss']:.5f}  {values['seconds_per_step']:.3f} s/step")


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.5f}"), TimeRemainingColumn(),
    )


def _tensorboard_name(name: str) -> str:
    kind = "val" if name.startswith("val_") else "train"
    base = name.removeprefix("val_")
    return f"timestep_loss/{kind}_{base[6:]}" if base.startswith("loss_t") else f"{kind}/{base}"


def last_logged_step(path: Path) -> int:
    """0 if nothing was logged."""
    return max((step for step, _ in _lines(path)), default=0)


def _drop_lines_after(path: Path, step: int) -> None:
    files.write_text(path, "".join(line + "\n" for logged, line in _lines(path) if logged <= step))


def _drop_previews_after(run: RunDir, stage: str, step: int) -> None:
    files.sweep_temporaries(run.previews(stage), "step-*.png")
    for drawn, path in run.drawn_previews(stage).items():
        if drawn > step:
            path.unlink()


def _lines(path: Path) -> list[tuple[int, str]]:
    """Step and text of every line that is whole."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut by a kill
            found.append((int(json.loads(line)["step"]), line))
    return found
