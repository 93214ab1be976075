"""A training run from its configuration to its directory."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from tl_trainer.assembly import SKIP_FILE, Parts, Setup, set_up
from tl_trainer.candidates import Found, FoundHeads
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.data import expand
from tl_trainer.config.load import COMMAND_LINE, UNNAMED, Loaded, to_yaml
from tl_trainer.config.training import PhaseSection
from tl_trainer.data.dataset import fingerprint, name_hashes
from tl_trainer.data.loaders import ImageBatches, worker_count
from tl_trainer.data.overview import Overview, name_absent
from tl_trainer.errors import Interrupted, RunError
from tl_trainer.features import FeatureBatches
from tl_trainer.feeds import Feed, close
from tl_trainer.ground import distributed
from tl_trainer.ground.files import csv_text, make_folder, numbered_folder, write_bytes, write_text
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.machine import cores, threads_for
from tl_trainer.ground.sealed import seal_of
from tl_trainer.ground.signals import StopRequest, Terminated
from tl_trainer.ground.wording import listed
from tl_trainer.loop import Divided, Gather, Mix, Step, Training, fit
from tl_trainer.metrics import Scores
from tl_trainer.optim import Soup, in_place
from tl_trainer.outcome import REMEDY, conclude
from tl_trainer.resume import Resumption
from tl_trainer.runs import PROBED, RESULT, best_of
from tl_trainer.saver import EpochDone, Progress, Saver, State
from tl_trainer.search import search
from tl_trainer.settings import ONE_TRAINS
from tl_trainer.teacher import teacher_of
from tl_trainer.tracking import Tracker, graph_of

log = logging.getLogger(__name__)

IMAGES_SHOWN = 16
STARTED = "run"  # what torchrun keeps for the ranks that it starts again: the run directory

MakeTracker = Callable[..., Tracker]
MakeSaver = Callable[..., Saver]


def train(
    loaded: Loaded,
    resumption: Resumption | None,
    stop: StopRequest,
    make_tracker: MakeTracker = Tracker,
    make_saver: MakeSaver = Saver,
) -> dict[str, Any]:
    """Train as configured, or go on with a run; what result.json holds.

    stop: asked after every batch. make_tracker, make_saver: what the run logs to, and what saves it. Raises a
    TrainerError for whatever is wrong with the configuration, the data or the run; Interrupted, with everything saved,
    where `stop` asks for it.
    """
    started, last = time.perf_counter(), resumption.last if resumption else None
    output = expand(loaded.config.output.dir)
    if distributed.is_first():
        make_folder(resumption.run_dir if resumption else output, "--output")
    setup = set_up(loaded, last)
    phases = setup.parts.config.phases
    progress = resumption.progress if resumption else Progress()
    begun = _phase_at(phases, progress.passed)
    if last and begun:  # the phase before may have found another head
        setup.parts.new_head(last.config["model"]["head"]["normalise"])
    template, learned = _template(setup), _learned(setup)
    if resumption:
        resumption.require_same(template, learned, setup.dataset.where)
    setup.teach = teacher_of(setup)
    feeds = setup.feeds(begun)
    state = setup.new_state(len(feeds["train"].batches), begun, progress)
    with contextlib.ExitStack() as stack:
        stack.callback(close, feeds)
        if resumption:  # its folder is held since before last.pth was read
            run_dir = resumption.run_dir
            resumption.go_on(state)
        else:
            run_dir = distributed.from_first(lambda: numbered_folder(output, _run_name(loaded)))
            stack.enter_context(sole_use(run_dir) if distributed.is_first() else contextlib.nullcontext())
        distributed.keep(STARTED, str(run_dir))
        _announce(setup, run_dir)
        with stop:
            _describe(setup, to_yaml(loaded.config), run_dir)
            tracker = stack.enter_context(contextlib.closing(_tracker(setup, run_dir, last, make_tracker)))
            saver = make_saver(run_dir, template, state, learned, setup.parts.task.calibration, tracker.flush)
            saver.adopt(resumption.best if resumption else None)
        pause = partial(_pause, stop, saver)
        for number in range(begun, len(phases)):
            if number > begun:
                pause()
                close(feeds)
                feeds = setup.feeds(number)  # outside of `stop`, which lets Ctrl-C wait for the next batch
                stack.callback(close, feeds)
                saver.state = setup.new_state(len(feeds["train"].batches), number, saver.state.progress)
            with stop:
                found = _phase(setup, number, feeds, tracker, saver, pause)
        if number := distributed.largest(stop.signal or 0):  # it came while the last epoch was saved
            said = f"stopped after the last epoch; {run_dir / 'best.pth'} is complete; {REMEDY.format(run_dir)}"
            raise Interrupted(number, said)
        with _saying_what_is_saved(run_dir):
            return conclude(setup, feeds, tracker, saver, started, found)


def _phase(
    setup: Setup, number: int, feeds: dict[str, Feed], tracker: Tracker, saver: Saver, pause: Callable[[], None]
) -> Found | FoundHeads | None:
    """Train one phase to its end; the head that was found, where it was not trained."""
    phases, state = setup.parts.config.phases, saver.state
    if phases[1:]:
        log.info("phase %d of %d: %s", number + 1, len(phases), _in_words(phases[number], setup))
    if phases[number].search == "auto" and not state.progress.begun:
        saver.save()  # so that a search that is killed can be resumed
        found = distributed.from_first(lambda: search(setup, feeds, pause))
        if found is not None:
            _take(found, setup, feeds, tracker, saver)
            return found
        if distributed.world() > 1 and setup.parts.task.kind != "single":
            raise RunError(f"data.task: {setup.parts.task.kind} {ONE_TRAINS}")
        if state.progress.found is not None:
            raise RunError(f"{saver.run_dir}: the search cannot be repeated here; what it found is in best.pth")
    with threads_for(_step_size(setup.parts, feeds["train"])), setup.parts.network.replicated():
        fit(new_training(setup, feeds, state, pause), tracker, saver)
    if state.soup is not None and phases[number] is phases[-1]:
        _taste(setup.parts, feeds["val"], state.soup, saver)
    return None


def _taste(parts: Parts, val: Feed, soup: Soup, saver: Saver) -> None:
    """Evaluate the mean of the best epochs' weights, and make it best.pth unless it is worse; both is said."""
    task, state, progress = parts.task, saver.state, saver.state.progress
    if progress.soup and progress.best_epoch == progress.epoch:  # an earlier session has
        return
    epochs = sorted(epoch for epoch, _, _ in soup.kept)
    with in_place(state.classifier.trained_state(), soup.mean()):
        scores = parts.scores(val, "val of the soup")
        figures = task.figures(scores)
        better = progress.best is None or not task.better(progress.best, figures)
        if better:
            progress.take_soup(epochs, figures)
            saver.improved(scores, state.classifier.trained_state())
    said = "no worse, so it is best.pth" if better else f"no better than epoch {progress.best_epoch}, which is best.pth"
    mean = f"mean of the weights of epochs {listed([*map(str, epochs)])}"
    log.info("%s: val %.4f  %s, %s", mean, figures["loss"], task.in_words(figures), said)
    saver.finish()


def _phase_at(phases: Sequence[PhaseSection], passed: int) -> int:
    """The phase that is under way after so many epochs of the plan; after all of them the last."""
    ends = accumulate(phase.epochs for phase in phases)
    return next((number for number, end in enumerate(ends) if passed < end), len(phases) - 1)


def _in_words(phase: PhaseSection, setup: Setup) -> str:
    if phase.search == "auto":
        return "the head is searched for"
    where = {"head": "the head trains", "all": "all stages train"}.get(
        phase.trainable, f"{phase.trainable} and all later stages train"
    )
    return f"{where}, {_trained(setup.parts):,} parameters, {phase.epochs} epochs"


def _trained(parts: Parts) -> int:
    """How many parameters train."""
    return sum(p.numel() for p in parts.network.classifier.parameters() if p.requires_grad)


def new_training(setup: Setup, feeds: dict[str, Feed], state: State, pause: Callable[[], None]) -> Training:
    """What `fit` works with."""
    parts, feed = setup.parts, feeds["train"]
    section, batches = parts.config.train, len(feed.batches)
    criterion = parts.task.criterion(section.loss, setup.dataset.split("train").targets).to(parts.network.device)
    gather = Gather(state, batches, section.accumulate) if section.accumulate > 1 else None
    mix, divided = _mix(parts, state), None
    if distributed.world() > 1:
        divided = Divided(torch.tensor(list(feed.split.targets)), state, parts.config.seed)
    return Training(
        task=parts.task,
        state=state,
        feed=feed,
        step=Step(
            feed.logits,
            criterion,
            state.optimizer,
            state.scaler,
            section.clip_norm,
            gather,
            state.average,
            mix,
            setup.teach,
            divided,
        ),
        validate=lambda after_batch: _validated(parts, feeds["val"], state, after_batch),
        pause=pause,
        device=parts.network.device,
        until=state.begun + state.schedule.epochs,
        epochs=section.epochs,
        stop=section.stop,
    )


def _mix(parts: Parts, state: State) -> Mix | None:
    """What mixes the images of a batch, where the configuration has them mixed."""
    section, classes = parts.config.train, len(parts.task.classes)
    kinds = ((v2.MixUp, section.mixup), (v2.CutMix, section.cutmix))
    ways = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha is not None]
    return Mix(ways, state, parts.config.seed) if ways else None


def _validated(parts: Parts, feed: Feed, state: State, after_batch: Callable[[], None]) -> Scores:
    """The scores of the weights, or those of their average where these are better."""
    scores, average = parts.scores(feed, "val", after_batch), state.average
    if average is None:
        return scores
    with in_place(average.changing, average.tensors):  # without `after_batch`, which may save the weights
        others = parts.scores(feed, "val of the average")
    figures, task = parts.task.figures(others), parts.task
    average.better = task.better(figures, task.figures(scores))
    said = "better, so taken for this epoch" if average.better else "not better"
    log.info("average of the weights: val %.4f  %s, %s", figures["loss"], task.in_words(figures), said)
    return others if average.better else scores


def _announce(setup: Setup, run_dir: Path) -> None:
    """Say what is about to be trained, and which classes val and test have no image of."""
    dataset, task = setup.dataset, setup.parts.task
    log.debug("%s", _decisions(setup))
    log.info("%s\nrun directory: %s", summary(setup), run_dir)
    for name in ("val", "test"):
        if name in dataset.splits:
            name_absent(dataset.classes, dataset.split(name), name, task.of_absent)


def summary(setup: Setup) -> str:
    """What is about to be trained, on what."""
    parts, splits = setup.parts, setup.dataset.splits
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    overview = "\n".join(Overview.of(setup.dataset).lines())
    drawn = ", val drawn from the images" if setup.drawn else ""
    return (
        f"{counts} images in {len(setup.dataset.classes)} classes{drawn}\n{overview}\n"
        f"{parts.backbone['name']} ({parts.backbone['weights']}), {_trained(parts):,} parameters train\n"
        f"{parts.network.describe()}"
    )


def _run_name(loaded: Loaded) -> str:
    """After the data or the configuration, and after a backbone that was chosen on top of these."""
    chosen = loaded.origins.get(("model", "backbone")) == COMMAND_LINE and loaded.name != UNNAMED
    return f"{loaded.name}-{loaded.config.model.backbone.removeprefix('timm/')}" if chosen else loaded.name


def _decisions(setup: Setup) -> str:
    """What was decided where the configuration leaves it open, and why, a line each."""
    config, network, val = setup.parts.config, setup.parts.network, setup.dataset.split("val")
    cached = "kept, so each is computed once" if setup.parts.feeds.extractor else "not kept"
    lines = [
        f"device: {network.device.type} ({'the first of cuda, mps, cpu' if config.device == 'auto' else 'as set'})",
        f"val: {len(val)} images, " + (f"drawn with seed {config.seed}" if setup.drawn else "the dataset's own split"),
        f"processes that load images: {worker_count(config.data.workers)} of {cores()} cores (data.workers)",
        f"features: {cached}; {setup.computed:,} images to compute with an empty cache, each random view counted",
        f"frozen stages: {network.precision}, {'compiled' if network.compiled else 'not compiled'}",
        f"transforms of val: {', '.join(str(next(iter(step))) for step in setup.parts.pipeline.steps)}",
    ]
    return "\n".join(lines)


def _pause(stop: StopRequest, saver: Saver) -> None:
    """Save where it is time; after a request to stop save, finish and raise Interrupted."""
    number = distributed.largest(stop.signal or 0)  # all ranks end after the same batch
    if number:
        saver.finish()
        raise Interrupted(number, f"stopped; continue with --resume {saver.run_dir}")
    saver.save_if_due()


@contextlib.contextmanager
def _saying_what_is_saved(run_dir: Path) -> Iterator[None]:
    """A signal after the last epoch takes no epoch with it."""
    try:
        yield
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        best, remedy = run_dir / "best.pth", REMEDY.format(run_dir)
        raise Interrupted(number, f"stopped; every epoch is done, the best one in {best}; {remedy}") from error


def _step_size(parts: Parts, feed: Feed) -> int:
    """The multiply-adds of a training step, about; of one with images more than any threshold."""
    return _trained(parts) * parts.config.train.batch_size if isinstance(feed.batches, FeatureBatches) else sys.maxsize


def _take(found: Found | FoundHeads, setup: Setup, feeds: dict[str, Feed], tracker: Tracker, saver: Saver) -> None:
    """Make the head that was found the result of the run, as the best epoch of a training would be."""
    parts, started, progress = setup.parts, time.perf_counter(), saver.state.progress
    asked = progress.found or parts.config.model.head.normalise
    epochs = saver.state.begun + saver.state.schedule.epochs
    parts.take_head(found.layers, unit=found.unit)
    saver.template = replace(saver.template, config=parts.config.model_dump())
    train, val = (parts.scores(feeds[name], name) for name in ("train", "val"))
    if found.held_out is not None:
        held_out = found.held_out.cpu()  # without a label of an image a head has not seen it
        val = Scores(torch.where(held_out.isnan(), val.logits, held_out), val.targets)
    figures = parts.task.figures(val)
    progress.head_found(asked, epochs, figures)
    loss, seconds = parts.task.figures(train)["loss"], time.perf_counter() - started
    tracker.epoch(EpochDone(epochs, loss, seconds, len(train.targets), improved=True), figures, None)
    if distributed.is_first():
        write_text(saver.run_dir / "search.csv", found.table())
    saver.improved(val)
    tracker.improved(epochs, val)
    saver.finish()


def _template(setup: Setup) -> Checkpoint:
    """The part of the run's checkpoints that is known before training."""
    parts, val = setup.parts, setup.dataset.split("val")
    return Checkpoint(
        config=parts.config.model_dump(),
        classes=parts.task.classes,
        preprocessing=parts.pipeline.steps,
        backbone=parts.backbone,
        features=parts.features,
        trained={},
        frozen=None,
        epoch=0,
        metrics=None,
        val_split=torch.tensor(name_hashes(val.each_name()), dtype=torch.int64) if setup.drawn else None,
        val_images=val.contents,
    )


def _learned(setup: Setup) -> dict[str, str]:
    """What tells from others what the run learns from: its training images and its teacher."""
    teacher = setup.parts.config.train.teacher.checkpoint
    sealed = {} if teacher is None else {"teacher": seal_of(best_of(expand(teacher)))}
    return {"images": fingerprint(setup.dataset.split("train")), **sealed}


def _describe(setup: Setup, config: str, run_dir: Path) -> None:
    """Write what is known before training, and take away the result of a run that goes on."""
    if not distributed.is_first():
        return
    (run_dir / RESULT).unlink(missing_ok=True)
    if probed := setup.parts.loaded.probed:
        write_text(run_dir / PROBED, json.dumps(probed, indent=2) + "\n")
    write_text(run_dir / "config.yaml", config)
    write_text(run_dir / "classes.txt", "".join(f"{name}\n" for name in setup.dataset.classes))
    if (skip := setup.parts.config.data.skip) is not None:
        write_bytes(run_dir / SKIP_FILE, expand(skip).read_bytes())
    if setup.drawn:
        rows = ((name, split) for split, images in setup.dataset.splits.items() for name in images.each_name())
        write_text(run_dir / "split.csv", csv_text(("path", "split"), rows))


def _tracker(setup: Setup, run_dir: Path, last: Checkpoint | None, make_tracker: MakeTracker) -> Tracker:
    parts, config = setup.parts, setup.parts.config
    tensorboard, done = config.output.tensorboard, last.epoch if last else 0
    tracker = make_tracker(run_dir, parts.task, config.train.epochs, tensorboard=tensorboard, done=done)
    if tensorboard and last is None and distributed.is_first():
        classifier = parts.network.classifier
        stages, changing = classifier.backbone.stages, classifier.changing
        frozen = stages[: len(stages) - len(changing)]
        graph = graph_of(((stage.name, stage.module) for stage in frozen), trained=False)
        graph += graph_of(((stage.name, stage.module) for stage in changing), trained=True)
        graph += graph_of([("head", classifier.head)], trained=True)
        tracker.start(to_yaml(config), graph)
        sample = setup.dataset.split("train").sample(IMAGES_SHOWN)
        shown = ImageBatches(sample, setup.train_pipeline, batch_size=len(sample), workers=0, seed=config.seed)
        batch = next(shown.epoch(0, torch.device("cpu")))
        captions = [parts.task.caption(label) for label in batch.targets.tolist()]
        tracker.images("train/images", setup.train_pipeline.denormalise(batch.inputs), captions)
    return tracker
