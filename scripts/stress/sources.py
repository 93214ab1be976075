"""Rows about what a run is fed with: images that change while it trains, downloads that go wrong."""

from __future__ import annotations

import hashlib
import http.server
import io
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.models import ShuffleNet_V2_X0_5_Weights

from stress.tools import RECIPES, Child, Outcome, command, draw, hooked, trained
from tl_trainer.data import verify
from tl_trainer.data.dataset import Split
from tl_trainer.ground import downloads as downloading

STALL_SECONDS = 30.0  # within which a download that stands still ends
LINES = 3
WEIGHTS = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1


def _another_image(victim: Path) -> None:
    shutil.copyfile(next(path for path in victim.parents[1].rglob("*.png") if path.parent != victim.parent), victim)


def _folder(victim: Path) -> None:
    victim.unlink()
    victim.mkdir()


def _pipe(victim: Path) -> None:
    victim.unlink()
    os.mkfifo(victim)


def _device(victim: Path) -> None:
    victim.unlink()
    victim.symlink_to("/dev/zero")


CHANGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "another image": _another_image,
    "garbage": lambda victim: victim.write_bytes(b"garbage"),
    "empty": lambda victim: victim.write_bytes(b""),
    "a folder": _folder,
    "a named pipe": _pipe,
    "a device": _device,
}
MOMENTS = ("workers 0", "workers 2", "cached", "extraction")


def replaced_files(count: int, folder: Path, rng: random.Random) -> Outcome:
    """An image that is replaced while a run trains: it is named, or its cached features are what is trained on."""
    outcome = Outcome()
    whole = command("train", "--data-dir", draw(folder / "data"), "--output", folder / "whole", *RECIPES["cached"],
                    logs=folder / "whole")  # fmt: skip
    assert whole.wait() == 0, whole.said()
    expected = trained(folder / "whole" / "run-1")
    cases = list(itertools.product(MOMENTS, CHANGES, ("train", "val")))
    for number in range(count):
        moment, change, split = cases[number % len(cases)] if count >= len(cases) else rng.choice(cases)
        place = folder / str(number)
        data = draw(place / "data")
        victim = data / split / rng.choice(("blue", "green", "red")) / f"{rng.randrange(3):02}.png"
        recipe = "cached" if moment == "extraction" else moment
        prepare = _at_moment(moment, victim, CHANGES[change], rng.randrange(1, 6))
        words = ("--data-dir", data, "--output", place / "runs", *RECIPES[recipe])
        child = command("train", *words, logs=place, prepare=prepare)
        code, said = child.wait(60), child.said()
        problem = None
        if moment == "cached":
            if code != 0 or trained(place / "runs" / "run-1") != expected:
                problem = f"exit {code}, or other weights: {said[-300:]}"
            elif split == "val" and victim.name not in said:  # the projector shows it
                problem = f"does not name it: {said[-300:]}"
        elif code != 2 or not _named(child.complaint(), victim):
            problem = f"exit {code}: {said[-300:]}"
        outcome.count(f"{change} in {split}, {moment}: {problem}" if problem or child.group_alive() else None)
        child.end_group()
        shutil.rmtree(place)
    return outcome


def _named(lines: list[str], victim: Path) -> bool:
    return len(lines) <= LINES and any(victim.name in line and victim.parent.name in line for line in lines)


def _at_moment(moment: str, victim: Path, change: Callable[[Path], object], batch: int) -> Callable[[], None]:
    """Have a run's image replaced at a batch of its first epoch, or between its check and its features."""
    left, verify_split = itertools.count(batch - 1, -1), verify.verified

    def after_batch(_: object) -> None:
        if next(left) == 0:
            change(victim)

    def verified(split: Split, what: str, *arguments: Any) -> Split:
        found = verify_split(split, what, *arguments)
        if what == victim.parents[1].name:
            change(victim)
        return found

    def prepare() -> None:
        verify.verified = verified

    return prepare if moment == "extraction" else hooked(after_batch)


class Server:
    """A server on 127.0.0.1 in a process of its own, which answers as the first part of a path says and keeps count."""

    def __init__(self, content: bytes, place: Path) -> None:
        self.name = f"model-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        place.mkdir()
        self.requests = place / "requests"
        self.requests.write_text("")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(content, self.requests)) as server:
            self.address = f"http://127.0.0.1:{server.server_port}"
            self.child = Child(lambda: server.serve_forever() or 0, place)

    def url(self, answer: str) -> str:
        """Where the file is, for one kind of answer."""
        return f"{self.address}/{answer}/{self.name}"

    def asked(self) -> int:
        """How often it was asked since the last time."""
        count = len(self.requests.read_text())
        self.requests.write_text("")
        return count


def _handler(content: bytes, requests: Path) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with requests.open("a") as file:
                file.write(".")
            answer = self.path.split("/")[1]
            if answer == "missing":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = len(content) // 2
            if answer == "wrong":
                self.wfile.write(content[:half] + bytes(len(content) - half))
                return
            self.wfile.write(content[:half])
            if answer == "cut":
                return
            time.sleep({"stalled": 600.0, "slow": 2.0}.get(answer, 0.0))
            self.wfile.write(content[half:])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class Downloads:
    """Commands that need one file of weights, each kind of trouble in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        buffer = io.BytesIO()
        torch.save(torchvision.models.get_model("shufflenet_v2_x0_5", weights=None).state_dict(), buffer)
        self.content, self.data = buffer.getvalue(), draw(folder / "data")
        self.server = Server(self.content, folder / "server")

    def start(self, place: Path, number: int, answer: str, prepare: Callable[[], None] = lambda: None) -> Child:
        """tl-train in a process that shares torch's cache in `place` with its neighbours."""
        words = ("--data-dir", self.data, "--output", place / "runs", *RECIPES["cached"], "output.tensorboard=false",
                 "model.weights=IMAGENET1K_V1")  # fmt: skip
        return command("train", *words, logs=place / str(number), prepare=lambda: self.aimed(place, answer, prepare))

    def aimed(self, place: Path, answer: str, prepare: Callable[[], None] = lambda: None) -> None:
        """In a child: have the weights come from the server, and lie in the cache of `place`."""
        os.environ.update(TORCH_HOME=str(place / "torch"), no_proxy="*")
        WEIGHTS.value.__dict__["url"] = self.server.url(answer)
        prepare()

    def cached(self, place: Path) -> Path:
        """Where torch keeps the file."""
        path = place / "torch" / "hub" / "checkpoints" / self.server.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def held(self, place: Path, asked: int) -> str | None:
        """What is wrong with the cache after a success that took so many requests."""
        if (count := self.server.asked()) != asked:
            return f"{count} downloads, not {asked}"
        found = sorted(path.name for path in self.cached(place).parent.iterdir() if path.suffix == ".pth")
        right = found == [self.server.name] and self.cached(place).read_bytes() == self.content
        return None if right else f"the cache holds {found}, or other bytes"

    def refused(self, child: Child, place: Path, reason: str) -> str | None:
        """What is wrong with how a download failed."""
        code, said = child.wait(60), child.said()
        self.server.asked()
        if code != 2 or reason not in said or self.server.name not in said or len(child.complaint()) > LINES:
            return f"exit {code}: {said[-300:]}"
        left = list(self.cached(place).parent.iterdir())
        return f"left {left}" if left else None


def _broken_off(downloads: Downloads, place: Path, answer: str, reason: str) -> str | None:
    return downloads.refused(downloads.start(place, 0, answer), place, reason)


def _stalled(downloads: Downloads, place: Path, seconds: float | None) -> str | None:
    def shorter() -> None:
        downloading.STALL_SECONDS = downloading.STALL_SECONDS if seconds is None else seconds  # type: ignore[assignment]

    started = time.monotonic()
    problem = downloads.refused(downloads.start(place, 0, "stalled", shorter), place, "timed out")
    took = time.monotonic() - started
    limit = STALL_SECONDS if seconds is None else STALL_SECONDS / 2
    return problem or (f"{took:.0f} s" if took > limit else None)


def _poisoned(downloads: Downloads, place: Path) -> str | None:
    half = len(downloads.content) // 2
    downloads.cached(place).write_bytes(downloads.content[:half] + bytes(half))
    child = downloads.start(place, 0, "whole")
    if child.wait() != 0 or "does not have the hash in its name" not in child.said():
        return f"exit {child.code}: {child.said()[-300:]}"
    return downloads.held(place, 1)


def _eight(downloads: Downloads, place: Path) -> str | None:
    together = [downloads.start(place, number, "slow") for number in range(8)]
    codes = [child.wait() for child in together]
    return downloads.held(place, 1) if codes == [0] * 8 else f"exits {codes}: {together[0].said()[-300:]}"


def _killed(downloads: Downloads, place: Path) -> str | None:
    """The one that downloads is killed: of those that wait another one does."""
    first = downloads.start(place, 0, "slow")
    while not list(downloads.cached(place).parent.iterdir()) and not first.poll():
        time.sleep(0.01)
    second = downloads.start(place, 1, "slow")
    time.sleep(0.5)
    first.signal(signal.SIGKILL)
    codes = [first.wait(), second.wait()]
    return downloads.held(place, 2) if codes == [-signal.SIGKILL, 0] else f"exits {codes}: {second.said()[-300:]}"


def _without_network(downloads: Downloads, place: Path) -> str | None:
    """With the weights in the cache no command asks for an address."""
    downloads.cached(place).write_bytes(downloads.content)

    def forbid() -> None:
        downloads.aimed(place, "whole")
        sys.addaudithook(_no_network)

    codes = [downloads.start(place, 0, "whole", forbid).wait()]
    best = place / "runs" / "run-1" / "best.pth"
    words: dict[str, tuple[object, ...]] = {"eval": (), "predict": (downloads.data,)}
    for name, more in words.items():
        child = command(name, *more, "--checkpoint", best, logs=place / name, prepare=forbid)
        codes.append(child.wait())
    return downloads.held(place, 0) if codes == [0, 0, 0] else f"exits {codes}"


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if isinstance(arguments[0], socket.socket) and arguments[0].family == socket.AF_UNIX:
            return
        raise AssertionError(f"{event} {arguments}")


TROUBLES: dict[str, Callable[[Downloads, Path], str | None]] = {
    "cut": lambda downloads, place: _broken_off(downloads, place, "cut", "the download is damaged"),
    "eight at once": _eight,
    "a poisoned cache": _poisoned,
    "no network": _without_network,
    "stalled": lambda downloads, place: _stalled(downloads, place, 1.0),
    "killed": _killed,
    "wrong bytes": lambda downloads, place: _broken_off(downloads, place, "wrong", "the download is damaged"),
    "not there": lambda downloads, place: _broken_off(downloads, place, "missing", "cannot be downloaded"),
    "stalled, with the real limit": lambda downloads, place: _stalled(downloads, place, None),
}


def downloads(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Weights from a server that breaks off, stalls or lies, a cache that does, eight processes, and no network."""
    outcome, source = Outcome(), Downloads(folder)
    try:
        for number, (name, trouble) in zip(range(count), itertools.cycle(TROUBLES.items()), strict=False):
            problem = trouble(source, folder / str(number))
            outcome.count(f"{name}: {problem}" if problem else None)
    finally:
        source.server.child.end_group()
    return outcome
