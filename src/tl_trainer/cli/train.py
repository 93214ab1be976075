"""tl-train."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tl_trainer.cli.main import (
    CHECKPOINT_HELP,
    accuracy,
    checked,
    default_checkpoint,
    exists,
    given,
    new_parser,
    run_command,
    settings_of,
    without_collection,
    worker_setting,
)
from tl_trainer.errors import DownloadError, InputError
from tl_trainer.ground import distributed
from tl_trainer.ground.wording import printable, unknown

if TYPE_CHECKING:  # --help does not wait for torch
    from tl_trainer.config.load import Loaded

EPILOG = """\
examples:
  tl-train photos/
  tl-train photos/ model.backbone=timm/vit_small_patch14_dinov2 transforms.size=224
  tl-train --config flowers102.yaml
  tl-train --config imagefolder-alexnet.yaml --data-dir photos --epochs 5
  tl-train --config demo.yaml train.optimizer.name=sgd 'transforms.train=[{Resize: 64}]'
  tl-train photos/ --folds 10
  tl-train --add-class wasps --from wasps/ --checkpoint runs/photos-1
  tl-train --resume runs/flowers102-1
"""

START = """nothing to train on; start with one of
  tl-train --config demo.yaml    the demo: pictures drawn by code, a minute
  tl-train photos/               your photographs, in a folder for each class
  tl-train --help                everything else"""

CLASSES_SHOWN = 10  # of a cross-validation

# The flags that are short for an override.
FLAGS = {
    "data_dir": "data.root",
    "apply": "data.skip",
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
    add("words", nargs="*", metavar="DATA|key=value", help="a folder of photographs or a CSV file; any key of the "
        "configuration, its value read as YAML")  # fmt: skip
    add("--config", metavar="FILE", help="a YAML file, or the name of a bundled one (default: default.yaml for DATA)")
    add("--data-dir", type=given, metavar="DIR", help="the folder with the images (data.root)")
    add("--epochs", type=int, metavar="N", help="passes over the training images (train.epochs)")
    add("-b", "--batch-size", type=int, metavar="N", help="images per step (train.batch_size)")
    add("--lr", type=float, metavar="RATE", help="learning rate (train.optimizer.lr)")
    add("-j", "--workers", type=worker_setting, metavar="N", help="processes that load images (data.workers)")
    add("--device", help="auto, cpu, cuda, cuda:N or mps (device)")
    add("--seed", type=int, metavar="N", help="seed of everything random (seed)")
    add("--output", type=given, metavar="DIR", help="where run directories are made (output.dir)")
    add("--resume", nargs="?", const="", metavar="RUN", help="go on with this run directory, or with the newest "
        "one of the same configuration")  # fmt: skip
    add("--apply", type=given, metavar="FILE", help="leave out the images that a CSV file names, such as tl-check's "
        "skip.csv (data.skip)")  # fmt: skip
    add("--check", action="store_true", help="look for what is wrong with the data, as tl-check does, and stop")
    add("--folds", type=int, metavar="N", help="measure instead of train: cross-validation of the head that would "
        "be found, on all images but the source's own val and test splits; writes predictions.csv")  # fmt: skip
    add("--find-lr", action="store_true", help="train 100 to 200 batches at rising learning rates, suggest one, "
        "and stop; writes the curve")  # fmt: skip
    add("--add-class", type=given, metavar="NAME", help="make a checkpoint that knows one more class, in seconds: the "
        "linear head is solved again on kept features and on the images in --from")  # fmt: skip
    add("--from", dest="folder", type=given, metavar="DIR", help="the images of the class that is added")
    add("--checkpoint", type=given, metavar="FILE", help="what --add-class starts from; " + CHECKPOINT_HELP)
    add("--dry-run", action="store_true", help="check everything up to the first batch, but write no run")
    add("--print-config", action="store_true", help="print the resolved configuration and stop")
    add("--print-schema", action="store_true", help="print a JSON Schema of the configuration and stop")
    add("--clear-cache", action="store_true", help="remove the cached features (features.dir) and stop")
    add("--list", nargs="*", metavar="WHAT", help="list backbones, transforms, configs or runs, all or those that "
        "match a pattern, and stop: --list backbones 'timm/vit_small*'; --list runs 'elsewhere/*'")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object on stdout at the end")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console entry point."""
    return run_command(build_parser(), _train, argv)


def _train(args: argparse.Namespace) -> int:
    if args.resume and "=" in args.resume and not exists(args.resume):
        args.words.append(args.resume)  # `--resume key=value`: the word is an override, not the optional run
        args.resume = ""
    if not args.argv:
        raise InputError(START)
    overrides = settings_of(args, FLAGS)
    if args.add_class is None and (args.folder or args.checkpoint):
        raise InputError("--from and --checkpoint belong to --add-class NAME; to go on with a run use --resume")
    if args.list is not None:
        sys.stdout.write(_listed(*args.list))
    elif args.print_schema:
        sys.stdout.write(_schema() + "\n")
    elif args.print_config or args.clear_cache:
        with _configuration(args, overrides) as loaded:
            sys.stdout.write(_configured(loaded) if args.print_config else _cleared(loaded))
    elif args.add_class is not None:
        sys.stdout.write(_extended(args, overrides) + "\n")
    elif args.check:
        if args.resume is not None:
            raise InputError("--check looks at the data of a new run; leave out --resume")
        sys.stdout.write(checked(args, overrides) + "\n")
    else:
        try:
            sys.stdout.write(_performed(args, overrides) + "\n")
        except DownloadError as error:
            if args.resume is not None:
                raise
            raise DownloadError(f"{error}\nOr, without a network: {_with_own_backbone(args.argv)}") from error
    return 0


def _with_own_backbone(words: Sequence[str]) -> str:
    """The same command with the backbone whose weights come with tl-trainer, which is the default of `model`."""
    kept = [word for word in words if not re.match(r"model[.=]|transforms\.size=", word)]
    from_file = any(word.startswith("--config") for word in words)
    return shlex.join(["tl-train", *kept, *(["model={}", "transforms.size=null"] if from_file else [])])


def _listed(what: str = "", pattern: str = "*", *more: str) -> str:
    from tl_trainer.models.listing import LISTS

    if not what:
        raise InputError(f"--list needs one of {', '.join(LISTS)}, such as: tl-train --list backbones 'timm/vit*'")
    if what not in LISTS or more:
        raise InputError(f"--list {' '.join((what, pattern, *more))}: {unknown('list', what, LISTS)}, then one pattern")
    lines = LISTS[what](pattern)
    if not lines:
        raise InputError(f"--list {what} {pattern}: nothing matches; * stands for any letters")
    return "".join(f"{line}\n" for line in lines)


def _schema() -> str:
    from tl_trainer.config.load import to_json_schema
    from tl_trainer.data.transforms import TRANSFORMS
    from tl_trainer.models.backbones import BACKBONES
    from tl_trainer.models.torchvision_models import weights_names

    return to_json_schema({"backbone": sorted(BACKBONES), "weights": weights_names(), "transforms": sorted(TRANSFORMS)})


@contextlib.contextmanager
def _configuration(args: argparse.Namespace, overrides: dict[str, Any]) -> Iterator[Loaded]:
    """That of a new run, or of the run that would be resumed, which is left alone."""
    if args.resume is None:
        from tl_trainer.config.load import load

        yield load(args.config, overrides.items())
    else:
        from tl_trainer.resume import resume

        with resume(args.resume or None, args.config, overrides.items(), hold=False) as (loaded, _):
            yield loaded


def _configured(loaded: Loaded) -> str:
    from tl_trainer.config.load import to_yaml

    return to_yaml(loaded.config, loaded.lists)


def _cleared(loaded: Loaded) -> str:
    from tl_trainer.feature_folders import clear, folder_size
    from tl_trainer.features import features_folder
    from tl_trainer.ground.files import cache_folder

    folder, kept = features_folder(loaded.config.features), cache_folder() / "shards"
    said = f"removed {clear(folder) / 1e6:.1f} MB of cached features: {folder}\n"
    if size := folder_size(kept):
        said += f"kept {size / 1e6:.1f} MB of downloaded shards and of where their images are: {kept}\n"
    return said


def _performed(args: argparse.Namespace, overrides: dict[str, Any]) -> str:
    """Train, or with --dry-run begin to; what is printed of it."""
    with without_collection():
        from tl_trainer import api
    from tl_trainer.ground.signals import StopRequest

    resume, progress = args.resume is not None and (args.resume or True), not args.quiet
    if args.folds is not None:
        if resume or args.dry_run:
            raise InputError("--folds trains no run; leave out --resume and --dry-run")
        distributed.require_alone("--folds")
        result = api.cross_validate(args.config, folds=args.folds, progress=progress, **overrides)
        return json.dumps(result) if args.json else _folds_report(result)
    if args.find_lr:
        if resume or args.dry_run:
            raise InputError("--find-lr trains no run; leave out --resume and --dry-run")
        distributed.require_alone("--find-lr")
        result, in_words = api.find_rate(args.config, progress=progress, **overrides), _rate_report
    elif args.dry_run:
        distributed.require_alone("--dry-run")
        result, in_words = api.dry_run(args.config, resume=resume, progress=progress, **overrides), _dry_report
    else:
        stop = StopRequest((signal.SIGINT, signal.SIGTERM))
        result = api.train(args.config, resume=resume, progress=progress, stop=stop, **overrides)
        in_words = _report
    return json.dumps(result) if args.json else in_words(result)


def _extended(args: argparse.Namespace, overrides: dict[str, Any]) -> str:
    """Add a class to a checkpoint; what is printed of it."""
    if not args.folder:
        raise InputError(f"--add-class {args.add_class} needs --from DIR, the folder with its images")
    if args.config is not None or args.resume is not None:
        raise InputError("--add-class takes the checkpoint's configuration; leave out DATA, --config and --resume")
    distributed.require_alone("--add-class")
    path, output = args.checkpoint or default_checkpoint(), overrides.pop("output.dir", "runs")
    with without_collection():
        from tl_trainer import api

    model = api.load(path, progress=not args.quiet, **overrides)
    result = model.add_class(args.add_class, args.folder, output=output)
    if args.json:
        return json.dumps(result)
    old, new, on = result["old_classes"], result["new_class"], result["solved_on"]
    return "\n".join(
        [
            f"{result['head']}, solved on the features of {on['old']:,} old and {on['new']:,} new images; "
            f"{result['seconds']:.0f} s",
            f"old classes: val top-1 {old['top1_before']:.1%} before, {old['top1_after']:.1%} now  ({old['n']} images)",
            f"{printable(result['class'])}: {new['recall']:.1%} are recognised, each by a head that did not see it  "
            f"({new['n']} images)",
            f"checkpoint: {result['checkpoint']}",
        ]
    )


def _report(result: dict[str, Any]) -> str:
    if found := result.get("search"):
        lines = []
        for name, one in found.get("heads", {"": found}).items():
            of = f"{printable(name)}: " if name else ""
            lines.append(f"{of}best of {one['candidates']} heads: {one['method']}, {one['settings']}")
        lines[-1] += f"; {result['seconds']:.0f} s"
        if probed := result.get("probed"):
            [taken] = [row for row in probed if row["taken"]]
            lines.insert(0, f"of {len(probed)} that were compared: {taken['backbone']} ({taken['weights']})")
    else:
        best = f"best epoch {result['best_epoch']}"
        if "soup" in result:
            best = f"mean of epochs {', '.join(map(str, result['soup']))}"
        lines = [f"{best} of {result['epochs']}, {result['seconds']:.0f} s"]
    for split in ("train", "val", "test"):
        if split in result:
            figures = result[split]
            lines.append(f"{split:>5}: {accuracy(figures)}  loss {figures['loss']:.4f}  ({figures['n']} images)")
    if found and found["refit"]:
        lines.append("  the head was solved on train and val; the val figures are from cross-validation")
    lines.append(f"checkpoint: {result['checkpoint']}")
    lines += [f"report: {result['report']}"] if result["report"] else []
    for advice in result.get("advice", []):  # not in the result.json of earlier versions
        lines += [*textwrap.wrap(advice["evidence"], 80), f"  try: {advice['try']}"]
    return "\n".join(lines)


def _folds_report(result: dict[str, Any]) -> str:
    low, high = result["top1_interval"]
    lines = [
        f"{len(result['folds'])}-fold cross-validation of {result['images']:,} images; {result['seconds']:.0f} s",
        f"  top-1 {result['top1']:.1%} (95% interval {low:.1%} to {high:.1%})  loss {result['loss']:.4f}",
    ]
    rows = sorted(result["per_class"], key=lambda row: row["recall"])
    width = max(len(printable(row["class"])) for row in rows[:CLASSES_SHOWN])
    lines.append("recall of each class:" if len(rows) <= CLASSES_SHOWN else f"the {CLASSES_SHOWN} lowest recalls:")
    lines += [
        f"  {printable(row['class']):{width}}  {row['recall']:6.1%} of {row['support']:,}"
        for row in rows[:CLASSES_SHOWN]
    ]
    lines.append(f"predictions, each by a head that did not see the image: {result['predictions']}")
    return "\n".join([*lines, "no classifier was trained: the same command without --folds trains one"])


def _rate_report(result: dict[str, Any]) -> str:
    lines = [f"{result['batches']} batches at rising learning rates, {result['seconds']:.0f} s"]
    lines.append(f"curve: {result['folder']}/rates.png")
    if result["lr"] is None:
        return "\n".join([*lines, "no rate made the loss fall, so none is suggested; look at the curve"])
    return "\n".join([*lines, f"suggested: {result['words']}", "nothing was trained: the same command without --find-lr"
        " and with these words does"])  # fmt: skip


def _dry_report(result: dict[str, Any]) -> str:
    shape = " x ".join(map(str, result["first_batch"]))
    needs = result["estimate"]
    return (
        f"the first batch is {shape}, its loss {result['loss']:.4f}; no run was written\n"
        f"a run takes about {_duration(needs['seconds'])} before the report, "
        f"{needs['cache_bytes'] / 1e6:,.1f} MB of cache, {needs['memory_bytes'] / 1e9:.1f} GB of memory"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} s"


if __name__ == "__main__":
    sys.exit(main())
