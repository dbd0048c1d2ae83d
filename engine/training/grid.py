"""Which heads a fit tries, and which of them it publishes. Not for: training them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, RecipeError
from engine.heads.kinds import AnyHeadConfig, KnnHeadConfig, MlpHeadConfig
from engine.training.kinds import AnyOptimizerConfig, FitSettings, GridConfig, LbfgsConfig

if TYPE_CHECKING:
    from engine.training.loop import Trained

OPTIMIZER_FIELDS = ("learning_rate", "weight_decay", "l2")
MAX_CANDIDATES = 64  # each takes its memory, and its share of every step


@dataclass(frozen=True, slots=True)
class Candidate:
    """A head and how it is trained."""

    head: AnyHeadConfig
    optimizer: AnyOptimizerConfig

    def to_json(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "head": self.head.model_dump(mode="json"),
            "optimizer": self.optimizer.model_dump(mode="json"),
        }


def candidates(settings: FitSettings) -> list[Candidate]:
    """Every combination of the grid, the recipe's own values where it leaves something out; one without a grid.

    Raises:
        RecipeError: more than 64, or a grid of what the heads or the optimizer do not have.
    """
    grid = settings.grid
    if grid.dropout and not any(isinstance(head, MlpHeadConfig) for head in grid.head or (settings.head,)):
        raise RecipeError(
            "grid.dropout: no head here has dropout",
            found=", ".join(head.kind for head in grid.head or (settings.head,)),
            wanted="a head of kind mlp, in `head` or in `grid.head`",
        )
    optimizers = _optimizers(settings.optimizer, grid)
    heads = [tried for head in grid.head or (settings.head,) for tried in _with_dropouts(head, grid.dropout)]
    if isinstance(settings.optimizer, LbfgsConfig) and any(_has_dropout(head) for head in heads):
        raise RecipeError(
            "optimizer.kind lbfgs: it cannot train a head with dropout",
            found="a loss that differs from one look to the next",
            way_out="set the head's dropout to 0, or take adam",
        )
    pairs = [
        Candidate(head, optimizer)
        for head in heads
        for optimizer in (optimizers[:1] if isinstance(head, KnnHeadConfig) else optimizers)
    ]
    found = list(dict.fromkeys(pairs))
    if len(found) > MAX_CANDIDATES:
        raise RecipeError(
            "grid: too many heads to train at once",
            found=f"{len(found)}",
            wanted=f"at most {MAX_CANDIDATES}",
            way_out="try fewer values, or fit twice",
        )
    return found


def _optimizers(own: AnyOptimizerConfig, grid: GridConfig) -> list[AnyOptimizerConfig]:
    """The recipe's optimizer with each combination of the grid's values."""
    given = {name: getattr(grid, name) for name in OPTIMIZER_FIELDS if getattr(grid, name)}
    strange = sorted(set(given) - set(type(own).model_fields))
    if strange:
        raise RecipeError(
            f"grid.{strange[0]}: optimizer {own.kind} has no {strange[0]}",
            wanted=" or ".join(f"grid.{name}" for name in OPTIMIZER_FIELDS if name in type(own).model_fields),
        )
    return [
        own.model_copy(update=dict(zip(given, values, strict=True))) for values in product(*given.values())
    ]


def _has_dropout(head: AnyHeadConfig) -> bool:
    return isinstance(head, MlpHeadConfig) and head.dropout > 0


def _with_dropouts(head: AnyHeadConfig, rates: tuple[float, ...]) -> Iterator[AnyHeadConfig]:
    if not isinstance(head, MlpHeadConfig) or not rates:
        yield head
    else:
        yield from (head.model_copy(update={"dropout": rate}) for rate in rates)


def best_of(trained: Sequence[Trained], tried: Sequence[Candidate]) -> int:
    """The place of the head with the lowest validation loss; the only one, where there is one.

    Raises:
        EngineError: every head's loss became infinite before its first epoch ended.
    """
    losses = [_best_loss(one) for one in trained]
    finite = [place for place, one in enumerate(trained) if one.result.history]
    if not finite:
        raise EngineError(
            "training: the loss of every head of the grid is infinite in epoch 1",
            found="; ".join(sorted({step_sizes(candidate.optimizer) for candidate in tried})),
            way_out="lower learning rates; if that does not help, look for extreme numbers in the embeddings",
        )
    return min(finite, key=lambda place: losses[place])


def step_sizes(optimizer: AnyOptimizerConfig) -> str:
    """What of an optimizer may have made a loss infinite."""
    if isinstance(optimizer, LbfgsConfig):
        return f"optimizer.kind lbfgs, l2 {optimizer.l2}"
    return f"optimizer.learning_rate {optimizer.learning_rate}"


def grid_report(tried: Sequence[Candidate], trained: Sequence[Trained], best: int) -> list[dict[str, Any]]:
    """Every head that was tried, for metrics.json."""
    return [
        {
            **candidate.to_json(),
            "published": place == best,
            "epochs": len(one.result.history),
            "best_epoch": one.result.best_epoch,
            "validation_loss": _best_loss(one) if math.isfinite(_best_loss(one)) else None,
            "stopped": one.result.stopped,
        }
        for place, (candidate, one) in enumerate(zip(tried, trained, strict=True))
    ]


def _best_loss(one: Trained) -> float:
    losses = [epoch.validation_loss for epoch in one.result.history if epoch.validation_loss is not None]
    return min(losses, default=math.inf)
