"""Rows about the machine: how it writes, little shared memory, no memory, images that ask for much of it, its users."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from stress.tools import RECIPES, Child, NotRun, Outcome, broken, command, draw, trained, without_privileges
from tl_trainer.models.prefix import FrozenPrefix
from tl_trainer.network import Network

LINES = 3
ENDING_SECONDS = 60.0

TRACED = "write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2"
PROGRAM = """
import sys
from stress import tools
tools.save_always()
tools.without_pictures()
sys.exit(tools.MAINS["train"](sys.argv[1:]))
"""


def fsync_order(count: int, folder: Path, rng: random.Random) -> Outcome:
    """A run as strace sees it: each checkpoint is synced before it gets its name, and the folder after it."""
    if shutil.which("strace") is None:
        raise NotRun("strace is not installed")
    outcome, saves_of_an_epoch = Outcome(), 6
    data, epochs = draw(folder / "data"), max(2, -(-count // saves_of_an_epoch))
    words = [sys.executable, "-c", PROGRAM, "--data-dir", str(data), "--output", str(folder / "runs"),
             *RECIPES["cached"], f"train.epochs={epochs}"]  # fmt: skip
    traced = ["strace", "-ff", "--seccomp-bpf", "-y", "-s", "0", "-e", f"trace={TRACED}", "-o", str(folder / "trace"),
              *words]  # fmt: skip
    environment = {**os.environ, "TL_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(traced, capture_output=True, text=True, env=environment, timeout=1800)
    if "ptrace" in done.stderr:
        raise NotRun(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    if done.returncode != 0:
        outcome.count(f"exit {done.returncode}: {done.stderr[-300:]}")
    for path in sorted(folder.glob("trace.*")):
        for problem in out_of_order(path.read_text(errors="replace").splitlines()):
            outcome.count(problem)
    if outcome.tried < epochs:
        outcome.count(f"only {outcome.tried} saves in {epochs} epochs")
    return outcome


def out_of_order(calls: Iterable[str]) -> Iterator[str | None]:
    """For each checkpoint that a process put in its place, by strace's lines: None, or what was not in order."""
    last: dict[str, str] = {}  # the last call on each open file
    unsynced: str | None = None  # what was renamed into a folder that was not synced since
    for call in calls:
        if found := re.match(r'rename\w*\(.*?"(.*?)", .*?"(.*?)".*\)\s+= 0', call):
            source, target = (Path(name) for name in found.groups())
            if target.name not in ("last.pth", "best.pth"):
                continue
            if unsynced:
                yield f"the folder was not synced after {unsynced}"
            before = last.pop(str(source), "nothing")
            if before != "fsync":
                yield f"the last call before the rename to {target.name} was {before}, not fsync"
            unsynced = str(target) if before == "fsync" else None
        elif found := re.match(r"(\w+)\(\d+<(.*?)>.*\)\s+= \d+", call):
            name, path = found.groups()
            last[path] = name
            if unsynced and name == "fsync" and path == str(Path(unsynced).parent):
                unsynced = None
                yield None
    if unsynced:
        yield f"the folder was not synced after {unsynced}"


def small_shm(count: int, folder: Path, rng: random.Random) -> Outcome:
    """/dev/shm of 1 MB with workers, in training and in evaluation: it is enough, or that is the reason given."""
    outcome, enough = Outcome(), 0
    if Child(lambda: _with_small_shm(1024) or 0, folder / "probe").wait() != 0:
        raise NotRun("a mount namespace of one's own needs root")
    data = draw(folder / "data", size=64)
    for number in range(count):
        place, size = folder / str(number), rng.choice((32, 128, 256, 512))
        settings = [f"data.workers={rng.choice((1, 2, 4))}", f"train.batch_size={rng.choice((2, 4, 8))}",
                    f"transforms.eval=[{{Resize: [{size}, {size}]}}]", "train.epochs=2", "train.optimizer.lr=1e-5",
                    f"transforms.train=[{{RandomResizedCrop: {size}}}]"]  # fmt: skip
        words = ("--data-dir", data, "--output", place / "runs", *RECIPES["workers 2"], *settings)
        child = command("train", *words, logs=place, prepare=lambda: _with_small_shm(1024))
        problem = ended_with_reason(child, "the shared memory (/dev/shm) is too small", "--workers 0")
        outcome.count(f"{settings}: {problem}" if problem else None)
        enough += child.code == 0
    outcome.notes.append(f"it was enough for {enough}")
    return outcome


def _with_small_shm(kilobytes: int) -> None:
    """Give this process a /dev/shm of its own, which nobody else sees."""
    libc, new_namespace, recursive, private = ctypes.CDLL(None, use_errno=True), 0x20000, 0x4000, 0x40000
    options = f"size={kilobytes}k".encode()
    done = [
        libc.unshare(new_namespace),
        libc.mount(b"none", b"/", None, recursive | private, None),
        libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, options),
    ]
    if any(done):
        raise OSError(ctypes.get_errno(), "no file system of one's own")


def ended_with_reason(child: Child, reason: str, *remedies: str) -> str | None:
    """What is wrong with how a command ended that may have failed, but for this reason only and saying so."""
    code, said = child.wait(ENDING_SECONDS), child.said()
    alive = child.group_alive()
    child.end_group()
    if code is None:
        return f"a hang: {said[-300:]}"
    if code not in (0, 1) or alive:
        return f"exit {code}{', and a process is left' if alive else ''}: {said[-300:]}"
    if "Traceback" in said or "unexpected" in said or len(child.complaint()) > LINES:
        return f"no sentence: {said[-500:]}"
    if code == 1 and (reason not in said or not any(remedy in said for remedy in remedies)):
        return f"another reason: {said[-300:]}"
    return None


# Large enough for a batch of them not to fit.
LARGE = ("transforms.eval=[{Resize: [384, 384]}]", "train.batch_size=18", "train.epochs=2")
GPU = ("extraction", "training", "validation")


def out_of_memory(count: int, folder: Path, rng: random.Random) -> Outcome:
    """A limit on the memory of each command that is too low for it, and a GPU that is full: cause and remedy.

    No image counts as damaged for it, also not where damaged ones are skipped, and what was saved before can be read.
    """
    outcome, enough = Outcome(), 0
    data = draw(folder / "data")
    for split, suffix in itertools.product(("train", "val"), (".jpg", ".webp")):  # whose decoders need much memory
        picture = Image.effect_noise((1500, 1500), 64).convert("RGB")
        picture.save(data / split / "red" / f"large{suffix}", progressive=True, method=0)  # the fastest of WebP's
    words = ("--data-dir", data, "--output", folder / "runs", *RECIPES["cached"], *LARGE)
    assert command("train", *words, logs=folder).wait() == 0
    best = folder / "runs" / "run-1" / "best.pth"
    for number in range(count):
        place, megabytes = folder / str(number), rng.uniform(20, 600)
        training = ("--data-dir", data, "--output", place / "runs", "data.on_bad_image=skip")
        large = (*LARGE, "transforms.train=[{RandomResizedCrop: 384}]")
        commands: list[tuple[Any, ...]] = [
            ("train", *training, *RECIPES["cached"], *LARGE),
            ("train", *training, *RECIPES["workers 0"], *large),
            ("train", *training, *RECIPES["workers 2"], *large),
            ("eval", "--checkpoint", best, "--on-bad-image", "skip", "--report", place / "report"),
            ("predict", data, "--checkpoint", best, "--batch-size", 18),
        ]
        name, *arguments = commands[number % len(commands)]
        child = command(name, *arguments, logs=place, prepare=_limited(megabytes))
        problem = ended_with_reason(child, "out of memory", "--batch-size", "close other programs") or broken(place)
        if "skipped" in child.said() or (name == "predict" and "damaged" in child.out.read_text()):
            problem = problem or f"an image was blamed: {child.said()[-300:]}"
        outcome.count(f"{name} {number % len(commands)}, {megabytes:.0f} MB more: {problem}" if problem else None)
        enough += child.code == 0
    for phase in GPU[:count]:
        cache = folder / phase if phase == "extraction" else folder / "cache"  # where the features are
        words_of_phase = (*words, "--output", folder / phase)
        child = command("train", *words_of_phase, logs=folder / phase, prepare=_full_gpu(phase), cache=cache)
        problem = ended_with_reason(child, "the GPU is out of memory", "--batch-size") or broken(folder)
        expected = 0 if phase == "extraction" else 1  # which goes on with fewer images at once
        outcome.count(f"GPU, {phase}: {problem or child.code}" if problem or child.code != expected else None)
    outcome.notes.append(f"the limit was high enough for {enough}")
    return outcome


SHAPES = ((6000, 1), (1, 6000), (100_000, 1), (1, 100_000), (200_000, 2), (2, 30_000))


def extreme_shapes(count: int, folder: Path, rng: random.Random) -> Outcome:
    """A PNG of some hundred bytes that a resize of its short side would make gigabytes of: named, in 800 MB."""
    outcome, data = Outcome(), draw(folder / "data")
    words = ("--data-dir", data, "--output", folder / "runs", *RECIPES["cached"], "train.epochs=1",
             "transforms.eval=[{Resize: 256}, {CenterCrop: 32}]")  # fmt: skip
    assert command("train", *words, logs=folder / "trained").wait() == 0
    best = folder / "runs" / "run-1" / "best.pth"
    for number, (width, height) in enumerate(SHAPES[:count]):
        place, strip = folder / str(number), data / "val" / "red" / "strip.png"
        Image.new("RGB", (width, height)).save(strip)
        commands: dict[tuple[Any, ...], int] = {
            ("train", *words): 2,
            ("train", *words, "data.on_bad_image=skip"): 0,
            ("eval", "--checkpoint", best): 2,
            ("predict", data, "--checkpoint", best): 1,
        }
        for index, ((name, *arguments), expected) in enumerate(commands.items()):
            child = command(name, *arguments, logs=place / str(index), prepare=_limited(800))
            code = child.wait()
            named = f"{width:,} x {height:,} pixels would be resized" in child.said() + child.out.read_text()
            right = code == expected and named
            outcome.count(None if right else f"{name}, {width} x {height}: exit {code}: {child.said()[-300:]!r}")
    return outcome


def _limited(megabytes: float) -> Callable[[], None]:
    """Let a process have so much more memory than it has."""

    def prepare() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + int(megabytes * 1e6)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return prepare


def _full_gpu(phase: str) -> Callable[[], None]:
    """Raise what torch raises where a GPU is full, in a phase of the run; in extraction for more than two images."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1.00 GiB free.")

    def prepare() -> None:
        if phase == "extraction":
            compute = FrozenPrefix.__call__
            FrozenPrefix.__call__ = (  # type: ignore[method-assign]
                lambda self, images: compute(self, images) if len(images) <= 2 else fail()
            )
            return
        original = Network.logits

        def forward(self: Network, features: torch.Tensor) -> torch.Tensor:
            if self.classifier.training == (phase == "training"):
                fail()
            return original(self, features)

        Network.logits = forward  # type: ignore[method-assign]

    return prepare


class Shared(NamedTuple):
    """What a second user may do with the features of a first one: the modes of folders and files, where not READ_ONLY.

    cached: how many of 27 features the second user finds, and in another run. said: what is told in each of these.
    """

    modes: dict[str, int]
    cached: tuple[int, int]
    said: tuple[str, ...] = ()
    damaged: str = ""  # the kind of file that is damaged before


READ_ONLY, WRITABLE, FIRST_USER = 0o555, 0o777, 65534
OPEN = {"folder": WRITABLE, "store": WRITABLE}
IN_MEMORY, NOT_REMEMBERED = "new features are kept in memory", "files.sqlite cannot be written"
SHARED: dict[str, Shared] = {
    "read only": Shared({}, (21, 21), (IN_MEMORY, NOT_REMEMBERED)),
    "rows closed": Shared({**OPEN, ".rows": 0}, (0, 27), (".keys cannot be read", NOT_REMEMBERED)),
    "database closed": Shared({**OPEN, ".sqlite": 0}, (21, 27), ("files.sqlite cannot be used (unable to open",)),
    "all open": Shared({**OPEN, ".sqlite": WRITABLE}, (21, 27)),
    "folders open": Shared(OPEN, (21, 27), (NOT_REMEMBERED,)),
    "store read only": Shared({"folder": WRITABLE}, (21, 21), (IN_MEMORY, NOT_REMEMBERED)),
    "records closed": Shared({**OPEN, ".keys": 0}, (0, 27), (".keys cannot be read", NOT_REMEMBERED)),
    "description closed": Shared({**OPEN, ".json": 0}, (0, 0), ("cannot be read", IN_MEMORY, NOT_REMEMBERED)),
    "store closed": Shared({"folder": WRITABLE, "store": 0}, (0, 0), ("cannot be read", IN_MEMORY, NOT_REMEMBERED)),
    "all closed": Shared({"folder": 0}, (0, 0), ("cannot be read", IN_MEMORY, NOT_REMEMBERED)),
    "rows damaged": Shared({}, (19, 19), ("1 cached features", IN_MEMORY, NOT_REMEMBERED), ".rows"),
    "database damaged": Shared({}, (21, 21), ("files.sqlite is damaged", IN_MEMORY), ".sqlite"),
}


def second_user(count: int, folder: Path, rng: random.Random) -> Outcome:
    """A features.dir of another user: what may be read is used and left as it is, the rest computed, and that is said.

    Twice by the second user, then by the first, who may read everything: the same weights each time.
    """
    outcome, features, data = Outcome(), folder / "features", draw(folder / "data")
    for path in data.rglob("*.png"):
        os.utime(path, (1e9, 1e9))  # a file that may still be written is not remembered
    words = ("--data-dir", data, *RECIPES["cached"], "output.tensorboard=false", "train.epochs=1")

    def run(place: Path, *more: object, prepare: Callable[[], None] = lambda: None) -> Child:
        child = command("train", *words, "--output", place, *more, logs=place, prepare=prepare)
        child.wait()
        return child

    new = [path.rename(folder / f"{path.parent.name} {path.name}") for path in data.glob("train/*/0[45].png")]
    assert run(folder / "first", f"features.dir={features}").code == 0
    for path in new:
        path.rename(data / "train" / path.name.replace(" ", "/"))
    assert run(folder / "whole").code == 0
    expected = trained(folder / "whole" / "run-1")
    for number in range(count):
        name, shared = list(SHARED.items())[number % len(SHARED)]
        problems, own = [], shutil.copytree(features, folder / f"features-{number}")
        before = _given_away(own, shared)
        for again, cached in enumerate((*shared.cached, None)):
            if cached is None:
                for path in sorted(before):
                    path.chmod(WRITABLE)
                changed = [path.name for path, data in before.items() if data and path.read_bytes() != data]
                problems += [f"changed: {changed}"] if changed else []
            place, second = folder / f"{number}-{again}", cached is not None
            child = run(place, f"features.dir={own}", prepare=without_privileges if second else lambda: None)
            found = sum(map(int, re.findall(r"computed, (\d+) cached", said := child.said())))
            if child.code != 0 or trained(place / "run-1") != expected:
                problems.append(f"exit {child.code}, or other weights: {said[-300:]}")
            elif second and (found != cached or not all(word in said for word in shared.said)):
                problems.append(f"{found} cached: {said[:600]}")
            elif second and not shared.said and "warning" in said:
                problems.append(f"a warning: {said[:300]}")
        outcome.count(f"{name}: {problems[0]}" if problems else None)
    return outcome


def _given_away(features: Path, shared: Shared) -> dict[Path, bytes]:
    """Make features the first user's; all paths, with the content of each file that only he may write to."""
    found = {}
    for path in sorted([features, *features.rglob("*")], reverse=True):
        kind = ("folder" if path == features else "store") if path.is_dir() else path.suffix
        mode, data = shared.modes.get(kind, READ_ONLY), bytearray(b"" if path.is_dir() else path.read_bytes())
        if kind == shared.damaged:
            data[10] ^= 1
            path.write_bytes(data)
        found[path] = b"" if mode == WRITABLE else bytes(data)
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, FIRST_USER, FIRST_USER)
    return found
