"""Rows about images, folders, configurations and names that are hostile or odd."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stress.checkpoints import in_children
from stress.tools import RECIPES, Child, Outcome, command, draw, with_pictures, without_privileges
from tl_trainer.config.load import load
from tl_trainer.data import images, verify
from tl_trainer.data.dataset import Split
from tl_trainer.errors import ImageError, InputError

# Of the processor's time: an animated WebP of 89 megapixels, which is below data.max_megapixels, takes 4 to 8.
IMAGE_SECONDS = 15.0
YAML_SECONDS = 1.0  # of the clock


def _pictures() -> list[bytes]:
    """A small picture in several modes of each format."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    frames = [noise, noise.rotate(90)]
    exif = Image.Exif()
    exif[0x0112] = 6
    variants: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (noise, "JPEG", {}), (noise, "JPEG", {"progressive": True, "exif": exif}), (noise.convert("L"), "JPEG", {}),
        (noise.convert("CMYK"), "JPEG", {}), (noise, "PNG", {}), (noise.convert("P"), "PNG", {"transparency": 3}),
        (noise.convert("RGBA"), "PNG", {"exif": exif}), (noise.convert("I;16"), "PNG", {}), (noise, "WEBP", {}),
        (noise.convert("RGBA"), "WEBP", {"lossless": True}),
        (noise, "WEBP", {"save_all": True, "append_images": frames}),
        (noise.convert("P"), "GIF", {}), (noise, "GIF", {"save_all": True, "append_images": frames, "duration": 50}),
    ]  # fmt: skip
    written = []
    for picture, form, options in variants:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        written.append(buffer.getvalue())
    return written


def _mutated(rng: random.Random, original: bytes) -> bytes:
    data, kind = bytearray(original), rng.random()
    if kind < 0.15:
        del data[rng.randrange(len(data)) :]
    elif kind < 0.3:
        start, length = rng.randrange(len(data)), rng.randrange(1, 200)
        data[start : start + length] = rng.choice((b"", bytes(length), rng.randbytes(length), data[:length]))
    else:
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            # Half of them in the first bytes, where the sizes and the tables are.
            place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 64))
            data[place] = rng.choice((0, 1, 127, 128, 255, data[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(data)


def mutated_images(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Broken JPEG, PNG, WebP and GIF files: an image or an ImageError, soon; other formats are never decoded."""
    originals, seed = _pictures(), rng.random()

    def case(number: int) -> str | None:
        mine, started = random.Random(f"{seed} {number}"), time.process_time()
        data = _mutated(mine, originals[number % len(originals)])
        try:
            images.decode(data, "broken.jpg", draft=mine.random() < 0.2)
        except ImageError as error:
            return None if "broken.jpg" in str(error) else f"not named: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        return f"{seconds:.1f} s" if seconds > IMAGE_SECONDS else ""

    outcome = in_children(count, case, folder, lambda: None)
    for problem in _through_predict(folder, originals, random.Random(seed)):
        outcome.count(problem)
    return outcome


def _through_predict(folder: Path, originals: list[bytes], rng: random.Random) -> list[str | None]:
    """Files of formats that are not read, a bomb and some mutants, through tl-predict: a row each."""
    odd = folder / "odd"
    odd.mkdir()
    head = b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\4\0\0\0\4\0\x08\0\3" + bytes(100)
    fits = b"".join(card.ljust(80) for card in (b"SIMPLE  =                    T", b"BITPIX  =   8", b"NAXIS   =   0"))
    contents = {"psd": head, "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "fits": fits}
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    contents["bomb"] = bomb.getvalue()
    for name, data in contents.items():
        (odd / f"{name}.jpg").write_bytes(data)
    for number in range(60):
        (odd / f"mutant-{number:03}.jpg").write_bytes(_mutated(rng, originals[number % len(originals)]))
    checkpoint = _trained(folder)
    reached = folder / "reached"

    def watch() -> None:
        Image.init()
        for form, (_, accept) in list(Image.OPEN.items()):
            if form not in images.FORMATS:
                Image.OPEN[form] = (lambda *_: reached.touch(), accept)  # type: ignore[assignment]

    child = command("predict", odd, "--checkpoint", checkpoint, "--format", "jsonl", logs=folder / "p", prepare=watch)
    code, rows = child.wait(), [json.loads(line) for line in child.out.read_text().splitlines()]
    found = {Path(row["path"]).stem: row["error"] for row in rows}
    problems = [None if found.get(name) else f"{name}: no refusal" for name in contents]
    fine = code == 1 and len(rows) == 60 + len(contents) and not reached.exists()
    return [*problems, None if fine else f"tl-predict ended with {code}, {len(rows)} rows: {child.said()[-200:]}"]


def _trained(folder: Path, data: Path | None = None, *more: str) -> Path:
    """best.pth of a run on a drawn dataset."""
    data = data or draw(folder / "data")
    words = ("--data-dir", data, "--output", folder / "trained", *RECIPES["cached"], "output.tensorboard=false", *more)
    child = command("train", *words, logs=folder / "trained")
    assert child.wait() == 0, child.said()
    return folder / "trained" / "run-1" / "best.pth"


def _links(data: Path) -> str:
    (data / "train" / "red" / "loop").symlink_to(data / "train")
    (data / "train" / "red" / "self.png").symlink_to("self.png")
    return "self.png"


def _fifo(data: Path) -> str:
    os.mkfifo(data / "train" / "red" / "pipe.png")
    return "pipe.png"


def _device(data: Path) -> str:
    (data / "train" / "red" / "zero.png").symlink_to("/dev/zero")
    return "zero.png"


def _unreadable(data: Path) -> str:
    (data / "train" / "red").chmod(0)
    return "red"


def _unreadable_file(data: Path) -> str:
    (data / "train" / "red" / "00.png").chmod(0)
    return "00.png"


def _name(raw: bytes, *, broken: bool) -> Callable[[Path], str]:
    def make(data: Path) -> str:
        target = os.fsencode(data / "train" / "red") + b"/" + raw
        shutil.copyfile(data / "train" / "red" / "00.png", target)
        if broken:
            with open(target, "wb") as file:  # noqa: PTH123  (its name is bytes)
                file.write(b"no picture")
        return "odd" if broken else ""

    return make


ODD: dict[str, Callable[[Path], str]] = {
    "links in a circle": _links,
    "a named pipe": _fifo,
    "a device": _device,
    "a folder that cannot be read": _unreadable,
    "a file that cannot be read": _unreadable_file,
    "a name that is not UTF-8": _name(b"odd\xff.png", broken=False),
    "a broken image whose name is not UTF-8": _name(b"odd\xff.png", broken=True),
    "a broken image with lines and escapes in its name": _name(b"odd\n\x1b[31m\n\n.png", broken=True),
}


def _complaints(child: Child, mentioned: str, codes: tuple[int, ...]) -> str | None:
    """What is wrong with how a command ended; `mentioned` must be in what it said unless it succeeded."""
    code, said = child.wait(60), child.said()
    if code not in codes or "unexpected" in said or "Traceback" in said:
        return f"exit {code}: {said[-300:]!r}"
    if code and (mentioned not in said or len(child.complaint()) > 3):
        return f"does not name {mentioned!r} in three lines: {said[-300:]!r}"
    if any(ord(character) < 32 and character not in "\n\r" for character in said):
        return f"raw control characters: {said[-300:]!r}"
    return None


def odd_files(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Links in circles, pipes, devices, odd names and long paths, files that vanish: named, and never a hang."""
    outcome = Outcome()
    checkpoint = _trained(folder)
    for number, (what, make) in enumerate(list(ODD.items())[:count]):
        place = folder / f"odd-{number}"
        mentioned = make(draw(place / "data"))
        for recipe in ("cached", "workers 2"):
            words = ("--data-dir", place / "data", "--output", place / recipe, *RECIPES[recipe])
            codes = (2,) if mentioned else (0,)
            child = command("train", *words, logs=place / recipe, prepare=without_privileges)
            outcome.count(_about(what, _complaints(child, mentioned, codes)))
        for form in ("text", "jsonl", "csv"):
            words = (place / "data", "--checkpoint", checkpoint, "--format", form)
            child = command("predict", *words, logs=place / form, prepare=without_privileges)
            outcome.count(_about(f"{what}, {form}", _complaints(child, "", (0, 1))))
        (place / "data" / "train" / "red").chmod(stat.S_IRWXU)
    long = "x/" * 2500 + "y"
    data = folder / "data"
    for index, (name, *words) in enumerate(_long_paths(long, data, checkpoint)[:count]):
        child = command(name, *words, logs=folder / f"long-{index}")
        outcome.count(_about(f"a long path: {name} {words[0]}", _complaints(child, "", (1, 2))))
    for recipe in ("workers 0", "workers 2", "cached"):
        child = _vanishing(folder / f"gone {recipe}", recipe)
        outcome.count(_about(f"a file that vanishes, {recipe}", _complaints(child, "00.png", (1, 2))))
    return outcome


def _about(what: str, problem: str | None) -> str | None:
    return f"{what}: {problem}" if problem else None


def _long_paths(long: str, data: Path, checkpoint: Path) -> list[tuple[Any, ...]]:
    return [
        ("train", "--data-dir", long, *RECIPES["cached"]),
        ("train", "--output", long, "--data-dir", data, *RECIPES["cached"]),
        ("train", "--config", long),
        ("train", "--resume", long),
        ("train", "--data-dir", data, *RECIPES["cached"], f"model.weights={long}"),
        ("train", "--data-dir", data, *RECIPES["cached"], f"features.dir={long}"),
        ("eval", "--checkpoint", long),
        ("eval", "--report", long, "--checkpoint", checkpoint),
        ("predict", long, "--checkpoint", checkpoint),
        ("predict", next(data.rglob("*.png")), "--output", long, "--checkpoint", checkpoint),
    ]


def _vanishing(place: Path, recipe: str) -> Child:
    """A run that finds an image when it looks, and not any more when it reads."""
    data = draw(place / "data")
    victim, verify_split = data / "train" / "green" / "00.png", verify.verified

    def verified(*arguments: Any) -> Split:
        split = verify_split(*arguments)
        victim.unlink(missing_ok=True)
        return split

    def prepare() -> None:
        verify.verified = verified

    words = ("--data-dir", data, "--output", place / "runs", *RECIPES[recipe])
    return command("train", *words, logs=place, prepare=prepare)


def tree_hash(folder: Path) -> str:
    """Names, bytes, permissions and times of everything below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        digest.update(repr((str(path), found.st_mode, found.st_size, found.st_mtime_ns)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def dataset_untouched(count: int, folder: Path, rng: random.Random) -> Outcome:
    """The dataset before is the dataset after train, eval and predict."""
    outcome = Outcome()
    for number in range(count):
        place = folder / str(number)
        data = draw(place / "data", splits=("train", "val", "test"))
        before = tree_hash(data)
        checkpoint = _trained(place, data, "output.report=true", "output.tensorboard=true")
        codes = [
            command("eval", "--checkpoint", checkpoint, "--report", place / "report", logs=place / "e").wait(),
            command("predict", data, "--checkpoint", checkpoint, "--explain", place / "x", logs=place / "p").wait(),
        ]
        outcome.count(None if tree_hash(data) == before and codes == [0, 0] else f"changed, or exits {codes}")
    return outcome


def _documents() -> dict[str, str]:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
    return {
        "a python tag": "seed: !!python/object/apply:os.system ['true']",
        "a python name": "seed: !!python/name:os.system",
        "a python module": "data: !!python/module:antigravity",
        "an alias bomb": bomb,
        "an alias of itself": "data: &a\n  csv: *a\n",
        "10 MB": "# " + "x" * 10_000_000,
        "10 MB in one line": "seed: [" + "0, " * 3_000_000 + "]",
        "a duplicate key": "seed: 1\nseed: 2\n",
        "100,000 levels in brackets": "seed: " + "[" * 100_000,
        "49,000 levels in brackets": "seed: " + "[" * 49_000 + "]" * 49_000,
        "49,000 levels in braces": "seed: " + "{a: " * 24_000 + "}" * 24_000,
        "levels of dashes": "seed:\n  " + "- " * 45_000 + "x",
        "levels of question marks": "? " * 45_000,
        "many keys": "\n".join(f"k{number}: 1" for number in range(9_900)),
        "a merge bomb": "a: &a {x: 1}\nb: &b {<<: [" + ", ".join(["*a"] * 9_000) + "]}\n",
        "a long quoted key": '"' + "k" * 90_000 + '": 1',
        "many anchors": "\n".join(f"k{n}: &a{n} 1" for n in range(6_000)),
        "not text": "seed: \x00\x07",
    }


def hostile_yaml(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Documents that run code, explode or nest: refused with a ConfigError, quickly."""
    outcome, slowest = Outcome(), (0.0, "")
    for what, text in list(_documents().items())[: max(count, 1)]:
        path = folder / "config.yaml"
        path.write_text(text)
        started, problem = time.perf_counter(), "accepted"
        try:
            load(str(path))
        except InputError as error:
            problem = "" if len(str(error).splitlines()) <= 3 or "many" in what else f"{len(str(error))} characters"
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - started
        slowest = max(slowest, (seconds, what))
        problem = problem or (f"{seconds:.1f} s" if seconds > YAML_SECONDS else "")
        outcome.count(f"{what}: {problem}" if problem else None)
    outcome.notes.append(f"the longest took {slowest[0]:.2f} s ({slowest[1]})")
    return outcome


NAMES = (
    "../../escaped", "..", "/tmp/escaped", "<script>alert(1)</script>", "\x1b[31mred\x1b[0m", "a\rb", "tab\there",
    "\u202eevil", "&lt;b&gt;", "`x`](javascript:1)",
)  # fmt: skip


def escapes(count: int, folder: Path, rng: random.Random) -> Outcome:
    """Class names with paths, markup and control characters: nothing leaves the run directory, nothing is shown raw."""
    outcome = Outcome()
    for number, name in enumerate(NAMES[:count]):
        place = folder / f"name-{number}" / "deep" / "deeper"
        data = _labelled(place / "data", ["plain", name, "third"])
        before = sorted(str(path) for path in folder.rglob("*") if place not in path.parents)
        words = (
            "--data-dir", data, "--output", place / "runs", *RECIPES["cached"], "data.source=csv",
            "data.csv.split_column=split", "output.report=true",
        )  # fmt: skip
        child = command("train", *words, logs=place / "logs", prepare=with_pictures)
        code = child.wait()
        after = sorted(str(path) for path in folder.rglob("*") if place not in path.parents)
        problem = f"exit {code}: {child.said()[-300:]!r}" if code not in (0, 2) else None
        problem = problem or (f"written outside: {set(after) - set(before)}" if after != before else None)
        problem = problem or _raw(child, place / "runs" / "run-1", name)
        if code == 0 and not problem:
            words = (data, "--checkpoint", place / "runs" / "run-1" / "best.pth", "--topk", 3)
            predicted = command("predict", *words, logs=place / "predicted")
            problem = None if predicted.wait() == 0 else f"tl-predict: {predicted.said()[-300:]!r}"
            problem = problem or _raw(predicted, place / "none", name)
        outcome.count(f"{name!r}: {problem}" if problem else None)
    return outcome


def _labelled(folder: Path, classes: list[str]) -> Path:
    """A dataset whose labels are in a CSV file, where they may be anything."""
    draw(folder)
    rows = ["id,label,split"]
    for label, colour in zip(classes, ("blue", "green", "red"), strict=True):
        quoted = '"' + label.replace('"', '""') + '"'
        for path in sorted(folder.glob(f"*/{colour}/*.png")):
            rows.append(f"{path.relative_to(folder).as_posix()},{quoted},{path.parts[-3]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", newline="")
    return folder


def _raw(child: Child, run_dir: Path, name: str) -> str | None:
    """Where the name can be seen as it is, if it should not."""
    hostile = [character for character in name if not character.isprintable()]
    shown = child.said() + child.out.read_text(encoding="utf-8", errors="replace")
    if any(character in shown for character in hostile):
        return "raw on the terminal"
    page = run_dir / "report" / "report.html"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if any(character in text for character in hostile if character != "\t") or "<script>alert" in text:
        return "raw in report.html"
    if not run_dir.exists():
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    tags = [tag for found in events.Tags().values() if isinstance(found, list) for tag in found]
    bad = [tag for tag in tags if not tag.isprintable()]
    return f"raw as a TensorBoard tag: {bad}" if bad else None
