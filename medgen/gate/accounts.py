"""What was rejected, in words: for logs, events, the report and the dataset card. Reads counts and the gate's record; loads nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ALARM = 0.2  # of the drawn images: a model of which more is rejected is not trained enough
REJECTED = "rejected_"


def share_rejected(counts: dict[str, int]) -> float:
    """Of a manifest's counts; 0 where nothing was drawn."""
    return counts["rejected"] / max(1, counts["drawn"])


def in_words(counts: dict[str, int]) -> str:
    """`6.2% of 16,012 drawn images were rejected (blank 3.1%, noise 2.0%)`: shares of the drawn images; one may break several rules."""
    told = f"{_percent(share_rejected(counts))} of {counts['drawn']:,} drawn images were rejected"
    rules = ", ".join(f"{rule} {_percent(counts[REJECTED + rule] / counts['drawn'])}" for rule in worst_first(counts))
    return told + (f" ({rules})" if rules else "")


def worst_first(counts: dict[str, int]) -> list[str]:
    """The rules that rejected any, by how many."""
    by_rule = {name.removeprefix(REJECTED): count for name, count in counts.items() if name.startswith(REJECTED) and count}
    return sorted(by_rule, key=lambda rule: (-by_rule[rule], rule))


def held_out_in_words(gate: dict[str, Any]) -> str:
    """What the same rules say of real slices that were not trained on."""
    found = gate["held_out"]
    if found is None:
        return "no real slices were held out to try the rules on"
    return f"of {found['slices']:,} real {found['split']} slices {_percent(found['rejected'] / found['slices'])}"


def alarm(counts: dict[str, int]) -> str | None:
    """A warning if the model makes too many bad images; None otherwise."""
    if share_rejected(counts) <= ALARM:
        return None
    return f"{in_words(counts)}: more than {_percent(ALARM)}; the model is not trained enough, and what is left is a narrow choice of what it draws"


def by_class(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Drawn and rejected images of each class, from a manifest's images; empty where there are no classes."""
    found: dict[str, dict[str, int]] = {}
    for entry in entries:
        if "label" in entry:
            counts = found.setdefault(entry["label"], {"drawn": 0, "rejected": 0})
            counts["drawn"] += entry["tries"]
            counts["rejected"] += entry["tries"] - 1
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
