"""Encoded image bytes to RGB pixels at a backbone's input size, or the reason why not; not for scaling pixel values.

Shape letters: S the side of the square that a backbone takes, 3 the channels R, G, B.

The recipe, in order (DECODE_VERSION stands for all of it):

1.  JPEG, PNG, WebP, GIF, BMP and TIFF, told apart by their first bytes; the first frame or page of each.
2.  More pixels than the limit, by the header: refused before any is decoded.
3.  A JPEG is decoded at 1/2, 1/4 or 1/8 where that cannot be seen (see below).
4.  To 8 bits: 16-bit grey is divided by 257 and rounded; palettes and CMYK become RGB; alpha is laid on white.
    CMYK and YCCK JPEGs are taken as inverted, as Adobe writes them. Colour profiles are not applied.
5.  Turned upright by its orientation (EXIF, or XMP where EXIF has none); one that cannot be read is upright.
6.  Resized: `stretch` both sides to S; `letterbox` fits the whole image in, centred, on black (as
    tf.image.resize_with_pad and Keras' pad_to_aspect_ratio do; an odd row goes below, an odd column right);
    `center_crop` takes the central square, whose side is the image's shorter one (an odd pixel is lost on the right
    or below). An axis that shrinks is averaged over exact areas, pixels on a border counted in part; one that grows
    is interpolated linearly.

Resizing is on the pixels as they are stored; the small image is turned. Means are `area_means`', lines are OpenCV's
(INTER_LINEAR). Reduced JPEGs end inside their last column and row, and squares of them may begin inside a pixel: such
a pixel counts in part.

Reduced JPEGs. The demand: 40 dB PSNR against a full decode and exact area means of the same file. Where a target pixel
covers at least 3.6, 8.7 or 18.5 pixels of the full image on both sides, libjpeg decodes at 1/2, 1/4 or 1/8 (1/d). dB,
worst and median of 12 files (six photos of scikit-image and scikit-learn, cropped and enlarged to that size; quality 75
4:2:0 and 92 4:4:4), stretched, by OpenCV's area means; inf: every pixel. Pillow 13.0.0, libjpeg-turbo 3.2.0,
OpenCV 5.0.0, 2026-11-22:

    JPEG         S    d   worst median    JPEG         S    d   worst median
    500x375      96   2   40.8  46.2      1920x1080    96   4   48.4  53.6
    500x375     160   1    inf   inf      1920x1080   160   2   53.4  57.0
    500x375     224   1   95.1   inf      1920x1080   224   2   48.9  54.4
    1280x960     96   4   43.3  48.4      4000x3000    96   8   49.2  53.5
    1280x960    160   2   54.5  56.9      4000x3000   160   8   44.4  48.8
    1280x960    224   2   44.7  50.6      4000x3000   224   4   50.1  54.7

Of photos with detail in every pixel (500x375 to 800x600) the worst file is at 40.3 from 3.6 on (39.5 at 3.4), at 41.2
from 8.7 on (38.9 at 8.1), and of 800x600 at 40.1 from 18.5 on (39.3 at 18.25). Below 600 pixels (S below 32) an eighth
has 38.5.

Shortcuts. Most files are a JPEG without EXIF or XMP, or a WebP of one lossy frame. Their headers are read here, and
libjpeg (by Pillow) or libwebp (the one that Pillow is linked to) gets the whole file at once. What is not of that sort,
or does not decode, goes through Pillow's file classes, which know what is wrong with it. The pixels are the same, bit
for bit. tests/benchmarks/decoding.py compares other libraries.

Tried and left out (same day): TurboJPEG's fast upsampling, which saves 100 us at 500x375, at 45 dB; Pillow's BOX, which
takes whole pixels only: 33 to 37 dB at 500x375.

Memory. Of images above LARGE_IMAGE_PIXELS (as libjpeg decodes them) one at a time is decoded in a process, however many
threads there are; the others wait for their turn. A rejection holds nothing of the image it is about. At its peak a
decode takes, per pixel of the file and besides the encoded bytes: JPEG 0.1 bytes (decoded at 1/8) to 8 (progressive,
CMYK); PNG RGB 4, turned or not, grey of 16 bits 11, RGBA 8, with a clear colour 13; GIF and palettes 5 to 10; TIFF 4 to
11; WebP 3 by the shortcut, else 16 to 20, the worst with alpha. (Largest resident size of a process, 32 megapixels,
S = 224, on 2026-11-22.)
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import re
import struct
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engine.schema import RejectReason

DECODE_VERSION = 2
"""Stands for the recipe above and is part of the fingerprint: raise it with any change that moves a pixel by more than
rounding. Builds of Pillow, libjpeg, OpenCV and LLVM may differ by a bit in the last place; no version and no canary
covers that (the canary is about the network, and is fed pixels)."""

LARGE_IMAGE_PIXELS = 32_000_000
"""Images with more, as they are decoded, take turns: threads that meet several of them need the memory of one."""

Resize = Literal["stretch", "letterbox", "center_crop"]

_WHITE = (255, 255, 255)

# Full pixels per target pixel, on each side, from which libjpeg may decode at 1/divisor; the table above says why.
_REDUCTIONS = ((18.5, 8), (8.7, 4), (3.6, 2))

_LARGE_IMAGE_TURN = threading.Lock()

# Pillow takes memory for an image in blocks. Only an image of one block shows itself to others without a copy, so: the
# most that Pillow takes, 536 megapixels of RGB (a block is no larger than its image). With Pillow's own 16 MiB glibc
# also kept the freed blocks in the heap of the thread that had its turn: eight threads that decoded 40-megapixel PNGs
# in turns held 1,546 MB, with 64 MiB 386. More than 32 MiB always goes back at once (M_MMAP_THRESHOLD in mallopt(3)).
_PILLOW_BLOCK_BYTES = 2**31 - 4096

cv2.setNumThreads(1)  # the callers' threads are the only ones

_Opener = Callable[[io.BytesIO], ImageFile.ImageFile]
_Size = tuple[int, int]  # width, height
_Box = tuple[float, float, float, float]  # left, upper, right, lower

# Pillow's classes themselves, not Image.open: that hides a broken header behind "cannot identify", warns, reads
# multi-picture JPEGs with another class, and imports forty more plugins for a WebP or TIFF.
_FORMATS: tuple[tuple[bytes, str, _Opener], ...] = (
    (b"\xff\xd8\xff", "JPEG", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
    (b"RIFF....WEBP", "WebP", WebPImageFile),
    (b"GIF87a", "GIF", GifImageFile),
    (b"GIF89a", "GIF", GifImageFile),
    (b"II*\0", "TIFF", TiffImageFile),
    (b"MM\0*", "TIFF", TiffImageFile),
    (b"II+\0", "TIFF", TiffImageFile),  # BigTIFF
    (b"MM\0+", "TIFF", TiffImageFile),
    (b"BM", "BMP", BmpImageFile),
)

# What Pillow 13 raises for bytes that it cannot decode. Not MemoryError: that is this machine's state, and a machine
# short of memory must not write a reject that a retry would not give; `max_pixels` keeps the bytes from causing it.
_BAD_BYTES = (
    OSError,  # "image file is truncated", decoder errors
    SyntaxError,  # a plugin's "this is not mine": broken headers and chunks, and whatever else its header code raises
    ValueError,  # sizes and tiles that make no sense; PNG text and profiles that unpack to too much; bad Unicode
    EOFError,  # a WebP without its first frame
    LookupError,  # PNG chunks that are too short behind the pixels; EXIF tags that are missing
    TypeError,  # TIFF palettes and EXIF values of another type than they should be
    ArithmeticError,  # TIFF tiles wider than a C integer; EXIF fractions over zero
    struct.error,  # EXIF that ends inside a number
)

# Pillow's words for files that are in order but of a sort that it does not decode.
_UNSUPPORTED_WORDS = ("cannot handle", "Unsupported BMP", "unknown pixel mode", "not yet supported")

_TIFF_TYPE_BYTES = {  # all others: 1
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
_TIFF_PLACES = ((273, 324), (279, 325))  # tags of strips and tiles: their offsets, their byte counts
_NO_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as filterwarnings() writes it down
_FLIPPED_X = (2, 3, 6, 7)  # orientations that bring the last stored column (or row) to the left side
_FLIPPED_Y = (3, 4, 7, 8)
_ORIENTATION_TAG = 0x0112  # EXIF 2.32, section 4.6.4

_JPEG_SEGMENT = struct.Struct(">HH")  # marker, length
_JPEG_FRAME = struct.Struct(">BHHB")  # bits, height, width, layers
_JPEG_MODES = {1: "L", 3: "RGB"}  # by layers
_START_OF_FRAME = (0xFFC0, 0xFFC1, 0xFFC2)  # sequential and progressive, with Huffman codes
_START_OF_SCAN = 0xFFDA
_STEPPED_OVER = (0xFFC4, 0xFFDD, 0xFFFE)  # Huffman tables, restart interval, comment
_QUANTIZATION_TABLES, _APP0, _APP2, _APP14 = 0xFFDB, 0xFFE0, 0xFFE2, 0xFFEE
_WEBP_HEADER = struct.Struct("<4xI8xI6xHH")  # bytes of the file, of the frame; width, height


@final
@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image as the backbone sees it, and how large it was."""

    pixels_SS3: np.ndarray
    """uint8, shape (S, S, 3), RGB."""
    width_px: int
    """Of the whole upright image before resizing."""
    height_px: int
    """Likewise."""


@final
class ImageRejected(Exception):
    """Bytes that cannot become pixels.

    Args:
        reason: one of unsupported_format, truncated_image, corrupt_image, too_many_pixels, empty_sample.
        message: a sentence, the same for the same bytes.
    """

    def __init__(self, reason: RejectReason, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def decode_image(encoded: bytes, side_px: int, resize: Resize, max_pixels: int) -> DecodedImage:
    """Decode one image and resize it to a square; safe to call from several threads at once.

    Waits while another thread decodes an image above LARGE_IMAGE_PIXELS, if this one is above it too.

    Args:
        encoded: any bytes.
        side_px: S, the side of the square.
        resize: how the image is made square.
        max_pixels: width x height above which nothing is decoded.

    Returns:
        Pixels, uint8, shape (S, S, 3), and the image's full size.

    Raises:
        ImageRejected: for these bytes there are no pixels, now or ever.
        MemoryError: this machine is too small for max_pixels.
    """
    name, opener = _identified(encoded)
    _prepare_pillow(max_pixels)
    if plain := _by_shortcut(name, encoded, side_px, resize, max_pixels):
        return _decoded(plain, side_px, resize)
    with contextlib.ExitStack() as turn:
        try:
            stored = _loaded(opener(io.BytesIO(encoded)), side_px, resize, max_pixels, turn)
        except ImageRejected as rejected:
            reason, words = rejected.reason, rejected.message
        except Image.DecompressionBombError:
            reason = RejectReason.TOO_MANY_PIXELS
            words = f"the header of this {name} announces more pixels than limits.max_pixels, {max_pixels:,}"
        except _BAD_BYTES as error:
            reason, words = _reason(name, encoded, error), f"{name}: {_words(error)}"
        else:
            return _decoded(stored, side_px, resize)
    # Not inside `except`: the error there holds the frames it came through, and they the half-decoded image.
    raise ImageRejected(reason, words)


def fitted_size(width_px: int, height_px: int, side_px: int) -> tuple[int, int]:
    """Width and height of an image that was fitted whole into a square, as `letterbox` does; rounded, half up."""
    longer = max(width_px, height_px)
    width, height = (max(1, (2 * edge * side_px + longer) // (2 * longer)) for edge in (width_px, height_px))
    return width, height


class _Stored(NamedTuple):
    """All that comes from the bytes; what is done with it afterwards cannot fail on them."""

    pixels: np.ndarray
    """uint8, shape (height, width) of grey, (height, width, 3) of RGB, or 4 of RGB and a byte that means nothing."""
    full_size: _Size
    """Before libjpeg's reduction, and not turned yet."""
    reduction: int
    """Full pixels per pixel of the array, on each side; 1, 2, 4 or 8. Its last column and row are rounded up."""
    orientation: int
    """1 to 8, as EXIF counts."""


def _identified(encoded: bytes) -> tuple[str, _Opener]:
    """Name and opener of the format that the first bytes announce."""
    if not encoded:
        raise ImageRejected(RejectReason.EMPTY_SAMPLE, "there are no bytes")
    head = encoded[:4] + b"...." + encoded[8:12] if encoded.startswith(b"RIFF") else encoded[:12]
    for signature, name, opener in _FORMATS:
        if head.startswith(signature):
            return name, opener
    if any(signature.startswith(head) for signature, _, _ in _FORMATS):
        raise ImageRejected(RejectReason.TRUNCATED_IMAGE, f"there are only {len(encoded)} bytes")
    words = f"it begins with {encoded[:12]!r}; decoded are JPEG, PNG, WebP, GIF, BMP and TIFF"
    raise ImageRejected(RejectReason.UNSUPPORTED_FORMAT, words)


def _prepare_pillow(max_pixels: int) -> None:
    """Keep Pillow quiet, its blocks large, and its own limit (which some formats apply before we see a size) no lower
    than ours.

    All are settings of the process. They are only ever widened, so threads do not disturb each other; catching
    warnings around each call would (`warnings.catch_warnings` is not thread-safe before Python 3.14).
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)  # Pillow warns above it, and refuses above twice that
    pillow: Any = Image.core  # type: ignore[attr-defined]  # documented, but without types
    if pillow.get_block_size() < _PILLOW_BLOCK_BYTES:
        pillow.set_block_size(_PILLOW_BLOCK_BYTES)
    if list(warnings.filters[:1]) != [_NO_WARNINGS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _loaded(
    image: ImageFile.ImageFile, side_px: int, resize: Resize, max_pixels: int, turn: contextlib.ExitStack
) -> _Stored:
    """The image's pixels; `turn` is what a large one keeps until its pixels are no longer needed."""
    width, height = image.size
    if width * height > max_pixels:
        words = f"{width:,} x {height:,} pixels are more than limits.max_pixels, {max_pixels:,}"
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, words)
    divisor = _divisor(image.size, side_px, resize) if isinstance(image, JpegImageFile) else 1
    if divisor > 1:
        image.draft(None, (width // divisor, height // divisor))
    if image.width * image.height > LARGE_IMAGE_PIXELS:
        turn.enter_context(_LARGE_IMAGE_TURN)
    image.load()
    if divisor == 1:
        width, height = image.size  # Pillow turns a TIFF upright while it loads it
    orientation = _orientation(image)
    return _Stored(_pixels(_flattened(image)), (width, height), divisor, orientation)


def _divisor(size: _Size, side_px: int, resize: Resize) -> int:
    """1, 2, 4 or 8: libjpeg may decode at 1/divisor, as the result stays large enough."""
    (target_width, target_height), (left, upper, right, lower) = _placement(size, side_px, resize)
    shrink = min((right - left) / target_width, (lower - upper) / target_height)
    return next((divisor for least, divisor in _REDUCTIONS if shrink >= least), 1)


def _by_shortcut(name: str, encoded: bytes, side_px: int, resize: Resize, max_pixels: int) -> _Stored | None:
    """The same image as `_loaded` gives, sooner, of a file that is like most; None where that has to look at it."""
    if name == "JPEG":
        return _plain_jpeg(encoded, side_px, resize, max_pixels)
    return _plain_webp(encoded, max_pixels) if name == "WebP" else None


def _plain_jpeg(encoded: bytes, side_px: int, resize: Resize, max_pixels: int) -> _Stored | None:
    """Of a JPEG that needs no turning, is whole and within the limits."""
    if (header := _plain_jpeg_header(encoded)) is None:
        return None
    mode, (width, height) = header
    divisor = _divisor((width, height), side_px, resize)
    reduced = -(-width // divisor), -(-height // divisor)
    if width * height > max_pixels or reduced[0] * reduced[1] > LARGE_IMAGE_PIXELS:
        return None
    image = Image.new(mode, reduced, None)
    try:
        # What JpegImageFile.load() does, which hands over 64 KiB at a time.
        image.frombytes(encoded, "jpeg", (mode, "", divisor, 0))
    except (ValueError, OSError):
        return None
    return _Stored(_pixels(image), (width, height), divisor, 1)


def _plain_jpeg_header(encoded: bytes) -> tuple[str, _Size] | None:
    """Mode and size, if the segments before the first scan are such that Pillow reads the same from them.

    Without APP1, where EXIF and XMP are, a JPEG is upright. Source: ITU-T T.81, annex B.
    """
    header, at = None, 2
    while at + 4 <= len(encoded):
        marker, length = _JPEG_SEGMENT.unpack_from(encoded, at)
        if marker == _START_OF_SCAN:
            return header
        if marker in _START_OF_FRAME and header is None and len(encoded) >= at + 10:
            bits, height, width, layers = _JPEG_FRAME.unpack_from(encoded, at + 4)
            mode = _JPEG_MODES.get(layers)
            if mode is None or bits != 8 or not width or not height or length != 8 + 3 * layers:
                return None
            header = mode, (width, height)
        elif length < 2 or not _is_plain(marker, encoded[at + 4 : at + 2 + length]):
            return None
        at += 2 + length
    return None


def _is_plain(marker: int, body: bytes) -> bool:
    """Whether JpegImageFile steps over such a segment, or reads it and cannot fail."""
    if marker in _STEPPED_OVER:
        return True
    if marker == _QUANTIZATION_TABLES:  # of 8 bits
        return len(body) % 65 == 0 and all(first < 16 for first in body[::65])
    if marker == _APP0:
        return len(body) >= 14  # as long as JFIF's
    if marker == _APP2:
        return len(body) >= 14 and body.startswith(b"ICC_PROFILE\0")
    return marker == _APP14 and len(body) >= 12 and body.startswith(b"Adobe")


def _plain_webp(encoded: bytes, max_pixels: int) -> _Stored | None:
    """Of a lossy WebP that holds one frame and nothing else: no alpha, no EXIF, no animation.

    Pillow 13 decodes each WebP as an animation, on a canvas with alpha of which it makes copies. Source: RFC 9649.
    """
    if _WEBP_DECODE is None or len(encoded) < 30:
        return None
    if encoded[12:16] != b"VP8 " or encoded[23:26] != b"\x9d\x01\x2a":
        return None
    file_bytes, frame_bytes, width, height = _WEBP_HEADER.unpack_from(encoded)
    width, height = width & 0x3FFF, height & 0x3FFF
    if not 8 + file_bytes == 20 + frame_bytes + frame_bytes % 2 == len(encoded):
        return None
    if not 0 < width * height <= min(max_pixels, LARGE_IMAGE_PIXELS):
        return None
    pixels_HW3 = np.empty((height, width, 3), np.uint8)
    if not _WEBP_DECODE(encoded, len(encoded), pixels_HW3.ctypes.data, pixels_HW3.nbytes, 3 * width):
        return None
    return _Stored(pixels_HW3, (width, height), 1, 1)


def _webp_decode() -> Callable[..., int | None] | None:
    """WebPDecodeRGBInto of the libwebp that Pillow's module is linked to; None where it does not show its symbols."""
    try:
        from PIL import _webp

        decode = ctypes.CDLL(_webp.__file__).WebPDecodeRGBInto
    except (ImportError, OSError, AttributeError):
        return None
    decode.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    decode.restype = ctypes.c_void_p
    return decode


_WEBP_DECODE = _webp_decode()


def _orientation(image: ImageFile.ImageFile) -> int:
    """1 to 8, as EXIF counts; 1 where there is none that can be read: a broken note does not spoil the picture."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _BAD_BYTES:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _flattened(image: ImageFile.ImageFile) -> Image.Image:
    """The image as 8-bit grey (mode L) or RGB, without alpha."""
    if image.mode.startswith("I;16"):
        return _grey_of_16_bits(image)
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"):
        words = f"pixels of mode {image.mode} (signed, 32-bit, float or Lab) have no fixed range to show"
        raise ImageRejected(RejectReason.UNSUPPORTED_FORMAT, words)
    if image.has_transparency_data:
        rgba = _in_mode(image.convert("LA") if image.mode == "La" else image, "RGBA")
        on_white = Image.new("RGB", rgba.size, _WHITE)
        on_white.paste(rgba, mask=rgba.getchannel("A"))
        return on_white
    return _in_mode(image, "L" if image.mode in ("1", "L") else "RGB")


def _grey_of_16_bits(image: ImageFile.ImageFile) -> Image.Image:
    """Divided by 257 and rounded: 0 stays 0, 65,535 becomes 255. The value that a PNG calls clear becomes white."""
    if isinstance(image, TiffImageFile) and (image.tag_v2.get(258) == (12,) or image.tag_v2.get(262) == 0):
        words = "a grey TIFF of 12 bits, or of 16 where 0 is white, comes from Pillow without its scale"
        raise ImageRejected(RejectReason.UNSUPPORTED_FORMAT, words)
    deep = np.asarray(image).astype(np.uint16)
    quotient, rest = np.divmod(deep, np.uint16(257))
    grey = (quotient + (rest > 128)).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        grey[deep == clear] = 255
    return Image.fromarray(grey)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converted, without the copy that convert() makes where there is nothing to do."""
    return image if image.mode == mode else image.convert(mode)


def _pixels(image: Image.Image) -> np.ndarray:
    """Of mode L or RGB: uint8, shape (height, width) or (height, width, 4). Pillow's own memory where it shows that."""
    try:
        shown = pa.array(image)  # by Arrow's C interface
    except ValueError:  # of more than one block
        return np.asarray(image)
    values: np.ndarray = (shown if image.mode == "L" else shown.flatten()).to_numpy()
    return values.reshape(image.height, image.width, *(() if image.mode == "L" else (4,)))


def _decoded(stored: _Stored, side_px: int, resize: Resize) -> DecodedImage:
    """Resized as it is stored, then turned: the small image is the cheaper one to turn."""
    is_turned = stored.orientation >= 5
    upright_size = stored.full_size[::-1] if is_turned else stored.full_size
    target, box = _placement(upright_size, side_px, resize)
    left, upper, right, lower = (
        edge / stored.reduction for edge in _box_as_stored(box, upright_size, stored.orientation)
    )
    fitted = _resized(stored.pixels, target[::-1] if is_turned else target, (left, upper, right, lower))
    fitted = fitted.swapaxes(0, 1) if is_turned else fitted
    fitted = fitted[:, ::-1] if stored.orientation in _FLIPPED_X else fitted
    fitted = fitted[::-1] if stored.orientation in _FLIPPED_Y else fitted
    return DecodedImage(_padded(fitted, side_px), *upright_size)


def _padded(fitted: np.ndarray, side_px: int) -> np.ndarray:
    """RGB, shape (S, S, 3), a new array: in the middle of black where it does not fill the square."""
    height, width = fitted.shape[:2]
    upper, left = (side_px - height) // 2, (side_px - width) // 2
    make = np.empty if (height, width) == (side_px, side_px) else np.zeros
    square_SS3 = make((side_px, side_px, 3), np.uint8)
    square_SS3[upper : upper + height, left : left + width] = (
        fitted[..., None] if fitted.ndim == 2 else fitted[..., :3]
    )
    return square_SS3


def _placement(size: _Size, side_px: int, resize: Resize) -> tuple[_Size, _Box]:
    """The size that the image, or its part in the box, is brought to; and that box, in pixels of the full image."""
    width, height = size
    if resize == "center_crop":
        side = min(size)
        left, upper = (width - side) // 2, (height - side) // 2
        return (side_px, side_px), (left, upper, left + side, upper + side)
    if resize == "letterbox":
        return fitted_size(width, height, side_px), (0, 0, width, height)
    return (side_px, side_px), (0, 0, width, height)


def _box_as_stored(box: _Box, upright_size: _Size, orientation: int) -> _Box:
    """Where a box of the upright image is in the one that is not turned yet."""
    left, upper, right, lower = box
    if orientation in _FLIPPED_X:
        left, right = upright_size[0] - right, upright_size[0] - left
    if orientation in _FLIPPED_Y:
        upper, lower = upright_size[1] - lower, upright_size[1] - upper
    return (upper, left, lower, right) if orientation >= 5 else (left, upper, right, lower)


def _resized(pixels: np.ndarray, target: _Size, box: _Box) -> np.ndarray:
    """Bring the part in the box to the target size, each axis by its own rule; the shrinking one first.

    Only of a reduced JPEG has the box edges inside pixels; both axes of that shrink.
    """
    left, upper, right, lower = box
    width, height = right - left, lower - upper
    part = pixels[math.floor(upper) : math.ceil(lower), math.floor(left) : math.ceil(right)]
    if part.shape[:2] == (height, width) == target[::-1]:
        return part
    if width >= target[0] or height >= target[1]:
        from engine.area_means import area_means  # compiles

        part = area_means(
            pixels, (min(target[0], math.floor(width)), min(target[1], math.floor(height))), box
        )
        if part.shape[:2] == target[::-1]:
            return part
    elif part.shape[2:] == (4,):
        part = cv2.cvtColor(part, cv2.COLOR_RGBA2RGB)
    return cv2.resize(part, target, interpolation=cv2.INTER_LINEAR)


def _reason(name: str, encoded: bytes, error: Exception) -> RejectReason:
    """Truncated if the file lacks what its own format says comes last, whatever Pillow stumbled over."""
    if _ends_early(name, encoded, error):
        return RejectReason.TRUNCATED_IMAGE
    if any(words in str(error) for words in _UNSUPPORTED_WORDS):
        return RejectReason.UNSUPPORTED_FORMAT
    return RejectReason.CORRUPT_IMAGE


def _words(error: Exception) -> str:
    """What Pillow said; where that is only a value, also what sort of error it was."""
    text = str(error)[:200]
    return text if " " in text else f"{type(error.__cause__ or error).__name__} {text}".rstrip()


def _ends_early(name: str, encoded: bytes, error: Exception) -> bool:
    if name == "JPEG":  # no end of image behind the last start of scan (a thumbnail in the header has both)
        return encoded.rfind(b"\xff\xd9") <= encoded.rfind(b"\xff\xda")
    if name == "PNG":
        return b"IEND" not in encoded
    if name == "WebP":  # RIFF counts the bytes behind its own size
        return len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")
    if name == "BMP":
        return len(encoded) < max(26, int.from_bytes(encoded[2:6], "little"))  # 26: the smallest header
    if name == "TIFF":
        return len(encoded) < _tiff_bytes(encoded)
    return not encoded.endswith(b";") or "truncated" in str(error)  # GIF: no trailer


def _tiff_bytes(encoded: bytes) -> int:
    """How long a TIFF is at least: to the end of its first directory, and of the values and pixels that it points to.

    Source: TIFF 6.0, section 2; BigTIFF has the same parts with 64-bit numbers.
    """
    order, is_big = "<" if encoded.startswith(b"II") else ">", b"+" in encoded[2:4]
    entry, count_format, word = ("HHQQ", "Q", "Q") if is_big else ("HHLL", "H", "L")
    try:
        (begin,) = struct.unpack_from(order + word, encoded, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + count_format, encoded, begin)
        first, size = begin + struct.calcsize(order + count_format), struct.calcsize(order + entry)
        entries = [struct.unpack_from(order + entry, encoded, first + n * size) for n in range(count)]
    except (struct.error, OverflowError):  # the directory itself is not all there
        return len(encoded) + 1
    widths = {tag: (_TIFF_TYPE_BYTES.get(kind, 1) * number, value) for tag, kind, number, value in entries}
    ends = [value + width for width, value in widths.values() if width > struct.calcsize(order + word)]
    return int(max([first + count * size, *ends, *_tiff_pixel_ends(encoded, begin)]))


def _tiff_pixel_ends(encoded: bytes, directory_offset: int) -> list[int]:
    """Where each strip or tile ends."""
    stream = io.BytesIO(encoded)
    stream.seek(directory_offset)
    try:
        directory = ImageFileDirectory_v2(encoded[:16] if b"+" in encoded[2:4] else encoded[:8])
        directory.load(stream)
        offsets, counts = (directory.get(strip) or directory.get(tile) or () for strip, tile in _TIFF_PLACES)
        return [int(offset) + int(count) for offset, count in zip(offsets, counts, strict=False)]
    except _BAD_BYTES:
        return []
