"""Patterns with braces, * or an http(s) address -> local files; what is on a server is downloaded once."""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import re
from collections import Counter
from pathlib import Path

from tl_trainer.errors import DataError, InputError
from tl_trainer.ground.downloads import fetch
from tl_trainer.ground.files import cache_folder, content_hash
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.wording import listed

log = logging.getLogger(__name__)

CHECKSUMS = "shards.csv"  # beside the files: the columns name, samples, bytes, sha256
MOST_FILES = 1_000_000
FILES = (".tar", ".parquet")


def files_of(pattern: str | list[str], root: Path, download: bool) -> list[Path]:
    """The files that a pattern names, those of a server downloaded. DataError, with what is there, for none."""
    found: list[Path] = []
    patterns = [pattern] if isinstance(pattern, str) else pattern
    for name in (name for one in patterns for name in ([one] if (root / one).is_file() else braced(one))):
        path = root / name
        if name.startswith(("http://", "https://")):
            found.append(_fetched(name, download))
        elif path.is_file():  # its name may have brackets
            found.append(path)
        elif not glob.has_magic(name):
            raise DataError(f"{path}: no such file; {_there(path)}")
        else:
            matches = [root / match for match in sorted(glob.glob(name, root_dir=root, recursive=True))]  # noqa: PTH207
            files = [match for match in matches if match.is_file()]
            if not files:
                raise DataError(f"{path}: nothing matches; {_there(path)}")
            found += files
    if twice := [path for path, times in Counter(found).items() if times > 1]:
        raise DataError(f"{twice[0]}: named twice by {listed(patterns)}")
    return found


def short_names(paths: list[Path]) -> list[str]:
    """What images in the files are called after: their last parts, where all differ, else the whole paths."""
    different = len({path.name for path in paths}) == len(paths)
    return [path.name if different else path.as_posix() for path in paths]


def braced(pattern: str) -> list[str]:
    """What a shell makes of braces: `a-{00..02}` is a-00, a-01, a-02, and `{a,b}` is a, b."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < MOST_FILES:
            raise DataError(f"{pattern}: {match[0]} must count up, at most to {MOST_FILES:,} files")
        parts = [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]
    else:
        parts = match[1].split(",")
    return [name for part in parts for name in braced(pattern[: match.start()] + part + pattern[match.end() :])]


def _there(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}; set data.root or the pattern"
    return f"{folder} has {listed(sorted(entry.name for entry in folder.iterdir())) or 'nothing in it'}"


def _fetched(url: str, download: bool) -> Path:
    """The file at an address: in the cache, checked by its size, and its SHA-256 where CHECKSUMS is beside it.

    What follows ? is a token where a file is named before it; else it says which file is meant.
    """
    base, _, name = url.partition("?")[0].rpartition("/")
    place = base if name.endswith(FILES) else url
    folder = cache_folder() / "shards" / hashlib.sha256(place.encode()).hexdigest()[:16]
    path = folder / name
    if path.is_file():
        return path
    if not download:
        raise DataError(f"{url} is not at {path}, and data.download is false; set it to true")
    folder.mkdir(parents=True, exist_ok=True)
    with sole_use(folder, wait=True):
        if not path.is_file():  # by now
            log.info("downloading %s", url)
            part = path.with_name(f".{name}.part")
            fetch(url, part, path)
            known = _checksums(base, folder).get(name)
            if known is not None and content_hash(part) != known:
                part.unlink()
                (folder / CHECKSUMS).unlink()  # it may be the one that is wrong
                raise DataError(f"{url}: damaged: its SHA-256 is not that in {base}/{CHECKSUMS}; run this again")
            part.replace(path)
    return path


def _checksums(base: str, folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that CHECKSUMS lists; none where the server has no such file."""
    path = folder / CHECKSUMS
    if not path.is_file():
        try:
            fetch(f"{base}/{CHECKSUMS}", folder / f".{CHECKSUMS}.part", path)
        except InputError as error:
            if getattr(error.__cause__, "code", 0) not in (403, 404, 410):
                raise
            log.debug("%s has no %s; its files are checked by their sizes", base, CHECKSUMS)
            return {}
        (folder / f".{CHECKSUMS}.part").replace(path)
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row["sha256"] for row in csv.DictReader(file) if row.keys() >= {"name", "sha256"}}
