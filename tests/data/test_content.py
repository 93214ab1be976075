"""Content hashes: what is in a file decides, and a file that did not change is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tl_trainer.data import content, images
from tl_trainer.data.content import SETTLED_SECONDS, content_hashes, contents, forget
from tl_trainer.data.dataset import Split
from tl_trainer.errors import ImageError

COUNT = 6


class Reads(list[str]):
    """The names of the files that were read, as they are read."""

    def taken(self) -> list[str]:
        """Those since the last call, sorted."""
        names = sorted(self)
        self.clear()
        return names


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What content_hashes reads; the files are real and are read all the same."""
    found, read = Reads(), images.read

    def counted(path: Path) -> bytes:
        found.append(path.name)
        return read(path)

    monkeypatch.setattr(images, "read", counted)
    return found


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Six files that were written a minute ago."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{index}.jpg" for index in range(COUNT)]
    for index, path in enumerate(paths):
        write(path, b"picture %d" % index)
    return Split([path.name for path in paths], [0] * COUNT, paths)


def write(path: Path, data: bytes, age: float = 60) -> None:
    path.write_bytes(data)
    written = time.time() - age
    os.utime(path, (written, written))


def hashes(split: Split, memory: Path = Path("memory.sqlite")) -> list[bytes | ImageError]:
    with ThreadPoolExecutor(2) as pool:
        return content_hashes(split, memory, pool)


def names(split: Split) -> list[str]:
    return list(split.names)


def expected(split: Split) -> list[bytes]:
    assert split.paths is not None
    return [hashlib.sha256(path.read_bytes()).digest() for path in split.paths]


def test_hashes_are_those_of_the_files_in_order(split: Split, reads: Reads) -> None:
    assert hashes(split) == expected(split)
    assert reads.taken() == names(split)
    assert hashes(split.subset([4, 0, 4])) == [expected(split)[index] for index in (4, 0, 4)]
    assert hashes(split.subset([])) == []


def test_unchanged_files_are_not_read_again(split: Split, reads: Reads) -> None:
    first = hashes(split)
    reads.clear()
    assert hashes(split) == first
    assert hashes(split.subset([5, 1])) == [first[5], first[1]]
    assert reads == []
    assert hashes(split, Path("another.sqlite")) == first
    assert reads.taken() == names(split)


def test_more_files_than_a_query_takes(split: Split, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_CHUNK", 4)
    first = hashes(split)
    reads.clear()
    assert hashes(split) == first
    assert reads == []


def test_a_relative_path_is_the_same_file(split: Split, reads: Reads, tmp_path: Path) -> None:
    first = hashes(split)
    reads.clear()
    assert split.paths is not None
    relative = Split(split.names, split.targets, [path.relative_to(tmp_path) for path in split.paths])
    assert hashes(relative) == first
    assert reads == []


def test_a_touched_file_is_read_once_more_and_found_equal(split: Split, reads: Reads) -> None:
    first = hashes(split)
    assert split.paths is not None
    earlier = time.time() - 30
    os.utime(split.paths[2], (earlier, earlier))
    reads.clear()
    assert hashes(split) == first
    assert reads.taken() == ["2.jpg"]
    assert hashes(split) == first
    assert reads == []


@pytest.mark.parametrize("data", [b"PICTURE 2", b"longer than before"])
def test_a_rewritten_file_gets_another_hash(split: Split, reads: Reads, data: bytes) -> None:
    first = hashes(split)
    assert split.paths is not None
    write(split.paths[2], data, age=30)
    reads.clear()
    second = hashes(split)
    assert reads.taken() == ["2.jpg"]
    assert second == expected(split)
    assert [index for index in range(COUNT) if first[index] != second[index]] == [2]


def test_another_size_is_enough_to_read_a_file_again(split: Split, reads: Reads) -> None:
    hashes(split)
    assert split.paths is not None
    stamp = split.paths[2].stat().st_mtime_ns
    split.paths[2].write_bytes(b"longer than before")
    os.utime(split.paths[2], ns=(stamp, stamp))
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == ["2.jpg"]


@pytest.mark.parametrize("age", [-3600.0, 0.0, SETTLED_SECONDS / 2])
def test_a_file_that_may_still_be_written_is_not_remembered(split: Split, reads: Reads, age: float) -> None:
    assert split.paths is not None
    write(split.paths[1], b"just now", age=age)
    hashes(split)
    stamp = split.paths[1].stat().st_mtime_ns
    split.paths[1].write_bytes(b"NOW JUST")  # within the clock's resolution: the same size and time
    os.utime(split.paths[1], ns=(stamp, stamp))
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == ["1.jpg"]


def test_files_that_cannot_be_read_are_said_in_their_place(split: Split, reads: Reads) -> None:
    assert split.paths is not None
    good = expected(split)
    split.paths[1].write_bytes(b"")
    split.paths[3].unlink()
    split.paths[4].unlink()
    split.paths[4].mkdir()
    found = hashes(split)
    assert [found[index] for index in (0, 2, 5)] == [good[index] for index in (0, 2, 5)]
    for index, reason in [(1, "empty file"), (3, "cannot be read"), (4, "not an ordinary file")]:
        assert isinstance(found[index], ImageError)
        assert reason in str(found[index])
        assert f"{index}.jpg" in str(found[index])
    write(split.paths[1], b"picture 1")
    reads.clear()
    assert hashes(split)[1] == good[1]
    assert reads.taken() == ["1.jpg", "3.jpg", "4.jpg"]


def test_forgotten_files_are_read_again(split: Split, reads: Reads) -> None:
    hashes(split)
    forget(split, [4, 1], Path("memory.sqlite"))
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == ["1.jpg", "4.jpg"]
    forget(in_memory(["red"]), [0], Path("memory.sqlite"))


def test_a_file_that_is_gone_is_not_taken_from_memory(split: Split) -> None:
    hashes(split)
    assert split.paths is not None
    split.paths[3].unlink()
    assert isinstance(hashes(split)[3], ImageError)


def spoil_header(database: Path) -> None:
    database.write_bytes(b"no database" + database.read_bytes()[11:])


def spoil_pages(database: Path) -> None:
    data = database.read_bytes()
    database.write_bytes(data[:1024] + bytes(byte ^ 0xFF for byte in data[1024:]))


def cut(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def other_table(database: Path) -> None:
    database.write_bytes(database.read_bytes().replace(b"hash)", b"lash)"))


@pytest.mark.parametrize("damage", [spoil_header, spoil_pages, cut, other_table])
def test_a_damaged_database_is_reported_and_made_anew(
    split: Split, reads: Reads, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    hashes(split)
    damage(Path("memory.sqlite"))
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == names(split)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "memory.sqlite is damaged" in caplog.text
    caplog.clear()
    assert hashes(split) == expected(split)
    assert reads == []
    assert not caplog.records


def test_a_database_that_cannot_be_opened_costs_the_memory_only(
    split: Split, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    Path("memory.sqlite").mkdir()
    for _ in range(2):
        assert hashes(split) == expected(split)
        assert reads.taken() == names(split)
    assert "memory.sqlite" in caplog.text


def test_a_damaged_hash_in_the_database_is_not_used(split: Split, reads: Reads) -> None:
    hashes(split)
    with contextlib.closing(sqlite3.connect("memory.sqlite")) as connection, connection:
        connection.execute("UPDATE files SET hash = 'text' WHERE CAST(path AS TEXT) LIKE '%0.jpg'")
        connection.execute("UPDATE files SET hash = NULL WHERE CAST(path AS TEXT) LIKE '%1.jpg'")
        connection.execute("UPDATE files SET hash = x'01' WHERE CAST(path AS TEXT) LIKE '%2.jpg'")
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == ["0.jpg", "1.jpg", "2.jpg"]
    assert hashes(split) == expected(split)
    assert reads == []


def in_memory(colours: list[str], size: tuple[int, int] = (4, 3)) -> Split:
    pictures = [(Image.new("RGB", size, colour), 0) for colour in colours]
    return Split(colours, [0] * len(colours), None, pictures, range(len(colours)))


def test_pictures_in_memory_are_hashed_by_their_pixels(tmp_path: Path) -> None:
    memory = tmp_path / "memory.sqlite"
    red, green, again = hashes(in_memory(["red", "green", "red"]), memory)
    assert isinstance(red, bytes)
    assert len(red) == 32
    assert red == again != green
    assert hashes(in_memory(["green", "red"]), memory) == [green, red]
    assert hashes(in_memory(["red", "green", "blue"]).subset([1, 0]), memory) == [green, red]
    assert hashes(in_memory(["red"], (3, 4)), memory) != [red]  # the same bytes, but turned
    assert not memory.exists()


def test_threads_at_once(split: Split) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: hashes(split), range(24)))
    assert found == [expected(split)] * 24


PROGRAM = """
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from tl_trainer.data.content import content_hashes
    from tl_trainer.data.dataset import Split

    memory, *paths = map(Path, sys.argv[1:])
    split = Split([path.name for path in paths], [0] * len(paths), paths)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(20):
        memory.unlink(missing_ok=True)
        with ThreadPoolExecutor(2) as pool:
            found = content_hashes(split, memory, pool)
    print(*(digest.hex() for digest in found))
"""


def test_processes_at_once(split: Split, tmp_path: Path) -> None:
    """Both start with no database, again and again, and take each other's away."""
    assert split.paths is not None
    words = [sys.executable, "-c", textwrap.dedent(PROGRAM), tmp_path / "memory.sqlite", *split.paths]
    processes = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.split() == [digest.hex() for digest in expected(split)]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text on this system")
def test_a_name_that_is_no_text(split: Split, reads: Reads) -> None:
    assert split.paths is not None
    odd = Path(os.fsdecode(os.fsencode(split.paths[0]) + b"\xff.jpg"))
    write(odd, b"odd")
    split = Split(["odd"], [0], [odd])
    assert hashes(split) == expected(split)
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads == []
    forget(split, [0], Path("memory.sqlite"))
    hashes(split)
    assert len(reads) == 1


def test_a_split_that_was_read_keeps_its_contents(split: Split, reads: Reads) -> None:
    assert split.paths is not None
    known = replace(split, digests=expected(split))
    write(split.paths[2], b"another picture")
    found = hashes(known)
    assert [isinstance(item, ImageError) for item in found] == [index == 2 for index in range(COUNT)]
    assert str(found[2]) == f"{split.paths[2]}: has changed since it was read first; put it back, or start again"
    reads.clear()
    assert contents(known, None) == [digest.hex()[:16] for digest in known.digests]
    assert not reads
