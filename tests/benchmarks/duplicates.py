"""What `engine.duplicates` finds among real photos at several thresholds, what cells miss, and how long it takes.

    python -m tests.benchmarks.duplicates            # 300 photos with 300 copies of 100 of them; 30,000 rows
    python -m tests.benchmarks.duplicates --quick    # see that it runs; the figures mean nothing

- Photos: tiles of 128 px of the photos of scikit-image and scikit-learn, that do not overlap; of 100 of them the same
  bytes, a JPEG of quality 75 and one of three quarters of the side. EfficientNet-Lite0 with its ImageNet weights, at
  64 px (photos of twice the input, as most archives have) and at 128 px (where each artefact of compression counts).
  Recall: of the copies, those in a group of their image; precision: of the rows that a group has beyond its
  representative, those that are copies of it.
- Time: rows around 1,000 directions, a tenth of them noisy copies, of width 1280; once with every image compared with
  every representative, once in cells, whose groups are compared with those.

Shape letters: N rows, D embedding width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.report import Ratio
from tests.benchmarks.throughput import REPOSITORY, _result_path, machine_facts

DISTINCT, COPIED, COPIES, SIDE_PX = 300, 100, 3, 128
INPUTS_PX = (64, 128)
THRESHOLDS = (0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.90)
WIDTH, ROWS, QUICK_ROWS, ROWS_PER_PART = 1280, 30_000, 6_000, 1024


def embedded_photos(folder: Path, input_px: int) -> Path:
    """A table of the photos and their copies, in an order that does not tell."""
    from engine.backbones.kinds import EfficientNetLite0Config
    from engine.embedder import Embedder
    from engine.images import decode_image
    from engine.recipes import Limits
    from engine.resolve import Network, resolve
    from engine.runtimes.kinds import TensorFlowRuntimeConfig
    from engine.storage import StorageConfig, open_store
    from tests.embedding_tables import claim_embeddings, write_part
    from tests.planted_copies import planted_images

    images = planted_images(DISTINCT, COPIED, SIDE_PX, quality=75, scale=0.75)
    network = Network(
        EfficientNetLite0Config(input_size=input_px), TensorFlowRuntimeConfig(), StorageConfig()
    )
    found = resolve(network, None)
    decoded = [decode_image(one.encoded, input_px, "stretch", Limits().max_pixels) for one in images]
    embeddings_ND = Embedder(found.graph, found.runtime).embed(np.stack([one.pixels_SS3 for one in decoded]))
    store = open_store(str(folder))
    claim_embeddings(store, embeddings_ND.shape[1], len(images))
    write_part(
        store,
        "photos.tar",
        0,
        True,
        0,
        embeddings_ND,
        key=[one.key for one in images],
        sha256=[hashlib.sha256(one.encoded).digest() for one in images],
        image_width=np.array([one.width_px for one in decoded], np.int32),
        image_height=np.array([one.height_px for one in decoded], np.int32),
    )
    return folder


def photos_found(table: Path, threshold: float) -> dict[str, float]:
    """Recall and precision of groups whose representatives and other rows show the same photo."""
    from engine.duplicates import REPRESENTATIVE, find_duplicates
    from engine.storage import open_store
    from engine.tables import open_table

    own, said, right = "", 0, 0
    for row in find_duplicates(open_table(open_store(str(table))), threshold).rows.to_pylist():
        base = row["key"].partition("-")[0]
        if row["kind"] == REPRESENTATIVE:
            own = base
        else:
            said, right = said + 1, right + (base == own)
    return {"threshold": threshold, "recall": right / (COPIED * COPIES), "precision": right / max(1, said)}


def made_table(folder: Path, rows: int) -> Path:
    """Rows around 1,000 directions, and for a tenth of all noisy copies with a cosine of 0.96 to 1.0."""
    from tests.embedding_tables import write_table

    random = np.random.default_rng(3)
    centres = random.normal(size=(1000, WIDTH)).astype(np.float32)
    count = rows - rows // 10
    rows_ND = np.empty((rows, WIDTH), np.float32)
    for begin in range(0, count, 10_000):
        some = slice(begin, min(begin + 10_000, count))
        own = random.integers(1000, size=some.stop - begin)
        rows_ND[some] = centres[own] + random.normal(size=(len(own), WIDTH)).astype(np.float32)
    sources = random.choice(count, rows - count, replace=False)
    noise = random.normal(size=(rows - count, WIDTH)) * random.uniform(0, 0.4, size=(rows - count, 1))
    rows_ND[count:] = rows_ND[sources] + noise
    write_table(folder, {"made.tar": rows_ND[random.permutation(rows)]}, ROWS_PER_PART)
    return folder


def timed(
    table: Path, exact_rows: int, threshold: float = 0.95
) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """Seconds and counts, and each row with its representative."""
    from engine.duplicates import REPRESENTATIVE, find, find_duplicates
    from engine.storage import open_store
    from engine.tables import open_table

    find.EXACT_ROWS = exact_rows
    started = time.perf_counter()
    found = find_duplicates(open_table(open_store(str(table))), threshold)
    seconds = time.perf_counter() - started
    own, pairs = "", set()
    for row in found.rows.to_pylist():
        if row["kind"] == REPRESENTATIVE:
            own = row["key"]
        else:
            pairs.add((row["key"], own))
    told = {"rows": found.rows_read, "seconds": seconds, "cells": found.cells, "recall_told": found.recall}
    return {**told, "groups": found.groups, "near": found.near}, pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "benchmarks" / "results")
    options = parser.parse_args()
    machine, rows = machine_facts(), QUICK_ROWS if options.quick else options.rows
    with tempfile.TemporaryDirectory(prefix="engine-duplicates-") as scratch:
        folder = Path(scratch)
        photos = {}
        for input_px in INPUTS_PX:
            table = embedded_photos(folder / f"photos-{input_px}", input_px)
            photos[str(input_px)] = [photos_found(table, threshold) for threshold in THRESHOLDS]
            for one in photos[str(input_px)]:
                said = f"recall {one['recall']:.3f} precision {one['precision']:.3f}"
                print(f"photos at {input_px:>3} px, threshold {one['threshold']:.2f}: {said}", flush=True)
        table = made_table(folder / "made", rows)
        whole, pairs = timed(table, exact_rows=rows)
        print(f"all with all: {whole}", flush=True)
        cells, in_cells = timed(table, exact_rows=rows // 2)
        cells["recall"] = len(pairs & in_cells) / len(pairs)
        print(f"in cells: {cells}", flush=True)
    at_default = next(one for one in photos[str(INPUTS_PX[0])] if one["threshold"] == 0.95)
    judged = [
        Ratio("duplicates/photos/recall", at_default["recall"], 0.95),
        Ratio("duplicates/photos/precision", at_default["precision"], 0.95),
        Ratio("duplicates/cells/recall", cells["recall"], 0.95),
    ]
    print(*(one.line() for one in judged), sep="\n")
    if options.quick:
        return
    document = {
        "machine": machine,
        "photos": {
            "distinct": DISTINCT,
            "copied": COPIED,
            "copies": COPIES,
            "side_px": SIDE_PX,
            "by_input": photos,
        },
        "time": {"all with all": whole, "in cells": cells},
        "ratios": [
            {"name": one.name, "value": one.value, "goal": one.goal, "verdict": one.verdict} for one in judged
        ],
    }
    path = _result_path(options.out)
    path = path.with_name(path.stem + "-duplicates.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
