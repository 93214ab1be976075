"""Grad-CAM: the heat lies where the evidence is, for every backbone; a backbone without a spatial stage is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from PIL import Image, ImageDraw
from torch import Tensor, nn

from tl_trainer.data.transforms import Pipeline, Preprocessing, spell_out
from tl_trainer.errors import InputError
from tl_trainer.explain import GAP, GradCam, overlay, sheet
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.chain import Backbone, Stage
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import build_head

SIDE = 64
COLOURS = {0: "red", 1: "blue"}


def drawn(generator: torch.Generator) -> tuple[Image.Image, int, tuple[int, int]]:
    """Grey noise with a disc in one quadrant, whose colour is the class: (picture, class, (row, column))."""
    noise = torch.randint(96, 160, (SIDE, SIDE), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy()).convert("RGB")
    label, row, column = torch.randint(0, 2, (3,), generator=generator).tolist()
    half, margin = SIDE // 2, 8
    box = [column * half + margin, row * half + margin, (column + 1) * half - margin, (row + 1) * half - margin]
    ImageDraw.Draw(picture).ellipse(box, fill=COLOURS[label])
    return picture, label, (row, column)


def batch(pipeline: Pipeline, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    pictures, labels, quadrants = zip(*(drawn(generator) for _ in range(count)), strict=True)
    inputs = pipeline.batch(torch.stack([pipeline.image(picture) for picture in pictures]))
    return inputs, torch.tensor(labels), list(quadrants)


def quadrant_share(heat: Tensor, quadrant: tuple[int, int]) -> float:
    half = SIDE // 2
    (row, column), total = quadrant, heat.sum()
    return (heat[row * half : (row + 1) * half, column * half : (column + 1) * half].sum() / total).item()


def test_a_sheet_has_pictures_in_rows_below_another() -> None:
    red, tall = (Image.new("RGB", size, "red") for size in ((454, 224), (40, 80)))
    page = sheet(red, [(tall, "0.93 red"), (None, "0.92 blue"), *[(tall, "0.90 ünï 蜂")] * 4])
    side, below = (454 + 6) // 5 - 6, 224 + 6
    side = max(side, 96)
    assert page.size == (5 * (side + 6) - 6, 224 + 2 * (6 + side + 16))
    assert page.getpixel((200, 100)) == page.getpixel((10, below + 10)) == (255, 0, 0)
    assert page.getpixel((side + 6 + 10, below + 10)) == (255, 255, 255)  # one that is gone
    second = page.crop((0, below + side + 16 + 6, side, page.height))
    assert second.getpixel((10, 10)) == (255, 0, 0)
    captions = page.crop((0, below + side, side, below + side + 16))
    assert min(captions.convert("L").getextrema()) < 100


def test_the_heat_is_in_the_quadrant_of_the_evidence() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    preprocessing = Preprocessing(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3, "bilinear")
    pipeline = Pipeline(spell_out("default", preprocessing, train=False), "transforms.eval")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
    )
    backbone = Backbone(model, [Stage(name, module, (name,)) for name, module in model.named_children()])
    classifier = Classifier(backbone, build_head(16, [], 2, 0.0), "all")
    inputs, labels, _ = batch(pipeline, generator, 64)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(inputs), labels).backward()
        optimizer.step()
    inputs, labels, quadrants = batch(pipeline, generator, 16)
    with torch.no_grad():
        assert (classifier(inputs).argmax(1) == labels).all()
    for heat, quadrant in zip(GradCam(classifier).heat(inputs, labels), quadrants, strict=True):
        assert quadrant_share(heat, quadrant) > 0.6


@pytest.mark.parametrize("trainable", ["head", "all"])
@pytest.mark.parametrize("backbone", ["alexnet", "vgg16", "resnet18", "efficientnet_b0", "densenet121", "swin_t"])
def test_every_chain_with_a_spatial_stage_can_be_explained(backbone: str, trainable: str) -> None:
    if backbone == "vgg16" and trainable == "all":
        pytest.skip("the same path as alexnet's, at the cost of seconds")
    chain = build_backbone(backbone, resolve_weights(backbone, "none"), "penultimate", 0)
    assert chain.features is not None
    torch.manual_seed(0)
    classifier = Classifier(chain, build_head(chain.features, [8], 3, 0.5), trainable)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    images = torch.randn(2, 3, 96, 96)
    heat = GradCam(classifier).heat(images, torch.tensor([0, 2]))
    assert heat.shape == (2, 96, 96)
    assert heat.isfinite().all()
    assert 0 <= heat.min() <= heat.max() <= 1
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_the_heat_is_captums() -> None:
    chain = build_backbone("shufflenet_v2_x0_5", resolve_weights("shufflenet_v2_x0_5", "none"), "penultimate", 0)
    torch.manual_seed(0)
    classifier = Classifier(chain, build_head(1024, [8], 3, 0.5), "head").eval()
    images, targets = torch.randn(3, 3, 96, 96), torch.tensor([0, 2, 1])
    stages = nn.Sequential(*(stage.module for stage in classifier.frozen), nn.Flatten(), classifier.head)
    last = [stage.name for stage in classifier.frozen].index("conv5.2")
    found = LayerGradCam(stages, stages[last]).attribute(images.requires_grad_(), targets, relu_attributions=True)
    large = LayerAttribution.interpolate(found.detach(), (96, 96), "bilinear")[:, 0]
    assert large.amax() > 0
    expected = large / large.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(large.dtype).tiny)
    torch.testing.assert_close(GradCam(classifier).heat(images.detach(), targets), expected)


def test_pictures_of_a_batch_are_those_of_each() -> None:
    pipeline = Pipeline(
        spell_out("default", Preprocessing(96, 96, (0.5,) * 3, (0.5,) * 3, "bilinear"), train=False), ""
    )
    chain = build_backbone("shufflenet_v2_x0_5", resolve_weights("shufflenet_v2_x0_5", "none"), "penultimate", 0)
    cam = GradCam(Classifier(chain, build_head(1024, [], 2, 0.0), "head"))
    tensors = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    together = cam.pictures(pipeline, tensors, [0, 1, 1])
    for picture, tensor, target in zip(together, tensors, [0, 1, 1], strict=True):
        apart = np.asarray(cam.picture(pipeline, tensor, target), dtype=int)
        assert abs(np.asarray(picture, dtype=int) - apart).max() <= 1  # sums in another order


def test_a_backbone_without_a_spatial_stage_is_told() -> None:
    chain = build_backbone("vit_b_16", resolve_weights("vit_b_16", "none"), "penultimate", 0)
    classifier = Classifier(chain, build_head(768, [], 2, 0.0), "head")
    with pytest.raises(InputError, match="a stage with a height and a width"):
        GradCam(classifier).heat(torch.randn(1, 3, 224, 224), torch.tensor([0]))


def test_no_heat_leaves_the_picture_as_it_is() -> None:
    picture = torch.rand(3, 20, 30)
    shown = overlay(picture, torch.zeros(20, 30))
    assert shown.size == (2 * 30 + GAP, 20)
    assert shown.crop((0, 0, 30, 20)).tobytes() == shown.crop((30 + GAP, 0, 60 + GAP, 20)).tobytes()


def test_much_heat_changes_the_right_half_only_where_it_is() -> None:
    heat = torch.zeros(20, 30)
    heat[:, :10] = 1
    shown = overlay(torch.full((3, 20, 30), 0.5), heat)
    left, right = shown.crop((0, 0, 30, 20)), shown.crop((30 + GAP, 0, 60 + GAP, 20))
    assert left.getextrema() == ((127, 127),) * 3
    assert right.crop((10, 0, 30, 20)).getextrema() == ((127, 127),) * 3
    assert right.getpixel((5, 10)) != (127, 127, 127)
