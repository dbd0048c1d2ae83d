"""The images that are to be labelled: files, folders, URIs, bytes. Not for: decoding them, or archives of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ObjectNotFound, RecipeError
from engine.recipes import Limits
from engine.schema import RejectReason
from engine.shards.image_bytes import Problem, size_problem
from engine.storage import ObjectInfo, StorageConfig, Store, open_store

# Names of a folder's files that are looked at; a file that is named is looked at whatever it is called.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LIMITS = Limits()  # those of a score recipe that says nothing of them
MAX_IMAGES = 1000  # in one call: for more there is `engine score`, which goes on where it was interrupted


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """One image as it was read.

    Attributes:
        name: as its answer calls it.
        encoded: its bytes; None where there are none that can be used.
        problem: why not.
        size_bytes: of the whole file.
    """

    name: str
    encoded: bytes | None
    problem: Problem | None
    size_bytes: int

    @staticmethod
    def of_bytes(name: str, encoded: bytes) -> EncodedImage:
        """Bytes that are here already."""
        problem = size_problem("the image", len(encoded), LIMITS.max_sample_bytes)
        return EncodedImage(name, None if problem else encoded, problem, len(encoded))


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that has been found, or that was named and is not there.

    Attributes:
        name: as its answer calls it.
        store: of the folder it lies in.
        info: None: it is not there.
    """

    name: str
    store: Store
    info: ObjectInfo | None

    def read(self) -> EncodedImage:
        """Its bytes.

        Raises:
            StorageError: it is there and cannot be read.
        """
        if self.info is None:
            return EncodedImage(self.name, None, (RejectReason.NO_IMAGE, "there is no such file"), 0)
        problem = size_problem("the file", self.info.size, LIMITS.max_sample_bytes)
        encoded = None if problem else self.store.read(self.info.path, expected=self.info)
        return EncodedImage(self.name, encoded, problem, self.info.size)


def find_images(places: Iterable[str | Path], storage: StorageConfig) -> list[ImageFile]:
    """The files that places name: each itself, and of a folder all images below it, in the order of the places.

    Args:
        places: paths or URIs of files and folders; with a slash at its end it is a folder.

    Raises:
        RecipeError: a folder without images, or more than MAX_IMAGES files.
        StorageError: a place cannot be asked about.
    """
    found = itertools.chain.from_iterable(_files_at(str(place), storage) for place in places)
    files = list(itertools.islice(found, MAX_IMAGES + 1))
    if len(files) > MAX_IMAGES:
        raise RecipeError(
            "predict: too many images for one call",
            found=f"more than {MAX_IMAGES:,}",
            wanted=f"at most {MAX_IMAGES:,}",
            way_out="`engine score` labels archives and folders of any size (source: {kind: files, uri: ...})",
        )
    return files


def _files_at(place: str, storage: StorageConfig) -> Iterator[ImageFile]:
    store = open_store(place, storage)
    parent, _, name = store.uri.rpartition("/")
    if not place.endswith("/") and name and not parent.endswith(":/"):  # else it names a folder, or a bucket
        folder = open_store(parent or "/", storage)
        try:
            yield ImageFile(place, folder, folder.info(name))
            return
        except ObjectNotFound:
            if not _has_something(store):
                yield ImageFile(place, folder, None)
                return
    images = (info for info in store.list() if info.path.lower().endswith(ENDINGS))
    first = next(images, None)
    if first is None:
        raise RecipeError(
            f"{store.uri}: no images here",
            wanted=f"files whose names end in {', '.join(ENDINGS)}",
            way_out="check the path; of other names give the files themselves",
        )
    for info in itertools.chain((first,), images):
        yield ImageFile(os.path.join(place, info.path), store, info)


def _has_something(store: Store) -> bool:
    """Whether it is a folder with files in it."""
    return next(iter(store.names()), None) is not None
