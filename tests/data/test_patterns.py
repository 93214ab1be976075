"""From patterns to files: braces, *, addresses, what is said where nothing matches, checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tl_trainer.data.patterns import braced, files_of
from tl_trainer.errors import DataError, InputError
from tl_trainer.ground import downloads


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..10}", ["a-8", "a-9", "a-10"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a,b{1..2}}", ["a", "b1", "a", "b2"]),
        ("a-{000000..000000}", ["a-000000"]),
    ],
)
def test_braces_are_as_in_a_shell(pattern: str, names: list[str]) -> None:
    assert sorted(braced(pattern)) == sorted(names)


@pytest.mark.parametrize("pattern", ["{3..1}", "{0..9999999999}"])
def test_braces_that_no_one_means(pattern: str) -> None:
    with pytest.raises(DataError, match=r"must count up, at most to 1,000,000 files"):
        braced(f"a-{pattern}.tar")


def test_files_in_order(tmp_path: Path) -> None:
    for name in ("a-1.tar", "a-0.tar", "b.tar"):
        (tmp_path / name).touch()
    assert files_of("a-*.tar", tmp_path, False) == [tmp_path / "a-0.tar", tmp_path / "a-1.tar"]
    assert files_of(["b.tar", "a-{1..1}.tar"], tmp_path, False) == [tmp_path / "b.tar", tmp_path / "a-1.tar"]
    assert files_of(str(tmp_path / "a-*"), Path("elsewhere"), False) == [tmp_path / "a-0.tar", tmp_path / "a-1.tar"]
    with pytest.raises(DataError, match=r"a-0\.tar: named twice by a-\*\.tar, a-0\.tar$"):
        files_of(["a-*.tar", "a-0.tar"], tmp_path, False)


@pytest.mark.parametrize("name", ["a[1].parquet", "a{b}.parquet"])
def test_a_name_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert files_of(name, tmp_path, False) == [tmp_path / name]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a-0.tar").touch()
    (tmp_path / "a-1.tar").mkdir()
    assert files_of("a-*.tar", tmp_path, False) == [tmp_path / "a-0.tar"]
    with pytest.raises(DataError, match=r"a-1\*: nothing matches; "):
        files_of("a-1*", tmp_path, False)


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("c-*.tar", "c-*.tar: nothing matches; {} has a.tar, b.tar"),
        ("a{.tar,.taz}", "a.taz: no such file; {} has a.tar, b.tar"),
        ("sub/*.tar", "sub/*.tar: nothing matches; there is no folder {}/sub; set data.root or the pattern"),
        ("empty/0.tar", "empty/0.tar: no such file; {}/empty has nothing in it"),
    ],
)
def test_what_matches_nothing_says_what_is_there(tmp_path: Path, pattern: str, complaint: str) -> None:
    if "empty" in pattern:
        (tmp_path / "empty").mkdir()
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        files_of(pattern, tmp_path, False)
    assert str(caught.value) == f"{tmp_path}/{complaint.format(tmp_path)}"


def test_addresses_are_downloaded_once_and_checked(file_server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = file_server
    for name in ("a-0.tar", "a-1.tar"):
        (folder / name).write_bytes(name.encode())
    digest = hashlib.sha256(b"a-0.tar").hexdigest()
    (folder / "shards.csv").write_text(f"name,samples,bytes,sha256\na-0.tar,1,7,{digest}\na-1.tar,1,7,{digest}\n")
    with pytest.raises(DataError, match=r"/a-0\.tar is not at .*, and data\.download is false; set it to true"):
        files_of(f"{url}/a-0.tar", Path(), False)
    (path,) = files_of(f"{url}/a-{{0..0}}.tar?token=1", Path(), True)
    assert (path.name, path.read_bytes()) == ("a-0.tar", b"a-0.tar")
    assert path.is_relative_to(tmp_path / "cache")
    with pytest.raises(DataError, match=r"/a-1\.tar: damaged: its SHA-256 is not that in http.*/shards\.csv; run"):
        files_of(f"{url}/a-1.tar", Path(), True)
    (folder / "shards.csv").unlink()
    assert files_of(f"{url}/a-1.tar", Path(), True)[0].read_bytes() == b"a-1.tar"
    (folder / "a-0.tar").unlink()
    assert files_of(f"{url}/a-0.tar", Path(), False) == [path]


def test_a_question_tells_files_apart_unless_the_path_names_one(file_server: tuple[str, Path]) -> None:
    url, folder = file_server
    (folder / "get").write_bytes(b"first")
    (first,) = files_of(f"{url}/get?id=1", Path(), True)
    (folder / "get").write_bytes(b"second")
    both = files_of([f"{url}/get?id={number}" for number in (1, 2)], Path(), True)
    assert both[0] == first
    assert [path.read_bytes() for path in both] == [b"first", b"second"]


def test_an_address_that_is_not_there(
    file_server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)
    with pytest.raises(InputError) as caught:
        files_of(f"{file_server[0]}/a.tar", Path(), True)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{file_server[0]}/a.tar cannot be downloaded: ")
    assert str(tmp_path / "cache" / "shards") in second
