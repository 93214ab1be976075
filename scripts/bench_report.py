"""What the benchmark scripts share: the machine in words, a table, and one JSON line at the end."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tl_trainer.checkpoint import library_versions
from tl_trainer.ground.machine import cores
from tl_trainer.models.prefix import prefix_precision


def machine() -> dict[str, Any]:
    """The processor, its cores, the GPU if there is one, and the versions that a figure depends on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    native = prefix_precision("auto", device)
    return {"cpu": name, "cores": cores(), "gpu": gpu, "frozen_precision": native, **library_versions()}


def report(columns: Sequence[str], rows: Sequence[Sequence[Any]], result: dict[str, Any]) -> None:
    """Print the rows as a table, then the machine, then `result` as one JSON line."""
    cells = [[str(column) for column in columns], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    for row in cells:
        first, *rest = (cell.ljust(width) if index == 0 else cell.rjust(width)
                        for index, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        print("  ".join([first, *rest]))
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))
    print(json.dumps({**result, "machine": machine()}))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return "-" if value is None else str(value)
