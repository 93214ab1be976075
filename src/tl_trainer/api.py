"""tl-trainer from Python: train, load a checkpoint, predict, evaluate, embed, explain.

Nothing here sets a signal handler, ends the process, or writes to stderr unless `progress` is asked for; what the
commands say goes to the logger `tl_trainer`. What is wrong is raised as a TrainerError with the commands' sentence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from tl_trainer import conformal, embeddings, run
from tl_trainer import resume as resuming
from tl_trainer.assembly import Parts, restore
from tl_trainer.config.data import expand
from tl_trainer.config.load import Loaded, Override, data_at, to_yaml
from tl_trainer.config.load import load as load_config
from tl_trainer.data.transforms import tta_pipelines
from tl_trainer.errors import InputError
from tl_trainer.evaluation import Evaluation, evaluate_checkpoint, require_one_label
from tl_trainer.ground import distributed
from tl_trainer.ground.failures import in_sentences
from tl_trainer.ground.files import make_folder, numbered_folder, previous
from tl_trainer.ground.progress import bars
from tl_trainer.ground.signals import StopRequest
from tl_trainer.ground.wording import unknown
from tl_trainer.known import FEWEST, Known, at_hand, known, training_pictures
from tl_trainer.multitask import MultiTask
from tl_trainer.predict import Asked, Extras, Near, Predictor, Row, Source, embed, explain
from tl_trainer.report import NEIGHBOURS, write_report
from tl_trainer.resume import Resumption
from tl_trainer.runs import best_of

log = logging.getLogger(__name__)

Location = str | os.PathLike[str]
Configuration = Location | Mapping[str, Any] | None


def train(
    config: Configuration = None,
    *,
    resume: Location | bool = False,
    progress: bool = False,
    stop: StopRequest | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Train a classifier; what the run's result.json holds, such as `run_dir`, `checkpoint` and the figures of `val`.

    config: a YAML file, the name of a bundled configuration, or a mapping; None for the defaults. resume: a run to go
    on with; True for the newest one of this configuration, whose result is given where it is complete. progress:
    whether bars are drawn on stderr. stop: setting its `signal` to a signal's number ends the run after the next batch,
    saved. overrides: keys of the configuration, dots as double underscores: `train__epochs=5`.

    Raises a TrainerError: InputError for what is wrong with configuration or data, RunError for a run that failed,
    Interrupted for one that `stop` ended.
    """
    with _called(progress), _started(config, resume, overrides, hold=True) as (loaded, resumption):
        if resumption and resumption.result:
            log.info("%s is complete; nothing was left to do", resumption.run_dir)
            return resumption.result
        stop = stop or StopRequest()
        if loaded.lists:
            from tl_trainer.probe import probe  # nobody else waits for it

            loaded = distributed.from_first(partial(probe, loaded, stop))
        return run.train(loaded, resumption, stop)


def dry_run(
    config: Configuration = None, *, resume: Location | bool = False, progress: bool = False, **overrides: Any
) -> dict[str, Any]:
    """Check all that `train` needs, up to the first batch, without a run; the batch's shape and `loss`.

    Weights that are not here stay where they are; data is fetched, and kept in the cache as for a run. `estimate` is of
    a run with an empty cache: seconds before the report, bytes of cached features and of memory.
    """
    from tl_trainer.dry_run import dry_run  # nobody else waits for it

    with _called(progress), _started(config, resume, overrides, hold=False) as (loaded, _):
        return dry_run(loaded)


def check(config: Configuration = None, *, progress: bool = False, **overrides: Any) -> dict[str, Any]:
    """Check the data of a configuration for copies, wrong labels and odd images; what check.json holds.

    Such as `counts` by kind, the path of the `page`, and `skip`: a CSV file for `data.skip`. The files are written into
    a new folder in output.dir. config, progress, overrides: as for `train`. Raises a TrainerError.
    """
    from tl_trainer import checks  # nobody else waits for these
    from tl_trainer.checks_page import write_check
    from tl_trainer.data.skip import named_in

    with _called(progress):
        loaded = load_config(os.fspath(config) if isinstance(config, os.PathLike) else config, _dotted(overrides))
        output = expand(loaded.config.output.dir)
        make_folder(output, "--output")
        checked = checks.check(loaded)
        folder = numbered_folder(output, f"{loaded.name}-check")
        before = [] if loaded.config.data.skip is None else named_in(expand(loaded.config.data.skip))
        return write_check(folder, checked, loaded.name, _train_command(config, overrides), before)


def cross_validate(
    config: Configuration = None, *, folds: int = 10, progress: bool = False, **overrides: Any
) -> dict[str, Any]:
    """How good the head is that `train` would find, by cross-validation on the images for training; keeps none.

    What folds.json in its `folder` holds: the figures of all images, each judged by a head that was found without its
    fold, `top1_interval`, `per_class`, the path of `predictions`. config, progress, overrides: as for `train`.
    """
    from tl_trainer import cross_validation  # nobody else waits for it

    with _called(progress), _started(config, False, overrides, hold=False) as (loaded, _):
        return cross_validation.cross_validate(loaded, folds)


def find_rate(config: Configuration = None, *, progress: bool = False, **overrides: Any) -> dict[str, Any]:
    """The learning-rate range test of what `train` would train: batches at rising rates, nothing kept but its curve.

    What is returned has the `folder` with rates.csv and rates.png, the suggested `lr`, or None where the loss fell at
    no rate, and the `words` that set it. config, progress, overrides: as for `train`. Raises a TrainerError.
    """
    from tl_trainer import range_test  # nobody else waits for it

    with _called(progress), _started(config, False, overrides, hold=False) as (loaded, _):
        return range_test.find_rate(loaded)


def load(checkpoint: Location, *, progress: bool = False, **overrides: Any) -> Model:
    """The trained classifier in a checkpoint, in the best.pth of a run directory, or of the newest in a folder of runs.

    overrides: keys of the configuration that do not change what was trained, such as `device="cpu"`,
    `data__root="more-photos"`, `train__batch_size=8`. Raises a TrainerError.
    """
    with _called(progress):
        path = best_of(Path(checkpoint))
        return Model(restore(path, _dotted(overrides)), path, progress, _dotted(overrides))


class Model:
    """A trained classifier. `load` makes it."""

    def __init__(self, parts: Parts, checkpoint: Path, progress: bool, overrides: Sequence[Override] = ()) -> None:
        self._parts, self._checkpoint, self._progress, self._overrides = parts, checkpoint, progress, overrides

    @property
    def classes(self) -> list[str]:
        """The class names in index order."""
        return list(self._parts.task.classes)

    @property
    def task(self) -> str:
        """What an image has, as `data.task`: single (one class), multilabel or multitask."""
        return self._parts.task.kind

    @property
    def heads(self) -> list[str]:
        """The names of several heads; empty where there is one."""
        task = self._parts.task
        return [head.name for head in task.heads] if isinstance(task, MultiTask) else []

    @property
    def temperature(self) -> float | list[float | None] | None:
        """What calibrates the probabilities, of several heads of each; None where they are often too high."""
        return self._parts.saved.temperature if self._parts.saved else None

    def predict(
        self, images: Source | Iterable[Source], *, topk: int = 5, tta: str | None = None, batch_size: int = 16
    ) -> list[Row]:
        """A row per image (a path or a PIL image), in order: its best classes, or in `error` why there are none.

        tta: flip, fivecrop or tencrop, to average over views of each image.
        """
        return list(self.rows(_many(images), topk=topk, tta=tta, batch_size=batch_size, ready=lambda: True))

    def rows(
        self,
        images: Iterable[Source],
        *,
        topk: int = 5,
        tta: str | None = None,
        batch_size: int = 16,
        extras: Extras | None = None,
        ready: Callable[[], bool] | None = None,
    ) -> Iterator[Row]:
        """`predict` for any number of images: rows as they come, with constant memory.

        extras: what else rows say. ready: whether the next image is there already, so that it can be decoded while a
        batch is computed; None: always in a list, else never, so that no row waits for an image to come.
        """
        extras = extras or Extras()
        table = None if extras.embed is None else Path(extras.embed)
        with in_sentences():
            asked = self._asked(extras, tta)
            if table is not None:
                embeddings.check(table, force=extras.force)
            predictor = Predictor(self._parts, topk, tta_pipelines(self._parts.pipeline.steps, tta), asked)

        def stream() -> Iterator[Row]:
            with in_sentences():
                rows = predictor.rows(images, batch_size, ready)
                yield from rows if table is None else embeddings.written(rows, table, self._parts.features)

        return stream()

    def _asked(self, extras: Extras, tta: str | None) -> Asked:
        folder = None if extras.evidence is None else Path(extras.evidence)
        if folder is not None:
            make_folder(folder, "--explain")
        compared = bool(extras.neighbours or extras.reject)
        if (compared or extras.embed is not None) and tta in ("fivecrop", "tencrop"):
            raise InputError(f"--neighbours, --reject and --embed take whole images; leave --tta {tta} out")
        saved, most = self._parts.saved, None
        if extras.coverage is not None:
            require_one_label(self._parts.task)
            if tta is not None:
                raise InputError(f"--coverage was calibrated without --tta; leave --tta {tta} out")
            most = conformal.threshold(saved.conformal if saved else None, extras.coverage)
        near = None
        if compared:
            near = Near(self._known(extras.reject), extras.neighbours, extras.reject)
            if folder is not None and extras.neighbours:
                near = replace(near, picture=training_pictures(self._parts, self._checkpoint))
        return Asked(folder, near, most, extras.embed is not None)

    def _known(self, reject: bool) -> Known:
        with bars(self._progress):
            found = known(self._parts, self._checkpoint)
        if reject and len(found.val) < FEWEST:
            raise InputError(
                f"--reject learns from validation images what is usual, and the run has {len(found.val)}; {FEWEST} or "
                "more are needed: raise data.val_fraction and train again, or leave --reject out"
            )
        return found

    def evaluate(
        self,
        split: str | None = None,
        *,
        tta: str | None = None,
        report: Location | None = None,
        ignore_extra: bool = False,
        coverage: float | None = None,
    ) -> dict[str, Any]:
        """The figures on a split of the configured dataset, as `tl-eval --json` prints them.

        split: None takes test where there is one, else val, else all. report: a folder to write the report into.
        ignore_extra: leave out images of classes that the checkpoint does not have, instead of refusing them. coverage:
        how often sets of classes are to hold the right one; `sets` says how often they do.
        """
        with _called(self._progress):
            folder = None if report is None else Path(report)
            if folder is not None:
                make_folder(folder, "--report")
            evaluation = evaluate_checkpoint(self._parts, split, tta, ignore_extra=ignore_extra, coverage=coverage)
            if folder is None or not distributed.is_first():
                return evaluation.headline
            with distributed.alone():  # the other ranks are done
                page = self._report(folder, evaluation)
            return {**evaluation.headline, "report": str(page)}

    def _report(self, folder: Path, evaluation: Evaluation) -> Path:
        known, loaded = at_hand(self._parts, self._checkpoint), self._parts.loaded
        nearest = None if known is None else partial(known.nearest_in, self._parts, count=NEIGHBOURS)
        about: dict[str, Any] = {"nearest": nearest}
        about |= {"name": loaded.name, "checkpoint": str(self._checkpoint), "config": to_yaml(loaded.config)}
        return write_report(folder, evaluation, self._parts.network.classifier, self._parts.pipeline, about)

    def embed(self, images: Source | Iterable[Source], *, batch_size: int = 16) -> Tensor:
        """What the head sees of each image, (N, features) float32 on the CPU. ImageError for one that is unreadable."""
        with _called(self._progress):
            return embed(self._parts, _many(images), batch_size)

    def explain(self, image: Source, label: str | None = None) -> Image.Image:
        """The image as the network sees it, and beside it the same under the heat of Grad-CAM.

        label: the class whose evidence is shown, None for the predicted one. Raises InputError for an unknown class,
        and for a backbone without a stage that has a height and a width.
        """
        with _called(self._progress):
            if label is not None and label not in self.classes:
                raise InputError(unknown("class", label, self.classes))
            return explain(self._parts, image, None if label is None else self.classes.index(label))

    def export(
        self, to: str, out: Location, *, origin: Literal["image", "tensor"] = "image", force: bool = False
    ) -> dict[str, Any]:
        """Write the classifier for other programs, checked; what tl-export --json prints.

        to: onnx, pt2, safetensors or hub. origin: what onnx and pt2 take: uint8 images (N, H, W, 3), or the tensor that
        the preprocessing makes of them. force: replace what is there. Raises InputError for what cannot be exported so,
        RunError where the export does not agree with `predict`.
        """
        with _called(self._progress):
            from tl_trainer.export import FORMATS, export

            if to not in FORMATS:
                raise InputError(unknown("format", to, FORMATS))
            parts = self._parts
            if (parts.network.device.type, parts.network.precision) != ("cpu", "fp32"):
                parts = restore(self._checkpoint, [*self._overrides, ("device", "cpu"), ("train.precision", "fp32")])
            return export(parts, to, Path(out), origin, force=force)

    def add_class(self, name: str, folder: Location, *, output: Location = "runs") -> dict[str, Any]:
        """Write a run whose best.pth also knows the class `name`, of which there are images in `folder`; no training.

        The linear head is solved again on the features of all images. What the result.json of the new run in `output`
        holds: `checkpoint`, top-1 of `old_classes` before and after, recall of the `new_class`.
        """
        with _called(self._progress):
            from tl_trainer.added_class import add_class

            parts = restore(self._checkpoint, self._overrides)  # a copy, since it is changed
            return add_class(parts, self._checkpoint, name, Path(folder), Path(output))


@contextlib.contextmanager
def _called(progress: bool) -> Iterator[None]:
    with bars(progress), in_sentences():
        yield


@contextlib.contextmanager
def _started(
    config: Configuration, resume: Location | bool, overrides: Mapping[str, Any], *, hold: bool
) -> Iterator[tuple[Loaded, Resumption | None]]:
    path, again = os.fspath(config) if isinstance(config, os.PathLike) else config, False
    if resume is False and hold:
        resume = _begun()
        again = resume is not False
    if resume is False:
        yield distributed.from_first(lambda: load_config(path, _dotted(overrides))), None
        return
    target = None if resume is True else os.fspath(resume)
    resumed = resuming.resume(target, path, _dotted(overrides), hold=hold, again=again)
    with contextlib.ExitStack() as stack:  # rank 0 holds the run
        yield distributed.from_first(lambda: stack.enter_context(resumed))


def _begun() -> str | Literal[False]:
    """The run to go on with of ranks that torchrun has started again, if they had come so far that it can be."""
    run_dir = distributed.kept(run.STARTED)
    if run_dir is None:
        return False
    last = Path(run_dir) / "last.pth"
    return run_dir if distributed.from_first(lambda: last.is_file() or previous(last).is_file()) else False


def _train_command(config: Configuration, overrides: Mapping[str, Any]) -> str:
    """The command that trains on the same, but for data.skip; a mapping has none, and stands as its name."""
    words = []
    if isinstance(config, (str, os.PathLike)):
        words = [os.fspath(config)] if data_at(expand(os.fspath(config))) else ["--config", os.fspath(config)]
    given = [(key, value) for key, value in _dotted(overrides) if key != "data.skip"]
    words += [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given]
    return shlex.join(["tl-train", *words])


def _dotted(overrides: Mapping[str, Any]) -> list[Override]:
    return [(key.replace("__", "."), value) for key, value in overrides.items()]


def _many(images: Source | Iterable[Source]) -> Iterable[Source]:
    return [images] if isinstance(images, Source) else images
