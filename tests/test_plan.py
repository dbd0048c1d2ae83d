"""Pending = inputs - outputs, read tasks of equal size, and how much may be pruned."""

import pytest

from engine.errors import PruneRefused
from engine.parts import TableProgress, part_name, path16_of
from engine.plan import MAX_READ_TASKS, check_prune, pending_shards, read_tasks
from engine.storage import ObjectInfo
from engine.worklist import ShardWork, WorkList


def shard(path: str, size: int = 100, version: str = "v1") -> ObjectInfo:
    return ObjectInfo(path, size, version)


def test_pending_is_what_is_listed_minus_what_is_complete() -> None:
    done = [part_name("a.tar", "v1", 0, False), part_name("a.tar", "v1", 1, True)]
    half = [part_name("b.tar", "v1", 0, False)]
    gone = [part_name("z.tar", "v1", 0, True)]
    pending = pending_shards(
        [shard("a.tar"), shard("b.tar"), shard("c.tar", 7)], TableProgress(done + half + gone)
    )
    assert (pending.shards_total, pending.shards_done) == (3, 1)
    assert [(work.shard.path, work.existing.numbers) for work in pending.works] == [
        ("b.tar", (0,)),
        ("c.tar", ()),
    ]
    assert pending.removed == (path16_of("z.tar"),)
    assert pending.bytes_total == 107
    assert pending.replaced == ()


def test_a_replaced_shard_is_pending_again_and_said_to_be_replaced() -> None:
    progress = TableProgress([part_name("a.tar", "v1", 0, True)])
    pending = pending_shards([shard("a.tar", version="v2")], progress)
    assert [work.existing.numbers for work in pending.works] == [()]
    assert pending.replaced == ("a.tar",)


def test_shards_that_came_before_a_time_stay_pending_and_are_not_removed() -> None:
    """`--since`: complete ones count as done however old, and whose time is not known is done now."""
    listed = [
        ObjectInfo("a.tar", 100, "v1", modified=10.0),
        ObjectInfo("b.tar", 100, "v1", modified=19.9),
        ObjectInfo("d.tar", 7, "v1", modified=20.0),
        ObjectInfo("e.tar", 5, "v1"),
    ]
    pending = pending_shards(listed, TableProgress([part_name("a.tar", "v1", 0, True)]), since=20.0)
    assert [work.shard.path for work in pending.works] == ["d.tar", "e.tar"]
    assert (pending.shards_total, pending.shards_done, pending.shards_older) == (4, 1, 1)
    assert (pending.removed, pending.replaced, pending.bytes_total) == ((), (), 12)


def test_shards_that_a_table_has_something_of_are_never_too_old() -> None:
    """Half done by a night whose time was up, or replaced by an older file: a later `--since` would never come back."""
    listed = [ObjectInfo(f"{name}.tar", 100, "v2", modified=10.0) for name in ("half", "replaced", "new")]
    parts = [part_name("half.tar", "v2", 0, False), part_name("replaced.tar", "v1", 0, True)]
    pending = pending_shards(listed, TableProgress(parts), since=20.0)
    assert [work.shard.path for work in pending.works] == ["half.tar", "replaced.tar"]
    assert pending.shards_older == 1


def test_parts_with_rejects_that_are_done_again_leave_the_others_alone() -> None:
    parts = [part_name("a.tar", "v1", number, last=number == 2) for number in range(3)]
    parts.append(part_name("b.tar", "v1", 0, True))
    pending = pending_shards([shard("a.tar"), shard("b.tar")], TableProgress(parts).without([parts[1]]))
    assert [(work.shard.path, work.existing.numbers, work.existing.last) for work in pending.works] == [
        ("a.tar", (0, 2), 2)
    ]


def test_of_several_tables_a_shard_is_done_when_all_have_it_and_each_lacks_its_own_parts() -> None:
    parts = [part_name("a.tar", "v1", number, last=number == 3) for number in range(4)]
    other = [part_name("b.tar", "v1", 0, True), part_name("z.tar", "v1", 0, True)]
    first, second = TableProgress([*parts, *other]), TableProgress([parts[0], parts[2], other[0]])
    pending = pending_shards([shard("a.tar"), shard("b.tar"), shard("c.tar")], first, second)
    a, c = pending.works
    assert (a.existing.numbers, a.existing.last, c.existing.numbers) == ((0, 2), 3, ())
    assert [a.lacking(number) for number in range(4)] == [(), (1,), (), (1,)]
    assert c.lacking(0) == ()  # all of them do
    assert (pending.shards_done, pending.shards_in_table) == (1, 3)
    assert pending.removed == (path16_of("z.tar"),)
    third = TableProgress([parts[1]])
    (a,) = pending_shards([shard("a.tar")], first, second, third).works
    assert [a.lacking(number) for number in range(4)] == [(2,), (1,), (2,), (1, 2)]


@pytest.mark.parametrize(
    ("removed", "up_to", "refused"),
    [(1, None, False), (2, None, True), (2, 2, False), (3, 2, True), (0, 0, False), (1, 0, True)],
)
def test_a_tenth_of_the_table_may_be_pruned_or_the_number_given(
    removed: int, up_to: int | None, refused: bool
) -> None:
    parts = [part_name(f"{number}.tar", "v1", 0, True) for number in range(19)]
    listed = [shard(f"{number}.tar") for number in range(removed, 19)]
    pending = pending_shards(listed, TableProgress(parts))
    if not refused:
        check_prune(pending, up_to)
        return
    with pytest.raises(PruneRefused, match=f"{removed} of the table's 19 shards"):
        check_prune(pending, up_to)


def test_small_shards_share_read_tasks_and_large_ones_do_not() -> None:
    sizes = [1] * 4000 + [1 << 30] * 2
    works = WorkList(ShardWork(shard(f"{i:05d}.tar", size)) for i, size in enumerate(sizes))
    groups = read_tasks(works, min_tasks=2)
    assert [work for group in groups for work in group] == list(works)
    assert [len(group) for group in groups] == [1000, 1000, 1000, 1000, 1, 1]


def test_few_small_shards_still_keep_every_reader_busy() -> None:
    works = WorkList(ShardWork(shard(f"{i}.tar", 1000)) for i in range(8))
    assert [len(group) for group in read_tasks(works, min_tasks=2)] == [1] * 8
    assert read_tasks(WorkList(), min_tasks=2) == []


def test_very_many_large_shards_share_read_tasks_too() -> None:
    works = WorkList(ShardWork(shard(f"{i:06d}.tar", 1 << 30)) for i in range(3 * MAX_READ_TASKS))
    groups = read_tasks(works, min_tasks=2)
    assert {len(group) for group in groups} == {3}
    assert sum(len(group) for group in groups) == len(works)
