"""What is loaded: plain data, and never a file that would run code; what is saved has a checksum over all of it."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_trainer.errors import CheckpointError, RunError
from tl_trainer.ground.sealed import check_seal, load_plain, save_sealed

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
        "best.pth: refused: it holds more than plain data and tensors, which could run code when loaded; of a "
        "pickled model save the tensors: torch.save(model.state_dict(), 'weights.pth')",
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


# The seal


def test_what_was_sealed_is_loaded_and_its_seal_is_whole() -> None:
    save_sealed(Path("a.pth"), {"weights": torch.arange(3.0), "names": ["a"]})
    assert check_seal(Path("a.pth"))
    loaded = load_plain(Path("a.pth"))
    assert torch.equal(loaded["weights"], torch.arange(3.0))
    assert loaded["names"] == ["a"]
    assert [path.name for path in Path().iterdir()] == ["a.pth"]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9])
def test_a_bit_that_is_not_as_it_was_is_found(part: float) -> None:
    path = Path("a.pth")
    save_sealed(path, {"weights": torch.ones(1000)})
    data = bytearray(path.read_bytes())
    data[int(part * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        check_seal(path)
    assert str(caught.value) == "a.pth: damaged: its checksum is wrong"


@pytest.mark.parametrize("cut", [1, 42, 100])
def test_a_file_without_its_end_is_not_sealed(cut: int) -> None:
    path = Path("a.pth")
    save_sealed(path, {"weights": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-cut])
    assert not check_seal(path)


def test_a_file_of_torchs_own_is_not_sealed() -> None:
    torch.save({"weights": torch.ones(2)}, "a.pth")
    Path("empty.pth").touch()
    assert not check_seal(Path("a.pth"))
    assert not check_seal(Path("empty.pth"))


def test_a_full_disk_is_named_while_a_file_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_sealed(Path("a.pth"), {"epoch": 1})
    before = Path("a.pth").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write a\.pth: No space left on device"):
        save_sealed(Path("a.pth"), {"epoch": 2})
    assert Path("a.pth").read_bytes() == before
