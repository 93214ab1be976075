"""tl-check."""

from __future__ import annotations

import argparse
import sys

from tl_trainer.cli.main import checked, given, new_parser, run_command, settings_of, worker_setting
from tl_trainer.errors import InputError

EPILOG = """\
examples:
  tl-check photos/
  tl-check labels.csv data.csv.label_column=breed
  tl-check imagefolder-alexnet.yaml --data-dir photos --json
then, to train without what is better left out:
  tl-train photos/ --apply runs/photos-check-1/skip.csv
"""

# The flags that are short for an override.
FLAGS = {"data_dir": "data.root", "workers": "data.workers", "device": "device", "output": "output.dir"}


def build_parser() -> argparse.ArgumentParser:
    """The flags of tl-check."""
    parser = new_parser("tl-check", "Look for what is wrong with the data: copies, labels, odd images.", EPILOG)
    add = parser.add_argument
    add("words", nargs="*", metavar="DATA|FILE|key=value", help="a folder of photographs, a CSV file or a YAML file; "
        "any key of the configuration")  # fmt: skip
    add("--config", metavar="FILE", help="a YAML file, or the name of a bundled one (default: default.yaml for DATA)")
    add("--data-dir", type=given, metavar="DIR", help="the folder with the images (data.root)")
    add("-j", "--workers", type=worker_setting, metavar="N", help="processes that load images (data.workers)")
    add("--device", help="auto, cpu, cuda, cuda:N or mps (device)")
    add("--output", type=given, metavar="DIR", help="where the folder with the page is made (output.dir)")
    add("--json", action="store_true", help="print one JSON object on stdout at the end")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console entry point."""
    return run_command(build_parser(), _check, argv)


def _check(args: argparse.Namespace) -> int:
    files = [word for word in args.words if "=" not in word and word.endswith((".yaml", ".yml"))]
    if len([*files, *filter(None, [args.config])]) > 1:
        raise InputError(f"two configurations: {' and '.join([*files, *filter(None, [args.config])][:2])}; give one")
    if files:
        args.config = files[0]
        args.words.remove(files[0])
    overrides = settings_of(args, FLAGS)
    if args.config is None and not overrides:
        raise InputError("nothing to check; give a folder of photographs, a CSV file or a YAML file: tl-check photos/")
    sys.stdout.write(checked(args, overrides) + "\n")
    return 0
