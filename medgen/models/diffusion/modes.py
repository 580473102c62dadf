"""Modes: what a diffusion model makes from what. Declarative and free of torch, read by config.py and model.py.

A mode of your own: subclass Mode, set the three fields, and name it in the config as `mode: mypackage.mine:Name`."""

from __future__ import annotations

from typing import ClassVar, Literal

from medgen.models import plugin


class Mode:
    """Channels by name; "seg" is the mask. The network sees [noisy targets, conditions] and predicts the targets."""

    targets: ClassVar[tuple[str, ...]]
    conditions: ClassVar[tuple[str, ...]] = ()
    positive_only: ClassVar[bool] = False  # train only on slices with a non-empty mask

    @classmethod
    def output_kind(cls) -> Literal["image", "mask"]:
        return "mask" if cls.targets == ("seg",) else "image"


class Seg(Mode):
    """Tumour masks from noise, 1 -> 1 channel."""

    targets = ("seg",)
    positive_only = True  # an empty mask teaches nothing about lesions


class Bravo(Mode):
    """One image from a mask, 2 -> 1: [noise, mask] -> image."""

    targets = ("bravo",)
    conditions = ("seg",)


class Dual(Mode):
    """Two registered images of one anatomy, 3 -> 2: [noise pre, noise gd, mask] -> T1 pre + T1 gd."""

    targets = ("t1_pre", "t1_gd")
    conditions = ("seg",)


MODES: dict[str, type[Mode]] = {"seg": Seg, "bravo": Bravo, "dual": Dual}


def find_mode(name: str) -> type[Mode]:
    """A mode by name or `package.module:Name`. Raises ValueError listing what exists."""
    if plugin.is_plugin(name):
        return plugin.load(name, Mode)
    if name not in MODES:
        raise ValueError(f"unknown mode {name!r}; the modes are: {', '.join(MODES)}, or package.module:Name of your own")
    return MODES[name]
