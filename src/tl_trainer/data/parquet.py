"""Parquet tables of images, or paths of images, and labels -> classes and splits; rows stay columns of Arrow."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from tl_trainer.config.data import DataSection, ParquetSection, expand
from tl_trainer.data.dataset import SPLIT_OF, Below, Dataset, Files, Fit, Images, Stamp, from_content, stamp_of
from tl_trainer.data.images import STANDARD, Decoding
from tl_trainer.data.label_texts import BETWEEN, label_texts
from tl_trainer.data.listing import ClassNames, Listing, is_label
from tl_trainer.data.patterns import files_of, short_names
from tl_trainer.errors import DataError, ImageError, RunError, SettingError
from tl_trainer.ground.files import cache_folder, write_atomically
from tl_trainer.ground.progress import bar
from tl_trainer.ground.wording import listed, printable, shown, unknown

log = logging.getLogger(__name__)

GROUPS_KEPT = 2  # row groups of images in memory: threads that read rows in order are in two at the most
COLUMNS = "set data.parquet.image_column, label_column or split_column"
_SPLIT = re.compile(rf"({'|'.join(sorted(SPLIT_OF, reverse=True))})(?![a-z])", re.IGNORECASE)


def open_parquet(data: DataSection, classes: list[str] | None, fit: Fit = "exact") -> Dataset:
    """The dataset in the files that `data.parquet` names.

    Without a split column files that are called train-..., validation-..., test-... are these splits, where all are
    called so; else there is one split, `all`. Raises DataError, naming the file and the row, SettingError without
    pyarrow.
    """
    section, root = data.parquet, expand(data.root)
    tables = [_Table(path, section) for path in files_of(section.files, root, data.download)]
    several = label_texts(data.task, section)
    labels, splits = _Labels(section) if several else _Codes(section.label_column), _Codes(section.split_column or "")
    for table in bar(tables, "reading labels", len(tables), unit="file"):
        labels.add(table)
        if section.split_column is not None:
            splits.add(table)
    if not sum(table.rows for table in tables):
        raise DataError(f"{tables[0].path}: no rows in it")
    images = _images(tables, section, root)
    where = listed([section.files] if isinstance(section.files, str) else section.files)
    place: Callable[[int], str] = _Rows.of(tables, section).place
    rows = _by_column(splits, place) if section.split_column is not None else _by_file(tables, where)
    listing = Listing(images, labels.names, labels.codes, rows, where, place, several=several)
    if classes is None:
        listing.check_classes(listing.train_labels(), section.label_column, "data.parquet.label_column")
    if several:
        fixed_by = "the train rows" if classes is None else "the checkpoint"
        return listing.dataset(listing.train_labels() if classes is None else classes, fixed_by, fit)
    remedy = "a column of names as data.parquet.label_column would name them"
    return listing.named(tables[0].class_names(section.label_column), remedy, classes, fit)


def _pyarrow() -> Any:
    try:
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise SettingError("data.source", "parquet needs pyarrow; run: pip install pyarrow") from None
    return pyarrow


class _Table:
    """A file, by its footer: its columns, and how many rows each of its row groups has."""

    def __init__(self, path: Path, section: ParquetSection) -> None:
        arrow = _pyarrow()
        self.path = path
        try:
            with arrow.parquet.ParquetFile(path, memory_map=True) as file:
                self.schema, metadata = file.schema_arrow, file.metadata
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{path}: damaged, or not a Parquet file: {str(error).splitlines()[0]}") from error
        labels = section.label_columns or [section.label_column]
        for column in filter(None, (section.image_column, *labels, section.split_column)):
            if (times := self.schema.names.count(column)) != 1:
                fault = f"{times} columns called {column}" if times else unknown("column", column, self.schema.names)
                raise DataError(f"{path}: {fault}; {COLUMNS}")
        self.groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self.rows = sum(self.groups)
        self.image = self._kind(section.image_column)

    def _kind(self, column: str) -> str:
        """The column with the bytes of the images, or "" where `column` has their paths."""
        import pyarrow.types as types

        kind = self.schema.field(column).type
        inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if types.is_binary(inner) or types.is_large_binary(inner):
            return column if inner is kind else f"{column}.bytes"
        if types.is_string(kind) or types.is_large_string(kind):
            return ""
        raise DataError(
            f"{self.path}: the column {column} holds {kind}, and not bytes, a struct with bytes, or paths; {COLUMNS}"
        )

    def column(self, name: str, *, gaps: bool = False) -> Any:
        """A column as one Arrow array; DataError for a row without a value, unless there may be `gaps`."""
        arrow = _pyarrow()
        try:
            with arrow.parquet.ParquetFile(self.path, memory_map=True) as file:
                found = file.read(columns=[name]).column(0).combine_chunks()
        except (OSError, arrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.path}: {name} cannot be read: {reason}; fetch or write it again") from error
        if found.null_count and not gaps:
            row = int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{self.path}/{row}: no {name} in this row")
        return found

    def class_names(self, column: str) -> ClassNames | None:
        """The names that Hugging Face's datasets keep of a ClassLabel."""
        try:
            kept = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
            names = kept.get("info", {}).get("features", {}).get(column, {}).get("names")
            if names is None:
                return None
            if not isinstance(names, list) or len({*filter(is_label, names)}) < len(names):
                raise ValueError("no list of different names")
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{self.path}: its huggingface metadata is damaged; write the file again") from error
        return ClassNames(names, f"the schema of {self.path}")


class _Codes:
    """A column of texts or whole numbers over all files: the different ones, and which of them each row has."""

    def __init__(self, column: str) -> None:
        self.column, self.number, self.parts = column, dict[str, int](), list[np.ndarray]()

    def add(self, table: _Table) -> None:
        """The rows of another file."""
        import pyarrow.types as types

        kind = table.schema.field(self.column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
            raise DataError(
                f"{table.path}: the column {self.column} holds {kind}, and not names or whole numbers; {COLUMNS}"
            )
        self.take(table, table.column(self.column))

    def take(self, table: _Table, column: Any, valid: Callable[[str], bool] = is_label) -> None:
        """The values of another column, which must be valid."""
        encoded = column.dictionary_encode()
        names = [str(value).strip() for value in encoded.dictionary.to_pylist()]
        of_row = encoded.indices.to_numpy()
        if wrong := [number for number, name in enumerate(names) if not valid(name)]:
            row, name = int(np.flatnonzero(of_row == wrong[0])[0]), names[wrong[0]]
            raise DataError(f"{table.path}/{row}: {shown(name)} in {self.column} is no name on one line; correct it")
        codes = np.array([self.number.setdefault(name, len(self.number)) for name in names], np.int32)
        self.parts.append(codes[of_row] if names else np.zeros(0, np.int32))

    @property
    def names(self) -> list[str]:
        return [*self.number]

    @property
    def codes(self) -> np.ndarray:
        return np.concatenate(self.parts)


class _Labels(_Codes):
    """The labels of images that may have several, as texts: a list in each row is one text, and so are columns."""

    def __init__(self, section: ParquetSection) -> None:
        super().__init__(section.label_column)
        self.section = section

    def add(self, table: _Table) -> None:
        """The rows of another file; one without a value is of an image without a label, or without that of a column."""
        arrow = _pyarrow()
        columns = []
        for name in self.section.label_columns or [self.column]:
            found = table.column(name, gaps=True)
            try:
                if arrow.types.is_list(found.type) and not self.section.label_columns:
                    between = self.section.label_separator
                    found = arrow.compute.binary_join(found.cast(arrow.list_(arrow.string())), between)
                columns.append(found.cast(arrow.string()).fill_null(""))
            except arrow.ArrowException:
                raise DataError(
                    f"{table.path}: the column {name} holds {found.type}, and no labels; {COLUMNS}"
                ) from None
        self.take(table, arrow.compute.binary_join_element_wise(*columns, BETWEEN), lambda text: True)


def _by_column(splits: _Codes, place: Callable[[int], str]) -> dict[str, np.ndarray]:
    rows: dict[str, list[np.ndarray]] = {}
    codes = splits.codes
    for code, name in enumerate(splits.names):
        found, split = np.flatnonzero(codes == code), SPLIT_OF.get(name.lower())
        if split is None:
            raise DataError(f"{place(int(found[0]))}: {unknown('split', name, SPLIT_OF)}")
        rows.setdefault(split, []).append(found)
    return {split: np.sort(np.concatenate(found)) for split, found in rows.items()}


def _by_file(tables: list[_Table], where: str) -> dict[str, np.ndarray]:
    """The splits that files are called after, as Hugging Face's are."""
    matches = [_SPLIT.match(table.path.name) for table in tables]
    splits = [SPLIT_OF[match[1].lower()] if match else "all" for match in matches]
    if len({*splits}) > 1:
        if "all" in splits:
            odd = tables[splits.index("all")].path.name
            raise DataError(
                f"{where}: some files are called like splits and {odd} is not; name all of them so, or none, or set "
                "data.parquet.split_column or files"
            )
        log.info(
            "%s: the splits are those that the files are called after: %s", where, ", ".join(dict.fromkeys(splits))
        )
    of = np.repeat(np.arange(len(tables)), [table.rows for table in tables])
    return {
        split: np.flatnonzero(np.isin(of, [number for number, other in enumerate(splits) if other == split]))
        for split in {*splits}
    }


def _images(tables: list[_Table], section: ParquetSection, root: Path) -> Images:
    for table in tables:
        if table.image != tables[0].image:
            raise DataError(f"{table.path}: {section.image_column} is of another kind than in {tables[0].path}")
    if not tables[0].image:
        names = _paths(tables, section.image_column)
        return Files(Below(root, names), names)
    if (largest := max(max(table.groups, default=0) for table in tables)) > 1:
        log.info(
            "row groups of up to %d images: quick in order, slow at random, as in training without cached features; "
            "scripts/to_webdataset.py makes shards of them, which are quick at random too",
            largest,
        )
    return _Rows.of(tables, section)


@dataclass(frozen=True)
class _Rows:
    """Images whose bytes are in a column of files, which are called `names`.

    ends: (G,) rows up to the end of each row group; groups: (G, 2) its file and its number there; starts: the row at
    which each file begins.
    """

    paths: Sequence[Path]
    names: Sequence[str]
    column: str
    ends: np.ndarray
    groups: np.ndarray
    starts: np.ndarray
    decoding: Decoding = STANDARD

    @classmethod
    def of(cls, tables: list[_Table], section: ParquetSection) -> _Rows:
        """Those of all files."""
        ends = np.cumsum([rows for table in tables for rows in table.groups])
        groups = [(file, group) for file, table in enumerate(tables) for group in range(len(table.groups))]
        starts = np.cumsum([0, *(table.rows for table in tables)])
        paths = [table.path for table in tables]
        return cls(paths, short_names(paths), tables[0].image, ends, np.array(groups).reshape(-1, 2), starts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def at(self, index: int) -> tuple[int, int]:
        """The number of a row's file, and its own there."""
        file = int(np.searchsorted(self.starts, index, "right")) - 1
        return file, index - int(self.starts[file])

    def place(self, index: int) -> str:
        """What messages call a row: the file, and the row's number, from 0."""
        file, row = self.at(index)
        return f"{self.paths[file]}/{row}"

    def name(self, index: int) -> str:
        """The file's name, and the row's number."""
        file, row = self.at(index)
        return f"{self.names[file]}/{row}"

    def load(self, index: int, expected: bytes = b"", *, draft: int = 0) -> tuple[Image.Image, bytes]:
        """Take the bytes of the value, hash and decode them."""
        return from_content(self.content(index), self.place(index), self.decoding, expected, draft)

    def content(self, index: int) -> bytes:
        """The bytes of the value."""
        number = int(np.searchsorted(self.ends, index, "right"))
        file, group = self.groups[number].tolist()
        stamp = stamp_of(self.paths[file])
        with _reading:
            values = _group(self.paths[file], group, self.column, stamp)
        row = index - (int(self.ends[number - 1]) if number else 0)
        if row >= len(values):
            raise ImageError(f"{self.paths[file]}: has changed, and has fewer rows; put it back, or start again")
        value: bytes | None = values[row].as_py()
        if not value:
            raise ImageError(f"{printable(self.place(index))}: no image in this row; replace or remove it")
        return value

    def stamp(self, index: int) -> Stamp | None:
        """That of the file, behind its path the column and the row."""
        file, row = self.at(index)
        return stamp_of(self.paths[file], self.column.encode(), str(row).encode(), self.decoding.settings)

    def decoded(self, decoding: Decoding) -> _Rows:
        """The same rows."""
        return replace(self, decoding=decoding)


_reading = threading.Lock()  # of threads that want the same row group one reads it


@lru_cache(maxsize=GROUPS_KEPT)
def _group(path: Path, group: int, column: str, stamp: Stamp | None) -> Any:
    """The values of a row group, as long as the file is the same. Raises ImageError where it cannot be read."""
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(path, memory_map=True) as file:
            found = file.read_row_group(group, columns=[column], use_threads=False).column(0)
    except (OSError, IndexError, arrow.ArrowException) as error:  # IndexError: the file has no such column any more
        reason = str(error).splitlines()[0]
        raise ImageError(f"{path}: row group {group} cannot be read: {reason}; fetch or write it again") from error
    return arrow.compute.struct_field(found, "bytes") if arrow.types.is_struct(found.type) else found


class _Texts(Sequence[str]):
    """The texts of an Arrow column, made when they are asked for."""

    def __init__(self, column: Any) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [*map(str, self.column[index].to_pylist())]
        return str(self.column[index].as_py())


def _paths(tables: list[_Table], column: str) -> _Texts:
    """The paths of all rows, in a file of the cache that is mapped into memory, so that they take none.

    Raises DataError for a path that is there twice.
    """
    arrow = _pyarrow()
    stamps = [stamp_of(table.path) for table in tables]
    asked = hashlib.sha256(repr((column, [table.path.absolute() for table in tables])).encode()).hexdigest()[:32]
    kept = cache_folder() / "listings" / f"{asked}.arrow"
    version = repr(stamps).encode()
    try:
        found = arrow.ipc.open_file(arrow.memory_map(str(kept))).read_all()
        if (found.schema.metadata or {}).get(b"stamps") == version:
            return _Texts(found.column(0))
    except FileNotFoundError:
        pass
    except (OSError, arrow.ArrowException) as error:
        log.warning("%s is damaged (%s); the paths are read again", kept, str(error).splitlines()[0])
    paths = arrow.chunked_array([table.column(column).cast(arrow.large_string()) for table in tables])
    if arrow.compute.count_distinct(paths).as_py() < len(paths):
        counts = paths.value_counts()
        twice = counts.field("values")[int(np.argmax(counts.field("counts").to_numpy()))].as_py()
        raise DataError(f"{tables[0].path}: {printable(twice)} is in two rows of {column}; keep one of the two")
    if all(stamp is not None and stamp.settled for stamp in stamps):
        named = arrow.table({column: paths}).replace_schema_metadata({b"stamps": version})
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, lambda file: _write(arrow, named, file))
            return _Texts(arrow.ipc.open_file(arrow.memory_map(str(kept))).read_all().column(0))
        except (OSError, RunError) as error:
            log.warning("%s; the paths are kept in memory, and read again next time", error)
    return _Texts(paths)


def _write(arrow: Any, table: Any, file: Any) -> None:
    with arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
