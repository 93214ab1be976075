"""Rows about several ranks: killed, stopped, on two hosts, on shards, and a rehearsal with a million rows."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from stress.tools import (
    RECIPES,
    TINY,
    Child,
    NotRun,
    Outcome,
    broken,
    children,
    command,
    difference,
    draw,
    record,
    rows_in,
    run_dirs,
)
from tl_trainer import checkpoint
from tl_trainer.data.webdataset import Members

PATIENCE = 240.0
TO_START = 8.0  # seconds that torchrun and its ranks take, about
ENDING_SECONDS, ORPHANED_SECONDS = 30.0, 10.0  # that ranks may live after SIGTERM to torchrun, and after its death
SIDE = 8  # pixels of the pictures in shards
SLOWEST = 200  # rows a second
MOST_MEMORY = 1.5e9  # bytes that a rank may take
SMALL = (
    f"transforms.eval=[{{Resize: [{SIDE}, {SIDE}]}}]", "train.epochs=1", "train.batch_size=256",
    "output.tensorboard=false",
)  # fmt: skip
FEW_FEATURES = (*TINY, "transforms.train=eval", "output.tensorboard=false")


def forked(
    name: str, count: int, *words: object, logs: Path, cache: Path | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> list[Child]:  # fmt: skip
    """tl-NAME by ranks that are forked from here, each with the environment that torchrun gives it; they have ended."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": str(count)}

    def begin(rank: int) -> None:
        os.environ.update(at, RANK=str(rank), LOCAL_RANK=str(rank))
        prepare()

    ranks = [
        command(name, *words, logs=logs / f"rank-{rank}", cache=cache or logs / "cache", prepare=partial(begin, rank))
        for rank in range(count)
    ]
    for rank in ranks:
        rank.wait(PATIENCE)
    return ranks


class Agent:
    """torchrun with ranks of tl-train on this host; what they write on stderr is in a file."""

    def __init__(
        self, count: int, *words: object, folder: Path, options: Sequence[str] = (), first: Sequence[str] = ()
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        launch = [*first, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), *options]
        environment = {**os.environ, "TL_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*launch, "-m", "tl_trainer.cli.train", *map(str, words)],
                stdout=out, stderr=err, env=environment, start_new_session=True,
            )  # fmt: skip

    def ranks(self) -> list[int]:
        """The ranks that are there."""
        return [pid for pid in children(self.process.pid) if b"tl_trainer" in _command_line(pid)]

    def end(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code; None, when all of it has been killed, where it does not end in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        ranks = self.ranks()  # each in a session of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        kill(ranks)
        return None

    def said(self) -> str:
        """What it wrote on stderr, and its ranks."""
        return self.err.read_text(encoding="utf-8", errors="replace")


def kill(pids: Sequence[int]) -> None:
    """Kill processes that may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def killed_ranks(count: int, folder: Path, rng: random.Random) -> Outcome:
    """SIGKILL of one of two ranks at a random moment, under --max-restarts 3: the end is that of an undisturbed run."""
    outcome, killed, data = Outcome(), 0, draw(folder / "data", per_class=40)
    words = ("--data-dir", data, *RECIPES["cached"], "train.epochs=6")
    started, whole = time.perf_counter(), folder / "whole"
    undisturbed = forked("train", 2, *words, "--output", whole / "runs", logs=whole)
    assert [rank.code for rank in undisturbed] == [0, 0], undisturbed[0].said()
    seconds = TO_START + time.perf_counter() - started
    expected, images = record(whole / "runs" / "run-1", curves=False), rows_in(whole / "cache")
    for number in range(count):
        place = folder / f"killed-{number}"
        options = ("--standalone", "--max-restarts", "3")
        agent = Agent(2, *words, "--output", place / "runs", folder=place, options=options)
        time.sleep(rng.uniform(0.5 * TO_START, seconds))
        if victims := agent.ranks():
            kill([rng.choice(victims)])
            killed += 1
        code = agent.end()
        problem = f"exit {code}: {agent.said()[-500:]}" if code != 0 else None
        problem = problem or difference(record(run_dirs(place / "runs")[-1], curves=False), expected)
        if not problem and rows_in(place / "cache") != images:
            problem = f"{rows_in(place / 'cache')} rows were written of {images} images"
        outcome.count(problem)
        shutil.rmtree(place, ignore_errors=True)
    outcome.notes.append(f"{killed} were still there to be killed")
    outcome.count(None if killed else "none was killed")
    return outcome


def ended_agents(count: int, folder: Path, rng: random.Random) -> Outcome:
    """SIGTERM to torchrun: all is saved, and no rank is left; SIGKILL: no rank is left either."""
    outcome, slowest, data = Outcome(), 0.0, draw(folder / "data")
    words = ("--data-dir", data, *RECIPES["cached"], "train.epochs=100000")
    for case in range(count):
        place, number = folder / str(case), (signal.SIGTERM, signal.SIGKILL)[case % 2]
        agent = Agent(2, *words, "--output", place / "runs", folder=place, options=("--standalone",))
        last = place / "runs" / "run-1" / "last.pth"
        until = time.monotonic() + PATIENCE
        while not last.exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        ranks, sent = agent.ranks(), time.time()
        os.kill(agent.process.pid, number)
        most = ENDING_SECONDS if number == signal.SIGTERM else ORPHANED_SECONDS
        while (left := [pid for pid in ranks if b"tl_trainer" in _command_line(pid)]) and time.time() - sent < most:
            time.sleep(0.05)
        slowest = max(slowest, time.time() - sent)
        code, name = agent.end(most), signal.Signals(number).name
        kill(left)
        problem = f"{name}: {len(left)} ranks are left after {most:.0f} s" if left else None
        if not problem and code in (0, None):
            problem = f"{name}: exit {code}"
        if not problem and number == signal.SIGTERM:
            saved = last.stat().st_mtime >= sent and "continue with --resume" in agent.said()
            problem = None if saved else f"nothing was saved: {agent.said()[-500:]}"
        outcome.count(problem or broken(place))
    outcome.notes.append(f"the last rank was gone after {slowest:.1f} s at most")
    return outcome


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two network namespaces that are joined by a cable; of each its name and its address."""
    tag = f"tl{os.getpid()}"
    names, cables = (f"{tag}a", f"{tag}b"), (f"{tag}x", f"{tag}y")
    ip = shutil.which("ip") or "ip"
    made: list[list[str]] = [["netns", "add", name] for name in names]
    made.append(["link", "add", cables[0], "type", "veth", "peer", "name", cables[1]])
    hosts = [(name, f"10.77.0.{number}") for number, name in enumerate(names, 1)]
    for (name, address), cable in zip(hosts, cables, strict=True):
        made.append(["link", "set", cable, "netns", name, "name", "cable"])
        made += [["-n", name, *words] for words in (
            ["address", "add", f"{address}/24", "dev", "cable"], ["link", "set", "cable", "up"],
            ["link", "set", "lo", "up"],
        )]  # fmt: skip
    try:
        for words in made:
            try:
                subprocess.run([ip, *words], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise NotRun(f"network namespaces need root and ip: {getattr(error, 'stderr', error)}") from None
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            subprocess.run([ip, "netns", "delete", name], check=False, capture_output=True)


def two_nodes(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Two hosts that share the data alone and meet by c10d rendezvous: the head and the figures of one process."""
    outcome, data = Outcome(), draw(folder / "data", per_class=40)
    for case in range(count):
        found = case % 2 == 1
        recipe = _searched() if found else (*FEW_FEATURES, "model.head.dropout=0", "train.precision=fp32")
        words = ("--data-dir", data, "--json", *recipe)
        place = folder / str(case)
        one = command("train", *words, "--output", place / "one" / "runs", logs=place / "one")
        assert one.wait() == 0, one.said()
        with two_hosts() as hosts:
            agents = []
            for number, (name, address) in enumerate(hosts):
                options = ("--nnodes", "2", "--node-rank", str(number), "--rdzv-backend", "c10d", "--rdzv-id", "stress",
                           "--rdzv-endpoint", f"{hosts[0][1]}:29431", "--local-addr", address,
                           "--rdzv-conf", f"is_host={number == 0}")  # fmt: skip
                first = ("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable")
                there = place / name
                agents.append(Agent(1, *words, "--output", there / "runs", folder=there, options=options, first=first))
            codes = [agent.end() for agent in agents]
        if codes != [0, 0]:
            outcome.count(f"exits {codes}: {agents[0].said()[-500:]} {agents[1].said()[-500:]}")
            continue
        written = [agent.out.read_text() for agent in agents]
        [mine] = [json.loads(text) for text in written if text.strip()]
        alone = json.loads(one.out.read_text())
        assert ("search" in mine) == found
        apart = _apart(Path(mine["checkpoint"]), Path(alone["checkpoint"]))
        problem = None if apart <= (0.0 if found else 1e-5) else f"weights differ by {apart:.1e}"
        figures = [{key: round(value, 6) for key, value in of["val"].items()} for of in (mine, alone)]
        outcome.count(problem or (None if figures[0] == figures[1] else f"figures differ: {figures}"))
    return outcome


def _searched() -> tuple[str, ...]:
    """A recipe whose head is found."""
    left_out = ("train.epochs", "train.optimizer", "model.head.dropout")
    return tuple(word for word in FEW_FEATURES if not word.startswith(left_out))


def _apart(mine: Path, others: Path) -> float:
    """The largest difference of a weight of two checkpoints."""
    theirs = checkpoint.load(others).trained
    return max(float((value - theirs[key]).abs().max()) for key, value in checkpoint.load(mine).trained.items())


def write_shards(folder: Path, split: str, samples: int, shards: int, seed: int = 0) -> None:
    """Shards of pictures of SIDE x SIDE pixels of noise, in three classes."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(picture, "BMP")
    head = picture.getvalue()[: -3 * SIDE * SIDE]
    generator, ends = np.random.default_rng(seed), np.linspace(0, samples, shards + 1).astype(int)
    for shard, (first, end) in enumerate(itertools.pairwise(ends.tolist())):
        pixels = generator.integers(0, 160, (end - first, 3 * SIDE * SIDE), dtype=np.uint8)
        with tarfile.open(folder / f"{split}-{shard:04}.tar", "w") as tar:
            for number, row in zip(range(first, end), pixels, strict=True):
                row[number % 3 :: 3] += 60
                for ending, content in (("bmp", head + row.tobytes()), ("cls", b"%d" % (number % 3))):
                    member = tarfile.TarInfo(f"{number:08}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


def shards(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Samples in 37 shards, 3 ranks with 2 workers: each is read once in an epoch; 4 ranks evaluate each of 1,003."""
    outcome, data, epochs = Outcome(), folder / "data", 2
    write_shards(data, "train", count, min(37, count))
    write_shards(data, "val", 1003, 5, seed=1)
    source = ("data.source=webdataset", f"data.root={data}", "data.webdataset.val=val-*.tar")
    words = (*source, *RECIPES["workers 2"], "train.batch_size=48", f"train.epochs={epochs}", "device=cpu",
             "output.tensorboard=false", "train.schedule=constant", "train.freeze_batchnorm=true")  # fmt: skip
    read = folder / "read"

    def counted() -> None:
        load, file = Members.load, os.open(read, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def noted(self: Members, index: int, *arguments: object, **named: object) -> object:
            if get_worker_info() is not None:  # the ranks themselves check the images
                os.write(file, f"{self.name(index)}\n".encode())
            return load(self, index, *arguments, **named)  # type: ignore[arg-type]

        Members.load = noted  # type: ignore[method-assign,assignment]

    ranks = forked("train", 3, *words, "--output", folder / "runs", logs=folder / "train", prepare=counted)
    if any(rank.code for rank in ranks):
        outcome.count(f"exits {[rank.code for rank in ranks]}: {ranks[0].said()[-500:]}")
        return outcome
    times = Counter(read.read_text().splitlines())
    wrong = Counter(number for name, number in times.items() if name.startswith("train") and number != epochs)
    of_train = sum(name.startswith("train") for name in times)
    problem = f"read so often instead of {epochs} times: {dict(wrong)}" if wrong else None
    outcome.count(problem or (None if of_train == count else f"{of_train} of {count} samples were read"))
    best = folder / "runs" / "run-1" / "best.pth"
    ranks = forked("eval", 4, "--checkpoint", best, "--json", logs=folder / "eval")
    found = json.loads(ranks[0].out.read_text() or "{}")
    outcome.count(None if found.get("n") == 1003 else f"evaluated {found.get('n')} of 1003: {ranks[0].said()[-500:]}")
    return outcome


def million(count: int, folder: Path, rng: random.Random) -> Outcome:
    """A quarter, half and all of so many rows by two ranks, extracted and trained on: memory, and that none is lost.

    The first quarter is killed in the middle and goes on.
    """
    outcome, notes = Outcome(), []
    for part, killed in ((4, True), (4, False), (2, False), (1, False)):
        place, rows = folder / f"{part}-{killed}", count // part
        write_shards(place / "data", "train", rows, max(2, rows // 10_000))
        words = ("data.source=webdataset", f"data.root={place / 'data'}", *RECIPES["cached"], *SMALL)
        options = ("--standalone", "--max-restarts", "3")
        started = time.perf_counter()
        agent = Agent(2, *words, "--output", place / "runs", folder=place, options=options)
        peak, to_kill, longest = 0, killed, PATIENCE + rows / SLOWEST
        while agent.process.poll() is None and time.perf_counter() - started < longest:
            ranks = agent.ranks()
            peak = max([peak, *map(_memory, ranks)])
            if to_kill and ranks and rows_in(place / "cache") > rows // 2:
                kill([rng.choice(ranks)])
                to_kill = False
            time.sleep(0.2)
        seconds, code, written = time.perf_counter() - started, agent.end(0), rows_in(place / "cache")
        problem = f"exit {code}: {agent.said()[-500:]}" if code != 0 else None
        if not problem and written != rows:
            problem = f"{written} rows were written of {rows} images"
        if not problem and to_kill:
            problem = "it ended before it was killed"
        if not problem and peak > MOST_MEMORY:
            problem = f"a rank took {peak / 1e9:.2f} GB"
        outcome.count(problem)
        notes.append(f"{rows:,}{' and a kill' if killed else ''} {seconds:.0f} s, {peak / 1e9:.2f} GB")
        shutil.rmtree(place)
    outcome.notes.append("; ".join(notes))
    return outcome


def _memory(pid: int) -> int:
    """The bytes of a process that are not those of files."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return 0
