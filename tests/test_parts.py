"""Names of parts (a file format: golden values) and what a listing of them says is done."""

import random

import pytest

from engine.parts import (
    PartName,
    Progress,
    TableProgress,
    copy_path,
    parse_copy_path,
    parse_part_name,
    part_name,
    prediction_name,
    slug_of,
)

IDENTITY = "etag:0123:77"


@pytest.mark.parametrize(
    ("shard", "number", "last", "name"),
    [
        ("a/b__c.tar", 0, False, "a-b--c-tar.da32c9dd356c388b.43008f58.00000.parquet"),
        ("a__b/c.tar", 0, False, "a--b-c-tar.82c0caa4cb264f84.43008f58.00000.parquet"),
        ("_x.tar", 0, False, "x-tar.e24e2f1c430178fe.43008f58.00000.parquet"),
        ("_x.tar", 123456, True, "x-tar.e24e2f1c430178fe.43008f58.123456.last.parquet"),
    ],
)
def test_golden_names(shard: str, number: int, last: bool, name: str) -> None:
    assert str(part_name(shard, IDENTITY, number, last)) == name


def test_shards_whose_slugs_collide_have_different_names() -> None:
    paths = ["a/b.tar", "a-b.tar", "a_b.tar", "a.b.tar"]
    assert {slug_of(path) for path in paths} == {"a-b-tar"}
    assert len({str(part_name(path, IDENTITY, 0, True)) for path in paths}) == 4


@pytest.mark.parametrize(
    "path", ["_", ".hidden.tar", "...", "ünïcode/🖼.tar", "x" * 300, "a" + "-" * 90, "\udcff.tar"]
)
def test_slugs_are_short_plain_and_never_hidden(path: str) -> None:
    slug = slug_of(path)
    assert 1 <= len(slug) <= 80
    assert slug[0].isascii() and slug[0].isalnum()
    assert parse_part_name(str(part_name(path, IDENTITY, 3, True))) == part_name(path, IDENTITY, 3, True)


def test_prediction_names_carry_the_version_of_their_embedding_part() -> None:
    embedding = part_name("_x.tar", IDENTITY, 7, True)
    name = prediction_name(embedding, "mtime:1:2")
    assert str(name) == "x-tar.e24e2f1c430178fe.43008f58.c1f298b8.00007.last.parquet"
    assert parse_part_name(f"data/{name}") == name
    assert prediction_name(embedding, "mtime:2:2") != name


@pytest.mark.parametrize(
    "path",
    [
        "_table.json",
        "x-tar.e24e2f1c430178fe.43008f58.00000.parquet.tmp",
        "_x.e24e2f1c430178fe.43008f58.00000.parquet",
        "x.e24e2f1c430178fe.43008f58.0000.parquet",
        "x.E24E2F1C430178FE.43008f58.00000.parquet",
    ],
)
def test_other_files_are_no_parts(path: str) -> None:
    assert parse_part_name(path) is None


def test_a_shard_is_complete_when_parts_0_to_n_exist_and_n_is_last() -> None:
    assert not Progress().is_complete
    assert not Progress((0, 1)).is_complete
    assert Progress((0, 1), last=1).is_complete
    assert not Progress((0, 2), last=2).is_complete
    assert not Progress((1,), last=1).is_complete


def test_first_missing_part_is_the_first_gap() -> None:
    assert Progress().first_missing == 0
    assert Progress((0, 1, 2)).first_missing == 3
    assert Progress((0, 1, 3), last=3).first_missing == 2
    assert Progress((1,), last=1).first_missing == 0


def test_a_receipt_seen_twice_changes_nothing() -> None:
    once = Progress((0, 2), last=2).with_part(1, last=False)
    assert once == Progress((0, 1, 2), last=2)
    assert once.with_part(1, last=False) == once
    assert once.with_part(2, last=True) == once


def test_progress_is_the_same_for_every_order_of_the_listing() -> None:
    names: list[PartName] = []
    for shard in ("a.tar", "b.tar", "a-tar"):
        for identity in ("v1", "v2"):
            names += [part_name(shard, identity, number, number == 4) for number in (0, 1, 2, 4)]
    wanted = TableProgress(sorted(names, key=str))
    shuffled = list(names)
    random.Random(7).shuffle(shuffled)
    assert TableProgress(shuffled) == wanted
    huge = PartName("a-tar", "0" * 16, "1" * 8, 10**18 - 1, True)
    assert TableProgress([huge])["0" * 16] == {"1" * 8: Progress((10**18 - 1,), last=10**18 - 1)}
    assert TableProgress.of_paths([str(huge).replace(".99999", ".9999999")], "") == {}
    paths = [f"data/{name}" for name in shuffled] + [
        "data/_other",
        f"data/below/{names[0]}",
        f"data/{names[0]}.tmp",
    ]
    assert TableProgress.of_paths(paths, "data/") == wanted
    assert len(TableProgress.of_paths([], "data/")) == 0
    assert len(wanted) == 3
    assert all(
        done == Progress((0, 1, 2, 4), last=4) for versions in wanted.values() for done in versions.values()
    )


def test_a_copy_of_a_prediction_part_is_named_as_the_part() -> None:
    part = prediction_name(part_name("a/b.tar", "etag:1:2", 3, True), "etag:5:6")
    path = copy_path(part, "jsonl")
    assert path == f"also/{str(part).removesuffix('.parquet')}.jsonl"
    assert path.endswith(".00003.last.jsonl")
    assert parse_copy_path(path) == (part, "jsonl")
    of_shard = part_name("a/b.tar", "etag:1:2", 3, True)  # predictions that were made straight from it
    assert parse_copy_path(copy_path(of_shard, "csv")) == (of_shard, "csv")
    others = [path.replace(".jsonl", ".txt"), path.replace("also/", "also/x/"), f"data/{part}", "also/x.csv"]
    for other in others:
        assert parse_copy_path(other) is None
