"""Files: whole or not at all and in the right order, hashes, folders, and files that would run code when loaded."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from tl_trainer.errors import CheckpointError, InputError, RunError
from tl_trainer.ground.files import (
    cache_folder,
    content_hash,
    make_folder,
    remove_unfinished,
    write_atomically,
    write_text,
)
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.sealed import load_plain

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


# Files that torch.save wrote, or did not


class RunsCode:
    """Pickles as a call, which an ordinary load makes."""

    def __init__(self, function: Callable[..., object], argument: object) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        return self.call


LEAVES_A_MARK = {
    "os.system": RunsCode(os.system, "echo > marker"),
    "exec": RunsCode(exec, "open('marker', 'w').close()"),
    "eval": RunsCode(eval, "open('marker', 'w').close()"),
    "Path.touch": RunsCode(Path.touch, Path("marker")),
}


def as_zip(content: object, path: Path) -> None:
    torch.save(content, path)
    assert zipfile.is_zipfile(path)


def as_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)


def as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def as_new_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [as_zip, as_legacy, as_pickle, as_new_pickle])
@pytest.mark.parametrize("code", LEAVES_A_MARK)
def test_a_file_that_runs_code_is_refused_and_its_code_never_runs(
    save: Callable[[object, Path], None], code: str
) -> None:
    path, marker = Path("best.pth"), Path("marker")
    save({"format": "tl-trainer checkpoint", "weights": LEAVES_A_MARK[code]}, path)
    with pytest.raises(CheckpointError) as caught:
        load_plain(path)
    assert not marker.exists()
    assert str(caught.value) in (
        "best.pth: refused: it holds more than plain data and tensors, which could run code when loaded",
        "best.pth: damaged or not a PyTorch file",
    )
    assert "refused" in str(caught.value) or save is as_new_pickle

    with contextlib.suppress(RuntimeError):  # a plain pickle is no PyTorch file, which is found after its code ran
        torch.load(path, weights_only=False)
    assert marker.exists(), "the file was harmless, so the test showed nothing"


@pytest.mark.parametrize("save", [as_zip, as_legacy])
def test_plain_data_is_loaded(save: Callable[[object, Path], None]) -> None:
    content: dict[str, Any] = {
        "names": ["a", None],
        "nested": {"x": (1, 2.5, True)},
        "weights": torch.arange(6.0).reshape(2, 3),
    }
    save(content, Path("a.pth"))
    loaded = load_plain(Path("a.pth"))
    assert torch.equal(loaded.pop("weights"), content.pop("weights"))
    assert loaded == content


@pytest.mark.parametrize("save", [as_zip, as_legacy])
def test_a_pickled_module_is_refused(save: Callable[[object, Path], None]) -> None:
    save(torch.nn.Linear(2, 2), Path("model.pth"))
    with pytest.raises(CheckpointError, match="refused: it holds more than plain data"):
        load_plain(Path("model.pth"))


@pytest.mark.parametrize("save", [as_zip, as_legacy])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(save: Callable[[object, Path], None], kept: float) -> None:
    path = Path("a.pth")
    save({"weights": torch.ones(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError) as caught:
        load_plain(path)
    assert str(caught.value) == "a.pth: damaged or not a PyTorch file"


@pytest.mark.parametrize(
    "content", [b"", b"hello world\n" * 9, b"\xff\xd8\xff\xe0\0\x10JFIF", b"\x89PNG\r\n\x1a\n", b"80"]
)
def test_another_kind_of_file_is_not_called_dangerous(content: bytes) -> None:
    path = Path("a.pth")
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_plain(path)
    assert str(caught.value) == "a.pth: damaged or not a PyTorch file"


def test_no_file_is_damaged_because_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 9 bytes from file <a.pth>: Cannot allocate memory (12)")

    torch.save([1], "a.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RunError, match=r"a\.pth: out of memory while it was read"):
        load_plain(Path("a.pth"))


def test_a_zip_archive_of_something_else_is_refused() -> None:
    with zipfile.ZipFile("a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a\.pth: damaged or not a PyTorch file"):
        load_plain(Path("a.pth"))


def test_a_missing_file_and_a_folder_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"missing\.pth: cannot be read: No such file or directory"):
        load_plain(Path("missing.pth"))
    Path("folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pth: cannot be read: "):
        load_plain(Path("folder.pth"))


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tl_trainer.files import sole_use\nwith sole_use(Path('.')): pass"
    words = [sys.executable, "-c", code]
    with sole_use(tmp_path):
        refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert "another tl-train is at work in it" in refused.stderr
    assert subprocess.run(words, cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_a_folder_gets_it_in_the_end(tmp_path: Path) -> None:
    code = (
        "import logging; from pathlib import Path; from tl_trainer.files import sole_use\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "with sole_use(Path('.'), wait=True): print(Path('fetched').exists())"
    )
    with sole_use(tmp_path):
        words = [sys.executable, "-c", code]
        waiting = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert "waiting for another process that is at work in ." in waiting.stderr.readline()
        (tmp_path / "fetched").touch()
    assert waiting.communicate(timeout=60)[0] == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_does_not_hold_the_folder(tmp_path: Path) -> None:
    """The loader's workers are forked, and live on for seconds when the run is killed."""
    with sole_use(tmp_path):
        (wait, end), (ready, begun) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begun, b"!")
            os.close(end)
            os.read(wait, 1)
            os._exit(0)
        os.read(ready, 1)
    with sole_use(tmp_path):
        os.close(end)
    os.waitpid(child, 0)
    for descriptor in (wait, ready, begun):
        os.close(descriptor)


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


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with sole_use(tmp_path) as held:
        assert not held
    with pytest.raises(ValueError, match="of the block") as raised, sole_use(tmp_path):
        raise ValueError("of the block")
    assert raised.value.__context__ is None
