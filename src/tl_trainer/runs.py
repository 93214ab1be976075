"""Run directories: which there are, what each has reached, and which one is meant."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tl_trainer.config.schema import flat
from tl_trainer.errors import InputError
from tl_trainer.ground.wording import printable

log = logging.getLogger(__name__)

BEST, RESULT = "best.pth", "result.json"  # the latter is written last of all: where it is missing, so is more
VALUE_SHOWN = 32  # characters of a setting
TELLING = ("seed", "data.task", "data.skip", "transforms.", "model.", "train.", "features.views")
KNOWN = ("model.backbone", "train.best")  # another column has the one; the other is most often that of the task
PROBED = "probed.json"  # the backbones that were compared, if any, before the run began


class Run(NamedTuple):
    """A run directory with a best.pth; `result` is what its result.json holds, empty where it has none (yet)."""

    path: Path
    result: dict[str, Any]

    @property
    def reached(self) -> str:
        """Its figure on the validation images in words."""
        return f"val {headline(self.result['val'])}" if self.result else "its run has not ended"


# The figures that a run may be told by, and what they are called.
NAMES = {"mean": "mean", "map": "mAP", "top1": "top-1"}


def headline(figures: dict[str, Any]) -> str:
    """The figure that a run is told by, with its name."""
    key, name = next((key, name) for key, name in NAMES.items() if key in figures)
    return f"{name} {figures[key]:.1%}"


def _cell(figures: dict[str, Any]) -> str:
    """The same in a table, in which top-1 needs no name; empty where there are no figures."""
    return headline(figures).removeprefix("top-1 ") if figures else ""


def runs_of(pattern: str) -> list[Run]:
    """The runs whose folders match the pattern, such as `runs/*`, the newest first."""
    found = sorted(map(Path, glob.glob(f"{pattern}/{BEST}")), key=_modified, reverse=True)  # noqa: PTH207
    return [Run(path.parent, _result(path.with_name(RESULT))) for path in found]


def best_of(path: Path) -> Path:
    """The checkpoint that a path means: the file, the best.pth of a run directory, or of a folder of runs that of its
    newest one, which is said. A run that has ended goes before one that has not, since such a one may have failed.
    """
    if not path.is_dir() or (path / BEST).exists() or (path / "last.pth").exists():
        return path / BEST if path.is_dir() else path
    found = runs_of(f"{glob.escape(str(path))}/*")
    if not found:
        raise InputError(f"{path}: no {BEST} in it, nor in a folder in it; give a run directory or its {BEST}")
    newest = next((run for run in found if run.result), found[0])
    log.info("checkpoint: %s (%s)", newest.path / BEST, newest.reached)
    return newest.path / BEST


def table(pattern: str, usual: dict[str, Any]) -> list[str]:
    """A line each, the newest first: folder, data, backbone, top-1 or mAP on val and test, time, other settings.

    usual: a dumped configuration, whose settings are left out.
    """
    rows = [("run", "data", "backbone", "val", "test", "time", "settings")]
    for run in runs_of("runs/*" if pattern == "*" else pattern):
        config = _config(run.path / "config.yaml")
        val, test = (_cell(run.result.get(split, {})) for split in ("val", "test"))
        took = str(timedelta(seconds=round(run.result["seconds"]))) if run.result else "not ended"
        backbone, settings = printable(str(config["model"].get("backbone", ""))), " ".join(_settings(config, usual))
        rows.append((printable(str(run.path)), _data(config["data"]), backbone, val, test, took, settings))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines if len(lines) > 1 else []


def _settings(config: dict[str, Any], usual: dict[str, Any]) -> Iterator[str]:
    """What tells one run on the same data from another and is not as usual; nothing that follows from the task."""
    defaults = dict(flat(usual))
    for key, value in flat(config):
        if key.startswith(TELLING) and key not in KNOWN and value != defaults.get(key):
            text = printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
            yield f"{key}={text if len(text) <= VALUE_SHOWN else f'{text[: VALUE_SHOWN - 1]}…'}"


def _data(section: dict[str, Any]) -> str:
    root = str(section.get("root", ""))
    if section.get("source") == "csv" and isinstance(csv := section.get("csv"), dict):
        return printable(str(Path(root, str(csv.get("labels", "")))))
    return printable(root if section.get("source") == "imagefolder" else str(section.get("source", "")))


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _config(path: Path) -> dict[str, Any]:
    """What config.yaml holds; of one that is missing or damaged two empty sections."""
    found: Any = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = found if isinstance(found, dict) else {}
    return {**found, **{key: of if isinstance(of := found.get(key), dict) else {} for key in ("data", "model")}}


def _result(path: Path) -> dict[str, Any]:
    """What result.json holds; nothing where it is missing or damaged: --resume then writes it again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "val" in found else {}
