"""tl-export."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from tl_trainer.cli.main import (
    CHECKPOINT_HELP,
    ON_A_CHECKPOINT,
    OVERRIDES_HELP,
    default_checkpoint,
    given,
    new_parser,
    overrides_of,
    run_command,
    without_collection,
)
from tl_trainer.ground import distributed

log = logging.getLogger(__name__)

FORMATS = ("onnx", "pt2", "safetensors", "hub")  # what export.FORMATS knows
EPILOG = """\
examples:
  tl-export --checkpoint runs/flowers102-1/best.pth --to onnx flowers.onnx
  tl-export --to pt2 --from tensor flowers.pt2
  tl-export --to hub flowers/
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags of tl-export."""
    parser = new_parser("tl-export", "Export a checkpoint for other programs, and compare the two on images.", EPILOG)
    add = parser.add_argument
    add("out", type=given, metavar="OUT", help="the file to write; for --to hub, the folder")
    add("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    add("--checkpoint", type=given, metavar="FILE", help=CHECKPOINT_HELP)
    add("--to", choices=FORMATS, required=True, help="onnx and torch.export's pt2: from pixels to probabilities; "
        "safetensors: weights and what belongs to them; hub: a folder that timm loads")  # fmt: skip
    add("--from", dest="origin", choices=("image", "tensor"), default="image", help="the input of onnx and pt2: "
        "uint8 images (N, H, W, 3), or tensor: images that are preprocessed already (default image)")  # fmt: skip
    add("--force", action="store_true", help="replace OUT where it exists")
    add("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console entry point."""
    return run_command(build_parser(), _export, argv)


def _export(args: argparse.Namespace) -> int:
    overrides = overrides_of(args, {}, ON_A_CHECKPOINT)
    distributed.require_alone("tl-export")
    path = args.checkpoint or default_checkpoint()
    with without_collection():
        from tl_trainer import api

    model = api.load(path, progress=not args.quiet, **{"device": "cpu", "train.precision": "fp32", **overrides})
    result = model.export(args.to, args.out, origin=args.origin, force=args.force)
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write(
            f"{result['path']}: {result['agreement']:.1%} agreement on {result['images']} {result['of']}, largest "
            f"difference of a probability {result['largest_difference']:.1e}\n"
        )
    return 0
