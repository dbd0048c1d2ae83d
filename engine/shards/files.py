"""Loose image files: the files of a folder, in sorted order, are cut into groups, and a group is a shard.

The rules:

- A group holds files of one folder. It ends after a file whose name hashes to 0 mod 512, or at 2,048 files: borders
  depend on the names beside them alone, so a file that comes or goes changes its own group, and at most the next.
- A group is called after the border before it: "cats/~" is the first of the folder, "cats/~0042.jpg" begins behind
  0042.jpg. So its path stays when files inside of it change; what changes is its identity, a hash over the names and
  identities of its files.
- One file is one sample; its key is its path below the source. Files are read a few at a time, each exactly in the
  version that was listed.
- With a list (see `file_list.py`) the samples are the files that it names, there or not. What it says of a file is part
  of the group's identity, so a changed label does its group again and no other.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

from engine.errors import ObjectChanged, ObjectNotFound, RecipeError
from engine.schema import RejectReason
from engine.shards.base import Resume, Sample, ShardReader, path_matches
from engine.shards.file_list import ListedFile, folder_of, read_list
from engine.shards.image_bytes import Problem, size_problem
from engine.shards.kinds import FilesSource
from engine.storage import ObjectInfo, Store

FILES_PER_BORDER = 512
MAX_FILES = 2048
READS_AHEAD = 16  # a small file costs a round trip: 16 at 20 ms are 800 files a second
MAX_BYTES_AHEAD = 64 * 2**20
_MARK = "~"

File = ObjectInfo | ListedFile


@final
@dataclass(frozen=True, slots=True)
class _Group:
    """The files of one shard, sorted by path."""

    path: str
    files: tuple[File, ...]

    def to_info(self) -> ObjectInfo:
        """The shard as the rest of the engine sees it."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.path}\n{file.identity}\n".encode("utf-8", "surrogateescape"))
        return ObjectInfo(
            self.path, sum(file.size for file in self.files), f"files:{digest.hexdigest()[:32]}"
        )


@final
class FilesReader(ShardReader):
    """Reads the loose files of one source.

    Args:
        config: of the source.
        max_sample_bytes: a larger file is not read.
    """

    regroups = True

    def __init__(self, config: FilesSource, max_sample_bytes: int) -> None:
        self._config, self._max_sample_bytes = config, max_sample_bytes
        self._endings = tuple(f".{extension}" for extension in config.image)
        self._last_folder: tuple[str, dict[str, _Group]] | None = (
            None  # a reader comes back for the next group
        )

    def list_shards(self, store: Store) -> Iterator[ObjectInfo]:
        return (group.to_info() for group in groups_of(self._files(store)))

    def identity_now(self, store: Store, path: str) -> str | None:
        group = self._groups_in(store, folder_of(path)).get(path)
        return group.to_info().identity if group is not None else None

    def successor(self, store: Store, path: str) -> str | None:
        before = [other for other in self._groups_in(store, folder_of(path)) if other < path]
        return max(before, default=None)

    def read(
        self, store: Store, shard: ObjectInfo, resume: Resume, on_bytes: Callable[[int], None] | None = None
    ) -> Iterator[Sample]:
        if resume.offset is not None:
            raise ValueError(
                f"{shard.path} is a group of files and cannot be entered at byte {resume.offset}"
            )
        files = self._members(store, shard).files[resume.index :]
        for index, (file, encoded) in enumerate(self._read_ahead(store, files), resume.index):
            if on_bytes:
                on_bytes(len(encoded))
            yield self._sample(index, file, encoded)

    def _read_ahead(self, store: Store, files: Sequence[File]) -> Iterator[tuple[File, bytes]]:
        """Each file with its bytes, in order; a few are on their way at a time."""
        waiting, reading = deque(files), deque[tuple[File, Future[bytes]]]()
        bytes_ahead = 0
        with ThreadPoolExecutor(READS_AHEAD, thread_name_prefix="files") as pool:
            try:
                while waiting or reading:
                    while waiting and (
                        not reading or (len(reading) < READS_AHEAD and bytes_ahead < MAX_BYTES_AHEAD)
                    ):
                        file = waiting.popleft()
                        reading.append((file, pool.submit(self._image, store, file)))
                        bytes_ahead += file.size
                    file, encoded = reading.popleft()
                    bytes_ahead -= file.size
                    yield file, encoded.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _members(self, store: Store, shard: ObjectInfo) -> _Group:
        """The files of the group, if it is still the one that was listed."""
        folder = folder_of(shard.path)
        if self._last_folder is None or self._last_folder[0] != folder:
            self._last_folder = (folder, self._groups_in(store, folder))
        group = self._last_folder[1].get(shard.path)
        if group is not None and group.to_info().identity == shard.identity:
            return group
        self._last_folder = (folder, self._groups_in(store, folder))
        group = self._last_folder[1].get(shard.path)
        if group is None:
            raise ObjectNotFound(f"{store.uri}/{shard.path}: the group of files is gone")
        if (found := group.to_info().identity) != shard.identity:
            raise ObjectChanged(
                f"{store.uri}/{shard.path}: files came, went or changed since the listing, or their list did",
                found=found,
                wanted=shard.identity,
                way_out="run the job again: it takes the group as it is then",
            )
        return group

    def _groups_in(self, store: Store, folder: str) -> dict[str, _Group]:
        """The groups of one folder as it is now, by path."""
        return {group.path: group for group in groups_of(self._files(store, folder))}

    def _files(self, store: Store, folder: str | None = None) -> Iterator[File]:
        """The files of the source, or those that lie directly in one folder."""
        if self._config.list is not None:
            yield from self._listed_files(store, folder)
            return
        for file in store.list() if folder is None else _directly_in(folder, store):
            if file.path.lower().endswith(self._endings) and self._is_chosen(file.path):
                yield file

    def _listed_files(self, store: Store, folder: str | None) -> Iterator[ListedFile]:
        listed = read_list(self._config, store)
        if folder is not None:
            if folder in listed:
                joined = listed.joined(_directly_in(folder, store), only=folder)
                yield from (file for file in joined if self._is_chosen(file.path))
            return
        count = count_there = 0
        for file in listed.joined(listed.listing(store)):
            if self._is_chosen(file.path):
                count, count_there = count + 1, count_there + (file.info is not None)
                yield file
        if not listed.num_rows:
            raise RecipeError(f"source.list {self._config.list}: it has no rows", way_out="check source.list")
        if count and not count_there:  # a disk that is not mounted would make rejects of the whole table
            raise ObjectNotFound(
                f"{store.uri}: not one of the {count:,} files that {self._config.list} names is there",
                way_out="check source.uri (a typo, a disk that is not mounted) and source.path",
            )

    def _is_chosen(self, path: str) -> bool:
        return self._config.pattern == "*" or path_matches(path, self._config.pattern)

    def _image(self, store: Store, file: File) -> bytes:
        info = file.info if isinstance(file, ListedFile) else file
        if info is None or info.size > self._max_sample_bytes:
            return b""
        return store.read(info.path, expected=info)

    def _sample(self, index: int, file: File, encoded: bytes) -> Sample:
        problem = self._image_problem(file)
        label, metadata, label_problem = self._texts(file)
        return Sample(
            key=file.path,
            index=index,
            image=encoded if problem is None else None,
            label=label if label_problem is None else None,
            metadata=metadata,
            begin_offset=None,
            end_offset=None,
            problem=problem or label_problem,
            size_bytes=file.size,
        )

    def _image_problem(self, file: File) -> Problem | None:
        if isinstance(file, ListedFile) and file.info is None:
            return RejectReason.NO_IMAGE, "the list names it, but it is not there"
        return size_problem("the file", file.size, self._max_sample_bytes)

    def _texts(self, file: File) -> tuple[str | None, tuple[str | None, ...], Problem | None]:
        """Its label, its metadata, and why the label cannot be used."""
        if isinstance(file, ListedFile):
            problem = file.label_problem(self._config.label, self._config.metadata_columns())
            return file.rows[0].label, file.rows[0].metadata, problem
        folder = folder_of(file.path).rstrip("/").rpartition("/")[2]
        return (folder or None) if self._config.label == "folder" else None, (), None


def _directly_in(folder: str, store: Store) -> Iterator[ObjectInfo]:
    return (file for file in store.list(folder) if "/" not in file.path[len(folder) :])


def groups_of(files: Iterable[File]) -> Iterator[_Group]:
    """Cut files, sorted by path, into groups; holds the open group of each folder that the listing is inside of."""
    open_groups: dict[str, tuple[str, list[File]]] = {}  # folder -> path of the group, its files so far
    last_folder: str | None = None
    for file in files:
        folder = folder_of(file.path)
        if folder != last_folder:
            for left in [other for other in open_groups if not folder.startswith(other)]:
                yield from _closed(open_groups.pop(left))
            open_groups.setdefault(folder, (f"{folder}{_MARK}", []))
            last_folder = folder
        path, members = open_groups[folder]
        members.append(file)
        if len(members) == MAX_FILES or is_border(file.path):
            yield _Group(path, tuple(members))
            open_groups[folder] = (f"{folder}{_MARK}{file.path[len(folder) :]}", [])
    for still_open in open_groups.values():
        yield from _closed(still_open)


def _closed(group: tuple[str, list[File]]) -> Iterator[_Group]:
    path, members = group
    if members:
        yield _Group(path, tuple(members))


def is_border(path: str) -> bool:
    """Whether a group ends after this file."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % FILES_PER_BORDER == 0
