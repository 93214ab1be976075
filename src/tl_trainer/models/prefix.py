"""The frozen prefix of the chain, made as fast as the machine allows.

What is frozen needs no gradient and never changes, so its BatchNorm is folded into the convolutions (as in torch's own
`fuse_conv_bn_weights`), memory is laid out channels_last, and the arithmetic is bf16 where the processor has that.
"""

from __future__ import annotations

import copy
import itertools
import logging
import platform
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tl_trainer.errors import SettingError
from tl_trainer.models.backbones import Stage

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


class FrozenPrefix:
    """The frozen stages as one function, (N, 3, H, W) float32 -> the last stage's output in `precision`.

    It has its own copy of the weights, so the classifier stays what is saved. `calls` counts the batches it computed.
    """

    def __init__(
        self, stages: Sequence[Stage], device: torch.device, precision: str, *, images_to_compile_for: int = 0
    ) -> None:
        self.dtype = DTYPES[precision]
        self.network: nn.Module = _converted(_folded(stages), device, self.dtype)
        self.calls = 0
        if images_to_compile_for >= IMAGES_WORTH_COMPILING.get(device.type, images_to_compile_for + 1):
            self._compile()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.network(images.to(dtype=self.dtype, memory_format=torch.channels_last))  # type: ignore[no-any-return]

    def _compile(self) -> None:
        if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            log.warning("performance.compile needs a C++ compiler, and none was found; going on without it")
            return
        self.network = torch.compile(self.network, options={"freezing": True})  # type: ignore[assignment]


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
        if not isinstance(conv, nn.Conv2d) or len(before.users) > 1:
            continue
        fused = copy.copy(conv)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        fused._parameters = {"weight": weight, "bias": bias}
        parent, _, leaf = str(before.target).rpartition(".")
        setattr(graph.get_submodule(parent), leaf, fused)
        modules[str(before.target)] = fused
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


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
        return fx.GraphModule(network, fx.Tracer().trace(network))
    except Exception:  # any Python may stand in a forward, and anything may happen when it meets a proxy
        opaque = {name for name, stage in network.named_children() if not _traceable(stage)}
        return fx.GraphModule(network, _Tracer(opaque).trace(network))


def _traceable(stage: nn.Module) -> bool:
    try:
        fx.Tracer().trace(stage)
    except Exception:
        return False
    return True


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)
