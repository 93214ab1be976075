"""The whole configuration as typed models: every key, its range, its default and its one-line description.

The descriptions feed the JSON Schema of `--print-schema`, so they are written for the person who edits the YAML.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from tl_trainer.config.data import DataSection
from tl_trainer.config.section import Section
from tl_trainer.config.training import FIGURES_OF, PhaseSection, TrainSection

TransformItem = str | dict[str, Any]
Transforms = Literal["default", "eval"] | list[TransformItem]


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
    def _check_task(self) -> Config:
        """Refuse what means nothing for the task; `train.best`, where it is left out, is the task's own."""
        task, train, figures = self.data.task, self.train, FIGURES_OF[self.data.task]
        if task != "single" and "best" not in train.model_fields_set:
            object.__setattr__(self, "train", train := train.model_copy(update={"best": figures[0]}))
        for key, figure in (("best", train.best), ("stop.metric", train.stop.metric)):
            if figure is not None and figure not in figures:
                raise ValueError(f"train.{key} is {figure}, and data.task {task}; set it to {', '.join(figures)}")
        if task == "multitask":
            self._check_heads()
        elif train.heads:
            raise ValueError(f"train.heads is for data.task: multitask, and that is {task}; leave it out")
        single = {
            "loss.label_smoothing": train.loss.label_smoothing
            and (task == "multilabel" or self.data.table.multilabel_columns)
            and "moves mass to classes that exclude a label",
            "sampler": train.sampler == "balanced" and "takes every class equally often, and an image has one",
            "mixup": train.mixup and "mixes images of one class each",
            "cutmix": train.cutmix and "mixes images of one class each",
            "teacher": train.teacher.checkpoint and "compares probabilities of classes that exclude each other",
        }
        several = {
            "loss.focal": train.loss.focal and "weighs the labels of an image one by one",
            "thresholds": "thresholds" in train.model_fields_set
            and train.thresholds != "f1"
            and "is of labels that do not exclude each other",
        }
        if task == "multitask":
            single |= several if not self.data.table.multilabel_columns else {}
        for key, reason in (several if task == "single" else single).items():
            if reason:
                raise ValueError(f"train.{key} {reason}, which is not so with data.task: {task}; leave it out")
        return self

    def _check_heads(self) -> None:
        """Refuse options of heads that there are not, and figures that are of another kind of head."""
        table = self.data.table
        for name, options in self.train.heads.items():
            if name not in table.label_columns:
                raise ValueError(f"train.heads has {name}, and the heads are {', '.join(table.label_columns)}")
            figures = FIGURES_OF["multilabel" if name in table.multilabel_columns else "single"]
            if options.best is not None and (options.best == "loss" or options.best not in figures):
                valid = ", ".join(figure for figure in figures if figure != "loss")
                raise ValueError(f"train.heads.{name}.best is {options.best}; set it to {valid}")

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
