"""Labels join exactly, or are refused with the keys that are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from engine.errors import LabelError, ObjectNotFound
from engine.storage import StorageConfig
from engine.training.kinds import LabelsConfig
from engine.training.labels import LabelledRows, encode_classes, join_labels

STORAGE = StorageConfig()


def embedding_table(
    keys: list[str], shards: list[str] | None = None, **columns: list[str | None]
) -> pa.Table:
    return pa.table(
        {"key": keys, "shard": shards or ["a.tar"] * len(keys), "index": list(range(len(keys))), **columns}
    )


def join_csv(
    folder: Path, text: str | bytes, table: pa.Table, columns: Sequence[str] = (), **config: str
) -> LabelledRows:
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return join_labels(table, LabelsConfig(uri=str(path), **config), columns, STORAGE)


def test_labels_of_the_table_itself_leave_out_rows_without_one() -> None:
    table = embedding_table(["a", "b", "c", "d", "e"], label=["cat", None, "dog", "", "cat"])
    labelled = join_labels(table, LabelsConfig(), (), STORAGE)
    assert labelled.positions_N.tolist() == [0, 2, 4]
    assert (labelled.keys, labelled.labels) == (["a", "c", "e"], ["cat", "dog", "cat"])
    assert labelled.counts.as_dict() == {
        "rows_in_table": 5,
        "labelled": 3,
        "unlabelled": 2,
        "unknown_keys": 0,
        "conflicting_keys": 0,
        "unlabelled_examples": ("b", "d"),
        "unknown_examples": (),
        "conflicting_examples": (),
    }


def test_csv_labels_join_on_the_key_in_the_order_of_the_table(tmp_path: Path) -> None:
    text = "key,label\nc,3\nnowhere,9\na,1\nnowhere2,9\n"
    labelled = join_csv(tmp_path, text, embedding_table(["a", "b", "c", "d"]))
    assert labelled.positions_N.tolist() == [0, 2]
    assert labelled.labels == ["1", "3"]
    assert labelled.counts.as_dict() == {
        "rows_in_table": 4,
        "labelled": 2,
        "unlabelled": 2,
        "unknown_keys": 2,
        "conflicting_keys": 0,
        "unlabelled_examples": ("b", "d"),
        "unknown_examples": ("nowhere", "nowhere2"),
        "conflicting_examples": (),
    }


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    text = 'key,label\na,01\nb,NA\nc,null\nd,\ne,1e3\nf,true\ng,nan\nh,"x, ""y""\nz"\n'
    labelled = join_csv(tmp_path, text, embedding_table(list("abcdefgh")))
    assert labelled.labels == ["01", "NA", "null", "1e3", "true", "nan", 'x, "y"\nz']
    assert labelled.keys == list("abcefgh")


def test_a_quoted_line_break_may_stand_anywhere_in_a_large_csv(tmp_path: Path) -> None:
    keys = [f"img{number:05d}" for number in range(40_000)]
    text = "key,label,note\n" + "".join(f'{key},{key[-1]},"first line\nsecond, {key * 4}"\n' for key in keys)
    assert len(text) > 2 * 2**20, "it must be more than one block of the reader"
    labelled = join_csv(tmp_path, text, embedding_table(keys))
    assert labelled.labels == [key[-1] for key in keys]


def test_csv_with_other_column_names_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufefffile,kind,note\na,cat,1\nb,dog,2\n".encode()
    labelled = join_csv(tmp_path, text, embedding_table(["a", "b"]), key="file", label="kind")
    assert labelled.labels == ["cat", "dog"]


def test_numeric_keys_are_matched_as_they_are_written(tmp_path: Path) -> None:
    labelled = join_csv(tmp_path, "key,label\n007,x\n7,y\n", embedding_table(["7", "007"]))
    assert labelled.labels == ["y", "x"]


def test_parquet_labels_may_be_whole_numbers_or_dictionaries(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    labels = pa.table({"key": pa.array(["a", "b"]).dictionary_encode(), "label": [11, 2]})
    pyarrow.parquet.write_table(labels, path)
    labelled = join_labels(embedding_table(["b", "a"]), LabelsConfig(uri=f"file://{path}"), (), STORAGE)
    assert labelled.labels == ["2", "11"]


def test_fractions_as_labels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    pyarrow.parquet.write_table(pa.table({"key": ["a", "b"], "label": [1.0, 2.0]}), path)
    with pytest.raises(LabelError, match=r"(?s)column 'label' is not text.*double"):
        join_labels(embedding_table(["a", "b"]), LabelsConfig(uri=str(path)), (), STORAGE)


def test_repeated_agreeing_labels_are_one_and_count_once(tmp_path: Path) -> None:
    labelled = join_csv(tmp_path, "key,label\na,x\na,x\na,\nq,z\nq,z\nb,y\n", embedding_table(["a", "b"]))
    assert labelled.labels == ["x", "y"]
    assert labelled.counts.unknown_keys == 1


def test_two_labels_for_one_key_are_refused_and_at_most_five_keys_listed(tmp_path: Path) -> None:
    rows = "".join(f"k{number},x\nk{number},y\n" for number in range(7))
    with pytest.raises(LabelError) as error:
        join_csv(tmp_path, f"key,label\n{rows}ok,x\n", embedding_table(["k0", "ok"]))
    assert "7 keys have more than one label" in str(error.value)
    assert "k0 (x, y); k1 (x, y); k2 (x, y); k3 (x, y); k4 (x, y); ..." in str(error.value)
    assert "k5" not in str(error.value)


def test_keys_that_repeat_across_shards_need_a_shard_column(tmp_path: Path) -> None:
    table = embedding_table(["1", "1", "2"], ["a.tar", "b.tar", "b.tar"])
    with pytest.raises(
        LabelError, match=r"(?s)keys repeat across the shards.*for example 1\n.*column `shard`"
    ):
        join_csv(tmp_path, "key,label\n1,x\n2,y\n", table)
    labelled = join_csv(tmp_path, "shard,key,label\na.tar,1,x\nb.tar,1,y\nb.tar,2,z\nc.tar,1,q\n", table)
    assert labelled.labels == ["x", "y", "z"]
    assert labelled.counts.unknown_keys == 1


def test_label_keys_that_repeat_across_shards_of_which_the_table_has_one(tmp_path: Path) -> None:
    text = "shard,key,label\na.tar,1,x\nb.tar,1,y\n"
    labelled = join_csv(tmp_path, text, embedding_table(["1"], ["b.tar"]))
    assert labelled.labels == ["y"]


def test_keys_that_repeat_within_a_shard_are_refused(tmp_path: Path) -> None:
    table = embedding_table(["1", "1", "2"])
    with pytest.raises(LabelError, match=r"(?s)repeat within one shard.*1 of shard a.tar"):
        join_csv(tmp_path, "shard,key,label\na.tar,1,x\na.tar,2,y\n", table)


def test_keys_that_repeat_within_a_shard_are_told_apart_by_their_position(tmp_path: Path) -> None:
    table = embedding_table(["1", "1", "2", "1"], ["a.tar", "a.tar", "a.tar", "b.tar"])
    text = "shard,key,index,label\na.tar,1,1,x\na.tar,2,2,y\nb.tar,1,3,z\na.tar,2,0,moved\n"
    labelled = join_csv(tmp_path, text, table)
    assert (labelled.positions_N.tolist(), labelled.labels) == ([1, 2, 3], ["x", "y", "z"])
    assert labelled.counts.unknown_examples == ("a.tar/2/0",), "another key stands at that position"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_without_an_answer_are_no_labels(tmp_path: Path, kind: str) -> None:
    rows = pa.table(
        {
            "key": ["a", "b", "c"],
            "shard": ["a.tar"] * 3,
            "index": [0, 1, 2],
            "label": ["cat", "dog", None],
            "answer": pa.array(["dog", None, ""], pa.string()),
        }
    )
    path = tmp_path / f"queue.{kind}"
    write = pyarrow.csv.write_csv if kind == "csv" else pyarrow.parquet.write_table
    write(rows, path)
    config = LabelsConfig(uri=str(path), label="answer")
    labelled = join_labels(embedding_table(["a", "b", "c"]), config, (), STORAGE)
    assert (labelled.keys, labelled.labels, labelled.counts.unlabelled) == (["a"], ["dog"], 2)


def test_rows_that_the_file_says_nothing_of_have_the_label_of_the_table_where_that_is_wished(
    tmp_path: Path,
) -> None:
    table = embedding_table(list("abcde"), label=["cat", "cat", None, "dog", "dog"])
    text = "key,answer\na,dog\nb,\nc,eel\ne,cat\ne,eel\n"
    (tmp_path / "labels.csv").write_text(text)
    config = LabelsConfig(
        uri=str(tmp_path / "labels.csv"), label="answer", otherwise="label", conflicts="leave_out"
    )
    labelled = join_labels(table, config, (), STORAGE)
    assert (labelled.keys, labelled.labels) == (list("abcd"), ["dog", "cat", "eel", "dog"])
    assert (labelled.counts.unlabelled, labelled.counts.conflicting_keys) == (1, 1)
    with pytest.raises(LabelError, match=r"(?s)embedding table: no column 'kind'"):
        join_labels(table, config.model_copy(update={"otherwise": "kind"}), (), STORAGE)
    with pytest.raises(ValueError, match="there is no label file"):
        LabelsConfig(otherwise="label")


def test_a_file_in_which_nothing_was_answered_says_so(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="not one row has a label"):
        join_csv(tmp_path, "key,shard,answer\na,a.tar,\n", embedding_table(["a"]), label="answer")


def test_labels_for_none_of_the_rows_show_both_spellings_counts(tmp_path: Path) -> None:
    with pytest.raises(
        LabelError, match=r"(?s)not one row has a label.*2 rows \(keys such as a, b\), 2 labels"
    ):
        join_csv(tmp_path, "key,label\na.jpg,x\nb.jpg,y\n", embedding_table(["a", "b"]))


def test_further_columns_come_from_the_label_file_before_the_table(tmp_path: Path) -> None:
    table = embedding_table(["a", "b"], fold=["test", "test"], scene=["s", None])
    both = join_csv(tmp_path, "key,label,fold\na,x,train\nb,y,validation\n", table, ["fold", "scene"])
    assert both.values == {"fold": ["train", "validation"], "scene": ["s", None]}
    table_only = join_csv(tmp_path, "key,label\na,x\nb,y\n", table, ["fold"])
    assert table_only.values == {"fold": ["test", "test"]}
    odd_names = "key,label,id,value:label\na,x,1,2\nb,y,3,4\n"
    assert join_csv(tmp_path, odd_names, table, ["id", "value:label"]).values == {
        "id": ["1", "3"],
        "value:label": ["2", "4"],
    }


def test_two_splits_for_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"(?s)1 keys have more than one fold.*a \(test, train\)"):
        join_csv(
            tmp_path, "key,label,fold\na,x,train\na,x,test\nb,y,test\n", embedding_table(["a", "b"]), ["fold"]
        )


def test_missing_columns_are_named_with_the_ones_there(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"(?s)no column 'label'.*name, class"):
        join_csv(tmp_path, "name,class\na,x\n", embedding_table(["a"]), key="name")
    with pytest.raises(LabelError, match=r"(?s)no column 'fold'.*key, shard, index, label"):
        join_labels(embedding_table(["a"], label=["x"]), LabelsConfig(), ["fold"], STORAGE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"key,label\na,x,y\n", "Expected 2 columns, got 3"),
        ("key,label\na,éclair\n".encode("latin-1"), "(?i)utf-?8"),
    ],
)
def test_unreadable_csv_is_a_label_error(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        join_csv(tmp_path, content, embedding_table(["a"]))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.parquet").write_bytes(b"key,label\n")
    (tmp_path / "labels.txt").write_bytes(b"key,label\n")
    for name, message in (("labels.parquet", "cannot be read"), ("labels.txt", "ending in .csv or .parquet")):
        with pytest.raises(LabelError, match=message):
            join_labels(embedding_table(["a"]), LabelsConfig(uri=str(tmp_path / name)), (), STORAGE)
    with pytest.raises(ObjectNotFound):
        join_labels(embedding_table(["a"]), LabelsConfig(uri=str(tmp_path / "absent.csv")), (), STORAGE)


def test_classes_are_those_of_training_rows_sorted_by_code_point() -> None:
    labels = ["b", "a", "Z", "é", "10", "9", "b", "only in test"]
    is_train_N = np.array([True] * 6 + [False] * 2)
    classes = encode_classes(labels, is_train_N)
    assert classes.names == ("10", "9", "Z", "a", "b", "é")
    assert classes.numbers_N.tolist() == [4, 3, 2, 5, 0, 1, 4, -1]
    assert classes.unseen == {"only in test": 1}


def test_fewer_than_two_training_classes_are_refused() -> None:
    with pytest.raises(LabelError, match=r"(?s)2 training rows, classes: a\n.*at least 2 classes"):
        encode_classes(["a", "a", "b"], np.array([True, True, False]))


def test_keys_with_several_labels_are_left_out_and_listed_where_that_is_wished(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("key,label\na,1\nb,1\na,2\nc,3\nc,3\nnowhere,1\nnowhere,2\n")
    config = LabelsConfig(uri=str(tmp_path / "labels.csv"), conflicts="leave_out")
    found = join_labels(embedding_table(list("abcd")), config, (), STORAGE)
    assert (found.keys, found.labels) == (["b", "c"], ["1", "3"])
    counts = found.counts
    assert (counts.conflicting_keys, counts.conflicting_examples) == (2, ("a", "nowhere"))
    assert (counts.unlabelled, counts.unlabelled_examples, counts.unknown_keys) == (2, ("a", "d"), 0)
