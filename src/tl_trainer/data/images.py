"""Any image file -> RGB, upright. The only place that opens an image."""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile

from tl_trainer.config.data import DataSection
from tl_trainer.errors import ImageError
from tl_trainer.ground.machine import is_out_of_memory, memory_is_short
from tl_trainer.ground.wording import printable

log = logging.getLogger(__name__)

# The photo formats; Pillow's other decoders (PSD, EPS, FITS, ...) are never reached, whatever a file is called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What their files are called; where a folder is searched, other files are left out.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

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

_DEFAULT = DataSection()
_DARK, _SIZE = "largest grey value", "size in the file"  # in a picture's `info`
Size = tuple[float, float]  # width, height in pixels


@dataclass(frozen=True)
class Decoding:
    """How images are decoded, and which are too large: a file of a hundred bytes may ask for gigabytes.

    max_megapixels, value_range: as in the configuration's `data` section. resizes: for each transforms pipeline, what
    gives the sizes that its resizes make of (width, height).
    """

    max_megapixels: float = _DEFAULT.max_megapixels
    value_range: float | None = _DEFAULT.value_range
    resizes: tuple[Callable[[Size], Iterable[Size]], ...] = ()

    @property
    def settings(self) -> bytes:
        """What is found in a file besides its content and size depends on this; empty where it is the default."""
        return b"" if self.value_range == _DEFAULT.value_range else repr(self.value_range).encode()

    def check(self, size: Size, name: str) -> None:
        """Raise ImageError, naming the image, for one that is too large or would become so."""
        if _megapixels(size) > self.max_megapixels:
            raise ImageError(
                f"{name}: {_in_words(size)} pixels are too many ({_megapixels(size):.3g} megapixels); scale it down, "
                f"or raise data.max_megapixels ({self.max_megapixels:g}) if it is a photograph"
            )
        for resized in (resized for sizes in self.resizes for resized in sizes(size)):
            if _megapixels(resized) > self.max_megapixels or min(resized) < 1:
                fault = "nothing" if min(resized) < 1 else f"more than data.max_megapixels ({self.max_megapixels:g})"
                raise ImageError(
                    f"{name}: {_in_words(size)} pixels would be resized to {_in_words(resized)}, {fault}; crop it, or "
                    "give Resize both sides"
                )


def _megapixels(size: Size) -> float:
    return size[0] * size[1] / 1e6


def _in_words(size: Size) -> str:
    return " x ".join(f"{int(side):,}" for side in size)


STANDARD = Decoding()


def load(path: Path, decoding: Decoding = STANDARD) -> Image.Image:
    """The image in a file as an upright RGB image with values in [0, 255]. Raises ImageError, naming the file."""
    return decode(read(path), path, decoding)


def read(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """The bytes of an image file, or of the part of a file that is one, fewer where it is shorter than that.

    Raises ImageError for a file that is empty, or where reading could wait for ever.
    """
    try:
        with open(path, "rb", opener=_open_ordinary) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise ImageError(f"{printable(str(path))}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise ImageError(f"{printable(str(path))}: cannot be read: {error}") from error
    if not data and size < 0:
        raise ImageError(f"{printable(str(path))}: empty file (0 bytes); replace or remove it")
    return data


def _open_ordinary(path: str, flags: int) -> int:
    """Open a file, but no pipe, whose other end could be waited for, and no device, which could be read for ever."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ImageError(f"{printable(path)}: not an ordinary file; remove it from the dataset")


def decode(data: bytes, name: object, decoding: Decoding = STANDARD, *, draft: int = 0) -> Image.Image:
    """The image in a file's bytes as an upright RGB image; `name` is what an error calls it.

    draft: every byte is read, but a JPEG may be decoded to as little as an eighth of its size, which is several times
    faster, with sides of at least so many pixels; 0 for the whole image.
    """
    name = printable(str(name))
    try:
        image = _opened(data)
        if image is None:
            raise ImageError(f"{name}: not an image in one of the formats {', '.join(FORMATS)}")
        with image:
            size = image.size
            decoding.check(size, name)
            if draft:
                image.draft("RGB", (draft, draft))
            picture = upright_rgb(image, decoding.value_range)
            picture.info[_SIZE] = size
            return picture
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(
            f"{name}: more pixels than Pillow decodes of its format; scale it down, or make a JPEG or PNG of it"
        ) from None
    except Exception as error:  # a decoder fed with broken bytes raises anything from OSError to IndexError
        if is_out_of_memory(error) or memory_is_short():  # decoders have no words of their own for it
            raise MemoryError(f"{name}: {error}") from error
        raise ImageError(f"{name}: damaged image: {error or type(error).__name__}") from error


def _opened(data: bytes) -> ImageFile.ImageFile | None:
    """The image whose header has been read; None where no format fits.

    As Pillow's `Image.open` does it, which also has a limit on pixels, but one for the whole process.
    """
    Image.preinit()
    for form in FORMATS:
        if form not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN[form]
        fits = accept is None or accept(data[:16])
        if fits and not isinstance(fits, str):  # why it cannot be decoded here
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    return None


def upright_rgb(image: Image.Image, value_range: float | None = None) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says; not converted again where it is both."""
    return to_rgb(_upright(image), value_range)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says.

    Not ImageOps.exif_transpose: it also writes the EXIF block anew, which fails for a photograph whose other tags are
    not as the standard wants them.
    """
    image.load()  # a PNG may have its EXIF block after the pixels
    method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image, value_range: float | None = None) -> Image.Image:
    """An image of any mode as RGB with values in [0, 255]; what is transparent becomes white.

    value_range: the value that is white in grey images of more than 8 bits. None: 65535 for 16 bits; modes without a
    nominal range (I and F) are scaled by the smallest of 1 (F only), 255, 65535 and 2^32 - 1 that holds their largest.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        floor = 65535 if image.mode.startswith("I;16") else 255
        return _from_grey(np.asarray(image), value_range, floor)
    if image.mode == "F":
        return _from_grey(np.nan_to_num(np.asarray(image, dtype=np.float64)), value_range, 1)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return canvas
    return image.convert("RGB")


def _from_grey(values: np.ndarray, white: float | None, least: int) -> Image.Image:
    """Grey values in [0, white] -> RGB; white is None: the smallest range from `least` on that holds them.

    65535 maps to 255 by dividing by 257, so 16-bit ramps keep 256 levels.
    """
    largest, found = float(values.max()), white
    if found is None:
        found = next((limit for limit in (1, 255, 65535) if limit >= least and largest <= limit), 2**32 - 1)
    grey = np.clip(np.rint(values.astype(np.float64) * (255 / found)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(grey, "L").convert("RGB")
    if white is None and found > 1 and 0 < largest < found / 4:
        picture.info[_DARK] = largest
    return picture


def dark(picture: Image.Image) -> float:
    """The largest value of a grey image that leaves three quarters of its range unused; 0 for every other image."""
    return float(picture.info.get(_DARK, 0))


def size_in_file(picture: Image.Image) -> tuple[int, int]:
    """Width and height before the image was turned upright, and scaled down for a draft."""
    width, height = picture.info.get(_SIZE, picture.size)
    return width, height


class DarkImages:
    """Counts the images that `dark` finds, to name them once."""

    def __init__(self) -> None:
        self.count, self.first, self.largest = 0, "", 0.0

    def add(self, name: str, largest: float) -> None:
        """An image, and what `dark` says of it."""
        if largest:
            self.first = self.first or f"{printable(name)}, whose largest is {largest:g}"
            self.count, self.largest = self.count + 1, max(self.largest, largest)

    def warn(self, of: str) -> None:
        """Say how many `of` all images they are, if any, and what to do."""
        if self.count:
            log.warning(
                "%d of %s have no grey value above a quarter of their range and would be nearly black, e.g. %s; set "
                "data.value_range to what is white in them, such as %d",
                *(self.count, of, self.first, 2 ** int(self.largest).bit_length() - 1),
            )
