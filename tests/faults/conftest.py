"""The Slurm of tests/slurm for the faults that need one."""

from __future__ import annotations

from slurm.conftest import slurm, slurm_without_accounting  # noqa: F401  (fixtures)
