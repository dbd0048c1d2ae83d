"""Which heads a fit tries, and which of them it publishes. Not for: training them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError, RecipeError
from engine.heads.kinds import AnyHeadConfig, MlpHeadConfig
from engine.training.kinds import AnyOptimizerConfig, FitSettings

if TYPE_CHECKING:
    from engine.training.loop import Trained

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
        RecipeError: more than 64, or a grid of dropouts for heads that have none.
    """
    grid, own = settings.grid, settings.optimizer
    if grid.dropout and not any(isinstance(head, MlpHeadConfig) for head in grid.head or (settings.head,)):
        raise RecipeError(
            "grid.dropout: no head here has dropout",
            found=", ".join(head.kind for head in grid.head or (settings.head,)),
            wanted="a head of kind mlp, in `head` or in `grid.head`",
        )
    optimizers = [
        own.model_copy(update={"learning_rate": rate, "weight_decay": decay})
        for rate, decay in product(
            grid.learning_rate or (own.learning_rate,), grid.weight_decay or (own.weight_decay,)
        )
    ]
    heads = [tried for head in grid.head or (settings.head,) for tried in _with_dropouts(head, grid.dropout)]
    found = list(dict.fromkeys(Candidate(head, optimizer) for head, optimizer in product(heads, optimizers)))
    if len(found) > MAX_CANDIDATES:
        raise RecipeError(
            "grid: too many heads to train at once",
            found=f"{len(found)}",
            wanted=f"at most {MAX_CANDIDATES}",
            way_out="try fewer values, or fit twice",
        )
    return found


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
        rates = sorted({candidate.optimizer.learning_rate for candidate in tried})
        raise EngineError(
            "training: the loss of every head of the grid is infinite in epoch 1",
            found=f"learning rates {', '.join(map(str, rates))}",
            way_out="lower them; if that does not help, look for extreme numbers in the embeddings",
        )
    return min(finite, key=lambda place: losses[place])


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
