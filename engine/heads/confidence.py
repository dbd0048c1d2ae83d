"""Logits to probabilities that keep what they promise. Not for: finding the numbers by which they do.

In the precision of the logits. Shape letters: B rows, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engine.config import Config

Floats = NDArray[np.floating[Any]]
LEAST_ENTROPY = 1e-6  # of one: below, a row is simply sure
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.05, 20.0


class Calibration(Config):
    """How logits become probabilities."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it before the softmax; 1 leaves them as trained."""
    entropy_exponent: float = 0.0
    """The temperature of a row is `temperature` times this power of its entropy, as a share of the largest there can be
    (1e-6 at least), and stays between 0.05 and 20. 0: all rows have the same."""

    def apply(self, logits_BK: Floats) -> Floats:
        """The logits, each row over its temperature; the order within a row stays."""
        temperatures_B = np.full(len(logits_BK), self.temperature)
        if self.entropy_exponent:
            temperatures_B *= np.exp(self.entropy_exponent * log_entropy(logits_BK))
            temperatures_B = temperatures_B.clip(LEAST_TEMPERATURE, MOST_TEMPERATURE)
        cooled_BK: Floats = logits_BK / temperatures_B[:, None].astype(logits_BK.dtype)
        return cooled_BK


def softmax(logits_BK: Floats) -> Floats:
    """Rows of exp(logits) that sum to 1; shifted by their maximum, so that nothing overflows."""
    raised_BK = np.exp(logits_BK - logits_BK.max(axis=1, keepdims=True))
    probabilities_BK: Floats = raised_BK / raised_BK.sum(axis=1, keepdims=True)
    return probabilities_BK


def sigmoid(logits_BK: Floats) -> Floats:
    """1 / (1 + exp(-logits)), without overflow."""
    raised_BK = np.exp(-np.abs(logits_BK))
    probabilities_BK: Floats = np.where(logits_BK >= 0, 1, raised_BK) / (1 + raised_BK)
    return probabilities_BK


def log_entropy(logits_BK: Floats) -> Floats:
    """(B,) log of the entropy of softmax(logits) as a share of log K, from log 1e-6 to 0.

    The largest logit is counted apart: beside it, what the others have would be lost to rounding where it matters most.
    """
    shifted_BK = logits_BK - logits_BK.max(axis=1, keepdims=True)
    raised_BK = np.exp(shifted_BK)
    np.put_along_axis(raised_BK, logits_BK.argmax(axis=1)[:, None], 0.0, axis=1)
    others_B = raised_BK.sum(axis=1)
    entropy_B = np.log1p(others_B) - (raised_BK * shifted_BK).sum(axis=1) / (1 + others_B)
    share_B: Floats = np.clip(entropy_B / math.log(logits_BK.shape[1]), LEAST_ENTROPY, 1.0)
    return np.log(share_B)
