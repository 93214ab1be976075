"""Chains read off a forward: cut wherever one value alone goes on; else a body and its last Linear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tl_trainer.errors import SettingError
from tl_trainer.models.chain import chain, tapped
from tl_trainer.models.classifier import Classifier


class Branching(nn.Module):
    """A stem, two branches and a parameter that join, a table of positions, a last layer; and a spare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.fc = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.rand(6))
        self.register_buffer("positions", torch.rand(6))
        self.spare = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x).relu()
        x = self.left(x) * self.scale + self.right(x)
        x = x + self.positions
        if mask is not None:
            x = x * mask
        return self.fc(x)  # type: ignore[no-any-return]


class Deciding(nn.Module):
    """A forward that looks at the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x) if x.sum() > 0 else self.first(-x))  # type: ignore[no-any-return]


def test_what_branches_and_joins_is_one_stage() -> None:
    model, x = Branching().eval(), torch.rand(3, 4)
    stages = chain(model)
    assert [stage.name for stage in stages] == ["stem", "relu", "right", "positions", "fc"]
    found = x
    for stage in stages:
        found = stage.module(found)
    assert torch.equal(found, model(x))
    assert [stage.name for stage in stages if stage.owns("scale")] == ["right"]
    assert [stage.name for stage in stages if stage.owns("left.weight")] == ["right"]
    assert not any(stage.owns("spare") for stage in stages)


@pytest.mark.parametrize("assign", [False, True])
def test_a_segment_follows_the_tensors_of_its_model(assign: bool) -> None:
    backbone, other, x = tapped(Branching(), "branching", "logits"), Branching(), torch.rand(3, 4)
    backbone.model.load_state_dict(other.state_dict(), assign=assign)
    backbone.load_state_dict(backbone.state_dict(), assign=assign)
    assert torch.equal(backbone(x), other(x))
    assert torch.equal(backbone.double()(x.double()), other.double()(x.double()))


def test_what_is_frozen_and_what_trains_of_a_segment() -> None:
    classifier = Classifier(tapped(Branching(), "branching", "penultimate"), nn.Linear(6, 3), "positions")
    assert {key.removeprefix("backbone.model.") for key in classifier.frozen_state()} == {
        "stem.weight", "stem.bias", "left.weight", "left.bias", "right.weight", "right.bias", "scale", "spare",
    }  # fmt: skip
    assert {key.removeprefix("backbone.model.") for key in classifier.trained_state()} == {
        "positions", "head.weight", "head.bias",
    }  # fmt: skip
    assert {name for name, value in classifier.named_parameters() if value.requires_grad} == {
        "head.weight", "head.bias",
    }  # fmt: skip


def test_the_stages_after_the_tap_hold_no_tensors() -> None:
    backbone = tapped(Branching(), "branching", "relu")
    assert {key for key in backbone.state_dict() if "spare" not in key} == {"model.stem.weight", "model.stem.bias"}


def test_a_forward_that_decides_is_a_body_and_its_last_linear() -> None:
    model = Deciding().eval()
    assert [stage.name for stage in chain(model)] == ["body", "fc"]
    x = torch.rand(3, 4)
    before = model.first(x)
    assert torch.equal(tapped(model, "deciding", "penultimate")(x), before)


def test_tokens_are_for_vision_transformers() -> None:
    with pytest.raises(SettingError, match="branching has no tokens; use penultimate") as raised:
        tapped(Branching(), "branching", "cls")
    assert raised.value.key == "model.tap"


class Odd(nn.Module):
    """A value used twice, a module with an argument, one called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scaled = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(input=x)
        x = x * x
        x = self.scaled(x, 3.0)
        return self.fc(x)  # type: ignore[no-any-return]


class Scaled(nn.Module):
    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return x * by


def test_arguments_of_a_stage_are_kept() -> None:
    model, found = Odd().eval(), torch.rand(2, 4)
    expected = model(found)
    for stage in chain(model):
        found = stage.module(found)
    assert torch.equal(found, expected)
