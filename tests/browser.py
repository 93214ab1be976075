"""A real browser, for the tests of what is made to be looked at in one."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in (Debian's package: chromium)")


def rendered(address: str, profile: Path, *flags: str) -> str:
    """The title that a page has in the end, after five seconds of its own time; waiting for the network is none.

    profile: a folder for the browser's own files.
    """
    assert CHROMIUM is not None
    words = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", *flags, "--virtual-time-budget=5000", "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr
    return html.unescape(title.group(1))
