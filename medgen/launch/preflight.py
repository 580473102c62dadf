"""What can be known to fail before anything is queued. Called by the submit and check verbs."""

from __future__ import annotations

from collections.abc import Sequence

from medgen.launch.submit import Prepared


def check(prepared: Sequence[Prepared]) -> list[str]:
    """Notes in words. Raises InputError, with the line of the spec, for what Slurm or the machine would refuse."""
    return []
