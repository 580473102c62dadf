"""The checkpoint that a dataset was drawn from, not whatever is the last one now. Used by auc.py and privacy.py."""

from __future__ import annotations

from medgen import checkpoint, commits
from medgen.checkpoint import Checkpoint
from medgen.errors import MedgenError
from medgen.evaluate.inputs import SyntheticImages
from medgen.rundir import RunDir


def maker(run: RunDir, stage: str, dataset: SyntheticImages) -> Checkpoint:
    """Of the train stage `stage`. Raises MedgenError if it is not there any more, or does not verify."""
    made_by = dataset.index["checkpoint_sha256"].iloc[0]
    found = next((commit for commit in commits.committed(run.checkpoints(stage)) if commit.sha256 == made_by), None)
    if found is None:
        raise MedgenError(f"{run.checkpoints(stage)}: the checkpoint that {dataset.name} was drawn from ({made_by[:12]}) is not there; generate anew, or do without")
    return checkpoint.open_verified(found.folder)
