"""Files: whole or not at all and in the right order, hashes, folders."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from tl_trainer.errors import InputError, RunError
from tl_trainer.ground.files import (
    cache_folder,
    content_hash,
    make_folder,
    numbered_folder,
    remove_unfinished,
    write_atomically,
    write_text,
)

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Atomic writes


def test_write_text_makes_and_replaces_a_file() -> None:
    path = Path("classes.txt")
    for text in ("café\n", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    assert [entry.name for entry in Path().iterdir()] == ["classes.txt"]


def test_a_file_name_that_is_no_utf_8_keeps_its_bytes() -> None:
    write_text(Path("split.csv"), "caf\udce9.jpg,val\ncafé.jpg,train\n")
    assert Path("split.csv").read_bytes() == b"caf\xe9.jpg,val\ncaf\xc3\xa9.jpg,train\n"


def test_the_new_content_is_on_disk_before_it_gets_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        steps.append("fsync folder" if stat.S_ISDIR(status.st_mode) else f"fsync {status.st_size} bytes")
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        steps.append(f"rename to {target.name}, in the same folder: {path.parent == target.parent}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_text(Path("a.txt"), "12345")
    folder = [] if sys.platform == "win32" else ["fsync folder"]
    assert steps == ["fsync 5 bytes", "rename to a.txt, in the same folder: True", *folder]


def fail_with(error: BaseException) -> Callable[[IO[bytes]], None]:
    def write(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NO_SPACE, "cannot write old.txt: No space left on device"),
        (OSError("the server is gone"), "cannot write old.txt: the server is gone"),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
            "cannot write old.txt: the disk is full or a quota is used up",
        ),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error: Exception, message: str) -> None:
    path = Path("old.txt")
    path.write_text("old")
    with pytest.raises(RunError) as caught:
        write_atomically(path, fail_with(error))
    assert str(caught.value) == message
    assert path.read_text() == "old"
    assert list(Path().iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), ValueError("a bug")])
def test_what_is_not_the_disks_fault_is_raised_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        write_atomically(Path("new.txt"), fail_with(error))
    assert caught.value is error
    assert list(Path().iterdir()) == []


def test_a_disk_that_is_full_only_at_fsync_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise NO_SPACE

    path = Path("old.txt")
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(Path().iterdir()) == [path]


@pytest.mark.parametrize("path", [Path("missing/a.txt"), Path("file/a.txt"), Path("folder")])
def test_a_place_that_cannot_be_written_is_a_run_error(path: Path) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    with pytest.raises(RunError, match=f"cannot write {path}: "):
        write_text(path, "new")
    assert sorted(entry.name for entry in Path().iterdir()) == ["file", "folder"]


# Hashes and folders


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_content_hash_is_the_sha256(size: int) -> None:
    path = Path("a.bin")
    path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    assert content_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_make_folder_makes_its_parents_and_leaves_nothing_in_it() -> None:
    for _ in range(2):
        make_folder(Path("runs/nested/deep"), "output.dir")
        assert list(Path("runs/nested/deep").iterdir()) == []


@pytest.mark.parametrize("path", [Path("file"), Path("file/runs")])
def test_make_folder_names_the_setting_where_it_cannot_write(path: Path) -> None:
    Path("file").write_text("in the way")
    with pytest.raises(InputError) as caught:
        make_folder(path, "output.dir")
    assert str(caught.value).startswith(f"cannot write to {path}: ")
    assert str(caught.value).endswith("; choose another folder with output.dir")
    assert Path("file").read_text() == "in the way"


def test_make_folder_tries_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match="cannot write to runs: Read-only file system; choose another folder with --x"):
        make_folder(Path("runs"), "--x")


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {"TL_CACHE": "given"}, "given"),
        ("linux", {"TL_CACHE": "~/given"}, "home/given"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/tl-trainer"),
        ("linux", {}, "home/.cache/tl-trainer"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/tl-trainer"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/tl-trainer"),
        ("win32", {}, "home/AppData/Local/tl-trainer"),
    ],
)
def test_the_cache_is_where_the_platform_wants_it(
    platform: str, environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TL_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", "USERPROFILE": "home", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == Path(folder)


def test_what_a_killed_process_has_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "another's").mkdir()
    names = [".last.pth-7.tmp", "last.pth", "notes.tmp", "report/.report.html-7.tmp", "another's/.last.pth-8.tmp"]
    for name in names:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, tmp_path / "report", tmp_path / "missing")
    assert [name for name in names if (tmp_path / name).exists()] == [
        "last.pth",
        "notes.tmp",
        "another's/.last.pth-8.tmp",
    ]


def test_a_numbered_folder_takes_the_first_free_number(tmp_path: Path) -> None:
    (tmp_path / "photos-1").mkdir()
    (tmp_path / "photos-3").touch()
    names = [numbered_folder(tmp_path, "photos").name for _ in range(2)]
    assert names == ["photos-2", "photos-4"]
    assert all((tmp_path / name).is_dir() for name in names)
