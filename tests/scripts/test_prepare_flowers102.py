"""scripts/prepare_flowers102.py on small archives: what it writes, and wrong, damaged and hostile ones."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from conftest import load_script
from tl_trainer.data.folders import open_folders

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_flowers102.py"
LABELS = [102, 9, 10, 9, 10, 102, 10, 9, 102, 10, 102, 9]  # the class number of images 1 to 12
SETS = {"trnid": [1, 2, 3, 12], "valid": [6, 4, 5], "tstid": [7, 8, 9, 10, 11]}
FOLDERS = {"train": "trnid", "valid": "valid", "test": "tstid"}

Members = dict[str, bytes | tarfile.TarInfo]


@pytest.fixture
def script() -> ModuleType:
    return load_script(SCRIPT)


def _images() -> Members:
    return {f"jpg/image_{number:05}.jpg": b"JPEG %d" % number for number in range(1, len(LABELS) + 1)}


def _link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


def _make_source(folder: Path, members: Members, labels: Any = LABELS, sets: dict[str, list[int]] = SETS) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        top = tarfile.TarInfo("jpg")
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name, content in members.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.name = name
            data = content if isinstance(content, bytes) else b""
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([numbers], dtype=np.uint16) for name, numbers in sets.items()})
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return _make_source(tmp_path / "source", _images())


def _expected() -> dict[str, bytes]:
    return {
        f"{split}/{LABELS[number - 1]:03}/image_{number:05}.jpg": b"JPEG %d" % number
        for split, name in FOLDERS.items()
        for number in SETS[name]
    }


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _fails(script: ModuleType, source: Path, destination: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a run that must fail with exit code 2 and leave nothing behind."""
    before = set(source.parent.rglob("*"))
    assert script.main([str(source), str(destination)]) == 2
    assert set(source.parent.rglob("*")) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("prepare_flowers102.py: ")
    return line.removeprefix("prepare_flowers102.py: ")


def test_from_the_shell(source: Path, tmp_path: Path) -> None:
    """As a user runs it, here with the Python of the tests."""
    result = subprocess.run(
        [sys.executable, SCRIPT, source, "my flowers"], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "my flowers: 4 train, 3 valid, 5 test images",
        "now run: tl-train --config flowers102.yaml data.source=imagefolder --data-dir 'my flowers'",
    ]
    assert _files(tmp_path / "my flowers") == _expected()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my flowers", "source"]


def test_it_is_a_program() -> None:
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
    assert os.name == "nt" or os.access(SCRIPT, os.X_OK)


def test_tl_train_can_read_it(script: ModuleType, source: Path, tmp_path: Path) -> None:
    assert script.main([str(source), str(tmp_path / "flowers")]) == 0
    dataset = open_folders(tmp_path / "flowers", None)
    assert dataset.classes == ["009", "010", "102"]  # in the order of the numbers
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 4, "val": 3, "test": 5}


@pytest.mark.parametrize("there", [False, True], ids=["below a missing folder", "an empty folder"])
def test_where_it_may_write(script: ModuleType, source: Path, tmp_path: Path, there: bool) -> None:
    destination = tmp_path / "new" / "flowers"
    if there:
        destination.mkdir(parents=True)
    assert script.main([str(source), str(destination)]) == 0
    assert _files(destination) == _expected()
    assert list(destination.parent.iterdir()) == [destination]


@pytest.mark.parametrize("names", [["102flowers.tgz"], ["imagelabels.mat", "setid.mat"]], ids=str)
def test_a_missing_file(
    script: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    for name in names:
        (source / name).unlink()
    assert _fails(script, source, tmp_path / "flowers", capsys) == (
        f"{source}: no {', '.join(names)}; it must hold 102flowers.tgz, imagelabels.mat and setid.mat"
    )


def test_a_missing_source(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complaint = _fails(script, tmp_path / "nowhere", tmp_path / "flowers", capsys)
    assert "no 102flowers.tgz, imagelabels.mat, setid.mat" in complaint


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_destination_in_use(
    script: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    mine = tmp_path / "flowers" / "mine.txt" if kind == "folder" else tmp_path / "flowers"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    complaint = _fails(script, source, tmp_path / "flowers", capsys)
    assert complaint == f"{tmp_path / 'flowers'}: exists and is not an empty folder; remove it or choose another"
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"<html>404</html>",
        lambda data: data[: len(data) // 2],
        lambda data: gzip.compress(b"no tar archive" * 1000),
        lambda data: gzip.compress(gzip.decompress(data)[:2000]),
        lambda data: data[:100] + bytes(50) + data[150:],
    ],
    ids=["empty", "a web page", "half", "no tar inside", "half a tar inside", "zeros inside"],
)
def test_a_damaged_archive(
    script: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    archive = source / "102flowers.tgz"
    archive.write_bytes(damage(archive.read_bytes()))
    complaint = _fails(script, source, tmp_path / "flowers", capsys)
    assert complaint.startswith(f"{archive}: ")
    assert "damaged archive (" in complaint or "images are not in it, e.g. jpg/image_0000" in complaint


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"MATLAB 5.0" + bytes(300)], ids=["empty", "text", "zeros"]
)
def test_a_damaged_mat_file(
    script: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (source / name).write_bytes(content)
    complaint = _fails(script, source, tmp_path / "flowers", capsys)
    assert complaint.startswith(f"{source / name}: damaged, or not a MATLAB file with the numbers ")


def test_a_mat_file_without_the_variable(
    script: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    savemat(source / "setid.mat", {"trnid": np.array([[1, 2]])})
    assert _fails(script, source, tmp_path / "flowers", capsys).endswith("with the numbers 'valid'")


@pytest.mark.parametrize(
    ("labels", "sets", "complaint"),
    [
        ([103, *LABELS[1:]], SETS, "imagelabels.mat: image 1 has label 103, not 1 to 102"),
        ([0, *LABELS[1:]], SETS, "imagelabels.mat: image 1 has label 0, not 1 to 102"),
        (LABELS[:10], SETS, "setid.mat: image 12 of trnid is listed twice or not in imagelabels.mat"),
        (LABELS, {**SETS, "valid": [4, 0]}, "setid.mat: image 0 of valid is listed twice or not in imagelabels.mat"),
        (LABELS, {**SETS, "tstid": [7, 12]}, "setid.mat: image 12 of tstid is listed twice or not in imagelabels.mat"),
    ],
)
def test_numbers_out_of_range(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    labels: list[int],
    sets: dict[str, list[int]],
    complaint: str,
) -> None:
    source = _make_source(tmp_path / "source", _images(), labels, sets)
    assert _fails(script, source, tmp_path / "flowers", capsys) == f"{source}/{complaint}".replace("/", os.sep)


def test_an_image_that_is_not_in_the_archive(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = _images()
    del images["jpg/image_00004.jpg"], images["jpg/image_00011.jpg"]
    source = _make_source(tmp_path / "source", images)
    complaint = _fails(script, source, tmp_path / "flowers", capsys)
    assert complaint.endswith("102flowers.tgz: 2 images are not in it, e.g. jpg/image_00004.jpg")


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg",
        "../jpg/image_00001.jpg",
        "jpg/../../image_00001.jpg",
        "jpg/image_00001.jpg/../../../evil.jpg",
        "jpg/sub/image_00001.jpg",
        "jpg/image_00001.jpg\n",
        "jpg/image_99999.jpg",
        "setup.py",
    ],
)
def test_other_members_are_named_and_never_written(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = _make_source(tmp_path / "source", {name: b"evil", **_images()})
    assert script.main([str(source), str(tmp_path / "deep" / "flowers")]) == 0
    assert capsys.readouterr().err == f"ignored 1 other thing(s) in {source / '102flowers.tgz'}, e.g. {name!r}\n"
    assert _files(tmp_path / "deep") == {f"flowers/{path}": data for path, data in _expected().items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "source"]


def test_an_absolute_path_is_never_written(script: ModuleType, tmp_path: Path) -> None:
    source = _make_source(tmp_path / "source", {str(tmp_path / "evil.jpg"): b"evil", **_images()})
    assert script.main([str(source), str(tmp_path / "flowers")]) == 0
    assert not (tmp_path / "evil.jpg").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_image_that_is_no_file(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: bytes
) -> None:
    """A link would read a file of the user's, or write through it."""
    (tmp_path / "secret").write_text("secret")
    hostile = {**_images(), "jpg/image_00002.jpg": _link(str(tmp_path / "secret"), kind)}
    source = _make_source(tmp_path / "source", hostile)
    complaint = _fails(script, source, tmp_path / "flowers", capsys)
    assert complaint.endswith("1 images are not in it, e.g. jpg/image_00002.jpg")
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_folder_that_is_a_link(script: ModuleType, tmp_path: Path) -> None:
    """jpg -> elsewhere, and then a file below jpg, is how an archive writes elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    source = _make_source(tmp_path / "source", {"train": _link(str(tmp_path / "elsewhere")), **_images()})
    assert script.main([str(source), str(tmp_path / "flowers")]) == 0
    assert _files(tmp_path / "flowers") == _expected()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 1)], ids=str)
def test_an_interrupted_run_leaves_nothing(
    script: ModuleType,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    copies = []

    def interrupted(data: Any, file: Any) -> None:
        file.write(b"half")
        copies.append(file.name)
        if len(copies) == 5:
            raise error

    monkeypatch.setattr(script.shutil, "copyfileobj", interrupted)
    assert script.main([str(source), str(tmp_path / "flowers")]) == code
    assert not any(Path(name).is_relative_to(tmp_path / "flowers") for name in copies)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(str(error) or "interrupted")


@pytest.mark.parametrize("words", [[], ["source"], ["a", "b", "c"]], ids=str)
def test_wrong_usage(script: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(words)
    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err
