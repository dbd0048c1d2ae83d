"""L-BFGS, by asking and telling, so that many of them share one pass over the rows. Not for: computing losses.

Liu and Nocedal, On the Limited Memory BFGS Method for Large Scale Optimization (1989), algorithm 2.1; the line search
is that of Lewis and Overton, Nonsmooth Optimization via Quasi-Newton Methods (2013), section 2: it halves and doubles
until both Wolfe conditions hold, which keeps the estimate positive definite for any loss. Shape letters: P parameters,
h remembered steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DECREASE, CURVATURE = 1e-4, 0.9  # of the Wolfe conditions, as is usual
MOST_TRIALS = 30  # of one line search: 2 ** -30 of a step is none

Floats = NDArray[np.float64]


class Lbfgs:
    """One minimisation. Evaluate what `asked` says and `tell` the result, until `tell` says that an iteration is over.

    Args:
        start_P: where it begins.
        history: h at most.
    """

    def __init__(self, start_P: Floats, history: int) -> None:
        self._history = history
        self.at_P, self.loss, self._gradient_P = start_P, math.inf, np.zeros_like(start_P)
        self._steps_hP: list[Floats] = []
        self._changes_hP: list[Floats] = []
        self._direction_P, self._slope = np.zeros_like(start_P), 0.0
        self._new_line()

    def _new_line(self) -> None:
        self._length, self._too_short, self._too_long, self._trials = 1.0, 0.0, math.inf, 0

    @property
    def asked(self) -> Floats:
        """The point whose loss and gradient are wanted."""
        return self.at_P + self._length * self._direction_P

    @property
    def steepest(self) -> float:
        """The largest number of the gradient where it stands."""
        return float(np.abs(self._gradient_P).max(initial=0.0))

    def tell(self, loss: float, gradient_P: Floats) -> bool:
        """The loss and its gradient at the point that was asked for.

        Returns:
            Whether an iteration is over: `at_P` and `loss` are new, or no step along the line helps (they are not).
        """
        if not math.isfinite(self.loss):  # the first look
            self.loss, self._gradient_P = loss, gradient_P
            self._turn()
            return not math.isfinite(loss)
        if not self._slope < 0:  # it stands at a minimum, and no line leads anywhere
            return True
        self._trials += 1
        if not loss <= self.loss + DECREASE * self._length * self._slope:  # also where it is NaN
            self._too_long = self._length
        elif gradient_P @ self._direction_P < CURVATURE * self._slope:
            self._too_short = self._length
        else:
            self._accept(loss, gradient_P)
            return True
        if self._trials >= MOST_TRIALS:
            self._steps_hP, self._changes_hP = [], []  # what was remembered has led nowhere
            self._turn()
            return True
        if math.isfinite(self._too_long):
            self._length = (self._too_short + self._too_long) / 2
        else:
            self._length = 2 * self._too_short
        return False

    def _accept(self, loss: float, gradient_P: Floats) -> None:
        step_P, change_P = self._length * self._direction_P, gradient_P - self._gradient_P
        if float(step_P @ change_P) > 0:  # a gradient that did not change says nothing of the curvature
            self._steps_hP.append(step_P)
            self._changes_hP.append(change_P)
            del self._steps_hP[: -self._history], self._changes_hP[: -self._history]
        self.at_P, self.loss, self._gradient_P = self.asked, loss, gradient_P
        self._turn()

    def _turn(self) -> None:
        """Look along minus the estimated inverse Hessian times the gradient."""
        self._direction_P = -self._times_inverse_hessian(self._gradient_P)
        self._slope = float(self._gradient_P @ self._direction_P)
        self._new_line()
        if not self._steps_hP:  # nothing says how long a step may be: one of length 1 at most
            self._length = 1.0 / max(1.0, float(np.linalg.norm(self._gradient_P)))

    def _times_inverse_hessian(self, vector_P: Floats) -> Floats:
        result_P = vector_P.copy()
        shares = []
        pairs = list(zip(self._steps_hP, self._changes_hP, strict=True))
        for step_P, change_P in reversed(pairs):
            share = float(step_P @ result_P) / float(step_P @ change_P)
            result_P -= share * change_P
            shares.append(share)
        if pairs:
            step_P, change_P = pairs[-1]
            result_P *= float(step_P @ change_P) / float(change_P @ change_P)
        for (step_P, change_P), share in zip(pairs, reversed(shares), strict=True):
            result_P += (share - float(change_P @ result_P) / float(step_P @ change_P)) * step_P
        return result_P

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All it needs to go on, between two iterations."""
        return {
            "at": self.at_P,
            "loss": np.array(self.loss),
            "gradient": self._gradient_P,
            "steps": np.stack([self.at_P, *self._steps_hP]),  # one row more, so that there always is one
            "changes": np.stack([self.at_P, *self._changes_hP]),
        }

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Go on from there."""
        self.at_P, self.loss, self._gradient_P = (
            tensors["at"],
            float(tensors["loss"]),
            tensors["gradient"],
        )
        self._steps_hP, self._changes_hP = list(tensors["steps"][1:]), list(tensors["changes"][1:])
        self._turn()
