"""A folder on a disk as a store: atomic, durable writes, listings in the order of S3; not for Windows."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, final
from urllib.parse import unquote_to_bytes

from engine.errors import AccessDenied, ObjectChanged, ObjectNotFound, RecipeError, StorageError
from engine.storage.base import (
    BLOCK_BYTES,
    InputBlocks,
    InputStream,
    ObjectInfo,
    StorageConfig,
    Store,
    checked_path,
    checked_prefix,
    checked_target,
    is_unicode,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_TEMPORARY_NAME = re.compile(r"\.engine-[0-9a-f]{32}\.tmp")
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_FolderId = tuple[int, int]  # device and inode
_NO_FOLDER = (-1, -1)
_NO_LINKS = {  # what `link` says where bytes can be copied all the same
    errno.EMLINK,  # the file has as many names as the disk allows
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,  # a disk without links, or somebody else's file under fs.protected_hardlinks
    errno.EXDEV,  # a linked folder on another disk
}
_WAYS_OUT = {
    errno.ENOSPC: "the disk is full: make room on it, then run again; what was written before is whole and stays",
    errno.EDQUOT: "the quota is used up: make room or have it raised, then run again; what was written before stays",
    errno.EROFS: "mount the disk so that it can be written to, or choose another place",
}


@final
class LocalStore(Store):
    """Objects are the files below a folder, which need not exist before the first write.

    Links to files and to folders are followed, but not into a folder that the listing is already in. Dangling
    links, sockets, pipes and devices are no objects. A file system without hard links cannot `create`.
    """

    def __init__(self, uri: str, config: StorageConfig) -> None:
        super().__init__(_absolute_path(uri), config)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        paths = self._paths(self._folder_of(prefix), prefix, (), in_order=True)
        return (found for path in paths if (found := self._file_info(path)))

    def names(self, prefix: str = "") -> Iterator[str]:
        paths = self._paths(self._folder_of(prefix), prefix, (), in_order=False)
        return (path if path.isascii() else checked_path(path, self.uri) for path in paths)

    def info(self, path: str) -> ObjectInfo:
        file = self._file(path)
        with _own_words("find", file):
            return _described(path, os.stat(file))

    def read(
        self, path: str, offset: int = 0, length: int | None = None, expected: ObjectInfo | None = None
    ) -> bytes:
        file = self._file(path)
        with _own_words("read", file), open(file, "rb") as opened:
            _check_same(expected, _described(path, os.fstat(opened.fileno())), file)
            opened.seek(offset)
            data = opened.read(-1 if length is None else length)
        if expected is not None:
            _check_same(expected, self.info(path), file)
        return data

    def open_input(self, info: ObjectInfo, offset: int = 0) -> InputStream:
        return InputStream(_FileBlocks(self._file(info.path), info, offset))

    def write(self, path: str, data: bytes) -> ObjectInfo:
        file = self._file(path)
        with _own_words("write", file), _temporary_file(os.path.dirname(file), data) as temporary:
            written = os.stat(temporary)
            os.replace(temporary, file)
            _sync_folder(os.path.dirname(file))
        return _described(path, written)

    def create(self, path: str, data: bytes) -> bool:
        file = self._file(path)
        with _own_words("create", file), _temporary_file(os.path.dirname(file), data) as temporary:
            try:
                os.link(temporary, file)  # unlike a rename it fails where the name is taken
            except FileExistsError:
                return self.read(path) == data
            _sync_folder(os.path.dirname(file))
        return True

    def copy(self, info: ObjectInfo, path: str) -> ObjectInfo:
        source, file = self._file(info.path), self._file(checked_target(info, path, self.uri))
        folder = os.path.dirname(file)
        with _own_words("write", file), _temporary_name(folder) as temporary:
            with _own_words("copy", source):
                _link_or_copy(source, temporary, info)
            copied = os.stat(temporary)
            os.replace(temporary, file)  # does nothing where both are the same file already
            _sync_folder(folder)
        return _described(path, copied)

    def delete(self, path: str) -> None:
        file = self._file(path)
        with _own_words("delete", file), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(file)
            _sync_folder(os.path.dirname(file))

    def sub(self, path: str) -> LocalStore:
        return LocalStore(self._file(path.rstrip("/")), self.config) if path else self

    def _file(self, path: str) -> str:
        if "//" in path:
            raise StorageError(
                f"{path!r} below {self.uri} has an empty step", wanted="single slashes on disk"
            )
        return os.path.join(self.uri, checked_path(path, self.uri))

    def _folder_of(self, prefix: str) -> str:
        """The folder that a listing begins in: "" or ending in "/"."""
        if os.path.exists(self.uri) and not os.path.isdir(self.uri):
            raise StorageError(f"{self.uri} is a file, not a folder", way_out="give the folder that holds it")
        folder, slash, _ = checked_prefix(prefix, self.uri).rpartition("/")
        return folder + slash

    def _paths(self, base: str, prefix: str, above: tuple[_FolderId, ...], in_order: bool) -> Iterator[str]:
        """Paths below the folder `base`, which lies in the folders `above`.

        Args:
            in_order: of the whole paths, for which the names of a folder are held (a million are 100 MB), with those
                that are neither files nor folders, since `_file_info` looks at each; else files only.
        """
        here = _folder_id(os.path.join(self.uri, base))
        if here in above:
            return
        names = _folder_names(os.path.join(self.uri, base), files_only=not in_order)
        for name in sorted(names) if in_order else names:  # folders end in "/", as in their paths
            path = base + name
            if name.endswith("/"):
                if path.startswith(prefix) or prefix.startswith(path):
                    yield from self._paths(path, prefix, (*above, here), in_order)
            elif path.startswith(prefix):
                yield path

    def _file_info(self, path: str) -> ObjectInfo | None:
        """None if it is no file, or no longer there."""
        file = os.path.join(self.uri, path)
        with _own_words("list", file):
            try:
                status = os.stat(file)
            except (FileNotFoundError, NotADirectoryError):  # also a link to nothing
                return None
            except OSError as error:
                if error.errno == errno.ELOOP:  # a link to itself
                    return None
                raise
        if not stat.S_ISREG(status.st_mode):
            return None
        # Names of a disk hold neither NUL nor ".." steps; what is left to refuse is not ASCII.
        return _described(path if path.isascii() else checked_path(path, self.uri), status)


@final
class _FileBlocks(InputBlocks):
    """One file, checked against its identity when it is opened and when its end is reached."""

    def __init__(self, file: str, info: ObjectInfo, offset: int) -> None:
        self._name, self._info, self._position = file, info, offset
        self._check()
        with _own_words("read", file):
            self._file = open(file, "rb", buffering=0)  # noqa: SIM115 - closed by close()
            self._file.seek(offset)

    def readinto(self, buffer: WriteableBuffer) -> int:
        with _own_words("read", self._name):
            count = self._file.readinto(buffer)
        self._position += count
        self.bytes_read += count
        if self._position >= self._info.size or not count:
            self._check()
        return count

    def close(self) -> None:
        if hasattr(self, "_file"):  # else it could not be opened
            self._file.close()
        super().close()

    def _check(self) -> None:
        with _own_words("read", self._name):
            _check_same(self._info, _described(self._info.path, os.stat(self._name)), self._name)


@contextlib.contextmanager
def _own_words(doing: str, file: str) -> Iterator[None]:
    """Say what the disk refused in the words of `engine.errors`."""
    thing = f"cannot {doing} {file}"
    try:
        yield
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror or error}"
        if isinstance(error, _NOT_THERE) and doing in ("find", "read", "copy"):
            raise ObjectNotFound(thing, found=found, wanted="a file", way_out="check the path") from error
        if isinstance(error, PermissionError):
            way_out = "run as a user who may do that, or change owner or mode of the folder"
            raise AccessDenied(thing, found=found, way_out=way_out) from error
        way_out = _WAYS_OUT.get(error.errno or 0, "check the disk: space, mount, names")
        raise StorageError(thing, found=found, way_out=way_out) from error


def _check_same(expected: ObjectInfo | None, found: ObjectInfo, file: str) -> None:
    """Raise ObjectChanged unless the file found is the one expected; None expects nothing."""
    if expected is not None and found.identity != expected.identity:
        raise ObjectChanged(
            f"{file} was changed since it was listed",
            found=found.identity,
            wanted=expected.identity,
            way_out="run again: the new version is then read from its start",
        )


def _absolute_path(uri: str) -> str:
    """The one spelling of a plain path or file URI: absolute, no "..", no slash at the end, links kept."""
    path = os.path.expanduser(uri)
    if uri[:6].lower() == "file:/":
        path = uri[5:]
        if path.startswith("//"):
            host, slash, rest = path[2:].partition("/")
            if host not in ("", "localhost"):
                raise RecipeError(f"{uri!r} is on another machine", found=host, wanted="file:///folder")
            path = slash + rest
        path = os.fsdecode(unquote_to_bytes(path))
    if not path or "\0" in path or not is_unicode(path):
        raise RecipeError(f"{uri!r} is not a folder", wanted="file:///folder or a plain path, in UTF-8")
    path = os.path.abspath(path)
    return f"/{path.lstrip('/')}"  # POSIX keeps two leading slashes; they mean one


def _described(path: str, status: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError(f"{path} is not a file")
    identity = f"mtime:{status.st_mtime_ns}:{status.st_size}"
    # A copy may keep its original's time; the other one says when it came here.
    return ObjectInfo(path, status.st_size, identity, max(status.st_mtime, status.st_ctime))


def _folder_id(folder: str) -> _FolderId:
    with _own_words("list", folder):
        try:
            status = os.stat(folder)
        except (FileNotFoundError, NotADirectoryError):
            return _NO_FOLDER
    return status.st_dev, status.st_ino


def _folder_names(folder: str, files_only: bool = False) -> Iterator[str]:
    """The names in a folder, those of folders with a slash; none where there is no folder.

    Args:
        files_only: leave out what is neither a folder nor a file (dangling links, sockets, pipes, devices).
    """
    with (
        _own_words("list", folder),
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(folder) as found,
    ):
        for entry in found:
            name = entry.name
            if name.startswith(".engine-") and _TEMPORARY_NAME.fullmatch(name):
                continue
            if _is_folder(entry):
                yield f"{name}/"
            elif not files_only or _is_file(entry):
                yield name


def _is_file(entry: os.DirEntry[str]) -> bool:
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also for a link that points at itself, of which `DirEntry.is_dir` complains."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


@contextlib.contextmanager
def _temporary_name(folder: str) -> Iterator[str]:
    """A name beside the later place, left out of listings; what has it at the end is removed."""
    _make_folder(folder)
    name = os.path.join(folder, f".engine-{uuid.uuid4().hex}.tmp")
    try:
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def _temporary_file(folder: str, data: bytes) -> Iterator[str]:
    """A complete, synced file beside its later place, left out of listings, removed if still there."""
    with _temporary_name(folder) as name:
        with open(name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield name


def _link_or_copy(source: str, target: str, info: ObjectInfo) -> None:
    """Give this version of the source the new name `target`, or make a copy of that name; synced in both cases."""
    source = os.path.realpath(source)  # `link` on Linux would give a symbolic link another name, not its file
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _copy_bytes(source, target, info)
        return
    with open(target, "rb") as linked:
        _check_same(info, _described(info.path, os.fstat(linked.fileno())), source)
        os.fsync(linked.fileno())  # somebody else may have written it


def _copy_bytes(source: str, target: str, info: ObjectInfo) -> None:
    with open(source, "rb") as opened, open(target, "xb") as file:
        _check_same(info, _described(info.path, os.fstat(opened.fileno())), source)
        shutil.copyfileobj(opened, file, BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())
        _check_same(info, _described(info.path, os.stat(source)), source)


def _make_folder(folder: str) -> None:
    """Make it and what it lies in; each new name is synced, or a power cut could take the branch away."""
    if os.path.isdir(folder):
        return
    _make_folder(os.path.dirname(folder))
    with contextlib.suppress(FileExistsError):  # somebody was quicker; a file there fails at the next step
        os.mkdir(folder)
    _sync_folder(os.path.dirname(folder))


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
