#!/usr/bin/env python3
"""What exports agree with tl-predict: every photograph of folders through onnxruntime and torch, beside tl-predict.

    scripts/bench_export.py DATA [--unknown DIR] [--backbones efficientnet_lite0 resnet18] [--weights DEFAULT]
                            [--images 400]

DATA: an ImageFolder, on which a head is found for each backbone. --unknown: a folder of other photographs, of which as
many are predicted too. `sure` is agreement where the first two classes differ by more than 1e-3.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import tl_trainer
from bench_report import report
from tl_trainer.data import images
from tl_trainer.data.folders import walk
from tl_trainer.data.images import ENDINGS

COLUMNS = ("backbone", "format", "images", "top1", "sure", "difference", "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--unknown", type=Path)
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--images", type=int, default=400, help="of each folder at most")
    args = parser.parse_args()
    paths = [path for folder in (args.data, args.unknown) if folder for path in evenly(folder, args.images)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for backbone in args.backbones:
            settings = {
                "model": {"backbone": backbone, "weights": args.weights},
                "transforms": {"train": "eval"},
                "train": {"precision": "fp32"},
                "output": {"dir": folder, "report": False, "tensorboard": False},
            }
            result = tl_trainer.train(settings, data__root=str(args.data))
            model = tl_trainer.load(result["checkpoint"], device="cpu", train__precision="fp32")
            expected = [*model.rows(paths, topk=len(model.classes))]
            for name, run in (("onnx", onnx), ("pt2", pt2)):
                out = Path(folder, f"{len(rows)}.{name}")
                model.export(name, out)
                rows.append((backbone, name, len(paths), *compared(expected, run(out))))
    report(COLUMNS, rows, {"rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows]})


def evenly(folder: Path, most: int) -> list[Path]:
    found = [file for file in walk(folder) if file.suffix.lower() in ENDINGS]
    return found[:: max(1, -(-len(found) // most))]


def onnx(path: Path) -> Callable[[np.ndarray[Any, Any]], Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"images": pixels})[0][0]


def pt2(path: Path) -> Callable[[np.ndarray[Any, Any]], Any]:
    program = torch.export.load(path).module()

    def run(pixels: np.ndarray[Any, Any]) -> Any:
        with torch.inference_mode():
            return program(torch.from_numpy(pixels))[0].numpy()

    return run


def compared(rows: list[Any], run: Callable[[np.ndarray[Any, Any]], Any]) -> tuple[float, float, float, float]:
    same, sure, largest, seconds = [], [], 0.0, 0.0
    for row in rows:
        expected = np.array([one.probability for one in sorted(row.predictions, key=lambda one: one.index)])
        pixels = np.array(images.load(Path(row.path)))[None]
        started = time.perf_counter()
        found = run(pixels)
        seconds += time.perf_counter() - started
        same.append(row.predictions[0].index == found.argmax())
        if row.predictions[0].probability - row.predictions[1].probability > 1e-3:
            sure.append(same[-1])
        largest = max(largest, float(np.abs(found - expected).max()))
    return float(np.mean(same)), float(np.mean(sure)), largest, 1000 * seconds / len(rows)


if __name__ == "__main__":
    main()
