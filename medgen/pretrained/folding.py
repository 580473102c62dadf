"""Networks as they are run: norms folded into the convolutions before them, channels last. Used by pretrained/ and evaluate/."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def folded(network: torch.nn.Module) -> torch.nn.Module:
    """The same network for evaluation, changed in place: a norm that was registered straight after a convolution becomes a part of it.

    That is the order in torch-fidelity's and torchvision's blocks and in the encoder. The results are those of the unfolded
    network but for rounding. The weights are laid out channels last, and all maps follow them: InceptionV3 takes a third less time on a CPU."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    network.eval().requires_grad_(False)
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, child), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(child, torch.nn.Conv2d) and isinstance(norm, torch.nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(child, norm))
                setattr(module, norm_name, torch.nn.Identity())
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
