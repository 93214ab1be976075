"""WebDataset shards: samples and labels, the class list, the index that is kept, cut shards, every mistake named."""

from __future__ import annotations

import hashlib
import os
import pickle
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import picture, samples, write_tar
from tl_trainer.config.data import DataSection
from tl_trainer.data import webdataset
from tl_trainer.data.dataset import Dataset, Split
from tl_trainer.data.loaders import batch_order
from tl_trainer.data.sources import open_dataset
from tl_trainer.data.verify import Memory, remembered, verified
from tl_trainer.data.webdataset import Members, Shard, _text
from tl_trainer.errors import DataError, ImageError


def _opened(root: Path, on_bad_image: str = "error", **section: Any) -> Dataset:
    data = {"source": "webdataset", "root": str(root), "on_bad_image": on_bad_image, "webdataset": section}
    return open_dataset(DataSection.model_validate(data))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def _age(folder: Path) -> None:
    """As if the shards had been written an hour ago."""
    for path in folder.glob("*.tar"):
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)


def test_every_sample_of_many_shards_is_there_once_in_every_epoch() -> None:
    """10,000 samples in 37 shards of different sizes, by their indices only."""
    kinds = [("offset", "<i8"), ("size", "<i8"), ("member", "S8"), ("label", "S1")]
    rows = np.array([(number, 1, f"{number}.jpg", "a") for number in range(10_000)], kinds)
    shards = [
        Shard(Path(f"{number}.tar"), f"{number}.tar", part) for number, part in enumerate(np.array_split(rows, 37))
    ]
    images = Members(shards, list(accumulate(len(shard.samples) for shard in shards)))
    split = Split(images, [0] * len(images), range(len(images)))
    for epoch in range(2):
        order = [index for batch in batch_order(np.arange(len(split)), 64, 0, epoch, shuffle=True) for index in batch]
        places = [images.at(split.rows[index])[1] for index in order]
        assert sorted(place.offset for place in places) == [*range(10_000)]
        assert [place.name for place in places] == [f"{index}.jpg" for index in order] != sorted(split.names)
    names = [f"{number}.tar/{_text(name)}" for number, shard in enumerate(shards) for name in shard.samples["member"]]
    assert split.names == names
    assert sum(shard.samples.nbytes for shard in shards) == 10_000 * (8 + 8 + 8 + 1)


def test_a_warm_start_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "train-0.tar", samples(3))
    write_tar(tmp_path / "train-1.tar", samples(2, "cab", first=3))
    _age(tmp_path)
    first = _opened(tmp_path)
    monkeypatch.setattr(webdataset, "members", lambda *_: pytest.fail("a shard was read"))
    again = _opened(tmp_path)
    assert (again.classes, again.split("train").names) == (first.classes, first.split("train").names)
    assert again.split("train").images.content(3) == picture(3)


def test_labels_and_images_are_as_in_the_shards(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "train-0.tar", {"x/1.PNG": picture(1), "x/1.cls": "dog\n", "x/2.cls": "cat", "x/2.png": picture(2)}
    )
    write_tar(tmp_path / "train-1.tar", {"x/1.png": picture(3), "x/1.cls": "ant", "x/1.txt": "a caption"})
    split = (dataset := _opened(tmp_path)).split("train")
    assert dataset.classes == ["ant", "cat", "dog"]
    assert list(split.targets) == [2, 1, 0]
    assert split.names == ["train-0.tar/x/1.PNG", "train-0.tar/x/2.png", "train-1.tar/x/1.png"]
    assert [split.open(index).getpixel((0, 0)) for index in range(3)] == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    assert split.images.load(1)[1] == hashlib.sha256(picture(2)).digest()
    assert pickle.loads(pickle.dumps(split)).images.content(2) == picture(3)  # noqa: S301 (as for a worker)


def test_splits_of_their_own_and_shards_that_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, count in (("train-0", 4), ("val-0", 2), ("test-0", 3)):
        write_tar(tmp_path / f"{name}.tar", samples(count))
    dataset = _opened(tmp_path, val="val-{0..0}.tar", test=["test-0.tar"])
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 4, "val": 2, "test": 3}
    assert _warnings(caplog) == []
    _opened(tmp_path, val="val-*.tar")
    assert _warnings(caplog) == [
        f"1 shards are not used, e.g. {tmp_path}/test-0.tar; data.webdataset.train, val and test name shards"
    ]


def test_shards_of_the_same_name_keep_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", samples(1))
    names = _opened(tmp_path, train="{a,b}/0.tar").split("train").names
    assert names == [f"{tmp_path}/{folder}/0.tar/0000.png" for folder in "ab"]


@pytest.mark.parametrize(
    ("classes", "labels", "expected", "targets", "said"),
    [
        (None, "ba", ["a", "b"], [1, 0], "2 classes; labels are names"),
        (
            None,
            ["10", "9"],
            ["9", "10"],
            [1, 0],
            "2 classes; labels are numbers, which are taken as the names of the classes; data.we",
        ),
        ("dog\ncat\n", "10", ["dog", "cat"], [1, 0], "2 classes; labels are numbers of names in "),
        ("dog\ncat", ["cat", "dog"], ["dog", "cat"], [1, 0], "2 classes; labels are names in "),
    ],
)
def test_the_class_list(
    tmp_path: Path, classes: str | None, labels: Any, expected: list[str], targets: list[int], said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    write_tar(tmp_path / "train-0.tar", samples(2, labels))
    if classes:
        (tmp_path / "names.txt").write_text(classes)
    caplog.set_level("INFO")
    dataset = _opened(tmp_path, classes="names.txt" if classes else None)
    assert (dataset.classes, list(dataset.split("train").targets)) == (expected, targets)
    assert [message.startswith(f"train-*.tar: {said}") for message in caplog.messages] == [True]


def test_a_class_without_samples_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "train-0.tar", samples(2, "02"))
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert _opened(tmp_path, classes="names.txt").classes == ["a", "b", "c"]
    assert _warnings(caplog) == ["train-*.tar: train has no row of 1 classes: b"]


def test_a_field_of_json(tmp_path: Path) -> None:
    names = {"1.png": picture(), "1.json": '{"id": 3, "label": "dog"}', "2.png": picture(), "2.json": '{"label": 4}'}
    write_tar(tmp_path / "train-0.tar", names)
    assert _opened(tmp_path, label="json:label").classes == ["4", "dog"]


def test_the_classes_of_a_checkpoint_are_enforced(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(3, "01"))
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    dataset = _opened_for(tmp_path, ["ape", "cat", "dog"])
    assert (dataset.classes, list(dataset.split("train").targets)) == (["ape", "cat", "dog"], [2, 1, 2])
    with pytest.raises(DataError, match=r"train-0\.tar/0001\.png: unknown label 'cat' .* fixed by the checkpoint$"):
        _opened_for(tmp_path, ["ape", "dog"])


def _opened_for(root: Path, classes: list[str]) -> Dataset:
    data = {"source": "webdataset", "root": str(root), "webdataset": {"classes": "names.txt"}}
    return open_dataset(DataSection.model_validate(data), classes)


MISTAKES: list[tuple[dict[str, bytes | str], dict[str, Any], str]] = [
    (
        {"1.png": b"x"},
        {},
        "train-0.tar: the sample 1 has png, and none is its label; set data.webdataset.label, which is cls",
    ),
    ({"1.png": b"x", "1.txt": "a"}, {}, "the sample 1 has png, txt, and none is its label"),
    (
        {"a/1.jp2": b"x", "a/1.cls": "a"},
        {},
        "the sample a/1 has jp2, cls, and none is its image; set data.webdataset.image",
    ),
    ({"1.png": b"x", "1.cls": "a", "2.cls": "b"}, {}, "the sample 2 has cls, and none is its image"),
    ({"1.png": b"x", "1.cls": "\n"}, {}, "train-0.tar/1.cls: '' is no label; it must be a name or a whole number, on"),
    ({"1.png": b"x", "1.cls": "a\nb"}, {}, "train-0.tar/1.cls: 'a\\nb' is no label"),
    ({"1.png": b"x", "1.cls": "a" * 5000}, {}, "is no label; it must be a name or a whole number, on one line"),
    ({"1.png": b"x", "1.cls": b"\xff\xfe"}, {}, "train-0.tar/1.cls: not text in UTF-8"),
    ({"1.png": b"x", "1.json": "{"}, {"label": "json:label"}, "train-0.tar/1.json: not JSON in UTF-8"),
    ({"1.png": b"x", "1.json": "[1]"}, {"label": "json:label"}, "train-0.tar/1.json: unknown field 'label'"),
    (
        {"1.png": b"x", "1.json": '{"lable": 1}'},
        {"label": "json:label"},
        "unknown field 'label'; did you mean 'lable'?",
    ),
    ({"1.png": b"x", "1.json": '{"label": true}'}, {"label": "json:label"}, "True in label is no label"),
    ({"1.png": b"x", "1.json": '{"label": 0.5}'}, {"label": "json:label"}, "0.5 in label is no label"),
    ({}, {}, "train-0.tar: no samples in the train shards; correct data.webdataset.train"),
]


@pytest.mark.parametrize(("members", "section", "complaint"), MISTAKES)
def test_mistakes(tmp_path: Path, members: dict[str, bytes | str], section: dict[str, Any], complaint: str) -> None:
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError) as caught:
        _opened(tmp_path, **section)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/train-0.tar")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", ["12", "1"])  # the second time after another sample, and at once
def test_a_key_twice_in_a_shard(tmp_path: Path, keys: str) -> None:
    members = {f"{key}.{ending}": value for key in keys for ending, value in (("png", b"x"), ("cls", "a"))}
    first = write_tar(tmp_path / "a", members).read_bytes()[: 2048 * len(keys)]
    (tmp_path / "train-0.tar").write_bytes(first + (tmp_path / "a").read_bytes())
    with pytest.raises(
        DataError, match=r"train-0\.tar: 1\.png is in it twice; write the shard again with a key for each"
    ):
        _opened(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "complaint"),
    [
        ("02", "a\nb\n", "train-0.tar/0001.png: label 2 is not one of 0 to 1, the 2 names in "),
        (["a", "c"], "a\nb\n", "train-0.tar/0001.png: unknown label 'c' (valid: a, b), fixed by "),
        ("01", "a\n\nb\n", "names.txt:2: no class name in this line; write a name on each line"),
        ("01", "a\nb\na\n", "names.txt:3: 'a' is in line 1 too; write a name on each line"),
        (
            "01",
            None,
            "names.txt: cannot be read: No such file or directory; set data.webdataset.classes to a file of names",
        ),
    ],
)
def test_mistakes_in_class_names(tmp_path: Path, labels: Any, names: str | None, complaint: str) -> None:
    write_tar(tmp_path / "train-0.tar", samples(2, labels))
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
    with pytest.raises(DataError) as caught:
        _opened(tmp_path, classes="names.txt")
    assert str(caught.value).startswith(f"{tmp_path}/{complaint}")


@pytest.mark.parametrize("length", [2048, 2148, 2048 + 600, 3072, 3072 + 100, 3072 + 512, 4096, 3 * 2048])
def test_a_cut_shard_is_named_and_its_complete_samples_can_be_used(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "train-0.tar", samples(2))
    path = write_tar(tmp_path / "train-1.tar", samples(3, first=2))
    path.write_bytes(path.read_bytes()[:length])
    for _ in range(2):  # from the headers, and as kept
        with pytest.raises(DataError) as caught:
            _opened(tmp_path)
        first, second = str(caught.value).splitlines()
        assert first.startswith(
            "1 of 2 shards are not whole; fetch or write them again, or take their complete samples"
        )
        assert second.startswith(f"{path}: cannot be read from byte ")
        split = _opened(tmp_path, on_bad_image="skip").split("train")
        assert f"; {len(split) - 2:,} samples before it are complete" in second
        assert len(split) == 2 + length // 2048 + (length % 2048 > 1024 + 512)
        assert [split.images.content(row) for row in split.rows] == [picture(n) for n in range(len(split))]
        assert "only their complete samples are used" in caplog.text
        _age(tmp_path)


def test_a_shard_that_changed_is_read_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(2))
    _age(tmp_path)
    before = _opened(tmp_path)
    write_tar(tmp_path / "train-0.tar", samples(3, "cd"))
    _age(tmp_path)
    assert len(_opened(tmp_path).split("train")) == 3
    assert _opened(tmp_path).classes == ["c", "d"] != before.classes


def test_a_shard_that_may_still_be_written_is_not_remembered(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", samples(2))
    _opened(tmp_path)
    assert not list(tmp_path.rglob("*.npz"))
    _age(tmp_path)
    _opened(tmp_path)
    assert len(list(tmp_path.rglob("*.npz"))) == 1


def test_a_damaged_index_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "train-0.tar", samples(2))
    _age(tmp_path)
    names = _opened(tmp_path).split("train").names
    (kept,) = tmp_path.rglob("*.npz")
    data = bytearray(kept.read_bytes())
    data[data.index(b"0001.png")] ^= 1
    for damaged in (b"", bytes(data)):
        kept.write_bytes(damaged)
        caplog.clear()
        assert _opened(tmp_path).split("train").names == names
        assert [f"the headers of {tmp_path}/train-0.tar are read again" in line for line in _warnings(caplog)] == [True]


def test_without_a_cache_it_says_so_and_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "train-0.tar", samples(2))
    _age(tmp_path)
    (tmp_path / "cache").write_text("no folder")
    assert len(_opened(tmp_path).split("train")) == 2
    assert "are read again next time" in caplog.text


def test_it_is_verified_remembered_and_guarded_as_a_file_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", {**samples(2), "x.png": b"no picture", "x.cls": "a"})
    _age(tmp_path)
    data = DataSection(on_bad_image="skip")
    split, memory = _opened(tmp_path).split("train"), Memory(tmp_path / "files.sqlite")
    skipped: dict[str, str] = {}
    good = verified(split, "train", data, memory, skipped=skipped)
    assert [*good.hashes] == [hashlib.sha256(picture(number)).digest() for number in range(2)]
    assert skipped == {"train-0.tar/x.png": skipped["train-0.tar/x.png"]}
    assert skipped["train-0.tar/x.png"].startswith(f"{tmp_path}/train-0.tar/x.png: not an image")
    known = remembered(split, memory)
    assert (known.names, [*known.hashes], known.sizes) == (good.names, [*good.hashes], [(8, 8)] * 2)
    write_tar(tmp_path / "train-0.tar", samples(2, first=7))
    with pytest.raises(ImageError, match=r"train-0\.tar/0000\.png: has changed since it was read first"):
        good.open(0)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        (
            {"train": "pipe:aws s3 cp s3://b/0.tar -"},
            "pipe: would run a command of the configuration, and images are read",
        ),
        ({"val": ["s3://bucket/0.tar"]}, "s3:// cannot be read; download the files, and give paths or http"),
        ({"test": "https://host/*.tar"}, "a server lists no files; write braces instead of"),
        ({"test": "https://host/shards/?a=b"}, "an address ends with the name of a file"),
        ({"test": "https://host/.."}, "an address ends with the name of a file"),
        ({"train": []}, "names no file"),
        ({"val": ""}, "names no file"),
        ({"label": "json"}, None),
        ({"label": "json:"}, "is no ending such as cls, and no json:<field>"),
        ({"label": "cls:a"}, "is no ending such as cls, and no json:<field>"),
    ],
)
def test_settings_are_refused_before_a_shard_is_read(section: dict[str, Any], complaint: str | None) -> None:
    if complaint is None:
        DataSection.model_validate({"webdataset": section})
        return
    with pytest.raises(ValueError, match=complaint):
        DataSection.model_validate({"webdataset": section})
