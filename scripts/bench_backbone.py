#!/usr/bin/env python3
"""Images a second of the frozen prefix, against eager fp32, eager bf16, OpenVINO and the machine's own matrix rate.

    scripts/bench_backbone.py [--backbones resnet152 vgg16] [--batch 16] [--rounds 5]

All contenders take turns in every round and the best round of each counts, so that a noisy neighbour hurts all alike.
`of limit` is the prefix's arithmetic (2 operations per multiply-add, counted by torch's FlopCounterMode) over the rate
of a large bf16 matrix product measured in the same rounds.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench_report import report
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.prefix import FrozenPrefix, prefix_precision

BACKBONES = ("alexnet", "vgg16", "resnet152", "efficientnet_v2_s")
SIZES = {"efficientnet_v2_s": 300}
MATRIX = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--batch", type=int, default=16, help="images at a time for the frozen prefix")
    parser.add_argument(
        "--plain-batch", type=int, default=32, help="images at a time for the plain networks and OpenVINO"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = [measure(name, args.batch, args.plain_batch, args.rounds) for name in args.backbones]
    columns = ["backbone", "plain fp32", "prefix", "ratio", "plain bf16", "ratio", "OpenVINO", "ratio"]
    columns += ["bf16 GEMM", "fp32 GEMM", "of limit"]
    print("images a second; GEMM in GFLOP/s")
    report(columns, [list(row.values()) for row in rows], {"backbones": rows})


def measure(name: str, batch: int, plain_batch: int, rounds: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = build_backbone(name, resolve_weights(name, "none"), "penultimate", 0).eval().to(device)
    size = SIZES.get(name, resolve_weights(name, "none").preset.crop)
    images = torch.randn(max(batch, plain_batch), 3, size, size, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(images[:1])
    flops = counter.get_total_flops()
    prefix = FrozenPrefix(backbone.stages, device, prefix_precision("auto", device))
    square = torch.randn(MATRIX, MATRIX, device=device)
    contenders: dict[str, tuple[Callable[[], Any], float]] = {
        "plain": (lambda: backbone(images[:plain_batch]), plain_batch),
        "plain_bf16": (_eager_bf16(backbone, images[:plain_batch]), plain_batch),
        "prefix": (lambda: prefix(images[:batch]), batch),
        "bf16": (_product(square.bfloat16()), 2 * MATRIX**3 / 1e9),
        "fp32": (_product(square), 2 * MATRIX**3 / 1e9),
    }
    if openvino := _openvino(backbone, images[:plain_batch]):
        contenders["openvino"] = (openvino, plain_batch)
    rates = dict.fromkeys(contenders, 0.0)
    with torch.inference_mode():
        for function, _ in contenders.values():
            function()
        for _ in range(rounds):
            for contender, (function, amount) in contenders.items():
                rates[contender] = max(rates[contender], amount / _seconds(function, device))
    limit = rates["bf16"] if prefix.dtype == torch.bfloat16 else rates["fp32"]
    return {
        "backbone": name,
        "plain": rates["plain"],
        "prefix": rates["prefix"],
        "over_plain": rates["prefix"] / rates["plain"],
        "plain_bf16": rates["plain_bf16"],
        "over_plain_bf16": rates["prefix"] / rates["plain_bf16"],
        "openvino": rates.get("openvino"),
        "over_openvino": rates["prefix"] / rates["openvino"] if "openvino" in rates else None,
        "bf16_gflops": rates["bf16"],
        "fp32_gflops": rates["fp32"],
        "of_limit": rates["prefix"] * flops / 1e9 / limit,
    }


def _eager_bf16(backbone: torch.nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    """The plain network in bf16 and channels_last, which is what most people would try first."""
    network = copy.deepcopy(backbone).to(torch.bfloat16, memory_format=torch.channels_last)
    images = images.to(torch.bfloat16, memory_format=torch.channels_last)
    return lambda: network(images)


def _product(matrix: torch.Tensor) -> Callable[[], Any]:
    return lambda: matrix @ matrix


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _openvino(backbone: torch.nn.Module, images: torch.Tensor) -> Callable[[], Any] | None:
    """OpenVINO's throughput setting with its own choice of precision (bf16 where the processor has it)."""
    try:
        import openvino
    except ImportError:
        return None
    model = openvino.convert_model(backbone.cpu(), example_input=images[:1].cpu())
    model.reshape([images.shape[0], *images.shape[1:]])
    compiled = openvino.compile_model(
        model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "bf16"}
    )
    array = images.cpu().numpy()
    return lambda: compiled(array)


if __name__ == "__main__":
    main()
