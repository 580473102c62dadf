"""Makes `import torchvision` work beside a torch it was not built for. Called before anything imports it, or torch_fidelity or lpips.

PyPI has torchvision for CUDA only. Beside a CPU build of torch (or another CUDA) its compiled operators do not load, and its import
stops at `operator torchvision::nms does not exist`, while describing them. Declared first, without an implementation, they can be
described; nothing here calls them."""

from __future__ import annotations

import importlib

import torch

_declared: list[torch.library.Library] = []  # a library that is forgotten takes its operators with it


def make_importable() -> None:
    """Import torchvision; with its two box operators declared where they did not load."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
