"""What comes after the last epoch: the final figures, the report, and what TensorBoard shows of them.

A run that was killed here makes up for it when it is resumed; result.json is written last, as the mark that nothing is
missing.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import pil_to_tensor

from tl_trainer.advice import Facts, advise
from tl_trainer.assembly import Setup
from tl_trainer.candidates import LINEAR, Found, FoundHeads
from tl_trainer.config.load import to_yaml
from tl_trainer.config.schema import flat
from tl_trainer.data.dataset import Split
from tl_trainer.data.overview import Overview
from tl_trainer.errors import TrainerError
from tl_trainer.evaluation import Evaluation
from tl_trainer.features import FeatureBatches
from tl_trainer.feeds import Feed
from tl_trainer.forecast import Forecast, forecast
from tl_trainer.ground import distributed
from tl_trainer.ground.files import make_folder, write_text
from tl_trainer.ground.wording import listed
from tl_trainer.known import Known, Neighbour
from tl_trainer.metrics import Scores
from tl_trainer.plots import epochs_figure, forecast_figure, png, strengths_figure
from tl_trainer.report import NEIGHBOURS, write_report
from tl_trainer.runs import RESULT
from tl_trainer.saver import Progress, Saver
from tl_trainer.tasks import Task
from tl_trainer.tracking import Tracker

log = logging.getLogger(__name__)

MISTAKES_SHOWN = 16
IMAGES_EMBEDDED = 256
THUMBNAIL, MISTAKE = 48, 128  # pixels
REMEDY = "--resume {} makes what is missing, such as the report"


def conclude(
    setup: Setup,
    feeds: dict[str, Feed],
    tracker: Tracker,
    saver: Saver,
    started: float,
    found: Found | FoundHeads | None = None,
) -> dict[str, Any]:
    """Figures and report of the best epoch; what result.json holds. `started` is when by `time.perf_counter`."""
    assert saver.best is not None
    parts, progress, run_dir = setup.parts, saver.state.progress, saver.run_dir
    parts.network.classifier.load_trained_state(saver.best.trained)
    scores = {"val": saver.best_scores or parts.scores(feeds["val"], "val")}
    if "test" in feeds:
        scores["test"] = parts.scores(feeds["test"], "test")
    best = run_dir / "best.pth"
    result: dict[str, Any] = {
        "run_dir": str(run_dir),
        "checkpoint": str(best),
        "report": None,
        **({"probed": parts.loaded.probed} if parts.loaded.probed else {}),
        **({"search": found.summary()} if found else _epochs_of(progress)),
        "val": progress.best,
        **({"test": parts.task.figures(scores["test"])} if "test" in scores else {}),
        "advice": [],
        "seconds": round(time.perf_counter() - started, 3),
    }
    if distributed.is_first():
        with distributed.alone():
            _tell(setup, feeds, tracker, saver, _Told(result, scores, started, found))
    return result


class _Told(NamedTuple):
    """What is told of a run: what result.json holds so far, the scores of each split, when the run began, the head."""

    result: dict[str, Any]
    scores: dict[str, Scores]
    started: float
    found: Found | FoundHeads | None


def _tell(setup: Setup, feeds: dict[str, Feed], tracker: Tracker, saver: Saver, told: _Told) -> None:
    """Calibrate best.pth, write the report and the last of TensorBoard, and complete result.json."""
    assert saver.best is not None
    parts, progress, run_dir = setup.parts, saver.state.progress, saver.run_dir
    result, scores, started, found = told
    best = run_dir / "best.pth"
    try:
        saver.calibrate_best(scores["val"])
        evaluations = {
            name: Evaluation(
                name,
                setup.dataset.where,
                setup.dataset.split(name),
                of_split,
                saver.best,
                parts.task,
                duplicates=setup.duplicates,
            )
            for name, of_split in scores.items()
        }
        overview = Overview.of(setup.dataset)
        if _head_alone(setup, feeds):
            result["train"] = parts.task.figures(parts.scores(feeds["train"], "train"))
        if parts.task.kind == "single":  # its rules go by top-1
            facts = _facts(setup, evaluations["val"], overview, run_dir)
            more = (
                _of_search(setup, found, facts)
                if isinstance(found, Found)
                else _of_epochs(setup, feeds, tracker, progress)
            )
            advised = advise(replace(facts, **more, train=result.get("train", {}).get("top1")))
            result["advice"] = [{"evidence": evidence, "try": remedy} for evidence, remedy in advised]
        if parts.config.output.report:
            about = _found(setup, feeds, found) if found else _trained(tracker, progress, parts.task)
            about |= {"overview": overview, "advice": result["advice"]}
            result["report"] = str(_report(setup, feeds, run_dir, evaluations, about))
        if parts.config.output.tensorboard:
            _log(setup, tracker, progress.best_epoch, evaluations)
            if found is not None:
                tracker.candidates(found.parts)
        tracker.close()
        result["seconds"] = round(time.perf_counter() - started, 3)
        write_text(run_dir / RESULT, json.dumps(result, indent=2) + "\n")
    except TrainerError as error:  # the run has succeeded, and everything that matters is saved
        log.warning("%s\nevery epoch is done, the best one in %s; %s", error, best, REMEDY.format(run_dir))


def _epochs_of(progress: Progress) -> dict[str, Any]:
    """Which epoch is the best of how many, and of which epochs it is the mean, where it is one."""
    mean = {} if progress.soup is None else {"soup": progress.soup}
    return {"best_epoch": progress.best_epoch, **mean, "epochs": progress.epoch}


def _head_alone(setup: Setup, feeds: dict[str, Feed]) -> bool:
    """Whether the head alone trained, on cached features: then a pass over train costs next to nothing."""
    return not setup.parts.network.classifier.trained and isinstance(feeds["train"].batches, FeatureBatches)


def _facts(setup: Setup, val: Evaluation, overview: Overview, run_dir: Path) -> Facts:
    """What `advice` goes by, of every run."""
    config, rows = setup.parts.config, val.measured["per_class"]
    return Facts(
        again=shlex.join(["tl-train", "--config", str(run_dir / "config.yaml")]),
        resume=shlex.join(["tl-train", "--resume", str(run_dir)]),
        classes=overview.classes,
        counts=overview.counts["train"],
        support=[row["support"] for row in rows],
        recalls=[row["recall"] for row in rows],
        val=setup.parts.task.figures(val.scores),
        baseline=overview.baseline("val"),
        best_epoch=val.checkpoint.epoch,
        backbone="resnet50" if config.model.backbone == "convnext_tiny" else "convnext_tiny",
        balanced="balanced" in (config.train.loss.class_weights, config.train.sampler),
        augmented=not setup.train_pipeline.deterministic,
        val_fraction=config.data.val_fraction if setup.drawn else None,
    )


def _of_search(setup: Setup, found: Found, facts: Facts) -> dict[str, Any]:
    """What more is known of a head that was found: another backbone can be compared with that of the run."""
    config = setup.parts.config
    if config.train.phases:
        return {}
    return {"foldable": found.best.method == LINEAR, "backbone": f"[{config.model.backbone}, {facts.backbone}]"}


def _of_epochs(setup: Setup, feeds: dict[str, Feed], tracker: Tracker, progress: Progress) -> dict[str, Any]:
    """What more is known of a head that was trained."""
    config, rows = setup.parts.config, tracker.history()
    head, phased = config.model.head, bool(config.train.phases)
    return {
        "phased": phased,
        "losses": tuple(row["val_loss"] for row in rows),
        **({"best_epoch": 0} if progress.soup else {}),  # it is none of the epochs
        "searchable": _head_alone(setup, feeds)
        and not (phased or head.hidden or head.dropout or config.train.by_epochs),
    }


def _nearest(setup: Setup, feeds: dict[str, Feed]) -> Callable[[Split], list[list[Neighbour]]] | None:
    """What finds the nearest training images by the first view of each, where these are kept and few enough."""
    parts, feed = setup.parts, feeds["train"]
    few = 2 * parts.features * len(feed.split) <= parts.config.output.neighbours_mb * 1e6
    if not (_head_alone(setup, feeds) and isinstance(feed.batches, FeatureBatches) and few):
        return None
    rows = feed.batches.features.take(0, range(len(feed.split))).flatten(1).float()
    known = Known(functional.normalize(rows).half(), feed.split.names, [*feed.split.targets], torch.empty(0))
    return partial(known.nearest_in, parts, count=NEIGHBOURS)


def _report(
    setup: Setup, feeds: dict[str, Feed], run_dir: Path, evaluations: dict[str, Evaluation], of_run: dict[str, Any]
) -> Path:
    """The report on the best checkpoint, on the split that tl-eval would take too; of_run: what it tells of the run."""
    parts, what = setup.parts, "test" if "test" in evaluations else "val"
    log.info("writing the report on %s images", what)
    about = {
        "name": run_dir.name,
        "checkpoint": str(run_dir / "best.pth"),
        "config": to_yaml(parts.config),
        "nearest": _nearest(setup, feeds),
        **of_run,
    }
    make_folder(run_dir / "report", "--output")
    return write_report(run_dir / "report", evaluations[what], parts.network.classifier, parts.pipeline, about)


def _found(setup: Setup, feeds: dict[str, Feed], found: Found | FoundHeads) -> dict[str, Any]:
    """What the report tells of a head that was found, or of each of several."""
    searches, pictures = [], {}
    for head, part in found.parts.items():
        picture = f"search_{head}.png" if head else "search.png"
        pictures[picture] = png(strengths_figure(part.curves(), part.measure))
        table = {"shown": part.shown(), "figure": part.figure, "measure": part.measure, "remark": part.remark()}
        searches.append({"head": head, "picture": picture, "alike": part.alike, **part.summary(), **table})
    expected: Forecast | str = "There is no forecast for a head with hidden layers."
    if not isinstance(found, Found) or found.several:
        expected = "There is no forecast for several labels or heads."
    elif found.best.method == LINEAR:
        expected = forecast(setup, feeds, found.best)
    if isinstance(expected, Forecast):
        pictures["forecast.png"] = png(forecast_figure(expected.measured, expected.line(), expected.interval))
        told = {"sentence": expected.sentence, "how": expected.how}
    else:
        told = {"sentence": expected, "how": ""}
    return {"searches": searches, "forecast": told, "pictures": pictures}


def _trained(tracker: Tracker, progress: Progress, task: Task) -> dict[str, Any]:
    """What the report tells of a head that was trained for epochs."""
    by = f"by {task.best_in_words} on the validation images"
    if progress.soup:
        best, weights = None, f"the mean of those of epochs {listed([*map(str, progress.soup)])}, the best {by}"
    else:
        best, weights = progress.best_epoch, f"those of epoch {progress.best_epoch}, the best {by}"
    return {"weights": weights, "pictures": {"epochs.png": png(epochs_figure(tracker.history(), best, task.shown))}}


def _log(setup: Setup, tracker: Tracker, best_epoch: int, evaluations: dict[str, Evaluation]) -> None:
    """The best epoch's pictures, the final figures, and the features of some validation images."""
    parts, val, scores = setup.parts, setup.dataset.split("val"), evaluations["val"].scores
    final = {
        f"final/{name}_{key}": value
        for name, evaluation in evaluations.items()
        for key, value in parts.task.figures(evaluation.scores).items()
        if key != "n"
    }
    dumped = parts.config.model_dump(include={"seed", "transforms", "model", "train"})
    settings = {key: value if isinstance(value, (str, float, int)) else str(value) for key, value in flat(dumped)}
    tracker.finish(best_epoch, scores, lambda: evaluations["val"].pictures, final, settings)
    if mistakes := parts.task.mistakes(scores, MISTAKES_SHOWN):
        captions = [f"{parts.task.caption(val.targets[index])}? {said}" for index, said in mistakes.items()]
        tracker.images("val/mistakes", _thumbnails(val.subset([*mistakes]), MISTAKE), captions, best_epoch)
    sample = val.sample(IMAGES_EMBEDDED)
    labels = [parts.task.caption(target) for target in sample.targets]
    tracker.embedding(parts.feeds.embed(sample, parts.pipeline), labels, _thumbnails(sample, THUMBNAIL))


def _thumbnails(split: Split, side: int) -> Tensor:
    """(N, 3, side, side) in [0, 1]: what is in the middle of each image."""
    pictures = [ImageOps.fit(split.open(index, draft=side), (side, side)) for index in range(len(split))]
    return torch.stack([pil_to_tensor(picture) for picture in pictures]) / 255
