"""How a message quotes a value, shows a name and lists what would have been right."""

from __future__ import annotations

import difflib
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Sequence

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


def listed(names: Sequence[str], most: int = 5) -> str:
    """Some names on one line: `a, b, c and 12 more`."""
    shown_ = ", ".join(map(printable, names[:most]))
    return shown_ + (f" and {len(names) - most} more" if len(names) > most else "")


def unknown(what: str, given: object, valid: Iterable[str], listed_by: str | None = None) -> str:
    """Say that `given` is not a valid `what`: the nearest valid names, and all of them where they fit on a line.

    listed_by: the command that lists them where they do not fit.
    """
    names = sorted(valid)
    asked = str(given)[:200]
    near = difflib.get_close_matches(asked, names, n=3)
    slip = difflib.get_close_matches(asked, near, cutoff=0.8) and not any(name.startswith(asked) for name in names)
    near = near if slip else _family(asked, names) or near
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    listing = ", ".join(names)
    if len(listing) > 400:
        where = f"listed by `{listed_by}`" if listed_by else f"such as {', '.join(names[:3])}"
        listing = f"{len(names)} names, {where}"
    return f"unknown {what} {shown(given)}{hint} (valid: {listing})"


def _family(given: str, names: Sequence[str]) -> list[str]:
    """The shortest names that begin like `given` and have all its letters in order, as `effnet` and efficientnet_b0."""
    wanted = re.sub(r"[^a-z0-9/]", "", given.lower())
    near = []
    for name in names:
        letters = iter(name.lower())
        if len(wanted) > 2 and name.lower().startswith(wanted[0]) and all(letter in letters for letter in wanted):
            near.append(name)
    return sorted(near, key=lambda name: (not name.lower().startswith(wanted), len(name), name))[:3]
