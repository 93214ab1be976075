"""BatchNorm over the batch of all ranks.

torch's SyncBatchNorm computes on a GPU only, and would be another kind of module in the network; here the modules stay
what they are, and only their `forward` is another one for a while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tl_trainer.ground import distributed

_counted = ContextVar("counted", default=True)


@contextlib.contextmanager
def counting(counted: bool) -> Iterator[None]:
    """Whether the images of this rank count for the statistics within the block; not where they are a stand-in."""
    token = _counted.set(counted)
    try:
        yield
    finally:
        _counted.reset(token)


@contextlib.contextmanager
def synchronised(network: nn.Module) -> Iterator[None]:
    """Within the block every BatchNorm that trains takes the statistics of all ranks' images."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, images: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, images)
    axes = [0, *range(2, images.ndim)]
    inputs, count = images.float(), images.numel() / images.shape[1] * _counted.get()
    variance, mean = torch.var_mean(inputs, axes, correction=0)
    own = torch.stack([torch.full_like(mean, count), variance, mean])
    rows = torch.zeros(distributed.world(), *own.shape, dtype=own.dtype, device=own.device)
    rows[distributed.rank()] = own  # each rank fills its row, so their sum is all rows, with gradients
    counts, variances, means = _Sum.apply(rows).unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    variance = (counts * (variances + (means - mean).square())).sum(0) / total
    _remember(norm, mean.detach(), variance.detach() * total / (total - 1))
    shape = [1, -1, *(1 for _ in axes[1:])]
    output: Tensor = (inputs - mean.view(shape)) * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        output = output * norm.weight.view(shape) + norm.bias.view(shape)
    output = output.to(images.dtype)
    for name in ("drop", "act"):  # what timm's kinds of BatchNorm have behind it
        output = getattr(norm, name, nn.Identity())(output)
    return output


@torch.no_grad()
def _remember(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Take the batch into the running statistics, as torch does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    part = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), part)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), part)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, and of its gradients."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return distributed.summed(value.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return distributed.summed(gradient.clone())
