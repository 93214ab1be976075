"""torchvision's datasets: archives in the real formats, made here and served from 127.0.0.1, and what goes wrong."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import pickle
import socket
import tarfile
from collections.abc import Iterator
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from tiny import paths_of
from tl_trainer.config.data import DataSection
from tl_trainer.data import torchvision_sources
from tl_trainer.data.dataset import Dataset, with_validation
from tl_trainer.data.sources import open_dataset
from tl_trainer.data.torchvision_sources import CLASSES
from tl_trainer.errors import DataError, InputError, SettingError
from tl_trainer.ground.locks import sole_use

Server = tuple[str, Path]

CIFAR = {
    "cifar10": (datasets.CIFAR10, ["airplane", "cat", "ship"], "labels"),
    "cifar100": (datasets.CIFAR100, ["apple", "aquarium_fish", "baby", "bear"], "fine_labels"),
}


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _serve_cifar(source: str, server: Server, monkeypatch: pytest.MonkeyPatch, per_file: int = 6) -> dict[str, Any]:
    """Serve a small CIFAR in its real format; the pixels (N, 32, 32, 3) and labels of each split."""
    cls, classes, label_key = CIFAR[source]
    rng = np.random.default_rng(0)
    members, expected = {}, {}
    for split, files in (("train", cls.train_list), ("test", cls.test_list)):
        rows = rng.integers(0, 256, (len(files) * per_file, 3072), dtype=np.uint8)
        labels = [index % len(classes) for index in range(len(rows))]
        expected[split] = (rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)
        for number, (name, _) in enumerate(files):
            part = slice(number * per_file, (number + 1) * per_file)
            members[name] = pickle.dumps({"data": rows[part], label_key: labels[part], "batch_label": name}, protocol=2)
    members[cls.meta["filename"]] = pickle.dumps({cls.meta["key"]: classes}, protocol=2)
    archive = _archive({f"{cls.base_folder}/{name}": data for name, data in members.items()})
    url, folder = server
    (folder / cls.filename).write_bytes(archive)
    monkeypatch.setattr(cls, "url", f"{url}/{cls.filename}")
    monkeypatch.setattr(cls, "tgz_md5", _md5(archive))
    monkeypatch.setattr(cls, "train_list", [[name, _md5(members[name])] for name, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[name, _md5(members[name])] for name, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": _md5(members[cls.meta["filename"]])})
    return expected


def _open(source: str, root: Path, classes: list[str] | None = None, download: bool = False) -> Dataset:
    return open_dataset(DataSection(source=source, root=str(root), download=download), classes)


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _names(dataset: Dataset) -> dict[str, list[str]]:
    return {name: sorted(split.names) for name, split in dataset.splits.items()}


@pytest.mark.parametrize("source", CIFAR)
def test_cifar_is_downloaded_and_read(
    source: str, file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _serve_cifar(source, file_server, monkeypatch)
    dataset = _open(source, tmp_path / "root", download=True)
    assert dataset.classes == CIFAR[source][1]
    assert set(dataset.splits) == {"train", "test"}
    for name, (pixels, labels) in expected.items():
        split = dataset.split(name)
        assert list(split.targets) == labels
        assert split.names[:2] == ["0", "1"]
        assert all(np.array_equal(np.asarray(split.open(index)), pixels[index]) for index in range(len(split)))


def test_a_val_split_of_cifar_is_drawn(file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, _ = _serve_cifar("cifar10", file_server, monkeypatch)["train"]
    dataset = with_validation(_open("cifar10", tmp_path, download=True), lambda targets: {*range(0, len(targets), 5)})
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 24, "val": 6, "test": 6}
    val = dataset.split("val")
    for index, name in enumerate(val.names):
        assert np.array_equal(np.asarray(val.open(index)), pixels[int(name)])


def test_what_is_downloaded_is_not_downloaded_again(
    file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve_cifar("cifar10", file_server, monkeypatch)
    _open("cifar10", tmp_path / "root", download=True)
    (file_server[1] / datasets.CIFAR10.filename).unlink()
    for download in (True, False):
        assert len(_open("torchvision:CIFAR10", tmp_path / "root", download=download).split("train")) == 30


def test_of_two_processes_that_want_a_dataset_the_second_waits(
    file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision writes an archive in its final place, where two of them would write over each other."""
    _serve_cifar("cifar10", file_server, monkeypatch)
    held: list[Path] = []

    @contextlib.contextmanager
    def recorded(folder: Path, *, wait: bool) -> Iterator[None]:
        assert wait
        held.append(folder)
        with sole_use(folder, wait=wait):
            yield
        assert (folder / datasets.CIFAR10.filename).is_file()

    monkeypatch.setattr(torchvision_sources, "sole_use", recorded)
    _open("cifar10", tmp_path / "root", download=True)
    assert held == [tmp_path / "root"] * 2
    _open("cifar10", tmp_path / "root")
    assert len(held) == 2


def test_classes_of_a_checkpoint_are_enforced(
    file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve_cifar("cifar10", file_server, monkeypatch)
    classes = CIFAR["cifar10"][1]
    assert _open("cifar10", tmp_path, classes, download=True).classes == classes
    with pytest.raises(
        DataError, match=r"CIFAR10 in .* has no class 'truck'; the 4 classes are those of the checkpoint"
    ):
        _open("cifar10", tmp_path, [*classes, "truck"])
    with pytest.raises(DataError, match=r"CIFAR10 in .* has the unknown class 'ship'"):
        _open("cifar10", tmp_path, classes[:2])


def test_a_wrong_checksum(file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve_cifar("cifar10", file_server, monkeypatch)
    archive = file_server[1] / datasets.CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError) as caught:
        _open("cifar10", tmp_path / "root", download=True)
    assert str(caught.value) == (
        f"CIFAR10 in {tmp_path / 'root'}: File not found or corrupted; "
        "run again, or put the files there and set data.download: false"
    )


def test_a_damaged_file_on_disk(file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve_cifar("cifar10", file_server, monkeypatch)
    _open("cifar10", tmp_path, download=True)
    damaged = tmp_path / datasets.CIFAR10.base_folder / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"CIFAR10 in .*: Dataset not found or corrupted; set data.download: true"):
        _open("cifar10", tmp_path)
    assert len(_open("cifar10", tmp_path, download=True).split("train")) == 30  # and this is how it is repaired


def test_a_server_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound but not listening, so that nothing else can answer there
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{closed.getsockname()[1]}/cifar.tar.gz")
        with pytest.raises(InputError) as caught:
            _open("cifar10", tmp_path / "root", download=True)
    first, second = str(caught.value).splitlines()
    assert first.startswith("CIFAR10 cannot be downloaded: ")
    assert "refused" in first
    assert f"below {tmp_path / 'root'}" in second
    assert caught.value.exit_code == 2


def test_a_server_without_the_file(file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{file_server[0]}/cifar.tar.gz")
    with pytest.raises(InputError, match=r"^CIFAR10 cannot be downloaded: File not found\n"):
        _open("cifar10", tmp_path, download=True)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset by peer"), RemoteDisconnected("no response"), IncompleteRead(b"half")]
)
def test_a_connection_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets.cifar, "download_and_extract_archive", broken)
    with pytest.raises(InputError) as caught:
        _open("cifar10", tmp_path, download=True)
    assert str(caught.value).startswith(f"CIFAR10 cannot be downloaded: {error}\nPut the files")


@pytest.mark.parametrize(
    "source",
    ["cifar10", "cifar100", "flowers102", "torchvision:Caltech101", "torchvision:DTD", "torchvision:EuroSAT",
     "torchvision:FGVCAircraft", "torchvision:GTSRB", "torchvision:Imagenette", "torchvision:MNIST",
     "torchvision:OxfordIIITPet", "torchvision:STL10", "torchvision:SVHN", "torchvision:StanfordCars"],
)  # fmt: skip
def test_nothing_there_and_no_download(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError) as caught:
        _open(source, tmp_path / "root")
    message = str(caught.value)
    assert "Dataset not found" in message
    assert message.endswith("; set data.download: true, or set data.root to where the files are")
    assert str(tmp_path / "root") in message
    assert "download=True" not in message
    assert "\n" not in message


def test_a_dataset_that_can_no_longer_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"StanfordCars in .* cannot be downloaded anymore; .* set data\.download: false"
    ):
        _open("torchvision:StanfordCars", tmp_path, download=True)


SETS = {"train": [7, 2, 3], "val": [1, 4], "test": [5, 6]}
FLOWERS = [1, 2, 3, 1, 102, 3, 77]  # the class number of images 1 to 7


def _make_flowers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flowers102 as it is on disk: jpg/image_00001.jpg and so on, and the two .mat files."""
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, len(FLOWERS) + 1):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        Image.new("RGB", (30, 20), (0, 10 * number, 0)).save(folder / "jpg" / f"image_{number:05}.jpg", exif=exif)
    savemat(folder / "imagelabels.mat", {"labels": np.array([FLOWERS], dtype=np.uint8)})
    sets = {"trnid": SETS["train"], "valid": SETS["val"], "tstid": SETS["test"]}
    savemat(folder / "setid.mat", {name: np.array([numbers], dtype=np.uint16) for name, numbers in sets.items()})
    jpgs = {f"jpg/{path.name}": path.read_bytes() for path in (folder / "jpg").iterdir()}
    (folder / "102flowers.tgz").write_bytes(_archive(jpgs))
    files = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    md5s = {key: (name, _md5((folder / name).read_bytes())) for key, name in files.items()}
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", md5s)


def test_flowers102_has_its_official_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_flowers(tmp_path / "flowers-102", monkeypatch)
    dataset = _open("flowers102", tmp_path)
    assert (len(dataset.classes), dataset.classes[0], dataset.classes[101]) == (102, "pink primrose", "blackberry lily")
    assert list(dataset.splits) == ["train", "val", "test"]
    for name, numbers in SETS.items():
        split = dataset.split(name)
        assert list(split.targets) == [FLOWERS[number - 1] - 1 for number in numbers]
        assert split.names == [f"flowers-102/jpg/image_{number:05}.jpg" for number in numbers]
        assert paths_of(split) == [tmp_path / path for path in split.names]
    assert dataset.split("train").open(0).size == (20, 30)  # upright, so data/images.py opened it


def test_flowers102_is_downloaded(file_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = file_server
    _make_flowers(folder, monkeypatch)
    monkeypatch.setattr(datasets.Flowers102, "_download_url_prefix", f"{url}/")
    dataset = _open("flowers102", tmp_path / "root", download=True)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 3, "val": 2, "test": 2}
    assert dataset.split("test").open(1).size == (20, 30)


def test_caltech101_is_one_split_with_names(tmp_path: Path) -> None:
    """No image is opened to learn its label: these are empty files."""
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    _touch(*(folder / name / "image_0001.jpg" for name in ("BACKGROUND_Google", "ant", "yin_yang")))
    _touch(folder / "ant" / "image_0002.jpg")
    dataset = _open("torchvision:Caltech101", tmp_path)
    assert dataset.classes == ["ant", "yin_yang"]
    assert list(dataset.split("all").targets) == [0, 0, 1]


def test_eurosat_is_one_split_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "eurosat" / "2750"
    _touch(folder / "River" / "River_1.jpg", folder / "Forest" / "Forest_1.jpg")
    dataset = _open("torchvision:EuroSAT", tmp_path)
    assert dataset.classes == ["Forest", "River"]
    assert _names(dataset) == {"all": ["eurosat/2750/Forest/Forest_1.jpg", "eurosat/2750/River/River_1.jpg"]}
    assert list(dataset.split("all").targets) == [0, 1]


def test_imagenette_has_train_and_val_and_the_first_of_its_synonyms(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _touch(*(tmp_path / "imagenette2" / split / wnid / f"{split}.JPEG" for wnid in ("n03394916", "n01440764")))
    dataset = _open("torchvision:Imagenette", tmp_path)
    assert dataset.classes == ["tench", "French horn"]
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 2, "val": 2}


def test_oxford_pets_trains_on_trainval(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    _touch(folder / "images" / "x")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("Abyssinian_100 1 1 1\ngreat_pyrenees_7 2 2 1\n")
    (folder / "annotations" / "test.txt").write_text("great_pyrenees_9 2 2 1\nAbyssinian_200 1 1 1\n")
    dataset = _open("torchvision:OxfordIIITPet", tmp_path)
    assert dataset.classes == ["Abyssinian", "Great Pyrenees"]
    assert _names(dataset) == {
        "train": [f"oxford-iiit-pet/images/{name}.jpg" for name in ("Abyssinian_100", "great_pyrenees_7")],
        "test": [f"oxford-iiit-pet/images/{name}.jpg" for name in ("Abyssinian_200", "great_pyrenees_9")],
    }
    assert list(dataset.split("test").targets) == [1, 0]


def test_gtsrb_is_a_dataset_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "gtsrb"
    _touch(*(folder / "GTSRB" / "Training" / name / "0.ppm" for name in ("00000", "00001")))
    _touch(folder / "GTSRB" / "Final_Test" / "Images" / "7.ppm")
    (folder / "GT-final_test.csv").write_text("Filename;Width;ClassId\n7.ppm;9;1\n")
    dataset = _open("torchvision:GTSRB", tmp_path)
    assert dataset.classes == ["0", "1"]
    assert _names(dataset) == {
        "train": ["gtsrb/GTSRB/Training/00000/0.ppm", "gtsrb/GTSRB/Training/00001/0.ppm"],
        "test": ["gtsrb/GTSRB/Final_Test/Images/7.ppm"],
    }
    assert list(dataset.split("test").targets) == [1]


def test_svhn_has_numbers_for_classes_and_no_extra_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [2], [1]], dtype=np.uint8)})
    files = {
        split: ["", path.name, _md5(path.read_bytes())]
        for split, path in ((split, tmp_path / f"{split}_32x32.mat") for split in ("train", "test"))
    }
    monkeypatch.setattr(datasets.SVHN, "split_list", {**files, "extra": ["", "extra_32x32.mat", ""]})
    dataset = _open("torchvision:SVHN", tmp_path)
    assert dataset.classes == ["0", "1", "2"]
    assert list(dataset.splits) == ["train", "test"]
    assert list(dataset.split("train").targets) == [0, 1, 2, 1]
    assert np.array_equal(np.asarray(dataset.split("test").open(2)), pixels[..., 2])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("CIFAR11", "did you mean 'CIFAR10'"), ("Flower102", "did you mean 'Flowers102'"), ("ImageFolder", "(valid: ")],
)
def test_an_unknown_dataset(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(SettingError) as caught:
        _open(f"torchvision:{name}", tmp_path)
    assert caught.value.key == "data.source"
    assert caught.value.message.startswith(f"unknown torchvision dataset '{name}'")
    assert hint in caught.value.message


@pytest.mark.parametrize("name", CLASSES)
def test_every_dataset_exists_in_torchvision(name: str) -> None:
    cls = getattr(datasets, name)
    assert issubclass(cls, datasets.VisionDataset)
    assert next(iter(inspect.signature(cls).parameters)) == "root"
