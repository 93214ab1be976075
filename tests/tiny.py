"""A classifier and data so small that a whole run takes milliseconds, for the tests of the loop and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.training import OptimizerSection, ScheduleSection
from tl_trainer.data.dataset import Files, Split
from tl_trainer.data.loaders import Batch, batch_order
from tl_trainer.metrics import Scores
from tl_trainer.models.chain import Backbone, Stage
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import build_head
from tl_trainer.optim import Schedule, build_optimizer
from tl_trainer.saver import Progress, State

CLASSES = 3
IMAGES = 23
BATCH_SIZE = 6
STEPS = 4  # batches per epoch, the last one of five images


def pictures(seed: int, count: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Noise (count, 3, 6, 6) whose brightness tells the class, and targets (count,)."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    return torch.randn(count, 3, 6, 6, generator=generator) + 2 * targets.view(-1, 1, 1, 1), targets


SCORES = Scores(torch.tensor([[2.0, 0.5, 0.0], [1.0, 3.0, 0.0], [2.0, 1.0, 0.5]]), torch.tensor([0, 1, 2]))


class Clock:
    """Put in place of saver.py's `time`: it moves when a test moves it, so never while a file is written."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class TinyBatches:
    """The pictures in the real loader's order."""

    def __init__(self, seed: int = 1, *, shuffle: bool = True) -> None:
        self.inputs, self.targets = pictures(seed)
        self.shuffle = shuffle

    def __len__(self) -> int:
        return STEPS

    def epoch(self, epoch: int, device: torch.device, start: int = 0) -> Iterator[Batch]:
        for indices in batch_order(np.arange(IMAGES), BATCH_SIZE, 0, epoch, self.shuffle)[start:]:
            yield Batch(self.inputs[indices], self.targets[indices], torch.tensor(indices))


def tiny_classifier(trainable: str = "all") -> Classifier:
    """Convolution, BatchNorm, ReLU, pooling, and a head with a hidden layer and dropout; weights from torch's RNG."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    backbone = Backbone(model, [Stage(name, module, (name,)) for name, module in model.named_children()])
    return Classifier(backbone, build_head(4, [8], CLASSES, 0.3), trainable)


def tiny_state(
    seed: int, epochs: int, optimizer: dict[str, Any], schedule: dict[str, Any], trainable: str = "all"
) -> State:
    """The classifier of that seed with its optimizer and schedule, at the beginning of a run."""
    torch.manual_seed(seed)
    classifier = tiny_classifier(trainable)
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    built = build_optimizer(parameters, OptimizerSection(**optimizer))
    planned = Schedule(built, ScheduleSection(**schedule), epochs, STEPS)
    return State(classifier, built, planned, torch.amp.GradScaler("cpu", enabled=False), Progress())


def files_of(paths: Sequence[Path], targets: Sequence[int] | None = None) -> Split:
    """A split of files, called by their last names."""
    files = Files(list(paths), [path.name for path in paths])
    return Split(files, [0] * len(paths) if targets is None else targets, range(len(paths)))


def paths_of(split: Split) -> list[Path]:
    """The files of a split, in its order."""
    assert isinstance(split.images, Files)
    return [Path(split.images.paths[row]) for row in split.rows]


def tiny_template() -> Checkpoint:
    """What is the same in every checkpoint of a run."""
    return Checkpoint(
        config={"seed": 0},
        classes=["a", "b", "c"],
        preprocessing=[{"ToImage": None}],
        backbone={"name": "tiny", "weights": "none", "tap": "pooled", "sha256": ""},
        features=4,
        trained={},
        frozen=None,
        epoch=0,
        metrics=None,
        val_split=torch.tensor([7]),
        val_images=["cd" * 8],
    )


class FakeDevice(TorchFunctionMode):
    """Stands for a GPU: within the block what is moved to a device stays where it is.

    copies: of each such move the kind of device, whether the copy may still be under way, and whether it is from pinned
    memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, bool, bool]] = []
        self._pinned: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if func is Tensor.pin_memory:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        devices = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device)]
        if func is not Tensor.to or not devices:
            return func(*args, **kwargs)
        pinned = any(tensor is args[0] for tensor in self._pinned)
        self.copies.append((devices[0].type, kwargs.get("non_blocking", False), pinned))
        return args[0]
