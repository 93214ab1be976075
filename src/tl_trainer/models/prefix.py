"""The frozen prefix of the chain, made as fast as the machine allows.

What is frozen needs no gradient and never changes, so its BatchNorm is folded into the convolutions (as in torch's own
`fuse_conv_bn_weights`), memory is laid out channels_last, and the arithmetic is bf16 where the processor has that.
Convolutions that pad by their input's size, as TensorFlow does, get the padding of the size at hand.
"""

from __future__ import annotations

import copy
import itertools
import logging
import platform
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tl_trainer.errors import SettingError
from tl_trainer.models.chain import Stage

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Compiling takes a minute or two; below this many images it does not pay.
IMAGES_WORTH_COMPILING = {"cpu": 5_000, "cuda": 50_000}


def prefix_precision(setting: str, device: torch.device) -> str:
    """`auto` is bf16 where the device computes it natively (AVX512-BF16, AMX, a recent GPU), else fp32.

    Raises SettingError for fp16 without CUDA.
    """
    if setting == "fp16" and device.type != "cuda":
        raise SettingError("train.precision", f"fp16 needs CUDA, this run is on {device.type}; use fp32 or bf16")
    if setting != "auto":
        return setting
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return "bf16" if native else "fp32"


def pays_to_compile(device: torch.device, images: int) -> bool:
    """Whether compiling pays for so many images, and can be done here."""
    if images < IMAGES_WORTH_COMPILING.get(device.type, images + 1):
        return False
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        log.warning("performance.compile needs a C++ compiler, and none was found; going on without it")
        return False
    return True


class FrozenPrefix:
    """The frozen stages as one function, (N, 3, H, W) float32 -> the last stage's output in `precision`.

    It has its own copy of the weights, so the classifier stays what is saved. `calls` counts the batches it computed.
    """

    def __init__(
        self, stages: Sequence[Stage], device: torch.device, precision: str, *, compiled: bool = False
    ) -> None:
        self.dtype = DTYPES[precision]
        self._graph = _converted(_folded(stages), device, self.dtype)
        self._compiled = compiled
        self._size: torch.Size | None = None  # of the images that `network` is for, where that makes a difference
        self._pads = bool(_padding_by_size(self._graph))
        self.network: nn.Module = self._graph if self._pads else self._ready(self._graph)
        self.calls = 0

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self._pads and images.shape[-2:] != self._size:
            self.network, self._size = self._ready(_padded(self._graph, images.to(self.dtype))), images.shape[-2:]
        return self.network(images.to(dtype=self.dtype, memory_format=torch.channels_last))  # type: ignore[no-any-return]

    def _ready(self, graph: nn.Module) -> nn.Module:
        return torch.compile(graph, options={"freezing": True}) if self._compiled else graph  # type: ignore[return-value]


def _folded(stages: Sequence[Stage]) -> fx.GraphModule:
    """The stages as one graph, with every BatchNorm that directly follows a convolution folded into it.

    The graph shares all other modules with the stages, so nothing in it may be changed in place.
    """
    graph = _trace(nn.Sequential(*(stage.module for stage in stages)))
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before, norm = node.args[0], modules[node.target]
        conv = modules.get(str(before.target)) if before.op == "call_module" else None
        activation = getattr(norm, "act", None)  # timm's BatchNormAct2d has one inside
        plain = type(conv) is nn.Conv2d or type(conv).__name__ == "Conv2dSame"  # others may standardise their weight
        if not isinstance(conv, nn.Conv2d) or not plain or len(before.users) > 1 or not _foldable(norm):
            continue
        fused = copy.copy(conv)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        fused._parameters = {"weight": weight, "bias": bias}
        parent, _, leaf = str(before.target).rpartition(".")
        setattr(graph.get_submodule(parent), leaf, fused)
        modules[str(before.target)] = fused
        if activation is None:
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
        else:
            parent, _, leaf = str(node.target).rpartition(".")
            setattr(graph.get_submodule(parent), leaf, activation)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _foldable(norm: nn.BatchNorm2d) -> bool:
    """Whether all that it computes is known: torch's own, or timm's with an activation and nothing else behind it."""
    if type(norm) is nn.BatchNorm2d:
        return True
    return type(norm).__name__ == "BatchNormAct2d" and isinstance(norm.drop, nn.Identity)


def _padding_by_size(graph: fx.GraphModule) -> dict[str, nn.Conv2d]:
    """The convolutions of the graph that compute their padding from their input's size: timm's Conv2dSame."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    modules = {name: module for name, module in graph.named_modules() if name in called}
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and type(module).__name__ == "Conv2dSame"
    }


def _padded(graph: fx.GraphModule, images: Tensor) -> fx.GraphModule:
    """The graph with a pad of known size before each convolution that would compute it, for images of this size."""
    sizes: dict[str, torch.Size] = {}

    class Watch(fx.Interpreter):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            sizes[str(target)] = args[0].shape[-2:]
            return super().call_module(target, args, kwargs)

    Watch(graph).run(images[:1])
    found = copy.copy(graph)
    for name, module in _padding_by_size(graph).items():
        pad: list[int] = []
        for axis in (1, 0):  # the last dimension first, as `nn.ConstantPad2d` wants it
            reach, stride = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1, module.stride[axis]
            total = max((-(-sizes[name][axis] // stride) - 1) * stride + reach - sizes[name][axis], 0)
            pad += [total // 2, total - total // 2]
        even = pad[0] == pad[1] and pad[2] == pad[3]
        fixed = copy.copy(module)
        fixed.__class__ = nn.Conv2d
        fixed.padding = (pad[2], pad[0]) if even else (0, 0)
        padding = nn.ConstantPad2d((pad[0], pad[1], pad[2], pad[3]), 0.0)
        parent, _, leaf = name.rpartition(".")
        setattr(found.get_submodule(parent), leaf, fixed if even else nn.Sequential(padding, fixed))
    return found


def _converted(graph: fx.GraphModule, device: torch.device, dtype: torch.dtype) -> fx.GraphModule:
    """The graph with its own tensors: on `device`, in `dtype`, the convolutions' in channels_last."""

    def convert(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        converted = tensor.detach().to(device, kind, memory_format=layout)
        return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted

    tensors = {id(tensor): convert(tensor) for tensor in itertools.chain(graph.parameters(), graph.buffers())}
    return copy.deepcopy(graph, tensors)  # the memo makes it take these instead of copying the originals


def _trace(network: nn.Sequential) -> fx.GraphModule:
    """The whole as one graph; stages whose control flow cannot be traced stay as they are."""
    try:
        return fx.GraphModule(network, _Tracer().trace(network))
    except Exception:  # any Python may stand in a forward, and anything may happen when it meets a proxy
        opaque = {name for name, stage in network.named_children() if not _traceable(stage)}
        return fx.GraphModule(network, _Tracer(opaque).trace(network))


def _traceable(stage: nn.Module) -> bool:
    try:
        _Tracer().trace(stage)
    except Exception:
        return False
    return True


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own, the `opaque`, and other libraries' kinds of what can be folded."""

    def __init__(self, opaque: Collection[str] = ()) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or module_qualified_name in self.opaque
        return known or super().is_leaf_module(m, module_qualified_name)
