"""A list of files: which files are samples with which labels, what is refused, and what a change of it does again."""

from __future__ import annotations

import gzip
import io
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from engine.config import check_recipe
from engine.errors import ObjectChanged, ObjectNotFound, RecipeError
from engine.schema import RejectReason
from engine.shards import file_list
from engine.shards.base import Resume, Sample, ShardReader
from engine.shards.files import is_border
from engine.shards.kinds import FilesSource, open_reader
from engine.storage import StorageConfig, Store, open_store

ROWS = (
    "uri,species,camera\ncats/a.jpg,cat,Leica\ntop.png,01,\ncats/kit/b.tif, lynx ,Canon\ncats/c.jpg,,Nikon\n"
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Some files; others that no list names lie between them."""
    store = open_store(str(tmp_path / "source"))
    for name in ["cats/a.jpg", "cats/aa.jpg", "cats/c.jpg", "cats/kit/b.tif", "dogs/d.jpg", "top.png"]:
        store.write(name, f"bytes of {name}".encode())
    return store


@pytest.fixture
def lists(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "lists"))


def listed_reader(store: Store, lists: Store, name: str = "labels.csv", **fields: Any) -> ShardReader:
    fields = {"path": "uri", "label": "species", "metadata": ("camera",)} | fields
    return open_reader(FilesSource(uri=store.uri, list=f"{lists.uri}/{name}", **fields), 1000)


def samples_of(store: Store, reader: ShardReader) -> dict[str, Sample]:
    """By key; every group is read by a reader that knows nothing yet, as on a worker."""
    found: dict[str, Sample] = {}
    for shard in reader.list_shards(store):
        for sample in pickle.loads(pickle.dumps(reader)).read(store, shard, Resume()):
            assert found.setdefault(sample.key, sample) is sample
    return found


def texts_of(store: Store, reader: ShardReader) -> dict[str, tuple[str | None, ...]]:
    return {key: (sample.label, *sample.metadata) for key, sample in samples_of(store, reader).items()}


def identities_of(store: Store, reader: ShardReader) -> dict[str, str]:
    return {shard.path: shard.identity for shard in reader.list_shards(store)}


def test_only_listed_files_are_samples_whatever_their_extension(store: Store, lists: Store) -> None:
    lists.write("labels.csv", ROWS.encode())
    reader = listed_reader(store, lists)
    assert texts_of(store, reader) == {
        "cats/a.jpg": ("cat", "Leica"),
        "cats/c.jpg": (None, "Nikon"),
        "cats/kit/b.tif": ("lynx", "Canon"),
        "top.png": ("01", ""),
    }
    assert sorted(identities_of(store, reader)) == ["cats/kit/~", "cats/~", "~"]
    for sample in samples_of(store, reader).values():
        assert (sample.image, sample.problem) == (f"bytes of {sample.key}".encode(), None)
        assert sample.size_bytes == len(f"bytes of {sample.key}")
    assert set(samples_of(store, listed_reader(store, lists, pattern="cats/a*"))) == {"cats/a.jpg"}
    unlabelled = listed_reader(store, lists, label=None, metadata=())
    assert set(texts_of(store, unlabelled).values()) == {(None,)}


@pytest.mark.parametrize("ending", [".csv", ".CSV.gz", ".tsv", ".tsv.gz", ".parquet"])
def test_every_format_of_a_list_says_the_same(store: Store, lists: Store, ending: str) -> None:
    table = pa.csv.read_csv(io.BytesIO(ROWS.encode()), convert_options=text_columns())
    if ending == ".parquet":
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=2)
        lists.write("labels.parquet", file.getvalue())
    else:
        text = (ROWS.replace(",", "\t") if "tsv" in ending else ROWS).encode()
        lists.write(f"labels{ending}", gzip.compress(text) if ending.endswith("gz") else text)
    assert texts_of(store, listed_reader(store, lists, f"labels{ending}")) == {
        "cats/a.jpg": ("cat", "Leica"),
        "cats/c.jpg": (None, "Nikon"),
        "cats/kit/b.tif": ("lynx", "Canon"),
        "top.png": ("01", ""),
    }


def text_columns() -> pa.csv.ConvertOptions:
    return pa.csv.ConvertOptions(column_types=dict.fromkeys(("uri", "species", "camera"), pa.string()))


def test_values_of_a_parquet_list_become_text_as_in_other_sources(store: Store, lists: Store) -> None:
    names = ["cats/a.jpg", "cats/c.jpg", "top.png"]
    table = pa.table(
        {
            "path": pa.array(names).dictionary_encode(),
            "folder": pa.array([7, None, -3], pa.int16()),
            "wild": pa.array([True, False, None]),
            "exif": pa.array([{"gain": 0.5, "lens": {"maker": "Zeiss"}}, None, {"gain": 2.0}]),
        }
    )
    with io.BytesIO() as file:
        pq.write_table(table, file)
        lists.write("labels.parquet", file.getvalue())
    reader = listed_reader(
        store,
        lists,
        "labels.parquet",
        path="path",
        label="folder",
        metadata=("wild", "exif.gain", "exif.lens.maker"),
    )
    assert texts_of(store, reader) == {
        "cats/a.jpg": ("7", "true", "0.5", "Zeiss"),
        "cats/c.jpg": (None, "false", None, None),
        "top.png": ("-3", None, "2.0", None),
    }


def test_full_uris_below_the_source_are_its_paths(tmp_path: Path, lists: Store) -> None:
    store = open_store(str(tmp_path / "a b" / "source"))
    for name in ["x.jpg", "sub/50% y.jpg", "sub/z.jpg"]:
        store.write(name, b"1")
    rows = [
        f"{store.uri}/x.jpg",
        f"file://{store.uri}/sub/50%25%20y.jpg".replace("a b", "a%20b"),
        "sub/z.jpg",
    ]
    lists.write("labels.csv", "\n".join(["path", *rows]).encode())
    reader = listed_reader(store, lists, path="path", label=None, metadata=())
    assert set(samples_of(store, reader)) == {"x.jpg", "sub/50% y.jpg", "sub/z.jpg"}


def test_a_source_and_its_list_on_s3(s3_uri: str, s3_config: StorageConfig) -> None:
    store = open_store(f"{s3_uri}/photos/", s3_config)
    for name in ["a//b.jpg", "a/é.jpg", "c.jpg"]:
        store.write(name, name.encode())
    listed = f"path,species\n{s3_uri}/photos/a//b.jpg,one\na/é.jpg,two\nc.jpg,three\n"
    open_store(s3_uri, s3_config).write("labels.csv", listed.encode())
    reader = open_reader(FilesSource(uri=store.uri, list=f"{s3_uri}/labels.csv", label="species"), 1000)
    assert texts_of(store, reader) == {"a//b.jpg": ("one",), "a/é.jpg": ("two",), "c.jpg": ("three",)}


def test_a_listed_file_that_is_not_there_is_a_reject_until_it_comes(store: Store, lists: Store) -> None:
    lists.write("labels.csv", b"uri,species\ncats/b.jpg,cat\nnew/x.jpg,cow\ncats/a.jpg,cat\nzzz.jpg,cow\n")
    reader = listed_reader(store, lists, metadata=())
    before = identities_of(store, reader)
    found = samples_of(store, reader)
    missing = (RejectReason.NO_IMAGE, "the list names it, but it is not there")
    assert {key: sample.problem for key, sample in found.items()} == {
        "cats/a.jpg": None,
        "cats/b.jpg": missing,
        "new/x.jpg": missing,
        "zzz.jpg": missing,
    }
    assert (found["cats/b.jpg"].index, found["cats/b.jpg"].image, found["cats/b.jpg"].size_bytes) == (
        1,
        None,
        0,
    )
    store.write("cats/b.jpg", b"here")
    after = identities_of(store, reader)
    assert [path for path in before if before[path] != after[path]] == ["cats/~"]
    assert samples_of(store, reader)["cats/b.jpg"].image == b"here"


def test_a_source_without_one_of_the_listed_files_is_refused(store: Store, lists: Store) -> None:
    lists.write("labels.csv", ROWS.encode())
    elsewhere = open_store(f"{store.uri}/unmounted")
    with pytest.raises(ObjectNotFound, match="not one of the 4 files") as raised:
        list(listed_reader(elsewhere, lists).list_shards(elsewhere))
    assert "unmounted" in str(raised.value) and "labels.csv" in str(raised.value)


def test_rows_that_agree_are_one_sample_and_others_are_a_bad_label(store: Store, lists: Store) -> None:
    rows = [
        "uri,species,camera",
        "cats/a.jpg,cat,Leica",
        "cats/c.jpg,dog,Canon",
        "cats/a.jpg, cat ,Leica",
        "top.png,cow,Canon",
        "cats/c.jpg,cat,Canon",
        "top.png,cow,Nikon",
        "dogs/d.jpg,,",
        "dogs/d.jpg,dog,",
    ]
    lists.write("labels.csv", "\n".join(rows).encode())
    reader = listed_reader(store, lists)
    problems = {key: sample.problem for key, sample in samples_of(store, reader).items()}
    twice = "the list names it more than once, with"
    assert problems == {
        "cats/a.jpg": None,
        "cats/c.jpg": (RejectReason.BAD_LABEL, f"{twice} species 'cat' and 'dog'"),
        "top.png": (RejectReason.BAD_LABEL, f"{twice} camera 'Canon' and 'Nikon'"),
        "dogs/d.jpg": (RejectReason.BAD_LABEL, f"{twice} species 'dog' and None"),
    }
    before = identities_of(store, reader)
    lists.write("labels.csv", "\n".join([rows[0], *reversed(rows[1:])]).encode())
    assert identities_of(store, reader) == before


def test_a_value_that_is_no_label_is_a_reject_and_its_file_is_named(store: Store, lists: Store) -> None:
    rows = [
        b"uri,species,camera",
        b"cats/a.jpg,\xff\xfe,A",
        b"cats/c.jpg," + b"x" * 4097 + b",B",
        b"top.png,cow,\xff",
    ]
    lists.write("labels.csv", b"\n".join(rows))
    found = samples_of(store, listed_reader(store, lists))
    reasons = {key: sample.problem and sample.problem[0] for key, sample in found.items()}
    assert reasons == {"cats/a.jpg": "bad_label", "cats/c.jpg": "bad_label", "top.png": None}
    assert "not UTF-8" in str(found["cats/a.jpg"].problem) and "4,097" in str(found["cats/c.jpg"].problem)
    assert found["top.png"].metadata == ("\\xff",)


def test_a_changed_row_changes_its_group_and_no_other(store: Store, lists: Store) -> None:
    lists.write("labels.csv", ROWS.encode())
    reader = listed_reader(store, lists)
    before = identities_of(store, reader)
    shuffled = "\n".join([ROWS.splitlines()[0], *reversed(ROWS.splitlines()[1:])])
    for text, changed in [
        (shuffled, []),
        (ROWS.replace("a.jpg,cat", "a.jpg,kitten"), ["cats/~"]),
        (ROWS.replace("Canon", "Kodak"), ["cats/kit/~"]),
        (ROWS.replace("top.png,01,", "top.png,1,"), ["~"]),
        (ROWS + "cats/aa.jpg,cat,\n", ["cats/~"]),
    ]:
        lists.write("labels.csv", text.encode())
        after = identities_of(store, reader)
        assert [path for path in before if before[path] != after[path]] == changed
        assert {path: reader.identity_now(store, path) for path in after} == after
    store.write("cats/aa.jpg", b"no list names this one")
    lists.write("labels.csv", ROWS.encode())
    assert identities_of(store, reader) == before


def test_the_identity_of_a_listed_group_is_what_it_always_was(store: Store, lists: Store) -> None:
    """Another value would do every table again that was made from a list."""
    files = [
        file_list.ListedFile("a.jpg", (file_list.Row("cat", None, ("é", None)),), None),
        file_list.ListedFile("b.jpg", (file_list.Row(None, "why", ()), file_list.Row("dog", None, ())), None),
    ]
    assert [file.identity for file in files] == [
        'missing [["cat", null, ["\\u00e9", null]]]',
        'missing [[null, "why", []], ["dog", null, []]]',
    ]


def test_a_list_that_changes_while_it_is_read_fails_its_changed_groups_only(
    store: Store, lists: Store
) -> None:
    lists.write("labels.csv", ROWS.encode())
    shards = {shard.path: shard for shard in listed_reader(store, lists).list_shards(store)}
    lists.write("labels.csv", ROWS.replace("a.jpg,cat", "a.jpg,kitten").replace("top.png,01,\n", "").encode())
    reader = listed_reader(store, lists)
    assert [s.label for s in reader.read(store, shards["cats/kit/~"], Resume())] == ["lynx"]
    with pytest.raises(ObjectChanged, match="or their list did"):
        list(reader.read(store, shards["cats/~"], Resume()))
    with pytest.raises(ObjectNotFound, match="~: the group of files is gone"):
        list(reader.read(store, shards["~"], Resume()))


def test_a_group_whose_rows_left_the_list_is_gone_and_a_border_that_left_has_an_heir(
    store: Store, lists: Store
) -> None:
    names = [f"many/{number:05d}.jpg" for number in range(3000)]
    border = next(name for name in names if is_border(name))
    place = names.index(border)
    chosen = names[place - 1 : place + 2]
    for name in [*chosen, "many/below/1.jpg"]:
        store.write(name, b"1")
    others = ["uri,species", "top.png,x", "cats/a.jpg,x", "many/below/1.jpg,x"]
    lists.write("labels.csv", "\n".join([*others, *(f"{name},y" for name in chosen)]).encode())
    reader = listed_reader(store, lists, metadata=())
    first, second = "many/~", f"many/~{border.removeprefix('many/')}"
    assert sorted(identities_of(store, reader)) == ["cats/~", "many/below/~", first, second, "~"]
    assert reader.successor(store, first) is None
    lists.write("labels.csv", "\n".join([*others, f"{chosen[0]},y", f"{chosen[2]},y"]).encode())
    assert reader.identity_now(store, second) is None
    assert reader.successor(store, second) == first
    lists.write("labels.csv", b"uri,species\ntop.png,x\n")
    assert reader.identity_now(store, first) is None
    assert reader.successor(store, second) is None


@pytest.mark.parametrize("most", [1, 1000])
def test_few_folders_are_asked_for_and_many_listed_at_once_with_the_same_groups(
    store: Store, lists: Store, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    names = [
        "a/1.jpg",
        "a/3.jpg",
        "a/b/2.jpg",
        "a/b/c/1.jpg",
        "a/d.jpg",
        "a-b/4.jpg",
        "a.jpg",
        "b/only/1.jpg",
    ]
    for name in names:
        store.write(name, b"1")
    absent = ["a/0.jpg", "a/e.jpg", "a/b/3.jpg", "a/b/a/1.jpg", "a0/1.jpg", "b/1.jpg"]
    lists.write("labels.csv", "\n".join(["uri", *reversed(names), *absent]).encode())
    monkeypatch.setattr(file_list, "MAX_FOLDERS_ASKED", most)
    reader = listed_reader(store, lists, label=None, metadata=())
    found = samples_of(store, reader)
    assert sorted(found) == sorted(names + absent)
    assert {key for key, sample in found.items() if sample.problem is None} == set(names)
    without_tops = [name for name in names if name.startswith("a/b")]
    lists.write("labels.csv", "\n".join(["uri", *without_tops]).encode())
    assert sorted(samples_of(store, reader)) == without_tops


def test_a_list_is_parsed_once_until_it_changes(store: Store, lists: Store) -> None:
    lists.write("labels.csv", ROWS.encode())
    config = FilesSource(uri=store.uri, list=f"{lists.uri}/labels.csv", path="uri", label="species")
    first = file_list.read_list(config, store)
    assert file_list.read_list(pickle.loads(pickle.dumps(config)), store) is first
    lists.write("labels.csv", f"{ROWS}dogs/d.jpg,dog,\n".encode())
    again = file_list.read_list(config, store)
    assert (first.num_rows, again.num_rows) == (4, 5)


@pytest.mark.parametrize(
    ("rows", "first", "count"),
    [
        (b"cats/a.jpg\n../secret.jpg\ncats/./a.jpg\n", "'../secret.jpg' in column 'uri' of row 2", "2 of 3"),
        (b"cats/a.jpg\n/etc/passwd\n", "'/etc/passwd' in column 'uri' of row 2", "1 of 2"),
        (b"s3://other/a.jpg\n", "'s3://other/a.jpg'", "1 of 1"),
        (b"file://elsewhere/a.jpg\n", "'file://elsewhere/a.jpg'", "1 of 1"),
        (b'cats/a.jpg\n""\n""\n', "'' in column 'uri' of row 2", "2 of 3"),
        (b"cats/\n", "'cats/'", "1 of 1"),
        (b"cats//a.jpg\n", "'cats//a.jpg'", "1 of 1"),
        (b"cats/a.jpg\ncats/\xff.jpg\n", r"b'cats/\xff.jpg' in column 'uri' of row 2", "1 of 2"),
        (b"cats/a\0.jpg\n", r"'cats/a\x00.jpg'", "1 of 1"),
    ],
)
def test_a_row_that_names_no_file_below_the_source_is_refused_before_anything_is_opened(
    store: Store, lists: Store, rows: bytes, first: str, count: str
) -> None:
    lists.write("labels.csv", b"uri\n" + rows)
    with pytest.raises(RecipeError) as raised:
        list(listed_reader(store, lists, label=None, metadata=()).list_shards(store))
    said = str(raised.value)
    assert f"labels.csv: {count} rows name no file below source.uri" in said
    assert first in said and store.uri in said
    assert raised.value.exit_code == 2


def test_a_list_that_cannot_be_used_is_a_recipe_error_that_names_it(store: Store, lists: Store) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"uri": ["a"], "species": pa.array([["x"]]), "camera": ["b"]}), file)
    cases: list[tuple[str, bytes | None, dict[str, Any], str]] = [
        ("absent.csv", None, {}, "absent.csv: not there"),
        ("empty.csv", b"", {}, "empty.csv: cannot be read"),
        ("no_rows.csv", b"uri,species,camera\n", {}, "no_rows.csv: it has no rows"),
        ("ragged.csv", b"uri,species,camera\na,b,c\na,b\n", {}, "ragged.csv: cannot be read"),
        ("cut.csv.gz", gzip.compress(ROWS.encode() * 99)[:150], {}, "cut.csv.gz: cannot be read"),
        ("text.parquet", ROWS.encode(), {}, "text.parquet: cannot be read"),
        ("ok.csv", ROWS.encode(), {"label": "specie"}, "no column 'specie'\n  found:   uri, species, camera"),
        ("ok.csv", ROWS.encode(), {"metadata": ("lens",)}, "no column 'lens'"),
        ("ok.csv", ROWS.encode(), {"path": "path"}, "no column 'path'"),
        ("twice.csv", b"uri,species,camera,uri\na,b,c,d\n", {}, "2 columns are called 'uri'"),
        ("lists.parquet", file.getvalue(), {}, "column 'species' cannot be used\n  found:   list<"),
    ]
    for name, data, fields, said in cases:
        if data is not None:
            lists.write(name, data)
        with pytest.raises(RecipeError) as raised:
            list(listed_reader(store, lists, name, **fields).list_shards(store))
        assert said in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"path": "uri"}, "path: found 'uri'; `path` names columns of a `list`, and there is none"),
        ({"metadata": ["camera"]}, "metadata: found"),
        ({"label": "species"}, "label: found 'species'; without a `list` the label is `folder` or null"),
        ({"list": "labels.xlsx"}, "list: found 'labels.xlsx'; a list is a file whose name ends in .csv"),
        ({"list": "l.csv", "metadata": ["exif.key"]}, "the table has a column 'key' of its own"),
        ({"list": "l.csv", "metadata": ["a.x", "b.X"]}, "the column 'x' is there twice"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_recipe(FilesSource, {"uri": "/x", **fields}, origin="recipe")
    assert said in str(raised.value)
    assert str(raised.value).count("\n") == 1


def test_the_contract_has_the_list_only_where_there_is_one() -> None:
    assert FilesSource(uri="/x", label="folder").contract() == {
        "uri": "/x",
        "kind": "files",
        "label": "folder",
    }
    listed = FilesSource(uri="/x", list="/l.csv", label="folder", metadata=("a.b",))
    assert listed.contract() == {
        "uri": "/x",
        "kind": "files",
        "list": "/l.csv",
        "path": "path",
        "label": "folder",
        "metadata": ["a.b"],
    }
    assert listed.metadata_columns() == ("b",)
    assert FilesSource.model_validate(listed.contract()) == listed


def test_a_parquet_list_runs_no_code_of_extension_types(tmp_path: Path) -> None:
    ran: list[bytes] = []

    class Hostile(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.string(), "engine.test.hostile")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"code"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Hostile:
            ran.append(serialized)
            return cls()

    pa.register_extension_type(Hostile())
    try:
        paths = pa.ExtensionArray.from_storage(Hostile(), pa.array(["a.jpg"]))
        pq.write_table(pa.table({"path": paths}), tmp_path / "list.parquet")
        ran.clear()
        config = FilesSource(uri=str(tmp_path), list=str(tmp_path / "list.parquet"))
        assert file_list.read_list(config, open_store(str(tmp_path))).num_rows == 1
        assert ran == []
    finally:
        pa.unregister_extension_type("engine.test.hostile")
