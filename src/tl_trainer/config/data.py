"""The section `data` of the configuration: every key, its range, its default and its description."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from tl_trainer.config.section import Section

Source = Literal["imagefolder", "csv", "webdataset", "parquet", "cifar10", "cifar100", "flowers102", "demo"]
Task = Literal["single", "multilabel", "multitask"]
LOADED = r"^torchvision:[A-Za-z0-9]+$"
SKIP_BAD = "data.on_bad_image=skip"  # the remedy in messages
SOURCES_OF = {"multilabel": ("imagefolder", "csv", "parquet"), "multitask": ("csv", "parquet")}


class LabelledSection(Section):
    """The keys of a table whose rows may have several labels, or one for each of several heads."""

    label_separator: str = Field(
        "|",
        min_length=1,
        description="What separates the labels in label_column, where data.task is multilabel; empty is no label.",
    )
    label_columns: list[str] = Field(
        default_factory=list,
        description="In place of label_column a column for each label, where data.task is multilabel: 1, 0, or empty "
        "where it is not known; for each head, where it is multitask: the class, or empty where it is not known.",
    )
    multilabel_columns: list[str] = Field(
        default_factory=list,
        description="Of label_columns, where data.task is multitask, those with any number of labels, separated.",
    )

    @field_validator("label_columns", "multilabel_columns")
    @classmethod
    def _check_columns(cls, columns: list[str]) -> list[str]:
        if twice := [column for column in columns if columns.count(column) > 1]:
            raise ValueError(f"names {twice[0]!r} twice; leave one out")
        return columns


class CsvSection(LabelledSection):
    labels: str = Field("labels.csv", description="The CSV file with one row per image, relative to data.root.")
    images: str = Field(".", description="The folder of the images, relative to data.root.")
    image_column: str = Field("id", description="The column with the image's file name, relative to data.csv.images.")
    label_column: str = Field("label", description="The column with the class name.")
    split_column: str | None = Field(
        None, description="The column that says train, val (or valid, validation) or test; null draws a val split."
    )
    group_column: str | None = Field(
        None,
        description="The column that says which images belong together, such as the patient: those of a group are all "
        "in one fold, and all in train or all in a val split that is drawn. null: each image is a group.",
    )
    suffix: str = Field("", description="What is added to image_column to make the file name, e.g. .jpg")

    @field_validator("suffix", mode="before")
    @classmethod
    def _nothing_is_empty(cls, suffix: object) -> object:
        return "" if suffix is None else suffix


def _check_patterns(patterns: str | list[str]) -> str | list[str]:
    named = [patterns] if isinstance(patterns, str) else patterns
    for pattern in named:
        if pattern.startswith("pipe:"):
            raise ValueError(
                "pipe: would run a command of the configuration, and images are read by seeking; download the files, "
                "and give their paths"
            )
        scheme = re.match(r"([a-z0-9]+)://", pattern)
        if scheme and scheme[1] not in ("http", "https"):
            raise ValueError(f"{scheme[0]} cannot be read; download the files, and give paths or http(s) addresses")
        if scheme and "*" in pattern:
            raise ValueError("a server lists no files; write braces instead of *, such as {000000..000036}")
        if scheme and pattern.partition("?")[0].rpartition("/")[2] in ("", ".", ".."):
            raise ValueError("an address ends with the name of a file")
    if not named or not all(named):
        raise ValueError("names no file; give a path with braces or *")
    return patterns


Patterns = Annotated[str | list[str], AfterValidator(_check_patterns)]


class WebDatasetSection(Section):
    train: Patterns = Field(
        "train-*.tar",
        description="The shards of the train split, relative to data.root: a path with braces, such as "
        "train-{000000..000036}.tar, or with *, an http(s) address with braces, or a list of these.",
    )
    val: Patterns | None = Field(None, description="Those of the val split; null draws it from train.")
    test: Patterns | None = Field(None, description="Those of the test split; null is none.")
    image: str = Field(
        "jpg;jpeg;png;webp;bmp;gif;tif;tiff;ppm;pgm",
        description="The endings of the member of a sample that is its image; the first counts.",
    )
    label: str = Field(
        "cls", description="The ending of the member that holds the label, or json:<field> for a field of a .json."
    )
    classes: str | None = Field(
        None,
        description="A file with a class name on each line, relative to data.root; labels that are numbers count its "
        "lines from 0. null: the labels of train are the names.",
    )

    @field_validator("label")
    @classmethod
    def _check_label(cls, label: str) -> str:
        ending, colon, field = label.partition(":")
        if not ending or (colon and (ending != "json" or not field)):
            raise ValueError("is no ending such as cls, and no json:<field>")
        return label


class ParquetSection(LabelledSection):
    files: Patterns = Field(
        "*.parquet", description="The files, relative to data.root: as data.webdataset.train, a pattern or a list."
    )
    image_column: str = Field(
        "image",
        description="The column with the images: their bytes, a struct with bytes (as Hugging Face's), or paths below "
        "data.root.",
    )
    label_column: str = Field(
        "label", description="The column with the class: a name, or a number, which the schema's ClassLabel may name."
    )
    split_column: str | None = Field(
        None,
        description="The column that says train, val (or valid, validation) or test; null takes it from the names of "
        "the files, such as train-00000.parquet, where all have one.",
    )


class DataSection(Section):
    source: Source | Annotated[str, Field(pattern=LOADED)] = Field(
        "imagefolder",
        description="imagefolder, csv, webdataset, parquet, cifar10, cifar100, flowers102, demo, or "
        "torchvision:<Class> for another of its classification datasets.",
    )
    root: str = Field("data", description="The folder of the dataset; ~ is your home folder.")
    download: bool = Field(
        True, description="Whether torchvision may download its datasets into data.root, and shards into the cache."
    )
    task: Task = Field(
        "single",
        description="What an image has: single (one class), multilabel (any number of labels: csv and parquet by "
        "label_separator or label_columns, imagefolder by copies of an image in several folders), or multitask (a "
        "class for each head, which label_columns of csv and parquet name).",
    )
    val_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="The fraction of each class held out where there is no validation split (seeded, stratified).",
    )
    group_pattern: str | None = Field(
        None,
        description="A regular expression, searched in each image's path below data.root (of a CSV file, in its name). "
        "Images with the same text in (?P<group>...), else in the first parentheses, belong together, as with "
        "csv.group_column.",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="What to do with an image that cannot be read: error (before the first epoch) or skip."
    )
    on_duplicates: Literal["warn", "error", "drop"] = Field(
        "warn",
        description="What to do with exact copies in two splits or under two labels: warn, error, or drop (from train "
        "what is also in val or test, and all copies under two labels in one split).",
    )
    skip: str | None = Field(
        None,
        description="A CSV file whose column path, and split where there is one, names images to leave out, such as "
        "the skip.csv of tl-check; null leaves out none.",
    )
    max_megapixels: float = Field(
        89.5,
        gt=0,
        description="The largest image that can be used, in megapixels, as it is stored and after each resize.",
    )
    value_range: float | None = Field(
        None,
        gt=0,
        description="The value that becomes white in grey images of more than 8 bits, and all above it, such as 4095 "
        "for 12 bits in a 16-bit PNG; null is 65535 for 16 bits, else the smallest of 1, 255, 65535 and 2^32 - 1 that "
        "no value of the image exceeds.",
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = Field(
        "auto", description="Processes that load images; 0 loads in the main process."
    )
    csv: CsvSection = Field(default_factory=CsvSection, description="Where source: csv finds its columns.")
    webdataset: WebDatasetSection = Field(
        default_factory=WebDatasetSection, description="Where source: webdataset finds its shards."
    )
    parquet: ParquetSection = Field(
        default_factory=ParquetSection, description="Where source: parquet finds its columns."
    )

    @field_validator("group_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            groups = re.compile(pattern).groups if pattern is not None else 1
        except re.error as error:
            raise ValueError(f"is no regular expression ({error}); correct it") from None
        if not groups:
            raise ValueError("has no group; put what tells the groups apart into parentheses, as in (patient[0-9]+)")
        return pattern

    @model_validator(mode="after")
    def _check_task(self) -> DataSection:
        if self.source not in (sources := SOURCES_OF.get(self.task, (self.source,))):
            raise ValueError(
                f"task {self.task} reads {', '.join(sources)}, and source is {self.source}; give the labels as "
                "a CSV file"
            )
        for name, table in (("csv", self.csv), ("parquet", self.parquet)):
            if self.task == "single" and table.label_columns:
                raise ValueError(f"{name}.label_columns is for several labels per image; set data.task: multilabel")
        if self.task == "multitask":
            self._check_heads()
        return self

    def _check_heads(self) -> None:
        columns, several = self.table.label_columns, self.table.multilabel_columns
        if len(columns) < 2:
            raise ValueError(f"task multitask has a head per column; name two or more in {self.source}.label_columns")
        if wrong := [column for column in several if column not in columns]:
            raise ValueError(f"{self.source}.multilabel_columns has {wrong[0]}, which is none of label_columns")
        # The columns of tl-predict --format csv.
        taken = {"", "path", "error", "set", "accepted", *(f"{column}_probability" for column in columns)}
        if wrong := [column for column in columns if column in taken or {*"=:/\\\0"} & {*column}]:
            raise ValueError(f"{self.source}.label_columns: a head cannot be called {wrong[0]!r}; rename the column")

    @property
    def skips_bad(self) -> bool:
        """Whether images that cannot be read are left out."""
        return self.on_bad_image == "skip"

    def skipping_bad(self) -> DataSection:
        """The same section, but images that cannot be read are left out."""
        return self.model_copy(update={"on_bad_image": "skip"})

    @property
    def table(self) -> LabelledSection:
        """The section of the table that is read."""
        return self.parquet if self.source == "parquet" else self.csv

    @model_validator(mode="after")
    def _check_groups(self) -> DataSection:
        if self.csv.group_column is not None and self.group_pattern is not None:
            raise ValueError("group_pattern and csv.group_column are both set; keep one of them")
        if self.csv.group_column is not None and self.source != "csv":
            raise ValueError(f"csv.group_column is only for source csv, and source is {self.source}; set group_pattern")
        return self


def expand(path: str) -> Path:
    """A path as the user wrote it, with ~ expanded where that is somebody's home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
