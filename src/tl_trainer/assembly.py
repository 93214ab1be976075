"""The only assembler: configuration, and of a checkpoint its weights -> the parts that every command works with.

`set_up` is for training, new or resumed; `restore` for whatever is done with a checkpoint. They differ in where the
weights and the classes come from, and share all the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import PIL
import torch
import torchvision
from torch import Tensor, nn

from tl_trainer import checkpoint
from tl_trainer.checkpoint import BackboneIdentity, Checkpoint
from tl_trainer.config.data import DataSection
from tl_trainer.config.load import Loaded, Overrides, from_checkpoint
from tl_trainer.config.schema import Config
from tl_trainer.data import transforms
from tl_trainer.data.dataset import Dataset, Split, with_validation
from tl_trainer.data.duplicates import unrepeated
from tl_trainer.data.images import Decoding
from tl_trainer.data.loaders import worker_count
from tl_trainer.data.overview import name_scarce
from tl_trainer.data.sources import open_dataset
from tl_trainer.data.transforms import Pipeline
from tl_trainer.data.verify import Memory, all_verified
from tl_trainer.errors import CheckpointError, DataError, SettingError
from tl_trainer.evaluate import evaluate_together
from tl_trainer.features import Extractor, FeatureBatches, features_folder
from tl_trainer.feeds import Feed, Feeds, views_kept
from tl_trainer.ground import distributed
from tl_trainer.ground.machine import is_out_of_memory
from tl_trainer.ground.progress import bar
from tl_trainer.metrics import Scores
from tl_trainer.models.backbones import check_tensors, library_versions, resolve_weights
from tl_trainer.models.build import new_classifier, saved_classifier
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import new_head, take_head
from tl_trainer.models.prefix import pays_to_compile
from tl_trainer.models.weights import Weights, state_hash
from tl_trainer.network import Network, resolve_device
from tl_trainer.optim import Average, Schedule, Soup, build_optimizer, parameter_groups
from tl_trainer.saver import Progress, State
from tl_trainer.settings import (
    NOT_TAKEN,
    TWO_IMAGES,
    check_asked_root,
    check_cutmix,
    check_fixed,
    check_settings,
    check_teacher,
    check_views,
    located,
    same_task,
)
from tl_trainer.tasks import Task, task_of

log = logging.getLogger(__name__)

# To be raised with every change to how an image becomes features.
CACHE_VERSION = 1

SKIP_FILE = "skip.csv"  # in a run directory: what `data.skip` named
MEMORY = "files.sqlite"  # what `data.verify` remembers, in the folder of the features


@dataclass
class Parts:
    """A classifier on its device, and what belongs to it. `saved` is the checkpoint it came from, if any."""

    loaded: Loaded
    task: Task
    network: Network
    pipeline: Pipeline  # of evaluation and prediction
    backbone: BackboneIdentity
    features: int  # that the head takes
    feeds: Feeds
    saved: Checkpoint | None

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return self.loaded.config

    @property
    def decoding(self) -> Decoding:
        """How images are decoded in evaluation and prediction."""
        return _decoding(self.config.data, self.pipeline)

    def take_head(self, layers: Sequence[tuple[Tensor, Tensor]], *, unit: bool) -> None:
        """Put another head into the classifier and the configuration; of each Linear (out, in) and (out,)."""
        linear = [layer for layer in self.new_head("l2" if unit else "none") if isinstance(layer, nn.Linear)]
        for layer, (weight, bias) in zip(linear, layers, strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})

    def new_head(self, normalise: Literal["none", "l2"]) -> nn.Sequential:
        """Put a head for features scaled like this into the classifier and the configuration."""
        model = self.config.model
        section = model.head.model_copy(update={"normalise": normalise})
        model = model.model_copy(update={"head": section})
        self.loaded = replace(self.loaded, config=self.config.model_copy(update={"model": model}))
        head = new_head(self.features, len(self.task.classes), section).to(self.network.device)
        self.network.classifier.head = head
        return head

    def thaw(self, trainable: str) -> None:
        """Have another part of the classifier train; the feeds are of what is frozen then."""
        classifier, network, config = self.network.classifier, self.network, self.config
        classifier.thaw(trainable)
        self.network = Network(classifier, network.device, config.train.precision, compiled=network.compiled)
        identity = BackboneIdentity(**{**self.backbone, "sha256": state_hash(classifier.prefix_state())})
        self.feeds = _feeds(config, self.network, identity)

    def scores(self, feed: Feed, name: str, after_batch: Callable[[], None] = lambda: None) -> Scores:
        """The scores of the classifier, as it is now, on a split; `name` is what its progress bar says."""
        self.network.classifier.eval()
        batches = feed.batches.in_order() if isinstance(feed.batches, FeatureBatches) else feed.batches
        own = batches.epoch(0, self.network.device, distributed.rank(), distributed.world())
        shown = bar(own, name, -(-len(batches) // distributed.world()))
        return evaluate_together(feed.logits, shown, len(batches), after_batch)


@dataclass
class Setup:
    """What a run is made of, before anything is written into its directory. Every image of `dataset` is verified."""

    parts: Parts
    dataset: Dataset
    drawn: bool  # whether the val split was drawn, and is not the source's own
    train_pipeline: Pipeline
    duplicates: list[str]  # what is said of them
    skipped: dict[str, dict[str, str]]  # of each split the images that cannot be read, and why
    computed: int  # images that the frozen stages compute where nothing is cached, each view counted
    teach: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # as `loop.Teach`

    def feeds(self, number: int = -1) -> dict[str, Feed]:
        """The batches of each split in a phase, for which the classifier is thawed; the last has the test split too.

        What is frozen is computed here where it is not in the cache.
        """
        parts, config = self.parts, self.parts.config
        phase, splits, classifier = config.phases[number], self.dataset.splits, parts.network.classifier
        if classifier.trainable != phase.trainable:
            parts.thaw(phase.trainable)
        if config.phases[number:][1:]:
            splits = {name: split for name, split in splits.items() if name != "test"}
        pipeline = self.train_pipeline if phase.augment else parts.pipeline
        return parts.feeds.of_run(splits, pipeline, parts.pipeline, config.features.views, phase.epochs)

    def new_state(self, batches: int, number: int = -1, progress: Progress | None = None) -> State:
        """The optimizer of a phase and all that changes with it, at its beginning; `batches` of an epoch.

        What a later phase draws does not depend on what was drawn before it.
        """
        config, network = self.parts.config, self.parts.network
        phase, progress = config.phases[number], progress or Progress()
        begun = sum(phase.epochs for phase in config.phases[:number]) - progress.skipped
        progress.phase_begins()
        classifier, section = network.classifier, phase.optimizer
        alike = (section.layer_decay, section.decay, section.head_lr) == (1, "all", None)
        trainable = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
        groups = trainable if alike else parameter_groups(classifier.layers(), section)
        optimizer = build_optimizer(groups, section)
        schedule = Schedule(optimizer, phase.schedule, phase.epochs, batches, config.train.accumulate)
        scaler = torch.amp.GradScaler(network.device.type, enabled=network.autocast == torch.float16)
        if begun > 0:
            torch.manual_seed(config.seed + begun)
        decay = config.train.ema.decay
        average = None if decay is None else Average(classifier.trained_state(), decay)
        asked = config.train.soup if number in (-1, len(config.phases) - 1) else None
        soup = None if asked is None else Soup(asked)
        return State(classifier, optimizer, schedule, scaler, progress, begun, average, soup)


def set_up(
    loaded: Loaded,
    resumed: Checkpoint | None = None,
    *,
    dry: bool = False,
    inspect: Callable[[Dataset, Task, bool], object] = lambda *_: None,
) -> Setup:
    """Everything a run needs, naming every wrong setting at once with its file and line.

    resumed: the checkpoint of the run to go on with, whose classes and val split are kept. dry: keep nothing of the
    run, neither what was read of the images nor weights that would have to be downloaded. inspect: sees the dataset
    before its images are read, and whether val was drawn; it may refuse them.
    """
    config = loaded.config
    with located(loaded):
        check_settings(loaded)
        device = resolve_device(config.device)
        weights = _weights(config, dry=dry)
        train_pipeline, pipeline = _pipelines(config, weights)
        check_views(config, train_pipeline)
        check_cutmix(config, train_pipeline)
        decoding = _decoding(config.data, train_pipeline, pipeline)
        dataset = open_dataset(config.data, resumed.classes if resumed else None, decoding)
        if len(dataset.classes) < 2:
            remedy = "is the folder one level too high or too low?"
            if config.data.source in ("csv", "parquet"):
                remedy = "a question of yes or no is one column with two classes, and data.task=single"
            raise DataError(
                f"{dataset.where} has one class, {dataset.classes[0]!r}, and a classifier needs two; {remedy}"
            )
        task, drawn = task_of(config.data.task, config.train, dataset.classes), "val" not in dataset.splits
        dataset = with_val(config, dataset, task, resumed)
        inspect(dataset, task, drawn)
        check_teacher(config.train.teacher.checkpoint, dataset.classes)
        splits, skipped = all_verified(dataset.splits, config.data, None if dry else memory_of(config))
        splits, duplicates = unrepeated(splits, config.data)
        name_scarce(dataset, splits["train"], drawn=drawn)
        image = pipeline.image(splits["train"].open(0))
        classifier, size = _classifier(config, weights, dataset.classes, image)
        if classifier.trains_batch_norm and len(splits["train"]) == 1:
            raise SettingError("model.trainable", f"there is one training image: {TWO_IMAGES}, or add images")
        identity = BackboneIdentity(
            name=config.model.backbone,
            weights=weights.label + (f"@{revision}" if (revision := classifier.backbone.revision) else ""),
            tap=config.model.tap,
            sha256=state_hash(classifier.frozen_state()),
            size=weights.preset.crop,
            pretrained=weights.pretrained,
        )
        images = _images_to_compute(config, splits, train_pipeline)
        compiled = config.performance.compile == "auto" and pays_to_compile(device, images)
        network = Network(classifier, device, config.train.precision, compiled=compiled)
    parts = Parts(loaded, task, network, pipeline, identity, size, _feeds(config, network, identity), resumed)
    return Setup(parts, replace(dataset, splits=splits), drawn, train_pipeline, duplicates, skipped, images)


def restore(path: Path, overrides: Overrides = ()) -> Parts:
    """The classifier of a checkpoint, in eval mode on its device.

    overrides: dotted keys of SETTABLE. Needs no network, unless the run was killed before its backbone was written into
    best.pth and the weights are no longer cached. Raises CheckpointError where the file is damaged or does not fit
    together, ConfigError for a wrong override.
    """
    if not path.exists() and path.with_name("last.pth").exists():
        raise CheckpointError(f"{path}: no epoch of this run has ended yet; go on with --resume {path.parent}")
    saved, overrides = checkpoint.load(path), list(overrides)
    loaded = from_checkpoint(saved.config, path, [*NOT_TAKEN, *same_task(overrides, saved.config, path)])
    check_fixed(loaded, overrides)
    try:
        pipeline = Pipeline(saved.preprocessing, "preprocessing")
        classifier = saved_classifier(saved, loaded.config.model, loaded.config.transforms.size, loaded.config.seed)
    except (SettingError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]  # torch adds a trace of its own
        raise CheckpointError(f"{path}: does not fit this version of tl-trainer or torchvision: {reason}") from error
    except RuntimeError as error:  # load_state_dict's word for tensors of another shape or name
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: its weights do not fit its configuration: {str(error).splitlines()[-1].strip()}"
        ) from error
    with located(loaded):
        check_asked_root(loaded)
        config, device = loaded.config, resolve_device(loaded.config.device)
        precision = config.train.precision
        if precision == "fp16" and device.type != "cuda":
            log.warning("trained in fp16, which needs CUDA; computing in fp32 on %s", device.type)
            precision = "fp32"
        network = Network(classifier.eval(), device, precision)
    feeds = _feeds(config, network, saved.backbone)
    task = task_of(config.data.task, config.train, saved.classes)
    return Parts(loaded, task, network, pipeline, saved.backbone, saved.features, feeds, saved)


def reopened(parts: Parts, checkpoint: Path | None = None) -> Dataset:
    """The dataset of a checkpoint with the val split of its run. Raises DataError where it is not there any more.

    checkpoint: where it is, so that what its run left out is left out again, by the list beside it, unless `data.skip`
    names another; it is said where that list is gone.
    """
    assert parts.saved is not None
    data, left_out = parts.config.data, (parts.saved.config.get("data") or {}).get("skip") is not None
    if checkpoint is not None and left_out and data.skip is None:
        own = checkpoint.with_name(SKIP_FILE)
        if own.exists():
            data = data.model_copy(update={"skip": str(own)})
        else:
            log.warning(
                "the run left images out, and they are not left out here: %s is gone; name one with data.skip", own
            )
    dataset = open_dataset(data, parts.saved.classes, parts.decoding, "fewer")
    return with_val(parts.config, dataset, parts.task, parts.saved)


def memory_of(config: Config) -> Memory:
    """What `verified` remembers of images."""
    return Memory(features_folder(config.features) / MEMORY)


def with_val(config: Config, dataset: Dataset, task: Task, saved: Checkpoint | None) -> Dataset:
    """The dataset with a val split: its own, that of the checkpoint, or else a drawn one."""

    def draw(split: Split) -> set[int]:
        return task.hold_out(split.targets, config.data.val_fraction, config.seed, split.name, split.groups)

    drawn = saved.val_split.tolist() if saved and saved.val_split is not None else None
    return with_validation(dataset, draw, drawn)


def _pipelines(config: Config, weights: Weights) -> tuple[Pipeline, Pipeline]:
    preset = weights.preset
    eval_steps = transforms.spell_out(config.transforms.eval, preset, train=False)
    same = config.transforms.train == "eval"
    train_steps = eval_steps if same else transforms.spell_out(config.transforms.train, preset, train=True)
    train, evaluation = Pipeline(train_steps, "transforms.train"), Pipeline(eval_steps, "transforms.eval")
    if not evaluation.deterministic:
        raise SettingError(
            "transforms.eval", "has a random transform, so no figure could be repeated; move it to transforms.train"
        )
    return train, evaluation


def _weights(config: Config, *, dry: bool) -> Weights:
    """The configured weights, which have what the backbone needs; dry: random ones in place of a download."""
    model = config.model
    weights = resolve_weights(model.backbone, model.weights, config.transforms.size, model.weights_from)
    weights = weights.without_download(model.backbone) if dry else weights
    check_tensors(model.backbone, weights, model.tap)
    return weights


def _classifier(config: Config, weights: Weights, classes: list[str], image: Tensor) -> tuple[Classifier, int]:
    """A new classifier with what it takes of a run, and how many features its head takes of such an image (3, H, W)."""
    frozen = config.train.freeze_batchnorm
    found = new_classifier(config.model, weights, len(classes), image, config.seed, freeze_batchnorm=frozen)
    if weights.saved is not None:
        said = ", and not its head: train.search finds a new one; to go on with its own, set train.search: off"
        if config.model.extra or weights.saved.config["model"].get("extra"):
            said = ", and not its head, which is not for the stages of model.extra"
        elif config.phases[0].search != "auto":
            said = take_head(found[0].head, classes, weights.saved)
        log.info("%s: its backbone is taken%s", weights.name, said)
    return found


def _decoding(data: DataSection, *pipelines: Pipeline) -> Decoding:
    return Decoding(data.max_megapixels, data.value_range, tuple(pipeline.sizes for pipeline in pipelines))


def _images_to_compute(config: Config, splits: dict[str, Split], train_pipeline: Pipeline) -> int:
    """How many images the frozen stages compute in this run where nothing is cached.

    This number decides whether they are compiled, which changes the features: the next run must get the same.
    """
    train, epochs = len(splits["train"]), config.train.epochs
    others = sum(map(len, splits.values())) - train
    if config.features.cache == "off":
        return (train + others) * epochs
    drawn = views_kept(config.features.views, epochs) or epochs
    return others + train * (1 if train_pipeline.deterministic else drawn)


def _feeds(config: Config, network: Network, backbone: BackboneIdentity) -> Feeds:
    extractor, name, workers = None, backbone["name"], worker_count(config.data.workers)
    if network.classifier.frozen and config.features.cache == "auto":
        extractor = Extractor(
            make_prefix=network.prefix,
            identity={
                "backbone": name,
                "sha256": backbone["sha256"],
                "stages": [stage.name for stage in network.classifier.frozen],
                "precision": network.precision,
                "device": network.device.type,
                "value_range": config.data.value_range,
                **({"compiled": True} if network.compiled else {}),
                "versions": [
                    CACHE_VERSION,
                    torchvision.__version__,
                    PIL.__version__,
                    *library_versions(backbone["name"]),
                ],
            },
            folder=features_folder(config.features),
            limit=int(config.features.limit_gb * 1e9),
            device=network.device,
            workers=workers,
        )
    return Feeds(network, extractor, config.train.batch_size, workers, config.seed, config.train.sampler == "balanced")
