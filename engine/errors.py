"""Every error the engine raises on purpose, on one screen.

An error names the thing, what was found, what was wanted and the way out, and survives pickling, so that
a worker's error reads the same on the driver. Each class carries the exit code of the job it ends.
Bad data in a shard is not an error: it becomes a reject (`engine.schema.RejectReason`).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_RECIPE = 2
EXIT_JUDGED = 3  # finished, but over the error budget or a gate said no: a retry does not help
EXIT_INTERRUPTED = 130


class EngineError(Exception):
    """Base of all errors below; `str()` of it is the whole message for a person.

    Args:
        thing: what went wrong, naming the object (a path, a field, a layer).
        found: what was there, or None.
        wanted: what is allowed or was expected, or None.
        way_out: what the reader can do about it, or None.
    """

    exit_code = EXIT_FAILED

    def __init__(
        self, thing: str, *, found: str | None = None, wanted: str | None = None, way_out: str | None = None
    ) -> None:
        super().__init__(thing)
        self.thing, self.found, self.wanted, self.way_out = thing, found, wanted, way_out

    def __str__(self) -> str:
        lines = [self.thing]
        if self.found is not None:
            lines.append(f"  found:   {self.found}")
        if self.wanted is not None:
            lines.append(f"  wanted:  {self.wanted}")
        if self.way_out is not None:
            lines.append(f"  way out: {self.way_out}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.thing, self.found, self.wanted, self.way_out)


def _rebuild(
    kind: type[EngineError], thing: str, found: str | None, wanted: str | None, way_out: str | None
) -> EngineError:
    return kind(thing, found=found, wanted=wanted, way_out=way_out)


class RecipeError(EngineError):
    """A recipe or command-line argument that cannot be used; nothing was started."""

    exit_code = EXIT_BAD_RECIPE


class StorageError(EngineError):
    """An object store or disk did not do what was asked, after retries."""


class ObjectNotFound(StorageError):
    """No object (or no bucket, no folder) at that path."""


class AccessDenied(StorageError):
    """The store knows us and says no, or does not know our keys."""


class AlreadyExists(StorageError):
    """A create-if-absent found an object that is not ours."""


class ObjectChanged(StorageError):
    """An object no longer has the identity that the listing gave it."""


class LeaseHeld(EngineError):
    """Another run is at work on the same; this one has changed nothing."""


class LeaseLost(EngineError):
    """This run may no longer be the only one at work, so it stops; what it has written stays."""


class ShardDamaged(EngineError):
    """A shard that cannot be read to its end; its good parts stay and it is tried again next run."""


class WeightsError(EngineError):
    """Weights that are absent, not what their digest says, or do not fit the network."""


class BackboneError(EngineError):
    """A network that cannot be built or cut as the recipe asks."""


class CanaryMismatch(EngineError):
    """An actor computes other numbers than the table was made with."""


class ContractMismatch(EngineError):
    """A table, bundle or recipe that belongs to something else; mixing them is refused."""


class TableDamaged(EngineError):
    """A table that is not whole: a missing, unreadable or inconsistent part."""


class PruneRefused(EngineError):
    """More shards are gone from the source than may be pruned unasked."""


class ShardsFailed(EngineError):
    """More shards could not be read to their end than the recipe allows."""


class LabelError(EngineError):
    """Labels that cannot be joined to the embeddings without guessing."""


class BundleError(EngineError):
    """A bundle that is not whole, not ours, or does not fit the embeddings."""


class ClusterError(EngineError):
    """The Ray cluster cannot be reached, or cannot hold what the recipe asks for."""


class NotAllowed(ClusterError):
    """The Kubernetes API does not know who asks, or does not allow it."""


class OverBudget(EngineError):
    """The table is whole, but has more rejects than the recipe allows."""

    exit_code = EXIT_JUDGED


class NotBetter(EngineError):
    """What was made is no better than what there is, which stays."""

    exit_code = EXIT_JUDGED


class HeldBack(EngineError):
    """A night's predictions look wrong: they stay where people can look at them, and what was published stays."""

    exit_code = EXIT_JUDGED


class Interrupted(EngineError):
    """Ctrl-C or SIGTERM; running again goes on where this run stopped."""

    exit_code = EXIT_INTERRUPTED
