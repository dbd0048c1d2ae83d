"""Area means by their definition, to hold others against: float64, a weight for every pair of pixels."""

from __future__ import annotations

import numpy as np


def exact_means(
    pixels_HWC: np.ndarray, target: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Means over exact areas of the box (or all), pixels on a border counted in part; target: width, height."""
    height, width = pixels_HWC.shape[:2]
    left, upper, right, lower = box or (0, 0, width, height)
    low = _overlaps(upper, lower, target[1], height) @ pixels_HWC.reshape(height, -1).astype(np.float64)
    return _overlaps(left, right, target[0], width) @ low.reshape(target[1], width, -1)


def _overlaps(begin: float, end: float, targets: int, pixels: int) -> np.ndarray:
    """Which part of each target lies on each pixel, shape (targets, pixels)."""
    edges, at = np.linspace(begin, end, targets + 1)[:, None], np.arange(pixels)
    shared = np.minimum(edges[1:], at + 1) - np.maximum(edges[:-1], at)
    return np.clip(shared, 0, None) / ((end - begin) / targets)
