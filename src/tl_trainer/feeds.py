"""Splits -> batches for the network: cached features where something is frozen and can be kept, else images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import Batch, ImageBatches, Part
from tl_trainer.data.transforms import Pipeline
from tl_trainer.evaluate import evaluate
from tl_trainer.features import EVALUATED_AT_ONCE, Extractor, FeatureBatches, NoRoom
from tl_trainer.ground import distributed
from tl_trainer.network import Network

log = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]

# The most views that `features.views: auto` keeps of an image.
AUTO_VIEWS = 10


class Batches(Protocol):
    """Batches of images or of cached features."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int, device: torch.device, start: int = 0, step: int = 1) -> Iterator[Batch]:
        """Every `step`-th batch of an epoch from number `start` on."""

    def close(self) -> None:
        """End what the epochs share, such as processes."""


@dataclass(frozen=True)
class Feed:
    """A split, its batches, and what takes their inputs to logits and to the input of the head."""

    split: Split
    batches: Batches
    logits: Forward
    embed: Forward


def close(feeds: dict[str, Feed]) -> None:
    """End what the feeds share among their epochs, such as processes."""
    for feed in feeds.values():
        feed.batches.close()


@dataclass
class Feeds:
    """Makes the feeds of one network. `extractor` is the feature cache, None where there is none."""

    network: Network
    extractor: Extractor | None
    batch_size: int
    workers: int
    seed: int
    balanced: bool = False  # whether training batches have every class equally often

    def of_run(
        self,
        splits: Mapping[str, Split],
        train_pipeline: Pipeline,
        pipeline: Pipeline,
        views: int | Literal["auto"],
        epochs: int,
    ) -> dict[str, Feed]:
        """The feeds of a run's splits; what is frozen is computed here where it is not in the cache.

        views: as `features.views`; auto goes without them where the run's features would not fit into the cache.
        """
        auto = views == "auto" and not train_pipeline.deterministic
        kept = 1 if train_pipeline.deterministic else views_kept(views, epochs)
        others = {name: split for name, split in splits.items() if name != "train"}
        rows = sum(split.different for split in others.values())
        if self.extractor is not None:
            self.extractor.plan(rows + kept * splits["train"].different, (train_pipeline, pipeline))
        try:
            train = self.training(splits["train"], train_pipeline, kept)
            if not train_pipeline.deterministic:
                self._say(kept, auto=auto)
        except NoRoom as error:
            if not auto or self.extractor is None:
                raise
            log.info("features.views: auto keeps none, so every epoch computes the frozen stages: %s", error.fact)
            self.extractor.plan(rows, (pipeline,))
            train = self.training(splits["train"], train_pipeline, 0)
        return {
            name: self.evaluation(split, name, pipeline) if name in others else train for name, split in splits.items()
        }

    def _say(self, kept: int, *, auto: bool) -> None:
        """Say in a line what is kept of a random transform."""
        if auto and not self.network.classifier.frozen:
            log.info("features.views: auto keeps nothing, since model.trainable is all and nothing is frozen")
        elif auto and self.extractor is not None:
            number = "a random view" if kept == 1 else f"{kept} random views"
            log.info("features.views: auto keeps %s of each training image", number)
        elif not kept and self.extractor is not None:
            log.info("features.views is 1 and transforms.train random: every epoch computes the frozen stages again")

    def training(self, split: Split, pipeline: Pipeline, views: int = 1) -> Feed:
        """Shuffled batches: cached features of as many views, images where that is 0 or there is no cache."""
        # BatchNorm that trains has no variance to take from a single image; other runs keep the batches they had.
        smallest = 2 if self.network.classifier.trains_batch_norm else 1
        order: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "balanced": self.balanced}
        order |= {"shuffle": True, "smallest": smallest, "part": Part(distributed.rank(), distributed.world())}
        if self.extractor is not None and views:
            features = self.extractor.features(split, "train", pipeline, views, self.seed)
            return self._of_features(FeatureBatches(features, **order))
        return self._of_images(ImageBatches(split, pipeline, workers=self.workers, **order))

    def evaluation(self, split: Split, what: str, pipeline: Pipeline) -> Feed:
        """Batches in the split's order: cached features where something is frozen. `what` is the split's name."""
        if self.extractor is not None and pipeline.deterministic:
            features = self.extractor.features(split, what, pipeline)
            size = self.batch_size if self.network.classifier.trained else EVALUATED_AT_ONCE
            return self._of_features(FeatureBatches(features, batch_size=size))
        return self._of_images(ImageBatches(split, pipeline, batch_size=self.batch_size, workers=self.workers))

    def embed(self, split: Split, pipeline: Pipeline, what: str = "") -> Tensor:
        """The input of the head for every image of the split, (N, features) float32 on the CPU. what: its name."""
        feed = self.evaluation(split, what, pipeline)
        return evaluate(feed.embed, feed.batches.epoch(0, self.network.device)).logits

    def _of_features(self, batches: FeatureBatches) -> Feed:
        return Feed(batches.features.split, batches, self.network.logits, self.network.embed)

    def _of_images(self, batches: ImageBatches) -> Feed:
        network = self.network
        return Feed(
            batches.split,
            batches,
            lambda images: network.logits(network.features(images)),
            lambda images: network.embed(network.features(images)),
        )


def views_kept(views: int | Literal["auto"], epochs: int) -> int:
    """How many views of a random transform are kept; 1 is the number that keeps none and draws anew in every epoch.

    With auto epoch e takes view e mod AUTO_VIEWS, however many epochs there are: --resume may change their number.
    """
    return min(epochs, AUTO_VIEWS) if views == "auto" else views if views > 1 else 0
