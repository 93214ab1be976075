"""The checkpoint format: plain data and tensors only, loaded without unpickling code, always."""

from __future__ import annotations

import platform
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

import tl_trainer
from tl_trainer.errors import CheckpointError, shown
from tl_trainer.files import check_seal, load_plain, save_sealed

FORMAT = "tl-trainer checkpoint"
VERSION = 2


@dataclass
class Checkpoint:
    """Everything that tl-eval and tl-predict need, and for last.pth what --resume needs.

    config: the resolved configuration. classes: names in index order. preprocessing: the evaluation pipeline spelled
    out. backbone: {name, weights, tap, sha256 of the frozen state}. trained: the tensors that training changed.
    frozen: the others, None while a run is going on. epoch: epochs completed. metrics: the validation figures of these
    weights. val_names: the validation split, where the run drew it. val_images: the contents of its images.
    temperature: fitted on these, None where they are too few, and in last.pth. resume: the optimizer and so on, only
    in last.pth.
    """

    config: dict[str, Any]
    classes: list[str]
    preprocessing: list[dict[str, Any]]
    backbone: dict[str, Any]
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor] | None
    epoch: int
    metrics: dict[str, Any] | None
    val_names: list[str] | None
    val_images: list[str]
    temperature: float | None = None
    resume: dict[str, Any] | None = None


_TYPES: dict[str, tuple[type, ...]] = {
    "config": (dict,),
    "classes": (list,),
    "preprocessing": (list,),
    "backbone": (dict,),
    "trained": (dict,),
    "frozen": (dict, type(None)),
    "epoch": (int,),
    "metrics": (dict, type(None)),
    "val_names": (list, type(None)),
    "val_images": (list,),
    "temperature": (float, type(None)),
    "resume": (dict, type(None)),
}
_ITEM_TYPES: dict[str, type] = {"classes": str, "val_images": str, "trained": Tensor, "frozen": Tensor}


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint atomically. Raises RunError where it cannot be written."""
    content = {"format": FORMAT, "version": VERSION, "libraries": library_versions()}
    content |= {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    save_sealed(path, content)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, its tensors memory-mapped.

    Raises CheckpointError where it is damaged, another program's, from a newer version, or not plain data.
    """
    sealed = check_seal(path)
    content = load_plain(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of tl-trainer; give best.pth or last.pth of one of its runs")
    if content.get("version") != VERSION:
        libraries = content.get("libraries")
        writer = libraries.get("tl-trainer") if isinstance(libraries, dict) else None
        raise CheckpointError(
            f"{path}: format version {shown(content.get('version'))}, this tl-trainer reads {VERSION}; install the "
            f"version that wrote it ({shown(writer)})"
        )
    if not sealed:
        raise CheckpointError(f"{path}: damaged: its end, with the checksum, is missing")
    for name in _TYPES:
        if name not in content or not _is_right_kind(name, content[name]):
            raise CheckpointError(f"{path}: damaged checkpoint: {name} is missing or of the wrong kind")
    return Checkpoint(**{name: content[name] for name in _TYPES})


def _is_right_kind(name: str, value: Any) -> bool:
    items: list[Any] = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return isinstance(value, _TYPES[name]) and all(isinstance(item, _ITEM_TYPES.get(name, object)) for item in items)


def library_versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "tl-trainer": tl_trainer.__version__,
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
