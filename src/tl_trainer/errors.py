"""The exceptions a user can meet, as a small tree.

Each one is shown as one to three lines that name the file, the key or the line, and the remedy. `exit_code` is what
the commands end with: 2 for a wrong input, 1 for a run that failed, 128 + the signal's number for a signal.
"""

from __future__ import annotations

import difflib
import errno
import reprlib
import threading
import unicodedata
from collections.abc import Iterable


class TrainerError(Exception):
    """Anything the user is told about in a sentence instead of a traceback."""

    exit_code = 1


class RunError(TrainerError):
    """The inputs were right and the run failed all the same (disk full, out of memory, a loss that is not finite)."""


class InputError(TrainerError):
    """The user's input is wrong: usage, a file, a folder."""

    exit_code = 2


class DataError(InputError):
    """The dataset is not what was announced: classes, labels, images."""


class ImageError(DataError):
    """One image file cannot be used."""


class CheckpointError(InputError):
    """A checkpoint is not ours, is damaged, or does not fit."""


class SettingError(InputError):
    """One configuration key has a wrong value; the assembler adds the file and the line.

    `key` is the dotted path as it stands in the configuration, e.g. `model.backbone` or `transforms.train[2]`.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class ConfigError(InputError):
    """Everything that is wrong with a configuration, one line each."""


class Interrupted(TrainerError):
    """A signal ended the run after its state was saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


_NO_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
    "can't start new thread",
)  # fmt: skip
# oneDNN's words, the whole of them: where it cannot do what it was asked for, it has no *descriptor* of a primitive.
_NO_MEMORY_IN_ONEDNN = (
    "could not create a primitive", "could not create a memory object", "could not execute a primitive"
)  # fmt: skip
_SPARE = 256 << 20  # bytes, without which hardly a step of a network can work
_TRYING = threading.Lock()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, in the words of Python, torch, its libraries or the system.

    Whoever calls a file damaged because reading it failed asks first.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or text in _NO_MEMORY_IN_ONEDNN or any(words in text for words in _NO_MEMORY)


def require_memory() -> None:
    """Raise RunError where so little memory is left that the system would abort the process for want of it."""
    if memory_is_short():
        raise RunError(
            f"out of memory: fewer than {_SPARE >> 20} MB are left for the network; close other programs, or raise the "
            "limit on this one (ulimit -v)"
        )


def memory_is_short() -> bool:
    """Whether hardly any memory can be had. It is tried; zeros that nobody reads take addresses and no memory."""
    with _TRYING:  # or threads would take the room from each other
        try:
            bytes(_SPARE)
        except MemoryError:
            return True
    return False


_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 120


def shown(given: object) -> str:
    """A value as a message quotes it: cut to a line, however long it is."""
    return "nothing" if given is None else _QUOTE.repr(given)


_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def printable(text: str) -> str:
    """The text on one line, with control and direction characters as escapes: a name must not move the cursor."""
    return "".join(
        character.encode("unicode_escape").decode() if _moves_the_cursor(character) else character for character in text
    )


def _moves_the_cursor(character: str) -> bool:
    """Joiners and the other invisible characters that ordinary text needs do not."""
    direction = unicodedata.bidirectional(character) in _DIRECTIONS or character in "\u061c\u200e\u200f"
    return direction or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def printable_lines(text: str) -> str:
    """The same for a message of several lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


def unknown(what: str, given: object, valid: Iterable[str]) -> str:
    """Say that `given` is not a valid `what`: the nearest valid names, and all of them where they fit on a line."""
    names = sorted(valid)
    near = difflib.get_close_matches(str(given)[:200], names, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    listing = ", ".join(names)
    if len(listing) > 400:
        listing = f"{len(names)} names, listed by `tl-train --print-schema`"
    return f"unknown {what} {shown(given)}{hint} (valid: {listing})"
