"""A download that stands still ends, and nothing else gets its limit; one that broke off goes on where it was."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tl_trainer.errors import InputError
from tl_trainer.ground import downloads
from tl_trainer.ground.downloads import fetch, stall_timeout


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


CONTENT = bytes(range(256)) * 8


class Server(ThreadingHTTPServer):
    """Serves CONTENT, each time as the next word of `plan` says; `asked` are the ranges it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[str] = []
        self.asked: list[str | None] = []
        self.content, self.tag = CONTENT, '"1"'
        self.done = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a.tar"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        word = server.plan.pop(0) if server.plan else "whole"
        if word.isdigit():
            return self.send_error(int(word))
        first = int(wanted[6:-1]) if wanted and self.headers["If-Range"] == server.tag else 0
        if first == len(server.content):
            return self.send_error(416)
        body = server.content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if word == "whole" else body[: len(body) // 2])
        if word == "stall":
            self.wfile.flush()
            server.done.wait(5)
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.done.set()
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("plan", "asked"),
    [
        (["whole"], [None]),
        (["half", "half"], [None, "bytes=1024-", "bytes=1536-"]),
        (["stall", "whole"], [None, "bytes=1024-"]),
        (["500", "half", "whole"], [None, None, "bytes=1024-"]),
    ],
)
def test_it_goes_on_where_it_broke_off(server: Server, tmp_path: Path, plan: list[str], asked: list[str]) -> None:
    server.plan = plan
    fetch(server.url, tmp_path / ".a.part", tmp_path / "a")
    assert (tmp_path / ".a.part").read_bytes() == CONTENT
    assert server.asked == asked
    assert [path.name for path in tmp_path.iterdir()] == [".a.part"]


def test_the_next_process_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.plan = ["half", "500", "stall", "whole"]
    with pytest.raises(InputError) as caught:
        fetch(server.url, tmp_path / ".a.part", tmp_path / "a.tar")
    assert str(caught.value).splitlines() == [
        f"{server.url} cannot be downloaded: nothing came for 0.2 seconds",
        f"Run this again, which goes on after 1,536 bytes, or fetch that file on another machine and put it at "
        f"{tmp_path}/a.tar",
    ]
    fetch(server.url, tmp_path / ".a.part", tmp_path / "a.tar")
    assert (tmp_path / ".a.part").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1024-", "bytes=1024-", "bytes=1536-"]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(server: Server, tmp_path: Path) -> None:
    server.plan = ["half", "404"]
    with pytest.raises(InputError, match="HTTP Error 404"):
        fetch(server.url, tmp_path / ".a.part", tmp_path / "a.tar")
    server.content, server.tag = CONTENT[::-1], '"2"'
    fetch(server.url, tmp_path / ".a.part", tmp_path / "a.tar")
    assert (tmp_path / ".a.part").read_bytes() == CONTENT[::-1]


def test_what_was_all_there_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".a.part").write_bytes(CONTENT)
    (tmp_path / ".a.tag").write_text('"1"')
    fetch(server.url, tmp_path / ".a.part", tmp_path / "a.tar")
    assert server.asked == ["bytes=2048-", None]
    assert (tmp_path / ".a.part").read_bytes() == CONTENT


@pytest.mark.parametrize(("plan", "times", "reason"), [
    (["404"], 1, "HTTP Error 404: Not Found"),
    (["500", "502", "503", "whole"], 3, "HTTP Error 503: Service Unavailable"),
])  # fmt: skip
def test_what_a_server_refuses_is_named(
    server: Server, tmp_path: Path, plan: list[str], times: int, reason: str
) -> None:
    server.plan = plan
    with pytest.raises(InputError, match=reason) as caught:
        fetch(server.url, tmp_path / ".a.part", tmp_path / "a.tar")
    assert len(server.asked) == times
    assert str(caught.value).splitlines()[1].startswith("Run this again, or fetch that file on another machine and")


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(InputError, match=f"http://127.0.0.1:{port}/a cannot be downloaded: .*refused"):
        fetch(f"http://127.0.0.1:{port}/a", tmp_path / ".a.part", tmp_path / "a")
