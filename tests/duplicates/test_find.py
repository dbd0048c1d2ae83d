"""Groups of duplicates: the same bytes, near by cosine, never along a chain; whole and in cells."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from engine.duplicates import (
    DUPLICATES_SCHEMA,
    THRESHOLD,
    find,
    find_duplicates,
    require_duplicates_uri,
    write_duplicates,
)
from engine.errors import AlreadyExists, RecipeError, StorageError
from engine.storage import StorageConfig, open_store
from engine.tables import Table, open_table
from jobs.cli import duplicates
from tests.embedding_tables import claim_embeddings, write_part, write_table

WIDTH = 48


def sha256s(*names: str) -> list[bytes]:
    """Digests of bytes that are the same where the names are."""
    return [hashlib.sha256(name.encode()).digest() for name in names]


def one_part(folder: Path, rows_ND: NDArray[Any], **columns: Any) -> Table:
    store = open_store(str(folder))
    claim_embeddings(store, rows_ND.shape[1], 1024)
    write_part(store, "a.tar", 0, True, 0, rows_ND.astype(np.float32), **columns)
    return open_table(store)


def at_degrees(*angles: float) -> NDArray[np.float64]:
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1) * [[3.0]] * len(angles)


def said(rows: Any) -> list[tuple[Any, ...]]:
    return [(row["group"], row["kind"], row["index"]) for row in rows.to_pylist()]


def test_same_bytes_and_near_rows_stand_in_the_group_of_the_image_with_the_most_pixels(
    tmp_path: Path,
) -> None:
    """Row 4 is the largest of three near ones and of the bytes of row 0; row 3 is of the bytes of 1; 5 is alone."""
    rows_ND = at_degrees(0, 6, 90, 6, 0, 180, 93)
    table = one_part(
        tmp_path,
        rows_ND,
        sha256=sha256s("x", "y", "z", "y", "x", "v", "w"),
        image_width=np.array([8, 9, 5, 9, 10, 99, 7], np.int32),
        image_height=np.array([8, 9, 9, 9, 10, 99, 7], np.int32),
        label=["cat", "cat", None, "cat", "cat", "dog", "ant"],
    )
    found = find_duplicates(table, threshold=float(np.cos(np.deg2rad(7))))
    assert found.rows.schema == DUPLICATES_SCHEMA
    assert said(found.rows) == [
        (0, "representative", 4),
        (0, "exact", 0),
        (0, "near", 1),
        (0, "near", 3),
        (1, "representative", 6),  # 49 pixels, and row 2 has 45
        (1, "near", 2),
    ]
    cosines = [1, 1, np.cos(np.deg2rad(6)), np.cos(np.deg2rad(6)), 1, np.cos(np.deg2rad(3))]
    np.testing.assert_allclose(found.rows["cosine"].to_numpy(), cosines, atol=1e-6)
    assert (found.rows_read, found.images, found.groups) == (7, 5, 2)
    assert (found.exact, found.near, found.cells, found.recall) == (1, 3, 1, 1.0)
    assert found.rows["image_width"].to_pylist()[:2] == [10, 8]


def test_groups_whose_labels_differ_are_counted(tmp_path: Path) -> None:
    """A label that is lacking differs from none."""
    rows_ND = at_degrees(0, 0, 90, 90, 180, 180)
    table = one_part(tmp_path, rows_ND, label=["cat", "dog", "cat", None, "cat", "cat"])
    found = find_duplicates(table)
    assert (found.groups, found.label_conflicts) == (3, 1)


def test_groups_do_not_chain(tmp_path: Path) -> None:
    """Each row is near to the next; the ends are strangers, as no connected component would tell."""
    table = one_part(tmp_path, at_degrees(*range(0, 90, 5)))
    found = find_duplicates(table, threshold=float(np.cos(np.deg2rad(12))))
    members = found.rows["index"].to_pylist()
    groups = found.rows["group"].to_pylist()
    spans = [
        [5 * index for index, group in zip(members, groups, strict=True) if group == number]
        for number in range(found.groups)
    ]
    assert sorted(map(sorted, spans)) == [
        [0, 5, 10],
        [15, 20, 25],
        [30, 35, 40],
        [45, 50, 55],
        [60, 65, 70],
        [75, 80, 85],
    ]


def test_at_one_only_the_same_bytes_are_duplicates(tmp_path: Path) -> None:
    table = one_part(tmp_path, np.ones((4, 1280)), sha256=sha256s("x", "y", "x", "z"))
    found = find_duplicates(table, threshold=1.0)
    assert said(found.rows) == [(0, "representative", 0), (0, "exact", 2)]


def test_a_table_without_duplicates_or_without_rows_has_no_groups(tmp_path: Path) -> None:
    found = find_duplicates(one_part(tmp_path / "distinct", at_degrees(0, 90, 180)))
    assert (found.rows.num_rows, found.groups, found.images, found.label_conflicts) == (0, 0, 3, 0)
    empty = open_store(str(tmp_path / "empty"))
    claim_embeddings(empty, 2, 1024)
    found = find_duplicates(open_table(empty))
    assert (found.rows.num_rows, found.rows_read, found.images) == (0, 0, 0)
    assert found.rows.schema == DUPLICATES_SCHEMA


def planted_table(folder: Path, originals: int, copies: int) -> Table:
    """Rows around 40 directions, and noisy copies of the first of them with a cosine of 0.97 or more, in two shards.

    Lengths are anything. The copy of row n is row `originals` + n of all.
    """
    random = np.random.default_rng(11)
    centres = random.normal(size=(40, WIDTH))
    rows_ND = centres[random.integers(40, size=originals)] + random.normal(size=(originals, WIDTH))
    lengths_N = np.linalg.norm(rows_ND[:copies], axis=1, keepdims=True)
    noise = random.normal(size=(copies, WIDTH))
    noise *= 0.2 * lengths_N / np.linalg.norm(noise, axis=1, keepdims=True)
    both = np.concatenate([rows_ND, rows_ND[:copies] + noise])
    both *= 10 ** random.uniform(-1, 1, size=(len(both), 1))
    half = len(both) // 2 + 5
    shards = {"a.tar": both[:half].astype(np.float32), "b.tar": both[half:].astype(np.float32)}
    return open_table(write_table(folder, shards, 61))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return planted_table(tmp_path_factory.mktemp("planted"), 1500, 300)


def groups_by_the_rule(table: Table, threshold: float) -> dict[tuple[str, int], tuple[str, int]]:
    """Of each row that is no representative the row that stands for it, one after another."""
    rows = table.read(["shard", "index", "embedding"])
    names = list(zip(rows["shard"].to_pylist(), rows["index"].to_pylist(), strict=True))
    units_ND = np.array(rows["embedding"].to_pylist(), np.float64)
    units_ND /= np.linalg.norm(units_ND, axis=1, keepdims=True)
    standing: list[int] = []
    found = {}
    for row, unit_D in enumerate(units_ND):
        cosines = units_ND[standing] @ unit_D
        if standing and cosines.max() > threshold:
            found[names[row]] = names[standing[int(cosines.argmax())]]
        else:
            standing.append(row)
    return found


def groups_in(rows: Any) -> dict[tuple[str, int], tuple[str, int]]:
    found, own = {}, ("", -1)
    for row in rows.to_pylist():
        name = (row["shard"], row["index"])
        if row["kind"] == "representative":
            own = name
        else:
            found[name] = own
    return found


@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_every_image_belongs_to_the_nearest_representative_before_it(
    planted: Table, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "BLOCK_ROWS", 100)
    found = find_duplicates(planted, threshold)
    wanted = groups_by_the_rule(planted, threshold)
    assert len(wanted) >= 295
    assert groups_in(found.rows) == wanted
    assert (found.cells, found.recall) == (1, 1.0)


def test_cells_find_nearly_all_and_say_what_share(planted: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "EXACT_ROWS", 1000)
    monkeypatch.setattr("engine.duplicates.cells.ROWS_PER_CELL", 100)
    monkeypatch.setattr(find, "SAMPLED_ROWS", 1800)  # every row, so that what it says is exact
    found = find_duplicates(planted, 0.95)
    assert found.cells == 18
    wanted, got = groups_by_the_rule(planted, 0.95), groups_in(found.rows)
    assert set(got) <= set(wanted)
    assert found.recall == len(got) / len(wanted) > 0.95
    again = find_duplicates(planted, 0.95)
    assert again.rows.equals(found.rows) and again.recall == found.recall


def test_cells_that_are_too_small_lose_duplicates_and_the_recall_says_so(
    planted: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(find, "EXACT_ROWS", 1000)
    monkeypatch.setattr("engine.duplicates.cells.ROWS_PER_CELL", 3)
    monkeypatch.setattr("engine.duplicates.cells.CELLS_OF_A_ROW", 1)
    monkeypatch.setattr(find, "SAMPLED_ROWS", 1800)
    found = find_duplicates(planted, 0.95)
    wanted, got = groups_by_the_rule(planted, 0.95), groups_in(found.rows)
    assert found.recall == len(got) / len(wanted) < 1.0


def test_the_groups_are_written_as_parquet_and_never_over_another_file(tmp_path: Path) -> None:
    found = find_duplicates(one_part(tmp_path / "table", at_degrees(0, 0, 90)))
    uri = str(tmp_path / "out" / "groups.parquet")
    require_duplicates_uri(uri, StorageConfig())
    write_duplicates(found, uri, StorageConfig())
    assert pq.read_table(uri).equals(found.rows)
    other = find_duplicates(one_part(tmp_path / "other", at_degrees(0, 90)))
    for refused in (
        lambda: require_duplicates_uri(uri, StorageConfig()),
        lambda: write_duplicates(other, uri, StorageConfig()),
    ):
        with pytest.raises(AlreadyExists, match="there is a file"):
            refused()
    with pytest.raises(RecipeError, match="unknown kind of file"):
        require_duplicates_uri(str(tmp_path / "groups.csv"), StorageConfig())


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, float("nan")])
def test_a_threshold_that_is_no_cosine_of_duplicates_is_refused(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(RecipeError, match="threshold"):
        find_duplicates(one_part(tmp_path, at_degrees(0, 90)), threshold)


def test_a_disk_without_room_is_refused_before_a_part_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = one_part(tmp_path / "table", at_degrees(0, 90))
    monkeypatch.setattr("engine.duplicates.unit_rows.NO_ROOM_LEFT", 1 << 60)  # more than any disk has
    reports: list[tuple[str, int, int]] = []
    with pytest.raises(StorageError, match="--scratch"):
        find_duplicates(table, scratch=tmp_path, report=lambda *told: reports.append(told))
    assert reports == []
    with pytest.raises(RecipeError, match="no such folder"):
        find_duplicates(table, scratch=tmp_path / "absent")


def test_the_command_has_the_default_of_the_function() -> None:
    assert inspect.signature(duplicates).parameters["threshold"].default == THRESHOLD


def test_nothing_is_left_in_the_scratch_folder(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    seen: list[list[Path]] = []
    table = one_part(tmp_path / "table", at_degrees(0, 0, 90))
    found = find_duplicates(table, scratch=scratch, report=lambda *told: seen.append(list(scratch.iterdir())))
    assert found.groups == 1
    assert seen == [[], []] and list(scratch.iterdir()) == []
