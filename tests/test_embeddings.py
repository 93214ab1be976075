"""The table of features: what stands in it, in groups, and what is refused before any image is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from tl_trainer import embeddings
from tl_trainer.errors import InputError, RunError
from tl_trainer.predict import Row

FEATURES = torch.arange(20.0).view(5, 4)


def rows() -> Iterator[Row]:
    """Five images, and one that cannot be read."""
    for number, features in enumerate(FEATURES):
        yield Row(f"{number}.jpg", features=features)
    yield Row("bad\udcff.jpg", error="cannot be read")


@pytest.mark.parametrize("group", [2, 5, 1024])
def test_paths_and_features_come_back(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "GROUP", group)
    for name in ("a.parquet", "a.npz"):
        assert [row.path for row in embeddings.written(rows(), Path(name), 4)][::5] == ["0.jpg", "bad\udcff.jpg"]
    table, file = parquet.read_table("a.parquet"), np.load("a.npz")
    assert table["path"].to_pylist() == file["path"].tolist() == [f"{number}.jpg" for number in range(5)]
    assert table["features"].to_pylist() == file["features"].tolist() == FEATURES.tolist()
    assert file["features"].dtype == np.float32
    assert parquet.ParquetFile("a.parquet").metadata.row_group(0).num_rows == min(group, 5)
    assert sorted(path.name for path in Path().iterdir()) == ["a.npz", "a.parquet"]


@pytest.mark.parametrize("name", ["a.parquet", "a.npz"])
def test_no_images_are_an_empty_table(name: str) -> None:
    assert list(embeddings.written(iter([]), Path(name), 4)) == []
    read = parquet.read_table(name)["path"] if name == "a.parquet" else np.load(name)["features"]
    assert len(read) == 0


def test_a_name_that_is_no_text_is_written_with_its_bytes() -> None:
    list(embeddings.written(iter([Row("\udcff.jpg", features=FEATURES[0])]), Path("a.parquet"), 4))
    assert parquet.read_table("a.parquet")["path"].to_pylist() == ["\\udcff.jpg"]


@pytest.mark.parametrize("name", ["a.parquet", "a.npz"])
def test_what_ends_before_the_last_row_leaves_nothing(name: str) -> None:
    taken = embeddings.written(rows(), Path(name), 4)
    next(taken)
    taken.close()
    assert [*Path().iterdir()] == []


def test_a_file_that_cannot_be_written_is_a_failed_run() -> None:
    with pytest.raises(RunError, match=r"^cannot write gone/a\.npz: No such file or directory$"):
        list(embeddings.written(rows(), Path("gone/a.npz"), 4))


def test_what_cannot_be_written_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^--embed a\.csv: the name must end with \.parquet or \.npz$"):
        embeddings.check(Path("a.csv"), force=False)
    Path("a.npz").write_text("mine")
    with pytest.raises(InputError, match=r"^--embed a\.npz exists; choose another name, or replace it with --force$"):
        embeddings.check(Path("a.npz"), force=False)
    embeddings.check(Path("a.npz"), force=True)
    Path("b.parquet").mkdir()
    with pytest.raises(InputError, match=r"^--embed b\.parquet exists; choose another name$"):
        embeddings.check(Path("b.parquet"), force=True)
    monkeypatch.setattr(embeddings, "find_spec", lambda _: None)
    embeddings.check(Path("b.npz"), force=False)
    with pytest.raises(InputError, match=r"needs pyarrow for \.parquet; run: pip install pyarrow, or write \.npz$"):
        embeddings.check(Path("a.parquet"), force=False)
