"""Tests on a real Slurm: the sandbox, or a cluster that is there already."""
