"""What a step takes, counted without or with numbers: the bytes that autograd keeps, and fused attention in shape. Used by trial.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from medgen.models.base import Model

_FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class FusedAttention(TorchFunctionMode):
    """Attention without numbers as devices compute it: the `meta` device would keep a matrix of all pairs, which no fused kernel does."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None) -> Any:
        with_options = options or {}
        if function is not functional.scaled_dot_product_attention or "enable_gqa" in with_options:
            return function(*arguments, **with_options)
        return _attended(*arguments, **with_options)


def _attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None
) -> Any:
    """With the names of torch's own function."""
    return _FUSED_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def flop_counter() -> FlopCounterMode:
    """One that knows fused attention."""
    return FlopCounterMode(display=False, custom_mapping={_FUSED_ATTENTION: _attention_flops})


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


class Kept:
    """Counts the bytes that autograd keeps for the backward pass, without the parameters; `peak` is the most at any time."""

    def __init__(self, model: Model):
        self._own = {parameter.untyped_storage()._cdata for module in model.modules().values() for parameter in module.parameters()}
        self._holders: dict[int, int] = {}
        self._bytes = 0
        self.peak = 0

    def counting(self) -> Any:
        return saved_tensors_hooks(self._keep, lambda held: held.tensor)

    def _keep(self, tensor: Any) -> Held:
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the memory's record, which is unique while the tensor is held
        if key not in self._own:
            if key not in self._holders:
                self._bytes += storage.nbytes()
                self.peak = max(self.peak, self._bytes)
            self._holders[key] = self._holders[key] + 1 if key in self._holders else 1
        return Held(self, tensor, key, storage.nbytes())

    def release(self, key: int, size_bytes: int) -> None:
        if key in self._holders:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._bytes -= size_bytes


class Held:
    """One saved tensor; the graph drops it after its backward pass."""

    def __init__(self, kept: Kept, tensor: Any, key: int, size_bytes: int):
        self.kept, self.tensor, self.key, self.size_bytes = kept, tensor, key, size_bytes

    def __del__(self) -> None:
        self.kept.release(self.key, self.size_bytes)
