"""Everything of a run up to its first batch, and what the run would take."""

from __future__ import annotations

import logging
from typing import Any

from tl_trainer.assembly import Setup, set_up
from tl_trainer.config.load import Loaded
from tl_trainer.data.loaders import Batch
from tl_trainer.ground.machine import cores, peak_memory, seconds_of
from tl_trainer.loop import Training
from tl_trainer.models.prefix import DTYPES
from tl_trainer.run import new_training, summary

log = logging.getLogger(__name__)


def dry_run(loaded: Loaded) -> dict[str, Any]:
    """Check everything up to the loss of the first batch, without a run; the batch's shape, the loss, an estimate."""
    setup = set_up(loaded, dry=True)
    cached, setup.parts.feeds.extractor = setup.parts.feeds.extractor is not None, None
    log.info("%s", summary(setup))
    feed = setup.parts.feeds.training(setup.dataset.split("train"), setup.train_pipeline)
    training = new_training(setup, {"train": feed}, setup.new_state(len(feed.batches)), lambda: None)
    batch = next(iter(feed.batches.epoch(0, training.device)))
    loss = training.step.loss(batch).item()
    return {
        "first_batch": list(batch.inputs.shape),
        "loss": loss,
        "estimate": _estimate(setup, training, batch, cached),
    }


def _estimate(setup: Setup, training: Training, batch: Batch, cached: bool) -> dict[str, float]:
    """What the run would take with an empty cache: seconds, bytes on disk and of memory, from a few images of it.

    cached: whether the features are kept. Without the search of the head and the report.
    """
    network, splits, epochs = setup.parts.network, setup.dataset.splits, training.epochs
    sample, pipeline = splits["train"].sample(8), setup.train_pipeline
    reading = seconds_of(network.device, lambda: [pipeline.image(sample.open(index)) for index in range(len(sample))])
    row = network.features(batch.inputs)[0]  # the first batch on a GPU takes longer than all others
    computing = seconds_of(network.device, lambda: network.features(batch.inputs))
    stepping = seconds_of(network.device, lambda: training.step.loss(batch).backward())  # type: ignore[no-untyped-call]
    of_one = max(reading / len(sample) / cores(), computing / len(batch.targets))
    step = max(0.0, stepping - computing) / len(batch.targets)
    images = setup.computed if cached else sum(map(len, splits.values())) * epochs
    kept = setup.computed * row.numel() * DTYPES[network.precision].itemsize if cached else 0
    return {
        "seconds": round(images * of_one + len(splits["train"]) * epochs * step, 1),
        "cache_bytes": kept,
        "memory_bytes": peak_memory(network.device) + kept,
    }
