"""Decoding and resizing, on small files whose every pixel is known, and on files that are broken in every way."""

from __future__ import annotations

import io
import pickle
import random
import struct
import subprocess
import sys
import threading
import traceback
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from engine import images
from engine.images import (
    DECODE_VERSION,
    LARGE_IMAGE_PIXELS,
    DecodedImage,
    ImageRejected,
    Resize,
    decode_image,
)
from engine.schema import RejectReason

NO_LIMIT = 178_956_970  # the default of limits.max_pixels
RESIZES: tuple[Resize, ...] = ("stretch", "letterbox", "center_crop")
Outcome = DecodedImage | ImageRejected


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decode(
    encoded: bytes, side_px: int = 4, resize: Resize = "stretch", max_pixels: int = NO_LIMIT
) -> DecodedImage:
    return decode_image(encoded, side_px, resize, max_pixels)


def rejection(encoded: bytes, **options: Any) -> ImageRejected:
    with pytest.raises(ImageRejected) as rejected:
        decode(encoded, **options)
    return rejected.value


def outcome(encoded: bytes, side_px: int, resize: Resize = "stretch", max_pixels: int = NO_LIMIT) -> Outcome:
    """What came of it: pixels or a rejection."""
    try:
        return decode(encoded, side_px, resize, max_pixels)
    except ImageRejected as rejected:
        return rejected


def exif(orientation: int) -> Image.Exif:
    note = Image.Exif()
    note[0x0112] = orientation
    return note


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"\0\0\x10\0IDAT"


# Every value differs, so that no two transpositions look alike.
GREY_34 = np.array([[11, 23, 31, 43], [53, 61, 71, 83], [97, 101, 113, 127]], np.uint8)
RGB_34 = np.stack([GREY_34, 255 - GREY_34, GREY_34 // 3 + 7], axis=-1)


def photo(width: int, height: int) -> Image.Image:
    """Smooth colour waves with some noise: compresses like a photo, and is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (5 + band) + y / (9 - band)) for band in range(3)]
    noise = np.random.default_rng(7).integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- formats and pixel kinds


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_keep_every_pixel(form: str, options: dict[str, Any]) -> None:
    square = np.concatenate([RGB_34, RGB_34[:1] ^ 255])
    found = decode(encode(Image.fromarray(square), form, **options))
    assert found.pixels_SS3.dtype == np.uint8 and found.pixels_SS3.shape == (4, 4, 3)
    np.testing.assert_array_equal(found.pixels_SS3, square)


def test_a_jpeg_is_close_to_its_pixels() -> None:
    original = photo(64, 64)
    for subsampling, worst in ((0, 10), (2, 60)):
        found = decode(encode(original, "JPEG", quality=98, subsampling=subsampling), 64).pixels_SS3
        assert np.abs(found.astype(int) - np.asarray(original)).max() <= worst


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        encoded = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (decode(encoded).pixels_SS3 == (255, 0, 0)).all(), form


def test_grey_becomes_three_equal_channels() -> None:
    found = decode(encode(Image.fromarray(GREY_34), "PNG"), 4, "center_crop").pixels_SS3
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 1] == found[..., 2]).all()
    bits = Image.fromarray(GREY_34 > 80).resize((4, 4), Image.Resampling.NEAREST)
    for form in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(decode(encode(bits, form)).pixels_SS3[..., 0], np.asarray(bits) * 255)


def test_16_bit_grey_is_divided_by_257_and_rounded_not_clipped() -> None:
    deep = np.array(
        [
            [0, 128, 129, 256],
            [257, 385, 386, 1000],
            [32767, 32768, 40000, 50000],
            [65279, 65406, 65407, 65535],
        ]
    )
    wanted = [[0, 0, 1, 1], [1, 1, 2, 4], [127, 128, 156, 195], [254, 254, 255, 255]]
    image = Image.fromarray(deep.astype(np.uint16))
    for form in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encode(image, form)).pixels_SS3[..., 1], wanted)
    big_endian = Image.frombytes("I;16B", (4, 4), deep.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(encode(big_endian, "TIFF")).pixels_SS3[..., 1], wanted)


def test_alpha_is_laid_on_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, np.array([0, 51, 128, 255])  # column by column
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = decode(encode(Image.fromarray(rgba), form, **options)).pixels_SS3
        assert found[0].tolist() == [[255, 255, 255], [244, 204, 204], [227, 127, 127], [200, 0, 0]], form
    grey_alpha = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 51)])
    for form in ("PNG", "TIFF"):
        assert decode(encode(grey_alpha, form)).pixels_SS3[2, 2].tolist() == [224, 224, 224]


def test_a_palette_keeps_its_colours_and_its_clear_entry_is_white() -> None:
    image = Image.new("P", (4, 4))
    image.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    image.putdata([0, 1, 2, 1] * 4)
    for form in ("PNG", "GIF", "BMP", "TIFF"):
        opaque = decode(encode(image, form)).pixels_SS3[3].tolist()
        assert opaque == [[10, 20, 30], [200, 100, 50], [1, 2, 3], [200, 100, 50]], form
    for form in ("PNG", "GIF"):
        clear = decode(encode(image, form, transparency=2)).pixels_SS3[3].tolist()
        assert clear == [[10, 20, 30], [200, 100, 50], [255, 255, 255], [200, 100, 50]], form
    half = decode(encode(image, "PNG", transparency=bytes([255, 51, 0]))).pixels_SS3[0].tolist()
    assert half == [[10, 20, 30], [244, 224, 214], [255, 255, 255], [244, 224, 214]]


def test_the_clear_colour_of_a_png_is_white_for_rgb_grey_and_16_bit_grey() -> None:
    rgb = encode(Image.new("RGB", (4, 4), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    grey = encode(Image.new("L", (4, 4), 77), "PNG", transparency=77)
    deep = encode(Image.fromarray(np.full((4, 4), 771, np.uint16)), "PNG")
    clear = deep[:33] + chunk(b"tRNS", struct.pack(">H", 771)) + deep[33:]
    for encoded in (rgb, grey, clear):
        assert (decode(encoded).pixels_SS3 == 255).all()
    assert (decode(deep).pixels_SS3 == 3).all()


def test_cmyk_and_ycck_jpegs_are_read_as_adobe_writes_them() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    encoded = encode(ink, "JPEG", quality=100)
    marker = encoded.index(b"Adobe")
    assert encoded[marker + 11] == 0
    assert (decode(encoded).pixels_SS3 == (255, 0, 0)).all()
    mixed = decode(encode(Image.new("CMYK", (16, 16), (51, 102, 0, 51)), "JPEG", quality=100)).pixels_SS3
    assert mixed[0, 0].tolist() == [
        163,
        122,
        204,
    ]  # (255 - c) * (255 - k) / 255, one off by the JPEG's rounding
    ycck = encoded[: marker + 11] + b"\x02" + encoded[marker + 12 :]
    # the same four planes read as Y, Cb, Cr, K: Y 255, Cb 0, Cr 0 (JFIF equations), inverted
    assert decode(ycck).pixels_SS3[0, 0].tolist() == [179, 0, 227]
    assert (decode(encode(ink, "TIFF")).pixels_SS3 == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_a_fixed_range_are_an_unsupported_format(mode: str) -> None:
    rejected = rejection(encode(Image.new(mode, (5, 3)), "TIFF"))
    assert rejected.reason is RejectReason.UNSUPPORTED_FORMAT
    assert f"mode {mode}" in rejected.message


def test_a_16_bit_tiff_where_0_is_white_is_refused_rather_than_shown_inverted() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    encoded = bytearray(encode(Image.fromarray(np.full((4, 4), 65535, np.uint16)), "TIFF"))
    entry = encoded.index(struct.pack("<HHI", 262, 3, 1))
    encoded[entry + 8] = 0
    assert rejection(bytes(encoded)).reason is RejectReason.UNSUPPORTED_FORMAT


# ---------------------------------------------------------------- orientation

UPRIGHT = {
    1: GREY_34,
    2: GREY_34[:, ::-1],
    3: GREY_34[::-1, ::-1],
    4: GREY_34[::-1],
    5: GREY_34.T,
    6: GREY_34[::-1].T,
    7: GREY_34[::-1, ::-1].T,
    8: GREY_34[:, ::-1].T,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_the_image_is_turned_upright_before_it_is_placed(orientation: int, form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    found = decode(encode(Image.fromarray(RGB_34), form, exif=exif(orientation), **options), 4, "letterbox")
    upright = UPRIGHT[orientation]
    height, width = upright.shape
    assert (found.width_px, found.height_px) == (width, height)
    np.testing.assert_array_equal(found.pixels_SS3[:height, :width, 0], upright)
    assert found.pixels_SS3[height:].sum() == found.pixels_SS3[:, width:].sum() == 0


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("resize", RESIZES)
def test_a_turned_file_gives_the_very_pixels_of_an_upright_one(orientation: int, resize: Resize) -> None:
    stored = np.random.default_rng(5).integers(0, 256, (37, 52), np.uint8)
    flips: dict[int, np.ndarray] = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: stored[::-1].T,
        7: stored[::-1, ::-1].T,
        8: stored[:, ::-1].T,
    }
    turned = decode(encode(Image.fromarray(stored), "PNG", exif=exif(orientation)), 11, resize)
    upright = decode(encode(Image.fromarray(flips[orientation]), "PNG"), 11, resize)
    np.testing.assert_array_equal(turned.pixels_SS3, upright.pixels_SS3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_turned_without_a_shift(orientation: int) -> None:
    """1,001 x 755 at an eighth is 125.125 x 94.375: seen as 126 x 95 whole pixels, a slope would move by 2 levels."""
    slope_x, slope_y = np.meshgrid(np.linspace(0, 255, 1001), np.linspace(0, 255, 755))
    slopes = np.stack([slope_x, slope_y, np.full_like(slope_x, 128)], -1).round().astype(np.uint8)
    encoded = encode(Image.fromarray(slopes), "JPEG", quality=100, subsampling=0, exif=exif(orientation))
    found = decode(encoded, 16)
    wanted = decode(encode(Image.fromarray(slopes), "PNG", exif=exif(orientation)), 16)
    assert (found.width_px, found.height_px) == ((1001, 755) if orientation < 5 else (755, 1001))
    assert (wanted.width_px, wanted.height_px) == (found.width_px, found.height_px)
    assert np.abs(found.pixels_SS3.astype(int) - wanted.pixels_SS3).max() <= 1


def test_an_orientation_that_cannot_be_read_is_upright() -> None:
    plain = encode(Image.fromarray(RGB_34), "PNG")
    wanted = decode(plain).pixels_SS3
    notes = [
        b"",
        b"nonsense",
        b"II*\0",
        b"MM\0*\0\0\0\x08\xff\xff",
        exif(9).tobytes()[6:],
        exif(0).tobytes()[6:],
    ]
    for note in notes:
        found = decode(plain[:33] + chunk(b"eXIf", note) + plain[33:])
        np.testing.assert_array_equal(found.pixels_SS3, wanted)


# ---------------------------------------------------------------- resizing, to the pixel


def test_stretch_averages_whole_blocks() -> None:
    blocks = np.array([[10, 20, 30, 50], [30, 40, 70, 90]], np.uint8)
    found = decode(encode(Image.fromarray(blocks), "PNG"), 2)
    assert found.pixels_SS3[..., 0].tolist() == [[15, 40], [35, 80]]
    assert (found.width_px, found.height_px) == (4, 2)
    tall = decode(encode(Image.fromarray(blocks.T), "PNG"), 2)
    assert tall.pixels_SS3[..., 0].tolist() == [[15, 35], [40, 80]]
    assert (tall.width_px, tall.height_px) == (2, 4)


def test_an_axis_that_grows_is_interpolated_and_one_that_shrinks_is_averaged() -> None:
    line = np.array([[0, 0, 100, 200]], np.uint8)
    found = decode(encode(Image.fromarray(line), "PNG"), 2)
    assert found.pixels_SS3[..., 0].tolist() == [[0, 150], [0, 150]]
    pair = np.array([[0], [200]], np.uint8)
    assert decode(encode(Image.fromarray(pair), "PNG"), 4).pixels_SS3[..., 2].tolist() == [
        [0] * 4,
        [50] * 4,
        [150] * 4,
        [200] * 4,
    ]


def test_letterbox_fits_the_whole_image_in_the_middle_on_black() -> None:
    wide = Image.new("RGB", (8, 4), (255, 200, 100))
    found = decode(encode(wide, "PNG"), 5, "letterbox").pixels_SS3  # 8 x 4 fits as 5 x 3 (2.5 rounded up)
    assert [row.tolist() for row in found[:, 2]] == [[0] * 3, *[[255, 200, 100]] * 3, [0] * 3]
    assert (found[1:4] == (255, 200, 100)).all()
    odd = decode(encode(Image.new("L", (3, 6), 9), "PNG"), 6, "letterbox").pixels_SS3[..., 0]
    assert odd.tolist() == [[0, 9, 9, 9, 0, 0]] * 6  # the odd column is on the right
    sliver = decode(encode(Image.new("L", (1000, 1), 9), "PNG"), 4, "letterbox").pixels_SS3[..., 0]
    assert sliver.tolist() == [[0] * 4, [9] * 4, [0] * 4, [0] * 4]


def test_center_crop_takes_the_middle_square() -> None:
    wide = np.array([[1, 10, 20, 30, 40, 2], [1, 50, 60, 70, 80, 2]], np.uint8)
    found = decode(encode(Image.fromarray(wide), "PNG"), 2, "center_crop")
    assert found.pixels_SS3[..., 0].tolist() == [[20, 30], [60, 70]]
    assert (found.width_px, found.height_px) == (6, 2)
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(wide.T), "PNG"), 2, "center_crop").pixels_SS3,
        found.pixels_SS3.swapaxes(0, 1),
    )
    odd = np.array([[0, 100, 200], [0, 100, 200]], np.uint8)  # the odd column is lost on the right
    assert decode(encode(Image.fromarray(odd), "PNG"), 1, "center_crop").pixels_SS3.tolist() == [[[50] * 3]]


def test_an_image_of_the_right_size_is_left_alone() -> None:
    square = np.random.default_rng(3).integers(0, 256, (7, 7, 3), np.uint8)
    for resize in ("stretch", "letterbox", "center_crop"):
        np.testing.assert_array_equal(
            decode(encode(Image.fromarray(square), "PNG"), 7, resize).pixels_SS3, square
        )


def test_strips_of_100_000_pixels_work_within_the_limits() -> None:
    steps = np.repeat(np.array([11, 23, 31, 43, 53], np.uint8), 20_000)[None]
    for strip in (steps, steps.T):
        for form in ("PNG", "TIFF"):
            encoded = encode(Image.fromarray(strip), form)
            found = decode(encoded, 5, "stretch", max_pixels=100_000)
            assert (found.height_px, found.width_px) == strip.shape
            values = found.pixels_SS3[0, :, 0] if strip is steps else found.pixels_SS3[:, 0, 0]
            assert values.tolist() == [11, 23, 31, 43, 53]
            assert (decode(encoded, 5, "center_crop").pixels_SS3 == 31).all()
            assert rejection(encoded, max_pixels=99_999).reason is RejectReason.TOO_MANY_PIXELS


# ---------------------------------------------------------------- limits


def test_too_many_pixels_are_refused_by_the_header_alone() -> None:
    rejected = rejection(png_header(60_000, 60_000), max_pixels=178_956_970)
    assert rejected.reason is RejectReason.TOO_MANY_PIXELS
    assert rejected.message == "60,000 x 60,000 pixels are more than limits.max_pixels, 178,956,970"
    assert rejection(png_header(100, 100), max_pixels=9_999).reason is RejectReason.TOO_MANY_PIXELS
    assert rejection(png_header(100, 100), max_pixels=10_000).reason is RejectReason.TRUNCATED_IMAGE


def test_every_format_knows_its_size_before_it_decodes() -> None:
    picture = photo(40, 30)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        encoded = encode(picture.quantize() if form == "GIF" else picture, form)
        assert rejection(encoded, max_pixels=1199).reason is RejectReason.TOO_MANY_PIXELS, form
        assert decode(encoded, max_pixels=1200).width_px == 40, form


def test_a_limit_above_pillows_own_counts_and_makes_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # Pillow's default: refuses twice that
    tiff = bytearray(encode(Image.new("L", (16, 16)), "TIFF"))
    for tag, value in (
        (256, 60_000),
        (257, 3_100),
        (278, 3_100),
    ):  # 186,000,000 pixels, of which 256 are there
        entry = next(at for kind in (3, 4) if (at := tiff.find(struct.pack("<HHI", tag, kind, 1))) > 0)
        tiff[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, value)
    assert rejection(bytes(tiff), max_pixels=178_956_970).reason is RejectReason.TOO_MANY_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rejection(bytes(tiff), max_pixels=186_000_000).reason is RejectReason.CORRUPT_IMAGE


def test_text_and_profiles_that_unpack_to_too_much_are_refused() -> None:
    bomb = PngInfo()
    bomb.add_text("a", "x" * 2**22, zip=True)
    encoded = encode(Image.new("RGB", (4, 4)), "PNG", pnginfo=bomb)
    assert len(encoded) < 10_000
    assert rejection(encoded).reason is RejectReason.CORRUPT_IMAGE
    profile = encode(Image.new("RGB", (4, 4)), "PNG", icc_profile=bytes(2**22))
    assert rejection(profile).reason is RejectReason.CORRUPT_IMAGE


# ---------------------------------------------------------------- bytes that are no image


@pytest.mark.parametrize(
    "encoded",
    [
        b"just some text, much longer than twelve bytes",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x20ftypavif\0\0\0\0avifmif1",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 ",
        b"8BPS\0\x01" + bytes(40),
        b"RIFF\x24\0\0\0WAVEfmt " + bytes(20),
        b"P6 1 1 255 abc",
        b"%PDF-1.7\n" + bytes(20),
        bytes(100),
    ],
)
def test_other_formats_are_unsupported_and_the_message_shows_how_they_begin(encoded: bytes) -> None:
    rejected = rejection(encoded)
    assert rejected.reason is RejectReason.UNSUPPORTED_FORMAT
    assert repr(encoded[:12]) in rejected.message


def test_sorts_of_known_formats_that_are_not_decoded_are_unsupported() -> None:
    jpeg = bytearray(encode(photo(16, 16), "JPEG"))
    jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
    assert rejection(bytes(jpeg)).message == "JPEG: cannot handle 12-bit layers"
    bmp = bytearray(encode(photo(16, 16), "BMP"))
    bmp[28] = 2
    tiff = bytearray(encode(photo(16, 16), "TIFF"))
    tiff[tiff.index(struct.pack("<HHI", 262, 3, 1)) + 8] = 99
    for encoded in (jpeg, bmp, tiff):
        assert rejection(bytes(encoded)).reason is RejectReason.UNSUPPORTED_FORMAT


def test_no_bytes_are_an_empty_sample() -> None:
    assert rejection(b"").reason is RejectReason.EMPTY_SAMPLE


def samples() -> dict[str, bytes]:
    """One file of every format, and of the sorts that Pillow reads by other paths."""
    picture = photo(90, 61)
    note = exif(6)
    few = picture.quantize(16)
    return {
        "jpeg": encode(picture, "JPEG", exif=note),
        "jpeg progressive": encode(picture, "JPEG", progressive=True),
        "jpeg cmyk": encode(picture.convert("CMYK"), "JPEG"),
        "png": encode(picture, "PNG", exif=note),
        "png palette": encode(few, "PNG", transparency=3),
        "webp": encode(picture, "WEBP", exif=note),
        "webp lossless": encode(picture.convert("RGBA"), "WEBP", lossless=True),
        "gif": encode(few, "GIF", transparency=2),
        "gif animated": encode(few, "GIF", save_all=True, append_images=[few.rotate(90)], disposal=2),
        "bmp": encode(picture, "BMP"),
        "tiff": encode(picture, "TIFF", exif=note),
        "tiff lzw": encode(picture, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encode(picture, "TIFF", compression="jpeg"),
        "tiff fax": encode(picture.convert("1"), "TIFF", compression="group4"),
    }


SAMPLES = samples()


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_file_cut_anywhere_is_truncated_or_was_complete_already(name: str) -> None:
    whole = SAMPLES[name]
    wanted = decode(whole, 16).pixels_SS3
    for length in sorted({*range(1, 40), *range(40, len(whole), max(1, len(whole) // 60)), len(whole) - 1}):
        found = outcome(whole[:length], 16)
        if isinstance(found, ImageRejected):
            assert found.reason is RejectReason.TRUNCATED_IMAGE, (length, len(whole), found.message)
        else:
            np.testing.assert_array_equal(found.pixels_SS3, wanted, err_msg=str(length))
            assert length > 0.5 * len(whole)


def test_damage_inside_a_complete_file_is_corrupt() -> None:
    png = SAMPLES["png"]
    at = png.index(b"IDAT") + 40
    assert rejection(png[:at] + bytes(60) + png[at + 60 :]).reason is RejectReason.CORRUPT_IMAGE
    jpeg = SAMPLES["jpeg"]
    tables = jpeg.index(b"\xff\xc4")
    assert (
        rejection(jpeg[: tables + 5] + b"\xff" * 16 + jpeg[tables + 21 :]).reason
        is RejectReason.CORRUPT_IMAGE
    )
    assert rejection(SAMPLES["gif"][:20] + b";").reason in (
        RejectReason.CORRUPT_IMAGE,
        RejectReason.TRUNCATED_IMAGE,
    )


def test_a_png_chunk_behind_the_pixels_that_is_too_short_is_corrupt() -> None:
    whole = encode(photo(8, 8), "PNG")
    assert rejection(whole[:-12] + chunk(b"iCCP", b"") + whole[-12:]).reason is RejectReason.CORRUPT_IMAGE


def mutated(whole: bytes, dice: random.Random) -> bytes:
    """The file with bytes changed (mostly in its header), cut out, cut off, or another file's header in front."""
    data, way = bytearray(whole), dice.random()
    if way < 0.15:
        return bytes(data[: dice.randrange(len(data))])
    if way < 0.3:
        other = SAMPLES[dice.choice(sorted(SAMPLES))]
        length = dice.randrange(8, 200)
        return other[:length] + bytes(data[length:])
    if way < 0.45:
        at = dice.randrange(len(data))
        del data[at : at + dice.randrange(1, 60)]
        return bytes(data)
    for _ in range(dice.choice((1, 2, 4, 16))):
        at = dice.randrange(min(len(data), 200) if dice.random() < 0.7 else len(data))
        data[at] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
    return bytes(data)


FILES_OF_FORMAT = Counter(name.partition(" ")[0] for name in SAMPLES)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_400_mutations_of_each_format_give_an_image_or_the_same_rejection_twice_and_no_warning(
    name: str,
) -> None:
    dice = random.Random(f"mutations of {name}")
    outcomes: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(400 // FILES_OF_FORMAT[name.partition(" ")[0]]):
            encoded = mutated(SAMPLES[name], dice)
            found, again = (outcome(encoded, 8, "letterbox", max_pixels=4_000_000) for _ in range(2))
            if isinstance(found, ImageRejected):
                outcomes[found.reason] += 1
                assert str(again) == str(found)
                assert len(found.message) < 300 and " at 0x" not in found.message
            else:
                outcomes["image"] += 1
                assert found.pixels_SS3.shape == (8, 8, 3)
    assert set(outcomes) <= {
        "image",
        RejectReason.TRUNCATED_IMAGE,
        RejectReason.CORRUPT_IMAGE,
        RejectReason.UNSUPPORTED_FORMAT,
        RejectReason.TOO_MANY_PIXELS,
        RejectReason.EMPTY_SAMPLE,
    }
    assert outcomes[RejectReason.TRUNCATED_IMAGE] > 10 and outcomes["image"] > 0


# ---------------------------------------------------------------- shortcuts


def plain_samples() -> dict[str, bytes]:
    """Files as most archives hold them, which are not taken through all of Pillow's file classes."""
    picture = photo(167, 125)
    return {
        "jpeg": encode(picture, "JPEG"),
        "jpeg 4:4:4": encode(picture, "JPEG", quality=95, subsampling=0),
        "jpeg progressive": encode(picture, "JPEG", progressive=True),
        "jpeg restarts": encode(picture, "JPEG", restart_marker_blocks=3),
        "jpeg grey": encode(picture.convert("L"), "JPEG"),
        "jpeg profile": encode(picture, "JPEG", icc_profile=bytes(range(256)) * 400, comment=b"a comment"),
        "webp": encode(picture, "WEBP"),
        "webp small": encode(photo(9, 7), "WEBP"),
    }


PLAIN_SAMPLES = plain_samples()


def takes_shortcut(encoded: bytes, side_px: int = 8, max_pixels: int = NO_LIMIT) -> bool:
    try:
        name, _ = images._identified(encoded)
    except ImageRejected:
        return False
    return images._by_shortcut(name, encoded, side_px, "stretch", max_pixels) is not None


def needs_webp_symbols(name: str) -> None:
    if name.startswith("webp") and images._WEBP_DECODE is None:
        pytest.skip("this Pillow does not show the symbols of its libwebp")


@pytest.mark.parametrize("name", sorted(PLAIN_SAMPLES))
def test_an_ordinary_file_takes_the_shortcut_to_the_very_same_pixels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_webp_symbols(name)
    encoded = PLAIN_SAMPLES[name]
    cases = [(side_px, resize) for side_px in (1, 5, 9, 11, 31, 64, 224) for resize in RESIZES]
    assert all(takes_shortcut(encoded, side_px) for side_px, _ in cases)
    short = [decode(encoded, *case) for case in cases]
    monkeypatch.setattr(images, "_by_shortcut", lambda *_: None)
    for found, case in zip(short, cases, strict=True):
        wanted = decode(encoded, *case)
        np.testing.assert_array_equal(found.pixels_SS3, wanted.pixels_SS3, err_msg=str(case))
        assert (found.width_px, found.height_px) == (wanted.width_px, wanted.height_px)


def test_files_that_say_more_than_their_pixels_take_the_long_way() -> None:
    picture = photo(40, 30)
    for encoded in (
        SAMPLES["jpeg"],  # EXIF
        encode(picture, "JPEG", xmp=b"<x:xmpmeta/>"),
        SAMPLES["jpeg cmyk"],
        SAMPLES["webp"],
        SAMPLES["webp lossless"],
        encode(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
        PLAIN_SAMPLES["jpeg"][:-2],
        PLAIN_SAMPLES["webp"][:-2],
        PLAIN_SAMPLES["webp"] + b"\0\0",
    ):
        assert not takes_shortcut(encoded)


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_images_above_a_limit_take_the_long_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_webp_symbols(name)
    encoded = PLAIN_SAMPLES[name]
    assert takes_shortcut(encoded, 64, 167 * 125) and not takes_shortcut(encoded, 64, 167 * 125 - 1)
    monkeypatch.setattr(images, "LARGE_IMAGE_PIXELS", 167 * 125)
    assert takes_shortcut(encoded, 64)
    monkeypatch.setattr(images, "LARGE_IMAGE_PIXELS", 167 * 125 - 1)
    assert not takes_shortcut(encoded, 64)
    assert takes_shortcut(encoded, 10) == (name == "jpeg")  # as libjpeg decodes it, at 1/4, it is not large


@pytest.mark.parametrize("name", sorted(PLAIN_SAMPLES))
def test_of_300_mutations_none_comes_out_otherwise_by_the_shortcut(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_webp_symbols(name)
    dice = random.Random(f"shortcuts of {name}")
    files = [mutated(PLAIN_SAMPLES[name], dice) for _ in range(300)]
    found = [outcome(encoded, 16, "letterbox", max_pixels=1_000_000) for encoded in files]
    taken = sum(takes_shortcut(encoded, 16, 1_000_000) for encoded in files)
    monkeypatch.setattr(images, "_by_shortcut", lambda *_: None)
    for encoded, short in zip(files, found, strict=True):
        long = outcome(encoded, 16, "letterbox", max_pixels=1_000_000)
        assert str(short) == str(long)
        if isinstance(short, DecodedImage) and isinstance(long, DecodedImage):
            np.testing.assert_array_equal(short.pixels_SS3, long.pixels_SS3)
    assert taken > 40, taken


# ---------------------------------------------------------------- around it


def test_threads_decode_the_same_as_one() -> None:
    names = sorted(SAMPLES) * 6
    alone = [decode(SAMPLES[name], 24, "center_crop").pixels_SS3 for name in names]
    start = threading.Barrier(4)

    def one(name: str) -> np.ndarray:
        return decode(SAMPLES[name], 24, "center_crop").pixels_SS3

    with ThreadPoolExecutor(4, initializer=start.wait) as pool:
        for wanted, found in zip(alone, pool.map(one, names), strict=True):
            np.testing.assert_array_equal(found, wanted)


PEAK_OF_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import engine.area_means  # its compiler is part of the process, not of the images
from engine.images import ImageRejected, decode_image

def one(name):
    try:
        return decode_image(Path(name).read_bytes(), 32, "stretch", 10**9).width_px
    except ImageRejected as rejected:
        return rejected.reason

def held(peak_or_now):
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith(peak_or_now)]
    return int(found.split()[1])

before = held("VmRSS")
with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    print(*pool.map(one, sys.argv[2:]))
print(held("VmHWM") - before)
"""


def peak_bytes(threads: int, files: list[Path]) -> tuple[list[str], int]:
    """What came of decoding these files in a process of its own, and how much more than before it had at once."""
    ended = subprocess.run(
        [sys.executable, "-c", PEAK_OF_THREADS, str(threads), *map(str, files)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    outcomes, peak_kib = ended.stdout.splitlines()
    return outcomes.split(), int(peak_kib) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux says what a process held at most"
)
def test_four_threads_that_meet_large_images_need_the_memory_of_one(tmp_path: Path) -> None:
    width, height = (
        6607,
        5003,
    )  # 33 megapixels: 132 MB as Pillow holds them, and as much again to be turned upright
    assert width * height > LARGE_IMAGE_PIXELS
    whole = encode(Image.new("RGB", (width, height), (17, 31, 101)), "PNG", compress_level=1, exif=exif(6))
    files = [tmp_path / name for name in "abcdef"]
    for file in files:
        file.write_bytes(whole)
    files[1].write_bytes(whole[:-5000])  # its turn ends too
    found, peak = peak_bytes(4, files)
    assert found == [str(height), "truncated_image"] + [str(height)] * 4
    assert peak < 2 * 4 * width * height + 75e6, f"four threads held {peak / 1e6:.0f} MB"
    print(f"four threads held {peak / 1e6:.0f} MB")


def test_a_jpeg_that_libjpeg_reduces_is_not_a_large_image() -> None:
    """40 megapixels at an eighth are 0.6: nobody has to wait for them."""
    encoded = encode(Image.new("L", (8009, 5003)), "JPEG")
    with images._LARGE_IMAGE_TURN:
        assert decode(encoded, 32).width_px == 8009


def test_a_rejection_holds_nothing_of_the_half_decoded_image() -> None:
    """A part keeps up to 1,024 of them: with 12 megapixels each that would be 37 GB."""
    cut = encode(photo(40, 30), "PNG")[:-300]
    for encoded in (cut, encode(Image.new("F", (40, 30)), "TIFF"), png_header(99_999, 99_999)):
        with pytest.raises(ImageRejected) as rejected:
            decode(encoded)
        assert rejected.value.__context__ is None
        held = [frame.f_locals.values() for frame, _ in traceback.walk_tb(rejected.tb)]
        assert len(held) == 3  # this test, its helper, decode_image
        assert not [value for values in held for value in values if isinstance(value, Image.Image)]


def test_a_rejection_survives_pickling() -> None:
    rejected = pickle.loads(pickle.dumps(rejection(b"")))
    assert (rejected.reason, rejected.message) == (RejectReason.EMPTY_SAMPLE, "there are no bytes")
    assert str(rejected) == "empty_sample: there are no bytes"


def test_the_recipe_of_this_version_gives_these_bytes() -> None:
    """Raise DECODE_VERSION if this has to change: old and new embeddings would not belong together."""
    assert DECODE_VERSION == 2
    y, x = np.mgrid[0:41, 0:53]
    picture = np.stack([(x * x + 3 * y * y + 50 * band) % 256 for band in range(3)], -1).astype(np.uint8)
    encoded = encode(Image.fromarray(picture), "PNG")
    digests = {resize: zlib.crc32(decode(encoded, 16, resize).pixels_SS3.tobytes()) for resize in RESIZES}
    assert digests == {"stretch": 284902162, "letterbox": 1006960901, "center_crop": 1182975974}
