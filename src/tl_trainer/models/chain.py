"""A model as a chain of named stages, read off its own forward.

Where features are tapped, where training starts, what is computed once: each is an index into the chain. Stage names
are the model's own dotted module names (`features.10`, `layer4.2`, `blocks.3`); a name that covers several stages
(`layer4`) means all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tl_trainer.errors import SettingError
from tl_trainer.ground.wording import unknown

TAPS = ("penultimate", "pooled", "logits")
TOKEN_TAPS = ("cls", "patch_mean", "cls+patch_mean")
WHOLE = "whole"  # the tap of a model that has no classifier any more

_POOLING = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.MaxPool2d)


@dataclass(frozen=True)
class Stage:
    """One link of the chain: its name, what it does, and which of the model's modules and parameters it uses, where
    that is not the one of its name."""

    name: str
    module: nn.Module
    uses: tuple[str, ...] = ()

    def owns(self, key: str) -> bool:
        """Whether the tensor with this name in the model's state dict is one of the stage's."""
        return any(not name or key == name or key.startswith(f"{name}.") for name in self.uses or (self.name,))


class Function(nn.Module):
    """A stage that the model's forward writes as a function or a method: flatten, mean, relu."""

    def __init__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)


class Backbone(nn.Module):
    """The chain up to the tap. `model` is the model that owns the weights, without the stages after it.

    The state dict's keys are the model's own with the prefix `model.`.
    """

    def __init__(self, model: nn.Module, stages: list[Stage], features: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.revision = ""  # of the weights in a hub, where they are from one
        self.random: frozenset[str] = frozenset()  # the model's tensors beside those of another
        self.features = features  # the size of the output, where it does not depend on that of the images
        self.added = 0  # stages at the end that are new
        self.stages = stages  # a plain list: the modules are registered once, in `model`
        model.register_load_state_dict_post_hook(lambda *_: self._relink())  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, features): the tapped output, flattened."""
        for stage in self.stages:
            x = stage.module(x)
        return x.flatten(1)

    def index(self, name: str) -> int:
        """The index of the first stage that `name` covers; SettingError for `model.trainable` where there is none."""
        stages = self.stages[: len(self.stages) - self.added]
        covered = _covered(stages, name)
        if not covered:
            raise SettingError("model.trainable", unknown("stage", name, ["head", "all", *_stage_names(stages)]))
        return covered[0]

    def append(self, new: nn.Sequential) -> None:
        """Put new stages behind the others, called extra.0, extra.1 and so on."""
        self.model.add_module("extra", new)
        self.stages = [*self.stages, *(Stage(f"extra.{name}", module) for name, module in new.named_children())]
        self.added, self.features = len(new), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._relink()
        return self

    def _relink(self) -> None:
        """Point the segments at the tensors that the model has now: moving and loading may put others in place."""
        for stage in self.stages:
            if isinstance(stage.module, fx.GraphModule):
                _link(stage.module, self.model)


def tapped(model: nn.Module, name: str, tap: str) -> Backbone:
    """The backbone up to the tap: one of TAPS or a stage. Raises SettingError where the model has no such tap."""
    stages = chain(model)
    if tap in TOKEN_TAPS:
        return _tokens(model, stages, name, tap)
    end = _tap_index(stages, name, tap)
    if stages[0].module is model and end == len(stages):
        return Backbone(model, stages[:1])  # not a chain, so its last Linear is inside the body unless it is cut off
    kept = {name for stage in stages[:end] for name in stage.uses or (stage.name,)}
    unused = [stage for stage in stages[end:] if not isinstance(stage.module, Function)]
    for name in (name for stage in unused for name in stage.uses or (stage.name,) if name not in kept):
        parent, _, leaf = name.rpartition(".")
        place = model.get_submodule(parent)
        setattr(place, leaf, nn.Identity() if isinstance(getattr(place, leaf), nn.Module) else None)
    following = [stage.module for stage in stages[end:] if isinstance(stage.module, nn.Linear)]
    return Backbone(model, stages[:end], following[0].in_features if tap in TAPS and following else None)


def chain(model: nn.Module) -> list[Stage]:
    """The model's forward as a chain, cut wherever only one value goes on; else the body and its last Linear."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    try:
        nodes = list(_TopLevel().trace(model, concrete_args=defaults).nodes)
    except Exception:  # a forward whose control flow depends on its input, and any Python may stand in one
        return _body_and_linear(model)
    moving = {nodes[0]}  # what depends on the input; the rest is computed anew in each segment that needs it
    for node in nodes:
        if moving.intersection(node.all_input_nodes):
            moving.add(node)
    order = [node for node in nodes if node in moving and node.op != "output"]
    stages: list[Stage] = []
    start, last_use = 0, {node: max(map(nodes.index, node.users), default=0) for node in order}
    for end in range(1, len(order)):
        here = nodes.index(order[end])
        if not any(last_use[node] > here for node in order[start:end]):  # `order[end]` alone goes on
            stages += _segment(model, order[start], order[start + 1 : end + 1])
            start = end
    if start != len(order) - 1 or nodes[-1].args != (order[-1],):
        return _body_and_linear(model)
    return stages


class _TopLevel(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _segment(model: nn.Module, before: fx.Node, nodes: Sequence[fx.Node]) -> list[Stage]:
    """The stages of the nodes between two cuts, the first of which takes the value of `before`."""
    node, target = nodes[-1], str(nodes[-1].target)
    others = [*node.args[1:], *node.kwargs.values()]
    constant = not any(isinstance(other, fx.Node) for other in others)
    if len(nodes) == 1 and node.args[:1] == (before,) and constant and (node.op != "call_module" or not others):
        if node.op == "call_module":
            return _flattened(target, model.get_submodule(target))
        if node.op == "call_method":
            return [Stage(target, Function(getattr(Tensor, target), *node.args[1:], **node.kwargs))]
        function: Any = node.target
        return [Stage(function.__name__, Function(function, *node.args[1:], **node.kwargs))]
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    known[before] = graph.placeholder("x")
    for needed in _with_constants(nodes, before):
        known[needed] = graph.node_copy(needed, known.__getitem__)
    graph.output(known[node])
    uses = tuple(str(item.target) for item in graph.nodes if item.op in ("call_module", "get_attr"))
    module = fx.GraphModule(nn.Module(), fx.Graph())
    for name in uses:
        _install(module, name, model)
    module.graph = graph
    function_name = getattr(node.target, "__name__", target)
    return [Stage(uses[-1] if uses else function_name, module, uses)]


def _with_constants(nodes: Sequence[fx.Node], before: fx.Node) -> list[fx.Node]:
    """The nodes with those that they need and that do not depend on the input, each after what it needs."""
    found: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        if node is not before and node not in found:
            for needed in node.all_input_nodes:
                add(needed)
            found[node] = None

    for node in nodes:
        add(node)
    return list(found)


def _install(module: fx.GraphModule, name: str, model: nn.Module) -> None:
    """Have the model's module or tensor called `name` in the segment too: the same object, not a copy."""
    parent, _, leaf = name.rpartition(".")
    place: nn.Module = module
    for part in filter(None, parent.split(".")):
        if part not in place._modules:
            place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    value = getattr(model.get_submodule(parent), leaf)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        place.register_buffer(leaf, value)
    else:
        setattr(place, leaf, value)


def _link(module: fx.GraphModule, model: nn.Module) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            parent, _, leaf = str(node.target).rpartition(".")
            setattr(module.get_submodule(parent), leaf, getattr(model.get_submodule(parent), leaf))


def _flattened(name: str, module: nn.Module) -> list[Stage]:
    if type(module).forward is nn.Sequential.forward:
        return [stage for child, inner in module.named_children() for stage in _flattened(f"{name}.{child}", inner)]
    return [Stage(name, module)]


def _body_and_linear(model: nn.Module) -> list[Stage]:
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    body = Stage("body", model, ("",))
    return [body, Stage(*linear[-1])] if linear else [body]


def _tokens(model: nn.Module, stages: list[Stage], name: str, tap: str) -> Backbone:
    """The class token, the mean of the patches, or both, of a vision transformer's last tokens (N, T, C)."""
    norm, prefix = getattr(model, "norm", None), getattr(model, "num_prefix_tokens", None)
    end = [index for index, stage in enumerate(stages) if stage.module is norm]
    if not end or prefix is None:
        raise SettingError("model.tap", f"{name} has no tokens; use penultimate")
    if "cls" in tap and getattr(model, "cls_token", None) is None:
        raise SettingError("model.tap", f"{name} has no class token; use patch_mean or penultimate")
    picks: dict[str, Callable[[Tensor], Tensor]] = {
        "cls": lambda x: x[:, 0],
        "patch_mean": lambda x: x[:, prefix:].mean(dim=1),
        "cls+patch_mean": lambda x: torch.cat([x[:, 0], x[:, prefix:].mean(dim=1)], dim=1),
    }
    width = int(getattr(model, "num_features")) * (2 if "+" in tap else 1)  # noqa: B009
    return Backbone(model, [*stages[: end[0] + 1], Stage(tap, Function(picks[tap]))], width)


def _tap_index(stages: list[Stage], backbone: str, tap: str) -> int:
    """How many stages are before the tap."""
    if tap == WHOLE:
        return len(stages)
    if tap == "logits":
        if isinstance(stages[-1].module, nn.Identity):
            raise SettingError("model.tap", f"{backbone} has no classifier, so no logits; set model.tap: penultimate")
        return len(stages)
    if tap == "penultimate":
        # An Identity at the end is the empty place for a classifier.
        linear = [index for index, stage in enumerate(stages) if isinstance(stage.module, (nn.Linear, nn.Identity))]
        if not linear:
            raise SettingError("model.tap", f"{backbone} has no Linear layer; set model.tap to pooled or a stage name")
        return linear[-1]
    if tap == "pooled":
        pooling = [index for index, stage in enumerate(stages) if pools(stage)]
        return pooling[-1] + 1 if pooling else _tap_index(stages, backbone, "penultimate")
    covered = _covered(stages, tap)
    if not covered:
        raise SettingError("model.tap", unknown("tap", tap, [*TAPS, *_stage_names(stages)]))
    return covered[-1] + 1


def pools(stage: Stage) -> bool:
    """Whether it takes the mean or the largest over height and width."""
    return isinstance(stage.module, _POOLING) or stage.name in ("mean", "adaptive_avg_pool2d", "global_pool")


def _covered(stages: list[Stage], name: str) -> list[int]:
    return [i for i, stage in enumerate(stages) if stage.name == name or stage.name.startswith(f"{name}.")]


def _stage_names(stages: list[Stage]) -> list[str]:
    """Names to choose from: features, features.0, avgpool; the top levels alone where those would not fit on a line."""
    top, both = (
        sorted({".".join(stage.name.split(".")[:level]) for stage in stages for level in levels})
        for levels in ((1,), (1, 2))
    )
    return both if len(", ".join(both)) < 350 else top
