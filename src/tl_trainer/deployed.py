"""A trained classifier as one module from pixels to probabilities, for programs that have no tl-trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from tl_trainer.data.resampling import FILTERS, Resample, Sampling
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import InputError
from tl_trainer.metrics import Activation
from tl_trainer.models.classifier import Classifier

_NOTHING = (v2.Identity, v2.RGB, v2.ToImage, v2.PILToTensor, v2.ToPureTensor)


class Pixels(nn.Module):
    """uint8 (N, H, W, 3), upright RGB -> what the network takes, as the pipeline makes it of each image.

    Raises InputError, with the remedy, for a pipeline of other transforms.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        samplings, rest = _split(pipeline.transforms)
        if not samplings or any(sampling.size is None for sampling in samplings):
            raise _refused("images of any size (it has no CenterCrop and no Resize to [height, width])")
        self.resamples = nn.Sequential(*map(Resample, samplings))
        self.normalisations = nn.Sequential(*map(_Normalisation, rest))

    def forward(self, images: Tensor) -> Tensor:
        resampled = self.resamples(images.permute(0, 3, 1, 2).double())
        return self.normalisations(resampled.float() / 255)  # type: ignore[no-any-return]


class Deployed(nn.Module):
    """Pixels, or what the network takes where `pixels` is None -> the probabilities (N, classes) of all heads."""

    def __init__(self, pixels: Pixels | None, classifier: Classifier, heads: Sequence[Activation]) -> None:
        super().__init__()
        stages = [stage.module for stage in (*classifier.frozen, *classifier.trained)]
        self.network = nn.Sequential(pixels or nn.Identity(), *stages, nn.Flatten(1), classifier.head)
        self.heads = heads
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.split(self.network(images), [head.classes for head in self.heads], dim=1)
        scaled = [(own / head.temperature, head.several) for own, head in zip(logits, self.heads, strict=True)]
        return torch.cat([own.sigmoid() if several else own.softmax(dim=1) for own, several in scaled], dim=1)


class _Normalisation(nn.Module):
    def __init__(self, transform: v2.Normalize) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(transform.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(transform.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std  # type: ignore[operator]


def _split(transforms: Sequence[v2.Transform]) -> tuple[list[Sampling], list[v2.Normalize]]:
    """The resizes and crops, and after them the normalisations."""
    samplings: list[Sampling] = []
    rest: list[v2.Normalize] = []
    tensor = scaled = False
    for transform in transforms:
        name = type(transform).__name__
        tensor = tensor or isinstance(transform, (v2.ToImage, v2.PILToTensor))
        if isinstance(transform, v2.Resize):
            samplings.append(_resize(transform))
            if tensor:
                raise _refused("Resize after ToImage, where torchvision resizes otherwise than Pillow")
        elif isinstance(transform, v2.CenterCrop) and not rest:
            open_ended = samplings and samplings[-1].crop is None
            before = samplings.pop() if open_ended else Sampling()
            samplings.append(Sampling(before.resize, tuple(transform.size), before.interpolation))
        elif isinstance(transform, (v2.ToDtype, v2.ConvertImageDtype)):
            scaled = True
        elif isinstance(transform, v2.Normalize) and scaled:
            rest.append(transform)
        elif not isinstance(transform, _NOTHING):
            raise _refused(name)
    return samplings, rest


def _resize(transform: v2.Resize) -> Sampling:
    mode = InterpolationMode(transform.interpolation).value
    if mode not in FILTERS or transform.max_size is not None or transform.size is None:
        raise _refused(f"{transform} (it holds {', '.join(FILTERS)} without max_size)")
    return Sampling(tuple(transform.size), None, mode)


def _refused(what: str) -> InputError:
    return InputError(
        f"the preprocessing has {what}, and an export can hold Resize, CenterCrop, ToDtype and Normalize; leave the "
        "preprocessing to the program that uses it, with --from tensor"
    )
