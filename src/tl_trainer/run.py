"""The only assembler: Config -> dataset, transforms, classifier, optimizer -> fit -> run directory."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.load import Loaded, to_yaml
from tl_trainer.config.schema import Config, expand
from tl_trainer.data import transforms
from tl_trainer.data.dataset import Dataset, Split, with_validation
from tl_trainer.data.loaders import ImageBatches, readable, worker_count
from tl_trainer.data.sources import open_dataset
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import DataError, SettingError
from tl_trainer.evaluate import evaluate
from tl_trainer.files import make_folder, write_text
from tl_trainer.metrics import Figures, class_weights
from tl_trainer.models.backbones import build_backbone, feature_size, preprocessing, resolve_weights, state_hash
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import build_head
from tl_trainer.optim import Schedule, build_optimizer
from tl_trainer.restore import resolve_device, restore
from tl_trainer.resume import Resumption
from tl_trainer.saver import Progress, Saver, State
from tl_trainer.signals import StopRequest
from tl_trainer.tracking import Tracker, bar, graph_of
from tl_trainer.train import Training, fit

log = logging.getLogger(__name__)

IMAGES_SHOWN = 16
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

Forward = Callable[[Tensor], Tensor]


@dataclass
class Parts:
    """What a run is made of, before anything is written."""

    config: Config
    dataset: Dataset
    drawn: bool  # whether the val split was drawn, and is not the source's own
    train_pipeline: Pipeline
    eval_pipeline: Pipeline
    classifier: Classifier
    backbone: dict[str, Any]
    device: torch.device
    precision: str

    def batches(self, split: str, *, training: bool = False) -> ImageBatches:
        """The batches of a split: shuffled and augmented for training, in order and as the checkpoint says else."""
        return ImageBatches(
            self.dataset.split(split),
            self.train_pipeline if training else self.eval_pipeline,
            batch_size=self.config.train.batch_size,
            workers=worker_count(self.config.data.workers),
            seed=self.config.seed,
            shuffle=training,
        )


def train(loaded: Loaded, resumption: Resumption | None = None) -> dict[str, Any]:
    """Train as configured, or go on with a run; the summary that `tl-train --json` prints.

    Raises a TrainerError for whatever is wrong with the configuration, the data or the run.
    """
    started = time.perf_counter()
    output = expand(loaded.config.output.dir)
    make_folder(resumption.run_dir if resumption else output, "--output")
    parts = assemble(loaded, resumption.last if resumption else None)
    run_dir = resumption.run_dir if resumption else _new_run_dir(output, loaded.name)
    log.info("run directory: %s", run_dir)
    state = _state(parts)
    template = _template(parts)
    _describe(parts, run_dir)
    with StopRequest() as stop, contextlib.closing(_tracker(parts, run_dir, resumption)) as tracker:
        saver = Saver(run_dir, template, state, stop)
        if resumption:
            assert resumption.last.resume is not None
            state.restore(resumption.last.trained, resumption.last.resume)
            saver.adopt(resumption.best)
        fit(_training(parts, state), tracker, saver)
    assert saver.best is not None
    parts.classifier.load_trained_state(saver.best.trained)
    result: dict[str, Any] = {
        "run_dir": str(run_dir),
        "checkpoint": str(run_dir / "best.pth"),
        "best_epoch": state.progress.best_epoch,
        "epochs": state.progress.epoch,
        "val": state.progress.best,
    }
    if "test" in parts.dataset.splits:
        result["test"] = asdict(_evaluator(parts, "test")())
    return {**result, "seconds": round(time.perf_counter() - started, 3)}


def dry_run(loaded: Loaded) -> str:
    """Check everything up to the loss of the first batch, writing nothing; what was found, in a sentence."""
    parts = assemble(loaded)
    training = _training(parts, _state(parts))
    batch = next(iter(training.batches.epoch(0, parts.device)))
    loss = training.criterion(training.forward(batch.inputs), batch.targets).item()
    return (
        f"{_summary(parts)}; the first batch is {tuple(batch.inputs.shape)}, its loss {loss:.4f}. Nothing was written."
    )


def evaluate_checkpoint(
    path: Path, data_dir: str | None, split: str | None, device: str | None, batch_size: int | None, workers: int | None
) -> dict[str, Any]:
    """The figures of a checkpoint on a split (test where there is one, else val), as `tl-eval --json` prints them."""
    restored = restore(path, device)
    config = restored.loaded.config
    data = config.data.model_copy(update={"root": data_dir} if data_dir else {})
    dataset = open_dataset(data, restored.checkpoint.classes)
    if split == "all":
        chosen = dataset.split("all")
    else:
        dataset = with_validation(dataset, data.val_fraction, config.seed, restored.checkpoint.val_names)
        split = split or ("test" if "test" in dataset.splits else "val")
        chosen = dataset.split(split)
    batches = ImageBatches(
        readable(chosen, split, data.on_bad_image),
        restored.pipeline,
        batch_size=batch_size or config.train.batch_size,
        workers=worker_count(data.workers if workers is None else workers),
    )
    forward = _autocast(restored.classifier, restored.device, _precision(config.train.precision, restored.device))
    figures = evaluate(forward, bar(batches.epoch(0, restored.device), split, len(batches)))
    return {"split": split, **asdict(figures)}


def assemble(loaded: Loaded, resumed: Checkpoint | None = None) -> Parts:
    """Build everything a run needs, naming every wrong setting at once with its file and line."""
    config = loaded.config
    with _located(loaded):
        _check_settings(loaded)
        device = resolve_device(config.device)
        weights = resolve_weights(config.model.backbone, config.model.weights)
        preset = preprocessing(config.model.backbone, weights)
        eval_steps = transforms.spell_out(config.transforms.eval, preset, train=False)
        same = config.transforms.train == "eval"
        train_steps = eval_steps if same else transforms.spell_out(config.transforms.train, preset, train=True)
        dataset = open_dataset(config.data, resumed.classes if resumed else None)
        drawn = "val" not in dataset.splits
        val_names = resumed.val_names if resumed else None
        dataset = with_validation(dataset, config.data.val_fraction, config.seed, val_names)
        splits = {name: readable(split, name, config.data.on_bad_image) for name, split in dataset.splits.items()}
        dataset = Dataset(dataset.classes, splits, dataset.where)
        eval_pipeline = Pipeline(eval_steps, "transforms.eval")
        classifier = _classifier(config, weights, dataset, eval_pipeline)
    identity = {
        "name": config.model.backbone,
        "weights": weights.name if isinstance(weights, WeightsEnum) else config.model.weights,
        "tap": config.model.tap,
        "sha256": state_hash(classifier.frozen_state()),
    }
    if resumed and resumed.backbone != identity:
        raise DataError(f"the weights of {config.model.backbone} are not those this run began with; restore that file")
    parts = Parts(
        config=config,
        dataset=dataset,
        drawn=drawn,
        train_pipeline=Pipeline(train_steps, "transforms.train"),
        eval_pipeline=eval_pipeline,
        classifier=classifier.to(device),
        backbone=identity,
        device=device,
        precision=_precision(config.train.precision, device),
    )
    log.info("%s", _summary(parts))
    return parts


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
    ]
    for check in checks:
        try:
            check()
        except SettingError as error:
            problems.append(error)
    if problems:
        raise loaded.located(problems)


def _classifier(config: Config, weights: Any, dataset: Dataset, pipeline: Pipeline) -> Classifier:
    model = config.model
    height, width = pipeline.image(dataset.split("train").open(0)).shape[-2:]
    backbone = build_backbone(model.backbone, weights, model.tap, config.seed)
    in_features = feature_size(model.backbone, model.tap, height, width)
    torch.manual_seed(config.seed)
    head = build_head(in_features, model.head.hidden, len(dataset.classes), model.head.dropout)
    return Classifier(backbone, head, model.trainable)


def _state(parts: Parts) -> State:
    section = parts.config.train
    parameters = [parameter for parameter in parts.classifier.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(parameters, section.optimizer)
    schedule = Schedule(optimizer, section.schedule, section.epochs, len(parts.batches("train")))
    scaler = torch.amp.GradScaler(parts.device.type, enabled=parts.precision == "fp16")
    return State(parts.classifier, optimizer, schedule, scaler, Progress())


def _training(parts: Parts, state: State) -> Training:
    loss = parts.config.train.loss
    targets = list(parts.dataset.split("train").targets)
    weights = class_weights(targets, len(parts.dataset.classes)) if loss.class_weights == "balanced" else None
    return Training(
        state=state,
        forward=_autocast(parts.classifier, parts.device, parts.precision),
        batches=parts.batches("train", training=True),
        validate=_evaluator(parts, "val"),
        criterion=nn.CrossEntropyLoss(weights, label_smoothing=loss.label_smoothing).to(parts.device),
        device=parts.device,
        epochs=parts.config.train.epochs,
    )


def _evaluator(parts: Parts, split: str) -> Callable[[], Figures]:
    batches = parts.batches(split)
    forward = _autocast(parts.classifier, parts.device, parts.precision)

    def run() -> Figures:
        parts.classifier.eval()
        return evaluate(forward, bar(batches.epoch(0, parts.device), split, len(batches)))

    return run


def _precision(setting: str, device: torch.device) -> str:
    """`auto` is bf16 on a CUDA device that has it natively, fp32 elsewhere."""
    if setting == "fp16" and device.type != "cuda":
        raise SettingError(
            "train.precision", f"fp16 needs a CUDA device, this run is on {device.type}; use fp32 or bf16"
        )
    if setting != "auto":
        return setting
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _autocast(classifier: nn.Module, device: torch.device, precision: str) -> Forward:
    def forward(inputs: Tensor) -> Tensor:
        with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            logits: Tensor = classifier(inputs)
        return logits.float()

    return forward


def _template(parts: Parts) -> Checkpoint:
    """The part of the run's checkpoints that is known before training."""
    return Checkpoint(
        config=parts.config.model_dump(),
        classes=parts.dataset.classes,
        preprocessing=parts.eval_pipeline.steps,
        backbone=parts.backbone,
        trained={},
        frozen=None,
        epoch=0,
        metrics=None,
        val_names=list(parts.dataset.split("val").names) if parts.drawn else None,
    )


def _new_run_dir(output: Path, name: str) -> Path:
    for number in count(1):
        with contextlib.suppress(FileExistsError):
            (output / f"{name}-{number}").mkdir()
            return output / f"{name}-{number}"
    raise AssertionError("count() does not end")


def _describe(parts: Parts, run_dir: Path) -> None:
    write_text(run_dir / "config.yaml", to_yaml(parts.config))
    write_text(run_dir / "classes.txt", "".join(f"{name}\n" for name in parts.dataset.classes))
    if parts.drawn:
        table = io.StringIO()
        rows = [(name, split) for split, images in parts.dataset.splits.items() for name in images.names]
        csv.writer(table, lineterminator="\n").writerows([("path", "split"), *rows])
        write_text(run_dir / "split.csv", table.getvalue())


def _tracker(parts: Parts, run_dir: Path, resumption: Resumption | None) -> Tracker:
    done = resumption.last.epoch if resumption else 0
    tracker = Tracker(run_dir, tensorboard=parts.config.output.tensorboard, done=done)
    if not resumption and parts.config.output.tensorboard:
        stages = parts.classifier.trained
        graph = graph_of(parts.classifier.frozen, trained=False)
        graph += graph_of([*stages, ("head", parts.classifier.head)], trained=True)
        tracker.start(to_yaml(parts.config), graph)
        sample = _sample(parts.dataset.split("train"))
        shown = ImageBatches(sample, parts.train_pipeline, batch_size=len(sample), workers=0, seed=parts.config.seed)
        batch = next(shown.epoch(0, torch.device("cpu")))
        captions = [parts.dataset.classes[label] for label in batch.targets.tolist()]
        tracker.images(parts.train_pipeline.denormalise(batch.inputs), captions)
    return tracker


def _sample(split: Split) -> Split:
    """Images spread evenly over the split, which is ordered by class."""
    number = min(IMAGES_SHOWN, len(split))
    return split.subset([index * len(split) // number for index in range(number)])


def _summary(parts: Parts) -> str:
    model, sizes = parts.config.model, {name: len(split) for name, split in parts.dataset.splits.items()}
    counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
    trained = sum(p.numel() for p in parts.classifier.parameters() if p.requires_grad)
    return (
        f"{counts} images in {len(parts.dataset.classes)} classes; {model.backbone} ({parts.backbone['weights']}), "
        f"{trained:,} parameters train; {parts.device.type}, {parts.precision}"
    )
