"""What a device can do, and what is therefore on by default. Pure but for `capability_of`; used by context.py, acceleration.py, ahead.py."""

from __future__ import annotations

from typing import Literal

import torch

from medgen.errors import InputError

Capability = tuple[int, int] | None  # NVIDIA's compute capability; None for everything else
BF16_UNITS = (8, 0)  # bf16 and TF32 came with the same GPUs
TRITON = (7, 0)  # what PyTorch's compiler generates code for
EARNED_STEPS = 2000  # a minute or two of compiling against some hundredths of a second per step
Asked = Literal["auto"] | bool


def capability_of(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def uses_bf16(precision: str, device_type: str, capability: Capability) -> bool:
    """bf16 only where the hardware has it: emulated, it is three times slower than float32. Raises InputError if it was asked for elsewhere."""
    has_units = capability is not None and capability >= BF16_UNITS
    if precision == "bf16" and not has_units:
        raise InputError(f"loop.precision: bf16: this device ({device_type}) has no bf16 units; write auto or fp32")
    return has_units and precision != "fp32"


def uses_tf32(precision: str, capability: Capability) -> bool:
    """For what is left in float32, unless `fp32` was asked for: that means all 24 bits, where PyTorch's convolutions by default keep 11."""
    return capability is not None and capability >= BF16_UNITS and precision != "fp32"


def compiles(asked: Asked, capability: Capability, steps: int) -> bool:
    """`steps`: that are left to train. By itself not for few, and not on the CPU: compiling takes a minute on a GPU and many on a CPU, which must be earned back."""
    return capability is not None and capability >= TRITON and steps >= EARNED_STEPS if asked == "auto" else asked


def reads_ahead(asked: Asked, device_type: str) -> bool:
    """On the CPU only where it was asked for: the thread would take a core from computing."""
    return device_type == "cuda" if asked == "auto" else asked


def set_tf32(on: bool) -> None:
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
