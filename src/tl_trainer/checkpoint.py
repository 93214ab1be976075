"""The checkpoint format: plain data and tensors only, loaded without unpickling code, always."""

from __future__ import annotations

import platform
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torchvision
from pydantic import AfterValidator, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

import tl_trainer
from tl_trainer.data.dataset import name_hashes
from tl_trainer.errors import CheckpointError
from tl_trainer.ground.sealed import check_seal, load_plain, save_sealed
from tl_trainer.ground.wording import shown

FORMAT = "tl-trainer checkpoint"
VERSION = 6
OLDER = (2, 3, 4, 5)  # which are read too
REMOVED = "tiny_resnet"  # the backbone that came along while the format was version 2


def _is_name_hashes(value: Tensor) -> Tensor:
    if value.dtype != torch.int64 or value.dim() != 1:
        raise ValueError("no hashes of names")
    return value


def _is_row_of_scores(value: Tensor) -> Tensor:
    if value.dtype != torch.float64 or value.dim() != 1:
        raise ValueError("no scores")
    return value


NameHashes = Annotated[Tensor, AfterValidator(_is_name_hashes)]
LabelScores = Annotated[Tensor, AfterValidator(_is_row_of_scores)]


class Calibration(NamedTuple):
    """What turns the logits of an image that may have several labels into them, each from its threshold on.

    temperature: a number, or None; of several heads a list with one for each.
    """

    temperature: Any
    thresholds: list[float]


class BackboneIdentity(TypedDict):
    """Name, weights and tap as configured, the SHA-256 of the frozen state, and the images' side it was built for.

    pretrained: whether it was built for pretrained weights, where `weights` is a run's checkpoint and does not tell.
    """

    name: str
    weights: str
    tap: str
    sha256: str
    size: NotRequired[int]
    pretrained: NotRequired[bool]


@dataclass(config=ConfigDict(strict=True, arbitrary_types_allowed=True))
class Checkpoint:
    """Everything that tl-eval and tl-predict need, and for last.pth what --resume needs.

    config: the resolved configuration. classes: names in index order. preprocessing: the evaluation pipeline spelled
    out. backbone: which one, and its weights. features: the size of the head's input. trained: the tensors that
    training changed. frozen: the others, None while a run is going on. epoch: epochs completed. metrics: the validation
    figures of these weights. val_split: the `name_hashes` of the validation split, where the run drew it. val_images:
    the contents of its images. temperature: fitted on these when the run ends, None before, where they are too few, and
    in last.pth. conformal: at the same time, `conformal.label_scores` of these images. thresholds: at the same time, of
    each label the probability from which on an image has it, where it may have several. resume: the optimizer and so
    on, only in last.pth.
    """

    config: dict[str, Any]
    classes: list[str]
    preprocessing: list[dict[str, Any]]
    backbone: BackboneIdentity
    features: PositiveInt
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor] | None
    epoch: NonNegativeInt
    metrics: dict[str, Any] | None
    val_split: NameHashes | None
    val_images: list[str]
    temperature: float | list[float | None] | None = None
    conformal: LabelScores | None = None
    thresholds: list[float] | None = None
    resume: dict[str, Any] | None = None

    @property
    def calibration(self) -> Any:
        """As the task has it: the temperature, with thresholds a Calibration; None where there is neither."""
        return self.temperature if self.thresholds is None else Calibration(self.temperature, self.thresholds)

    @property
    def backbone_pretrained(self) -> bool:
        """Whether the backbone was built for pretrained weights: two of torchvision's then transform their input."""
        return self.backbone.get("pretrained", self.backbone["weights"] != "none")


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically. Raises RunError where it cannot be written."""
    content = {"format": FORMAT, "version": VERSION, "libraries": library_versions()}
    save_sealed(path, content | {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)})


def load(path: Path, *, mapped: bool = True) -> Checkpoint:
    """Read a checkpoint. mapped: whether its tensors are memory-mapped; Windows then does not let the file be replaced.

    Raises CheckpointError where it is damaged, another program's, from a newer version, or not plain data.
    """
    sealed = check_seal(path)
    content = load_plain(path, mapped=mapped)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of tl-trainer; give best.pth or last.pth of one of its runs")
    version, backbone = content.get("version"), content.get("backbone")
    unknown = None
    if version not in (*OLDER, VERSION):
        unknown = f"format version {shown(version)}, this tl-trainer reads {OLDER[0]} to {VERSION}"
    elif isinstance(backbone, dict) and backbone.get("name") == REMOVED:
        unknown = f"its backbone, {REMOVED}, is not part of tl-trainer any more"
    if unknown:
        libraries = content.get("libraries")
        writer = libraries.get("tl-trainer") if isinstance(libraries, dict) else None
        raise CheckpointError(f"{path}: {unknown}; install the version that wrote it ({shown(writer)})")
    if not sealed:
        raise CheckpointError(f"{path}: damaged: its end, with the checksum, is missing")
    if version in OLDER:
        content = _renewed(content)
    try:
        # What is missing becomes (), which is of no field's kind: a default is for code, not for files.
        return Checkpoint(**{field.name: content.get(field.name, ()) for field in fields(Checkpoint)})
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise CheckpointError(f"{path}: damaged checkpoint: {name} is missing or of the wrong kind") from error


def _renewed(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of an older version with what that did not have.

    Version 5 kept no thresholds, version 4 no conformal scores, version 3 the names of the validation split instead of
    their hashes. Version 2 did not say how wide the head's input is: its first matrix has that width.
    """
    content = {**content, "thresholds": None}
    if content["version"] == 5:
        return content
    content = {**content, "conformal": None}
    if content["version"] == 4:
        return content
    names = content.get("val_names", ())
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        names = torch.tensor(name_hashes(names), dtype=torch.int64)
    content = {**content, "val_split": names}
    if content["version"] != 2:
        return content
    trained = content.get("trained")
    named = trained.items() if isinstance(trained, dict) else ()
    first = [value for key, value in named if str(key).startswith("head.") and isinstance(value, Tensor)]
    return {**content, "features": first[0].shape[-1] if first and first[0].dim() == 2 else None}


def library_versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "tl-trainer": tl_trainer.__version__,
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
