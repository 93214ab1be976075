"""Pillow's resize and torchvision's crop as matrix products, against Pillow and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tl_trainer.data.resampling import FILTERS, Resample, Sampling

SAMPLINGS = [
    ((64,), (56, 56)),
    ((64, 48), None),
    ((20, 90), None),
    ((), (40, 30)),
    ((33,), (40, 41)),
    ((58,), (56, 57)),
]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("resize", "crop"), SAMPLINGS)
@pytest.mark.parametrize("size", [(75, 100), (101, 75), (8, 9), (64, 64), (150, 31), (1, 1)])
def test_pixels_are_those_of_pillow(
    size: tuple[int, int], resize: tuple[int, ...], crop: tuple[int, int] | None, interpolation: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if resize:
        height, width = resize if len(resize) == 2 else (int(resize[0] * length / min(size)) for length in size)
        picture = picture.resize((width, height), Image.Resampling[interpolation.upper()])
    expected = v2.Compose([v2.CenterCrop(crop or resize), v2.PILToTensor()])(picture).double()
    resample = Resample(Sampling(resize, crop, interpolation))
    found = resample(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).double())[0]
    assert found.shape == (3, *resample.size)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (300, 300), (900, 290)])
def test_photographs_are_resized_as_torchvision_does(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(picture)
    found = Resample(Sampling((256,), (224, 224)))(v2.functional.pil_to_tensor(picture)[None].double())[0]
    assert torch.equal(found, expected.double())
