"""tl-train."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_trainer.cli.main import given, new_parser, run_command, worker_setting

if TYPE_CHECKING:  # --help does not wait for torch
    from tl_trainer.config.load import Loaded
    from tl_trainer.resume import Resumption

EPILOG = """\
examples:
  tl-train --config flowers102.yaml
  tl-train --config imagefolder-alexnet.yaml --data-dir photos --epochs 5
  tl-train --config demo.yaml train.optimizer.name=sgd 'transforms.train=[{Resize: 64}]'
  tl-train --resume runs/flowers102-1
"""

# The flags that are short for an override.
FLAGS = {
    "data_dir": "data.root",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "lr": "train.optimizer.lr",
    "workers": "data.workers",
    "device": "device",
    "seed": "seed",
    "output": "output.dir",
}


def build_parser() -> argparse.ArgumentParser:
    """The flags of tl-train."""
    parser = new_parser("tl-train", "Train a classifier on a pretrained backbone, as a YAML file says.", EPILOG)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="any key of the configuration, its value read as YAML")
    add("--config", metavar="FILE", help="a YAML file, or the name of a bundled one (a wrong name lists them)")
    add("--data-dir", type=given, metavar="DIR", help="the folder with the images (data.root)")
    add("--epochs", type=int, metavar="N", help="passes over the training images (train.epochs)")
    add("-b", "--batch-size", type=int, metavar="N", help="images per step (train.batch_size)")
    add("--lr", type=float, metavar="RATE", help="learning rate (train.optimizer.lr)")
    add("-j", "--workers", type=worker_setting, metavar="N", help="processes that load images (data.workers)")
    add("--device", help="auto, cpu, cuda, cuda:N or mps (device)")
    add("--seed", type=int, metavar="N", help="seed of everything random (seed)")
    add("--output", type=given, metavar="DIR", help="where run directories are made (output.dir)")
    add("--resume", nargs="?", const="", metavar="RUN", help="go on with this run directory, or with the newest "
        "unfinished run of the same configuration")  # fmt: skip
    add("--dry-run", action="store_true", help="check everything up to the first batch, write nothing")
    add("--print-config", action="store_true", help="print the resolved configuration and stop")
    add("--print-schema", action="store_true", help="print a JSON Schema of the configuration and stop")
    add("--clear-cache", action="store_true", help="remove the cached features (features.dir) and stop")
    add("--json", action="store_true", help="print one JSON object on stdout at the end")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console entry point."""
    return run_command(build_parser(), _train, argv)


def _train(args: argparse.Namespace) -> int:
    from tl_trainer.config.load import load, parse_override, to_json_schema

    words = list(args.overrides)
    if args.resume and "=" in args.resume and not Path(args.resume).exists():
        words.append(args.resume)  # `--resume key=value`: the word is an override, not the optional run
        args.resume = ""
    overrides: list[tuple[str, Any]] = [parse_override(word) for word in words]
    overrides += [(key, getattr(args, flag)) for flag, key in FLAGS.items() if getattr(args, flag) is not None]
    if args.print_schema:
        from tl_trainer.data.transforms import TRANSFORMS
        from tl_trainer.models.backbones import BACKBONES, weights_names

        names = {"backbone": sorted(BACKBONES), "weights": weights_names(), "transforms": sorted(TRANSFORMS)}
        sys.stdout.write(to_json_schema(names) + "\n")
        return 0
    if args.resume is None:
        return _perform(args, load(args.config, overrides), None)
    from tl_trainer.resume import resume

    hold = not (args.print_config or args.clear_cache or args.dry_run)
    with resume(args.resume or None, args.config, overrides, hold=hold) as (loaded, resumption):
        return _perform(args, loaded, resumption)


def _perform(args: argparse.Namespace, loaded: Loaded, resumption: Resumption | None) -> int:
    """What the flags ask for, with the configuration."""
    from tl_trainer.config.load import to_yaml

    if args.print_config:
        sys.stdout.write(to_yaml(loaded.config))
        return 0
    if args.clear_cache:
        from tl_trainer.feature_store import clear
        from tl_trainer.features import features_folder

        folder = features_folder(loaded.config.features)
        sys.stdout.write(f"removed {clear(folder) / 1e6:.1f} MB of cached features: {folder}\n")
        return 0
    from tl_trainer import run

    if args.dry_run:
        result, in_words = run.dry_run(loaded), _dry_report
    else:
        result, in_words = run.train(loaded, resumption), _report
    sys.stdout.write((json.dumps(result) if args.json else in_words(result)) + "\n")
    return 0


def _report(result: dict[str, Any]) -> str:
    lines = [f"best epoch {result['best_epoch']} of {result['epochs']}, {result['seconds']:.0f} s"]
    for split in ("val", "test"):
        if split in result:
            figures = result[split]
            lines.append(
                f"{split:>5}: top-1 {figures['top1']:.1%}  top-5 {figures['top5']:.1%}  "
                f"loss {figures['loss']:.4f}  ({figures['n']} images)"
            )
    lines.append(f"checkpoint: {result['checkpoint']}")
    lines += [f"report: {result['report']}"] if result["report"] else []
    return "\n".join(lines)


def _dry_report(result: dict[str, Any]) -> str:
    shape = " x ".join(map(str, result["first_batch"]))
    return f"the first batch is {shape}, its loss {result['loss']:.4f}; nothing was written"
