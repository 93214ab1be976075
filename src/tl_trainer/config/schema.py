"""The whole configuration as typed models: every key, its range, its default and its one-line description.

The descriptions feed the JSON Schema of `--print-schema`, so they are written for the person who edits the YAML.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from tl_trainer.config.section import Section
from tl_trainer.config.training import PhaseSection, TrainSection

Source = Literal["imagefolder", "csv", "webdataset", "parquet", "cifar10", "cifar100", "flowers102", "demo"]
TransformItem = str | dict[str, Any]
Transforms = Literal["default", "eval"] | list[TransformItem]


class CsvSection(Section):
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


class ParquetSection(Section):
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
    source: Source | Annotated[str, Field(pattern=r"^torchvision:[A-Za-z0-9]+$")] = Field(
        "imagefolder",
        description="imagefolder, csv, webdataset, parquet, cifar10, cifar100, flowers102, demo, or "
        "torchvision:<Class> for another of its classification datasets.",
    )
    root: str = Field("data", description="The folder of the dataset; ~ is your home folder.")
    download: bool = Field(
        True, description="Whether torchvision may download its datasets into data.root, and shards into the cache."
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
    def _check_groups(self) -> DataSection:
        if self.csv.group_column is not None and self.group_pattern is not None:
            raise ValueError("group_pattern and csv.group_column are both set; keep one of them")
        if self.csv.group_column is not None and self.source != "csv":
            raise ValueError(f"csv.group_column is only for source csv, and source is {self.source}; set group_pattern")
        return self


class TransformsSection(Section):
    size: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="The side of the network's input in pixels, where train and eval are default; null is what the "
        "weights were trained with.",
    )
    train: Transforms = Field(
        "default",
        description="default (the weights' preprocessing with RandomResizedCrop and a flip), eval (the same as for "
        "evaluation), or a list of names of torchvision.transforms.v2, each alone or with its arguments: "
        "[{RandomRotation: 45}, RandomHorizontalFlip].",
    )
    eval: Literal["default"] | list[TransformItem] = Field(
        "default", description="default (the weights' own preprocessing) or a list as in train."
    )


class HeadSection(Section):
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="Widths of hidden layers: [256, 256] is Linear-ReLU-Linear-ReLU-Linear."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="The dropout probability before each Linear of the head.")
    normalise: Literal["auto", "none", "l2"] = Field(
        "auto",
        description="l2 scales the features of each image to length 1 before the head, none does not; auto leaves it "
        "to train.search, and is none without.",
    )


class ResidualSection(Section):
    channels: int = Field(ge=1, description="The channels of its output.")
    stride: int = Field(1, ge=1, description="Pixels of its input from one pixel of its output to the next.")


class ConvSection(ResidualSection):
    kernel: int = Field(3, ge=1, description="The side of its kernel in pixels, an odd number.")

    @field_validator("kernel")
    @classmethod
    def _check_kernel(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("should be odd")
        return kernel


class ExtraSection(Section):
    conv: ConvSection | None = Field(None, description="A convolution, BatchNorm and ReLU.")
    residual: ResidualSection | None = Field(
        None, description="Two 3x3 convolutions with BatchNorm and ReLU, added to their input (ResNet's basic block)."
    )
    pool: Literal["mean", "max"] | None = Field(None, description="mean or max of each channel over height and width.")
    norm: Literal["batch"] | None = Field(None, description="batch is BatchNorm.")

    @model_validator(mode="after")
    def _check(self) -> ExtraSection:
        if sum(item is not None for item in (self.conv, self.residual, self.pool, self.norm)) != 1:
            raise ValueError("is one of conv, residual, pool and norm, such as {residual: {channels: 256}}")
        return self


# A list is taken apart where the file is read: a `Config` has one backbone.
_NAMES = {"type": "array", "items": {"type": "string"}, "minItems": 2, "uniqueItems": True}
OneOrList = Annotated[str, WithJsonSchema({"anyOf": [{"type": "string"}, _NAMES]})]


class ModelSection(Section):
    backbone: OneOrList = Field(
        "efficientnet_lite0",
        description="efficientnet_lite0 (its weights come with tl-trainer), a torchvision model, or timm/<name>. A "
        "list of these is compared by the heads that are found on their features, and the best is taken, or one that "
        "cannot be told from it and is twice as fast.",
    )
    weights: OneOrList = Field(
        "DEFAULT",
        description="DEFAULT (the best), none (random), a torchvision weights name, a tag of timm's, a file (.pth, "
        ".safetensors), or the checkpoint or directory of a run, whose preprocessing and head are taken too. A list of "
        "these is compared, as for backbone.",
    )
    weights_from: str | None = Field(
        None,
        description="Another backbone of the same family that the weights are of, such as resnet50 for resnet101: each "
        "tensor whose name and shape fit is taken, the others are random. null is the backbone itself.",
    )
    tap: str = Field(
        "penultimate",
        description="Where the features are taken: penultimate (input of the last Linear), pooled (after the last "
        "pooling, flattened), logits (the 1000 ImageNet scores), a stage name such as layer3, or of a vision "
        "transformer of timm's cls, patch_mean or cls+patch_mean.",
    )
    trainable: str = Field(
        "head",
        description="Where training starts: head (the backbone is frozen), a stage name (it and all after), or all.",
    )
    extra: list[ExtraSection] = Field(
        default_factory=list,
        description="New stages between the tap, which must have height and width, and the head; they train with it. "
        "Each is {conv: {channels, kernel, stride}}, {residual: {channels, stride}}, {pool: mean|max}, {norm: batch}.",
    )
    head: HeadSection = Field(default_factory=HeadSection, description="The new classifier on top of the features.")


class FeaturesSection(Section):
    cache: Literal["auto", "off"] = Field(
        "auto",
        description="auto computes the frozen backbone's output for an image once and keeps it on disk, wherever the "
        "transform is not random or views are kept; off never does.",
    )
    views: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = Field(
        "auto",
        description="How many random views of each training image are kept; epoch e uses view e mod views. auto is one "
        "per epoch, at most 10, and none where they would not fit into limit_gb; 1 draws anew in every epoch.",
    )
    dir: str | None = Field(None, description="The cache folder; null is the user's own.")
    limit_gb: float = Field(
        20.0, gt=0, description="The size of the cache in GB; features that were not used for longest are removed."
    )


class PerformanceSection(Section):
    compile: Literal["auto", "off"] = Field(
        "off", description="auto compiles the frozen backbone (torch.compile) where enough images have to be computed."
    )


class OutputSection(Section):
    dir: str = Field("runs", description="The folder in which each run gets its own folder.")
    tensorboard: bool = Field(True, description="Whether to write TensorBoard event files into the run folder.")
    report: bool = Field(True, description="Whether to write a report on the best checkpoint when the run has ended.")
    neighbours_mb: float = Field(
        256.0, gt=0, description="The most megabytes of training features that tl-predict keeps beside a checkpoint."
    )


class Config(Section):
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the split, the head, the order and augmentation.")
    device: str = Field("auto", description="auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps.")
    data: DataSection = Field(default_factory=DataSection, description="The images and their labels.")
    transforms: TransformsSection = Field(
        default_factory=TransformsSection, description="From an image to the network's input."
    )
    model: ModelSection = Field(default_factory=ModelSection, description="The backbone and the head.")
    features: FeaturesSection = Field(
        default_factory=FeaturesSection, description="What is kept of the frozen backbone's output."
    )
    performance: PerformanceSection = Field(
        default_factory=PerformanceSection, description="What makes a run faster and changes no result."
    )
    train: TrainSection = Field(default_factory=TrainSection, description="The training loop.")
    output: OutputSection = Field(default_factory=OutputSection, description="What a run writes, and where.")

    @model_validator(mode="after")
    def _complete_phases(self) -> Config:
        """The last phase decides `model.trainable`; what is to train from a stage on starts from a found head, except
        where new stages come before the head."""
        if self.model.extra:
            first = self.train.phases[0] if self.train.phases else self.train
            if first.search == "auto" and "search" in first.model_fields_set:
                raise ValueError(
                    "train.search finds a head alone, and model.extra trains with it; set train.search: off"
                )
            object.__setattr__(self, "train", self.train.model_copy(update={"search": "off"}))
        if not self.train.phases and self.train.search == "auto" and self.model.trainable != "head":
            object.__setattr__(self, "train", self.train.after_a_search(self.model.trainable))
        if self.train.phases:
            last = self.train.phases[-1].trainable
            if "trainable" in self.model.model_fields_set and self.model.trainable != last:
                raise ValueError(
                    f"model.trainable is {self.model.trainable}, and the last of train.phases trains {last}; leave "
                    "model.trainable out"
                )
            object.__setattr__(self, "model", self.model.model_copy(update={"trainable": last}))
        return self

    @property
    def phases(self) -> list[PhaseSection]:
        """What is done one after the other: `train.phases`, else all of it as one."""
        return self.train.phases or [self.train.as_phase(self.model.trainable)]

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        kind, _, index = device.partition(":")
        if device not in ("auto", "cpu", "cuda", "mps") and not (kind == "cuda" and index.isdecimal()):
            raise ValueError("use auto, cpu, cuda, cuda:N or mps")
        return device


def flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a dumped configuration with their dotted paths."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def expand(path: str) -> Path:
    """A path as the user wrote it, with ~ expanded where that is somebody's home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
