"""Distributions to look at: grey values, power spectra, mask areas; real beside synthetic. Used by run.py, drawn by report."""

from __future__ import annotations

from typing import Any

import numpy as np

from medgen.evaluate import spectrum

INTENSITY_BINS = 50
AREA_BINS = 12


def intensity(real: np.ndarray, synthetic: np.ndarray) -> dict[str, Any]:
    """Share of foreground pixels per grey value in [0,1]; background (below 0.02) is left out. Inputs float [n,H,W]."""
    edges = np.linspace(0, 1, INTENSITY_BINS + 1)[1:]
    return _both(edges, real[real >= edges[0]], synthetic[synthetic >= edges[0]])


def mask_area(real: np.ndarray, synthetic: np.ndarray) -> dict[str, Any]:
    """Share of masks per area in percent of the slice; inputs {0,1} or labels [n,H,W]."""
    areas = [100 * (side > 0).mean(axis=(1, 2), dtype=float) for side in (real, synthetic)]
    widest = max(float(area.max(initial=0)) for area in areas)
    return _both(np.linspace(0, widest if widest > 0 else 1.0, AREA_BINS + 1), *areas)


def _both(edges: np.ndarray, real: np.ndarray, synthetic: np.ndarray) -> dict[str, Any]:
    shares = [np.histogram(side, edges)[0] / max(1, side.size) for side in (real, synthetic)]
    centres = (edges[:-1] + edges[1:]) / 2
    return {"x": _short(centres), "real": _short(shares[0]), "synthetic": _short(shares[1])}


def power_spectrum(real: np.ndarray, synthetic: np.ndarray) -> dict[str, Any]:
    """log10 of the radially averaged power, mean over images, against spatial frequency in cycles per pixel. Inputs float [n,H,W]."""
    size = real.shape[-1]
    powers = [spectrum.radial_power(side).mean(axis=0) for side in (real, synthetic)]
    return {"x": _short(np.arange(1, size // 2 + 1) / size), "real": _short(powers[0]), "synthetic": _short(powers[1])}


def _short(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
