"""tl-eval."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tl_trainer.cli.main import (
    CHECKPOINT_HELP,
    ON_A_CHECKPOINT,
    OVERRIDES_HELP,
    TTA,
    TTA_HELP,
    accuracy,
    default_checkpoint,
    given,
    new_parser,
    overrides_of,
    positive,
    run_command,
    without_collection,
    worker_setting,
)

EPILOG = """\
examples:
  tl-eval runs/flowers102-1
  tl-eval --checkpoint best.pth --data-dir new-photos --split all --json
  tl-eval --checkpoint best.pth --tta flip --report report features.cache=off
"""


# The flags that are short for an override.
FLAGS = {
    "data_dir": "data.root",
    "device": "device",
    "batch_size": "train.batch_size",
    "workers": "data.workers",
    "on_bad_image": "data.on_bad_image",
}


def build_parser() -> argparse.ArgumentParser:
    """The flags of tl-eval."""
    parser = new_parser("tl-eval", "Measure a checkpoint on a split of its dataset or of another folder.", EPILOG)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="RUN|key=value", help="what --checkpoint takes; " + OVERRIDES_HELP)
    add("--checkpoint", type=given, metavar="FILE", help=CHECKPOINT_HELP)
    add("--data-dir", type=given, metavar="DIR", help="another folder with the same classes (default: the one it was "
        "trained on)")  # fmt: skip
    add("--split", choices=("train", "val", "test", "all"), help="default: test where there is one, else val; all is a "
        "folder of class folders without splits")  # fmt: skip
    add("--device", help="auto, cpu, cuda, cuda:N or mps (default: as trained)")
    add("-b", "--batch-size", type=positive, metavar="N", help="images at a time (default: as trained)")
    add("-j", "--workers", type=worker_setting, metavar="N", help="processes that load images")
    add("--on-bad-image", choices=("error", "skip"), help="what to do with images that cannot be read (default: as "
        "trained)")  # fmt: skip
    add("--ignore-extra", action="store_true", help="leave out images of classes that the checkpoint does not have")
    add("--tta", choices=TTA, help=TTA_HELP)
    add("--coverage", type=float, metavar="SHARE", help="measure the sets of tl-predict "
        "--coverage, such as 0.9")  # fmt: skip
    add("--report", type=given, metavar="DIR", help="write a page with pictures (report.html) and all figures into DIR")
    add("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console entry point."""
    return run_command(build_parser(), _eval, argv)


def _eval(args: argparse.Namespace) -> int:
    if args.checkpoint is None and (words := [word for word in args.overrides if "=" not in word]):
        args.checkpoint = words[0]
        args.overrides.remove(words[0])
    path = args.checkpoint or default_checkpoint()
    overrides = overrides_of(args, FLAGS, ON_A_CHECKPOINT)
    with without_collection():
        from tl_trainer import api

    model = api.load(path, progress=not args.quiet, **overrides)
    result = model.evaluate(
        args.split, tta=args.tta, report=args.report, ignore_extra=args.ignore_extra, coverage=args.coverage
    )
    sys.stdout.write((json.dumps(result) if args.json else _summary(result)) + "\n")
    return 0


def _summary(result: dict[str, Any]) -> str:
    calibration, how = result["calibration"]["after"], "calibrated"
    if calibration is None:
        calibration, how = result["calibration"]["before"], "as trained"
    interval = ""
    if "top1_interval" in result:
        low, high = result["top1_interval"]
        interval = f" ({low:.1%} to {high:.1%})"
        averages = f"balanced accuracy {result['balanced_accuracy']:.1%}  macro F1 {result['macro']['f1']:.1%}"
    elif "heads" in result:
        averages = "over the heads:"
    else:
        averages = f"with the thresholds: macro F1 {result['macro']['f1']:.1%}  micro F1 {result['micro']['f1']:.1%}"
        averages += f"  all labels right {result['exact']:.1%}"
    lines = [
        f"{result['split']}: {accuracy(result, interval)}  loss {result['loss']:.4f}  ({result['n']} images)",
        f"{averages}  calibration error {calibration['ece']:.1%} ({how})",
    ]
    for name, of in result.get("heads", {}).items():
        lines.append(f"  {name}: {accuracy(of)}  loss {of['loss']:.4f}  ({of['n']} images)")
    if sets := result.get("sets"):
        lines.append(
            f"sets for {sets['asked']:g}: {sets['coverage']:.1%} hold the label, {sets['mean_set_size']:.2f} "
            "classes in the mean"
        )
    lines += [f"report: {result['report']}"] if "report" in result else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
