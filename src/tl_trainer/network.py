"""A classifier on its device with the fast form of its frozen prefix: what training, evaluation and prediction run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import PIL
import torch
import torchvision
from torch import Tensor

from tl_trainer.config.schema import FeaturesSection
from tl_trainer.data.content import contents
from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import Batch, ImageBatches, readable
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import require_memory
from tl_trainer.evaluate import evaluate
from tl_trainer.features import EVALUATED_AT_ONCE, Extractor, FeatureBatches, features_folder
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.prefix import DTYPES, FrozenPrefix, prefix_precision

log = logging.getLogger(__name__)

# To be raised with every change to how an image becomes features.
CACHE_VERSION = 1

Forward = Callable[[Tensor], Tensor]


class Batches(Protocol):
    """Batches of images or of cached features."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int, device: torch.device, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""


class Feed(NamedTuple):
    """A split's batches, the function that takes their inputs to logits, and the images that could be read."""

    batches: Batches
    forward: Forward
    split: Split


class Network:
    """The classifier and its frozen prefix. `prefix` is made when the first image needs it.

    precision: `auto`, fp32, bf16 or fp16, as in `train.precision`. identity: the backbone's name, weights and hash.
    Raises SettingError for a precision that the device does not have.
    """

    def __init__(
        self,
        classifier: Classifier,
        device: torch.device,
        precision: str,
        features: FeaturesSection,
        identity: dict[str, Any],
        *,
        compiled: bool = False,
    ) -> None:
        require_memory()
        self.classifier = classifier.to(device)
        self.device = device
        self.precision = prefix_precision(precision, device)
        # The part that trains follows the prefix to lower precision on a GPU, on a processor only when told to.
        lower = self.precision != "fp32" and (
            precision != "auto" or (device.type == "cuda" and classifier.trained != [])
        )
        self.autocast = DTYPES[self.precision] if lower else None
        self.compiled = compiled
        self._prefix: FrozenPrefix | None = None
        self.extractor: Extractor | None = None
        if classifier.frozen and features.cache == "auto":
            self.extractor = Extractor(
                make_prefix=self.prefix,
                identity={
                    "backbone": identity["name"],
                    "sha256": identity["sha256"],
                    "stages": [stage.name for stage in classifier.frozen],
                    "precision": self.precision,
                    "device": device.type,
                    "versions": [CACHE_VERSION, torchvision.__version__, PIL.__version__],
                },
                folder=features_folder(features),
                limit=int(features.limit_gb * 1e9),
                device=device,
            )

    def prefix(self, images: int = 0) -> FrozenPrefix:
        """The fast frozen prefix; `images` is how many it will compute, for deciding whether to compile it."""
        if self._prefix is None:
            worth = images if self.compiled else 0
            self._prefix = FrozenPrefix(
                self.classifier.frozen, self.device, self.precision, images_to_compile_for=worth
            )
        return self._prefix

    def images_to_logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes) float32."""
        if self.classifier.frozen:
            # A copy, since autograd cannot save what was made in inference mode.
            images = self.prefix()(images).to(torch.float32, copy=True)
        return self.features_to_logits(images)

    def features_to_logits(self, features: Tensor) -> Tensor:
        """The frozen prefix's output, float32 -> (N, classes) float32."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.classifier.suffix(features).float()

    def contents(self, split: Split) -> list[str]:
        """What tells the images of the split from others, as `data.content.contents`."""
        return contents(split, self.extractor.memory if self.extractor else None)

    def embed(self, split: Split, pipeline: Pipeline, batch_size: int) -> Tensor:
        """The input of the head for every image of the split, (N, features) float32 on the CPU."""
        feed = self.evaluation_feed(split, "", pipeline, "changed", batch_size, workers=0)
        features: list[Tensor] = []

        def keep(head: object, inputs: tuple[Tensor, ...]) -> None:
            features.append(inputs[0].float().cpu())

        hook = self.classifier.head.register_forward_pre_hook(keep)
        try:
            evaluate(feed.forward, feed.batches.epoch(0, self.device))
        finally:
            hook.remove()
        return torch.cat(features)

    def training_feed(
        self,
        split: Split,
        pipeline: Pipeline,
        on_bad_image: str,
        *,
        batch_size: int,
        workers: int,
        seed: int,
        views: int,
    ) -> Feed:
        """Shuffled batches for training: cached features where the transform is not random or views are kept."""
        if self.extractor is not None and (pipeline.deterministic or views > 1):
            features = self.extractor.features(split, "train", pipeline, on_bad_image, views, seed)
            batches = FeatureBatches(features, batch_size=batch_size, seed=seed, shuffle=True)
            return Feed(batches, self.features_to_logits, features.split)
        if self.extractor is not None:
            log.info(
                "transforms.train is random, so every epoch computes the frozen stages again; to compute them once, "
                "set transforms.train=eval, or features.views to the number of random views to keep"
            )
        split = readable(split, "train", on_bad_image)
        images = ImageBatches(split, pipeline, batch_size=batch_size, workers=workers, seed=seed, shuffle=True)
        return Feed(images, self.images_to_logits, split)

    def evaluation_feed(
        self, split: Split, what: str, pipeline: Pipeline, on_bad_image: str, batch_size: int, workers: int
    ) -> Feed:
        """Batches in the split's order for evaluation: cached features where something is frozen."""
        if self.extractor is not None and pipeline.deterministic:
            features = self.extractor.features(split, what, pipeline, on_bad_image)
            size = batch_size if self.classifier.trained else EVALUATED_AT_ONCE
            return Feed(FeatureBatches(features, batch_size=size), self.features_to_logits, features.split)
        split = readable(split, what, on_bad_image)
        return Feed(ImageBatches(split, pipeline, batch_size=batch_size, workers=workers), self.images_to_logits, split)
