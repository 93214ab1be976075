"""What the commands share: common flags, logging, version floors, and how an error is shown."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from tl_trainer import __version__
from tl_trainer.errors import InputError
from tl_trainer.ground import distributed
from tl_trainer.ground.failures import as_trainer_error
from tl_trainer.ground.signals import Terminated, raise_terminated
from tl_trainer.ground.wording import printable_lines, shown

TTA = ("flip", "fivecrop", "tencrop")  # what data.transforms.tta_pipelines knows
TTA_HELP = "average over views of each image: with its mirror image, five crops, or five crops and their mirror images"
NO_KEYS = ("config", "checkpoint", "resume", "progress", "stop")  # what the api calls its own parameters
ON_A_CHECKPOINT = "features.cache=off"  # a word that can be set on top of one
OVERRIDES_HELP = f"a key of the configuration that does not change what was trained, such as {ON_A_CHECKPOINT}"
CHECKPOINT_HELP = (
    "a best.pth, a run directory, or a folder of runs, whose newest is taken (default: $TL_CHECKPOINT, else ./runs)"
)
Command = Callable[[argparse.Namespace], int]


def new_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the flags that every command has."""
    parser = argparse.ArgumentParser(
        name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"tl-trainer {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def worker_setting(text: str) -> int | str:
    """The value of -j: a number of processes, or `auto`."""
    if text != "auto" and int(text) < 0:
        raise ValueError
    return text if text == "auto" else int(text)


def given(text: str) -> str:
    """A path. An empty one would be the current folder, and comes from a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; is a shell variable not set?")
    return text


def positive(text: str) -> int:
    """A number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def run_command(parser: argparse.ArgumentParser, command: Command, argv: list[str] | None) -> int:
    """Parse, run, and turn every exception into a sentence on stderr and an exit code."""
    args = parser.parse_intermixed_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    _set_up_logging(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be any bytes
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        _check_floors()
        distributed.join()
        _silence_all_but_first(args)
        return command(args)
    except Terminated as signalled:
        return _fail(parser.prog, "terminated", 143, signalled)
    except KeyboardInterrupt as signalled:
        return _fail(parser.prog, "interrupted", 130, signalled)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        if (told := as_trainer_error(error)) is not None:
            return _fail(parser.prog, str(told), told.exit_code, told)
        if distributed.lost(error):
            return _fail(parser.prog, "another rank has ended; torchrun says which", 1, error)
        said = f"unexpected {type(error).__name__}: {error}\nrun it again with --debug to see where"
        return _fail(parser.prog, said, 1, error)
    finally:
        distributed.leave()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Import torch within the block in two thirds of the time.

    What a module defines is no garbage, but the collector would look through all of it again and again, and once more
    at the end of the process.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def default_checkpoint() -> str:
    """$TL_CHECKPOINT, else the folder of runs, whose newest one is then taken; InputError where that has none."""
    if given := os.environ.get("TL_CHECKPOINT"):
        return given
    if not any(Path("runs").glob("*/best.pth")):
        raise InputError("no checkpoint: give --checkpoint FILE or set TL_CHECKPOINT; ./runs has no best.pth")
    return "runs"


def accuracy(figures: Mapping[str, Any], interval: str = "") -> str:
    """A split's top-1, and its top-5 where that says something (of five classes and fewer it is 1); or mAP and F1."""
    if "mean" in figures:
        heads = "  ".join(f"{key} {value:.1%}" for key, value in figures.items() if "/" in key)
        return f"mean {figures['mean']:.1%}  {heads}"
    if "map" in figures:
        return f"mAP {figures['map']:.1%}  macro F1 at 0.5 {figures['macro_f1']:.1%}"
    top5 = f"  top-5 {figures['top5']:.1%}" if figures["top5"] < 1 else ""
    return f"top-1 {figures['top1']:.1%}{interval}{top5}"


def exists(path: str) -> bool:
    """Whether there is a file or folder of that name. Path.exists raises for a name that is too long."""
    return os.path.exists(path)  # noqa: PTH110


def overrides_of(args: argparse.Namespace, flags: Mapping[str, str], example: str) -> dict[str, Any]:
    """The keys that the command line sets: its key=value words, then the flags that are short for one.

    example: a word that the command takes, for a message.
    """
    from tl_trainer.config.load import parse_override

    words = dict(parse_override(word, example) for word in args.overrides)
    if wrong := [key for key in words if key in NO_KEYS or "__" in key]:
        raise InputError(f"{wrong[0]}: no key of the configuration; write key=value, e.g. {example}")
    given = {key: getattr(args, flag) for flag, key in flags.items() if getattr(args, flag) is not None}
    return {**words, **given}


def settings_of(args: argparse.Namespace, flags: Mapping[str, str]) -> dict[str, Any]:
    """The keys that the words and flags of tl-train and tl-check set; data without --config becomes `args.config`."""
    from tl_trainer.config.data import expand
    from tl_trainer.config.load import data_at

    data = [word for word in args.words if data_at(expand(word))]
    args.overrides = [word for word in args.words if word not in data]
    if strange := [word for word in args.overrides if "=" not in word]:
        if strange[0].endswith((".yaml", ".yml")):
            raise InputError(f"{strange[0]!r} is not an override; write --config {strange[0]}")
        raise InputError(f"{shown(strange[0])} is no folder and no CSV file here, and not key=value")
    if len(data) > 1 or (data and args.data_dir):
        raise InputError(f"two datasets: {' and '.join([*data, *filter(None, [args.data_dir])][:2])}; give one")
    overrides = overrides_of(args, flags, "train.epochs=5")
    if data and args.config is None:
        args.config = str(expand(data[0]).absolute())  # no bundled configuration that is called so
    elif data:
        overrides = {**dict(data_at(expand(data[0]))), **overrides}
    return overrides


def checked(args: argparse.Namespace, overrides: Mapping[str, Any]) -> str:
    """Check the data; what is printed of it."""
    distributed.require_alone("to check the data")
    with without_collection():
        from tl_trainer import api
        from tl_trainer.checks_page import summary

    result = api.check(args.config, progress=not args.quiet, **overrides)

    return json.dumps(result) if args.json else summary(result)


def _fail(program: str, message: str, code: int, error: BaseException) -> int:
    """Say what is wrong, unless another rank has said it or what came of it; the exit code."""
    if (teller := distributed.teller(error)) is not None:
        print(f"{program}: {teller}{printable_lines(message)}", file=sys.stderr)  # noqa: T201
    return code


def _silence_all_but_first(args: argparse.Namespace) -> None:
    """Have rank 0 alone write on stdout and stderr, but for an error."""
    if not distributed.is_first():
        args.quiet = True
        logging.getLogger("tl_trainer").setLevel(logging.CRITICAL + 1)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (to the end of the process)


def _set_up_logging(args: argparse.Namespace) -> None:
    level = logging.WARNING if args.quiet else logging.DEBUG if args.verbose else logging.INFO
    handler = _BarSafeHandler()
    handler.setFormatter(_Formatter())
    package = logging.getLogger("tl_trainer")
    package.handlers[:] = [handler]
    package.setLevel(level)
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread to watch over the bars, which warns where memory is too short to start it


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable_lines(super().format(record))
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


class _BarSafeHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


@functools.cache
def _check_floors() -> None:
    """Refuse library versions below those that pyproject.toml asks for; the floors are there for security."""
    from packaging.requirements import Requirement

    for text in metadata.requires("tl-trainer") or []:
        requirement = Requirement(text)
        if requirement.marker is not None:  # an extra, needed by developers only
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            raise InputError(f"{requirement.name} is not installed; run: pip install '{requirement}'") from None
        if not requirement.specifier.contains(installed, prereleases=True):
            raise InputError(
                f"{requirement.name} {installed} is installed, {requirement.specifier} is needed; "
                f"run: pip install --upgrade '{requirement.name}{requirement.specifier}'"
            )
