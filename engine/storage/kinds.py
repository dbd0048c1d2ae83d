"""The menu of stores: which URI opens which kind; a kind is imported only when it is chosen."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from engine.errors import RecipeError
from engine.storage.base import StorageConfig, Store

_DEFAULT_CONFIG = StorageConfig()
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def open_store(uri: str, config: StorageConfig = _DEFAULT_CONFIG) -> Store:
    """The store rooted at a URI; nothing is asked of it yet.

    Args:
        uri: `s3://bucket/prefix` (taken literally, nothing is percent-decoded), `file:///folder`
            (percent-decoded), or a plain path (taken literally; `~` and relative paths are made absolute,
            links stay as they are).
        config: how to reach an object store; a disk does not need it.

    Raises:
        RecipeError: another scheme, or a URI that names no place.
    """
    found = _SCHEME.match(uri)
    scheme = found.group(1).lower() if found else "file"
    if scheme == "file":
        from engine.storage.local import LocalStore

        return LocalStore(uri, config)
    if scheme == "s3":
        from engine.storage.s3 import S3Store

        return S3Store(uri, config)
    raise RecipeError(
        f"cannot open {uri!r}",
        found=f"the scheme {scheme!r}",
        wanted="s3://bucket/prefix, file:///folder, or a plain path",
        way_out="for a folder with that name write ./ in front of it",
    )


def open_folder_of(uri: str, config: StorageConfig = _DEFAULT_CONFIG) -> tuple[Store, str]:
    """The store of the folder that a file lies in, and the file's name there.

    Raises:
        RecipeError: as `open_store`, or the URI is a folder's.
    """
    folder, _, name = open_store(uri, config).uri.rpartition("/")
    if uri.endswith("/") or not name or folder == "s3:/":
        raise RecipeError(f"{uri!r}: names no file", wanted="the URI of one file")
    return open_store(folder or "/", config), name


def uri_in_full(uri: str) -> str:
    """One spelling for one place, absolute: workers run in other folders than the command.

    Raises:
        ValueError: as `open_store`, in the words of a recipe's field.
    """
    try:
        return open_store(uri).uri
    except RecipeError as error:
        raise ValueError(" ".join(str(error).split())) from None


Uri = Annotated[
    str,
    Field(min_length=1, description="s3://bucket/prefix, file:///folder or a plain path."),
    AfterValidator(uri_in_full),
]
"""Type of a recipe's field that names a place; holds it spelled in full."""
