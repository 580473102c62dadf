"""What is done to a model's networks so that they train faster or in less memory: compiling, computing activations twice. Called by train.py.

Names of weights stay as they are, so checkpoints fit with and without."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medgen import files

COMPILED = "compiled"  # the folder in the cache


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Each block keeps its inputs alone, and computes the rest again in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""
    for block in blocks:
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class CompiledForward:
    """Stands in for a module's `forward`; `off` brings the module's own back. Hooks and DDP stay outside of what is compiled."""

    def __init__(self, module: nn.Module, backend: str | Callable[..., Any]):
        self._module, self._eager = module, module.forward
        self._compiled = torch.compile(module.forward, backend=backend, dynamic=False)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # without gradients it is a validation or a preview, of another batch size: not worth another compilation
        return self._compiled(*args, **kwargs) if torch.is_grad_enabled() else self._eager(*args, **kwargs)

    def off(self) -> None:
        self._module.forward = self._eager


def compile_networks(networks: Iterable[nn.Module], cache: Path, backend: str | Callable[..., Any] = "inductor") -> list[CompiledForward]:
    """Compiled when they are first called, see rehearsal.py; what the compiler made is kept in the cache, for later attempts and runs."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        files.private_folder(cache / COMPILED)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / COMPILED)
    import torch._dynamo.config as dynamo

    # what is compiled alone in the rehearsal is used under DDP as it is; cut at DDP's buckets it would be compiled twice
    dynamo.optimize_ddp = False
    return [CompiledForward(network, backend) for network in networks]


def try_compiled(compiled: list[CompiledForward], rehearse: Callable[[], object], agree: Callable[[bool], bool]) -> str:
    """One step that leaves no trace, which compiles forward and backward passes; if it fails on any rank, all go on without. Returns what to say.

    agree: of each rank's success whether all have it."""
    started, problem = time.monotonic(), None
    try:
        rehearse()
    except Exception as error:  # the compiler may fail in any way; a fault of the network itself comes again without it
        problem = " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:2]])[:300]  # PyTorch's first line says who, the second why
    if agree(problem is None):
        return f"compiled in {time.monotonic() - started:.0f} s"
    for forward in compiled:
        forward.off()
    return f"not compiled, slower and otherwise the same: {problem or 'another rank could not'}"
