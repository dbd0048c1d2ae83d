"""The decoded images of a fine-tuning: in a file of this machine, picked by row number. Not for: decoding them.

They are decoded once, at the size of the backbone's input, and read again in every epoch in another order: a page of a
local disk is read in a fraction of the time in which an image is decoded, and a shuffle over all of them needs no
window. Where workers split them each has a file of its own images, and knows the samples of all. Shape letters: N rows,
M images in the order in which they came, S side in pixels, P rows of a portion.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.errors import EngineError, ShardsFailed
from engine.extraction import Part

if TYPE_CHECKING:
    from engine.strategies.workers import Workers

NO_ROOM_LEFT = 1 << 30  # bytes of the disk that stay free
SHOWN = 5
ELSEWHERE = -1  # of an image on another worker's disk
_REJECTS = b"rejects"


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Every image that could be decoded, in the order of the shards and of their samples.

    Attributes:
        samples: key, shard, index, label and metadata of each.
        rejects: how many samples have no image, by reason.
        holders_N: the worker on whose disk each image is; None: each worker has all.
    """

    samples: pa.Table
    rejects: Mapping[str, int]
    _pixels_MSS3: NDArray[np.uint8]
    _places_N: NDArray[np.int64]  # where each is among those; ELSEWHERE
    holders_N: NDArray[np.int64] | None = None

    def pixels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8, shape (P, S, S, 3), RGB: of some of the rows.

        Raises:
            IndexError: one of them is on another worker.
        """
        places = self._places_N[rows]
        if (places == ELSEWHERE).any():
            raise IndexError(f"rows {rows[places == ELSEWHERE][:SHOWN]} are on the disks of other workers")
        picked: NDArray[np.uint8] = self._pixels_MSS3[places]
        return picked

    @property
    def side_px(self) -> int:
        """S."""
        side: int = self._pixels_MSS3.shape[1]
        return side

    def rows_per_worker(self, workers: int) -> list[int]:
        """How many images are on the disk of each."""
        if self.holders_N is None:
            return [len(self)] * workers
        counts: list[int] = np.bincount(self.holders_N, minlength=workers).tolist()
        return counts

    def __len__(self) -> int:
        return len(self._places_N)


@contextmanager
def collect_images(
    rows: Iterable[pa.Table],
    shards: Sequence[str],
    side_px: int,
    folder: Path | None = None,
    could_be_split: bool = False,
) -> Iterator[ImageRows]:
    """Put decoded parts into a file without a name, which goes with this context.

    Args:
        rows: parts as `engine.extraction.read_parts` yields them, of whatever shards, in any order.
        shards: the paths of all shards, in their order.
        side_px: S.
        folder: where the file is made; None: the temporary folder.
        could_be_split: whether other workers collect the same images.

    Raises:
        ShardsFailed: a shard cannot be read to its end.
        EngineError: the disk has no room for them.
    """
    folder = folder or Path(tempfile.gettempdir())
    order = {path: place for place, path in enumerate(shards)}
    parts: list[tuple[tuple[int, int], int, pa.Table]] = []
    damage: dict[str, str] = {}
    rejects: dict[str, int] = {}
    count = 0
    with tempfile.TemporaryFile(dir=folder, prefix="engine-images-") as file:
        for row in rows:
            part = Part.from_row(row)
            header = part.header
            if header.damage is not None:
                damage[header.shard] = header.damage
                continue
            assert part.array is not None and part.samples is not None and part.rejects is not None
            _require_room(folder, part.array.nbytes, count, could_be_split)
            file.write(np.ascontiguousarray(part.array).data)
            parts.append(((order[header.shard], header.number), count, part.samples))
            count += len(part.array)
            for reason in part.rejects["error"].to_pylist():
                rejects[reason] = rejects.get(reason, 0) + 1
        if damage:
            raise _unreadable(damage, len(shards))
        file.flush()
        parts.sort(key=lambda part: part[0])
        samples = pa.concat_tables([samples for _, _, samples in parts]) if parts else pa.table({})
        places = [np.arange(first, first + table.num_rows) for _, first, table in parts]
        pixels_MSS3 = (
            np.memmap(file, np.uint8, "r", shape=(count, side_px, side_px, 3))
            if count
            else np.empty((0, side_px, side_px, 3), np.uint8)
        )
        yield ImageRows(samples, rejects, pixels_MSS3, np.concatenate([*places, np.empty(0, np.int64)]))


def join_images(own: ImageRows, shards: Sequence[str], workers: Workers) -> ImageRows:
    """Images that are split between workers, as all of them together: in the same order on every worker, and as if one
    had collected them all.

    All workers must call this, with `own` of different samples and the same `shards`.
    """
    told = own.samples.replace_schema_metadata({_REJECTS: json.dumps(own.rejects)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, told.schema) as writer:
        writer.write_table(told)
    tables = [
        pa.ipc.open_stream(content).read_all() for content in workers.gathered(sink.getvalue().to_pybytes())
    ]
    rejects: Counter[str] = Counter()
    for table in tables:
        rejects.update(json.loads(table.schema.metadata[_REJECTS]))
    holders_M = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    places_M = np.full(len(holders_M), ELSEWHERE, np.int64)
    places_M[holders_M == workers.rank] = own._places_N
    filled = [table.replace_schema_metadata(None) for table in tables if table.num_columns]
    samples = pa.concat_tables(filled) if filled else pa.table({})
    order = np.empty(0, np.int64)
    if len(samples):
        number_of = {path: number for number, path in enumerate(shards)}
        shard_M = np.array([number_of[path] for path in samples["shard"].to_pylist()])
        order = np.lexsort((samples["index"].to_numpy(), shard_M))
        samples = samples.take(order)
    return ImageRows(samples, dict(rejects), own._pixels_MSS3, places_M[order], holders_M[order])


def _require_room(folder: Path, size: int, images: int, could_be_split: bool) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + NO_ROOM_LEFT:
        raise EngineError(
            f"finetune: no room for more decoded images in {folder} of a worker",
            found=f"{free / 1e9:.1f} GB free there, after {images:,} images",
            wanted=f"{(size + NO_ROOM_LEFT) / 1e9:.1f} GB, most of which stays free",
            way_out=(
                "set training.images: split, so that each worker has its share, " if could_be_split else ""
            )
            + "set TMPDIR to a larger disk, take a smaller backbone.input_size, or fine-tune on fewer images",
        )


def _unreadable(damage: Mapping[str, str], shards: int) -> ShardsFailed:
    named: list[Any] = [f"{shard}: {text}" for shard, text in sorted(damage.items())][:SHOWN]
    return ShardsFailed(
        f"finetune: {len(damage):,} of {shards:,} shards cannot be read",
        found="; ".join(named),
        way_out="repair them, or leave them out with source.pattern",
    )
