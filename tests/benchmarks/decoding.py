"""What decoding one image costs, here and with the libraries that a skilled hand would take, and how true each is.

    python -m tests.benchmarks.decoding [--rounds 5]

Six photos of scikit-image and scikit-learn (three at 4000 x 3000), cropped and enlarged to each size; JPEGs of quality
90 4:2:0, WebP of quality 80. Every contender stretches the file's bytes to a square of S pixels, RGB, 8 bits, with one
thread. Microseconds are of the processor, not of the clock; the median over files and rounds, in which the contenders
take turns. PSNR is of the worst file, against exact area means of a full decode; inf is every pixel.

The last column divides the time of the fastest rival by ours: of rivals that are at least as true as we are (less 0.1
dB; above 70, where all differences are of rounding, all are the same). Above 1 nobody as true is faster. Libraries that
are not installed say so.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from engine.images import decode_image
from tests.numerics.test_decode_fidelity import LARGE_PHOTOS, PHOTOS, exact_area, photo, psnr_db

SIDES_PX = (160, 224)
CASES = (
    ("JPEG", 500, 375),
    ("JPEG", 1920, 1080),
    ("JPEG", 4000, 3000),
    ("PNG", 500, 375),
    ("PNG", 1920, 1080),
    ("WebP", 500, 375),
    ("WebP", 1920, 1080),
)
SAVED_WITH: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 90, "subsampling": 2},
    "PNG": {},
    "WebP": {"quality": 80},
}
MAX_PIXELS = 178_956_970
AS_TRUE_DB = 0.1
ROUNDED_DB = 70.0
LIBRARIES = ("pillow", "opencv-python-headless", "numba", "tensorflow", "numpy")

Decoder = Callable[[bytes], np.ndarray]  # encoded -> uint8, (S, S, 3)


def ours(form: str, side_px: int) -> dict[str, Decoder]:
    return {"ours": lambda encoded: decode_image(encoded, side_px, "stretch", MAX_PIXELS).pixels_SS3}


def with_pillow(form: str, side_px: int) -> dict[str, Decoder]:
    """A full decode with BOX; for JPEGs also draft mode, which decodes at the least size that is not below S."""
    target = (side_px, side_px)

    def full(encoded: bytes) -> np.ndarray:
        return np.asarray(_rgb(encoded).resize(target, Image.Resampling.BOX))

    def draft(encoded: bytes) -> np.ndarray:
        return np.asarray(_rgb(encoded, target).resize(target, Image.Resampling.HAMMING))

    return {"Pillow": full, "Pillow draft": draft} if form == "JPEG" else {"Pillow": full}


def _rgb(encoded: bytes, draft_size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.open(io.BytesIO(encoded))
    if draft_size:
        image.draft("RGB", draft_size)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def with_opencv(form: str, side_px: int) -> dict[str, Decoder]:
    """A full decode with INTER_AREA and with Pillow's BOX; and the strongest reduction that leaves S pixels."""
    try:
        import cv2
    except ImportError:
        return {}
    cv2.setNumThreads(1)
    target = (side_px, side_px)

    def read(encoded: bytes, flags: int) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)

    def area(encoded: bytes) -> np.ndarray:
        return cv2.resize(read(encoded, cv2.IMREAD_COLOR_RGB), target, interpolation=cv2.INTER_AREA)

    def box(encoded: bytes) -> np.ndarray:
        full = Image.fromarray(read(encoded, cv2.IMREAD_COLOR_RGB))
        return np.asarray(full.resize(target, Image.Resampling.BOX))

    def reduced(divisor: int) -> Decoder:
        flags = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}

        def decode(encoded: bytes) -> np.ndarray:
            small = cv2.resize(read(encoded, flags[divisor]), target, interpolation=cv2.INTER_AREA)
            return small[..., ::-1]

        return decode

    plain = {"cv2 AREA": area, "cv2 + BOX": box}
    return plain | {f"cv2/{d} AREA": reduced(d) for d in (2, 4, 8)} if form == "JPEG" else plain


def with_tensorflow(form: str, side_px: int) -> dict[str, Decoder]:
    """tf.io with tf.image.resize, by area and (its default) bilinear; for JPEGs also with a ratio of 2 and 4."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError:
        return {}
    tf.get_logger().setLevel("ERROR")  # of functions made in a loop
    if tf.config.threading.get_intra_op_parallelism_threads() != 1:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    readers = {
        "JPEG": tf.io.decode_jpeg,
        "PNG": tf.io.decode_png,
        "WebP": getattr(tf.io, "decode_webp", None),
    }
    if (read := readers[form]) is None:
        return {}

    def decoder(method: str, **options: Any) -> Decoder:
        @tf.function  # type: ignore[untyped-decorator,unused-ignore]
        def decode(encoded: Any) -> Any:
            pixels = read(encoded, channels=3, **options)
            pixels = pixels[0] if form == "WebP" else pixels  # frames
            return tf.cast(tf.round(tf.image.resize(pixels, (side_px, side_px), method)), tf.uint8)

        return lambda encoded: decode(tf.constant(encoded)).numpy()

    plain = {"tf area": decoder("area"), "tf bilinear": decoder("bilinear")}
    return plain | {f"tf/{r} area": decoder("area", ratio=r) for r in (2, 4)} if form == "JPEG" else plain


SOURCES = (ours, with_pillow, with_opencv, with_tensorflow)


def files(form: str, width: int, height: int) -> list[bytes]:
    """One for each photo."""
    return [_file(photo(name), form, width, height) for name in (PHOTOS if width < 4000 else LARGE_PHOTOS)]


def _file(whole: Image.Image, form: str, width: int, height: int) -> bytes:
    scale = 0.9999 * min(whole.width / width, whole.height / height)
    left, upper = (whole.width - width * scale) / 2, (whole.height - height * scale) / 2
    box = (left, upper, left + width * scale, upper + height * scale)
    file = io.BytesIO()
    whole.resize((width, height), Image.Resampling.LANCZOS, box=box).save(file, form, **SAVED_WITH[form])
    return file.getvalue()


def microseconds(contenders: dict[str, Decoder], encoded: list[bytes], rounds: int) -> dict[str, float]:
    """Of the processor, each contender's median over files and rounds."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for one in encoded * rounds:
        for name, decode in contenders.items():
            decode(one)  # or it would pay for the memory and the caches that the one before has left
            started = time.process_time_ns()
            decode(one)
            found[name].append((time.process_time_ns() - started) / 1e3)
    return {name: float(np.median(times)) for name, times in found.items()}


def worst_psnr_db(contenders: dict[str, Decoder], encoded: list[bytes], side_px: int) -> dict[str, float]:
    """Of each contender, against a full decode and exact area means."""
    worst = dict.fromkeys(contenders, np.inf)
    for one in encoded:
        exact = exact_area(np.asarray(_rgb(one)), (side_px, side_px))
        for name, decode in contenders.items():
            worst[name] = min(worst[name], psnr_db(decode(one), exact))
    return worst


def best_ratio(times: dict[str, float], truth: dict[str, float]) -> float:
    """The time of the fastest rival that is as true as we are, over ours; nan where there is none."""
    wanted = min(truth["ours"] - AS_TRUE_DB, ROUNDED_DB)
    rivals = [times[name] for name in times if name != "ours" and truth[name] >= wanted]
    return min(rivals) / times["ours"] if rivals else np.nan


def lines(rounds: int) -> Iterator[str]:
    """The table, a case at a time: a line for each contender."""
    yield f"{'file':17} {'S':>3}  {'contender':12} {'us':>7} {'dB':>6}  best rival / ours"
    for form, width, height in CASES:
        encoded = files(form, width, height)
        for side_px in SIDES_PX:
            found = {source: source(form, side_px) for source in SOURCES}
            named = {name: decode for some in found.values() for name, decode in some.items()}
            contenders = {n: d for n, d in named.items() if _leaves_enough(n, min(width, height), side_px)}
            truth = worst_psnr_db(contenders, encoded, side_px)
            times = microseconds(contenders, encoded, rounds)
            for name in contenders:
                case = f"{form} {width}x{height}"
                ratio = f"{best_ratio(times, truth):.2f}" if name == "ours" else ""
                figures = f"{times[name]:7.0f} {truth[name]:6.1f}"
                yield f"{case:17} {side_px:3}  {name:12} {figures}  {ratio}".rstrip()
            for source in (source for source, some in found.items() if not some):
                name = source.__name__.removeprefix("with_")
                yield f"{form} {width}x{height} {side_px}  {name} is not installed, or cannot read {form}"


def _leaves_enough(name: str, shorter_px: int, side_px: int) -> bool:
    """Whether a contender that is named after its divisor still has S pixels to choose from."""
    _, slash, rest = name.partition("/")
    return not slash or shorter_px // int(rest[0]) >= side_px


def machine() -> str:
    """Date, processor, how busy it is, and the versions of what is compared."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    now, load = datetime.now(UTC), os.getloadavg()[0]
    return (
        f"{now:%Y-%m-%d %H:%M} UTC; {models[0].partition(': ')[2] if models else platform.processor()}, "
        f"{os.cpu_count()} cores, load {load:.1f}; Python {platform.python_version()}, {', '.join(found)}; "
        f"libjpeg-turbo {features.version('libjpeg_turbo')}, libwebp {features.version('webp')}, "
        f"zlib of Pillow {features.version('zlib')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each file is timed")
    options = parser.parse_args()
    print(machine(), flush=True)
    for line in lines(options.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
