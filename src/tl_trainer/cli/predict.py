"""tl-predict."""

from __future__ import annotations

import argparse
import glob
import logging
import os
import re
import sys
from functools import partial
from pathlib import Path

from tl_trainer.cli.main import (
    CHECKPOINT_HELP,
    ON_A_CHECKPOINT,
    OVERRIDES_HELP,
    TTA,
    TTA_HELP,
    default_checkpoint,
    exists,
    given,
    new_parser,
    overrides_of,
    positive,
    run_command,
    without_collection,
)
from tl_trainer.errors import InputError, RunError
from tl_trainer.ground import distributed
from tl_trainer.ground.progress import bar, bars
from tl_trainer.ground.wording import listed

log = logging.getLogger(__name__)

EPILOG = """\
examples:
  tl-predict photo.jpg
  tl-predict photo.jpg --explain evidence
  tl-predict test-000000.tar --format csv --output rows.csv
  tl-predict holiday/ 'more/*.png' --checkpoint runs/flowers102-1/best.pth --topk 3
  find . -name '*.jpg' | tl-predict - --format jsonl --output labels.jsonl
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags of tl-predict."""
    parser = new_parser("tl-predict", "Classify images.", EPILOG)
    add = parser.add_argument
    add("paths", type=given, nargs="+", metavar="PATH", help="image files, folders, tar archives, globs, or - for "
        "paths on stdin; key=value sets " + OVERRIDES_HELP)  # fmt: skip
    add("--checkpoint", type=given, metavar="FILE", help=CHECKPOINT_HELP)
    add("--topk", type=positive, default=5, metavar="K", help="classes per image (default 5)")
    add("--format", choices=("text", "json", "jsonl", "csv"), default="text", help="default text")
    add("--tta", choices=TTA, help=TTA_HELP)
    add("--explain", type=given, metavar="DIR", help="write a picture per image to DIR: Grad-CAM for its class")
    add("--neighbours", type=positive, default=0, metavar="K", help="name the K nearest training images in each row")
    add("--reject", action="store_true", help="say of each image whether it is like the training images at all")
    add("--coverage", type=float, metavar="SHARE", help="add the set of classes that holds the "
        "right one with this probability, such as 0.9")  # fmt: skip
    add("--embed", type=given, metavar="FILE", help="write path and features of each image to a .parquet or .npz file")
    add("--force", action="store_true", help="replace the file of --embed where it exists")
    add("--output", type=given, metavar="FILE", help="write the rows to this file instead of stdout")
    add("--device", help="auto, cpu, cuda, cuda:N or mps (default: as trained)")
    add("-b", "--batch-size", type=positive, default=16, metavar="N", help="images at a time (default 16)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console entry point."""
    return run_command(build_parser(), _predict, argv)


def _predict(args: argparse.Namespace) -> int:
    for what, asked in {"--embed": args.embed, "--explain": args.explain, "stdin": "-" in args.paths}.items():
        if asked:
            distributed.require_alone(f"tl-predict with {what}")
    path = args.checkpoint or default_checkpoint()
    args.overrides = [word for word in args.paths if _is_override(word)]
    paths = [word for word in args.paths if word not in args.overrides]
    if not paths:
        raise InputError("no images: give files, folders, tar archives, globs, or - for paths on stdin")
    overrides = overrides_of(args, {"device": "device"}, ON_A_CHECKPOINT)
    with without_collection():
        from tl_trainer import api
    from tl_trainer.predict import Extras, expand_inputs, line_waiting
    from tl_trainer.rows import by_ranks, columns_of, write_rows

    model = api.load(path, progress=not args.quiet, **overrides)
    extras = Extras(args.explain, args.neighbours, args.reject, args.coverage, args.embed, args.force)
    if model.temperature is None:
        log.info(
            "the probabilities are not calibrated and often too high, as of a run that has not ended or had fewer than "
            "30 val images; the second is mended by more of them: add some, or raise data.val_fraction"
        )
    rows_of = partial(
        model.rows,
        topk=args.topk,
        tta=args.tta,
        batch_size=args.batch_size,
        extras=extras,
        ready=lambda: "-" not in paths or line_waiting(sys.stdin),
    )
    rows = by_ranks(rows_of, expand_inputs(paths, sys.stdin), args.batch_size)
    output = args.output if distributed.is_first() else os.devnull
    classes = min(args.topk, len(model.classes))
    if output or not sys.stdout.isatty():  # on a terminal the rows themselves show how far it is
        with bars(not args.quiet):
            rows = iter(bar(rows, "images", unit="img"))
    own = columns_of(model.task, model.heads, classes)
    written = partial(write_rows, classes=classes, extras=extras, own=own)
    if output is None:
        tally = written(rows, args.format, sys.stdout)
    else:
        try:
            with Path(output).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                tally = written(rows, args.format, file)
        except OSError as error:
            raise RunError(f"--output {output}: {error.strerror}") from error
    if args.explain:
        log.info("pictures of the evidence: %s", args.explain)
    if args.embed:
        log.info("paths and features: %s", args.embed)
    if failed := tally.pop(None, 0):
        log.warning("%d of %d images could not be used", failed, failed + tally.total())
    if tally.total() > 1:
        log.info("%d images: %s", tally.total(), listed([f"{label} {n}" for label, n in tally.most_common()], 10))
    return 1 if failed else 0


def _is_override(word: str) -> bool:
    """Whether it is key=value, and neither a file nor a glob; what begins with a bracket is a list of YAML's."""
    key = re.match(r"[a-z_]+(\.[a-z_]+)*=([\[{])?", word)
    return key is not None and not exists(word) and (key[2] is not None or not glob.has_magic(word))


if __name__ == "__main__":
    sys.exit(main())
