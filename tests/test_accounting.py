"""Totals, wholeness, the error budget and the bottleneck."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.accounting import FAILURES_KEPT, RunTotals, failed_shards_verdict, reject_verdict
from engine.errors import TableDamaged
from engine.extraction import PartHeader, Receipt
from engine.parts import Progress
from engine.recipes import Limits
from engine.storage import ObjectInfo, Store, open_store
from engine.worklist import ShardWork
from tests.test_tables import write

WORK = ShardWork(ObjectInfo("a.tar", 100, "v1"), Progress((0,)))


def receipt(number: int, last: bool, **stages: float) -> Receipt:
    return Receipt(PartHeader("a.tar", "v1", number, last, bytes_read=10, **stages), rows=3, rejects=1)  # type: ignore[arg-type]


def test_a_run_is_whole_when_receipts_and_existing_parts_complete_every_shard() -> None:
    totals = RunTotals()
    totals.start([WORK])
    totals.add(receipt(2, last=True))
    with pytest.raises(TableDamaged, match="a.tar"):
        totals.require_whole()
    totals.add(receipt(1, last=False))
    totals.require_whole()
    assert (totals.parts_written, totals.rows, totals.rejects, totals.bytes_read) == (2, 6, 2, 20)
    assert totals.shards_done == 1


def test_a_failed_shard_is_a_reason_and_not_a_loss() -> None:
    totals = RunTotals()
    totals.start([WORK])
    totals.add(Receipt(PartHeader("a.tar", "v1", 1, damage="cut off")))
    totals.require_whole()
    assert totals.shards_done == 0
    verdict = failed_shards_verdict(totals, Limits())
    assert verdict is not None and verdict.exit_code == 1 and "a.tar: cut off" in str(verdict)
    assert failed_shards_verdict(totals, Limits(max_failed_shards=1)) is None


def test_the_bottleneck_is_the_stage_whose_workers_were_busy_longest() -> None:
    totals = RunTotals()
    totals.start([WORK])
    totals.add(receipt(1, last=False, decode_s=8.0, embed_s=5.0, read_s=1.0))
    assert totals.bottleneck({"read": 1, "decode": 1, "embed": 1, "write": 1}) == "decode"
    assert totals.bottleneck({"read": 1, "decode": 4, "embed": 1, "write": 1}) == "embed"
    assert RunTotals().bottleneck({"read": 1, "decode": 1, "embed": 1, "write": 1}) is None


def test_a_receipt_for_another_shard_is_never_counted_as_one_of_ours() -> None:
    works = [ShardWork(ObjectInfo(f"{number}.tar", 1, "v1")) for number in range(20)]
    for number in range(100):
        totals = RunTotals()
        totals.start(works)
        with pytest.raises(TableDamaged, match="was not to do"):
            totals.add(Receipt(PartHeader(f"alien-{number}.tar", "v1", 0, last=True)))
        assert totals.shards_done == 0


def test_of_very_many_failed_shards_some_are_kept_with_their_reasons_and_all_are_counted() -> None:
    works = [ShardWork(ObjectInfo(f"{number:04d}.tar", 1, "v1")) for number in range(3 * FAILURES_KEPT)]
    totals = RunTotals()
    totals.start(works)
    for work in works:
        totals.add(Receipt(PartHeader(work.shard.path, "v1", 0, damage="cut off")))
    totals.require_whole()
    assert (totals.shards.failed, len(totals.damage)) == (3 * FAILURES_KEPT, FAILURES_KEPT)
    assert f"... and {3 * FAILURES_KEPT - 10} more" in str(failed_shards_verdict(totals, Limits()))


@pytest.fixture
def table(tmp_path: Path) -> Store:
    """8 samples: a full part of 4 (2 rejects), a last part of 1, and a whole shard of 3 in one part."""
    store = open_store(str(tmp_path))
    write(store, "a.tar", 0, last=False, rows=2, reasons=("no_image", "corrupt_image"))
    write(store, "a.tar", 1, last=True, rows=1)
    write(store, "b.tar", 0, last=True, rows=3)
    return store


@pytest.mark.parametrize(("limit", "over"), [(0.24, True), (0.25, False), (0.5, False), (0.0, True)])
def test_the_budget_is_judged_on_all_samples_of_the_table(table: Store, limit: float, over: bool) -> None:
    reasons, verdict = reject_verdict(table, Limits(max_reject_fraction=limit), rows_per_part=4)
    assert reasons == {"no_image": 1, "corrupt_image": 1}
    assert (verdict is not None) is over
    if verdict is not None:
        assert verdict.exit_code == 3 and "no_image 1" in str(verdict)


@pytest.mark.parametrize(("limit", "over"), [(1, True), (2, False)])
def test_the_budget_may_be_a_count(table: Store, limit: int, over: bool) -> None:
    limits = Limits(max_reject_fraction=1, max_rejects=limit)
    assert (reject_verdict(table, limits, rows_per_part=4)[1] is not None) is over


def test_a_table_without_rejects_is_judged_without_reading(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    name = write(store, "a.tar", 0, last=True)
    store.write(f"data/{name}", b"unreadable")
    assert reject_verdict(store, Limits(), 4) == ({}, None)
