"""Programs that a skilled hand would write instead of the engine, each run as a process of its own.

    python -m tests.benchmarks.rivals KIND ARCHIVE OUT --network MobileNetV2 --side 160 --weights FILE

Every one reads the tar shards of ARCHIVE, embeds each image and writes keys and embeddings as Parquet into OUT. The
last line of stdout is JSON: {kind, images, seconds}, seconds since the process was started, imports included. None of
them can be run again after a crash, keeps rejects or checks anything: that is what the engine has to pay for.
Shape letters: B images, S side in pixels, D embedding width.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tests.benchmarks.archive import backbone_block, build_network, preprocess_input, read_shard

BATCH = 64
PARTS_AHEAD = 2
BATCHES_PER_PART = 4  # what `same_parts` hands to its runtime at once: enough for several streams
MAX_PIXELS = 178_956_970  # as the engine's default, engine/recipes.py
READ_AT_ONCE = 32


def ray_documentation(options: argparse.Namespace) -> int:
    """As the pages "Working with images" and "Offline batch inference" of Ray's documentation put it together."""
    import ray
    from PIL import Image

    side, name, weights = options.side, options.network, str(options.weights)
    gpus = {"num_gpus": 1} if options.gpu else {}

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        image = Image.fromarray(row["jpg"]).resize((side, side))
        return {"key": row["__key__"], "image": np.asarray(image)}

    class Embed:
        def __init__(self) -> None:
            self.model = build_network(name, side)
            self.model.load_weights(weights)
            self.preprocess_input = preprocess_input(name)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            pixels_BSS3 = self.preprocess_input(batch["image"].astype(np.float32))
            return {"key": batch["key"], "embedding": self.model.predict(pixels_BSS3, verbose=0)}

    dataset = ray.data.read_webdataset([str(path) for path in shards(options.archive)])
    dataset = dataset.map(prepare)
    dataset = dataset.map_batches(Embed, batch_size=BATCH, compute=ray.data.ActorPoolStrategy(size=1), **gpus)
    dataset.write_parquet(str(options.out))
    return rows_written(options.out)


def tfdata_predict(options: argparse.Namespace) -> int:
    """The usual script: tarfile, tf.data, `model.predict`; the numbers that AUTOTUNE arrives at are given."""
    import tensorflow as tf

    keys: list[str] = []
    scale = preprocess_input(options.network)

    def jpegs() -> Iterator[bytes]:
        for path in shards(options.archive):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        keys.append(member.name[:-4])
                        yield tar.extractfile(member).read()  # type: ignore[union-attr]

    def decode(encoded: Any) -> Any:
        image = tf.io.decode_jpeg(encoded, channels=3)
        return scale(tf.image.resize(image, (options.side, options.side)))

    dataset = tf.data.Dataset.from_generator(jpegs, output_signature=tf.TensorSpec((), tf.string))
    dataset = _without_autotune(
        dataset.map(decode, num_parallel_calls=os.cpu_count()).batch(BATCH).prefetch(4)
    )
    model = build_network(options.network, options.side)
    model.load_weights(options.weights)
    embeddings_BD = model.predict(dataset, verbose=0)
    with EmbeddingFile(options.out) as file:
        file.write(keys, embeddings_BD)
    return file.rows


def tfdata_folded(options: argparse.Namespace) -> int:
    """The best that TensorFlow alone gives: the variables are constants of a graph, oneDNN on, everything overlapped.

    A JPEG is decoded at 1/2 where that leaves more pixels than are asked for, which costs less and looks better than
    the bilinear resize of a full one; tar headers are read without tarfile, many samples at a time.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    scale, side = preprocess_input(options.network), options.side

    def samples() -> Iterator[tuple[list[str], list[bytes]]]:
        for path in shards(options.archive):
            for some in in_groups(read_shard(path), READ_AT_ONCE):
                keys, jpegs = zip(*some, strict=True)
                yield list(keys), list(jpegs)

    def decode(key: Any, encoded: Any) -> Any:
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
        image = tf.cond(
            tf.minimum(height, width) >= 2 * side,
            lambda: tf.io.decode_jpeg(encoded, 3, ratio=2, dct_method="INTEGER_FAST"),
            lambda: tf.io.decode_jpeg(encoded, 3, dct_method="INTEGER_FAST"),
        )
        return key, tf.cast(tf.round(tf.image.resize(image, (side, side))), tf.uint8)

    signature = (tf.TensorSpec((None,), tf.string), tf.TensorSpec((None,), tf.string))
    dataset = tf.data.Dataset.from_generator(samples, output_signature=signature).unbatch()
    dataset = _without_autotune(
        dataset.map(decode, num_parallel_calls=os.cpu_count()).batch(BATCH).prefetch(4)
    )

    model = build_network(options.network, side)
    model.load_weights(options.weights)
    forward = tf.function(lambda pixels: model(scale(tf.cast(pixels, tf.float32)), training=False))
    pixels = tf.TensorSpec((None, side, side, 3), tf.uint8)
    graph = convert_variables_to_constants_v2(forward.get_concrete_function(pixels))
    with EmbeddingFile(options.out) as file:
        for keys, pixels_BSS3 in dataset:
            file.write([key.decode() for key in keys.numpy()], graph(pixels_BSS3)[0].numpy())
    return file.rows


def _without_autotune(dataset: Any) -> Any:
    """Its thread sleeps ever longer, up to a minute, and often the end of the data does not wake it: of five runs of
    8,000 images three waited 32 s in the end for nothing (TensorFlow 2.21, 2026-11-22)."""
    import tensorflow as tf

    chosen = tf.data.Options()
    chosen.autotune.enabled = False
    return dataset.with_options(chosen)


def same_parts(options: argparse.Namespace) -> int:
    """One process with the engine's decoder and the engine's runtime: threads decode while another part is embedded."""
    from engine.images import decode_image

    embed = open_embedder(options.network, options.side, options.weights, runtime_of(options), options.gpu)
    samples = (sample for path in shards(options.archive) for sample in read_shard(path))
    parts = in_groups(samples, BATCH * BATCHES_PER_PART)
    with ThreadPoolExecutor(os.cpu_count()) as pool, EmbeddingFile(options.out) as file:

        def decoded(part: tuple[tuple[str, bytes], ...]) -> tuple[list[str], np.ndarray]:
            keys, jpegs = zip(*part, strict=True)
            images = pool.map(
                lambda jpeg: decode_image(jpeg, options.side, "stretch", MAX_PIXELS).pixels_SS3, jpegs
            )
            return list(keys), np.stack(list(images))

        for keys, pixels_BSS3 in ahead(map(decoded, parts), PARTS_AHEAD):
            file.write(keys, embed(pixels_BSS3))
    return file.rows


KINDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "ray_documentation": ray_documentation,
    "tfdata_predict": tfdata_predict,
    "tfdata_folded": tfdata_folded,
    "same_parts": same_parts,
}


def open_embedder(
    network: str, side_px: int, weights: Path, runtime: dict[str, Any], on_gpu: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """The engine's own forward pass over all cores, or on the GPU: uint8 (B, S, S, 3) -> float32 (B, D), for any B.

    Args:
        runtime: the recipe's block of that name.

    Raises:
        RecipeError, pydantic.ValidationError: the engine has no such runtime here.
    """
    from pydantic import TypeAdapter

    from engine.backbones.kinds import BackboneConfig, build_backbone
    from engine.runtimes.kinds import RuntimeConfig, freeze_network, open_runtime, prepare_to_freeze
    from engine.storage import StorageConfig

    prepare_to_freeze(os.cpu_count(), use_gpu=on_gpu)  # as in the engine, before TensorFlow computes anything
    config = TypeAdapter(RuntimeConfig).validate_python(runtime)
    block = backbone_block(network, side_px, weights)
    built = build_backbone(TypeAdapter(BackboneConfig).validate_python(block), StorageConfig())
    graph = freeze_network(built.network, built.scaling, built.input_size)
    return open_runtime(config, graph, os.cpu_count(), on_gpu).run


def runtime_of(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe's block `runtime` that the arguments ask for."""
    return {"kind": options.runtime, "precision": options.precision}


def runtime_refusals() -> tuple[type[Exception], ...]:
    """What is raised where the engine does not have the runtime that is asked for, or not on this machine."""
    from pydantic import ValidationError

    from engine.errors import RecipeError

    return RecipeError, ValidationError


def shards(archive: Path) -> list[Path]:
    return sorted(archive.glob("*.tar"))


def rows_written(folder: Path) -> int:
    """Rows of all Parquet files below a folder, by their footers; files of rejects do not count."""
    import pyarrow.parquet as pq

    files = [path for path in folder.rglob("*.parquet") if path.parent.name != "rejects"]
    return sum(pq.read_metadata(path).num_rows for path in files)


def in_groups(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """itertools.batched, which Python 3.11 does not have."""
    iterator = iter(items)
    while group := tuple(islice(iterator, size)):
        yield group


def ahead(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The same items, made by another thread up to `count` ahead of their use."""
    done, waiting = object(), queue.Queue[Any](count)

    def fill() -> None:
        try:
            for item in items:
                waiting.put(item)
            waiting.put(done)
        except Exception as error:  # noqa: BLE001  # it is raised where the items are used
            waiting.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (item := waiting.get()) is not done:
        if isinstance(item, Exception):
            raise item
        yield item


class EmbeddingFile:
    """`embeddings.parquet` with the columns key and embedding; floats are stored plain: they do not compress."""

    def __init__(self, folder: Path) -> None:
        self.path, self.rows, self._writer = folder / "embeddings.parquet", 0, None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> EmbeddingFile:
        return self

    def write(self, keys: list[str], embeddings_BD: np.ndarray) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(np.ascontiguousarray(embeddings_BD, np.float32).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, embeddings_BD.shape[1])
        table = pa.table({"key": keys, "embedding": column})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self.path, table.schema, compression="NONE", use_dictionary=False)
        self._writer.write_table(table)
        self.rows += len(keys)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()


def seconds_since_start() -> float:
    """Since this process was started, before its first import: field 22 of proc_pid_stat(5), to 0.01 s."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def arguments() -> argparse.ArgumentParser:
    """The parser of this program; `limits.py` asks for the same network in the same words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("archive", type=Path, help="folder of tar shards")
    parser.add_argument("--network", default="MobileNetV2")
    parser.add_argument("--side", type=int, default=160, help="of the square input, pixels")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--runtime", default="tensorflow", help="kind of the engine's runtime, where it is used"
    )
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--gpu", action="store_true", help="run the network on the GPU")
    return parser


def hide_gpus(options: argparse.Namespace) -> None:
    """Where the processor is to be measured TensorFlow must not find one; before it is imported."""
    if not options.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # TensorFlow leaves it off on processors of AMD
    parser = arguments()
    parser.add_argument("out", type=Path, help="folder for the Parquet files")
    options = parser.parse_args()
    hide_gpus(options)
    try:
        images = KINDS[options.kind](options)
    except runtime_refusals() as error:
        print(" ".join(str(error).split())[:200], file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps({"kind": options.kind, "images": images, "seconds": round(seconds_since_start(), 2)}))


if __name__ == "__main__":
    main()
