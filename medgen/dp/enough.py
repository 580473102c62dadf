"""Whether there are records enough for a batch, in one sentence for all who ask. Used by priced.py and models/settings.py, so nothing is imported here."""

from __future__ import annotations

from typing import Literal


def too_few(batch: int, unit: Literal["patient", "slice"], records: int) -> str | None:
    """Why so many records in the training split are not enough, naming the key; None if they are."""
    if batch <= records:
        return None
    return f"batch_size: {batch:,} {unit}s in an update, but the training split has {records:,}; write {records} or fewer"
