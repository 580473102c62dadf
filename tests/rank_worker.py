"""One rank of test_ranks.py: trains every variant of every family on its share of each batch and saves the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_models import VARIANTS, make, state_of, training_batch, within_last_phase

from medgen import dist
from medgen.context import Context


def main(folder: Path) -> None:
    with dist.joined_ranks(threads=1) as ranks:
        assert ranks.world_size == 2
        for family, name in VARIANTS:
            config, model = make(family, name)
            context = within_last_phase(Context(ranks, "fp32", micro_batch=2), len(model.phases()))
            for context.step in range(3):
                model.step(training_batch(config, context.step, 8, ranks.rank, ranks.world_size), context)
            torch.save(state_of(model), folder / f"{family}-{name}-{ranks.rank}.pt")
        assert dist.largest(ranks.rank, ranks) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
