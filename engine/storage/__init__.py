"""The one door to stored bytes: `open_store(uri, config)` and what it gives; not for what the bytes mean."""

from engine.storage.base import InputStream, ObjectInfo, StorageConfig, Store
from engine.storage.kinds import Uri, open_folder_of, open_store, uri_in_full

__all__ = [
    "InputStream",
    "ObjectInfo",
    "StorageConfig",
    "Store",
    "Uri",
    "open_folder_of",
    "open_store",
    "uri_in_full",
]
