"""Rows about checkpoints that are hostile or broken."""

from __future__ import annotations

import builtins
import copy
import functools
import hashlib
import io
import json
import operator
import os
import pickle
import pydoc
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import timeit
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

from stress.tools import MAINS, PATIENCE, RECIPES, Child, Outcome, command, draw, random_moment, save_always
from tl_trainer import checkpoint
from tl_trainer.assembly import restore
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.errors import CheckpointError, ConfigError, TrainerError
from tl_trainer.ground.files import keep_previous, previous
from tl_trainer.ground.sealed import _SEAL, _SEAL_BYTES
from tl_trainer.resume import resume

MEMORY = 1 << 30  # beyond twice the file's size, that reading it may take
SECONDS = 10.0
LINES = 3


class Bomb:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Late(OrderedDict[str, Any]):
    """Pickled, it is an innocent dictionary whose state is not."""

    bomb: Any = None

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"hook": self.bomb}


def _payloads(canary: Path) -> dict[str, Any]:
    """Calls that would leave the canary file behind."""
    code, shell = f"open({str(canary)!r}, 'w').close()", f"touch '{canary}'"
    inner = pickle.dumps(Bomb(os.system, shell))
    return {
        "os.system": Bomb(os.system, shell),
        "exec": Bomb(builtins.exec, code),
        "eval": Bomb(builtins.eval, code),
        "open": Bomb(builtins.open, str(canary), "w"),
        "Path.touch": Bomb(Path.touch, canary),
        "subprocess": Bomb(subprocess.call, ["touch", str(canary)]),
        "Popen": Bomb(subprocess.Popen, ["touch", str(canary)]),
        "os.mkdir": Bomb(os.mkdir, str(canary)),
        "os.popen": Bomb(os.popen, shell),
        "copyfile": Bomb(shutil.copyfile, __file__, str(canary)),
        "runpy": Bomb(runpy._run_code, code, {}),  # type: ignore[attr-defined]
        "timeit": Bomb(timeit.timeit, code, "pass", timeit.default_timer, 1),
        "pydoc": Bomb(pydoc.pipepager, "", shell),
        "pickle in pickle": Bomb(pickle.loads, inner),
        "torch.load": Bomb(functools.partial(torch.load, weights_only=False), Bomb(io.BytesIO, inner)),
        "torch.save": Bomb(torch.save, [1], str(canary)),
        "numpy.save": Bomb(numpy.save, str(canary) + ".npy", [1]),
        "numpy array": Bomb(numpy.array, [Bomb(os.system, shell)], None),
        "methodcaller": Bomb(operator.methodcaller("touch"), canary),
        "map": Bomb(builtins.list, Bomb(builtins.map, os.system, [shell])),
    }


def _placed(bomb: Any, place: int, honest: dict[str, Any]) -> Any:
    """The bomb at one of several places of a checkpoint that is otherwise right."""
    content = copy.copy(honest)
    if place == 1:
        content["classes"] = ["a", [["b", bomb]]]
    elif place == 2:
        content["config"] = {**honest["config"], "data": {"root": {"deep": (1, {"er": bomb})}}}
    elif place == 3:
        content["trained"] = {**honest["trained"], "hook": Bomb(torch._utils._rebuild_parameter, bomb, False, bomb)}
    elif place == 4:
        content["metrics"] = Late()
        content["metrics"].bomb = bomb
    elif place == 5:
        content["epoch"] = Bomb(torch._utils._rebuild_tensor_v2, bomb, 0, (1,), (1,), False, OrderedDict(x=bomb))
    elif place == 6:
        content["resume"] = OrderedDict([("optimizer", bomb)])
    return content if place else bomb


PLACES, FORMS = 7, 11


def _written(content: Any, form: int, path: Path) -> None:
    """In one of the formats that torch.load knows, some of them with a valid seal."""
    if form < 6:
        path.write_bytes(pickle.dumps(content, protocol=form))
    elif form < 8:
        torch.save(content, path, _use_new_zipfile_serialization=form == 6)
    elif form == 8:
        torch.save(content, path, pickle_protocol=4)
    else:
        torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=form == 9)
        path.write_bytes(sealed(buffer.getvalue()))


def sealed(data: bytes) -> bytes:
    """The bytes with a valid checksum, as a forger would write it."""
    return data + _SEAL + hashlib.sha256(data).digest()


def malicious(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Pickles that run code, at each place, in each format, through each door: none runs, each is refused in a line."""
    outcome, armed = Outcome(), 0
    run_dir = _honest_run(folder)
    honest = torch.load(run_dir / "best.pth", weights_only=True)
    for number in range(count):
        canary, logs = folder / f"canary-{number}", folder / f"logs-{number}"
        payloads = _payloads(canary)
        name = list(payloads)[number % len(payloads)]
        place, form = number % PLACES, number % FORMS
        trap = folder / f"trap-{number}" / "last.pth"
        trap.parent.mkdir()
        _written(_placed(payloads[name], place, honest), form, trap)
        child = Child(lambda: _through_each_door(trap, folder / "data"), logs)  # noqa: B023
        code, lines = child.wait(), child.said().splitlines()
        problem = None
        if canary.exists() or list(folder.glob(f"{canary.name}*")):
            problem = "executed"
        elif code != 0 or len(lines) != 4 or any("unexpected" in line or "last.pth" not in line for line in lines):
            problem = f"exit {code}: {lines}"
        outcome.count(f"{name}, place {place}, format {form}: {problem}" if problem else None)
        Child(lambda: _load_without_care(trap), logs).wait()  # noqa: B023
        armed += bool(list(folder.glob(f"{canary.name}*")))
    outcome.notes.append(f"{armed} of them run when they are unpickled, all are refused")
    return outcome


def _through_each_door(trap: Path, data: Path) -> int:
    """Give a file to all that reads one; 0 where each refuses it."""
    os.environ["TL_CACHE"] = str(trap.parent / "cache")
    try:
        checkpoint.load(trap)
        return 1
    except CheckpointError as error:
        print(error, file=sys.stderr)
    picture = str(next(data.rglob("*.png")))
    codes = [
        MAINS["predict"]([picture, "--checkpoint", str(trap)]),
        MAINS["train"](["--resume", str(trap)]),
        MAINS["train"](["--data-dir", str(data), "--output", str(trap.parent / "runs"), *RECIPES["cached"],
                        f"model.weights={trap}", "--quiet"]),
    ]  # fmt: skip
    return 0 if codes == [2, 2, 2] else 1


def _load_without_care(path: Path) -> int:
    data = path.read_bytes()
    if zipfile.is_zipfile(path) or data[:1] != b"\x80":
        torch.load(path, weights_only=False)
    torch.load(path, weights_only=False)
    return 0


def _honest_run(folder: Path) -> Path:
    data = draw(folder / "data")
    words = ("--data-dir", data, "--output", folder / "honest", *RECIPES["cached"], "output.tensorboard=false")
    child = command("train", *words, logs=folder / "honest", prepare=save_always)
    assert child.wait() == 0, child.said()
    return folder / "honest" / "run-1"


def _example(epoch: int, size: int) -> Checkpoint:
    return Checkpoint(
        config={"seed": 0},
        classes=["a"],
        preprocessing=[],
        backbone={"name": "tiny", "weights": "none", "tap": "pooled", "sha256": ""},
        features=size,
        trained={"head.weight": torch.full((size,), float(epoch))},
        frozen=None,
        epoch=epoch,
        metrics=None,
        val_split=None,
        val_images=[],
        resume={"progress": {"epoch": epoch}, "images": ""},
    )


def kill_save(count: int, folder: Path, rng: random.Random) -> Outcome:
    """SIGKILL inside a save: best.pth loads, and so does last.pth, or the one before it while there is none."""
    outcome = Outcome()

    def save_for_ever() -> int:
        for epoch in range(1_000_000):
            checkpoint.save(_example(epoch, 200_000), place / "best.pth")
            keep_previous(place / "last.pth")
            checkpoint.save(_example(epoch, 200_000), place / "last.pth")
        return 0

    for number in range(count):
        place = folder / str(number)
        child = Child(save_for_ever, place)
        while not (place / "last.pth").exists() and not child.poll():
            time.sleep(0.001)
        random_moment(rng, 0.1)
        child.signal(signal.SIGKILL)
        code, problem = child.wait(), None
        last = place / "last.pth"
        try:
            newest = checkpoint.load(last if last.exists() else previous(last))
            best = checkpoint.load(place / "best.pth")
            if not newest.epoch <= best.epoch <= newest.epoch + 1:
                problem = f"best.pth is of save {best.epoch}, last.pth of {newest.epoch}"
        except CheckpointError as error:
            problem = str(error)
        outcome.count(problem if code == -signal.SIGKILL else f"the saving ended with {code}: {child.said()}")
        shutil.rmtree(place)
    return outcome


def mutated_checkpoints(count: int, folder: Path, rng: random.Random) -> Outcome:
    """best.pth and last.pth with flipped, lost and invented content, half of them with a checksum that is right."""
    run_dir = _honest_run(folder)
    originals = [(run_dir / name).read_bytes() for name in ("best.pth", "last.pth")]
    seed, path = rng.random(), folder / "mutant.pth"

    def case(number: int) -> str | None:
        mine = random.Random(f"{seed} {number}")
        path.write_bytes(_mutated(mine, originals[number % 2]))
        started = time.monotonic()
        try:
            found = checkpoint.load(path)
            if found.resume is None:
                restore(path, [("device", "cpu")])
            else:
                with resume(str(path), None, []):
                    pass
        except TrainerError as error:
            lines = str(error).splitlines()
            if isinstance(error, ConfigError):  # one for each mistake, with the file in front
                lines = [line for line in lines if not line.startswith(f"{path}: ")]
            return f"{len(lines)} lines" if len(lines) > LINES else None
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        seconds = time.monotonic() - started
        return f"{seconds:.1f} s" if seconds > SECONDS else ""

    def limits() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + MEMORY + 2 * max(map(len, originals))
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return in_children(count, case, folder, limits)


def in_children(count: int, case: Callable[[int], str | None], folder: Path, limits: Callable[[], None]) -> Outcome:
    """Try the cases in children; one that crashes or hangs loses its case, and another goes on behind it.

    A case is None where the file was refused, "" where it was read, else what is wrong.
    """
    outcome, done, log, read = Outcome(), 0, folder / "cases.jsonl", 0
    while done < count:
        log.write_text("")

        def body() -> int:
            limits()
            with log.open("a", buffering=1) as file:
                for number in range(done, min(count, done + 500)):  # noqa: B023
                    file.write(json.dumps([number, case(number)]) + "\n")
            return 0

        child, seen, since = Child(body, folder / "logs"), 0, time.monotonic()
        while not child.poll():
            time.sleep(0.02)
            if (size := log.stat().st_size) != seen:
                seen, since = size, time.monotonic()
            elif time.monotonic() - since > PATIENCE / 2:
                child.signal(signal.SIGKILL)
        results = [json.loads(line) for line in log.read_text().splitlines()]
        for number, problem in results:
            outcome.count(f"case {number}: {problem}" if problem else None)
            read += problem == ""
        done += len(results)
        if child.code != 0:
            outcome.count(f"case {done}: the process ended with {child.code}: {child.said()[-200:]}")
            done += 1
    outcome.notes.append(f"{read} were read, the others refused")
    return outcome


def _mutated(rng: random.Random, original: bytes) -> bytes:
    body = bytearray(original[:-_SEAL_BYTES])
    kind = rng.choice(("flip", "flip", "truncate", "block", "content", "content", "numbers", "legacy"))
    if kind in ("flip", "legacy"):
        if kind == "legacy":
            buffer = io.BytesIO()
            content = torch.load(io.BytesIO(original), weights_only=True)
            torch.save(content, buffer, _use_new_zipfile_serialization=False)
            body = bytearray(buffer.getvalue())
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            # Half of them where the structure is: torch's headers, pickle and zip directory are at the ends.
            place = rng.randrange(len(body)) if rng.random() < 0.5 else rng.randrange(-4096, 4096) % len(body)
            body[place] = rng.choice((0, 255, body[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
    elif kind == "truncate":
        del body[rng.randrange(len(body)) :]
    elif kind == "block":
        start, source, length = rng.randrange(len(body)), rng.randrange(len(body)), rng.randrange(1, 5000)
        body[start : start + length] = rng.choice((b"", bytes(length), body[source : source + length]))
    elif kind == "numbers":
        body = _huge_numbers(rng, bytes(body))
    else:
        buffer = io.BytesIO()
        torch.save(_other_content(rng, torch.load(io.BytesIO(original), weights_only=True)), buffer)
        body = bytearray(buffer.getvalue())
    return sealed(bytes(body)) if rng.random() < 0.5 else bytes(body) + original[-_SEAL_BYTES:]


def _huge_numbers(rng: random.Random, body: bytes) -> bytearray:
    """The archive with some small integers of its pickle made enormous: sizes, offsets, strides."""
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as archive, zipfile.ZipFile(rewritten, "w") as other:
        for item in archive.infolist():
            data = archive.read(item)
            if item.filename.endswith("data.pkl"):
                pickled = bytearray(data)
                places = [place for place in range(len(pickled) - 5) if pickled[place] in b"KMJ"]
                for place in sorted(rng.sample(places, min(len(places), rng.choice((1, 2, 5)))), reverse=True):
                    huge = pickle.dumps(rng.choice((2**31 - 1, 2**40, 2**62, -1, 2**70)), protocol=2)[2:-1]
                    width = {ord("K"): 2, ord("M"): 3, ord("J"): 5}[pickled[place]]
                    pickled[place : place + width] = huge
                data = bytes(pickled)
            other.writestr(item.filename, data)
    return bytearray(rewritten.getvalue())


def _other_content(rng: random.Random, content: Any) -> Any:
    """The content with a few of its leaves or branches replaced, swapped or removed."""
    for _ in range(rng.choice((1, 1, 3))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            if isinstance(node, dict) and rng.random() < 0.2:
                del node[key]
            else:
                node[key] = _replacement(rng, node[key], node[rng.choice(keys)])
            break
    return content


def _replacement(rng: random.Random, value: Any, neighbour: Any) -> Any:
    odd = [
        None,
        "",
        "x" * 100_000,
        "\x1b[2J",
        -1,
        2**70,
        1e308,
        float("nan"),
        [],
        {},
        [[]] * 3,
        {"a": 1},
        True,
        neighbour,
    ]
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel() < 1 << 20
    if plain and rng.random() < 0.7:
        odd = [value.flatten(), value.flatten()[:0], value.half(), value.to(torch.complex64), value.bool(),
               value.to_sparse(), torch.zeros(1).expand(1 << 40), torch.zeros(()), neighbour, value[None]]  # fmt: skip
    return rng.choice(odd)
