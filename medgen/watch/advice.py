"""What a person can do about a cause, in medgen's words and ready to paste. Pure; called by why."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.launch.causes import Cause, Kind
from medgen.plan import PlannedStage
from medgen.rundir import Heartbeat

EXCLUDED_DAYS = 14  # then the node has been looked at, or the entry is renewed
LOCAL_ONLY = ("--dry-run", "--detach", "--json")


@dataclass(frozen=True)
class Case:
    """What advice is made of. `submit`: the command that made the run; `seconds`: of the attempt; `free_gibibytes`: where the run is."""

    cause: Cause
    stage: PlannedStage
    run_root: Path
    submit: str
    node: str
    job_id: str
    seconds: float
    beat: Heartbeat | None
    requested_mem_mebibytes: float | None
    free_gibibytes: float | None
    today: datetime.date
    on_slurm: bool
    waits: bool  # its job is still in the queue
    guilty_log: Path

    @property
    def in_spec(self) -> bool:
        """Collect stages are medgen's own: a spec has no place for their resources."""
        return self.stage.kind != "collect"


def advise(case: Case) -> list[str]:
    """Lines; those that begin with `medgen` or a space are to be copied."""
    lines = ADVICE[case.cause.kind](case)
    if not case.waits or case.cause.kind in ("DEPENDENCY", "STALLED"):
        return lines
    return ["Submit leaves alone what is in the queue. If this job cannot be released, take it out first:", f"medgen cancel {case.run_root.name}", *lines]


def submit_command(manifest: dict[str, Any], folder: Path) -> str:
    """The command that made the run, as it must be typed in `folder`: its own -o decide which run it is."""
    words = [str(word) for word in manifest.get("command", [])][1:]
    spec = str(manifest.get("spec_file", "SPEC"))
    if "submit" not in words:  # made by a test or a script
        return f"medgen submit {shlex.quote(_near(spec, folder))}"
    words = [word for word in words if word not in LOCAL_ONLY]
    start = Path(str(manifest.get("folder", folder)))
    placed = [_near(spec, folder) if word.endswith((".yaml", ".yml")) and str((start / word).absolute()) == spec else word for word in words]
    return shlex.join(["medgen", *placed])


def _near(path: str, folder: Path) -> str:
    try:
        return str(Path(path).relative_to(folder))
    except ValueError:
        return path


def size(mebibytes: float) -> str:
    """As a spec writes it: `512M`, `1.5G`."""
    if mebibytes < 1024:
        return f"{mebibytes:.0f}M"
    return f"{mebibytes / 1024:.1f}".removesuffix(".0") + "G"


def minutes_text(minutes: int) -> str:
    return f"{minutes // 60}h" if minutes % 60 == 0 else f"{minutes}m"


def _with(case: Case, key: str, value: object) -> str:
    """The submit command with one value changed."""
    return f"{case.submit} -o stages.{case.stage.name}.{key}={value}"


def _memory(case: Case) -> list[str]:
    return _gpu_memory(case) if case.cause.where == "GPU" else _host_memory(case)


def _host_memory(case: Case) -> list[str]:
    asked = case.stage.mem_mebibytes or case.requested_mem_mebibytes
    if not case.on_slurm:
        return ["This machine has too little memory for what ran at once; stop something else, or give this stage fewer processes, then:", case.submit]
    wanted = size(2 * asked) if asked else "32G"
    said = f"It asked for {size(asked)}. Ask for twice as much" if asked else "It asked for no amount of its own. Ask for one"
    change = _with(case, "resources.mem", wanted) if case.in_spec else f"{case.submit} -o site.mem={wanted}"
    return [f"{said}; the run stays the same and goes on:", change]


def _gpu_memory(case: Case) -> list[str]:
    lines = ["On a GPU with more memory the run stays the same and goes on:", _with(case, "resources.gpu.memory", "80G")] if case.on_slurm else []
    config = case.stage.settings.get("config", {})
    asked = config.get("loop", {}).get("micro_batch")
    at_once = asked if isinstance(asked, int) else config.get("batch_size", 1) // case.stage.ranks
    if case.stage.kind == "train" and at_once > 1:
        lines += ["Fewer samples in one backward pass train the same way with less memory, as another run:", _with(case, "config.loop.micro_batch", at_once // 2)]
    if case.stage.kind == "generate" and case.stage.settings.get("chunk", 1) > 1:
        lines += ["Fewer images drawn together are other images, and so another run:", _with(case, "chunk", case.stage.settings["chunk"] // 2)]
    return lines or ["Use a GPU with more memory, or free this one, then:", case.submit]


def _time_limit(case: Case) -> list[str]:
    stage = case.stage
    longer = _with(case, "resources.time", minutes_text(2 * stage.time_minutes)) if case.in_spec else ""
    if stage.kind in ("train", "command"):
        segments = _segments(case)
        return [
            f"Let it save and go on in {segments} jobs of {minutes_text(stage.time_minutes)} one after the other:", _with(case, "segments", segments),
            "Or give it one longer job:", longer,
        ]  # fmt: skip
    if stage.saves:
        return ["It goes on from what it saved. Each job may have more time:", longer]
    if stage.kind == "generate":
        lines = ["Give each shard more time:", longer]
        count, chunk = stage.settings["count"], stage.settings["chunk"]
        more = min(2 * len(stage.tasks), -(-count // chunk))
        return lines if more <= len(stage.tasks) else [*lines, "Or, as long as no shard is finished, make smaller ones:", _with(case, "shards", more)]
    return ["Give it more time:", longer] if longer else ["Give the jobs of this site more time, then:", case.submit]


def _segments(case: Case) -> int:
    """As many as the steps that are left need at the speed of this attempt; twice as many as now where nobody knows."""
    beat, now = case.beat, case.stage.segments or 1
    if beat is None or not 0 < beat.step < beat.total:
        return 2 * now
    return max(now + 1, -(-beat.total // max(1, beat.step // now)))


def _preempted(case: Case) -> list[str]:
    return ["Slurm starts it again by itself where it requeues jobs. If it is no longer in the queue, this goes on from what it saved:", case.submit]


def _node(case: Case) -> list[str]:
    if not case.on_slurm:
        return ["It goes on from what it saved:", case.submit]
    lines = ["It goes on from what it saved:", case.submit]
    return lines if not case.node else [*lines, "If the node fails again, keep away from it in the site profile:", *_exclusion(case, "node failed")]


def _exclusion(case: Case, reason: str) -> list[str]:
    until = case.today + datetime.timedelta(days=EXCLUDED_DAYS)
    job = f" under job {case.job_id}" if case.job_id else ""
    return ["  exclude:", f"    - {{nodes: {case.node}, reason: \"{reason}{job} on {case.today}\", until: {until}}}"]


def _set_up(case: Case) -> list[str]:
    return [
        "Mend that line: it comes from environment: or setup: of the site profile, or from resources.setup of this stage. Nothing was lost. Then:",
        case.submit,
    ]  # fmt: skip


def _not_finite(case: Case) -> list[str]:
    if case.stage.kind != "train":
        return ["The checkpoint is not usable; choose an earlier or better one (another run):", _with(case, "checkpoint", "best-val")]
    config = case.stage.settings.get("config", {})
    lines = ["The last good checkpoint is kept. Another learning rate or clipping is another training, and so another run:"]
    if "lr" in config:
        lines.append(_with(case, "config.lr", f"{config['lr'] / 3:.1e}"))
    if "clip_norm" in config:
        lines.append(_with(case, "config.clip_norm", f"{config['clip_norm'] / 2:g}"))
    return [*lines, "With the same settings, from the last good checkpoint:", case.submit]


def _disk(case: Case) -> list[str]:
    free = "" if case.free_gibibytes is None else f" ({case.free_gibibytes:.1f} GiB free there now)"
    return [f"Free some space or quota at {case.run_root}{free}; `du -sh {case.run_root.parent}/*` shows what is large. Then:", case.submit]


def _rendezvous(case: Case) -> list[str]:
    lines = ["The ranks did not find or lost each other, and no rank says why. Often a second try is enough:", case.submit]
    if case.stage.nodes > 1 and case.node:
        lines += ["If it is always the same node, keep away from it in the site profile:", *_exclusion(case, "ranks could not meet")]
    return lines


def _cancelled(case: Case) -> list[str]:
    return ["What is finished stays; this goes on from what was saved:", case.submit]


def _dependency(case: Case) -> list[str]:
    return ["Mend what failed before it; the same submit then queues this too:", case.submit]


def _damaged(case: Case) -> list[str]:
    return ["Submit again: exactly this is made again:", case.submit, "What is damaged, and whether anything must be done first:", f"medgen fsck {case.run_root.name}"]


def _stalled(case: Case) -> list[str]:
    stop = f"  scancel {case.job_id}" if case.on_slurm and case.job_id else f"medgen cancel {case.run_root.name}"
    return ["It may yet go on by itself. To give it up, and go on from what it saved:", stop, case.submit]


def _input(case: Case) -> list[str]:
    return ["It would fail in the same way again: mend what the message names, then:", case.submit]


def _user(case: Case) -> list[str]:
    if case.stage.kind == "command":
        return [f"The command itself failed; all it said is in {case.guilty_log}. What it reads may be mended in place, then:", case.submit]
    return [
        f"All it said is in {case.guilty_log}. The run keeps its own copy of the code: if you mend the code, remove {case.run_root / 'code'}, then:",
        case.submit,
    ]  # fmt: skip


ADVICE: dict[Kind, Callable[[Case], list[str]]] = {
    "OOM": _memory, "TIMEOUT": _time_limit, "PREEMPTED": _preempted, "NODE_FAIL": _node, "SETUP": _set_up, "NAN": _not_finite, "DISK_FULL": _disk,
    "RENDEZVOUS": _rendezvous, "CANCELLED": _cancelled, "LOST": _cancelled, "DEPENDENCY": _dependency, "DAMAGED": _damaged, "STALLED": _stalled, "INPUT": _input, "USER": _user,
}  # fmt: skip
