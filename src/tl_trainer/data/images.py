"""Any image file -> RGB, upright. The only place that opens an image."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from tl_trainer.errors import ImageError
from tl_trainer.ground.machine import is_out_of_memory, memory_is_short
from tl_trainer.ground.wording import printable

# The photo formats; Pillow's other decoders (PSD, EPS, FITS, ...) are never reached, whatever a file is called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# EXIF orientation -> what makes the image upright; 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns above 89 megapixels and raises above 179. Both mean that a small file asks for gigabytes, so both are
# refused. The filter is global because `warnings.catch_warnings` is not safe in the threads that decode.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def load(path: Path) -> Image.Image:
    """The image in a file as an upright RGB image with values in [0, 255]. Raises ImageError, naming the file."""
    return decode(read(path), path)


def read(path: Path) -> bytes:
    """The bytes of an image file. Raises ImageError where there are none, or where reading could wait for ever."""
    try:
        with open(path, "rb", opener=_open_ordinary) as file:
            data = file.read()
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise ImageError(f"{printable(str(path))}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise ImageError(f"{printable(str(path))}: cannot be read: {error}") from error
    if not data:
        raise ImageError(f"{printable(str(path))}: empty file (0 bytes); replace or remove it")
    return data


def _open_ordinary(path: str, flags: int) -> int:
    """Open a file, but no pipe, whose other end could be waited for, and no device, which could be read for ever."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ImageError(f"{printable(path)}: not an ordinary file; remove it from the dataset")


def decode(data: bytes, name: object, *, draft: int = 0) -> Image.Image:
    """The image in a file's bytes as an upright RGB image; `name` is what an error calls it.

    draft: every byte is read, but a JPEG may be decoded to as little as an eighth of its size, which is several times
    faster, with sides of at least so many pixels; 0 for the whole image.
    """
    name = printable(str(name))
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if draft:
                image.draft("RGB", (draft, draft))
            return upright_rgb(image)
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in one of the formats {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: too many pixels to be a photograph: {error}") from None
    except Exception as error:  # a decoder fed with broken bytes raises anything from OSError to IndexError
        if is_out_of_memory(error) or memory_is_short():  # decoders have no words of their own for it
            raise MemoryError(f"{name}: {error}") from error
        raise ImageError(f"{name}: damaged image: {error or type(error).__name__}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says; not converted again where it is both."""
    return to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says.

    Not ImageOps.exif_transpose: it also writes the EXIF block anew, which fails for a photograph whose other tags are
    not as the standard wants them.
    """
    image.load()  # a PNG may have its EXIF block after the pixels
    method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB with values in [0, 255]; what is transparent becomes white.

    Modes without a nominal range (I and F) are scaled by the smallest of 1 (F only), 255, 65535 and 2^32 - 1 that
    holds their largest value.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _from_grey(np.asarray(image), 65535)
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        ceilings = [1, 255, 65535] if image.mode == "F" else [255, 65535]
        return _from_grey(values, next((limit for limit in ceilings if values.max() <= limit), 2**32 - 1))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return canvas
    return image.convert("RGB")


def _from_grey(values: np.ndarray, ceiling: int) -> Image.Image:
    """Grey values in [0, ceiling] -> RGB; 65535 maps to 255 by dividing by 257, so 16-bit ramps keep 256 levels."""
    grey = np.clip(np.rint(values.astype(np.float64) * (255 / ceiling)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey, "L").convert("RGB")
