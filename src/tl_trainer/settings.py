"""What is wrong with a configuration beyond the schema, before any image is read: names, stages, folders, devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_trainer import checkpoint
from tl_trainer.config.data import expand
from tl_trainer.config.load import COMMAND_LINE, Loaded, Override
from tl_trainer.config.schema import Config, FeaturesSection, flat
from tl_trainer.data import transforms
from tl_trainer.data.sources import check_root
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import InputError, SettingError
from tl_trainer.ground import distributed
from tl_trainer.ground.wording import listed
from tl_trainer.models.backbones import resolve_weights
from tl_trainer.models.build import empty_classifier
from tl_trainer.network import resolve_device
from tl_trainer.runs import best_of

CLASSES_NAMED = 20  # in a message
ONE_TRAINS = "is trained for epochs by one process so far; leave torchrun out"
TWO_IMAGES = "BatchNorm trains here and needs two images at a time; set model.trainable: head"

# What a command may set on top of a checkpoint. The rest is how the weights came about.
SETTABLE = ("data.", "features.", "device", "train.batch_size", "train.precision", "output.neighbours_mb")
# Of these, what a label is, what changes the pixels, and what the val split in the checkpoint was drawn by.
FIXED = ("data.task", "data.value_range", "data.group_pattern", "data.csv.group_column")
# What a checkpoint does not decide on the machine that reads it: folders that are written to, and how large they get,
# groups, which other images may not have, and which images are left out, by a file that is opened.
NOT_TAKEN: tuple[Override, ...] = (
    ("features.dir", None), ("features.limit_gb", FeaturesSection().limit_gb), ("data.download", False),
    ("data.group_pattern", None), ("data.csv.group_column", None), ("data.skip", None),
)  # fmt: skip


@contextlib.contextmanager
def located(loaded: Loaded) -> Iterator[None]:
    """Turn a SettingError into a ConfigError with the file and the line of its key."""
    try:
        yield
    except SettingError as error:
        raise loaded.located([error]) from error


def check_fixed(loaded: Loaded, overrides: Sequence[Override]) -> None:
    """Raise ConfigError for an override of what the checkpoint has decided."""
    valid = [key for key, _ in flat(loaded.config.model_dump()) if key.startswith(SETTABLE) and key not in FIXED]
    wrong = [key for key, _ in overrides if not key.startswith(SETTABLE) or key in FIXED]
    if wrong:
        fixed = "is fixed by the checkpoint; keys that can be set"
        raise loaded.located([SettingError(key, f"{fixed}: {', '.join(valid)}") for key in wrong])


def same_task(overrides: Sequence[Override], config: Mapping[str, Any], path: Path) -> Sequence[Override]:
    """The overrides of a checkpoint's configuration; InputError where they are for data of another task."""
    known, asked = task_in(config), dict(overrides).get("data.task")
    if asked not in (None, known):
        raise InputError(
            f"{path}: the checkpoint is of data.task: {known}, and {asked} was asked for; leave data.task out"
        )
    return overrides


def task_in(config: Mapping[str, Any]) -> str:
    """The `data.task` of a checkpoint's configuration; those of before there were several are of one class."""
    return str((config.get("data") or {}).get("task", "single"))


def check_settings(loaded: Loaded) -> None:
    """What only torchvision can say about a configuration, all of it at once."""
    config, problems = loaded.config, []
    checks: list[Callable[[], object]] = [
        lambda: check_one(loaded),
        lambda: transforms.check(config.transforms.train, "transforms.train"),
        lambda: transforms.check(config.transforms.eval, "transforms.eval"),
        lambda: resolve_weights(config.model.backbone, config.model.weights, source=config.model.weights_from),
        lambda: _check_stages(config),
        lambda: resolve_device(config.device),
        lambda: _check_refit(config),
        lambda: _check_ranks(config),
        lambda: check_asked_root(loaded),
    ]
    for check in checks:
        try:
            check()
        except SettingError as error:
            problems.append(error)
    if problems:
        raise loaded.located(problems)


def check_one(loaded: Loaded) -> None:
    """Raise SettingError for a list of backbones or weights, which `probe` replaces by one of its entries."""
    for key in loaded.lists:
        raise SettingError(
            f"model.{key}", "is a list, and only a run that trains compares its entries; give one of them here"
        )


def check_asked_root(loaded: Loaded) -> None:
    """Check the folder of the data where it was asked for: a file, such as a run's config.yaml, spells all keys out."""
    if loaded.origins.get(("data", "root")) == COMMAND_LINE:
        check_root(loaded.config.data)


def _check_refit(config: Config) -> None:
    head, obstacle = config.model.head, None
    if config.model.trainable != "head":
        obstacle = "stages of the backbone train (model.trainable)"
    elif config.model.extra:
        obstacle = "new stages train (model.extra)"
    elif config.features.cache == "off":
        obstacle = "features.cache is off"
    elif head.hidden or head.dropout:
        obstacle = "the head is not linear (model.head)"
    if config.train.refit and obstacle:
        raise SettingError(
            "train.refit", f"needs a linear head that is found by the search, and {obstacle}; set it to false"
        )


def _check_ranks(config: Config) -> None:
    """What several ranks cannot do."""
    world, train = distributed.world(), config.train
    if world == 1:
        return
    trains = any(phase.search != "auto" for phase in config.phases)
    if trains and config.data.task != "single":
        raise SettingError("data.task", f"{config.data.task} {ONE_TRAINS}")
    if trains and (rest := train.batch_size % world):
        sizes = " or ".join(str(size) for size in (train.batch_size - rest, train.batch_size - rest + world) if size)
        raise SettingError(
            "train.batch_size", f"{train.batch_size} images cannot be divided among {world} ranks; use {sizes}"
        )
    alone = {"mixup": train.mixup, "cutmix": train.cutmix, "soup": train.soup, "teacher": train.teacher.checkpoint}
    for key, value in alone.items():
        if value is not None:
            raise SettingError(f"train.{key}", "is the work of one process so far; leave it or torchrun out")


def _check_stages(config: Config) -> None:
    model, phases = config.model, config.train.phases
    try:
        size = resolve_weights(model.backbone, "none", config.transforms.size).preset.crop
    except SettingError:  # which the check before has said
        return
    start = "all" if phases else model.trainable
    classifier = empty_classifier(model, size, start, freeze_batchnorm=config.train.freeze_batchnorm)
    frozen = len(classifier.backbone.stages)
    for number, phase in enumerate(phases):
        key = f"train.phases[{number}].trainable"
        try:
            classifier.thaw(phase.trainable)
        except SettingError as error:
            raise SettingError(key, error.message) from None
        if len(classifier.frozen) > frozen:
            raise SettingError(
                key, f"{phase.trainable} would freeze what the phase before has trained; train it in all later phases"
            )
        frozen = len(classifier.frozen)
    if classifier.trains_batch_norm and config.train.soup is not None:
        raise SettingError(
            "train.soup",
            "the mean of weights does not fit the statistics of a BatchNorm that trains; set train.freeze_batchnorm: "
            "true, or leave soup out",
        )
    if classifier.trains_batch_norm and config.train.batch_size == 1:
        raise SettingError("train.batch_size", f"1 is too few: {TWO_IMAGES}, or set it to 2 or more")


def check_teacher(path: str | None, classes: Sequence[str]) -> None:
    """Raise SettingError for a teacher that is not there, or of other classes than those that are learned."""
    if path is None:
        return
    try:
        saved = checkpoint.load(best_of(expand(path)))
    except InputError as error:
        raise SettingError("train.teacher.checkpoint", str(error)) from error
    if task_in(saved.config) != "single":
        raise SettingError(
            "train.teacher.checkpoint",
            f"{path} knows several labels per image, and the data has one class for each; take another teacher",
        )
    known = saved.classes
    if {*known} != {*classes}:
        raise SettingError(
            "train.teacher.checkpoint",
            f"{path} knows the classes {listed(known, CLASSES_NAMED)}, and the data has "
            f"{listed(classes, CLASSES_NAMED)}; take a teacher that was trained on the same classes",
        )


def check_views(config: Config, pipeline: Pipeline) -> None:
    """Raise SettingError for views of a train pipeline that has nothing random, or of a backbone that trains."""
    views = config.features.views
    if views == "auto" or views == 1:
        return
    if pipeline.deterministic:
        raise SettingError(
            "features.views", "transforms.train has nothing random, so all views are the same; set it to auto"
        )
    if all(phase.trainable == "all" for phase in config.phases):
        raise SettingError(
            "features.views", "model.trainable is all, so there are no frozen features to keep; set it to auto"
        )


def check_cutmix(config: Config, pipeline: Pipeline) -> None:
    """Raise SettingError for cutmix in a phase that trains on cached features; pipeline: that of training images."""
    drawn = config.features.views == 1 and not pipeline.deterministic  # so that every epoch computes the features
    cached = (
        phase.trainable != "all" and phase.search == "off" and not (drawn and phase.augment) for phase in config.phases
    )
    if config.train.cutmix is not None and config.features.cache == "auto" and any(cached):
        raise SettingError(
            "train.cutmix",
            "cuts rectangles out of images, and this trains on cached features; set features.cache: off, or take "
            "train.mixup instead",
        )
