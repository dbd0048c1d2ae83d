"""How byte pixels become what a network was trained on: by a convention's name, or found out. Not for: applying it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engine.backbones.base import PixelScaling, require_keras
from engine.backbones.kinds import Channels, Convention, ScalingConfig
from engine.errors import BackboneError

CONVENTIONS: tuple[Convention, ...] = ("tf", "caffe", "torch", "none", "unit")


def stated_scaling(stated: Convention | ScalingConfig) -> PixelScaling:
    """What a recipe says; the numbers of tf, caffe and torch are those of Keras."""
    if isinstance(stated, ScalingConfig):
        return PixelScaling("own", stated.multiply, stated.add, stated.bgr)
    if stated in ("none", "unit"):
        return PixelScaling(stated, (1.0 if stated == "none" else 1 / 255,) * 3, (0.0,) * 3)
    preprocess = require_keras().applications.imagenet_utils.preprocess_input
    return probed_scaling(stated, partial(preprocess, mode=stated))


def same_numbers(left: PixelScaling, right: PixelScaling) -> bool:
    """Whether they do the same, whatever they are called."""
    return (left.multiply, left.add, left.bgr) == (right.multiply, right.add, right.bgr)


def probed_scaling(name: str, preprocess: Callable[[np.ndarray], Any]) -> PixelScaling:
    """What a preprocessing function does, found by sending known pixels through it; ten digits, so that rounding inside
    Keras stays out.

    Args:
        name: what to call it.

    Raises:
        BackboneError: it does more than swap channels and scale each by a line.
    """
    black_and_primaries = 255.0 * np.vstack([np.zeros(3), np.eye(3)])
    add, *primaries = np.asarray(preprocess(black_and_primaries.reshape(1, 1, 4, 3).copy())).reshape(4, 3)
    response = (np.stack(primaries) - add) / 255.0  # row: channel in, column: channel out
    bgr = abs(response[0, 0]) < abs(response[0, 2])
    multiply = np.diagonal(response[::-1] if bgr else response)
    greys = np.arange(256.0).repeat(3).reshape(1, 16, 16, 3) * (1.0, 0.5, 0.25)
    expected = (greys[..., ::-1] if bgr else greys) * multiply + add
    if not np.allclose(np.asarray(preprocess(greys.copy())), expected, rtol=0.0, atol=1e-6):
        raise BackboneError(
            f"{getattr(preprocess, '__module__', name)}: its preprocess_input cannot be put into a graph",
            found="something else than a line per channel",
            wanted="RGB or BGR, then a factor and an offset per channel",
        )
    return PixelScaling(name, _rounded(multiply), _rounded(add), bool(bgr))


def _rounded(values: np.ndarray) -> Channels:
    red, green, blue = (float(f"{value:.10g}") + 0.0 for value in values)
    return red, green, blue
