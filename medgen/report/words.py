"""Numbers, durations and sentences of the report. Used by build.py and, as filters, by template.html."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medgen.evaluate.inputs import MASK, Dataset
from medgen.evaluate.intervals import FEWEST_GROUPS
from medgen.evaluate.scores import Score
from medgen.plan import Plan
from medgen.report.gather import StageFacts
from medgen.spec_data import SPLITS

if TYPE_CHECKING:
    from medgen.data.store import SliceStore



def number(value: float) -> str:
    """Three significant digits, or all before the point; no exponent where people do not expect one."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 0.001 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """`8 s`, `4 min 10 s`, `3 h 25 min`, `2 d 4 h`."""
    whole = round(seconds)
    for large, small, size, step in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            rest = whole % size // step
            return f"{whole // size} {large}" + (f" {rest} {small}" if rest else "")
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def plain(value: Any) -> str:
    """A fact of an outcome for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return number(value) if isinstance(value, (int, float)) else str(value)


def against_floor(score: Score) -> str:
    """How the value lies to its floor, in words."""
    if score.floor is None:
        return "no floor"
    if score.metric.startswith("near_train") and score.value == 0:
        return "none found"
    gap = score.value - score.floor
    if gap == 0:
        return "equal to the floor"
    if score.better == "lower":
        return f"{score.value / score.floor:.1f} times the floor" if score.floor > 0 else f"{number(abs(gap))} above"
    unit = f" {score.unit}" if score.unit and " " not in score.unit else ""
    return f"{number(abs(gap))}{unit} {'above' if gap >= 0 else 'below'}"


NAMES = ("Frechet", "Gaussian", "Dice")


def lower_first(title: str) -> str:
    """Inside a sentence; abbreviations and names stay as they are."""
    return title if title[:2].isupper() or title.startswith(NAMES) else title[:1].lower() + title[1:]


def interval(score: Score) -> str | None:
    """None where there is none."""
    return None if score.ci is None else f"{number(score.ci[0])} to {number(score.ci[1])}"


def compared(record: dict[str, Any]) -> str:
    """What stands on the two sides of an evaluation, in words."""
    counts = record["counts"]
    if "real" not in counts or "synthetic_used" not in counts:  # of structure and utility: each says what it counted
        return ", ".join(f"{amount:,} {name.replace('_', ' ')}" for name, amount in counts.items() if isinstance(amount, int))
    of = "" if counts["synthetic_used"] == counts["synthetic"] else f" (of {counts['synthetic']:,})"
    kind = "real images" if record["stage"] == "folders" else f"real {record['against']} slices"
    lesion = " with a lesion" if record["positive_only"] else ""
    patients = "one patient" if counts["real_patients"] == 1 else f"{counts['real_patients']:,} patients"
    return f"{counts['synthetic_used']:,} synthetic samples{of} against {counts['real']:,} {kind}{lesion} of {patients}"


def dataset_title(dataset: Dataset) -> str:
    count = f"{len(dataset.index):,} synthetic"
    if dataset.outputs == [MASK]:
        return f"{count} masks"
    if dataset.image_channels == ["image"]:
        return f"{count} images"
    return f"{count} {' + '.join(dataset.image_channels)} {'pairs' if len(dataset.image_channels) > 1 else 'images'}"


def lead(plan: Plan, stages: list[StageFacts], store: SliceStore | None) -> str:
    """What this run is, in a sentence or two."""
    trained = [stage for stage in stages if stage.kind == "train"]
    drawn = [stage for stage in stages if stage.kind == "generate"]
    source = "drawn phantoms (no real patients)" if plan.data["format"] == "phantom" else f"the data in {Path(plan.data['root']).name}"
    if store is not None:
        splits = store.rows["split"] == "train"
        source = f"{store.rows['patient'][splits].nunique():,} training patients ({int(splits.sum()):,} slices of {store.size}x{store.size} pixels) of {source}"
    models = f"{len(trained)} model{'s' if len(trained) != 1 else ''} trained on {source}"
    repeats = [stage.name for stage in trained if stage.settings["repeat"] is not None]
    if repeats:
        models += f" ({', '.join(repeats)} on the val split as well)"
    total = sum(stage.settings["count"] for stage in drawn)
    return f"{models}, and {total:,} synthetic samples drawn in {len(drawn)} set{'s' if len(drawn) != 1 else ''}." if drawn else models + "."


def grouped_by_reason(skipped: dict[str, str]) -> list[tuple[str, str]]:
    """(metrics, reason) with the metrics of one reason on one line."""
    return [(", ".join(name for name, told in skipped.items() if told == reason), reason) for reason in dict.fromkeys(skipped.values())]


def few_patients(counts: dict[str, int]) -> str | None:
    """A warning for the table when its reference is a handful of people; None otherwise."""
    if "real_patients" not in counts or counts["real_patients"] >= FEWEST_GROUPS:
        return None
    number_of = "one patient" if counts["real_patients"] == 1 else f"{counts['real_patients']} patients"
    return f"The real side is {number_of}: values and floors depend on who that is, and no interval can be given for them."


@dataclass(frozen=True)
class Verdict:
    word: str
    tone: str  # good, bad, open
    detail: str


def verdict(stages: list[StageFacts]) -> Verdict:
    failed = [stage.name for stage in stages if stage.status == "failed"]
    missing = [stage.name for stage in stages if stage.status not in ("done", "failed")]
    if failed:
        return Verdict("partly failed", "bad", f"failed: {', '.join(failed)}" + (f"; not finished: {', '.join(missing)}" if missing else ""))
    if missing:
        return Verdict("incomplete", "open", f"not finished: {', '.join(missing)}")
    return Verdict("complete", "good", f"all {len(stages)} stages verified")


def headline_facts(plan: Plan, stages: list[StageFacts], store: SliceStore | None) -> list[tuple[str, str]]:
    """The strip of numbers under the title."""
    starts = [stage.started for stage in stages if stage.started is not None]
    ends = [stage.ended for stage in stages if stage.ended is not None]
    facts = []
    if store is not None:
        facts += [("patients", number(int(store.rows["patient"].nunique()))), ("real slices", number(len(store.rows)))]
    facts.append(("synthetic samples", number(sum(stage.settings["count"] for stage in stages if stage.kind == "generate" and stage.status == "done"))))
    facts.append(("pixels", f"{plan.data['size']}²"))
    if starts:
        facts.append(("from first to last", duration(max(ends) - min(starts))))
        facts.append(("device-hours", number(float(sum(stage.device_hours for stage in stages)))))
    return facts


def split_table(store: SliceStore | None) -> list[dict[str, str]]:
    """Patients, slices and slices with a lesion per split."""
    if store is None:
        return []
    rows = []
    for split in SPLITS:
        part = store.rows[store.rows["split"] == split]
        positive = number(int((part["mask_pixels"] > 0).sum())) if store.has_masks else "no masks"
        rows.append({"split": split, "patients": number(int(part["patient"].nunique())), "slices": number(len(part)), "positive": positive})
    return rows


@dataclass(frozen=True)
class TimelineBar:
    """One attempt as a bar: `left` and `width` in percent of the run's time."""

    left: float
    width: float
    status: str
    title: str


def timeline(stages: list[StageFacts]) -> dict[str, list[TimelineBar]]:
    """The bars of every stage, none for one that never ran."""
    attempts = [attempt for stage in stages for attempt in stage.attempts]
    first = min((item.started for item in attempts), default=0.0)
    last = max((item.ended for item in attempts), default=0.0)
    span = max(last - first, 1e-3)
    return {
        stage.name: [
            TimelineBar(round(100 * (item.started - first) / span, 2), round(max(0.4, 100 * (item.ended - item.started) / span), 2), item.status,
                        f"shard {item.shard}, attempt {item.number}: {item.status}, {duration(item.ended - item.started)}")
            for item in stage.attempts
        ]
        for stage in stages
    }


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested JSON value as `a.b` lines."""
    if isinstance(value, dict):
        return [line for key, below in value.items() for line in flat(below, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(item) for item in value))]
    return [(prefix, "none" if value is None else str(value))]
