"""`engine similar`: from a table and an image or a row to the nearest rows, as JSON or as a table on the screen."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import RecipeError

if TYPE_CHECKING:
    from engine.storage import Store


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked for: an image, or a row of the table.

    Attributes:
        image: path or URI of a file.
        key, shard, index: of a row.
    """

    image: str | None = None
    key: str | None = None
    shard: str | None = None
    index: int | None = None


def find_similar(store: Store, query: Query, k: int) -> dict[str, Any]:
    """The summary of `engine similar --json`.

    Raises:
        EngineError: as `engine.similar.similar_to_row` and `engine.query_images.embed_as_table`.
    """
    from engine.query_images import embed_as_table
    from engine.quiet_start import quiet_start
    from engine.similar import similar, similar_to_row
    from engine.storage import open_folder_of
    from engine.tables import open_table
    from engine.this_machine import machines_here
    from jobs.outcome import progress_bar, say_incomplete

    table = open_table(store)
    asked: dict[str, Any]
    with progress_bar("parts", len(table.parts)) as (bar, task):

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if query.image is not None:
            folder, name = open_folder_of(query.image, store.config)
            asked = {"image": query.image}
            encoded = _encoded(query.image, folder, name)
            with quiet_start():
                # As many threads as an actor of `extract` has here: what that left in the node's cache is found.
                vectors_BD = embed_as_table(table, {query.image: encoded}, int(machines_here().cpus))
            started = time.monotonic()
            near = similar(table, vectors_BD, k, report)
        else:
            started = time.monotonic()
            asked, near = similar_to_row(table, query.key, query.shard, query.index, k, report)
    say_incomplete(table.incomplete_shards)
    return {
        "verb": "similar",
        "table": store.uri,
        "query": asked,
        "parts": len(table.parts),
        "incomplete_shards": table.incomplete_shards,
        "seconds": round(time.monotonic() - started, 3),
        "similar": near.drop_columns(["query"]).to_pylist(),
    }


def _encoded(uri: str, folder: Store, name: str) -> bytes:
    """The file, if it is no larger than what `extract` would take for an image.

    Raises:
        RecipeError: it is empty or larger.
    """
    from engine.recipes import Limits
    from engine.shards.image_bytes import size_problem

    info = folder.info(name)
    problem = size_problem("the file", info.size, Limits().max_sample_bytes)
    if problem is not None:
        raise RecipeError(f"{uri}: cannot be an image to ask by", found=problem[1], wanted="one image file")
    return folder.read(name, expected=info)


def print_similar(found: dict[str, Any]) -> None:
    """A table on stdout, nearest first."""
    from jobs.screen import print_table

    said = ", ".join(f"{name} {value}" for name, value in found["query"].items() if value is not None)
    columns = ("rank", "cosine", "key", "shard", "index", "label")
    rows = [[row[name] for name in columns] for row in found["similar"]]
    print_table(f"nearest to {said}", columns, rows)
