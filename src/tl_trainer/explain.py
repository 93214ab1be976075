"""Where the evidence for a class is in an image: Grad-CAM (Selvaraju et al., ICCV 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional

from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import InputError
from tl_trainer.models.classifier import Classifier

OPACITY = 0.65
GAP = 6
COLUMNS, TILE, CAPTION = 5, 96, 16  # of the pictures below another; sides and heights in pixels


class GradCam:
    """Heat maps of the last stage of the classifier's chain whose output has a height and a width.

    Raises InputError, when the first image comes, where there is no such stage.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier.eval()
        self.stages = [stage.module for stage in [*classifier.frozen, *classifier.trained]]
        self._cut: int | None = None

    def heat(self, images: Tensor, targets: Tensor) -> Tensor:
        """Heat in [0, 1], (N, H, W), for the class of each target; zero everywhere where nothing speaks for it.

        images: (N, 3, H, W) as the network takes them, on its device.
        """
        with torch.no_grad():
            if self._cut is None:
                self._cut = _last_spatial(self.stages, images[:1])
            activations = nn.Sequential(*self.stages[: self._cut])(images)
        rest = nn.Sequential(*self.stages[self._cut :], nn.Flatten(), self.classifier.head)
        with torch.enable_grad():  # the gradient is only needed from here on
            logits = rest(activations.requires_grad_().clone())  # a copy, since a stage may work in place
            (slope,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), activations)
        weights = slope.mean(dim=(2, 3), keepdim=True)
        small = (weights * activations.detach()).sum(dim=1, keepdim=True).relu()
        heat = interpolate(small, images.shape[-2:], mode="bilinear")[:, 0]
        return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)

    def picture(self, pipeline: Pipeline, tensor: Tensor, target: int) -> Image.Image:
        """An image as the network sees it, and beside it the same under the heat of class `target`.

        tensor: (3, H, W) as `pipeline.image` gives it.
        """
        return self.pictures(pipeline, tensor[None], [target])[0]

    def pictures(self, pipeline: Pipeline, tensors: Tensor, targets: Sequence[int]) -> list[Image.Image]:
        """`picture` for images of one size in one batch, (N, 3, H, W)."""
        device = next(self.classifier.parameters()).device
        inputs = pipeline.batch(tensors.to(device))
        heat = self.heat(inputs, torch.tensor(targets, device=device))
        return [overlay(*pair) for pair in zip(pipeline.denormalise(inputs), heat, strict=True)]


def overlay(picture: Tensor, heat: Tensor) -> Image.Image:
    """The picture, and beside it the same under its heat. picture: (3, H, W) in [0, 1]; heat: (H, W) in [0, 1]."""
    from matplotlib import colormaps

    picture, heat = picture.cpu(), heat.cpu()
    colours = torch.from_numpy(colormaps["turbo"](heat.numpy())[..., :3]).permute(2, 0, 1).float()
    covered = picture * (1 - OPACITY * heat) + colours * OPACITY * heat
    gap = torch.ones(3, picture.shape[1], GAP)
    return functional.to_pil_image(torch.cat([picture, gap, covered], dim=2))  # type: ignore[no-any-return]


def sheet(picture: Image.Image, tiles: Sequence[tuple[Image.Image | None, str]]) -> Image.Image:
    """The picture, and below it others in rows, each with a caption; for one that is None an empty place."""
    columns = min(COLUMNS, len(tiles))
    side = max(TILE, (picture.width + GAP) // columns - GAP)
    width, height = side + GAP, side + CAPTION
    rows = -(-len(tiles) // columns)
    whole = max(picture.width, columns * width - GAP), picture.height + rows * (GAP + height)
    page, font = Image.new("RGB", whole, "white"), ImageFont.load_default(11)
    page.paste(picture)
    for number, (image, caption) in enumerate(tiles):
        row, column = divmod(number, columns)
        tile = Image.new("RGB", (side, height), "white")
        if image is not None:
            tile.paste(ImageOps.contain(image, (side, side)))
        ImageDraw.Draw(tile).text((0, side), caption, "black", font)
        page.paste(tile, (column * width, picture.height + GAP + row * (GAP + height)))
    return page


def _last_spatial(stages: list[nn.Module], image: Tensor) -> int:
    """How many stages lead to the last output with a height and a width."""
    found = 0
    for number, stage in enumerate(stages, start=1):
        image = stage(image)
        if image.dim() == 4 and max(image.shape[2:]) > 1:
            found = number
    if not found:
        raise InputError("Grad-CAM needs a stage with a height and a width, and this backbone's chain has none")
    return found
