"""Every image is read once: bad ones are named, and one that did not change is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import sqlite3
import sys
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from conftest import draw_split
from forked import forked
from tiny import files_of, paths_of
from tl_trainer.config.data import DataSection
from tl_trainer.data import images, verify
from tl_trainer.data.dataset import SETTLED_SECONDS, Pictures, Split, Stamp
from tl_trainer.data.folders import open_folders
from tl_trainer.data.images import STANDARD, Decoding
from tl_trainer.data.transforms import Pipeline
from tl_trainer.data.verify import Memory, verified
from tl_trainer.errors import DataError, ImageError

COUNT = 6
Policy = Literal["error", "skip"]
SKIP = DataSection(on_bad_image="skip")


class Reads(list[str]):
    """The names of the files that were read, as they are read."""

    def taken(self) -> list[str]:
        """Those since the last call, sorted."""
        names = sorted(self)
        self.clear()
        return names


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What is read; the files are real and are read all the same."""
    found, read = Reads(), images.read

    def counted(path: Path) -> bytes:
        found.append(path.name)
        return read(path)

    monkeypatch.setattr(images, "read", counted)
    return found


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What is decoded, likewise."""
    found, decode = Reads(), images.decode

    def counted(data: bytes, name: Path, *settings: Decoding, draft: int = 0) -> Image.Image:
        found.append(name.name)
        return decode(data, name, *settings, draft=draft)

    monkeypatch.setattr(images, "decode", counted)
    return found


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Six files that were written a minute ago."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{index}.jpg" for index in range(COUNT)]
    for index, path in enumerate(paths):
        write(path, index)
    return files_of(paths)


def write(path: Path, shade: int, size: int = 8, age: float = 60) -> None:
    """A grey picture; its file is as large as that of every other one of its size."""
    path.write_bytes(b"P5 %d %d 255 " % (size, size) + bytes([shade]) * size * size)
    written = time.time() - age
    os.utime(path, (written, written))


def hashes(split: Split, memory: Path = Path("memory.sqlite")) -> list[bytes]:
    return list(verified(split, "train", DataSection(), Memory(memory)).hashes)


def expected(split: Split) -> list[bytes]:
    return [hashlib.sha256(path.read_bytes()).digest() for path in paths_of(split)]


def test_hashes_are_those_of_the_files_in_order(split: Split, reads: Reads) -> None:
    assert hashes(split) == expected(split)
    assert reads.taken() == split.names
    assert hashes(split.subset([4, 0, 4])) == [expected(split)[index] for index in (4, 0, 4)]
    with pytest.raises(DataError, match=r"^none of the 0 train images can be used$"):
        hashes(split.subset([]))


def test_unchanged_files_are_not_read_again(split: Split, reads: Reads) -> None:
    first = hashes(split)
    reads.clear()
    assert hashes(split) == first
    assert hashes(split.subset([5, 1])) == [first[5], first[1]]
    assert reads == []
    assert hashes(split, Path("another.sqlite")) == first
    assert reads.taken() == split.names


def test_sizes_are_those_of_the_files_and_are_remembered(split: Split, reads: Reads) -> None:
    write(paths_of(split)[2], 2, size=5)
    expected = [(8, 8), (8, 8), (5, 5), (8, 8), (8, 8), (8, 8)]
    memory = Memory(Path("memory.sqlite"))
    assert verified(split, "train", DataSection(), memory).sizes == expected
    assert len(reads) == COUNT
    known = verified(split, "train", DataSection(), memory)
    assert known.sizes == expected
    assert len(reads) == COUNT
    assert known.subset([2, 0]).joined(known.subset([1])).sizes == [(8, 8), (8, 8), (5, 5)]


def test_a_file_is_decoded_once_and_not_again_while_it_is_remembered(
    split: Split, reads: Reads, decodes: Reads
) -> None:
    """By one call after another, whatever their splits; without a memory by each call."""
    verified(split.subset([0, 1, 2]), "train", DataSection(), Memory(Path("memory.sqlite")))
    assert reads.taken() == decodes.taken() == ["0.jpg", "1.jpg", "2.jpg"]
    verified(split, "all", SKIP, Memory(Path("memory.sqlite")))
    assert reads.taken() == decodes.taken() == ["3.jpg", "4.jpg", "5.jpg"]
    verified(split, "all", DataSection(), Memory(Path("memory.sqlite")))
    assert reads.taken() == decodes.taken() == []
    for _ in range(2):
        verified(split, "all", DataSection(), None)
        assert reads.taken() == decodes.taken() == split.names


def test_more_files_than_a_query_takes(split: Split, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK", 4)
    first = hashes(split)
    reads.clear()
    assert hashes(split) == first
    assert reads == []


def test_a_relative_path_is_the_same_file(split: Split, reads: Reads, tmp_path: Path) -> None:
    first = hashes(split)
    reads.clear()
    relative = files_of([path.relative_to(tmp_path) for path in paths_of(split)])
    assert hashes(relative) == first
    assert reads == []


def test_a_touched_file_is_read_once_more_and_found_equal(split: Split, reads: Reads) -> None:
    first = hashes(split)
    earlier = time.time() - 30
    os.utime(paths_of(split)[2], (earlier, earlier))
    reads.clear()
    assert hashes(split) == first
    assert reads.taken() == ["2.jpg"]
    assert hashes(split) == first
    assert reads == []


@pytest.mark.parametrize("size", [8, 9])
def test_a_rewritten_file_gets_another_hash(split: Split, reads: Reads, size: int) -> None:
    first = hashes(split)
    write(paths_of(split)[2], 77, size, age=30)
    reads.clear()
    second = hashes(split)
    assert reads.taken() == ["2.jpg"]
    assert second == expected(split)
    assert [index for index in range(COUNT) if first[index] != second[index]] == [2]


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(8, marks=pytest.mark.skipif(sys.platform == "win32", reason="there a file's ctime is its birth")),
        9,
    ],
)
def test_a_file_is_read_again_though_its_time_of_modification_was_put_back(
    split: Split, reads: Reads, size: int
) -> None:
    hashes(split)
    stamp = paths_of(split)[2].stat().st_mtime_ns
    write(paths_of(split)[2], 77, size)
    os.utime(paths_of(split)[2], ns=(stamp, stamp))
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == ["2.jpg"]


@pytest.mark.parametrize("age", [-3600.0, 0.0, SETTLED_SECONDS / 2])
def test_a_file_that_may_still_be_written_is_not_remembered(split: Split, reads: Reads, age: float) -> None:
    write(paths_of(split)[1], 55, age=age)
    hashes(split)
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == ["1.jpg"]


def noise(format: str) -> bytes:
    """A picture of noise, of which every format keeps kilobytes."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), hashlib.shake_256(b"noise").digest(64 * 64 * 3)).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("format", images.FORMATS)
def test_a_file_of_which_only_a_part_decodes_is_found(split: Split, format: str, kept: float) -> None:
    data, path = noise(format), paths_of(split)[3]
    path.write_bytes(data)
    assert hashes(split) == expected(split)
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DataError, match=r"^1 of 6 train images cannot be used;[^\n]*\n[^\n]*3\.jpg: [^\n]+$"):
        hashes(split)


def spoil_middle(path: Path) -> None:
    """Of the same size and dated as before."""
    data, stamp = bytearray(path.read_bytes()), path.stat().st_mtime_ns
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    path.write_bytes(data)
    os.utime(path, ns=(stamp, stamp))


def cut_short(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            spoil_middle, marks=pytest.mark.skipif(sys.platform == "win32", reason="there a file's ctime is its birth")
        ),
        cut_short,
    ],
)
@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_file_that_was_remembered_and_then_damaged_is_found(
    split: Split,
    reads: Reads,
    damage: Callable[[Path], None],
    on_bad_image: Policy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory, path = Memory(Path("memory.sqlite")), paths_of(split)[3]
    path.write_bytes(noise("PNG"))
    os.utime(path, (time.time() - 60,) * 2)
    whole = hashes(split)
    damage(path)
    for _ in range(2):
        reads.clear()
        if on_bad_image == "error":
            with pytest.raises(DataError, match=r"^1 of 6 train images cannot be used;[^\n]*\n.*3\.jpg: damaged image"):
                verified(split, "train", DataSection(on_bad_image=on_bad_image), memory)
        else:
            kept = verified(split, "train", DataSection(on_bad_image=on_bad_image), memory)
            assert [*kept.hashes] == [whole[index] for index in (0, 1, 2, 4, 5)]
            assert "left out 1 of 6 train images that cannot be used" in caplog.text
        assert reads.taken() == ["3.jpg"]
    path.write_bytes(noise("PNG"))
    assert hashes(split) == whole


def test_images_that_leave_their_range_unused_are_counted_and_named_in_every_run(
    split: Split, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, though the files do not change, until the range is set; then they are remembered as others are."""
    for index, largest in ((1, 4095), (4, 1000)):
        Image.fromarray(np.full((8, 8), largest, dtype=np.uint16)).save(path := paths_of(split)[index], "PNG")
        os.utime(path, (time.time() - 60,) * 2)
    for again in (split.names, ["1.jpg", "4.jpg"]):
        caplog.clear()
        hashes(split)
        assert reads.taken() == again
        [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warning == (
            "2 of 6 train images have no grey value above a quarter of their range and would be nearly black, "
            "e.g. 1.jpg, whose largest is 4095; set data.value_range to what is white in them, such as 4095"
        )
    ranged = replace(split, images=split.images.decoded(Decoding(value_range=4095.0)))
    caplog.clear()
    assert hashes(ranged) == hashes(ranged) == expected(split)
    assert reads.taken() == split.names
    assert not caplog.records


def test_only_a_file_that_another_limit_makes_too_large_is_read_again(split: Split, reads: Reads) -> None:
    write(paths_of(split)[2], 1, size=100)
    large, small = (
        replace(split, images=split.images.decoded(Decoding(max_megapixels=limit))) for limit in (0.01, 0.001)
    )
    assert hashes(large) == hashes(large) == expected(split)
    assert reads.taken() == split.names
    with pytest.raises(DataError, match=r"2\.jpg: 100 x 100 pixels are too many \(0\.01 megapixels\); scale it down"):
        hashes(small)
    assert reads.taken() == ["2.jpg"]


def test_an_image_that_becomes_too_large_under_other_transforms_is_found_though_it_is_remembered(
    split: Split, reads: Reads
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for index, exif in ((1, Image.Exif()), (3, turned)):
        Image.new("RGB", (900, 1)).save(path := paths_of(split)[index], "JPEG", exif=exif)
        os.utime(path, (time.time() - 60,) * 2)

    def resized(sides: int | list[int]) -> Split:
        decoding = Decoding(resizes=(Pipeline([{"Resize": sides}], "transforms.eval").sizes,))
        return replace(split, images=split.images.decoded(decoding))

    assert hashes(resized(8)) == hashes(resized([8, 8])) == hashes(resized(9)) == expected(split)
    assert reads.taken() == split.names
    with pytest.raises(DataError, match=r"^2 of 6 .*\n.*1\.jpg: 900 x 1 pixels would be resized to 360,000 x 400"):
        hashes(resized(400))
    assert reads.taken() == ["1.jpg", "3.jpg"]


def test_what_is_no_file_any_more_is_said_in_its_place(split: Split, reads: Reads) -> None:
    good = expected(split)
    hashes(split)
    paths_of(split)[1].write_bytes(b"")
    paths_of(split)[3].unlink()
    paths_of(split)[4].unlink()
    paths_of(split)[4].mkdir()
    reads.clear()
    kept = verified(split, "train", SKIP, Memory(Path("memory.sqlite")))
    assert (kept.names, [*kept.hashes]) == (["0.jpg", "2.jpg", "5.jpg"], [good[index] for index in (0, 2, 5)])
    assert reads.taken() == ["1.jpg", "3.jpg", "4.jpg"]
    for index, reason in [(1, "empty file"), (3, "cannot be read"), (4, "not an ordinary file")]:
        with pytest.raises(DataError, match=rf"^1 of 1 train images [^\n]*\n[^\n]*{index}\.jpg: {reason}"):
            hashes(split.subset([index]))


def test_a_file_that_is_gone_is_not_taken_from_memory(split: Split) -> None:
    hashes(split)
    paths_of(split)[3].unlink()
    with pytest.raises(DataError, match=r"1 of 6 train images cannot be used;[^\n]*\n.*3\.jpg: cannot be read"):
        hashes(split)


def spoil_header(database: Path) -> None:
    database.write_bytes(b"no database" + database.read_bytes()[11:])


def spoil_pages(database: Path) -> None:
    data = database.read_bytes()
    database.write_bytes(data[:1024] + bytes(byte ^ 0xFF for byte in data[1024:]))


def cut(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def other_table(database: Path) -> None:
    database.write_bytes(database.read_bytes().replace(b"hash, w", b"lash, w"))


def broken_table(database: Path) -> None:
    database.write_bytes(database.read_bytes().replace(b"size, modified", b"size, modifie\x00"))


def fewer_columns(database: Path) -> None:
    database.write_bytes(database.read_bytes().replace(b"changed, hash", b"changed  hash"))


def more_columns(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("ALTER TABLE verified ADD COLUMN depth")


@pytest.mark.parametrize(
    "damage", [spoil_header, spoil_pages, cut, other_table, broken_table, fewer_columns, more_columns]
)
def test_a_damaged_database_is_reported_and_made_anew(
    split: Split, reads: Reads, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    hashes(split)
    damage(Path("memory.sqlite"))
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == split.names
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
        assert reads.taken() == split.names
    assert "memory.sqlite cannot be used (unable to open database file); the images are read again" in caplog.text
    assert Path("memory.sqlite").is_dir()


def test_a_database_in_use_is_gone_without_and_kept(
    split: Split, reads: Reads, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes(split)
    connect = sqlite3.connect
    with contextlib.closing(connect("memory.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0))
        reads.clear()
        assert hashes(split) == expected(split)
        assert reads.taken() == split.names
        assert {record.getMessage() for record in caplog.records} == {
            "memory.sqlite cannot be used (database is locked); the images are read again"
        }
    assert hashes(split) == expected(split)
    assert reads == []


def test_the_database_is_asked_once_however_many_images_there_are(
    split: Split, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, asked, connect = split.subset([*range(COUNT)] * 300), [], sqlite3.connect
    hashes(split)
    reads.clear()

    def traced(path: Path, timeout: float) -> sqlite3.Connection:
        connection = connect(path, timeout=timeout)
        connection.set_trace_callback(lambda statement: asked.append(statement.startswith("SELECT")))
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    assert hashes(many) == expected(split) * 300
    assert reads == []
    assert sum(asked) == 1


def test_a_damaged_hash_or_size_in_the_database_is_not_used(split: Split, reads: Reads) -> None:
    hashes(split)
    with contextlib.closing(sqlite3.connect("memory.sqlite")) as connection, connection:
        connection.execute("UPDATE verified SET hash = 'text' WHERE CAST(path AS TEXT) LIKE '%0.jpg'")
        connection.execute("UPDATE verified SET hash = NULL WHERE CAST(path AS TEXT) LIKE '%1.jpg'")
        connection.execute("UPDATE verified SET hash = x'01' WHERE CAST(path AS TEXT) LIKE '%2.jpg'")
        connection.execute("UPDATE verified SET width = NULL WHERE CAST(path AS TEXT) LIKE '%3.jpg'")
        connection.execute("UPDATE verified SET height = '8' || 'x' WHERE CAST(path AS TEXT) LIKE '%4.jpg'")
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads.taken() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert hashes(split) == expected(split)
    assert reads == []


def in_memory(colours: list[str], size: tuple[int, int] = (4, 3)) -> Split:
    pictures = [(Image.new("RGB", size, colour), 0) for colour in colours]
    return Split(Pictures(pictures), [0] * len(colours), range(len(colours)))


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


def verify_again_and_again(split: Split, memory: Path, pipe: Connection) -> None:
    pipe.recv()
    for _ in range(20):
        memory.unlink(missing_ok=True)
        found = hashes(split, memory)
    pipe.send(found)


def test_processes_at_once(split: Split, tmp_path: Path) -> None:
    """Both start with no database, again and again, and take each other's away."""
    started = [forked(verify_again_and_again, split, tmp_path / "memory.sqlite") for _ in range(2)]
    for _, pipe in started:
        pipe.send("go")
    for process, pipe in started:
        assert pipe.recv() == expected(split)
        process.join()
        assert process.exitcode == 0


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text on this system")
def test_a_name_that_is_no_text(split: Split, reads: Reads) -> None:
    odd = Path(os.fsdecode(os.fsencode(paths_of(split)[0]) + b"\xff.jpg"))
    write(odd, 99)
    split = files_of([odd])
    assert hashes(split) == expected(split)
    reads.clear()
    assert hashes(split) == expected(split)
    assert reads == []


@pytest.fixture
def damaged(split: Split) -> Split:
    """The same with an empty and a truncated file."""
    paths_of(split)[2].write_bytes(b"")
    paths_of(split)[5].write_bytes(paths_of(split)[5].read_bytes()[:40])
    return split


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_no_image_is_bad_because_memory_ran_out(
    split: Split, monkeypatch: pytest.MonkeyPatch, on_bad_image: Policy
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "upright_rgb", fail)
    with pytest.raises(MemoryError):
        verified(split, "train", DataSection(on_bad_image=on_bad_image), None)


def test_an_unreadable_image_is_an_error_before_the_first_epoch(damaged: Split) -> None:
    with pytest.raises(DataError) as caught:
        verified(damaged, "train", DataSection(), None)
    first, *rest = str(caught.value).splitlines()
    assert first == (
        "2 of 6 train images cannot be used; replace or remove them, or leave them out with data.on_bad_image=skip"
    )
    assert [line.split(": ")[0] for line in rest] == [str(paths_of(damaged)[index]) for index in (2, 5)]


def test_no_more_than_two_unreadable_images_are_listed(split: Split) -> None:
    for path in paths_of(split):
        path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        verified(split, "val", DataSection(), None)
    assert len(str(caught.value).splitlines()) == 3


def test_unreadable_images_are_skipped_and_counted(
    split: Split, damaged: Split, caplog: pytest.LogCaptureFixture
) -> None:
    kept = verified(damaged, "val", SKIP, None)
    assert list(kept.names) == [f"{index}.jpg" for index in range(6) if index not in (2, 5)]
    assert list(kept.targets) == [0] * 4
    assert list(kept.hashes) == [expected(split)[index] for index in (0, 1, 3, 4)]
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("left out 2 of 6 val images that cannot be used, e.g.\n")
    assert "2.jpg: empty file" in record.getMessage()


def test_what_is_wrong_with_the_skipped_is_told_to_whoever_asks(damaged: Split) -> None:
    wrong: dict[str, str] = {}
    verified(damaged, "val", SKIP, None, skipped=wrong)
    assert [*wrong] == ["2.jpg", "5.jpg"]
    assert wrong["2.jpg"] == f"{paths_of(damaged)[2]}: empty file (0 bytes); replace or remove it"


def test_nothing_left_to_read(split: Split) -> None:
    for path in paths_of(split):
        path.write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"^none of the 6 train images can be used$"):
        verified(split, "train", SKIP, None)


def test_what_is_kept_of_a_bad_image_is_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the frames of each, 800,000 missing images took 2.6 GB."""
    kept: list[ImageError] = []
    monkeypatch.setattr(verify, "_report", lambda bad, *_: kept.extend(bad.values()))
    with pytest.raises(DataError):
        verified(files_of([Path("missing.jpg")]), "train", SKIP, None)
    [error] = kept
    assert str(error) == "missing.jpg: cannot be read: No such file or directory"
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_what_is_bad_is_never_remembered(damaged: Split, reads: Reads) -> None:
    for _ in range(2):
        verified(damaged, "train", SKIP, Memory(Path("memory.sqlite")))
        reads.clear()
    with pytest.raises(DataError, match="2 of 6 train images cannot be used"):
        hashes(damaged)
    assert reads.taken() == ["2.jpg", "5.jpg"]
    write(paths_of(damaged)[2], 2)
    write(paths_of(damaged)[5], 5)
    assert hashes(damaged) == expected(damaged)


def open_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the file's mode: whoever is root may write to it all the same."""
    connect = sqlite3.connect

    def read_only(path: Path, timeout: float) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, timeout=timeout)

    monkeypatch.setattr(sqlite3, "connect", read_only)


def test_an_empty_database_that_may_only_be_read_is_gone_without_and_kept(
    split: Split, reads: Reads, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("memory.sqlite").touch()
    open_read_only(monkeypatch)
    for _ in range(2):
        assert hashes(split) == expected(split)
        assert reads.taken() == split.names
    assert "memory.sqlite cannot be used (attempt to write a readonly database); the images are read" in caplog.text
    assert Path("memory.sqlite").read_bytes() == b""


def test_a_database_that_may_only_be_read_is_used_and_kept(
    split: Split, reads: Reads, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes(split)
    before = Path("memory.sqlite").read_bytes()
    write(paths_of(split)[3], 33, age=30)
    reads.clear()
    open_read_only(monkeypatch)
    assert hashes(split) == expected(split)
    assert reads.taken() == ["3.jpg"]
    assert "memory.sqlite cannot be written (attempt to write a readonly database); the next" in caplog.text
    assert Path("memory.sqlite").read_bytes() == before


def test_what_is_wrong_with_the_database_is_said_once_for_all_splits(
    split: Split, caplog: pytest.LogCaptureFixture, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes(split.subset([4, 5]))
    reads.clear()
    with monkeypatch.context() as patched:
        open_read_only(patched)
        memory = Memory(Path("memory.sqlite"))
        for part in ([0, 1], [2, 3], [4, 5]):
            verified(split.subset(part), "train", DataSection(), memory)
    assert reads.taken() == split.names[:4]
    [record] = caplog.records
    assert "cannot be written" in record.getMessage()
    caplog.clear()
    Path("memory.sqlite").unlink()
    Path("memory.sqlite").mkdir()
    memory = Memory(Path("memory.sqlite"))
    for part in ([0, 1], [2, 3]):
        verified(split.subset(part), "train", DataSection(), memory)
    [record] = caplog.records
    assert "cannot be used (unable to open database file)" in record.getMessage()


def test_without_a_memory_nothing_is_written(split: Split, reads: Reads) -> None:
    for _ in range(2):
        assert [*verified(split, "train", DataSection(), None).hashes] == expected(split)
        assert reads.taken() == split.names
    assert not list(Path().glob("*.sqlite"))


def test_the_memory_is_one_for_all_splits_and_its_folder_is_made(split: Split, reads: Reads) -> None:
    memory = Path("a/b/memory.sqlite")
    hashes(split.subset([0, 1, 2]), memory)
    hashes(split.subset([3, 4, 5]), memory)
    reads.clear()
    assert hashes(split, memory) == expected(split)
    assert reads == []


def test_readable_images_are_passed_on_as_they_are(split: Split, tmp_path: Path) -> None:
    found = verified(split, "train", DataSection(), None)
    assert (found.images, found.names, found.targets, found.rows) == (
        split.images, split.names, list(split.targets), array("q", split.rows)
    )  # fmt: skip
    draw_split(tmp_path / "photos", 2, size=4)
    photos = open_folders(tmp_path / "photos", None).split("all").subset([5, 0, 3])
    found = verified(photos, "train", DataSection(), Memory(Path("memory.sqlite")))
    assert (found.names, found.targets) == (photos.names, photos.targets)
    assert [found.open(index).tobytes() for index in range(3)] == [photos.open(index).tobytes() for index in range(3)]


class Shards:
    """Images of another kind: shades of grey by number, the odd ones out of reach."""

    decoding = STANDARD

    def __len__(self) -> int:
        return COUNT

    def name(self, index: int) -> str:
        return f"shard 0, {index}"

    def load(self, index: int, expected: bytes = b"", *, draft: int = 0) -> tuple[Image.Image, bytes]:
        if index % 2:
            raise ImageError(f"{self.name(index)}: out of reach")
        return Image.new("RGB", (4, 4), (index, index, index)), bytes([index]) * 32

    def stamp(self, index: int) -> Stamp | None:
        return Stamp(b"shard 0, %d" % index, 48, 1, 1)


def test_images_of_another_kind_are_verified_and_remembered_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    split, memory = Split(Shards(), [0, 1] * 3, range(COUNT)), Memory(Path("memory.sqlite"))
    with pytest.raises(
        DataError, match=r"^3 of 6 test images [^\n]*\nshard 0, 1: out of reach\nshard 0, 3: out of reach$"
    ):
        verified(split, "test", DataSection(), memory)
    kept = verified(split, "test", SKIP, memory)
    assert kept.names == ["shard 0, 0", "shard 0, 2", "shard 0, 4"]
    assert kept.open(2).getpixel((0, 0)) == (4, 4, 4)
    monkeypatch.delattr(Shards, "load")
    assert [*verified(kept, "test", DataSection(), memory).hashes] == [*kept.hashes]
