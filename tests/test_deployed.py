"""One module from pixels to probabilities: the same as the pipeline and the classifier; what it cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import tiny_classifier
from tl_trainer.data.transforms import Pipeline, Preprocessing, spell_out
from tl_trainer.deployed import Deployed, Pixels
from tl_trainer.errors import InputError
from tl_trainer.metrics import Activation

PRESET = Preprocessing(resize=12, crop=8, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), interpolation="bilinear")


def pipeline(items: Any) -> Pipeline:
    return Pipeline(spell_out(items, PRESET, train=False), "transforms.eval")


@pytest.mark.parametrize(
    "items",
    [
        "default",
        [{"Resize": [9, 7]}],
        [{"CenterCrop": 9}, {"Resize": {"size": [8, 8], "interpolation": "bicubic"}}],
        [{"Resize": 12}, "ToTensor", {"CenterCrop": 14}],
        [{"CenterCrop": 8}, "ToTensor", {"Normalize": [[0.1] * 3, [0.5] * 3]}, {"Normalize": [[0.2] * 3, [0.7] * 3]}],
    ],
)
def test_it_gives_what_the_pipeline_and_the_classifier_give(items: Any) -> None:
    one, classifier = pipeline(items), tiny_classifier().eval()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 21, 3), dtype=np.uint8)
    view = one.batch(one.image(Image.fromarray(pixels))[None])
    batch = torch.from_numpy(pixels)[None].expand(2, -1, -1, -1)
    torch.testing.assert_close(Pixels(one)(batch), view.expand(2, -1, -1, -1))
    with torch.no_grad():
        expected = (classifier(view)[0] / 2.5).softmax(dim=0)
        head = [Activation(len(expected), 2.5, several=False)]
        torch.testing.assert_close(Deployed(None, classifier, head)(view)[0], expected)
        torch.testing.assert_close(Deployed(Pixels(one), classifier, head)(batch)[1], expected)


@pytest.mark.parametrize(
    ("items", "named"),
    [
        ([{"CenterCrop": 8}, {"Grayscale": 3}], "Grayscale"),
        ([{"Pad": 2}, {"CenterCrop": 8}], "Pad"),
        (["ToImage", {"Resize": [8, 8]}], "Resize after ToImage"),
        ([{"Resize": {"size": 8, "max_size": 9}}, {"CenterCrop": 8}], "max_size"),
        ([{"Resize": {"size": [8, 8], "interpolation": "nearest"}}], "NEAREST"),
        ([{"Resize": 8}], "images of any size"),
        ([], "images of any size"),
    ],
)
def test_what_it_cannot_hold_is_named_with_the_remedy(items: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"has .*{named}.* --from tensor"):
        Pixels(pipeline(items))
