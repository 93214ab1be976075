"""Where the files of a tar archive are: long names, archives that are cut anywhere, damaged and forged ones."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import pytest

from shards import picture, write_tar
from tl_trainer.data.tar import Member, images_in, members
from tl_trainer.errors import DataError, ImageError

LONG = "folder/" * 30 + "ä b.png"
CONTENTS = {"a.png": b"x" * 700, LONG: b"y" * 512, "c.cls": b"1", "d/e.JPG": b"z"}


def _members(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return [*members(file, path)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_file_is_found_where_it_is(tmp_path: Path, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tarfile.TarFile, "format", form)
    names = {name: data for name, data in CONTENTS.items() if form != tarfile.USTAR_FORMAT or name != LONG}
    found = _members(write_tar(tmp_path / "a.tar", names))
    assert {member.name: member.content() for member in found} == names
    assert [str(member) for member in found[:1]] == [f"{tmp_path}/a.tar/a.png"]


def test_only_files_are_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    assert _members(tmp_path / "a.tar") == []


def test_images_are_known_by_their_endings(tmp_path: Path) -> None:
    found = [*images_in(write_tar(tmp_path / "a.tar", CONTENTS))]
    assert [member.name for member in found] == ["a.png", LONG, "d/e.JPG"]


def test_a_cut_anywhere_is_seen_and_what_is_before_it_is_whole(tmp_path: Path) -> None:
    names = {"a.png": b"x" * 700, "b.png": b"y" * 512, "c.png": b"z"}
    whole = write_tar(tmp_path / "a.tar", names).read_bytes()
    ends = {name: member.offset + member.size for name, member in zip(names, _members(tmp_path / "a.tar"), strict=True)}
    path = tmp_path / "cut.tar"
    for length in [512, 513, 1000, 1211, 1212, 1536, 1537, 2048, 2500, 2560, 2561, 3072, 3073, 3583]:
        path.write_bytes(whole[:length])
        *found, last = _members(path)
        assert {member.name: member.content() for member in found} == {
            name: data for name, data in names.items() if ends[name] <= length
        }
        with pytest.raises(ImageError, match=r"cut\.tar cannot be read from byte [\d,]+ on; fetch or write it again$"):
            last.content()
        assert length - 512 < last.offset <= length
    path.write_bytes(whole[:4096])  # one block of zeros is enough
    assert [member.name for member in _members(path)] == [*names]


def test_a_damaged_header_ends_it_and_says_where(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": b"x", "b.png": b"y", "c.png": b"z"})
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"\xff" * 76
    path.write_bytes(data)
    first, last = _members(path)
    assert (first.content(), last.offset) == (b"x", 1024)
    with pytest.raises(ImageError, match=r"a\.tar/\(the rest\): .*a\.tar cannot be read from byte 1,024 on"):
        last.content()


def _header(kind: bytes, size: int) -> bytes:
    """A header whose size is in base 256, so that it may be any number."""
    data = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.USTAR_FORMAT))
    data[156:157], data[124:136], data[148:156] = kind, (size % 256**12 | 1 << 95).to_bytes(12, "big"), b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@pytest.mark.parametrize(
    "forged",
    [
        _header(tarfile.REGTYPE, -1),  # tarfile would go back, without an end
        _header(tarfile.REGTYPE, 1 << 62),
        _header(tarfile.XHDTYPE, 1 << 34),  # for which tarfile would take as much memory
        _header(tarfile.GNUTYPE_LONGNAME, 1 << 62),
        _header(tarfile.XHDTYPE, 512) + b"20 size=-5120000000\n".ljust(512, b"\0") + _header(tarfile.REGTYPE, 512),
        (_header(tarfile.GNUTYPE_LONGNAME, 1) + bytes(512)) * 2000,
    ],
)
def test_a_forged_size_is_where_the_archive_ends(tmp_path: Path, forged: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": b"x"})
    path.write_bytes(path.read_bytes()[:1024] + forged + bytes(1024))
    first, last = _members(path)
    assert (first.content(), last.size) == (b"x", -1)
    assert 1024 <= last.offset <= path.stat().st_size
    path.write_bytes(forged + bytes(1024))
    try:
        assert [member.size for member in _members(path)] == [-1]
    except DataError as error:
        assert str(error).startswith(f"{path}: not a tar archive, or one cut at byte ")


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    (member,) = _members(write_tar(tmp_path / "a.tar", {"a.png": picture()}))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:530])
    with pytest.raises(ImageError, match=r"a\.tar/a\.png: .*a\.tar cannot be read from byte 530 on"):
        member.content()


def test_an_empty_member_is_named(tmp_path: Path) -> None:
    (member,) = _members(write_tar(tmp_path / "a.tar", {"a.png": b""}))
    with pytest.raises(ImageError, match=r"a\.tar/a\.png: empty file \(0 bytes\)"):
        member.content()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(bytes(2000), mtime=0), "compressed; unpack it, since images are read by seeking"),
        (b"<html>404</html>" * 100, "not a tar archive, or one cut at byte 1,600"),
        (b"", "not a tar archive, or one cut at byte 0"),
        (b"x" * 100, "not a tar archive, or one cut at byte 100"),
    ],
)
def test_what_is_no_archive(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=reason.replace("(", r"\(")):
        _members(tmp_path / "a.tar")
