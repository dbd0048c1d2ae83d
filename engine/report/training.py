"""How training went, for a report: phases and their epochs, heads that were tried, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.report.tables import Cell, Table, count_cell, in_one_line, number_cell, percent, ratio_cell

EPOCHS_SHOWN = 200  # of each phase, in table and plot


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training.

    Attributes:
        name: of what learnt: `head` or `backbone`.
        after: epochs before its first one.
        history: epoch, train_loss, validation_loss and validation_accuracy of each (of many: of some, the last and the
            best among them).
        best_epoch: whose weights are kept; `after` where those before the phase were.
        epochs: how many were run.
        stopped: why it ended.
    """

    name: str
    after: int
    history: Sequence[Mapping[str, Any]]
    best_epoch: int
    epochs: int
    stopped: str

    def in_words(self) -> str:
        """Which epochs, and whose weights are kept."""
        epochs = f"epoch {self.after + 1}"
        if self.epochs > 1:
            epochs = f"epochs {self.after + 1:,} to {self.after + self.epochs:,}"
        if self.best_epoch <= self.after:
            return f"The {self.name} learns in {epochs}, none of which was better than what it began with."
        return f"The {self.name} learns in {epochs}; the weights of epoch {self.best_epoch:,} are kept."


def comparison_words(comparison: Mapping[str, Any], task: str) -> dict[str, str]:
    """Before and after, in words; the verdict hangs on the interval alone."""
    low, high = comparison["low"], comparison["high"]
    verdict = "The interval holds 0: as many other images might show no difference, or the opposite."
    if low > 0:
        verdict = "The whole interval is above 0: it helped."
    elif high < 0:
        verdict = "The whole interval is below 0: it did harm."
    return {
        "before": percent(comparison["before"]),
        "after": percent(comparison["after"]),
        "rows": f"{comparison['rows']:,}",
        "split": comparison["split"],
        "difference": _points(comparison["difference"]),
        "low": _points(low),
        "high": _points(high),
        "verdict": verdict,
        "measure": "right answers to all questions (image, class)" if task == "multi_label" else "accuracy",
    }


def training_phases(training: Mapping[str, Any]) -> list[Phase]:
    """The phases of a fit (one) or of a fine-tuning (two; one where the head came from a bundle)."""
    if "history" in training:
        return [_phase("head", 0, training)]
    return [
        _phase(name, training[name].get("initial_epoch", 0), training[name])
        for name in ("head", "backbone")
        if training.get(name)
    ]


def has_curves(phases: Sequence[Phase]) -> bool:
    """Whether anything was trained: a head that remembers its rows has one epoch without a loss."""
    return any(epoch["train_loss"] is not None for phase in phases for epoch in phase.history)


def epochs_table(phases: Sequence[Phase]) -> Table:
    """Every epoch that is drawn."""
    rows = [
        [
            count_cell(epoch["epoch"]),
            Cell(phase.name + (", kept" if epoch["epoch"] == phase.best_epoch else "")),
            *(ratio_cell(epoch[name]) for name in ("train_loss", "validation_loss")),
            number_cell(percent(epoch["validation_accuracy"]), epoch["validation_accuracy"]),
        ]
        for phase in phases
        for epoch in phase.history
    ]
    columns = ("Epoch", "What learns", "Train loss", "Validation loss", "Validation accuracy")
    run = sum(phase.epochs for phase in phases)
    note = f"{len(rows):,} of {run:,} epochs." if run > len(rows) else ""
    return Table("epochs", "Epochs of training", columns, rows, note)


def grid_table(grid: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every head that was tried; None where it was one."""
    if len(grid) < 2:
        return None
    rows = [
        [
            Cell(in_one_line(one["head"])),
            Cell(in_one_line(one["optimizer"])),
            ratio_cell(one["validation_loss"]),
            count_cell(one["best_epoch"]),
            count_cell(one["epochs"]),
            Cell("published" if one["published"] else ""),
        ]
        for one in sorted(grid, key=lambda one: (one["validation_loss"] is None, one["validation_loss"]))
    ]
    columns = ("Head", "Optimizer", "Validation loss", "Best epoch", "Epochs", "Outcome")
    return Table("grid", "Heads that were tried", columns, rows)


def _phase(name: str, after: int, training: Mapping[str, Any]) -> Phase:
    history, best = training["history"], training["best_epoch"]
    step = max(1, -(-len(history) // EPOCHS_SHOWN))
    kept = [
        epoch
        for place, epoch in enumerate(history)
        if place % step == 0 or place + 1 == len(history) or epoch["epoch"] == best
    ]
    return Phase(name, after, kept, best, len(history), training["stopped"])


def _points(share: float) -> str:
    """A difference of shares, with its sign."""
    return f"{100 * share:+.2f} points"
