"""Weights out of a file put into a network: every tensor in its place and none left over. Used by pretrained/ and evaluate/extractors.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medgen.errors import InputError

if TYPE_CHECKING:
    import torch


def fill(network: torch.nn.Module, found: dict[str, torch.Tensor], file: Path, words: str, key: str) -> None:
    """`words` name the network and `key` the place in the spec that asked for it. Raises InputError if the tensors are others."""
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        raise other_layout(file, words, key, str(error)) from None


def other_layout(file: Path, words: str, key: str, error: str) -> InputError:
    told = [line.strip() for line in error.splitlines()]
    return InputError(f"{key}: {file} does not hold the weights of {words}: {' '.join(told[1:2] or told[:1])[:300]}")
