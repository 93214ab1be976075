"""One more class for a trained classifier: a linear head is solved again on the features of all images, old and new.

What is frozen is not computed again, and the backbone does not change, so this takes seconds and gives what training
with the class would.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tl_trainer.assembly import SKIP_FILE, Parts, memory_of, reopened
from tl_trainer.candidates import Layers
from tl_trainer.checkpoint import Checkpoint, save
from tl_trainer.conformal import label_scores
from tl_trainer.data.dataset import Files, Split
from tl_trainer.data.duplicates import across, unrepeated
from tl_trainer.data.folders import walk
from tl_trainer.data.images import ENDINGS
from tl_trainer.data.verify import verified
from tl_trainer.errors import InputError, RunError
from tl_trainer.ground.files import make_folder, numbered_folder, write_bytes, write_text
from tl_trainer.ground.machine import threads_for
from tl_trainer.ground.wording import listed, printable
from tl_trainer.known import Known, keep, known_of, most_kept
from tl_trainer.logistic import STRENGTHS, Axes, path, promising
from tl_trainer.metrics import Scores
from tl_trainer.runs import BEST, RESULT
from tl_trainer.single_label import SingleLabel
from tl_trainer.tables import FOLDS, SCALINGS, Table, folds_of, scalings_for, shares_of

log = logging.getLogger(__name__)


class Head(NamedTuple):
    """A head for one more class, and the log loss by which it was chosen.

    settings: in words. val: the logits of the val images. new: those of the new images, each by a head that did not
    see it.
    """

    loss: Tensor
    settings: str
    layers: Layers
    val: Tensor
    new: Tensor
    converged: bool


def add_class(parts: Parts, checkpoint: Path, name: str, folder: Path, output: Path) -> dict[str, Any]:
    """Write a run into `output` whose best.pth also knows the class `name`; what its result.json holds.

    folder: images of the class. parts: restored from the checkpoint, and changed here. Raises InputError for a head or
    a class that cannot be added to, and where the images of an old class are gone.
    """
    started, saved, config = time.perf_counter(), parts.saved, parts.config
    assert saved is not None
    _require_extensible(parts, name)
    make_folder(output, "--output")
    new, (train, val) = _new_images(parts, name, folder), _old_images(parts, checkpoint)
    for what, split in (("train", train), ("val", val)):
        for sentence, _, _ in across({what: split, name: new}):
            log.warning("%s", sentence)
    embedded = [
        parts.feeds.embed(split, parts.pipeline, what) for split, what in ((train, "train"), (val, "val"), (new, name))
    ]
    before = parts.network.classifier.head(embedded[1].to(parts.network.device)).cpu()
    unit = config.model.head.normalise == "l2"  # auto is what the search has found, else none
    parts.task = SingleLabel([*saved.classes, name])
    table = _table(parts, torch.cat([embedded[0], embedded[2]]), [*train.targets, *new.targets])
    fold = torch.cat([torch.full((len(train),), FOLDS), _folds(new)])
    with threads_for(table.features.numel() * len(parts.task.classes)):
        of_val = _table(parts, embedded[1], val.targets)
        head = solved(table, of_val, fold, scalings_for("l2" if unit else "none"))
    parts.take_head(head.layers, unit=unit)
    targets = torch.tensor(new.targets)
    scores = Scores(torch.cat([head.val, head.new]), torch.cat([of_val.targets, targets]))
    temperature = parts.task.calibration(scores)
    best = replace(
        saved,
        classes=parts.task.classes,
        trained={key: value.cpu() for key, value in parts.network.classifier.trained_state().items()},
        metrics=parts.task.figures(scores),
        val_images=[*saved.val_images, *new.contents],
        temperature=temperature,
        conformal=label_scores(scores, temperature),
    )
    result = {
        "class": name,
        "from": str(folder),
        "head": f"logistic regression, {head.settings}",
        "solved_on": {"old": len(train), "new": len(new)},
        "old_classes": {
            "n": len(val),
            "top1_before": _top1(before, of_val.targets),
            "top1_after": _top1(head.val, of_val.targets),
        },
        "new_class": {"n": len(new), "recall": _top1(head.new, targets)},
        "val": best.metrics,
        "seconds": round(time.perf_counter() - started, 3),
    }
    near = _known(parts, table, [*train.names, *new.names], of_val.features)
    in_a_folder = re.sub(r"[^\w.-]+", "_", name)
    run_dir = numbered_folder(output, f"{checkpoint.resolve().parent.name}-{in_a_folder}")
    if (skipped := checkpoint.with_name(SKIP_FILE)).exists():
        write_bytes(run_dir / SKIP_FILE, skipped.read_bytes())
    return _written(run_dir, best, near, result)


def _written(run_dir: Path, best: Checkpoint, near: Known, result: dict[str, Any]) -> dict[str, Any]:
    save(best, run_dir / BEST)
    keep(near, run_dir / BEST)
    write_text(run_dir / "classes.txt", "".join(f"{name}\n" for name in best.classes))
    result = {"run_dir": str(run_dir), "checkpoint": str(run_dir / BEST), **result}
    write_text(run_dir / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def solved(train: Table, val: Table, fold: Tensor, scalings: Sequence[str]) -> Head:
    """The linear head with the lowest log loss on val and on the new images, each judged by a head without its fold.

    train: the old images, then the new ones. fold: (N,) of each row, FOLDS for the old ones. Raises RunError where none
    converges.
    """
    new = (fold < FOLDS).nonzero()[:, 0]
    targets = torch.cat([val.targets, train.targets[new]])

    def candidates(name: str) -> Iterator[Head]:
        scaling = SCALINGS[name](train.features)
        of_val = scaling(val.features)
        for solution in path(Axes.of(scaling(train.features)), train.soft, shares_of(fold, train.soft), STRENGTHS):
            weight, bias = solution.head()
            logits = of_val @ weight.T + bias, solution.logits[fold[new], new]
            loss = cross_entropy(torch.cat(logits).double(), targets)
            settings = f"{name}, L2 {solution.strength:.2g}"
            yield Head(loss, settings, scaling.folded([(weight, bias)]), *logits, bool(solution.converged.all()))

    found = [head for name in scalings for head in promising(candidates(name), lambda head: head.loss)]
    if not (sound := [head for head in found if head.converged]):
        raise RunError("the head for the added class did not converge; train with the class instead")
    return min(sound, key=lambda head: head.loss.item())


def _require_extensible(parts: Parts, name: str) -> None:
    saved = parts.saved
    assert saved is not None
    if parts.task.kind != "single":
        raise InputError("--add-class adds a class to those of which an image has one, and here it may have several")
    if name in saved.classes:
        raise InputError(f"--add-class {name}: the checkpoint has this class already; it has {listed(saved.classes)}")
    if parts.config.model.head.hidden:
        raise InputError(
            "--add-class needs a linear head, and this one has hidden layers; train with the class, or without "
            "model.head.hidden"
        )
    if saved.frozen is None or saved.resume is not None:
        raise InputError("--add-class needs the best.pth of a run that has ended; go on with it with --resume")


def _new_images(parts: Parts, name: str, folder: Path) -> Split:
    if not folder.is_dir():
        raise InputError(f"--from {folder}: no such folder; give the one with the images of {name}")
    paths = [file for file in walk(folder) if file.suffix.lower() in ENDINGS]
    if not paths:
        raise InputError(f"--from {folder}: no images in this folder (endings: {' '.join(ENDINGS)})")
    images = Files(paths, [str(file) for file in paths], parts.decoding)
    label, data = len(parts.task.classes), parts.config.data
    new = verified(Split(images, [label] * len(paths), range(len(paths))), name, data, memory_of(parts.config))
    if len({*new.hashes}) < 2:
        raise InputError(f"--from {folder}: one image of {printable(name)} is not enough; give two or more, better 20")
    return new


def _old_images(parts: Parts, checkpoint: Path) -> tuple[Split, Split]:
    """The train and the val split of the checkpoint's run."""
    data = parts.config.data
    try:
        dataset = reopened(parts, checkpoint)
        splits = {what: dataset.split(what) for what in ("train", "val")}
    except InputError as error:
        raise InputError(
            f"{error}\n--add-class solves the head on the images of the old classes too; say where they are with "
            "data.root=DIR"
        ) from error
    present = {*splits["train"].targets}
    if absent := [repr(name) for label, name in enumerate(parts.task.classes) if label not in present]:
        raise InputError(
            f"{dataset.where}: no training image of {listed(absent)}, and the new head would forget what has none; add "
            "them there, such as a folder of that name, also those of a class that was added before"
        )
    splits = {what: verified(split, what, data, memory_of(parts.config)) for what, split in splits.items()}
    splits, _ = unrepeated(splits, data)
    return splits["train"], splits["val"]


def _folds(split: Split) -> Tensor:
    """(N,): the fold of each image; copies share one."""
    numbers = {digest: number for number, digest in enumerate(dict.fromkeys(split.hashes))}
    same = torch.tensor([numbers[digest] for digest in split.hashes])
    return folds_of(torch.zeros_like(same), same)


def _table(parts: Parts, rows: Tensor, targets: Sequence[int]) -> Table:
    soft = parts.task.soft_targets(parts.config.train.loss, targets)
    return Table(rows, torch.tensor(targets), soft, torch.arange(len(rows)))


def _known(parts: Parts, table: Table, names: Sequence[str], val: Tensor) -> Known:
    """The training images for --neighbours and --reject: those of the new class are not where the others are."""
    images = len(table.features)
    number = min(images, most_kept(parts))
    kept = [index * images // number for index in range(number)]
    return known_of(table.features[kept], [names[row] for row in kept], table.targets[kept].tolist(), val)


def _top1(logits: Tensor, targets: Tensor) -> float:
    return round((logits.argmax(dim=1) == targets).double().mean().item(), 6)
