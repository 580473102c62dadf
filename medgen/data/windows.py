"""Which intensities of an image become black and white; called by build.py and jsonl_build.py."""

from __future__ import annotations

import numpy as np

from medgen.errors import InputError
from medgen.spec_data import Window


def window_of(where: str, volume: np.ndarray, window: Window) -> tuple[float, float]:
    """The two intensities that become 0 and 1: fixed, or percentiles over the non-zero voxels of the volume.

    `where`: whose volume and which file, for messages. Raises InputError if there is no such window, or nothing inside it."""
    if volume.min() == volume.max():
        raise InputError(f"{where} holds the single value {volume.flat[0]:g}; remove the patient or give another file")
    if window.fixed is not None:
        low, high = window.fixed
        if volume.max() <= low or volume.min() >= high:
            raise InputError(
                f"{where} reaches from {volume.min():g} to {volume.max():g}, outside the window "
                f"fixed: [{low:g}, {high:g}]; is it in other units?"
            )
        return low, high
    assert window.percentiles is not None, "the spec wants one of the two"
    low, high = (float(value) for value in np.percentile(volume[volume != 0], window.percentiles))
    if not low < high:
        raise InputError(
            f"{where}: the percentiles {list(window.percentiles)} of the non-zero voxels are both {low:g}; "
            "is it a mask? give window: {fixed: [low, high]} if it is meant"
        )
    return low, high
