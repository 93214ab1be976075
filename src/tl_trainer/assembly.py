"""The only assembler: Config -> dataset, transforms, classifier, optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum

from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.load import COMMAND_LINE, Loaded
from tl_trainer.config.schema import Config, ModelSection
from tl_trainer.data import transforms
from tl_trainer.data.dataset import Dataset, with_validation
from tl_trainer.data.loaders import worker_count
from tl_trainer.data.sources import check_root, open_dataset
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import DataError, ImageError, SettingError
from tl_trainer.evaluate import evaluate
from tl_trainer.metrics import Scores, class_weights
from tl_trainer.models.backbones import (
    BACKBONES,
    build_backbone,
    empty_backbone,
    feature_size,
    preprocessing,
    resolve_weights,
    state_hash,
)
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import build_head
from tl_trainer.network import Feed, Network
from tl_trainer.optim import Schedule, build_optimizer
from tl_trainer.restore import resolve_device
from tl_trainer.saver import Progress, State
from tl_trainer.tracking import bar
from tl_trainer.train import Training


@dataclass
class Parts:
    """What a run is made of, before anything is written into its directory."""

    config: Config
    dataset: Dataset
    drawn: bool  # whether the val split was drawn, and is not the source's own
    train_pipeline: Pipeline
    eval_pipeline: Pipeline
    network: Network
    backbone: dict[str, Any]
    feeds: dict[str, Feed]

    def evaluate(self, split: str, after_batch: Callable[[], None] = lambda: None) -> Scores:
        """The scores of the classifier, as it is now, on a split."""
        feed, device = self.feeds[split], self.network.device
        self.network.classifier.eval()
        return evaluate(feed.forward, bar(feed.batches.epoch(0, device), split, len(feed.batches)), after_batch)


def assemble(loaded: Loaded, resumed: Checkpoint | None = None) -> Parts:
    """Build everything a run needs, naming every wrong setting at once with its file and line."""
    config = loaded.config
    with _located(loaded):
        _check_settings(loaded)
        device = resolve_device(config.device)
        weights = resolve_weights(config.model.backbone, config.model.weights)
        train_pipeline, eval_pipeline = _pipelines(config, weights)
        dataset = open_dataset(config.data, resumed.classes if resumed else None)
        if len(dataset.classes) < 2:
            raise DataError(
                f"{dataset.where} has one class, {dataset.classes[0]!r}, and a classifier needs two; "
                "is the folder one level too high or too low?"
            )
        drawn = "val" not in dataset.splits
        val_names = resumed.val_names if resumed else None
        dataset = with_validation(dataset, config.data.val_fraction, config.seed, val_names)
        classifier = _classifier(config, weights, dataset, eval_pipeline)
        backbone = {
            "name": config.model.backbone,
            "weights": weights.name if isinstance(weights, WeightsEnum) else config.model.weights,
            "tap": config.model.tap,
            "sha256": state_hash(classifier.frozen_state()),
        }
        if resumed and resumed.backbone != backbone:
            raise DataError(
                f"the weights of {config.model.backbone} are not those this run began with; restore that file"
            )
        _check_views(config, train_pipeline, classifier)
        compiled = config.performance.compile == "auto"
        network = Network(classifier, device, config.train.precision, config.features, backbone, compiled=compiled)
    feeds = _feeds(config, dataset, train_pipeline, eval_pipeline, network)
    dataset = replace(dataset, splits={name: feed.split for name, feed in feeds.items()})
    return Parts(config, dataset, drawn, train_pipeline, eval_pipeline, network, backbone, feeds)


def new_state(parts: Parts) -> State:
    """The optimizer and all that changes with it, at the beginning."""
    section, classifier = parts.config.train, parts.network.classifier
    optimizer = build_optimizer([p for p in classifier.parameters() if p.requires_grad], section.optimizer)
    schedule = Schedule(optimizer, section.schedule, section.epochs, len(parts.feeds["train"].batches))
    scaler = torch.amp.GradScaler(parts.network.device.type, enabled=parts.network.autocast == torch.float16)
    return State(classifier, optimizer, schedule, scaler, Progress())


def new_training(parts: Parts, state: State) -> Training:
    """What `fit` works with."""
    loss, split = parts.config.train.loss, parts.dataset.split("train")
    balanced = loss.class_weights == "balanced"
    weights = class_weights(list(split.targets), len(parts.dataset.classes)) if balanced else None
    return Training(
        state=state,
        feed=parts.feeds["train"],
        validate=partial(parts.evaluate, "val"),
        criterion=nn.CrossEntropyLoss(weights, label_smoothing=loss.label_smoothing).to(parts.network.device),
        device=parts.network.device,
        epochs=parts.config.train.epochs,
    )


@contextlib.contextmanager
def _located(loaded: Loaded) -> Iterator[None]:
    try:
        yield
    except SettingError as error:
        raise loaded.located([error]) from error


def _check_settings(loaded: Loaded) -> None:
    """What only torchvision can say about a configuration, all of it at once."""
    config, problems = loaded.config, []
    checks: list[Callable[[], object]] = [
        lambda: transforms.check(config.transforms.train, "transforms.train"),
        lambda: transforms.check(config.transforms.eval, "transforms.eval"),
        lambda: resolve_weights(config.model.backbone, config.model.weights),
        lambda: _check_stages(config.model),
        lambda: resolve_device(config.device),
    ]
    if loaded.origins.get(("data", "root")) == COMMAND_LINE:  # a file, such as a run's config.yaml, spells all keys out
        checks.append(lambda: check_root(config.data))
    for check in checks:
        try:
            check()
        except SettingError as error:
            problems.append(error)
    if problems:
        raise loaded.located(problems)


def _check_stages(model: ModelSection) -> None:
    if model.backbone not in BACKBONES:  # which the check before has said
        return
    backbone = empty_backbone(model.backbone, model.weights != "none", model.tap)
    if model.trainable not in ("head", "all"):
        backbone.index(model.trainable)


def _check_views(config: Config, pipeline: Pipeline, classifier: Classifier) -> None:
    if config.features.views > 1 and pipeline.deterministic:
        raise SettingError(
            "features.views", "transforms.train has nothing random, so all views are the same; set it to 1"
        )
    if config.features.views > 1 and not classifier.frozen:
        raise SettingError(
            "features.views", "model.trainable is all, so there are no frozen features to keep; set it to 1"
        )


def _pipelines(config: Config, weights: Any) -> tuple[Pipeline, Pipeline]:
    preset = preprocessing(config.model.backbone, weights)
    eval_steps = transforms.spell_out(config.transforms.eval, preset, train=False)
    same = config.transforms.train == "eval"
    train_steps = eval_steps if same else transforms.spell_out(config.transforms.train, preset, train=True)
    train, evaluation = Pipeline(train_steps, "transforms.train"), Pipeline(eval_steps, "transforms.eval")
    if not evaluation.deterministic:
        raise SettingError(
            "transforms.eval", "has a random transform, so no figure could be repeated; keep it to train"
        )
    return train, evaluation


def _classifier(config: Config, weights: Any, dataset: Dataset, pipeline: Pipeline) -> Classifier:
    model = config.model
    backbone = build_backbone(model.backbone, weights, model.tap, config.seed)
    in_features = feature_size(
        backbone, model.backbone, weights is not None, model.tap, *_image_size(dataset, pipeline)
    )
    torch.manual_seed(config.seed)
    head = build_head(in_features, model.head.hidden, len(dataset.classes), model.head.dropout)
    return Classifier(backbone, head, model.trainable)


def _image_size(dataset: Dataset, pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the network's input, from the first image that can be read."""
    split = dataset.split("train")
    for index in range(len(split)):
        with contextlib.suppress(ImageError):
            height, width = pipeline.image(split.open(index)).shape[-2:]
            return height, width
    raise DataError(f"none of the {len(split)} train images can be read")


def _feeds(
    config: Config, dataset: Dataset, train_pipeline: Pipeline, eval_pipeline: Pipeline, network: Network
) -> dict[str, Feed]:
    size, workers, bad = config.train.batch_size, worker_count(config.data.workers), config.data.on_bad_image
    feeds = {}
    for name, split in dataset.splits.items():
        if name == "train":
            feeds[name] = network.training_feed(
                split,
                train_pipeline,
                bad,
                batch_size=size,
                workers=workers,
                seed=config.seed,
                views=config.features.views,
            )
        else:
            feeds[name] = network.evaluation_feed(split, name, eval_pipeline, bad, batch_size=size, workers=workers)
    return feeds
