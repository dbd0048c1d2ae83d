"""Where an interrupted training goes on: one object beside the bundle, replaced as epochs end. Not for: bundles.

    <bundle>/checkpoint.<training16>.npz

`<training16>` is a digest of what training hangs on (rows, labels, splits, heads, optimizers), so another fit to the
same place never takes it up. It goes when a bundle is published.
"""

from __future__ import annotations

import io
import json
import logging
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ObjectNotFound, StorageError
from engine.storage import Store

log = logging.getLogger(__name__)
LEAST_SHARE = 20  # a checkpoint may take one part in so many of the time
_FACTS, _PREFIX = "facts", "checkpoint."


@dataclass(frozen=True, slots=True)
class State:
    """What a training run has come to.

    Attributes:
        facts: what JSON can say.
        tensors: what it cannot, by name.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]]


class Checkpoints:
    """The checkpoint of one training.

    Args:
        store: the bundle's folder.
        training: what the training hangs on, as a hex digest.
        seconds: least time from one to the next; 0: one after each epoch.
        writes: whether this worker is the one that writes it.
    """

    def __init__(self, store: Store, training: str, seconds: float, writes: bool) -> None:
        self._store, self._path = store, f"{_PREFIX}{training[:16]}.npz"
        self._seconds, self._writes = seconds, writes
        self._due = time.monotonic() + seconds

    @property
    def is_due(self) -> bool:
        """Whether it is time for another one."""
        return self._writes and time.monotonic() >= self._due

    def read(self) -> State | None:
        """The last one, or None where there is none that can be read.

        Raises:
            StorageError: the store does not answer.
        """
        try:
            content = self._store.read(self._path)
        except ObjectNotFound:
            if other := next(iter(self._store.names(_PREFIX)), None):
                log.warning(
                    "%s in %s is of other rows or settings, or another version of the engine wrote it: training starts "
                    "anew",
                    other,
                    self._store.uri,
                )
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                tensors = {name: arrays[name] for name in arrays.files}
            return State(json.loads(str(tensors.pop(_FACTS))), tensors)
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            log.warning(
                "%s in %s cannot be read: training starts anew (%s)", self._path, self._store.uri, error
            )
            return None

    def write(self, state: State) -> None:
        """Replace it. A store that fails costs a warning, not the training."""
        started = time.monotonic()
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {_FACTS: np.array(json.dumps(state.facts)), **state.tensors}
        np.savez(buffer, **arrays)
        try:
            self._store.write(self._path, buffer.getvalue())
        except StorageError as error:
            log.warning("the checkpoint could not be written; training goes on without (%s)", error)
        now = time.monotonic()
        self._due = now + max(self._seconds, LEAST_SHARE * (now - started) if self._seconds else 0.0)

    def clear(self) -> None:
        """Remove it, and those of other trainings that were to end here and did not."""
        for path in list(self._store.names(_PREFIX)):
            self._store.delete(path)
