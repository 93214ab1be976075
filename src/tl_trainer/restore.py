"""A checkpoint -> classifier, preprocessing and class names, exactly as they were trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from tl_trainer import checkpoint
from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.load import Loaded, from_checkpoint
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import CheckpointError, SettingError, is_out_of_memory
from tl_trainer.models.backbones import build_backbone, empty_backbone, resolve_weights, state_hash
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.heads import build_head
from tl_trainer.network import Network

log = logging.getLogger(__name__)


@dataclass
class Restored:
    """A trained classifier in eval mode on its device, and what belongs to it."""

    checkpoint: Checkpoint
    loaded: Loaded
    network: Network
    pipeline: Pipeline

    @property
    def classes(self) -> list[str]:
        """The class names in index order."""
        return self.checkpoint.classes


def restore(path: Path, device: str | None = None) -> Restored:
    """Read a checkpoint, or a run directory's best.pth, and put its classifier on `device` (None: as configured).

    Needs no network, unless the run was killed before its backbone was written into best.pth and the weights are no
    longer cached. Raises CheckpointError where the file is damaged or does not fit together.
    """
    if path.is_dir():
        path = path / "best.pth"
    if not path.exists() and path.with_name("last.pth").exists():
        raise CheckpointError(f"{path}: no epoch of this run has ended yet; go on with --resume {path.parent}")
    saved = checkpoint.load(path)
    loaded = from_checkpoint(saved.config, path)
    try:
        pipeline = Pipeline(saved.preprocessing, "preprocessing")
        classifier = _classifier(saved, loaded)
        identity = {key: saved.backbone[key] for key in ("name", "sha256")}
    except (SettingError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this version of tl-trainer or torchvision: {error}") from error
    except RuntimeError as error:  # load_state_dict's word for tensors of another shape or name
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: its weights do not fit its configuration: {str(error).splitlines()[-1]}"
        ) from error
    config, place = loaded.config, resolve_device(device or loaded.config.device)
    precision = config.train.precision
    if precision == "fp16" and place.type != "cuda":
        log.warning("trained in fp16, which needs CUDA; computing in fp32 on %s", place.type)
        precision = "fp32"
    network = Network(classifier.eval(), place, precision, config.features, identity)
    return Restored(saved, loaded, network, pipeline)


def _classifier(saved: Checkpoint, loaded: Loaded) -> Classifier:
    model = loaded.config.model
    first, *_ = (value.shape[1] for key, value in saved.trained.items() if key.startswith("head.") and value.dim() == 2)
    weights = saved.backbone["weights"]
    with torch.device("meta"):
        head = build_head(first, model.head.hidden, len(saved.classes), model.head.dropout)
    if saved.frozen is None:
        member = resolve_weights(model.backbone, weights)
        backbone = build_backbone(model.backbone, member, model.tap, loaded.config.seed)
        classifier = Classifier(backbone, head, model.trainable)
        if state_hash(classifier.frozen_state()) != saved.backbone["sha256"]:
            raise CheckpointError(
                f"the weights of {model.backbone} are not those it was trained with; end its run with --resume, "
                "which writes them into best.pth"
            )
        classifier.load_state_dict(saved.trained, strict=False, assign=True)
    else:
        classifier = Classifier(empty_backbone(model.backbone, weights != "none", model.tap), head, model.trainable)
        classifier.load_state_dict({**saved.frozen, **saved.trained}, assign=True)
    return classifier


def resolve_device(setting: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises SettingError for a device that this machine does not have."""
    if setting == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise SettingError("device", f"use auto, cpu, cuda, cuda:N or mps, not {setting!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SettingError("device", f"{setting}: this machine has {count} CUDA devices; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device", "mps: this machine has no Apple GPU that torch can use; use --device cpu")
    return device
