"""Images of an embedding table that are there more than once: the same bytes, or near to each other; as groups.

From a table to one small table. Not for: deleting anything, or which of two images is the better one to keep, beyond
the number of their pixels.
"""

from engine.duplicates.find import (
    DUPLICATES_SCHEMA,
    EXACT,
    NEAR,
    REPRESENTATIVE,
    THRESHOLD,
    Duplicates,
    find_duplicates,
    require_duplicates_uri,
    write_duplicates,
)

__all__ = [
    "DUPLICATES_SCHEMA",
    "EXACT",
    "NEAR",
    "REPRESENTATIVE",
    "THRESHOLD",
    "Duplicates",
    "find_duplicates",
    "require_duplicates_uri",
    "write_duplicates",
]
