"""What differs between rows of one class and rows of any number of them. Not for: training, which is the same.

Shape letters: N labelled rows, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads.confidence import Calibration, sigmoid, softmax
from engine.training.gallery import gallery_of_classes, gallery_of_label_sets
from engine.training.judgement import JUDGED, JudgedRows, judge
from engine.training.kinds import CalibrationConfig, Task
from engine.training.labels import encode_classes, encode_label_sets, label_set
from engine.training.multi_label import find_suspect_label_sets, judge_label_sets
from engine.training.suspects import find_suspects


@dataclass(frozen=True, slots=True)
class RowNames:
    """Which each of the labelled rows is."""

    keys: Sequence[str]
    shards: Sequence[str]
    indexes: Sequence[int]  # positions in the shard


@dataclass(frozen=True, slots=True)
class Verdict:
    """What goes into a bundle.

    Attributes:
        calibration: of the logits.
        thresholds: of each class, where a row may have several; else none.
        metrics: validation and test (None without rows), calibration, most_confident_mistakes.
    """

    calibration: Calibration
    thresholds: tuple[float, ...]
    metrics: dict[str, Any]


class Targets(ABC):
    """The classes that a head can answer, and what each row is labelled with.

    Attributes:
        names: K, sorted by code point.
        array: (N,) class numbers, -1 where the row's class has no training row; or (N, K), 1 where it has the class.
        unseen: class without a training row -> its rows.
        summary_metrics: the figures that a summary shows of each split.
    """

    names: tuple[str, ...]
    array: NDArray[np.integer[Any]]
    unseen: dict[str, int]
    summary_metrics: tuple[str, ...]

    @property
    @abstractmethod
    def usable_N(self) -> NDArray[np.bool_]:
        """Rows that can be trained on or judged."""

    @abstractmethod
    def rows_per_class(self, rows: NDArray[np.int64]) -> dict[str, int]:
        """Of some of the rows."""

    def judge(
        self,
        logits: Mapping[str, NDArray[np.float32]],
        rows_of: Mapping[str, NDArray[np.int64]],
        names: RowNames,
        config: CalibrationConfig,
    ) -> Verdict:
        """What a head is worth, by its logits on the rows of validation and test."""
        splits = {name: self._judged(logits[name], rows_of[name], names) for name in JUDGED}
        return self._verdict(splits, config)

    def gallery(
        self,
        logits: Mapping[str, NDArray[np.float32]],
        rows_of: Mapping[str, NDArray[np.int64]],
        names: RowNames,
        verdict: Verdict,
    ) -> dict[str, Any]:
        """Rows of test (of validation, where test has none) for people to look at: gallery.json.

        Args:
            verdict: on the same logits.
        """
        split = "test" if len(rows_of["test"]) else "validation"
        rows = self._judged(logits[split], rows_of[split], names)
        return self._gallery(split, rows, verdict)

    def _judged(
        self, logits_MK: NDArray[np.float32], rows_M: NDArray[np.int64], names: RowNames
    ) -> JudgedRows:
        return JudgedRows(logits_MK, self.array[rows_M], *_named(names, rows_M))

    def summary(self, verdict: Verdict) -> dict[str, dict[str, float] | None]:
        """The figures of both splits that a person is shown; None without rows."""
        return {
            name: (figures := verdict.metrics[name])
            and {word: figures[word] for word in self.summary_metrics}
            for name in JUDGED
        }

    @abstractmethod
    def _verdict(self, splits: Mapping[str, JudgedRows], config: CalibrationConfig) -> Verdict:
        """The same, of both splits."""

    @abstractmethod
    def _gallery(self, split: str, rows: JudgedRows, verdict: Verdict) -> dict[str, Any]:
        """The same, of the rows of that split."""

    @abstractmethod
    def suspects(
        self, logits_MK: NDArray[np.float32], rows_M: NDArray[np.int64], names: RowNames
    ) -> list[dict[str, Any]]:
        """Labels of the M rows that heads doubt which were fitted without them, for suspects.json."""


def read_targets(task: Task, labels: Sequence[str], is_train_N: NDArray[np.bool_]) -> Targets:
    """Number the classes of the labels as `join_labels` gives them.

    Raises:
        LabelError: there is nothing to learn in the training rows.
    """
    if task == "multi_label":
        return _LabelSets(labels, is_train_N)
    return _Classes(labels, is_train_N)


class _Classes(Targets):
    summary_metrics = ("accuracy", "top_3_accuracy", "loss", "calibration_error")

    def __init__(self, labels: Sequence[str], is_train_N: NDArray[np.bool_]) -> None:
        found = encode_classes(labels, is_train_N)
        self.names, self.array, self.unseen = found.names, found.numbers_N, found.unseen

    @property
    def usable_N(self) -> NDArray[np.bool_]:
        return self.array >= 0

    def rows_per_class(self, rows: NDArray[np.int64]) -> dict[str, int]:
        counts_K = np.bincount(self.array[rows], minlength=len(self.names))
        return dict(zip(self.names, counts_K.tolist(), strict=True))

    def _verdict(self, splits: Mapping[str, JudgedRows], config: CalibrationConfig) -> Verdict:
        judgement = judge(splits, self.names, config)
        return Verdict(judgement.calibration, (), judgement.metrics)

    def _gallery(self, split: str, rows: JudgedRows, verdict: Verdict) -> dict[str, Any]:
        calibrated_MK = verdict.calibration.apply(rows.logits_NK)
        return gallery_of_classes(split, rows, softmax(calibrated_MK.astype(np.float64)), self.names)

    def suspects(
        self, logits_MK: NDArray[np.float32], rows_M: NDArray[np.int64], names: RowNames
    ) -> list[dict[str, Any]]:
        found = find_suspects(softmax(logits_MK.astype(np.float64)), self.array[rows_M])
        found = replace(found, rows=rows_M[found.rows])
        return found.to_json(names.keys, names.shards, names.indexes, self.array, self.names)


class _LabelSets(Targets):
    summary_metrics = ("mean_average_precision", "micro_f1", "loss", "calibration_error")

    def __init__(self, labels: Sequence[str], is_train_N: NDArray[np.bool_]) -> None:
        found = encode_label_sets([label_set(text) for text in labels], is_train_N)
        self.names, self.array, self.unseen = found.names, found.given_NK, found.unseen

    @property
    def usable_N(self) -> NDArray[np.bool_]:
        return np.ones(len(self.array), np.bool_)

    def rows_per_class(self, rows: NDArray[np.int64]) -> dict[str, int]:
        return dict(zip(self.names, self.array[rows].sum(axis=0).tolist(), strict=True))

    def _verdict(self, splits: Mapping[str, JudgedRows], config: CalibrationConfig) -> Verdict:
        return Verdict(*judge_label_sets(splits, self.names, config))

    def _gallery(self, split: str, rows: JudgedRows, verdict: Verdict) -> dict[str, Any]:
        calibrated_MK = verdict.calibration.apply(rows.logits_NK)
        probabilities_MK = sigmoid(calibrated_MK.astype(np.float64))
        return gallery_of_label_sets(split, rows, probabilities_MK, verdict.thresholds, self.names)

    def suspects(
        self, logits_MK: NDArray[np.float32], rows_M: NDArray[np.int64], names: RowNames
    ) -> list[dict[str, Any]]:
        unseen_MK = sigmoid(logits_MK.astype(np.float64))
        return find_suspect_label_sets(unseen_MK, self.array[rows_M], *_named(names, rows_M), self.names)


def _named(names: RowNames, rows: NDArray[np.int64]) -> tuple[list[str], list[str], list[int]]:
    keys, shards, indexes = names.keys, names.shards, names.indexes
    return [keys[row] for row in rows], [shards[row] for row in rows], [indexes[row] for row in rows]
