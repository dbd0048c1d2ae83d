"""The one door to stored bytes: `open_store(uri, config)` and what it gives; not for what the bytes mean."""

from engine.storage.base import InputStream, ObjectInfo, StorageConfig, Store
from engine.storage.kinds import open_store

__all__ = ["InputStream", "ObjectInfo", "StorageConfig", "Store", "open_store"]
