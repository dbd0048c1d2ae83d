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
    or below). An axis that shrinks is averaged over area, one that grows is interpolated linearly.

Reduced JPEGs. The demand: 40 dB PSNR against a full decode and an area resize (Pillow's BOX) of the same file.
Where a target pixel covers at least 10, 12 or 20 pixels of the full image on both sides, libjpeg decodes at 1/2, 1/4
or 1/8 (1/d) and Pillow's HAMMING does the rest. dB, worst and median of 12 files (six photos of scikit-image and
scikit-learn, cropped and enlarged to that size; quality 75 4:2:0 and 92 4:4:4), stretched; Pillow 13.0.0 with
libjpeg-turbo 3.2.0:

    JPEG         S    d   against BOX     against exact area means (the 6 of quality 92)
    500x375      96   1   equal           39.8  42.7
    500x375     160   1   equal           37.0  40.5
    500x375     224   1   equal           33.4  38.9
    1280x960     96   2   41.1  47.0      41.5  47.5
    1280x960    160   1   equal           56.2  56.3
    1280x960    224   1   equal           42.2  47.3
    1920x1080    96   2   41.3  46.9      41.7  47.2
    1920x1080   160   1   equal           47.3  52.3
    1920x1080   224   1   equal           43.8  49.5
    4000x3000    96   8   41.3  47.1      41.4  47.1
    4000x3000   160   4   43.8  49.5      44.0  49.7
    4000x3000   224   4   45.2  50.0      46.3  51.0

Just above 10, 12 and 20 the worst file (china, S = 96) is at 40.2 to 40.3. Were reduction to begin at 6, 8 and 16 it
would be at 37.7; with BOX instead of HAMMING at 37.4 just above 10. Where d is 1 the last column is BOX's own doing:
it takes whole pixels only. Between 4 and 10, d = 2 would save 40 % of the time of a 1920x1080 file, 3 dB too low.

Memory. Of images above LARGE_IMAGE_PIXELS (as libjpeg decodes them) one at a time is decoded in a process, however many
threads there are; the others wait for their turn. A rejection holds nothing of the image it is about. At its peak a
decode takes, per pixel of the file and besides the encoded bytes: JPEG 0.1 bytes (decoded at 1/8) to 8 (progressive,
CMYK, turned); PNG RGB 4, turned 8, grey of 16 bits 11, RGBA turned 12, with a clear colour 13; GIF and palettes 5 to
10; TIFF 4 to 11; WebP 16 to 20, the worst with alpha and turned. (Largest resident size of a process, 32 megapixels,
S = 224, on 2026-11-22.)
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np
from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from engine.schema import RejectReason

DECODE_VERSION = 1
"""Stands for the recipe above and is part of the fingerprint: raise it with any change that moves a pixel by more than
rounding. Builds of Pillow and libjpeg may differ by a bit in the last place; no version and no canary covers that (the
canary is about the network, and is fed pixels)."""

LARGE_IMAGE_PIXELS = 32_000_000
"""Images with more, as they are decoded, take turns: threads that meet several of them need the memory of one."""

Resize = Literal["stretch", "letterbox", "center_crop"]

_LETTERBOX_FILL = (0, 0, 0)
_WHITE = (255, 255, 255)

# Full pixels per target pixel, on each side, from which libjpeg may decode at 1/divisor; the table above says why.
_REDUCTIONS = ((20.0, 8), (12.0, 4), (10.0, 2))

_LARGE_IMAGE_TURN = threading.Lock()

# Pillow takes memory for an image in blocks. With its own 16 MiB glibc keeps the freed blocks in the heap of the thread
# that had its turn: eight threads that decode 40-megapixel PNGs in turns held 1,546 MB, with this 386, one thread 381.
# More than 32 MiB always goes back at once (M_MMAP_THRESHOLD in mallopt(3)).
_PILLOW_BLOCK_BYTES = 64 * 2**20

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

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_TYPE_BYTES = {  # all others: 1
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
_TIFF_PLACES = ((273, 324), (279, 325))  # tags of strips and tiles: their offsets, their byte counts
_NO_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # as filterwarnings() writes it down
_ROUNDED_ON_LEFT = (2, 3, 6, 7)  # orientations that bring the last stored column (or row) to the left side
_ROUNDED_ON_TOP = (3, 4, 7, 8)
_ORIENTATION_TAG = 0x0112  # EXIF 2.32, section 4.6.4


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
    with contextlib.ExitStack() as turn:
        try:
            upright = _loaded(opener(io.BytesIO(encoded)), side_px, resize, max_pixels, turn)
        except ImageRejected as rejected:
            reason, words = rejected.reason, rejected.message
        except Image.DecompressionBombError:
            reason = RejectReason.TOO_MANY_PIXELS
            words = f"the header of this {name} announces more pixels than limits.max_pixels, {max_pixels:,}"
        except _BAD_BYTES as error:
            reason, words = _reason(name, encoded, error), f"{name}: {_words(error)}"
        else:
            return DecodedImage(np.asarray(_squared(upright, side_px, resize)), *upright.full_size)
    # Not inside `except`: the error there holds the frames it came through, and they the half-decoded image.
    raise ImageRejected(reason, words)


class _Upright(NamedTuple):
    """All that comes from the bytes; what is done with it afterwards cannot fail on them."""

    image: Image.Image
    """Mode L or RGB."""
    full_size: _Size
    """Before libjpeg's reduction."""
    reduction: int
    """Full pixels per pixel of the image, on each side; 1, 2, 4 or 8."""
    origin: tuple[float, float]
    """Where the full image begins in the reduced one, whose last column and row are rounded up to whole pixels."""


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
) -> _Upright:
    """The image upright; `turn` is what a large one keeps until its pixels are no longer needed."""
    width, height = image.size
    if width * height > max_pixels:
        words = f"{width:,} x {height:,} pixels are more than limits.max_pixels, {max_pixels:,}"
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, words)
    divisor = _reduce_jpeg(image, side_px, resize) if isinstance(image, JpegImageFile) else 1
    if image.width * image.height > LARGE_IMAGE_PIXELS:
        turn.enter_context(_LARGE_IMAGE_TURN)
    image.load()
    if divisor == 1:
        width, height = image.size  # Pillow turns a TIFF upright while it loads it
    orientation = _orientation(image)
    if orientation >= 5:
        width, height = height, width
    flat = _flattened(image)
    upright = flat.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else flat
    origin_x = upright.width - width / divisor if orientation in _ROUNDED_ON_LEFT else 0
    origin_y = upright.height - height / divisor if orientation in _ROUNDED_ON_TOP else 0
    return _Upright(upright, (width, height), divisor, (origin_x, origin_y))


def _reduce_jpeg(image: JpegImageFile, side_px: int, resize: Resize) -> int:
    """Have libjpeg decode at 1/2, 1/4 or 1/8 where the result stays large enough; returns the divisor."""
    (target_width, target_height), (left, upper, right, lower) = _placement(image.size, side_px, resize)
    shrink = min((right - left) / target_width, (lower - upper) / target_height)
    divisor = next((divisor for least, divisor in _REDUCTIONS if shrink >= least), 1)
    if divisor > 1:
        image.draft(None, (image.width // divisor, image.height // divisor))
    return divisor


def _orientation(image: ImageFile.ImageFile) -> int:
    """1 to 8, as EXIF counts; 1 where there is none that can be read: a broken note does not spoil the picture."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _BAD_BYTES:
        return 1
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


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


def _squared(upright: _Upright, side_px: int, resize: Resize) -> Image.Image:
    """RGB, resized to fit the square, and padded where it does not fill it."""
    target, box = _placement(upright.full_size, side_px, resize)
    (x, y), divisor = upright.origin, upright.reduction
    left, upper, right, lower = box
    box = (x + left / divisor, y + upper / divisor, x + right / divisor, y + lower / divisor)
    fitted = _in_mode(_resized(upright.image, target, box, divisor > 1), "RGB")
    if target == (side_px, side_px):
        return fitted
    square = Image.new("RGB", (side_px, side_px), _LETTERBOX_FILL)
    square.paste(fitted, ((side_px - target[0]) // 2, (side_px - target[1]) // 2))
    return square


def _placement(size: _Size, side_px: int, resize: Resize) -> tuple[_Size, _Box]:
    """The size that the image, or its part in the box, is brought to; and that box, in pixels of the full image."""
    width, height = size
    if resize == "center_crop":
        side = min(size)
        left, upper = (width - side) // 2, (height - side) // 2
        return (side_px, side_px), (left, upper, left + side, upper + side)
    if resize == "letterbox":
        longer = max(size)
        fitted = [max(1, (2 * edge * side_px + longer) // (2 * longer)) for edge in size]  # rounded, half up
        return (fitted[0], fitted[1]), (0, 0, width, height)
    return (side_px, side_px), (0, 0, width, height)


def _resized(image: Image.Image, target: _Size, box: _Box, is_reduced: bool) -> Image.Image:
    """Bring the part in the box to the target size, each axis by its own rule; the shrinking one first.

    HAMMING is the area filter for JPEGs that libjpeg has reduced: of their few pixels BOX would take whole ones only.
    """
    left, upper, right, lower = box
    shrinks = right - left >= target[0], lower - upper >= target[1]
    area = Image.Resampling.HAMMING if is_reduced else Image.Resampling.BOX
    if shrinks[0] == shrinks[1]:
        return image.resize(target, area if shrinks[0] else Image.Resampling.BILINEAR, box=box)
    if shrinks[0]:
        narrow = image.resize((target[0], image.height), area, box=(left, 0, right, image.height))
        return narrow.resize(target, Image.Resampling.BILINEAR, box=(0, upper, target[0], lower))
    low = image.resize((image.width, target[1]), area, box=(0, upper, image.width, lower))
    return low.resize(target, Image.Resampling.BILINEAR, box=(left, 0, right, target[1]))


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
