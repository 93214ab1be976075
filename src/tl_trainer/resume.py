"""The one room that knows which run --resume goes on with, and whether it still is the same run."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tl_trainer import checkpoint
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.data import expand
from tl_trainer.config.load import Loaded, Overrides, from_checkpoint, load, to_yaml
from tl_trainer.config.schema import flat
from tl_trainer.errors import CheckpointError, DataError, InputError
from tl_trainer.ground.files import previous, remove_unfinished
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.machine import is_out_of_memory
from tl_trainer.runs import PROBED, RESULT
from tl_trainer.saver import Progress, State
from tl_trainer.tasks import Task, task_of

log = logging.getLogger(__name__)

# What may differ without making another run of it. The rest would mix two experiments in one set of curves.
CHANGEABLE = (
    "train.epochs",
    "device",
    "data.root",
    "data.download",
    "data.max_megapixels",
    "data.workers",
    "output.dir",
    "output.tensorboard",
    "output.report",
    "features.dir",
    "features.limit_gb",
    "performance.compile",
)


@dataclass
class Resumption:
    """A run to go on with: its folder, its last.pth, how far that is, and its best.pth (None where no epoch has ended).

    result: what its result.json holds, where it is complete and there is nothing to go on with.
    """

    run_dir: Path
    last: Checkpoint
    progress: Progress
    best: Checkpoint | None
    result: dict[str, Any] | None = None

    def require_same(self, template: Checkpoint, learned: Mapping[str, str], where: str) -> None:
        """Raise DataError where the run began with other weights, images or another teacher; learned: of the Saver."""
        name = template.backbone["name"]
        if {**template.backbone, **self.last.backbone} != template.backbone:  # version 2 did not have all of it
            raise DataError(f"the weights of {name} are not those this run began with; restore that file")
        assert self.last.resume is not None
        if self.last.resume.get("images") != learned["images"]:
            raise DataError(f"{where}: the training images are not those this run began with")
        if self.last.resume.get("teacher") != learned.get("teacher"):
            raise DataError("train.teacher.checkpoint is not the file that this run began with; put that back")
        if self.last.val_images != template.val_images:
            raise DataError(f"{where}: the validation images are not those this run began with")

    def go_on(self, state: State) -> None:
        """Put the run's state into `state`, bit for bit. From here to `fit` nothing may draw random numbers."""
        assert self.last.resume is not None
        try:
            state.restore(self.last.trained, self.last.resume)
        except Exception as error:  # its checksum is right and its content is not: torch raises anything
            if is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [""])[-1].strip()
            raise CheckpointError(
                f"{self.run_dir / 'last.pth'}: does not fit this run: {type(error).__name__}: {reason}"
            ) from error


@contextlib.contextmanager
def resume(
    target: str | None,
    config: str | Mapping[str, Any] | None,
    overrides: Overrides,
    *,
    hold: bool = True,
    again: bool = False,
) -> Iterator[tuple[Loaded, Resumption]]:
    """The run at `target` (a run directory or its last.pth), or the newest one of the configuration.

    hold: whether it will be written to. Then its folder is this process's within the block, and before last.pth is
    read, since another process would soon write a newer one; what a killed one has half written is removed.
    again: whether the result of a complete run that is named is given. Without a configuration the run's own is
    taken. Raises InputError where there is nothing to resume, which of a run that is named includes that it is
    complete, or where the configuration differs in more than CHANGEABLE.
    """
    overrides = list(overrides)
    if target is None:
        loaded = load(config, overrides)
        path = _newest(loaded)
    else:
        path = expand(target)
        path = path / "last.pth" if path.is_dir() else path
    if not path.is_file() and not previous(path).is_file():
        raise InputError(f"--resume {path}: no such file; give a run directory or its last.pth")
    with sole_use(path.parent) if hold else contextlib.nullcontext(False) as held:
        found = _read(path, config, overrides, named=target is not None and not again)
        if held:
            remove_unfinished(path.parent, path.parent / "report")
        yield found


def _read(
    path: Path, config: str | Mapping[str, Any] | None, overrides: Overrides, *, named: bool
) -> tuple[Loaded, Resumption]:
    last = _load_last(path)
    if last.resume is None:
        raise CheckpointError(f"{path}: not a last.pth (best.pth cannot be resumed); give {path.parent / 'last.pth'}")
    progress = _checked_progress(last, path)
    configured = last.config
    if progress.found is not None:  # its search has decided what was left to it
        model = last.config["model"]
        configured = {**last.config, "model": {**model, "head": {**model["head"], "normalise": progress.found}}}
    begun = from_checkpoint(configured, path)
    task, result = task_of(begun.config.data.task, begun.config.train, last.classes), None
    for figures in (progress.best, progress.of_best.best, progress.of_stop.best):
        _check_figures(figures, task, path, "resume.progress")
    for figures in _soup_figures(last.resume.get("soup", [])):
        _check_figures(figures, task, path, "resume.soup")
    loaded = from_checkpoint(configured, path, overrides) if config is None else load(config, overrides)
    chosen = begun.config.model
    for one in loaded.each:  # of a list the entry that the run began with
        if (one.model.backbone, one.model.weights) == (chosen.backbone, chosen.weights):
            loaded = loaded.taking(one)
    loaded = replace(loaded, lists={}, probed=_json(path.with_name(PROBED)) or [])
    _compare(loaded, begun, path)
    if progress.passed >= loaded.config.train.epochs:
        result = _json(path.with_name(RESULT))
        if result and named and loaded.config.train.phases:
            raise InputError(f"{path.parent}: all phases of the run are done; start a new run to train others")
        if result and named and progress.found is not None:
            raise InputError(
                f"{path.parent}: the run is complete, its head was found by the search; start a new run to train one"
            )
        if result and named and progress.skipped:
            raise InputError(
                f"{path.parent}: train.stop ended the run after {last.epoch} epochs; start a new run to train longer"
            )
        if result and named:
            raise InputError(f"{path.parent}: all {last.epoch} epochs are done; set train.epochs higher to go on")
        if not result:
            log.info("all %d epochs are done; nothing is trained again, only what the end of the run lacks", last.epoch)
    return loaded, Resumption(path.parent, last, progress, _load_best(path.with_name("best.pth"), last, task), result)


def _json(path: Path) -> Any:
    """What a file of the run holds, such as its result; None where it is missing."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not found or not isinstance(found, (dict, list)):
        raise InputError(f"{path}: damaged; remove it, and --resume writes it again")
    return found


def _checked_progress(last: Checkpoint, path: Path) -> Progress:
    try:
        progress = Progress.model_validate((last.resume or {}).get("progress"))
        if (progress.epoch, progress.best) != (last.epoch, last.metrics):
            raise ValueError("not that of its weights")
    except ValueError as error:  # pydantic's are
        raise CheckpointError(f"{path}: damaged checkpoint: resume.progress is missing or of the wrong kind") from error
    return progress


def _soup_figures(kept: Any) -> list[Any]:
    """The figures of each epoch whose weights are kept for a mean; {} for what is no such epoch."""
    entries = kept if isinstance(kept, list) else [kept]
    return [(entry[1] if isinstance(entry, list) and len(entry) == 3 else None) or {} for entry in entries]


def _check_figures(figures: Any, task: Task, path: Path, key: str) -> None:
    try:
        if figures is not None:
            task.check(figures)
    except ValueError as error:  # pydantic's
        raise CheckpointError(f"{path}: damaged checkpoint: {key} is missing or of the wrong kind") from error


def _newest(loaded: Loaded) -> Path:
    output, wanted = expand(loaded.config.output.dir), [to_yaml(config) for config in loaded.each]
    newest = sorted(output.glob("*/last.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        description = path.with_name("config.yaml")
        if description.is_file() and description.read_text("utf-8", "surrogateescape") in wanted:
            return path
    others = ", ".join(str(path.parent) for path in newest[:3])
    hint = f"\nThe newest runs there are {others}; to go on with one, give it: --resume RUN" if others else ""
    raise InputError(f"no run of this configuration under {output}; start one without --resume{hint}")


def _load_last(path: Path) -> Checkpoint:
    """last.pth, or with a warning the one that was saved before it where it is damaged or gone. The run replaces it."""
    try:
        return checkpoint.load(path, mapped=False)
    except CheckpointError as error:
        if not previous(path).is_file():
            raise
        log.warning("%s; going on from the one saved before it, %s", error, previous(path).name)
        return checkpoint.load(previous(path), mapped=False)


def _load_best(path: Path, last: Checkpoint, task: Task) -> Checkpoint | None:
    """best.pth; None where there is none and no epoch has ended."""
    if not path.exists():
        if last.metrics is not None:
            raise InputError(f"{path}: no such file, and last.pth needs it; put it back or start a new run")
        return None
    best = checkpoint.load(path, mapped=False)
    _check_figures(best.metrics or {}, task, path, "metrics")
    return best


def _compare(loaded: Loaded, begun: Loaded, path: Path) -> None:
    before, now = (dict(flat(of.config.model_dump())) for of in (begun, loaded))
    changes = [(key, before.get(key), value) for key, value in now.items() if before.get(key) != value]
    for key, old, new in changes:
        if key not in CHANGEABLE:
            raise InputError(f"{path}: this run has {key}: {old!r}, not {new!r}; start a new run without --resume")
        log.warning("resuming with %s: %r instead of %r", key, new, old)
