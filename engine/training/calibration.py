"""Confidences that mean what they say: a temperature of the logits, and thresholds for a wished precision.

Both are fitted on validation rows; how well they hold is told on rows that neither has seen. Shape letters: V
validation rows, N rows, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.heads.confidence import LEAST_TEMPERATURE, MOST_TEMPERATURE, Calibration, log_entropy
from engine.training.lbfgs import Lbfgs

LEAST_ROWS = 50  # for two numbers; with fewer, one of them decides
_STEPS = 100  # Newton needs about eight; halving what is left ends long before this
_TOLERANCE = 1e-9
_LOG_TEMPERATURES = (math.log(LEAST_TEMPERATURE), math.log(MOST_TEMPERATURE))
_AT_A_BOUND = 1.01


def fit_temperature(logits_VK: NDArray[np.floating[Any]], classes_V: NDArray[np.integer[Any]]) -> float:
    """The T in [0.05, 20] for which softmax(logits / T) has the lowest mean cross-entropy; 1.0 without rows.

    Guo et al., On Calibration of Modern Neural Networks (2017), section 4.2. A label is believed with 1 - 1 / (V + 2)
    only, the rest being that of all other classes, as in Platt, Probabilistic Outputs for Support Vector Machines
    (1999), section 2.2: where a few rows are all right, nothing else would keep confidences from 1. The loss is convex
    in 1 / T, so Newton's method is used there, inside a bracket.
    """
    if not len(classes_V):
        return 1.0
    shifted_VK, aimed_V = _aimed(logits_VK, classes_V)
    low, high, inverse = 1 / MOST_TEMPERATURE, 1 / LEAST_TEMPERATURE, 1.0
    for _ in range(_STEPS):
        raised_VK = np.exp(inverse * shifted_VK)
        raised_VK /= raised_VK.sum(axis=1, keepdims=True)
        mean_V = (raised_VK * shifted_VK).sum(axis=1)
        slope = float((mean_V - aimed_V).mean())
        curvature = float(((raised_VK * shifted_VK**2).sum(axis=1) - mean_V**2).mean())
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - inverse) <= _TOLERANCE * inverse:
            break
        inverse = following
    return 1.0 / inverse


def calibrate(
    kind: Literal["adaptive", "temperature", "none"],
    logits_VK: NDArray[np.floating[Any]],
    classes_V: NDArray[np.integer[Any]],
) -> Calibration:
    """What validation rows ask for; nothing without rows.

    Linear heads are often too modest where classes are close and too sure where they are not, which no one temperature
    mends. `adaptive` makes log T linear in the log of the row's entropy (after Balanya, Maronas and Ramos, Adaptive
    Temperature Scaling for Robust Calibration of Deep Neural Networks, 2022), if that explains the rows better by
    Schwarz's criterion (1978), and there are at least 50; else it is `temperature`.
    """
    if kind == "none" or not len(classes_V):
        return Calibration()
    plain = Calibration(temperature=fit_temperature(logits_VK, classes_V))
    bounds = LEAST_TEMPERATURE * _AT_A_BOUND, MOST_TEMPERATURE / _AT_A_BOUND
    if kind == "temperature" or len(classes_V) < LEAST_ROWS or not bounds[0] < plain.temperature < bounds[1]:
        return plain
    found = _with_exponent(logits_VK, classes_V, plain)
    return found if bounds[0] < found.temperature < bounds[1] else plain


def _with_exponent(
    logits_VK: NDArray[np.floating[Any]], classes_V: NDArray[np.integer[Any]], plain: Calibration
) -> Calibration:
    """Fit both numbers; the plain calibration where the second one is not worth having."""
    shifted_VK, aimed_V = _aimed(logits_VK, classes_V)
    hesitation_V = log_entropy(logits_VK.astype(np.float64))

    def loss_and_gradient(point_2: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        wanted_V = point_2[0] + point_2[1] * hesitation_V
        bounded_V = np.clip(wanted_V, *_LOG_TEMPERATURES)
        inverse_V = np.exp(-bounded_V)
        raised_VK = np.exp(inverse_V[:, None] * shifted_VK)
        sums_V = raised_VK.sum(axis=1)
        mean_V = (raised_VK * shifted_VK).sum(axis=1) / sums_V
        loss = float((np.log(sums_V) - inverse_V * aimed_V).mean() + point_2[1] ** 2 / (2 * len(classes_V)))
        slopes_V = np.where(wanted_V == bounded_V, inverse_V * (aimed_V - mean_V), 0.0)
        pull = point_2[1] / len(classes_V)
        return loss, np.array([slopes_V.mean(), (slopes_V * hesitation_V).mean() + pull])

    start_2 = np.array([np.log(plain.temperature), 0.0])
    descent = Lbfgs(start_2, history=4)
    for _ in range(_STEPS):
        while not descent.tell(*loss_and_gradient(descent.asked)):
            pass
        if descent.steepest <= _TOLERANCE:
            break
    gained = 2 * len(classes_V) * (loss_and_gradient(start_2)[0] - descent.loss)
    if not gained > np.log(len(classes_V)):
        return plain
    return Calibration(temperature=float(np.exp(descent.at_P[0])), entropy_exponent=float(descent.at_P[1]))


def _aimed(
    logits_VK: NDArray[np.floating[Any]], classes_V: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits below the row's largest, and what of them the labels ask for, doubted as `fit_temperature` says."""
    doubt = 1 / (len(classes_V) + 2)
    shifted_VK = logits_VK.astype(np.float64)
    shifted_VK -= shifted_VK.max(axis=1, keepdims=True)
    own_V = np.take_along_axis(shifted_VK, classes_V[:, None], axis=1)[:, 0]
    others_V = (shifted_VK.sum(axis=1) - own_V) / (shifted_VK.shape[1] - 1)
    return shifted_VK, (1 - doubt) * own_V + doubt * others_V


@dataclass(frozen=True, slots=True)
class Threshold:
    """A confidence from which on answers are as precise as wished, on the rows it was found on.

    Attributes:
        precision: share of right answers that was wished for.
        min_confidence: answers below it are not given. None: no threshold reaches the precision.
        coverage: share of rows that are answered.
    """

    precision: float
    min_confidence: float | None
    coverage: float


def threshold_for(
    precision: float, confidences_N: NDArray[np.floating[Any]], is_right_N: NDArray[np.bool_]
) -> Threshold:
    """The lowest threshold whose answers are right in the wished share of cases, so that most rows are answered.

    It lies halfway to the next lower confidence, so that a last bit more or less decides nothing.
    """
    order = np.argsort(-confidences_N, kind="stable")
    sorted_N = confidences_N[order].astype(np.float64)
    share_N = np.cumsum(is_right_N[order]) / np.arange(1, len(order) + 1)
    ends_a_tie_N = np.append(sorted_N[:-1] > sorted_N[1:], True) if len(order) else np.empty(0, bool)
    good = np.flatnonzero(ends_a_tie_N & (share_N >= precision))
    if not len(good):
        return Threshold(precision, None, 0.0)
    last = int(good[-1])
    below = sorted_N[last + 1] if last + 1 < len(order) else 0.0
    is_all = last + 1 == len(order)
    return Threshold(
        precision, 0.0 if is_all else float((sorted_N[last] + below) / 2), (last + 1) / len(order)
    )
