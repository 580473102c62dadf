"""The published PACGAN system's files become medgen's: its config.json a job spec, its weights a checkpoint. Called by importing.py."""
