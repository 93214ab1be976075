"""Rows about runs that are killed, stopped, starved or doubled."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stress.tools import (
    BATCHES,
    PATIENCE,
    RECIPES,
    TINY,
    Child,
    EagerSaver,
    NotRun,
    Outcome,
    broken,
    children,
    command,
    difference,
    draw,
    hooked,
    next_second,
    random_moment,
    record,
    run_dirs,
    save_always,
    stop_after,
    temporary_files,
    trained,
)
from tl_trainer import checkpoint, feature_store
from tl_trainer.data import loaders
from tl_trainer.errors import CheckpointError

ENDING_SECONDS = 10.0  # that a stopped run may take, and a worker without its main process
LINES = 3


class Reference:
    """One uninterrupted run of each recipe, to compare with, and how long it took."""

    def __init__(self, folder: Path, names: tuple[str, ...] = tuple(RECIPES), *more: str) -> None:
        self.folder, self.data, self.more = folder, draw(folder / "data"), more
        self.records: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        for name in names:
            started = time.perf_counter()
            child = self.start(name, folder / "whole" / name, save_always)
            assert child.wait() == 0, child.said()
            self.seconds[name] = time.perf_counter() - started
            self.records[name] = record(folder / "whole" / name / "run-1")

    def start(self, name: str, output: Path, prepare: Callable[[], None] = save_always, *more: object) -> Child:
        """A run of the recipe in a child, with a feature cache of its own."""
        words = ("--data-dir", self.data, "--output", output, *RECIPES[name], *self.more, *more)
        return command("train", *words, logs=output, prepare=prepare)

    def ended(self, name: str, output: Path, rng: random.Random, kills: int = 0) -> str | None:
        """Go on with a run that was cut off, killing it up to `kills` times more; what is not as it should be."""
        for attempt in range(kills + 2):
            next_second()
            runs = run_dirs(output)
            begun = bool(runs) and any((runs[-1] / file).exists() for file in ("last.pth", ".last.previous.pth"))
            child = self.start(name, output, save_always, *(("--resume", runs[-1]) if begun else ()))
            if attempt < kills:
                random_moment(rng, self.seconds[name])
                child.signal(signal.SIGKILL)
            code = child.wait()
            if code == -signal.SIGKILL:
                continue
            if code != 0 and "epochs are done" not in child.said():
                return f"{name}: --resume ended with {code}: {child.said()[-300:]}"
            return self.compared(name, run_dirs(output)[-1])
        raise AssertionError("the last attempt is not killed")

    def compared(self, name: str, run_dir: Path) -> str | None:
        """What differs from the uninterrupted run."""
        with contextlib.suppress(CheckpointError):
            problem = difference(record(run_dir), self.records[name])
            return f"{name}: {problem}" if problem else None
        return f"{name}: a checkpoint of {run_dir} does not load"


def kill_training(count: int, folder: Path, rng: random.Random) -> Outcome:
    """SIGKILL at a random moment, then --resume, which may be killed as well, until the run ends."""
    outcome, reference, names = Outcome(), Reference(folder), list(RECIPES)
    for number in range(count):
        name, output = names[number % len(names)], folder / f"cut-{number}"
        child = reference.start(name, output)
        random_moment(rng, 1.05 * reference.seconds[name])
        child.signal(signal.SIGKILL)
        child.wait()
        outcome.count(reference.ended(name, output, rng, kills=rng.choice([0, 0, 1, 2])))
        child.end_group()
        shutil.rmtree(output, ignore_errors=True)
    return outcome


def workers(count: int, folder: Path, rng: random.Random) -> Outcome:
    """One seed with 0, 1, 2 and 4 workers, and resumed from each batch of an epoch: the same weights."""
    outcome, name = Outcome(), "workers 0"
    reference = Reference(folder, (name,))
    expected = trained(folder / "whole" / name / "run-1")
    for number in (1, 2, 4):
        output = folder / f"with-{number}"
        code = reference.start(name, output, lambda: None, f"data.workers={number}").wait()
        same = code == 0 and trained(output / "run-1") == expected
        outcome.count(None if same else f"{number} workers: exit {code}, or other weights")
    batches = sum(BATCHES[name])  # of an epoch
    points = [(batch, processes) for batch in range(1, batches + 1) for processes in (0, 2)]
    for batch, processes in points if count >= len(points) else rng.sample(points, count):
        output, setting = folder / f"from-{batch}-{processes}", f"data.workers={processes}"
        stopped = reference.start(name, output, stop_after(batches + batch), setting).wait()
        next_second()
        resumed = reference.start(name, output, lambda: None, setting, "--resume", output / "run-1").wait()
        where = f"batch {batch}, {processes} workers"
        if (stopped, resumed) != (130, 0):
            outcome.count(f"{where}: exit {stopped}, then {resumed}")
        else:
            problem = reference.compared(name, output / "run-1")
            outcome.count(f"{where}: {problem}" if problem and "data.workers" not in problem else None)
    return outcome


def damaged_last(count: int, folder: Path, rng: random.Random) -> Outcome:
    """last.pth truncated or with a flipped bit: always found, and the run goes on from the one before."""
    outcome, name = Outcome(), "cached"
    reference, output = Reference(folder, (name,)), folder / "stopped"
    assert reference.start(name, output, _both(save_always, stop_after(10))).wait() == 130
    last = output / "run-1" / "last.pth"
    whole = last.read_bytes()
    for number in range(count):
        damaged = bytearray(whole)
        if number % 2:
            del damaged[rng.randrange(len(whole)) :]
        else:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        last.write_bytes(damaged)
        try:
            checkpoint.load(last)
            outcome.count(f"case {number} was not found")
        except CheckpointError:
            outcome.count(_falls_back(reference, name, output, folder / f"copy-{number}") if number % 10 == 0 else None)
    outcome.notes.append(f"{-(-count // 10)} of them resumed to the end")
    return outcome


def _falls_back(reference: Reference, name: str, stopped: Path, copy: Path) -> str | None:
    shutil.copytree(stopped, copy)
    next_second()
    child = reference.start(name, copy, save_always, "--resume", copy / "run-1")
    code = child.wait()
    if code != 0 or "going on from the one saved before it" not in child.said():
        return f"exit {code}: {child.said()[-300:]}"
    return reference.compared(name, copy / "run-1")


def two_at_once(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Two runs at the same moment in one output folder, or resuming one run: never mixed."""
    outcome, name = Outcome(), "cached"
    reference, stopped = Reference(folder, (name,)), folder / "stopped"
    assert reference.start(name, stopped, _both(save_always, stop_after(10))).wait() == 130
    refused = 0
    for number in range(count):
        output, resuming = folder / f"pair-{number}", number % 2 == 1
        if resuming:
            shutil.copytree(stopped, output)
            next_second()
        words = ("--resume", output / "run-1") if resuming else ()
        pair = []
        for side in ("a", "b"):
            logs, cache = output / side, output / "cache"
            arguments = ("--data-dir", reference.data, "--output", output, *RECIPES[name], *words)
            pair.append(command("train", *arguments, logs=logs, prepare=save_always, cache=cache))
            time.sleep(rng.choice([0.0, 0.0, 0.01, 0.2]) if resuming else 0.0)
        codes = [child.wait() for child in pair]
        said = [child.said() for child in pair]
        messages = ("another tl-train is at work in it", "epochs are done")
        turned = [
            code == 2 and any(message in text for message in messages) for code, text in zip(codes, said, strict=True)
        ]
        refused += sum(turned)
        dirs = run_dirs(output)
        if any(code != 0 and not out for code, out in zip(codes, turned, strict=True)) or all(turned):
            outcome.count(f"exits {codes}: {said[0][-200:]} {said[1][-200:]}")
        elif len(dirs) != (1 if resuming else 2):
            outcome.count(f"{len(dirs)} run directories")
        else:
            problems = [reference.compared(name, run_dir) for run_dir in dirs]
            outcome.count(next(filter(None, problems), None))
        shutil.rmtree(output)
    outcome.notes.append(f"{refused} refused")
    return outcome


PHASES = ("extraction", "training", "evaluation", "saving")


def _slowed(phase: str, mark: Path, recipe: str) -> Callable[[], None]:
    """Make a phase long enough to be met by a signal, and have it leave a mark when it begins."""

    def pause(*_: object) -> None:
        mark.touch()
        time.sleep(0.05)

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            pause()
            result = function(*arguments)
            time.sleep(0.05)
            return result

        return slow

    class SlowSaver(EagerSaver):
        save = around(EagerSaver.save)

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.flush = around(self.flush)  # which comes between best.pth and last.pth

    training, validation = BATCHES[recipe]
    batches = itertools.cycle(["training"] * training + ["evaluation"] * validation)

    def after_batch(_: object) -> None:
        if next(batches) == phase:
            pause()
            time.sleep(0.05)

    def slow_extraction() -> None:
        feature_store.FeatureStore.append = around(feature_store.FeatureStore.append)  # type: ignore[method-assign]

    if phase == "extraction":
        return slow_extraction
    return hooked(make_saver=SlowSaver) if phase == "saving" else hooked(after_batch)


def signals(count: int, folder: Path, rng: random.Random) -> Outcome:
    """SIGINT and SIGTERM in each phase: a clean end in time, and a resumed run like an uninterrupted one."""
    outcome, slowest = Outcome(), 0.0
    reference = Reference(folder, ("workers 2", "cached"))
    kinds = [(phase, number) for number in (signal.SIGINT, signal.SIGTERM) for phase in PHASES]
    for case in range(count):
        phase, number = kinds[case % len(kinds)]
        name, output = "cached" if phase == "extraction" or case % 16 < 8 else "workers 2", folder / f"signal-{case}"
        for attempt in range(10):
            shutil.rmtree(output, ignore_errors=True)
            delay = rng.uniform(0, 0.25 / (attempt + 1))
            child, before, sent = _signalled(reference, name, phase, number, output, delay)
            code = child.wait()
            if sent:
                break
        slowest = max(slowest, time.monotonic() - sent)
        lines = child.said().splitlines()[before:]
        problem = None
        if code != 128 + number or time.monotonic() - sent > ENDING_SECONDS:
            problem = f"exit {code} after {time.monotonic() - sent:.1f} s"
        elif len(lines) > LINES:
            problem = f"{len(lines)} lines: {lines}"
        elif child.group_alive():
            problem = "a process is left"
        elif temporary_files(output):
            problem = f"left {temporary_files(output)}"
        problem = problem or reference.ended(name, output, rng)
        outcome.count(f"{number.name} in {phase}, {name}: {problem}" if problem else None)
        child.end_group()
        shutil.rmtree(output, ignore_errors=True)
    outcome.notes.append(f"the slowest ended after {slowest:.1f} s")
    return outcome


def _signalled(
    reference: Reference, name: str, phase: str, number: int, output: Path, delay: float
) -> tuple[Child, int, float]:
    """A run that got a signal so long after a phase began, its lines before, and when; 0.0 if it was over."""
    mark = output / "mark"
    child = reference.start(name, output, _slowed(phase, mark, name))
    while not mark.exists() and not child.poll():
        time.sleep(0.001)
    time.sleep(delay)
    before = len(child.said().splitlines())
    over = child.over.exists()
    sent = 0.0 if over else time.monotonic()
    child.signal(number)
    return child, before, sent


def _both(*preparations: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        for preparation in preparations:
            preparation()

    return prepare


def _with_two_workers(count: int, folder: Path) -> Iterator[tuple[Child, list[int]]]:
    """Runs in the middle of an epoch, with the ids of their two loader processes; a fork server's in every second."""
    data = draw(folder / "data")
    for number in range(count):
        output, mark = folder / f"run-{number}", folder / f"mark-{number}"
        words = ("--data-dir", data, "--output", output, *RECIPES["workers 2"], "train.epochs=1000")
        method = partial(setattr, loaders, "START_METHOD", "forkserver" if number % 2 else "fork")
        child = command("train", *words, logs=output, prepare=_both(method, _slowed("training", mark, "workers 2")))
        until = time.monotonic() + PATIENCE
        while (not mark.exists() or len(_workers(child)) < 2) and time.monotonic() < until and not child.poll():
            time.sleep(0.005)
        yield child, _workers(child)


def _workers(child: Child) -> list[int]:
    """The processes that load images for it; those of a fork server are that server's children."""
    started = children(child.pid)
    return [pid for server in started for pid in children(server)] or started


def _alive(child: Child, until: float) -> bool:
    """Whether any process of its group is still there at that time."""
    while child.group_alive() and time.monotonic() < until:
        time.sleep(0.05)
    return child.group_alive()


def orphans(count: int, folder: Path, rng: random.Random) -> Outcome:
    """SIGKILL of the main process: its two workers end by themselves, whether forked or of a fork server."""
    outcome, killed = Outcome(), []
    for child, processes in _with_two_workers(count, folder):
        random_moment(rng, 0.2)
        child.signal(signal.SIGKILL)
        killed.append((child, child.wait(), len(processes)))
    until = time.monotonic() + ENDING_SECONDS
    for child, code, processes in killed:
        alive = _alive(child, until)
        child.end_group()
        fine = code == -signal.SIGKILL and processes >= 1 and not alive
        outcome.count(None if fine else f"exit {code}, {processes} workers before, {'some' if alive else 'none'} after")
    return outcome


def killed_worker(count: int, folder: Path, rng: random.Random) -> Outcome:
    """SIGKILL of a worker: a sentence with cause and remedy, and no hang."""
    outcome = Outcome()
    for child, processes in _with_two_workers(count, folder):
        random_moment(rng, 0.2)
        processes = _workers(child) or processes
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rng.choice(processes), signal.SIGKILL)
        code = child.wait(60)
        said = child.said().splitlines()[-1:]
        fine = code == 1 and said and "a process that loads images was killed" in said[0] and "--workers" in said[0]
        alive = _alive(child, time.monotonic() + ENDING_SECONDS)
        outcome.count(None if fine and not alive else f"exit {code}: {child.said()[-300:]}")
        child.end_group()
    return outcome


def disk_full(count: int, folder: Path, rng: random.Random) -> Outcome:
    """A run and its features on a file system of each of several sizes: it fits, or one reason and nothing broken."""
    outcome, fitted = Outcome(), 0
    data, words = draw(folder / "data"), (*TINY, "transforms.train=eval", "data.workers=0")
    for number in range(count):
        kilobytes = 40 + round(number * 480 / max(1, count - 1)) + rng.randrange(20)
        with _small_disk(folder / "disk", kilobytes) as disk:
            arguments = ("--data-dir", data, "--output", disk / "runs", f"features.dir={disk / 'features'}", *words)
            child = command("train", *arguments, logs=folder / f"logs-{number}", prepare=save_always)
            code = child.wait()
            fitted += code == 0
            errors = [line for line in child.said().splitlines() if line.startswith("tl-train: ")]
            problem = broken(disk)
            if code not in (0, 1, 2) or (code and (len(errors) != 1 or "unexpected" in errors[0])):
                problem = f"exit {code}: {child.said()[-300:]}"
            outcome.count(f"{kilobytes} KB: {problem}" if problem else None)
    outcome.notes.append(f"{fitted} fitted")
    return outcome


@contextlib.contextmanager
def _small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise NotRun("mounting a small file system needs root") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)
