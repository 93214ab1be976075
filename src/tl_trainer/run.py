"""A run from its configuration to its directory, and the evaluation of a checkpoint."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from tl_trainer.assembly import Parts, assemble, new_state, new_training
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.load import Loaded, to_yaml
from tl_trainer.config.schema import expand, flat
from tl_trainer.data.dataset import Dataset, Split, fingerprint, with_validation
from tl_trainer.data.loaders import ImageBatches, worker_count
from tl_trainer.data.sources import check_root, open_dataset
from tl_trainer.data.transforms import tta_pipelines
from tl_trainer.errors import CheckpointError, DataError, InputError, Interrupted, TrainerError, is_out_of_memory
from tl_trainer.evaluate import averaged, evaluate
from tl_trainer.features import FeatureBatches
from tl_trainer.files import make_folder, sole_use, write_text
from tl_trainer.metrics import Scores, figures, surest_mistakes
from tl_trainer.report import Evaluation, write_report
from tl_trainer.restore import restore
from tl_trainer.resume import Resumption
from tl_trainer.saver import RESULT, Saver, State
from tl_trainer.signals import StopRequest, Terminated
from tl_trainer.tracking import Tracker, bar, graph_of
from tl_trainer.train import fit

log = logging.getLogger(__name__)

IMAGES_SHOWN = 16
IMAGES_EMBEDDED = 256
THUMBNAIL, MISTAKE = 48, 128  # pixels
SMALL_STEP = 50_000_000  # multiply-adds


def train(loaded: Loaded, resumption: Resumption | None = None) -> dict[str, Any]:
    """Train as configured, or go on with a run; the summary that `tl-train --json` prints.

    Raises a TrainerError for whatever is wrong with the configuration, the data or the run.
    """
    started = time.perf_counter()
    output = expand(loaded.config.output.dir)
    make_folder(resumption.run_dir if resumption else output, "--output")
    parts = assemble(loaded, resumption.last if resumption else None)
    images = fingerprint(parts.dataset.split("train"))
    if resumption and resumption.last.resume and resumption.last.resume.get("images") != images:
        raise DataError(f"{parts.dataset.where}: the training images are not those this run began with")
    run_dir = resumption.run_dir if resumption else _new_run_dir(output, loaded.name)
    log.info("%s\nrun directory: %s", _summary(parts), run_dir)
    state = new_state(parts)
    template = _template(parts)
    if resumption and resumption.last.val_images != template.val_images:
        raise DataError(f"{parts.dataset.where}: the validation images are not those this run began with")
    with contextlib.ExitStack() as stack:
        if resumption is None:  # else `resume` holds it, since before it read last.pth
            stack.enter_context(sole_use(run_dir))
        else:
            _go_on(state, resumption)  # from here to `fit` nothing may draw random numbers
            (run_dir / RESULT).unlink(missing_ok=True)
        with StopRequest() as stop, _threads_for(parts):
            _describe(parts, run_dir)
            tracker = stack.enter_context(contextlib.closing(_tracker(parts, run_dir, resumption)))
            saver = Saver(run_dir, template, state, stop, images, tracker.flush)
            saver.adopt(resumption.best if resumption else None)
            fit(new_training(parts, state), tracker, saver)
        if stop.signal is not None:  # it came while the last epoch was saved
            raise Interrupted(
                stop.signal, f"stopped after the last epoch; {run_dir / 'best.pth'} is complete; {_remedy(run_dir)}"
            )
        with _saying_what_is_saved(run_dir):
            return _conclude(parts, run_dir, tracker, saver, started)


def _conclude(parts: Parts, run_dir: Path, tracker: Tracker, saver: Saver, started: float) -> dict[str, Any]:
    """What comes after the last epoch, so that a run which was killed here can make up for it: figures and report.

    The summary is written last, as the mark that nothing is missing.
    """
    assert saver.best is not None
    parts.network.classifier.load_trained_state(saver.best.trained)
    scores = {"val": saver.best_scores or parts.evaluate("val")}
    if "test" in parts.dataset.splits:
        scores["test"] = parts.evaluate("test")
    progress, best = saver.state.progress, run_dir / "best.pth"
    result: dict[str, Any] = {
        "run_dir": str(run_dir),
        "checkpoint": str(best),
        "report": None,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "val": progress.best,
        **({"test": asdict(figures(scores["test"]))} if "test" in scores else {}),
        "seconds": round(time.perf_counter() - started, 3),
    }
    try:
        if parts.config.output.report:
            result["report"] = str(_report(parts, run_dir, scores, saver.best))
        _log_outcome(parts, tracker, progress.best_epoch, scores)
        tracker.close()
        result["seconds"] = round(time.perf_counter() - started, 3)
        write_text(run_dir / RESULT, json.dumps(result, indent=2) + "\n")
    except TrainerError as error:  # the run has succeeded, and everything that matters is saved
        log.warning("%s\nevery epoch is done, the best one in %s; %s", error, best, _remedy(run_dir))
    return result


@contextlib.contextmanager
def _saying_what_is_saved(run_dir: Path) -> Iterator[None]:
    """A signal after the last epoch takes no epoch with it."""
    try:
        yield
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        message = f"stopped; every epoch is done, the best one in {run_dir / 'best.pth'}; {_remedy(run_dir)}"
        raise Interrupted(number, message) from error


def _remedy(run_dir: Path) -> str:
    return f"--resume {run_dir} makes up what is missing, such as the report"


def _go_on(state: State, resumption: Resumption) -> None:
    assert resumption.last.resume is not None
    try:
        state.restore(resumption.last.trained, resumption.last.resume)
    except Exception as error:  # its checksum is right and its content is not: torch raises anything
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise CheckpointError(
            f"{resumption.run_dir / 'last.pth'}: does not fit this run: {type(error).__name__}: {reason}"
        ) from error


@contextlib.contextmanager
def _threads_for(parts: Parts) -> Iterator[None]:
    """One thread for a step that takes microseconds: waking the others costs more than they save, above all on a
    machine that has other work to do."""
    before = torch.get_num_threads()
    weights = sum(value.numel() for value in parts.network.classifier.trained_state().values())
    if (
        isinstance(parts.feeds["train"].batches, FeatureBatches)
        and weights * parts.config.train.batch_size < SMALL_STEP
    ):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dry_run(loaded: Loaded) -> dict[str, Any]:
    """Check everything up to the loss of the first batch, writing nothing; the batch's shape and the loss."""
    uncached = loaded.config.features.model_copy(update={"cache": "off"})
    parts = assemble(replace(loaded, config=loaded.config.model_copy(update={"features": uncached})))
    log.info("%s", _summary(parts))
    training = new_training(parts, new_state(parts))
    batch = next(iter(training.feed.batches.epoch(0, training.device)))
    loss = training.criterion(training.feed.forward(batch.inputs), batch.targets).item()
    return {"first_batch": list(batch.inputs.shape), "loss": loss}


def evaluate_checkpoint(
    path: Path,
    *,
    data_dir: str | None,
    split: str | None,
    device: str | None,
    batch_size: int | None,
    workers: int | str | None,
    on_bad_image: str | None,
    tta: str | None,
    report: Path | None,
) -> dict[str, Any]:
    """The figures of a checkpoint on a split (test where there is one, else val), as `tl-eval --json` prints them.

    report: the folder to write the report into, if any. tta: the test-time augmentation, if any.
    """
    restored = restore(path, device)
    if report is not None:
        make_folder(report, "--report")
    config, network = restored.loaded.config, restored.network
    data = config.data.model_copy(update={"root": data_dir} if data_dir else {})
    if data_dir:
        check_root(data)
    dataset = open_dataset(data, restored.checkpoint.classes)
    split = split or _default_split(dataset, restored.checkpoint.val_names)
    if split != "all" and restored.checkpoint.val_names is not None:
        dataset = with_validation(dataset, data.val_fraction, config.seed, restored.checkpoint.val_names)
    if network.extractor is not None:
        try:
            make_folder(network.extractor.folder, "features.dir")
        except InputError as error:
            log.warning("%s; going on without the cache", error)
            network.extractor = None
    size, processes = batch_size or config.train.batch_size, worker_count(data.workers if workers is None else workers)
    images, views = dataset.split(split), list[Scores]()
    pipelines = tta_pipelines(restored.checkpoint.preprocessing, tta)
    for number, pipeline in enumerate(pipelines, start=1):
        what = f"{split} (view {number} of {len(pipelines)})" if tta else split
        # Bad images are found, and told, once: those of the later views must be the same.
        on_bad = "changed" if views else on_bad_image or data.on_bad_image
        feed = network.evaluation_feed(images, what, pipeline, on_bad, size, processes)
        images = feed.split
        views.append(evaluate(feed.forward, bar(feed.batches.epoch(0, network.device), what, len(feed.batches))))
    scores = Scores(averaged([view.logits for view in views]), views[0].targets)
    evaluation = Evaluation(split, dataset.where, images, scores, network.contents(images), restored.checkpoint, tta)
    if report is None:
        return evaluation.headline
    about = {"name": restored.loaded.name, "checkpoint": str(path), "config": to_yaml(config)}
    page = write_report(report, evaluation, network.classifier, restored.pipeline, about)
    return {**evaluation.headline, "report": str(page)}


def _default_split(dataset: Dataset, val_names: list[str] | None) -> str:
    """test where there is one, else val; all of a folder without splits, unless the run drew its val split from it."""
    if "test" in dataset.splits or "all" not in dataset.splits:
        return "test" if "test" in dataset.splits else "val"
    return "val" if val_names is not None and set(val_names) <= {*dataset.splits["all"].names} else "all"


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
        val_images=parts.network.contents(parts.dataset.split("val")),
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
    tracker = Tracker(run_dir, parts.dataset.classes, tensorboard=parts.config.output.tensorboard, done=done)
    if not resumption and parts.config.output.tensorboard:
        stages = parts.network.classifier.trained
        graph = graph_of(parts.network.classifier.frozen, trained=False)
        graph += graph_of([*stages, ("head", parts.network.classifier.head)], trained=True)
        tracker.start(to_yaml(parts.config), graph)
        sample = _sample(parts.dataset.split("train"), IMAGES_SHOWN)
        shown = ImageBatches(sample, parts.train_pipeline, batch_size=len(sample), workers=0, seed=parts.config.seed)
        batch = next(shown.epoch(0, torch.device("cpu")))
        captions = [parts.dataset.classes[label] for label in batch.targets.tolist()]
        tracker.images("train/images", parts.train_pipeline.denormalise(batch.inputs), captions)
    return tracker


def _log_outcome(parts: Parts, tracker: Tracker, best_epoch: int, scores: dict[str, Scores]) -> None:
    """Into TensorBoard: the best epoch's pictures, the final figures, and the features of some validation images."""
    if not parts.config.output.tensorboard:
        return
    final = {f"final/{name}_{key}": value for name, found in scores.items()
             for key, value in asdict(figures(found)).items() if key != "n"}  # fmt: skip
    dumped = parts.config.model_dump(include={"seed", "transforms", "model", "train"})
    settings = {key: value if isinstance(value, (str, float, int)) else str(value) for key, value in flat(dumped)}
    tracker.finish(best_epoch, scores["val"], final, settings)
    val, classes = parts.dataset.split("val"), parts.dataset.classes
    if mistakes := surest_mistakes(scores["val"], None, IMAGES_SHOWN):
        said = scores["val"].logits.argmax(dim=1).tolist()
        captions = [f"{classes[val.targets[index]]}? {classes[said[index]]}" for index in mistakes]
        tracker.images("val/mistakes", _thumbnails(val.subset(mistakes), MISTAKE), captions, best_epoch)
    sample = _sample(val, IMAGES_EMBEDDED)
    features = parts.network.embed(sample, parts.eval_pipeline, parts.config.train.batch_size)
    tracker.embedding(features, [classes[label] for label in sample.targets], _thumbnails(sample, THUMBNAIL))


def _thumbnails(split: Split, side: int) -> Tensor:
    """(N, 3, side, side) in [0, 1]: what is in the middle of each image."""
    pictures = [ImageOps.fit(split.open(index), (side, side)) for index in range(len(split))]
    return torch.stack([pil_to_tensor(picture) for picture in pictures]) / 255


def _report(parts: Parts, run_dir: Path, scores: dict[str, Scores], best: Checkpoint) -> Path:
    """The report on the best checkpoint, on the split that tl-eval would take too."""
    what = "test" if "test" in scores else "val"
    split = parts.dataset.split(what)
    evaluation = Evaluation(what, parts.dataset.where, split, scores[what], parts.network.contents(split), best)
    log.info("writing the report on %s images", what)
    about = {"name": run_dir.name, "checkpoint": str(run_dir / "best.pth"), "config": to_yaml(parts.config)}
    make_folder(run_dir / "report", "--output")
    return write_report(run_dir / "report", evaluation, parts.network.classifier, parts.eval_pipeline, about)


def _sample(split: Split, number: int) -> Split:
    """Images spread evenly over the split, which is ordered by class."""
    number = min(number, len(split))
    return split.subset([index * len(split) // number for index in range(number)])


def _summary(parts: Parts) -> str:
    model, sizes = parts.config.model, {name: len(split) for name, split in parts.dataset.splits.items()}
    counts = ", ".join(f"{size} {name}" for name, size in sizes.items())
    trained = sum(p.numel() for p in parts.network.classifier.parameters() if p.requires_grad)
    network = parts.network
    arithmetic = f"{network.precision if network.autocast else 'fp32'} for what trains"
    if network.classifier.frozen:
        arithmetic += f", {network.precision} for what is frozen"
    return (
        f"{counts} images in {len(parts.dataset.classes)} classes\n"
        f"{model.backbone} ({parts.backbone['weights']}), {trained:,} parameters train\n"
        f"{parts.network.device.type}, {arithmetic}"
    )
