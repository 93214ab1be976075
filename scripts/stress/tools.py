"""What the rows share: commands as forked children and their hooks, drawn datasets, what makes two runs identical."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import hashlib
import importlib
import itertools
import logging
import multiprocessing.util
import os
import random
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tl_trainer import checkpoint, feature_store, run
from tl_trainer.cli import eval as tl_eval
from tl_trainer.cli import predict as tl_predict
from tl_trainer.cli import train as tl_train
from tl_trainer.errors import CheckpointError
from tl_trainer.ground.signals import StopRequest
from tl_trainer.saver import Saver
from tl_trainer.tracking import Tracker

# What the commands import when they need it: here, so that a child does not have to.
for _name in (
    "tl_trainer.api", "torch.utils.tensorboard",
    "tensorboard.backend.event_processing.event_accumulator", "matplotlib.backends.backend_agg", "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
):  # fmt: skip
    importlib.import_module(_name)
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it remarks on every run that was resumed

MAINS = {"train": tl_train.main, "eval": tl_eval.main, "predict": tl_predict.main}
PATIENCE = 120.0  # seconds after which a child counts as hanging
WHOLE_SECOND = 1.02

# Nothing is pretrained, so a few classes of noise in a first stage of a small network have to do.
TINY = (
    "model.backbone=shufflenet_v2_x0_5", "model.weights=none", "model.tap=maxpool", "device=cpu",
    "transforms.eval=[{Resize: [32, 32]}]", "train.batch_size=4", "train.epochs=3", "train.optimizer.lr=0.01",
    "model.head.dropout=0.3", "output.report=false",
)  # fmt: skip
RANDOM = (
    "transforms.train=[{RandomResizedCrop: 32}, RandomHorizontalFlip, {ColorJitter: 0.2}]", "model.trainable=all",
    "train.schedule={name: plateau, patience: 0}",
)  # fmt: skip
RECIPES: dict[str, tuple[str, ...]] = {
    "workers 0": (*TINY, *RANDOM, "data.workers=0"),
    "workers 2": (*TINY, *RANDOM, "data.workers=2"),
    "cached": (*TINY, "transforms.train=eval", "train.schedule={name: cosine, warmup_epochs: 1}", "data.workers=0"),
}
# Of training and of validation in an epoch on what `draw` draws; from cached features all is validated at once.
BATCHES = {"workers 0": (5, 3), "workers 2": (5, 3), "cached": (5, 1)}


class NotRun(Exception):
    """This machine lacks what a row needs; the text says what."""


@dataclass
class Outcome:
    """What a row found: how many cases it tried, how many of them were lost, and what is worth saying."""

    tried: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, problem: str | None) -> None:
        """One more case; `problem` says what was lost, if anything."""
        self.tried += 1
        if problem:
            self.lost += 1
            self.notes.append(f"lost: {problem}")


def draw(folder: Path, per_class: int = 6, splits: tuple[str, ...] = ("train", "val"), size: int = 32) -> Path:
    """An ImageFolder of three classes of coloured noise, the same for the same arguments."""
    generator = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for index in range(per_class if split == "train" else 3):
                pixels = generator.integers(0, 160, (size, size, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(folder / split / name / f"{index:02}.png")
    return folder


class Child:
    """A forked process in a group of its own that runs `body` and ends with its code; output goes to files."""

    def __init__(self, body: Callable[[], int], logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.out, self.err, self.over = logs / "out.txt", logs / "err.txt", logs / "over"
        for path in (self.out, self.err):
            path.write_bytes(b"")
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(body, self.out, self.err, self.over)

    def signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code; None, when it has been killed, where it does not end in time."""
        until = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > until:
                self.end_group()
                return None
            time.sleep(0.002)
        return self.code

    def group_alive(self) -> bool:
        """Whether any process of its group is still there."""
        self.poll()
        return any(_group(pid) == self.pid for pid in _processes())

    def end_group(self) -> None:
        """Kill whatever is left of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        """What it wrote on stderr."""
        return self.err.read_text(encoding="utf-8", errors="replace")

    def complaint(self) -> list[str]:
        """The lines with which a command says why it ended, if it does: from `tl-train: ` on."""
        _, name, rest = f"\n{self.said()}".partition("\ntl-")
        return (name + rest).strip().splitlines()


def _child(body: Callable[[], int], out: Path, err: Path, over: Path) -> None:
    code = 70
    try:
        os.setsid()
        gc.freeze()  # what it inherits is not its garbage, and to walk through all of it takes longer than a command
        for number, path in ((0, Path(os.devnull)), (1, out), (2, err)):
            handle = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        warnings.resetwarnings()  # pytest makes errors of them all
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # as an interpreter starts
        code = body()
        over.touch()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        torch.utils.data._utils._set_python_exit_flag()  # from here on the end of an interpreter, in its order
        multiprocessing.util._exit_function()
        gc.collect()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(
    name: str, *arguments: object, logs: Path, prepare: Callable[[], None] = lambda: None, cache: Path | None = None
) -> Child:
    """Start tl-NAME in a child; `prepare` runs in it first, and may hook into it, but change no result."""

    def body() -> int:
        os.environ["TL_CACHE"] = str(cache or logs / "cache")
        os.environ["TORCH_HOME"] = str(logs / "torch")
        without_pictures()
        prepare()
        return MAINS[name]([str(argument) for argument in arguments])

    return Child(body, logs)


class AfterBatch:
    """A command's request to stop, and a hook that is called with it whenever a run asks: after every batch."""

    def __init__(self, request: StopRequest, hook: Callable[[StopRequest], object]) -> None:
        self.request, self.hook = request, hook

    def __enter__(self) -> AfterBatch:
        self.request.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.request.__exit__(*error)

    @property
    def signal(self) -> int | None:
        """What the request says after the hook."""
        self.hook(self.request)
        return self.request.signal


class EagerSaver(Saver):
    """Saves after every batch."""

    def save_if_due(self) -> None:
        """It always is."""
        self.save()


class Undrawn(Tracker):
    """Draws nothing for TensorBoard: that takes longer than the rest of a run as small as these."""

    def _draw(self, *_: object) -> None:
        pass


def hooked(
    after_batch: Callable[[StopRequest], object] | None = None, **makers: Callable[..., Any]
) -> Callable[[], None]:
    """Have a run trained with hooks of `run.train`: one on its request to stop, `make_tracker`, `make_saver`."""

    def prepare() -> None:
        original: Any = run.train

        def train(loaded: object, resumption: object, stop: StopRequest, **others: Any) -> Any:
            asked = AfterBatch(stop, after_batch) if after_batch else stop
            return original(loaded, resumption, asked, **{**makers, **others})

        run.train = train  # as tl_trainer.api calls it

    return prepare


without_pictures = hooked(make_tracker=Undrawn)
with_pictures = hooked(make_tracker=Tracker)
save_always = hooked(make_saver=EagerSaver)


def stop_after(batches: int) -> Callable[[], None]:
    """Have a run stop, as after Ctrl-C, at the given batch, counting those of validation too."""
    left = itertools.count(batches - 1, -1)

    def count(request: StopRequest) -> None:
        if next(left) == 0:
            request.signal = signal.SIGINT

    return hooked(count)


def next_second() -> None:
    """Wait until TensorBoard's next event file sorts behind those that are there: their names count in seconds."""
    time.sleep(WHOLE_SECOND - time.time() % 1)


def trained(run_dir: Path, name: str = "last.pth") -> dict[str, str]:
    """The weights of a checkpoint, each as a digest."""
    return dict(_flat("trained", checkpoint.load(run_dir / name).trained))


def record(run_dir: Path, *, curves: bool = True) -> dict[str, str]:
    """All of a run that must not depend on how often it was interrupted, as text or digests."""
    last, best = checkpoint.load(run_dir / "last.pth"), checkpoint.load(run_dir / "best.pth")
    assert last.resume is not None
    last.resume["progress"].pop("seconds")
    found = dict(_flat("last", [last.trained, last.resume, last.epoch, last.metrics]))
    found |= _flat("best", [best.trained, best.frozen, best.epoch, best.metrics, best.temperature])
    with (run_dir / "metrics.csv").open(newline="") as file:
        found |= _flat("metrics.csv", [row[:-1] for row in csv.reader(file)])
    return found | dict(_flat("curve", scalars(run_dir))) if curves else found


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves as TensorBoard itself reads them, without those of time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in sorted(tags)}


def difference(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """The first thing that is not the same; None where all is."""
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            return f"{key} is {found.get(key)}, not {expected.get(key)}"
    return None


def run_dirs(output: Path) -> list[Path]:
    """The run directories under an output folder, in the order of their numbers."""
    found = output.glob("run-*") if output.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def rows_in(cache: Path) -> int:
    """The feature rows that were written below a folder, each once or more."""
    return sum(path.stat().st_size for path in cache.rglob("*.keys")) // feature_store.RECORD_BYTES


def random_moment(rng: random.Random, seconds: float) -> None:
    """Sleep for a random part of so many seconds."""
    time.sleep(rng.uniform(0, seconds))


def temporary_files(folder: Path) -> list[str]:
    """What an unfinished write has left below a folder."""
    return sorted(str(path) for path in folder.rglob("*") if path.name.endswith(".tmp"))


def broken(folder: Path) -> str | None:
    """What a failed write has broken below a folder: a checkpoint that does not load, a temporary file."""
    for path in folder.glob("runs/*/*.pth"):
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            return str(error)
    left = temporary_files(folder)
    return f"left {left}" if left else None


def without_privileges() -> None:
    """Have the permissions of files count for this process although it is root's: it gives up root's capabilities."""
    version_3, this_process = 0x20080522, 0
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(struct.pack("Ii", version_3, this_process), bytes(24)) != 0:
        raise OSError("the capabilities of root cannot be given up")


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(f"{name}[{index}]", item)
    elif isinstance(value, torch.Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield name, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    else:
        yield name, repr(value)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _group(pid: int) -> int | None:
    """The process group of a process that is there and no zombie."""
    with contextlib.suppress(OSError):
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
        return None if state == "Z" else int(group)
    return None
