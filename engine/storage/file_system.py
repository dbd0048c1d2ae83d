"""Chosen objects as a read-only file system, for libraries that read files through fsspec.

Whoever reads through it gets what our own readers get: the store's settings and keys, its retries, and exactly the
versions that were listed. Not for our own code, which reads stores.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterable
from typing import Any, final

from fsspec import AbstractFileSystem

from engine.errors import EngineError
from engine.storage.base import ObjectInfo, Store
from engine.storage.object_file import ObjectFile


@final
class ObjectFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Folders of files, each of them an object of a store; `engine://<folder>/<name>`.

    Attributes:
        bytes_read: from stores until now.
        failure: the last error of ours that a reader met, since foreign libraries keep its text at best; None: none.
    """

    protocol = "engine"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self._folders: dict[str, dict[str, tuple[Store, ObjectInfo]]] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.failure: EngineError | None = None

    def add_folder(self, folder: str, store: Store, infos: Iterable[ObjectInfo]) -> None:
        """Show objects of a store as the files of a folder, under the last step of their paths."""
        self._folders[folder] = {info.path.rpartition("/")[2]: (store, info) for info in infos}

    def glob(self, path: str, **_: Any) -> list[str]:
        """All files of a folder, whatever the pattern, in the order they were given."""
        folder = self._strip_protocol(path).partition("/")[0]
        return [f"{folder}/{name}" for name in self._folders.get(folder, ())]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": self._strip_protocol(path), "size": self._find(path)[1].size, "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self._find(path)
        except FileNotFoundError:
            return False
        return True

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._find(path)[1].modified or 0.0, datetime.UTC)

    def open(self, path: str, mode: str = "rb", **_: Any) -> ObjectFile:
        if mode not in ("rb", "r"):
            raise PermissionError(f"{path}: may only be read")
        store, info = self._find(path)
        return ObjectFile(info.size, lambda offset, length: self._fetch(store, info, offset, length))

    def _fetch(self, store: Store, info: ObjectInfo, offset: int, length: int) -> bytes:
        try:
            chunk = store.read(info.path, offset=offset, length=length, expected=info)
        except EngineError as error:
            self.failure = error
            raise
        with self._lock:  # readers have threads
            self.bytes_read += len(chunk)
        return chunk

    def _find(self, path: str) -> tuple[Store, ObjectInfo]:
        folder, _, name = self._strip_protocol(path).partition("/")
        try:
            return self._folders[folder][name]
        except KeyError:
            raise FileNotFoundError(path) from None
