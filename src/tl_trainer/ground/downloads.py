"""Downloads that cannot stand still for ever, and that go on where they broke off."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tl_trainer.errors import InputError
from tl_trainer.ground.progress import bar

STALL_SECONDS = 25
TRIES, PAUSE_SECONDS = 3, 1.0
_MEGABYTE = 1 << 20


@contextlib.contextmanager
def stall_timeout() -> Iterator[None]:
    """Within the block a download that stands still ends; torch's and torchvision's have no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fetch(url: str, part: Path, place: Path) -> None:
    """Download into `part`, which is all there when this returns; the caller checks it and moves it to `place`.

    What is in `part` of an earlier try is kept where the server says that the file is still the same. Raises
    InputError after TRIES, or at once where the server refuses the file (4xx).
    """
    reason: Exception = OSError()
    with stall_timeout():
        for attempt in range(TRIES):
            try:
                time.sleep(attempt * PAUSE_SECONDS)
                return _go_on(url, part)
            except (OSError, HTTPException) as error:  # URLError and HTTPError are OSErrors
                reason = error
                if isinstance(error, HTTPError):
                    error.close()
                    if error.code == 416:  # it was all there, or is another file by now
                        part.unlink(missing_ok=True)
                    elif 400 <= error.code < 500:
                        break
    there = part.stat().st_size if part.exists() else 0
    said = reason if isinstance(reason, HTTPError) else getattr(reason, "reason", reason)
    if isinstance(said, TimeoutError):
        said = f"nothing came for {STALL_SECONDS:g} seconds"
    raise InputError(
        f"{url} cannot be downloaded: {said}\n"
        f"Run this again{f', which goes on after {there:,} bytes' if there else ''}, or fetch that file on another "
        f"machine and put it at {place}"
    ) from reason


def _go_on(url: str, part: Path) -> None:
    """One try, from where `part` ends; OSError or HTTPException where it breaks off."""
    tag = part.with_suffix(".tag")  # what the server calls this version of the file
    there = part.stat().st_size if part.exists() and tag.exists() else 0
    wanted = {"Range": f"bytes={there}-", "If-Range": tag.read_text("latin-1")} if there else {}
    with urlopen(Request(url, headers=wanted)) as answer:
        if answer.status != 206:
            there = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            raise ConnectionError(f"the server sent other bytes than those from {there:,} on")
        tag.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "", "latin-1")
        if not tag.stat().st_size:
            tag.unlink()
        length = answer.headers.get("Content-Length")
        with part.open("ab" if there else "wb") as file:
            for _ in bar(_megabytes(answer, file), part.stem, int(length or 0) // _MEGABYTE or None, unit="MB"):
                pass
            got = file.tell() - there
    if length is not None and got < int(length):
        raise ConnectionError(f"the connection broke off after {there + got:,} of {there + int(length):,} bytes")
    tag.unlink(missing_ok=True)


def _megabytes(answer: HTTPResponse, file: IO[bytes]) -> Iterator[int]:
    """Write what comes, at once, since what is written is not asked for again; give the number of each megabyte."""
    got = 0
    while block := answer.read1(_MEGABYTE):
        file.write(block)
        yield from range(got // _MEGABYTE, (got + len(block)) // _MEGABYTE)
        got += len(block)
