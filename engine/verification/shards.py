"""Shards as the names of the parts made of them tell: whole, unfinished, in several versions."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.parts import PartName, hash8_of, path16_of
from engine.storage import ObjectInfo
from engine.tables import DATA_FOLDER
from engine.verification.findings import Damage, Finding, Leftover, Unfinished
from engine.verification.part import ListedPart


@dataclass(frozen=True)
class Version:
    """The parts of one version of one shard, by number; a number may stand there twice."""

    parts: tuple[PartName, ...]

    @property
    def object(self) -> str:
        first = self.parts[0]
        return f"{DATA_FOLDER}{first.slug}.{first.path16}.{first.source8}.*"

    @property
    def numbers(self) -> list[int]:
        return sorted({name.number for name in self.parts})

    @property
    def ends(self) -> list[int]:
        return sorted({name.number for name in self.parts if name.last})

    @property
    def missing(self) -> list[tuple[int, int]]:
        """First and last number of each gap below the highest."""
        numbers = [-1, *self.numbers]
        return [(one + 1, other - 1) for one, other in itertools.pairwise(numbers) if other > one + 1]

    @property
    def is_complete(self) -> bool:
        return not self.missing and self.ends == self.numbers[-1:]

    def rank(self) -> tuple[bool, int, str]:
        """The highest of a shard's versions is the one that `engine.tables.open_table` reads."""
        return self.is_complete, len(self.numbers), self.parts[0].source8


def versions_of(listed: Iterable[ListedPart]) -> dict[str, dict[str, Version]]:
    """path16 -> source8 -> version."""
    parts: dict[str, dict[str, list[PartName]]] = {}
    for part in listed:
        parts.setdefault(part.name.path16, {}).setdefault(part.name.source8, []).append(part.name)
    return {
        path16: {source8: Version(tuple(names)) for source8, names in found.items()}
        for path16, found in parts.items()
    }


def version_findings(versions: Mapping[str, Mapping[str, Version]]) -> Iterator[Finding]:
    for found in versions.values():
        read = max(found.values(), key=Version.rank)
        for version in found.values():
            yield from _twice_findings(version)
            if version is read:
                yield from _wholeness_findings(version)
                continue
            message = (
                f"{len(version.parts)} parts beside those of {read.object}, which is what readers of the table "
                "get; the next extract removes the version that the source no longer has"
            )
            yield Finding(Leftover.STALE_VERSION, version.object, message)


def _twice_findings(version: Version) -> Iterator[Finding]:
    for number, count in Counter(name.number for name in version.parts).items():
        if count > 1:
            yield Finding(Damage.REPEATED_PART, version.object, f"part {number} is there {count} times")
    ends = version.ends
    if len(ends) > 1:
        yield Finding(Damage.TWO_LAST_PARTS, version.object, f"parts {_shown(ends)} are marked as the last")
    elif ends:
        behind = [number for number in version.numbers if number > ends[0]]
        if behind:
            message = f"part {ends[0]} is the last, but there are parts {_shown(behind)}"
            yield Finding(Damage.PART_BEHIND_LAST, version.object, message)


def _wholeness_findings(version: Version) -> Iterator[Finding]:
    gaps = [f"{first}" if first == last else f"{first} to {last}" for first, last in version.missing]
    without = f"part {_shown(gaps)} missing" if gaps else ""
    if not version.ends:
        message = "; ".join(filter(None, (f"no last part among {len(version.numbers)}", without)))
        yield Finding(Unfinished.INCOMPLETE_SHARD, version.object, message)
    elif gaps:
        yield Finding(Damage.MISSING_PARTS, version.object, without)


def source_findings(
    versions: Mapping[str, Mapping[str, Version]], source: Iterable[ObjectInfo]
) -> Iterator[Finding]:
    listed: set[str] = set()
    for shard in source:
        path16 = path16_of(shard.path)
        listed.add(path16)
        if path16 not in versions:
            yield Finding(Unfinished.NEW_SHARD, shard.path, "the table has no part of it")
        elif hash8_of(shard.identity) not in versions[path16]:
            message = f"the source has {shard.identity} now; the table's parts are of another version"
            yield Finding(Unfinished.REPLACED_SHARD, shard.path, message)
    for path16, found in versions.items():
        if path16 not in listed:
            first = next(iter(found.values())).parts[0]
            path = f"{DATA_FOLDER}{first.slug}.{path16}.*"
            yield Finding(Leftover.REMOVED_SHARD, path, "the source does not list its shard")


def _shown(values: Sequence[object]) -> str:
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(str(value) for value in values[:5]) + more
