"""The network: a frozen prefix of the chain, its trainable suffix, and the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tl_trainer.models.chain import Backbone, Stage
from tl_trainer.models.weights import with_versions

State = dict[str, Tensor]


class Classifier(nn.Module):
    """`trainable` says where training starts: head, a stage name, or all. Everything before is frozen; new stages train
    with the head.

    A frozen stage stays in eval mode also while the rest trains: no dropout, BatchNorm statistics fixed.
    freeze_batchnorm: whether BatchNorm stays as it is in pretrained stages that train too. Raises SettingError for an
    unknown stage.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, trainable: str, *, freeze_batchnorm: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.freeze_batchnorm = freeze_batchnorm
        self.thaw(trainable)
        self.changing = self.trained  # in this phase or in another

    def thaw(self, trainable: str) -> None:
        """Have another part of what is `changing` train."""
        stages = self.backbone.stages
        start = {"head": len(stages) - self.backbone.added, "all": 0}.get(trainable)
        start = self.backbone.index(trainable) if start is None else start
        self.trainable = trainable
        self.frozen: list[Stage] = stages[:start]
        self.trained: list[Stage] = stages[start:]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_is_one_of(self.trained, name))
        for norm in self._kept_norms():
            norm.requires_grad_(False)
        self.train(self.training)

    def prefix(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> the output of the last frozen stage, without a gradient."""
        with torch.no_grad():
            for stage in self.frozen:
                images = stage.module(images)
        return images

    def embed(self, features: Tensor) -> Tensor:
        """The prefix's output -> the input of the head (N, features)."""
        for stage in self.trained:
            features = stage.module(features)
        return features.flatten(1)

    def suffix(self, features: Tensor) -> Tensor:
        """The prefix's output -> logits (N, classes)."""
        logits: Tensor = self.head(self.embed(features))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, classes)."""
        return self.suffix(self.prefix(images))

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for module in [*(stage.module for stage in self.frozen), *self._kept_norms()]:
            module.eval()
        return self

    @property
    def trains_batch_norm(self) -> bool:
        """Whether a BatchNorm takes its statistics from the batch, so that a batch needs two images."""
        return len(_norms(self.trained)) > len(self._kept_norms())

    def layers(self) -> list[tuple[str, dict[str, nn.Parameter]]]:
        """The parameters that train, by layer: the head's, then those of each stage, the one before the head first."""
        rest = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        layers = [("head", {name: rest.pop(name) for name in [*rest] if name.startswith("head.")})]
        for stage in reversed(self.trained):
            owned = [name for name in rest if stage.owns(name.removeprefix("backbone.model."))]
            if owned:
                layers.append((stage.name, {name: rest.pop(name) for name in owned}))
        return layers

    def trained_state(self) -> State:
        """The tensors that training changes: those of the stages that are `changing`, and the head's."""
        return {key: value for key, value in self.state_dict().items() if _is_one_of(self.changing, key)}

    def frozen_state(self) -> State:
        """The tensors that training leaves as they are."""
        return {key: value for key, value in self.state_dict().items() if not _is_one_of(self.changing, key)}

    def prefix_state(self) -> State:
        """The tensors that this phase leaves as they are."""
        return {key: value for key, value in self.state_dict().items() if not _is_one_of(self.trained, key)}

    def load_trained_state(self, state: State) -> None:
        """Fill what `trained_state` gives; AssertionError where the keys are not the same."""
        assert state.keys() == self.trained_state().keys()
        self.load_state_dict(with_versions(state, self), strict=False)

    def restore(self, trained: State, frozen: State | None) -> None:
        """Take over saved tensors as they are; RuntimeError where they do not fit. frozen: None keeps those it has."""
        self.load_state_dict(with_versions({**(frozen or {}), **trained}, self), strict=frozen is not None, assign=True)

    def _kept_norms(self) -> list[nn.Module]:
        """The BatchNorm that stays as it is in stages that train."""
        new = self.backbone.stages[len(self.backbone.stages) - self.backbone.added :]
        return _norms([stage for stage in self.trained if stage not in new]) if self.freeze_batchnorm else []


def _norms(stages: list[Stage]) -> list[nn.Module]:
    return [module for stage in stages for module in stage.module.modules() if isinstance(module, _BatchNorm)]


def _is_one_of(stages: list[Stage], key: str) -> bool:
    """Whether the tensor is the head's or one of the stages'."""
    name = key.removeprefix("backbone.model.")
    return name == key or any(stage.owns(name) for stage in stages)
