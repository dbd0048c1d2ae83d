"""A lease in object storage: which run is at work here, so that two do not do the same night by mistake; not a lock.

It is a courtesy. Tables are right without it: their parts have names that follow from the input, are written whole,
and are the same whoever writes them. Two runs at once only do work twice.

A lease named `_nightly` is the object `_nightly.<number>.lease` with the highest number. Each is written by one run
only, the one that created it (create-if-absent): to take a lease that is free or was abandoned means to create the
next number, so of many that try at once one wins, and nobody ever overwrites or deletes what another has just taken.
The holder renews its object every third of the lifetime, marks it as released at the end, and removes lower
numbers. The highest stays for ever, a few hundred bytes, so that numbers never begin again.

No two clocks are compared to take a lease away. A holder gives its lease up as lost when its last renewal began more
than a lifetime ago, and it stays lost; another run takes it after it has seen the same content for WATCH_LIFETIMES.
Each counts that on its own clock, which goes on while a machine sleeps. So at most one run has a lease that is not
`lost`, given that clocks run equally fast within a tenth, that a listing shows all that was written before it (S3
does), and that the store keeps to If-None-Match. The times in an object are for people; they decide one thing only:
whether one who will not wait leaves at once, or watches whether a lease that says it has expired has a holder. A
wrong clock costs time, never a lease.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import final

from pydantic import AwareDatetime, ConfigDict, Field, ValidationError

from engine.config import Config, canonical_json
from engine.errors import AlreadyExists, LeaseHeld, LeaseLost, ObjectNotFound, StorageError
from engine.storage import Store

RENEWALS_PER_LIFETIME = 3
WATCH_LIFETIMES = 1.1  # without a renewal: then it is taken, and its holder has given it up a tenth before
LOOKS_PER_LIFETIME, LONGEST_PAUSE_S = 20, 5.0  # between two looks of one who waits


class LeaseOwner(Config):
    """Who holds a lease."""

    model_config = ConfigDict(extra="ignore")  # a later version may say more

    host: str
    """Name of the machine."""
    pid: int
    """Process on that machine."""
    run_id: str
    """As in the run's summary."""


class LeaseRecord(Config):
    """What a lease object holds, as JSON."""

    model_config = ConfigDict(extra="ignore")

    owner: LeaseOwner
    """Who created it, and renews it."""
    token: str
    """Random: no two runs write the same bytes."""
    acquired: AwareDatetime
    """When it was created, by the owner's clock."""
    expires: AwareDatetime
    """When it is abandoned unless it is renewed before, by the owner's clock."""
    lifetime_s: float = Field(gt=0)
    """Seconds without a renewal after which the owner has given it up."""
    released: bool = False
    """True: the owner is done, and the next number is free."""


def this_run(run_id: str) -> LeaseOwner:
    """This process as an owner."""
    return LeaseOwner(host=socket.gethostname(), pid=os.getpid(), run_id=run_id)


@contextmanager
def held_lease(
    store: Store,
    name: str,
    owner: LeaseOwner,
    lifetime_s: float,
    wait_s: float = 0.0,
    on_wait: Callable[[LeaseRecord], None] = lambda record: None,
) -> Iterator[Lease]:
    """Hold a lease for the length of a `with` block; renewed in the background, released at its end.

    Args:
        store: where the lease objects lie.
        name: of the lease, e.g. "_nightly".
        owner: who takes it; see `this_run`.
        lifetime_s: how long an outage or a sleep the lease outlives, and about how long it bars others when this
            process is killed. Longer than the store may need for a few requests.
        wait_s: how long to wait for another run to end. An abandoned lease is watched for WATCH_LIFETIMES before
            it is taken: where it says itself that it has expired that is done whatever wait_s is.
        on_wait: told whose lease is waited for or watched, once for each.

    Raises:
        LeaseHeld: another run has it, and still had it after wait_s.
        AlreadyExists: an object with the name of a lease is none.
        StorageError: the store cannot be asked.
    """
    lease = _taken(store, name, owner, lifetime_s, wait_s, on_wait)
    lease.start_renewing()
    try:
        yield lease
    finally:
        lease.release()


@final
class Lease:
    """A lease that this process holds, or has lost; see `held_lease`. May be asked by several threads."""

    def __init__(
        self, store: Store, name: str, number: int, record: LeaseRecord, renewed_at_s: float
    ) -> None:
        self._store, self._name, self._number, self._record = store, name, number, record
        self._renewed_at_s = renewed_at_s  # when the last renewal began
        self._why_lost: str | None = None
        self._trouble: str | None = None  # what the last renewal met, where it failed
        self._state, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_until_over, name=f"lease {name}", daemon=True)

    @property
    def lost(self) -> bool:
        """True as soon as another run may hold it, and from then on."""
        with self._state:
            return self._is_lost()

    @property
    def age(self) -> float:
        """Time since the last renewal began, by the lifetime: up to a third where all is well, lost from 1 on."""
        with self._state:
            return (_now_s() - self._renewed_at_s) / self._record.lifetime_s

    def check(self) -> None:
        """Raise LeaseLost if it is lost. Asks no store: cheap enough for each step of a run."""
        if not self.lost:
            return
        raise LeaseLost(
            f"this run has lost the lease {self._store.uri}/{self._name}",
            found=self._why_lost,
            wanted=f"a renewal every {self._record.lifetime_s / RENEWALS_PER_LIFETIME:.3g} s",
            way_out="run again: it goes on where this run stopped, or says who is at work now",
        )

    def start_renewing(self) -> None:
        """Renew it in a thread that does not keep the process alive."""
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and free it, if it is still this run's; a store that fails leaves it to expire."""
        self._over.set()
        self._thread.join()  # a renewal on its way must not land after the release
        with suppress(StorageError):
            if self._is_ours(_newest(self._store, self._name)):
                self._write(self._record.model_copy(update={"released": True}))

    def _renew_until_over(self) -> None:
        every_s = self._record.lifetime_s / RENEWALS_PER_LIFETIME
        tried_at_s = self._renewed_at_s  # before it was taken: that may have been slow
        while not self._over.wait(max(0.0, tried_at_s + every_s - _now_s())) and not self.lost:
            tried_at_s = _now_s()
            try:
                self._renew()
            except StorageError as error:  # after its retries; again until the lifetime is over
                self._trouble = str(error)

    def _renew(self) -> None:
        began_s = _now_s()
        newest = _newest(self._store, self._name)
        if not self._is_ours(newest):
            with self._state:
                self._why_lost = f"taken by {_words(newest.record)}" if newest else "the object was removed"
            return
        self._record = self._record.model_copy(
            update={"expires": _utc_now() + timedelta(seconds=self._record.lifetime_s)}
        )
        self._write(self._record)
        with self._state:
            if not self._is_lost():
                self._renewed_at_s, self._trouble = began_s, None

    def _is_ours(self, newest: _Seen | None) -> bool:
        return newest is not None and newest.record.token == self._record.token

    def _write(self, record: LeaseRecord) -> None:
        self._store.write(_path(self._name, self._number), _bytes(record))

    def _is_lost(self) -> bool:
        """With the lock held."""
        unrenewed_s = _now_s() - self._renewed_at_s
        if self._why_lost is None and unrenewed_s > self._record.lifetime_s:
            trouble = (
                self._trouble or "this machine slept or was stopped, or the store did not answer in time"
            )
            self._why_lost = f"no renewal for {unrenewed_s:.3g} s: {trouble}"
        return self._why_lost is not None


@dataclass(frozen=True)
class _Seen:
    """A lease object as it was at some moment."""

    number: int
    record: LeaseRecord


def _taken(
    store: Store,
    name: str,
    owner: LeaseOwner,
    lifetime_s: float,
    wait_s: float,
    on_wait: Callable[[LeaseRecord], None],
) -> Lease:
    give_up_at_s = _now_s() + wait_s
    watched: _Seen | None = None
    watched_since_s, was_renewed = 0.0, False
    while True:
        looked_at_s = _now_s()
        newest = _newest(store, name)
        watched_s = looked_at_s - watched_since_s if newest == watched else 0.0
        if newest is None or newest.record.released or watched_s > WATCH_LIFETIMES * newest.record.lifetime_s:
            number = newest.number + 1 if newest else 1
            lease = _created(store, name, number, owner, lifetime_s)
            if lease is not None:
                return lease
            continue  # another was quicker
        is_new = watched is None or newest.number != watched.number
        if newest != watched:
            was_renewed = watched is not None
            watched, watched_since_s = newest, _now_s()
        says_expired = newest.record.expires < _utc_now() and not was_renewed
        if looked_at_s >= give_up_at_s and not says_expired:
            raise _held(store, name, newest.record)
        if is_new:
            on_wait(newest.record)
        pause_s = min(newest.record.lifetime_s / LOOKS_PER_LIFETIME, LONGEST_PAUSE_S)
        waits_s = give_up_at_s - _now_s()
        time.sleep(min(pause_s, waits_s) if waits_s > 0 else pause_s)


def _created(store: Store, name: str, number: int, owner: LeaseOwner, lifetime_s: float) -> Lease | None:
    """The lease under this number, or None where another run has taken this number, or a higher one."""
    began_s, now = _now_s(), _utc_now()
    record = LeaseRecord(
        owner=owner,
        token=uuid.uuid4().hex,
        acquired=now,
        expires=now + timedelta(seconds=lifetime_s),
        lifetime_s=lifetime_s,
    )
    if not store.create(_path(name, number), _bytes(record)):
        return None
    numbers = _numbers(store, name)
    if max(numbers, default=number) > number:  # this number had been taken and swept since we looked
        return None
    for lower in numbers:
        if lower < number:
            store.delete(_path(name, lower))
    return Lease(store, name, number, record, began_s)


def _newest(store: Store, name: str) -> _Seen | None:
    """The lease object with the highest number, None where there was never one."""
    while numbers := _numbers(store, name):
        path = _path(name, max(numbers))
        with suppress(ObjectNotFound):  # a higher one was taken meanwhile, and this one swept
            return _Seen(max(numbers), _record(store, path))
    return None


def _numbers(store: Store, name: str) -> list[int]:
    pattern = re.compile(re.escape(name) + r"\.(\d{10})\.lease")
    return [int(found.group(1)) for path in store.names(f"{name}.") if (found := pattern.fullmatch(path))]


def _path(name: str, number: int) -> str:
    return f"{name}.{number:010}.lease"


def _record(store: Store, path: str) -> LeaseRecord:
    content = store.read(path)
    try:
        return LeaseRecord.model_validate_json(content)
    except ValidationError as error:
        raise AlreadyExists(
            f"{store.uri}/{path} is no lease of ours",
            found=f"{error.error_count()} wrong fields in {len(content)} bytes that begin with {content[:40]!r}",
            wanted="the JSON of a lease",
            way_out="see what put it there, and remove it",
        ) from None


def _bytes(record: LeaseRecord) -> bytes:
    return canonical_json(record).encode()


def _held(store: Store, name: str, record: LeaseRecord) -> LeaseHeld:
    return LeaseHeld(
        f"another run holds the lease {store.uri}/{name}",
        found=_words(record),
        wanted="no other run",
        way_out=(
            "let it end, or wait for it; if it is dead, run again after that time: its lease is then taken over "
            f"within {WATCH_LIFETIMES * record.lifetime_s:.3g} s"
        ),
    )


def _words(record: LeaseRecord) -> str:
    owner, acquired, expires = record.owner, _time(record.acquired), _time(record.expires)
    return f"{owner.run_id} (process {owner.pid} on {owner.host}), since {acquired}, until {expires} unless renewed"


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _now_s() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
