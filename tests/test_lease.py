"""Leases between real processes that race, are killed, stopped, cut off, and whose clocks are wrong."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import engine.lease
from engine.errors import AlreadyExists, LeaseHeld, LeaseLost
from engine.lease import Lease, LeaseRecord, held_lease, this_run
from engine.storage import StorageConfig, Store, open_store
from tests.proxy import open_breaking_proxy
from tests.stores import S3TestStore

NAME = "_nightly"
LONG_S = 30.0  # a lifetime that no test outlives
PATIENCE_S = 20.0  # for another process, on a machine that is busy

# Not forked from this process, whose threads (of fsspec, Ray, TensorFlow) hold locks and memory that no copy can free.
processes: Any = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["engine.lease", "s3fs", "pytest"])


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Any) -> Store:
    if request.param == "disk":
        return open_store(str(tmp_path / "table"))
    config: StorageConfig = request.getfixturevalue("s3_config")
    opened = open_store(request.getfixturevalue("s3_uri"), config)
    assert soon(lambda: all(seconds_of_a_write(opened) < 0.5 for _ in range(3)))
    return opened


def seconds_of_a_write(store: Store) -> float:
    """SeaweedFS took up to 5 s for the first writes to a bucket: longer than the lifetimes here."""
    began = time.monotonic()
    store.write("first", b"1")
    return time.monotonic() - began


class Holder:
    """Another process that takes a lease, holds it until it is told to end, and says how that went."""

    def __init__(self, store: Store, lifetime_s: float, clock_ahead_s: float = 0.0) -> None:
        self._answers, self._end = processes.Queue(), processes.Event()
        told = (self._answers, self._end, dict(os.environ), store, lifetime_s, clock_ahead_s)
        self._process = processes.Process(target=hold, args=told)
        self._process.start()
        self.pid: int = self._process.pid
        assert self.answer() == "taken"

    def answer(self) -> str:
        return str(self._answers.get(timeout=PATIENCE_S))

    def end(self) -> str:
        """What `check` said at the end: "held", or why it is lost."""
        self._end.set()
        said = self.answer()
        self._process.join(PATIENCE_S)
        assert self._process.exitcode == 0
        return said

    def kill(self) -> None:
        self._process.kill()
        self._process.join(PATIENCE_S)


def hold(
    answers: Any, end: Any, environ: dict[str, str], store: Store, lifetime_s: float, clock_ahead_s: float
) -> None:
    os.environ.update(environ)  # the server that forks may be older than this test's S3 keys
    if clock_ahead_s:
        ahead = datetime.timedelta(seconds=clock_ahead_s)
        engine.lease._utc_now = lambda: datetime.datetime.now(datetime.UTC) + ahead
    with held_lease(store, NAME, this_run("first"), lifetime_s) as lease:
        answers.put("taken")
        end.wait(60)
        try:
            lease.check()
            answers.put("held")
        except LeaseLost as error:
            answers.put(str(error))


@contextmanager
def another(store: Store, lifetime_s: float, clock_ahead_s: float = 0.0) -> Iterator[Holder]:
    holder = Holder(store, lifetime_s, clock_ahead_s)
    try:
        yield holder
    finally:
        holder.kill()


def take(store: Store, lifetime_s: float = LONG_S, wait_s: float = 0.0) -> Any:
    return held_lease(store, NAME, this_run("second"), lifetime_s, wait_s)


def refused(store: Store, wait_s: float = 0.0) -> str:
    with pytest.raises(LeaseHeld) as caught, take(store, wait_s=wait_s):
        pass
    return str(caught.value)


def soon(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happened()


def lease_paths(store: Store) -> list[str]:
    return [info.path for info in store.list(NAME)]


def newest(store: Store) -> LeaseRecord:
    return LeaseRecord.model_validate_json(store.read(lease_paths(store)[-1]))


def says_expired(store: Store) -> bool:
    return newest(store).expires < datetime.datetime.now(datetime.UTC)


# -------------------------------------------------------------------------------------------- taking turns


def test_who_finds_it_held_is_told_by_whom_since_when_and_until_when(store: Store) -> None:
    began = datetime.datetime.now(datetime.UTC)
    with another(store, LONG_S) as holder:
        message = refused(store)
        record = LeaseRecord.model_validate_json(store.read("_nightly.0000000001.lease"))
    assert record.owner == this_run("first").model_copy(update={"pid": holder.pid})
    assert 0 <= (record.acquired - began).total_seconds() < PATIENCE_S
    assert (record.expires - record.acquired).total_seconds() == LONG_S
    assert f"another run holds the lease {store.uri}/_nightly" in message
    assert f"first (process {holder.pid} on {record.owner.host}), since {record.acquired:%Y-%m-%d}" in message
    assert f"until {record.expires:%Y-%m-%d %H:%M:%S} UTC" in message
    assert "within 33 s" in message


def test_release_frees_it_at_once_and_one_object_stays(store: Store) -> None:
    for number in (1, 2, 3):
        with take(store) as lease:
            lease.check()
            assert lease_paths(store) == [f"_nightly.{number:010}.lease"]
    assert lease_paths(store) == ["_nightly.0000000003.lease"]


def test_it_is_released_after_an_error_too(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), take(store):
        _ = 1 // 0
    with take(store):
        pass


def test_who_waits_has_it_as_soon_as_it_is_released(store: Store) -> None:
    waited_for = []
    with another(store, 5.0) as holder:

        def on_wait(record: LeaseRecord) -> None:
            waited_for.append(record.owner.run_id)
            assert holder.end() == "held"

        began = time.monotonic()
        with held_lease(store, NAME, this_run("second"), 5.0, wait_s=PATIENCE_S, on_wait=on_wait) as lease:
            assert time.monotonic() - began < 4  # a look every 0.25 s; its lifetime would take 5 s
            lease.check()
    assert waited_for == ["first"]


def test_who_has_waited_long_enough_leaves(store: Store) -> None:
    with another(store, LONG_S):
        began = time.monotonic()
        refused(store, wait_s=0.2)
        assert 0.2 <= time.monotonic() - began < PATIENCE_S


def test_leases_of_other_names_do_not_meet(store: Store) -> None:
    store.write("_nightly.json", b"{}")
    store.write("_nightly.1.lease", b"{}")
    with take(store), held_lease(store, "_night", this_run("third"), LONG_S):
        assert len(lease_paths(store)) == 3


def test_an_object_that_is_no_lease_is_named(store: Store) -> None:
    store.write("_nightly.0000000007.lease", b"hello")
    with (
        pytest.raises(AlreadyExists, match=r"_nightly.0000000007.lease is no lease(?s:.*)b'hello'"),
        take(store),
    ):
        pass


# ------------------------------------------------------------------------------------------------- at once


@pytest.mark.parametrize("before", ["nothing", "released", "abandoned"])
def test_of_sixteen_processes_that_take_it_at_once_one_has_it(store: Store, before: str) -> None:
    if before == "released":
        with take(store):
            pass
    if before == "abandoned":
        with another(store, 0.5) as holder:
            holder.kill()
        assert soon(lambda: says_expired(store))
    start, tried, answers = processes.Barrier(16), processes.Barrier(16), processes.Queue()
    told = (start, tried, answers, dict(os.environ), store)
    racers = [processes.Process(target=race, args=(i, *told)) for i in range(16)]
    for racer in racers:
        racer.start()
    said = [answers.get(timeout=3 * PATIENCE_S) for _ in racers]
    for racer in racers:
        racer.join(PATIENCE_S)
    assert [racer.exitcode for racer in racers] == [0] * 16
    (winner,) = (run for word, run in said if word == "won")
    assert Counter(said) == {("won", winner): 1, ("held", winner): 15}
    assert len(lease_paths(store)) == 1


def race(i: int, start: Any, tried: Any, answers: Any, environ: dict[str, str], store: Store) -> None:
    os.environ.update(environ)
    start.wait(PATIENCE_S)
    try:
        with held_lease(store, NAME, this_run(f"run-{i}"), LONG_S) as lease:
            tried.wait(2 * PATIENCE_S)  # held until all others have given up
            lease.check()
            answers.put(("won", f"run-{i}"))
    except LeaseHeld as error:
        answers.put(("held", str(error.found).split()[0]))
        tried.wait(2 * PATIENCE_S)


def test_a_number_that_was_taken_and_swept_meanwhile_is_not_taken_again(store: Store) -> None:
    """One that saw number 1 abandoned, and slept before it created number 2."""
    for _ in range(3):
        with take(store):
            pass
    with take(store) as lease:
        assert engine.lease._created(store, NAME, 2, this_run("late"), LONG_S) is None
        assert "second" in refused(store)
        lease.check()
    with take(store):
        assert lease_paths(store) == ["_nightly.0000000005.lease"]


# ---------------------------------------------------------------------------------------------- abandoned


def test_a_holder_outlives_its_lifetime_by_renewing(store: Store) -> None:
    with another(store, 2.0) as holder:
        refused(store, wait_s=2.4)  # it would be taken after 2.2
        assert holder.end() == "held"
    with take(store):
        pass


@pytest.mark.parametrize("wait_s", [0.0, PATIENCE_S])
def test_a_killed_holders_lease_is_taken_after_its_lifetime(store: Store, wait_s: float) -> None:
    with another(store, 0.6) as holder:
        holder.kill()
    killed = time.monotonic()
    if not wait_s:
        assert soon(lambda: says_expired(store))
    with take(store, wait_s=wait_s) as lease:
        assert 0.6 <= time.monotonic() - killed < PATIENCE_S
        lease.check()
        assert lease_paths(store) == ["_nightly.0000000002.lease"]


def test_a_killed_holders_lease_is_not_taken_before_it_expires(store: Store) -> None:
    with another(store, LONG_S) as holder:
        holder.kill()
    assert "first" in refused(store)


def test_a_living_holder_whose_clock_is_a_day_behind_keeps_it(store: Store) -> None:
    """Its lease says that it expired long ago: who comes watches it, sees a renewal, and leaves."""
    with another(store, 2.0, clock_ahead_s=-86_400) as holder:
        assert "first" in refused(store)
        assert holder.end() == "held"


def test_a_killed_holder_whose_clock_was_a_day_ahead_does_not_bar_those_who_wait(store: Store) -> None:
    with another(store, 0.6, clock_ahead_s=86_400) as holder:
        holder.kill()
    refused(store)
    with take(store, wait_s=PATIENCE_S) as lease:
        lease.check()


# --------------------------------------------------------------------------------------------------- lost


def test_a_stopped_holder_knows_that_it_has_lost_it_when_it_wakes(store: Store) -> None:
    with another(store, 0.6) as holder:
        os.kill(holder.pid, signal.SIGSTOP)
        with take(store, wait_s=PATIENCE_S) as lease:
            os.kill(holder.pid, signal.SIGCONT)
            said = holder.end()
            assert f"this run has lost the lease {store.uri}/_nightly" in said
            assert "no renewal for" in said or "taken by second" in said  # whichever thread woke first
            lease.check()
            assert "second" in refused(store)  # what the first did at its end has not freed it


def test_a_holder_whose_lease_was_taken_names_the_taker(store: Store) -> None:
    with held_lease(store, NAME, this_run("first"), 0.9) as lease:
        thief = engine.lease._created(store, NAME, 2, this_run("thief"), LONG_S)
        assert thief is not None
        assert soon(lambda: lease.lost)
        with pytest.raises(LeaseLost, match=r"taken by thief \(process"):
            lease.check()
    assert newest(store).released is False
    assert lease_paths(store) == ["_nightly.0000000002.lease"]


def test_a_holder_notices_that_its_lease_was_removed(store: Store) -> None:
    with held_lease(store, NAME, this_run("first"), 0.9) as lease:
        assert not lease.lost
        store.delete("_nightly.0000000001.lease")
        assert soon(lambda: lease.lost)
        with pytest.raises(LeaseLost, match="the object was removed"):
            lease.check()
    assert lease_paths(store) == []


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_holder_cut_off_from_the_store_has_lost_it_after_a_lifetime_and_for_good(
    s3_store: S3TestStore, s3_uri: str, is_asked: bool
) -> None:
    taking = 5  # requests: a listing, the three of a create, a listing
    with open_breaking_proxy(s3_store, after=taking, status=503, code="SlowDown") as proxy:
        store = open_store(s3_uri, StorageConfig(endpoint_url=proxy.endpoint_url, region=s3_store.region))
        began = time.monotonic()
        with held_lease(store, NAME, this_run("first"), 1.2) as lease:
            if is_asked:
                assert soon(lambda: lease.lost)
                assert time.monotonic() - began >= 1.2
            else:
                time.sleep(1.4)
            assert (proxy.requests - proxy.refused, proxy.refused > 0) == (taking, True)
            proxy.mend()
            assert soon(lambda: not renewing(lease))
            with pytest.raises(LeaseLost, match="no renewal for"):
                lease.check()
    with take(open_store(s3_uri, StorageConfig(endpoint_url=s3_store.endpoint_url))):
        pass


def renewing(lease: Lease) -> bool:
    return lease._thread.is_alive()
