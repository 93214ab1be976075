"""What the pixels say, against scipy's transform and Laplacian."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.fft import dctn
from scipy.ndimage import laplace

from tl_trainer.data.pixels import BITS, NUMBERS, SIDE, Look, look, mirrored


def picture(seed: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    """Smooth coloured noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def seen(*pictures: Image.Image) -> Look:
    return Look.of(np.stack([*map(look, pictures)]))


def differing(first: Image.Image, second: Image.Image) -> int:
    hashes = seen(first, second).hashes
    return int((hashes[0] != hashes[1]).sum())


def test_the_hash_is_the_signs_of_the_cosine_transform() -> None:
    grey = np.asarray(picture(0).convert("L").resize((32, 32), Image.Resampling.BOX), dtype=float)
    expected = np.sign(dctn(grey)[1:9, 1:9]).ravel()
    assert seen(picture(0)).hashes[0].tolist() == expected.tolist()


def test_the_hash_of_the_mirror_image_follows() -> None:
    flipped = picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert mirrored(seen(picture(1)).hashes)[0].tolist() == seen(flipped).hashes[0].tolist()
    assert differing(picture(1), flipped) > BITS / 4


def test_another_size_and_quality_change_few_bits_and_another_picture_half() -> None:
    buffer = io.BytesIO()
    picture(2).resize((70, 52)).save(buffer, "JPEG", quality=40)
    assert differing(picture(2), Image.open(buffer)) <= 4
    assert differing(picture(2), picture(3)) > BITS / 4


def test_light_and_sharpness_are_measured_at_one_scale() -> None:
    small = picture(4)
    grey = np.asarray(small.convert("L"), dtype=float)
    found = seen(small, picture(4, (1280, 960)))
    assert found.brightness[0] == pytest.approx(grey.mean() / 255, rel=1e-4)
    assert found.contrast[0] == pytest.approx(grey.std() / 255, rel=1e-4)
    assert found.sharpness[0] == pytest.approx(laplace(grey, mode="nearest").var(), rel=1e-3)
    assert (found.width.tolist(), found.height.tolist()) == ([128, 1280], [96, 960])
    shrunk = picture(4, (1280, 960)).convert("L").resize((341, SIDE), Image.Resampling.BICUBIC)
    expected = laplace(np.asarray(shrunk, dtype=float), mode="nearest").var()
    assert found.sharpness[1] == pytest.approx(expected, rel=0.3)


def test_a_blurred_picture_is_less_sharp() -> None:
    noise = Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sharp, blurred = seen(noise, noise.filter(ImageFilter.GaussianBlur(2))).sharpness
    assert sharp > 20 * blurred > 0


def test_one_pixel_has_numbers_too() -> None:
    row = look(Image.new("RGB", (1, 1), "white"))
    assert (row.shape, row.dtype, row[:5].tolist()) == ((NUMBERS,), np.float32, [1, 1, 1, 0, 0])
