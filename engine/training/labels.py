"""Which row of an embedding table has which label, without guessing. Not for: splits, or numbers of any kind.

Shape letters: N labelled rows.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from engine.errors import LabelError
from engine.storage import StorageConfig, open_store
from engine.training.kinds import LabelsConfig

_BETWEEN = "\0"  # before each label of a row that may have several; no text of a CSV file or a table has one
_VALUE = "value:"  # before the names of further columns, so that none is taken for a key or a label
EXAMPLES = 5  # how many offending keys a message shows
LISTED = 20  # how many metrics.json does


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """What became of the rows and of the labels; part of a bundle's metrics."""

    rows_in_table: int
    labelled: int
    unlabelled: int  # rows of the table without a label: left out of the fit
    unknown_keys: int  # labels whose key is not in the table: ignored
    conflicting_keys: int = 0  # keys with several labels, where that is not refused: their rows have none
    unlabelled_examples: tuple[str, ...] = ()  # the first few of each, by key
    unknown_examples: tuple[str, ...] = ()
    conflicting_examples: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Ignored:
    """Keys of a label file that say nothing: no row has them, or they have several labels."""

    unknown: tuple[str, ...]
    conflicting: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """The rows of a table that have a label, in the table's order."""

    positions_N: NDArray[np.int64]  # row of the table
    keys: Sequence[str]
    labels: Sequence[str]
    values: Mapping[str, Sequence[str | None]]  # of further columns, by name
    counts: LabelCounts


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes a head can answer, and each row's number among them."""

    names: tuple[str, ...]  # sorted by code point
    numbers_N: NDArray[np.int64]  # -1: the row's class has no training row
    unseen: dict[str, int]  # class without a training row -> its rows


@dataclass(frozen=True, slots=True)
class LabelSets:
    """The classes a head can answer, and which of them each row has."""

    names: tuple[str, ...]  # sorted by code point
    given_NK: NDArray[np.uint8]  # 1: the row has the class
    unseen: dict[str, int]  # class without a training row -> the rows that have it


def join_labels(
    table: pa.Table,
    config: LabelsConfig,
    columns: Sequence[str],
    storage: StorageConfig,
    several: bool = False,
    loose: Collection[str] = (),
) -> LabelledRows:
    """Find each row's label, in the table itself or in a file keyed by `key` (and `shard` and `index`).

    Args:
        several: a row may have any number of labels; each text is then as `label_set` takes apart.
        loose: those of `columns` that may hold fractions or truth values.
        table: an embedding table with `key`, `shard` and whatever columns the recipe names.
        config: where the labels are.
        columns: what else is wanted of each row (split, group): columns of the label file if it has them, else of the
            table.
        storage: how the label file is reached.

    Raises:
        LabelError: a column is missing or not text, a label file is unreadable, keys are ambiguous, one key has
            two labels, or not a single row has a label.
        StorageError: the label file cannot be fetched.
    """
    if config.uri is None:
        labels = _labels_column(table, config, "embedding table", several)
        values = {name: _text_column(table, name, "embedding table") for name in columns}
        ignored = _Ignored((), ())
    else:
        labels, values, ignored = _from_file(table, config, columns, storage, several, loose)
    is_labelled = pc.fill_null(pc.not_equal(labels, ""), False)
    positions_N = np.flatnonzero(is_labelled.to_numpy(zero_copy_only=False))
    if len(positions_N) == 0:
        raise _nothing_labelled(table, config, len(ignored.unknown))
    without = table["key"].filter(pc.invert(is_labelled))
    return LabelledRows(
        positions_N=positions_N,
        keys=table["key"].take(positions_N).to_pylist(),
        labels=labels.take(positions_N).to_pylist(),
        values={name: column.take(positions_N).to_pylist() for name, column in values.items()},
        counts=LabelCounts(
            rows_in_table=table.num_rows,
            labelled=len(positions_N),
            unlabelled=len(without),
            unknown_keys=len(ignored.unknown),
            conflicting_keys=len(ignored.conflicting),
            unlabelled_examples=tuple(without.slice(0, LISTED).to_pylist()),
            unknown_examples=ignored.unknown[:LISTED],
            conflicting_examples=ignored.conflicting[:LISTED],
        ),
    )


def encode_classes(labels: Sequence[str], is_train_N: NDArray[np.bool_]) -> Classes:
    """Number the classes that have training rows, sorted by code point; rows of other classes get -1.

    Raises:
        LabelError: no training rows, or fewer than two classes among them.
    """
    train_rows = Counter(label for label, is_train in zip(labels, is_train_N, strict=True) if is_train)
    if len(train_rows) < 2:
        raise LabelError(
            "labels: nothing to tell apart in the training rows",
            found=f"{sum(train_rows.values())} training rows, classes: {', '.join(sorted(train_rows)) or 'none'}",
            wanted="at least 2 classes with training rows",
            way_out="give more labels, a larger split.train, or another split.seed",
        )
    names = tuple(sorted(train_rows))
    number_of = {name: number for number, name in enumerate(names)}
    numbers_N = np.fromiter((number_of.get(label, -1) for label in labels), np.int64, len(labels))
    unseen = Counter(label for label in labels if label not in number_of)
    return Classes(names, numbers_N, dict(sorted(unseen.items())))


def _from_file(
    table: pa.Table,
    config: LabelsConfig,
    columns: Sequence[str],
    storage: StorageConfig,
    several: bool,
    loose: Collection[str],
) -> tuple[pa.ChunkedArray, dict[str, pa.ChunkedArray], _Ignored]:
    """Labels and further values in the table's row order, and which labels say nothing."""
    assert config.uri is not None
    file = _read_label_file(config.uri, storage)
    in_file = [name for name in columns if name in file.column_names]
    texts = {
        "key": _text_column(file, config.key, config.uri),
        "label": _labels_column(file, config, config.uri, several),
        **{_VALUE + name: _value_column(file, name, config.uri, loose) for name in in_file},
    }
    if "shard" in file.column_names:
        texts["shard"] = _text_column(file, "shard", config.uri)
        if "index" in file.column_names and _is_text_or_whole(file["index"].type):
            texts["index"] = _text_column(file, "index", config.uri)
    given = pa.table(texts)
    given = given.filter(
        pc.and_(pc.fill_null(pc.not_equal(given["label"], ""), False), pc.is_valid(given["key"]))
    )
    joined = _joined_on(table, given, config.uri)
    row_ids = _ids(table, joined)
    given = given.append_column("id", _ids(given, joined))
    given = _added_up(given) if several else given
    conflicting = (
        _with_several_labels(given) if config.conflicts == "leave_out" else pa.array([], pa.string())
    )
    given = given.filter(pc.invert(pc.is_in(given["id"], conflicting)))
    one_each = _one_per_id(given, config.uri)
    places = pc.index_in(row_ids, value_set=one_each["id"].combine_chunks())
    unknown = one_each["id"].filter(pc.invert(pc.is_in(one_each["id"], row_ids.combine_chunks())))
    values = {
        name: one_each[_VALUE + name].take(places)
        if name in in_file
        else _text_column(table, name, f"{config.uri} and embedding table")
        for name in columns
    }
    labels = one_each["label"].take(places)
    if config.otherwise is not None:
        there = _labels_column(
            table, config.model_copy(update={"label": config.otherwise}), "embedding table", several
        )
        is_open = pc.invert(
            pc.is_in(row_ids, conflicting)
        )  # else the table would settle what the file leaves open
        labels = pc.coalesce(labels, pc.if_else(is_open, there, pa.scalar(None, pa.string())))
    return labels, values, _Ignored(_shown(unknown), _shown(conflicting))


def label_set(text: str) -> tuple[str, ...]:
    """The labels of a row, sorted by code point, out of the text that `join_labels` has for them; perhaps none."""
    return tuple(label for label in text.split(_BETWEEN) if label)


def encode_label_sets(sets: Sequence[tuple[str, ...]], is_train_N: NDArray[np.bool_]) -> LabelSets:
    """Number the classes that have training rows, sorted by code point; others are counted and left out of their rows.

    Raises:
        LabelError: no training rows, or none of them has a label.
    """
    trained = {name for names, is_train in zip(sets, is_train_N, strict=True) if is_train for name in names}
    if not trained:
        raise LabelError(
            "labels: nothing to learn in the training rows",
            found=f"{int(is_train_N.sum())} training rows without a label",
            wanted="at least one class with training rows",
            way_out="give more labels, a larger split.train, or another split.seed",
        )
    names = tuple(sorted(trained))
    number_of = {name: number for number, name in enumerate(names)}
    given_NK = np.zeros((len(sets), len(names)), np.uint8)
    unseen: Counter[str] = Counter()
    for row, own in enumerate(sets):
        for name in own:
            if name in number_of:
                given_NK[row, number_of[name]] = 1
            else:
                unseen[name] += 1
    return LabelSets(names, given_NK, dict(sorted(unseen.items())))


def _labels_column(table: pa.Table, config: LabelsConfig, origin: str, several: bool) -> pa.ChunkedArray:
    """The label of each row, or all of its labels in one text: sorted, each after a NUL; "" and null: none is known."""
    if not several:
        return _text_column(table, config.label, origin)
    if config.label in table.column_names and pa.types.is_nested(table[config.label].type):
        lists = table[config.label]
        if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)) or not (
            pa.types.is_string(lists.type.value_type) or pa.types.is_large_string(lists.type.value_type)
        ):
            raise LabelError(
                f"{origin}: column {config.label!r} holds no labels",
                found=str(lists.type),
                wanted="text, or a list of texts",
            )
        texts = [_joined(labels) for labels in lists.to_pylist()]
    else:
        column = _text_column(table, config.label, origin).to_pylist()
        texts = [_joined(_taken_apart(text, config.separator)) for text in column]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _taken_apart(text: str | None, separator: str | None) -> list[str] | None:
    if not text:
        return None
    return [text] if separator is None else [part.strip() for part in text.split(separator)]


def _joined(labels: Sequence[str | None] | None) -> str | None:
    if labels is None:
        return None
    return _BETWEEN + _BETWEEN.join(sorted({label for label in labels if label}))


def _added_up(given: pa.Table) -> pa.Table:
    """Lines of one key say its labels one by one."""
    sets: dict[str, set[str]] = {}
    ids = given["id"].to_pylist()
    for row_id, text in zip(ids, given["label"].to_pylist(), strict=True):
        sets.setdefault(row_id, set()).update(label_set(text))
    joined = {row_id: _joined(list(labels)) for row_id, labels in sets.items()}
    place = given.schema.get_field_index("label")
    return given.set_column(place, "label", pa.array([joined[row_id] for row_id in ids], pa.string()))


def _read_label_file(uri: str, storage: StorageConfig) -> pa.Table:
    folder, _, name = uri.rpartition("/")
    content = open_store(folder or ("/" if uri.startswith("/") else "."), storage).read(name)
    try:
        if name.endswith(".parquet"):
            return pa.parquet.read_table(io.BytesIO(content))
        if name.endswith(".csv"):
            return _read_csv_as_text(content)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise LabelError(f"labels.uri {uri}: cannot be read", found=" ".join(str(error).split())) from None
    raise LabelError(
        f"labels.uri {uri}: unknown kind of label file", wanted="a name ending in .csv or .parquet"
    )


def _read_csv_as_text(content: bytes) -> pa.Table:
    """All columns as text: the class "01" stays "01", and "NA" or "null" stay words."""
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(io.BytesIO(content), parse_options=parse) as reader:
        names = reader.schema.names
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pa.csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=convert)


def _value_column(table: pa.Table, name: str, origin: str, loose: Collection[str]) -> pa.ChunkedArray:
    """As `_text_column`; of loose ones fractions and truth values are written out too."""
    if name in loose and name in table.column_names:
        kind = table[name].type
        if pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
            return table[name].cast(pa.string())
    return _text_column(table, name, origin)


def _text_column(table: pa.Table, name: str, origin: str) -> pa.ChunkedArray:
    """A column as strings; whole numbers are written out, fractions and nested values refused."""
    if name not in table.column_names:
        raise LabelError(
            f"{origin}: no column {name!r}",
            found=", ".join(table.column_names),
            way_out="name an existing column in labels.key, labels.label, split.column, split.group or side_features",
        )
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not _is_text_or_whole(kind):
        raise LabelError(
            f"{origin}: column {name!r} is not text",
            found=str(kind),
            wanted="strings or whole numbers",
            way_out="write the column as strings (pandas turns whole numbers with gaps into fractions)",
        )
    return column.cast(pa.string())


def _is_text_or_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _joined_on(table: pa.Table, given: pa.Table, uri: str) -> tuple[str, ...]:
    """The columns that tell rows apart: the key, with the shard where a key alone would be ambiguous, and with the
    position in the shard where that is so within one."""
    has_shard = "shard" in given.column_names
    repeated = _repeated(table["key"])
    if not repeated:
        return ("shard", "key") if has_shard and _repeated(given["key"]) else ("key",)
    if not has_shard:
        raise LabelError(
            f"labels.uri {uri}: keys repeat across the shards of the embedding table, so a key alone is ambiguous",
            found=f"for example {', '.join(repeated[:EXAMPLES])}",
            wanted="a column `shard` in the label file (the shard's path relative to the source)",
        )
    twice = _repeated(_ids(table, ("shard", "key")))
    if not twice:
        return ("shard", "key")
    if "index" in given.column_names and "index" in table.column_names:
        return ("shard", "key", "index")
    shown = ", ".join(text.replace("\0", " of shard ", 1) for text in _keys_first(twice[:EXAMPLES]))
    raise LabelError(
        f"labels.uri {uri}: keys repeat within one shard, so a label cannot say which row it means",
        found=f"for example {shown}",
        wanted="a column `index` in the label file (the position in the shard)",
        way_out="add it, label these rows in the shard itself (labels.uri: null), or make the keys unique",
    )


def _keys_first(ids: Sequence[str]) -> list[str]:
    return ["\0".join(reversed(text.split("\0", 1))) for text in ids]


def _ids(table: pa.Table, columns: tuple[str, ...]) -> pa.ChunkedArray:
    """What a label is joined on: texts with a NUL between (no object name holds one)."""
    if columns == ("key",):
        return table["key"]
    return pc.binary_join_element_wise(*(table[name].cast(pa.string()) for name in columns), "\0")


def _repeated(texts: pa.ChunkedArray) -> list[str]:
    counts = pc.value_counts(texts)
    return sorted(counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist())


def _one_per_id(given: pa.Table, uri: str) -> pa.Table:
    """One row per id: repetitions that agree are one, two different labels (or other values) for an id are refused."""
    values = [name for name in given.column_names if name == "label" or name.startswith(_VALUE)]
    wanted: list[Any] = [(name, "first") for name in values] + [(name, "count_distinct") for name in values]
    grouped = given.group_by("id", use_threads=False).aggregate(wanted)
    for name in values:
        conflicting = grouped.filter(pc.greater(grouped[f"{name}_count_distinct"], 1))["id"].to_pylist()
        if conflicting:
            raise _conflict(given, name, sorted(conflicting), uri)
    return pa.table({"id": grouped["id"], **{name: grouped[f"{name}_first"] for name in values}})


def _with_several_labels(given: pa.Table) -> pa.Array:
    """Ids that different lines give different labels."""
    grouped = given.group_by("id", use_threads=False).aggregate([("label", "count_distinct")])
    return grouped["id"].filter(pc.greater(grouped["label_count_distinct"], 1)).combine_chunks()


def _shown(ids: pa.Array | pa.ChunkedArray) -> tuple[str, ...]:
    return tuple(text.replace("\0", "/") for text in sorted(ids.to_pylist()))


def _conflict(given: pa.Table, name: str, ids: list[str], uri: str) -> LabelError:
    shown = []
    for text in ids[:EXAMPLES]:
        found = given.filter(pc.equal(given["id"], text))[name].unique().to_pylist()
        shown.append(f"{text.replace(chr(0), '/')} ({', '.join(sorted(str(value) for value in found))})")
    return LabelError(
        f"labels.uri {uri}: {len(ids)} keys have more than one {name.removeprefix(_VALUE)}",
        found="; ".join(shown) + ("; ..." if len(ids) > EXAMPLES else ""),
        wanted=f"one {name.removeprefix(_VALUE)} per key",
        way_out="keep one line per key in the label file"
        + (", or set labels.conflicts to leave_out" if name == "label" else ""),
    )


def _nothing_labelled(table: pa.Table, config: LabelsConfig, unknown_keys: int) -> LabelError:
    origin = "the embedding table" if config.uri is None else f"labels.uri {config.uri}"
    keys = ", ".join(table["key"].slice(0, 3).to_pylist())
    return LabelError(
        f"{origin}: not one row has a label",
        found=f"{table.num_rows} rows (keys such as {keys or 'none'}), {unknown_keys} labels for other keys",
        way_out="check labels.uri, labels.key and labels.label, or source.label of the extract recipe",
    )
