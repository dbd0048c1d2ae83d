"""Which rows train, which choose, which judge, and what each is labelled with. Not for: reading their embeddings.

Shape letters: N labelled rows, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.errors import LabelError
from engine.storage import StorageConfig
from engine.training.kinds import SPLIT_NAMES, LabelsConfig, SplitConfig, Task
from engine.training.labels import LabelledRows, join_labels
from engine.training.split import assign_splits
from engine.training.tasks import RowNames, Targets, read_targets

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Partition:
    """The labelled rows of a table, divided.

    Attributes:
        groups: what each row is held together with others by.
        splits_N: `train`, `validation`, `test`, or empty for a row outside of all slices.
        rows_of: row numbers of each split, of those rows whose class has a training row.
    """

    labelled: LabelledRows
    groups: Sequence[str]
    splits_N: NDArray[np.str_]
    targets: Targets
    rows_of: Mapping[str, NDArray[np.int64]]

    def names(self, table: pa.Table) -> RowNames:
        """Which each labelled row of that table is."""
        rows = table.select(["shard", "index"]).take(pa.array(self.labelled.positions_N))
        return RowNames(self.labelled.keys, rows["shard"].to_pylist(), rows["index"].to_pylist())

    def facts(self) -> dict[str, Any]:
        """What metrics.json says beside the metrics: which rows they rest on."""
        return {
            "labels": {
                **self.labelled.counts.as_dict(),
                "classes_without_training_rows": self.targets.unseen,
            },
            "split": {
                name: {
                    "rows": len(self.rows_of[name]),
                    "rows_per_class": self.targets.rows_per_class(self.rows_of[name]),
                }
                for name in SPLIT_NAMES
            },
        }


def partition(
    table: pa.Table,
    task: Task,
    labels: LabelsConfig,
    split: SplitConfig,
    storage: StorageConfig,
    side: Sequence[str] = (),
) -> Partition:
    """Join labels to the rows of a table and divide them; what is left out is said in the log.

    Args:
        table: key, shard, index, and the columns that labels and split name.
        side: columns that are wanted besides, from the label file where the table has none of that name.

    Raises:
        LabelError: labels or splits that cannot be used without guessing.
        StorageError: a label file cannot be read.
    """
    loose = [name for name in side if name not in table.column_names]
    wanted = [name for name in (split.column, split.group) if name]
    labelled = join_labels(table, labels, [*wanted, *loose], storage, task == "multi_label", loose=loose)
    groups = _groups(labelled, split)
    splits_N = assign_splits(groups, labelled.values.get(split.column or ""), split)
    _refuse_divided_groups(groups, splits_N, split)
    targets = read_targets(task, labelled.labels, splits_N == "train")
    rows_of: dict[str, NDArray[np.int64]] = {
        name: np.flatnonzero((splits_N == name) & targets.usable_N) for name in SPLIT_NAMES
    }
    _say_what_is_left_out(labelled, targets, rows_of, int((splits_N == "").sum()))
    return Partition(labelled, groups, splits_N, targets, rows_of)


def _groups(labelled: LabelledRows, split: SplitConfig) -> Sequence[str]:
    """What rows are held together by: the value of the group column, else the key."""
    if split.group is None:
        return labelled.keys
    values = labelled.values[split.group]
    return [
        f"{split.group}\n{value}" if value else key for key, value in zip(labelled.keys, values, strict=True)
    ]


def _refuse_divided_groups(groups: Sequence[str], splits_N: NDArray[np.str_], split: SplitConfig) -> None:
    """An explicit split may divide a group, which would let the head be judged by what it has seen."""
    if split.group is None or split.column is None:
        return
    sides: dict[str, set[str]] = {}
    for group, side in zip(groups, splits_N.tolist(), strict=True):
        if side:
            sides.setdefault(group, set()).add("test" if side == "test" else "train or validation")
    divided = sorted(group.partition("\n")[2] or group for group, found in sides.items() if len(found) > 1)
    if divided:
        raise LabelError(
            f"split.column {split.column}: {len(divided)} groups are on both sides of the test",
            found=", ".join(divided[:5]) + (", ..." if len(divided) > 5 else ""),
            wanted=f"all rows of one {split.group} on one side",
            way_out="correct the column, or leave split.group out if that is meant",
        )


def _say_what_is_left_out(
    labelled: LabelledRows, targets: Targets, rows_of: Mapping[str, NDArray[np.int64]], outside: int
) -> None:
    counts = labelled.counts
    if counts.unlabelled:
        log.warning("%d of %d rows have no label and are left out", counts.unlabelled, counts.rows_in_table)
    if counts.unknown_keys:
        log.warning("%d labels belong to no row of the table and are ignored", counts.unknown_keys)
    if counts.conflicting_keys:
        log.warning("%d keys have several labels; their rows are left out", counts.conflicting_keys)
    if outside:
        log.warning("%d labelled rows are outside of all slices of the split", outside)
    for name, rows in targets.unseen.items():
        log.warning(
            "class %r has no training row and is left out, with the labels of its %d rows", name, rows
        )
    if not len(rows_of["validation"]):
        log.warning("no validation rows: training runs all epochs and keeps the last weights")
    if not len(rows_of["test"]):
        log.warning("no test rows: the bundle's test metrics are null")
