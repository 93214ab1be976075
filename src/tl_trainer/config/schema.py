"""The whole configuration as typed models: every key, its range, its default and its one-line description.

The descriptions feed the JSON Schema of `--print-schema`, so they are written for the person who edits the YAML.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

Source = Literal["imagefolder", "csv", "cifar10", "cifar100", "flowers102", "demo"]
OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine", "step", "plateau"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
TransformItem = str | dict[str, Any]
Transforms = Literal["default", "eval"] | list[TransformItem]


class Section(BaseModel):
    """A part of the configuration: unknown keys and values of another type are refused, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class NamedSection(Section):
    """A section whose `name` decides which of its keys mean anything; the others are refused, and never dumped."""

    only_for: ClassVar[dict[str, tuple[str, ...]]] = {}
    name: str

    @model_validator(mode="after")
    def _refuse_meaningless(self) -> NamedSection:
        for key, names in self.only_for.items():
            if key in self.model_fields_set and self.name not in names:
                raise ValueError(f"{key} is only for {' and '.join(names)}, and name is {self.name}")
        return self

    @model_serializer(mode="wrap")
    def _without_meaningless(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if self.name in self.only_for.get(key, (self.name,))}


class CsvSection(Section):
    labels: str = Field("labels.csv", description="The CSV file with one row per image, relative to data.root.")
    images: str = Field(".", description="The folder of the images, relative to data.root.")
    image_column: str = Field("id", description="The column with the image's file name, relative to data.csv.images.")
    label_column: str = Field("label", description="The column with the class name.")
    split_column: str | None = Field(
        None, description="The column that says train, val (or valid, validation) or test; null draws a val split."
    )
    suffix: str = Field("", description="What is added to image_column to make the file name, e.g. .jpg")

    @field_validator("suffix", mode="before")
    @classmethod
    def _nothing_is_empty(cls, suffix: object) -> object:
        return "" if suffix is None else suffix


class DataSection(Section):
    source: Source | Annotated[str, Field(pattern=r"^torchvision:[A-Za-z0-9]+$")] = Field(
        "imagefolder",
        description="imagefolder, csv, cifar10, cifar100, flowers102, demo, or torchvision:<Class> for another of its "
        "classification datasets.",
    )
    root: str = Field("data", description="The folder of the dataset; ~ is your home folder.")
    download: bool = Field(True, description="Whether torchvision may download its datasets into data.root.")
    val_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="The fraction of each class held out where there is no validation split (seeded, stratified).",
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
        "for 12 bits in a 16-bit PNG; null is 65535, of 32 bits and of floats the smallest of 1, 255, 65535 and "
        "2^32 - 1 that holds all of an image's.",
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = Field(
        "auto", description="Processes that load images; 0 loads in the main process."
    )
    csv: CsvSection = Field(default_factory=CsvSection, description="Where source: csv finds its columns.")


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


class ModelSection(Section):
    backbone: str = Field(
        "efficientnet_lite0",
        description="efficientnet_lite0 (its weights come with tl-trainer), a torchvision model, or timm/<name>.",
    )
    weights: str = Field(
        "DEFAULT",
        description="DEFAULT (the best), none (random), a torchvision weights name, a tag of timm's, or a file "
        "(.pth, .safetensors).",
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
    head: HeadSection = Field(default_factory=HeadSection, description="The new classifier on top of the features.")


class FeaturesSection(Section):
    cache: Literal["auto", "off"] = Field(
        "auto",
        description="auto computes what the frozen backbone makes of an image once and keeps it, wherever the "
        "transform is not random or views are kept; off never does.",
    )
    views: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] = Field(
        "auto",
        description="How many random views of each training image are kept; epoch e uses view e mod views. auto is one "
        "per epoch, at most 10, and none where they would not fit into limit_gb; 1 draws anew in every epoch.",
    )
    dir: str | None = Field(None, description="The cache folder; null is the user's own.")
    limit_gb: float = Field(20.0, gt=0, description="The size of the cache in GB; what was not used for longest goes.")


class PerformanceSection(Section):
    compile: Literal["auto", "off"] = Field(
        "off", description="auto compiles the frozen backbone (torch.compile) where enough images have to be computed."
    )


class OptimizerSection(NamedSection):
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "momentum": ("sgd",),
        "nesterov": ("sgd",),
        "betas": ("adam", "adamw"),
    }
    name: OptimizerName = Field("adam", description="sgd, adam or adamw.")
    lr: float = Field(1e-3, gt=0, description="The learning rate per step, before the schedule.")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (sgd, adam) or decoupled weight decay (adamw).")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    nesterov: bool = Field(False, description="Nesterov momentum for sgd.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999],
        min_length=2,
        max_length=2,
        description="How much of the running means of the gradient and of its square adam and adamw keep per update.",
    )
    decay: Literal["all", "weights"] = Field(
        "all",
        description="What weight_decay is for: all, or weights, which are neither biases nor parameters of norms nor "
        "position embeddings.",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="What the rate is multiplied by with each stage further from the head; 1 is the same for all.",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerSection:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class ScheduleSection(NamedSection):
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "step_epochs": ("step",),
        "patience": ("plateau",),
        "factor": ("step", "plateau"),
    }
    name: ScheduleName = Field("constant", description="constant, cosine (to 0), step, or plateau (of the val loss).")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs over which the rate rises linearly from near 0.")
    step_epochs: int = Field(10, ge=1, description="Epochs between two cuts of step.")
    patience: int = Field(3, ge=0, description="Epochs without a lower val loss before plateau cuts the rate.")
    factor: float = Field(0.1, gt=0, lt=1, description="What step and plateau multiply the rate by.")


class LossSection(Section):
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Mass of the target spread evenly over all classes.")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced weighs each class by the inverse of its number of training images."
    )


def _by_name(shown: Any) -> BeforeValidator:
    """Take the name alone for a section; `shown` is what the JSON Schema tells."""
    return BeforeValidator(
        lambda given: {"name": given} if isinstance(given, str) else given, json_schema_input_type=shown
    )


class TrainSection(Section):
    search: Literal["auto", "off"] = Field(
        "auto",
        description="auto finds the head instead of training it for epochs, where the backbone is frozen, its features "
        "are kept and the head is a single Linear; off trains it, which is the default where epochs, optimizer or "
        "schedule is set.",
    )
    epochs: int = Field(10, ge=1, description="Passes over the training images.")
    batch_size: int = Field(48, ge=1, description="Images per optimizer step; 2 or more where BatchNorm trains.")
    optimizer: Annotated[OptimizerSection, _by_name(OptimizerName | OptimizerSection)] = Field(
        default_factory=OptimizerSection, description="What updates the weights; a name alone is {name: ...}."
    )
    schedule: Annotated[ScheduleSection, _by_name(ScheduleName | ScheduleSection)] = Field(
        default_factory=ScheduleSection, description="How the learning rate changes; a name alone is {name: ...}."
    )
    loss: LossSection = Field(default_factory=LossSection, description="Cross-entropy and its options.")
    clip_norm: float | None = Field(
        None, gt=0, description="The largest norm of all gradients together; null does not limit it."
    )
    accumulate: int = Field(
        1, ge=1, description="Batches per update of the weights, which takes the mean gradient over their images."
    )
    freeze_batchnorm: bool = Field(
        False,
        description="Whether BatchNorm keeps its statistics, weights and biases also in stages that train.",
    )
    precision: Precision = Field(
        "auto",
        description="fp32, bf16, fp16 (CUDA), or auto: for what is frozen bf16 where the device has it natively, for "
        "the stages that train bf16 on a GPU.",
    )

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if self.schedule.warmup_epochs > self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs is {self.schedule.warmup_epochs:g}, more than epochs ({self.epochs})"
            )
        trains = {"epochs", "clip_norm", "accumulate"}
        says_how = self.model_fields_set & trains or self.optimizer.model_fields_set | self.schedule.model_fields_set
        if says_how and "search" not in self.model_fields_set:  # whoever says how to train wants it trained
            object.__setattr__(self, "search", "off")
        return self


class OutputSection(Section):
    dir: str = Field("runs", description="The folder in which each run gets its own folder.")
    tensorboard: bool = Field(True, description="Whether to write TensorBoard event files into the run folder.")
    report: bool = Field(True, description="Whether to write a report on the best checkpoint when the run has ended.")


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
