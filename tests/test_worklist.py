"""Works come out of the packing as they went in, and a slice of them travels small."""

import pickle

from engine.parts import Progress
from engine.storage import ObjectInfo
from engine.worklist import ShardWork, WorkList

WORKS = [
    ShardWork(ObjectInfo("a.tar", 0, "etag:x:0")),
    ShardWork(ObjectInfo("übung/\udcff.tar", 2**40, "mtime:1:2"), Progress((0, 2), last=3)),
    ShardWork(
        ObjectInfo("d.tar", 3, "v1"), Progress((1,), last=1), (Progress((0, 1), last=1), Progress((1,)))
    ),
    ShardWork(ObjectInfo("c", 7, ""), turn=(1, 3)),
]


def test_works_come_out_as_they_went_in() -> None:
    packed = WorkList(WORKS)
    assert list(packed) == WORKS and len(packed) == 4
    assert packed[-1] == WORKS[-1] and list(packed[1:]) == WORKS[1:]
    assert list(pickle.loads(pickle.dumps(packed[1:2]))) == WORKS[1:2]
    assert list(packed.sizes) == [0, 2**40, 3, 7]
    assert not WorkList()


def test_a_turn_is_every_nth_sample_and_all_turns_are_all() -> None:
    *_, third = WORKS
    assert [index for index in range(10) if third.has(index)] == [1, 4, 7]
    turns = [ShardWork(third.shard, turn=(turn, 3)) for turn in range(3)]
    assert [sum(work.has(index) for work in turns) for index in range(7)] == [1] * 7
    assert WORKS[0].has(0) and WORKS[0].has(1)


def test_a_piece_of_a_long_list_is_small_to_pickle() -> None:
    packed = WorkList(ShardWork(ObjectInfo(f"{number:09d}.tar", 1, "etag:1")) for number in range(10_000))
    assert len(pickle.dumps(packed[5:7])) < 1000
