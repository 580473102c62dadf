"""Diffusion models: Strategy (ddpm, rflow, your own) x Mode (seg, bravo, dual, your own)."""
