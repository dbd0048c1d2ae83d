"""Which images a step takes: in each epoch every one once, whatever each worker has; all take as many steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from engine.finetuning.order import NO_IMAGE, Batch, ImagesEverywhere, ImagesSplit


@dataclass
class Workers:
    """Of those that these orders ask of."""

    rank: int
    count: int
    devices: int


def split_orders(counts: list[int], batch_size: int, devices: int = 1, seed: int = 0) -> list[ImagesSplit]:
    """Of each worker; each has so many images, every other of which is left out of training (see `train`)."""
    holders_N = np.repeat(np.arange(len(counts)), [2 * count for count in counts])
    weights_N = 1 + np.arange(len(holders_N), dtype=np.float32) % 3
    orders = []
    for rank in range(len(counts)):
        workers = Workers(rank, len(counts), devices)
        order = ImagesSplit(workers, weights_N, batch_size, seed, holders_N)  # type: ignore[arg-type]
        order.make_room(train(counts))
        orders.append(order)
    return orders


def train(counts: list[int]) -> np.ndarray:
    return np.arange(0, 2 * sum(counts), 2)


def handed_in(batch: Batch) -> list[int]:
    rows: list[int] = batch.rows_RB[batch.rows_RB != NO_IMAGE].tolist()
    return rows


UNEVEN = [[40, 7, 1], [40, 8], [1, 1], [5, 0], [0, 0, 9], [29, 31, 30, 2], [13]]


@pytest.mark.parametrize("counts", UNEVEN)
@pytest.mark.parametrize("batch_size", [1, 7, 16, 500])
@pytest.mark.parametrize("devices", [1, 3])
def test_each_epoch_takes_every_image_once_in_steps_that_are_full(
    counts: list[int], batch_size: int, devices: int
) -> None:
    orders = split_orders(counts, batch_size, devices)
    for epoch in (1, 2):
        common = orders[0].order(train(counts), epoch)
        taken = []
        of_workers = []
        for order in orders:
            np.testing.assert_array_equal(order.order(train(counts), epoch), common)
            batches = order.batches(common)
            assert len({batch.rows_RB.shape for batch in batches}) == 1
            assert batches[0].rows_RB.shape[0] == devices
            of_workers.append(batches)
        for step, together in enumerate(zip(*of_workers, strict=True)):
            rows = [row for batch in together for row in handed_in(batch)]
            whole = common[step * batch_size : (step + 1) * batch_size]
            assert sorted(rows) == sorted(whole.tolist())
            assert len({float(batch.weight) for batch in together}) == 1
            assert sum(batch.weights_RB.sum() for batch in together) == pytest.approx(together[0].weight)
            for batch in together:
                places = batch.places_RB[batch.rows_RB != NO_IMAGE]
                np.testing.assert_array_equal(whole[places], handed_in(batch))
                assert not batch.weights_RB[batch.rows_RB == NO_IMAGE].any()
                assert (
                    batch.weights_RB[batch.rows_RB != NO_IMAGE] == 1 + np.array(handed_in(batch)) % 3
                ).all()
            taken += rows
        assert sorted(taken) == train(counts).tolist()


def test_a_worker_hands_in_its_own_images_and_as_large_a_share_in_every_step() -> None:
    counts = [40, 8]
    orders = split_orders(counts, batch_size=12)
    common = orders[0].order(train(counts), 1)
    for order, own, others in ((orders[0], range(80), {10}), (orders[1], range(80, 96), {2})):
        batches = order.batches(common)
        assert {row in own for batch in batches for row in handed_in(batch)} == {True}
        assert {len(handed_in(batch)) for batch in batches} == others


def test_orders_differ_between_epochs_seeds_and_workers_and_repeat_for_equal_ones() -> None:
    counts = [30, 30]
    (first, _), (again, _), (other, _) = (split_orders(counts, 7, seed=seed) for seed in (3, 3, 4))
    rows = train(counts)
    one = first.order(rows, 1)
    np.testing.assert_array_equal(one, again.order(rows, 1))
    assert (one != first.order(rows, 2)).any()
    assert (one != other.order(rows, 1)).any()
    own = [one[one < 60] // 2, one[one >= 60] // 2 - 30]  # of each worker, counted from its first
    assert (own[0] != own[1]).any()


def test_a_step_has_one_shape_also_in_what_is_left_of_an_epoch() -> None:
    counts = [40, 8]
    first, second = split_orders(counts, batch_size=12)
    rest = train(counts)[36:]  # of the first worker 4, of the second 8
    second.make_room(rest)
    shapes = [
        {batch.rows_RB.shape for batch in second.batches(second.order(rows, 1))}
        for rows in (train(counts), rest)
    ]
    assert shapes == [{(1, 8)}, {(1, 8)}]
    taken = [handed_in(batch) for order in (first, second) for batch in order.batches(order.order(rest, 1))]
    assert sorted(row for rows in taken for row in rows) == rest.tolist()


def test_other_placements_have_other_names() -> None:
    names = {orders[0].name for orders in (split_orders([9, 3], 4), split_orders([8, 4], 4))}
    (alone,) = split_orders([12], 4)
    everywhere = ImagesEverywhere(Workers(0, 2, 1), np.ones(24, np.float32), 4, 0)  # type: ignore[arg-type]
    assert len({*names, alone.name, everywhere.name}) == 4


def test_everywhere_each_worker_is_handed_the_whole_batch() -> None:
    weights_N = np.ones(10, np.float32)
    order = ImagesEverywhere(Workers(1, 2, 2), weights_N, 5, 0)  # type: ignore[arg-type]
    batches = order.batches(order.order(np.arange(10), 1))
    assert [batch.rows_RB.shape for batch in batches] == [(4, 2)] * 2
    assert [float(batch.weight) for batch in batches] == [5.0, 5.0]
    np.testing.assert_array_equal(batches[0].places_RB, np.arange(8).reshape(4, 2))
    real = [
        row
        for batch in batches
        for row, weight in zip(batch.rows_RB.flat, batch.weights_RB.flat, strict=True)
        if weight
    ]
    assert sorted(real) == list(range(10))
