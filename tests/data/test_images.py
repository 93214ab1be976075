"""Any image file -> upright RGB: every mode by its pixels, EXIF, formats, and files that are not what they seem."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tl_trainer.data.images import FORMATS, Decoding, dark, decode, load, to_rgb
from tl_trainer.errors import ImageError
from tl_trainer.ground import machine

Pixel = Any


def picture(mode: str, *pixels: Pixel, palette: Sequence[int] = ()) -> Image.Image:
    """A row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    if palette:
        image.putpalette(palette)
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rgb(image: Image.Image) -> list[list[int]]:
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def grey(*values: int) -> list[list[int]]:
    return [[value] * 3 for value in values]


PALETTE = [1, 2, 3, 200, 100, 50]

# mode, pixels, palette -> RGB
IN_MEMORY = [
    ("1", [0, 255], (), grey(0, 255)),
    ("L", [0, 100, 255], (), grey(0, 100, 255)),
    ("LA", [(100, 255), (100, 0), (0, 128)], (), grey(100, 255, 127)),
    ("P", [0, 1], PALETTE, [[1, 2, 3], [200, 100, 50]]),
    ("PA", [(0, 255), (1, 255), (1, 0)], PALETTE, [[1, 2, 3], [200, 100, 50], [255, 255, 255]]),
    ("RGB", [(1, 2, 3), (255, 0, 128)], (), [[1, 2, 3], [255, 0, 128]]),
    ("RGBA", [(1, 2, 3, 255), (1, 2, 3, 0), (0, 100, 255, 51)], (), [[1, 2, 3], [255, 255, 255], [204, 224, 255]]),
    ("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)], (), [[255, 255, 255], [0, 255, 255], [0, 0, 0]]),
    ("YCbCr", [(255, 128, 128), (0, 128, 128), (76, 85, 255)], (), [[255, 255, 255], [0, 0, 0], [254, 0, 0]]),
    ("I", [0, 255, 100], (), grey(0, 255, 100)),
    ("I", [0, 65535, 100 * 257], (), grey(0, 255, 100)),
    ("I", [-5, 256 * 257, 2**31 - 1], (), grey(0, 0, 127)),
    ("I;16", [0, 65535, 100 * 257], (), grey(0, 255, 100)),
    ("I;16B", [0, 65535, 100 * 257], (), grey(0, 255, 100)),
    ("F", [0.0, 1.0, 0.2], (), grey(0, 255, 51)),
    ("F", [0.0, 255.0, 99.6], (), grey(0, 255, 100)),
    ("F", [0.0, 65535.0, 25700.0], (), grey(0, 255, 100)),
    ("F", [-1.0, float("nan"), 1.0], (), grey(0, 0, 255)),
    ("F", [float("-inf"), float("inf"), 0.0], (), grey(0, 255, 0)),
]


@pytest.mark.parametrize(("mode", "pixels", "palette", "expected"), IN_MEMORY)
def test_a_mode_becomes_rgb(mode: str, pixels: list[Pixel], palette: list[int], expected: list[list[int]]) -> None:
    assert rgb(to_rgb(picture(mode, *pixels, palette=palette))) == expected


LOSSLESS = {
    "TIFF": {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "F"},
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"},
    "BMP": {"1", "L", "P", "RGB"},
    "GIF": {"1", "L", "P"},
    "PPM": {"1", "L", "RGB"},
}


@pytest.mark.parametrize(
    ("format", "mode", "pixels", "palette", "expected"),
    [(format, *row) for format, modes in LOSSLESS.items() for row in IN_MEMORY if row[0] in modes],
)
def test_a_mode_becomes_rgb_from_a_file(
    format: str, mode: str, pixels: list[Pixel], palette: list[int], expected: list[list[int]]
) -> None:
    data = encode(picture(mode, *pixels, palette=palette), format)
    if format in ("TIFF", "PNG"):
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == mode, "the file holds another mode than the one tested"
    assert rgb(decode(data, "x")) == expected


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_a_mode_becomes_rgb_from_a_jpeg(mode: str) -> None:
    colour = Image.new("RGB", (8, 8), (200, 100, 50)).convert(mode)
    expected = (124, 124, 124) if mode == "L" else (200, 100, 50)
    decoded = np.asarray(decode(encode(colour, "JPEG", quality=100), "x")).astype(int)
    assert np.abs(decoded - expected).max() <= 2


@pytest.mark.parametrize(
    ("image", "transparency", "expected"),
    [
        (picture("P", 0, 1, palette=PALETTE), 1, [[1, 2, 3], [255, 255, 255]]),
        (picture("P", 0, 1, palette=PALETTE), b"\xff\x00", [[1, 2, 3], [255, 255, 255]]),
        (picture("P", 0, 1, palette=[0] * 6), b"\x80\xff", grey(127, 0)),
        (picture("L", 10, 20), 20, grey(10, 255)),
        (picture("1", 0, 255), 0, grey(255, 255)),
        (picture("RGB", (1, 2, 3), (4, 5, 6)), (4, 5, 6), [[1, 2, 3], [255, 255, 255]]),
    ],
)
def test_a_transparent_colour_of_a_png_becomes_white(
    image: Image.Image, transparency: object, expected: list[list[int]]
) -> None:
    assert rgb(decode(encode(image, "PNG", transparency=transparency), "x")) == expected


def test_a_transparent_gif_becomes_white() -> None:
    data = encode(picture("P", 0, 1, palette=PALETTE), "GIF", transparency=1)
    assert rgb(decode(data, "x")) == [[1, 2, 3], [255, 255, 255]]


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_a_16_bit_ramp_keeps_256_levels(format: str, dtype: str) -> None:
    ramp = np.arange(65536, dtype=dtype).reshape(256, 256)
    data = encode(Image.fromarray(ramp), format)
    decoded = np.asarray(decode(data, "x"))
    assert (decoded == decoded[..., :1]).all()
    levels = decoded[..., 0].ravel()
    assert np.array_equal(levels, np.rint(np.arange(65536) / 257))
    assert len(np.unique(levels)) == 256


# Grey values that leave their range unused

TWELVE_BITS = np.arange(4096, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("dtype", "largest"), [(np.uint16, 4095), (np.int32, 4095), (np.float32, 4095)], ids=["16 bit", "32 bit", "float"]
)
def test_twelve_bits_in_sixteen_are_dark_and_with_their_range_a_ramp_of_256_levels(
    format: str, dtype: Any, largest: int
) -> None:
    if format == "PNG" and dtype != np.uint16:
        pytest.skip("it has no such mode")
    data = encode(Image.fromarray(TWELVE_BITS.astype(dtype)), format)
    plain, stretched = decode(data, "x"), decode(data, "x", Decoding(value_range=largest))
    assert len(np.unique(np.asarray(plain))) == 17
    assert dark(plain) == largest
    assert np.array_equal(np.asarray(stretched)[..., 0], np.rint(TWELVE_BITS / 4095 * 255))
    assert dark(stretched) == 0
    clipped = np.asarray(decode(data, "x", Decoding(value_range=1000.0)))[..., 0]
    assert np.array_equal(clipped, np.rint(np.minimum(TWELVE_BITS / 1000, 1) * 255))


@pytest.mark.parametrize(
    ("mode", "pixels"),
    [("I;16", [0, 16384]), ("I;16", [0, 0]), ("F", [0.0, 0.1]), ("I", [0, 200]), ("L", [0, 3]), ("RGB", [(1, 1, 1)])],
)
def test_what_fills_a_quarter_of_its_range_or_has_8_bits_is_not_dark(mode: str, pixels: list[Pixel]) -> None:
    assert dark(to_rgb(picture(mode, *pixels))) == 0


def test_a_value_range_leaves_images_of_8_bits_as_they_are() -> None:
    for format in FORMATS:
        data = encode(SCENE, format)
        assert rgb(decode(data, "x", Decoding(value_range=100.0))) == rgb(decode(data, "x"))


# EXIF

UPRIGHT = np.kron(np.array([[0, 50, 100], [150, 200, 250]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8))

# How a camera with this orientation stores an upright scene (EXIF 2.32, 4.6.4, tag 0112).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda scene: scene,
    2: np.fliplr,  # the 0th column is the right side
    3: lambda scene: np.rot90(scene, 2),
    4: np.flipud,  # the 0th row is the bottom
    5: np.transpose,  # the 0th row is the left side, the 0th column the top
    6: lambda scene: np.rot90(scene, 1),  # the 0th row is the right side, the 0th column the top
    7: lambda scene: np.rot90(scene, 2).T,  # the 0th row is the right side, the 0th column the bottom
    8: lambda scene: np.rot90(scene, -1),  # the 0th row is the left side, the 0th column the bottom
}


@pytest.mark.parametrize(("format", "tolerance"), [("JPEG", 2), ("PNG", 0), ("TIFF", 0), ("WEBP", 3)])
@pytest.mark.parametrize("orientation", STORED)
def test_an_image_is_turned_as_its_exif_says(orientation: int, format: str, tolerance: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(STORED[orientation](UPRIGHT)).convert("RGB")
    decoded = np.asarray(decode(encode(stored, format, exif=exif), "x"))
    assert decoded.shape == (32, 48, 3)
    assert np.abs(decoded.astype(int) - UPRIGHT[..., None]).max() <= tolerance


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Tags as (number, type, count, four bytes of value)."""
    fields = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + fields + bytes(4)


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = exif_block((0x0112, 3, 1, struct.pack(">H", orientation)))
    assert decode(encode(Image.new("RGB", (4, 2)), "JPEG", exif=exif), "x").size == (4, 2)


def test_a_strange_tag_does_not_spoil_a_photograph() -> None:
    turned = (0x0112, 3, 1, struct.pack(">H", 6))
    text_where_a_number_belongs = (0x0128, 2, 2, b"2\0")
    data = encode(Image.new("RGB", (4, 2)), "JPEG", exif=exif_block(turned, text_where_a_number_belongs))
    with Image.open(io.BytesIO(data)) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert decode(data, "x").size == (2, 4)


def test_a_palette_image_keeps_its_transparency_when_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(picture("P", 0, 1, palette=PALETTE), "PNG", transparency=1, exif=exif)
    assert rgb(decode(data, "x")) == [[255, 255, 255], [1, 2, 3]]


# Formats

SCENE = Image.fromarray(UPRIGHT).convert("RGB")


@pytest.mark.parametrize("suffix", [".jpg", ".txt", ""])
@pytest.mark.parametrize("format", FORMATS)
def test_a_photo_format_opens_whatever_the_file_is_called(format: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"photo{suffix}"
    path.write_bytes(encode(SCENE, format))
    decoded = np.asarray(load(path)).astype(int)
    assert np.abs(decoded - UPRIGHT[..., None]).max() <= (3 if format in ("JPEG", "WEBP") else 0)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_is_taken(format: str) -> None:
    data = encode(Image.new("RGB", (8, 8), "white"), format, save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert rgb(decode(data, "x")) == grey(255) * 64


def psd() -> bytes:
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 2, 4, 8, 3) + bytes(12) + bytes(2) + bytes(24)


def fits() -> bytes:
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 2", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(2880)


OTHERS = {
    "PSD": psd(),
    "FITS": fits(),
    **{format: encode(SCENE, format) for format in ("EPS", "ICO", "PCX", "SGI", "TGA", "DDS")},
}


@pytest.mark.parametrize("format", OTHERS)
def test_another_format_is_refused_whatever_the_file_is_called(format: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(OTHERS[format])
    with Image.open(path) as image:
        assert image.format == format, "Pillow would have opened it"
    with pytest.raises(ImageError) as caught:
        load(path)
    assert str(caught.value) == (f"{path}: not an image in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM")


# Files that cannot be used


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty file (0 bytes); replace or remove it"),
        (b"hello world\n", "not an image in one of the formats "),
        (b"<html><body>404</body></html>", "not an image in one of the formats "),
    ],
)
def test_what_is_no_image_is_named(content: bytes, message: str) -> None:
    path = Path("photo.jpg")
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load(path)
    assert str(caught.value).startswith(f"photo.jpg: {message}")


@pytest.mark.parametrize("draft", [0, 1])
@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_found(format: str, draft: int) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    decode(data, "photo", draft=draft)
    for kept in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"^photo: "):
            decode(data[: int(len(data) * kept)], "photo", draft=draft)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.jpg: cannot be read: No such file or directory"):
        load(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="not an ordinary file; remove it from the dataset"):
        load(tmp_path)


def test_no_image_is_blamed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's words for that are the same as for broken bytes."""
    broken = encode(Image.new("RGB", (64, 64)), "JPEG")[:-40]
    with pytest.raises(ImageError, match=r"photo\.jpg: damaged image"):
        decode(broken, "photo.jpg")
    monkeypatch.setattr(machine, "_SPARE", 1 << 62)
    with pytest.raises(MemoryError, match=r"photo\.jpg"):
        decode(broken, "photo.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this platform")
def test_a_fifo_is_refused_and_never_waited_for() -> None:
    os.mkfifo("photo.jpg")
    with pytest.raises(ImageError, match=r"photo\.jpg: not an ordinary file"):
        load(Path("photo.jpg"))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero on this platform")
def test_a_file_without_end_is_refused() -> None:
    Path("photo.jpg").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match=r"photo\.jpg: not an ordinary file"):
        load(Path("photo.jpg"))


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that announces any size."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


@pytest.mark.parametrize("size", [(9_000, 10_000), (20_000, 10_000)], ids=["Pillow warns", "Pillow raises"])
def test_a_decompression_bomb_is_refused(size: tuple[int, int]) -> None:
    """Whatever the process has set for Pillow, and its warnings."""
    width, height = size
    with pytest.raises(ImageError) as caught:
        decode(png_of(width, height), "photo")
    assert str(caught.value) == (
        f"photo: {width:,} x {height:,} pixels are too many ({width * height / 1e6:.3g} megapixels); scale it down, or "
        "raise data.max_megapixels (89.5) if it is a photograph"
    )


@pytest.mark.parametrize("draft", [0, 1])
@pytest.mark.parametrize("format", sorted({*FORMATS} - {"TIFF"}))
def test_the_limit_is_that_of_the_call_and_not_pillows(
    format: str, draft: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(SCENE, format)  # of 1,536 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    assert decode(data, "photo", draft=draft).mode == "RGB"
    with pytest.raises(ImageError, match=r"^photo: 48 x 32 pixels are too many \(0\.00154 megapixels\)"):
        decode(data, "photo", Decoding(max_megapixels=0.0015), draft=draft)


@pytest.mark.parametrize("format", ["WEBP", "TIFF"])
def test_where_pillow_has_a_limit_of_its_own_that_is_said(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoders of some formats check it once more."""
    data = encode(SCENE, format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageError, match=r"^photo: more pixels than Pillow decodes of its format; scale it down"):
        decode(data, "photo")


EXTREME = [(6000, 1), (1, 6000), (100_000, 1), (1, 100_000)]
BY_SHORT_SIDE = Decoding(resizes=(lambda size: [(size[0] * 256 / min(size), size[1] * 256 / min(size))],))


@pytest.mark.parametrize("size", EXTREME)
@pytest.mark.parametrize("draft", [0, 1])
def test_an_image_that_a_resize_would_make_huge_is_refused_by_name(size: tuple[int, int], draft: int) -> None:
    data = encode(Image.new("RGB", size), "PNG")
    assert decode(data, "strip", draft=draft).size == size
    with pytest.raises(ImageError) as caught:
        decode(data, "strip", BY_SHORT_SIDE, draft=draft)
    resized = " x ".join(f"{side * 256:,}" for side in size)
    assert str(caught.value) == (
        f"strip: {size[0]:,} x {size[1]:,} pixels would be resized to {resized}, more than data.max_megapixels (89.5); "
        "crop it, or give Resize both sides"
    )
    assert decode(encode(Image.new("RGB", (1000, 10)), "PNG"), "panorama", BY_SHORT_SIDE).size == (1000, 10)


def test_an_image_that_a_resize_would_make_nothing_of_is_refused_by_name() -> None:
    by_long_side = Decoding(resizes=(lambda size: [(size[0] * 60 / max(size), size[1] * 60 / max(size))],))
    with pytest.raises(ImageError, match=r"^strip: 300 x 3 pixels would be resized to 60 x 0, nothing; crop it,"):
        decode(encode(Image.new("RGB", (300, 3)), "PNG"), "strip", by_long_side)


def test_draft_makes_a_small_image_of_a_jpeg() -> None:
    data = encode(Image.new("RGB", (800, 400)), "JPEG")
    assert decode(data, "x", draft=1).size == (100, 50)
    assert decode(data, "x", draft=60).size == (200, 100)
    assert decode(data, "x").size == (800, 400)


FLIPPED = {format: encode(SCENE, format) for format in ("JPEG", "PNG")}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(FLIPPED)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8),
    st.booleans(),
)
def test_a_damaged_file_loads_or_is_named(format: str, flips: list[tuple[float, int]], draft: int) -> None:
    data = bytearray(FLIPPED[format])
    for place, bits in flips:
        data[int(place * len(data))] ^= bits
    try:
        assert decode(bytes(data), "photo", draft=draft).mode == "RGB"
    except ImageError as error:
        assert str(error).startswith("photo: ")
