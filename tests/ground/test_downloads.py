"""A download that stands still ends, and nothing else gets its limit."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest

from tl_trainer.ground import downloads
from tl_trainer.ground.downloads import stall_timeout


@pytest.fixture(autouse=True)
def _own_limit() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(7)
    yield
    socket.setdefaulttimeout(before)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.05)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        stall_timeout(),
        pytest.raises(TimeoutError, match="timed out"),
    ):
        urllib.request.urlopen(f"http://127.0.0.1:{server.getsockname()[1]}/weights.pth")


def test_the_limit_holds_within_the_block_only() -> None:
    with stall_timeout():
        assert socket.getdefaulttimeout() == downloads.STALL_SECONDS == 25
    assert socket.getdefaulttimeout() == 7
    with pytest.raises(OSError, match="broken off"), stall_timeout():
        raise OSError("broken off")
    assert socket.getdefaulttimeout() == 7
