"""Who this process is among the ranks of a job, from its environment alone. Used by dist.py and task.py."""

from __future__ import annotations

import os


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun's variables or those of srun's step; (0, 1, 0) outside of both.

    torchrun's come first: its agent is itself a task of a step. A batch script's own shell has SLURM_PROCID too, so only a
    step's task count makes a world."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_LOCALID"])
    if "WORLD_SIZE" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", "0"))
    return 0, 1, 0
