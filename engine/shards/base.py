"""What every kind of shard reader promises; not for how any one format is read."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from engine.errors import ObjectNotFound

if TYPE_CHECKING:
    from engine.schema import RejectReason  # imports pyarrow, which a recipe check does not wait for
    from engine.storage import ObjectInfo, Store

# Columns of our own tables (engine/schema.py); a metadata column cannot have one of these names.
TABLE_COLUMNS = frozenset(
    {"key", "shard", "index", "embedding", "label", "labels", "image_width", "image_height", "sha256"}
)


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """One record of a shard.

    Its position depends on the bytes of the shard alone: a record that is a reject counts like any other.
    """

    key: str
    """The record's name in its shard; may repeat."""
    index: int
    """Position in the shard, from 0."""
    image: bytes | None
    """The encoded image; None where there is none, it is empty, or it is too large."""
    label: str | None
    """None: no label, or a bad one (see `problem`)."""
    metadata: tuple[str | None, ...]
    """One value for each of `metadata_columns`, in that order."""
    begin_offset: int | None
    """First byte of the record in its object; None where the object is compressed."""
    end_offset: int | None
    """Where the next record begins (behind the last one: where the records end); None likewise."""
    problem: tuple[RejectReason, str] | None
    """Why the record cannot be used, and a sentence about it; None if it can."""
    size_bytes: int
    """Encoded bytes of the image; 0 without one."""


@final
@dataclass(frozen=True, slots=True)
class Resume:
    """Where in a shard to start."""

    index: int = 0
    """First sample wanted."""
    offset: int | None = None
    """Its `begin_offset` (the `end_offset` of the sample before it); None: read from the start and skip."""


class ShardReader(ABC):
    """Reads one kind of source. Can be pickled; holds no connection."""

    @abstractmethod
    def list_shards(self, store: Store) -> Iterator[ObjectInfo]:
        """The shards that the recipe's pattern names, in the order of the listing."""

    regroups: ClassVar[bool] = False
    """Whether a shard is a group whose borders move when files come and go (see `successor`)."""

    def successor(self, store: Store, path: str) -> str | None:
        """The shard that now has the records of one that is no longer listed; None where it simply is gone."""
        return None

    def identity_now(self, store: Store, path: str) -> str | None:
        """The identity that a shard has at this moment; None where it is gone."""
        try:
            return store.info(path).identity
        except ObjectNotFound:
            return None

    @abstractmethod
    def read(
        self, store: Store, shard: ObjectInfo, resume: Resume, on_bytes: Callable[[int], None] | None = None
    ) -> Iterator[Sample]:
        """The samples from `resume.index` on, one in memory at a time; each is whole when it is yielded.

        Args:
            store: that the shard was listed from.
            shard: exactly this version is read.
            resume: where to start; the samples are those of a full read, with the same offsets.
            on_bytes: told now and then how many more bytes came from the store, and once more at the end.

        Raises:
            ShardDamaged: the shard breaks its format or ends early; the samples before that are good.
            ObjectChanged, ObjectNotFound: it was replaced or removed while it was read.
        """


def objects_matching(store: Store, pattern: str) -> Iterator[ObjectInfo]:
    """The objects of a store whose path matches a pattern, in the order of the listing."""
    return (found for found in store.list() if path_matches(found.path, pattern))


def path_matches(path: str, pattern: str) -> bool:
    """Whether a pattern names a path.

    Without a slash the pattern is for the file name alone, at any depth: "*.tar". With one it is for the whole path:
    "2026/*.tar"; `*`, `?` and `[...]` then stay inside one folder, and `**` stands for any number of folders.
    """
    if "/" not in pattern:
        return fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)
    return _steps_match(path.split("/"), pattern.split("/"))


def _steps_match(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_steps_match(path[start:], pattern[1:]) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _steps_match(path[1:], pattern[1:])
