"""What `tl-train --list` shows: backbones, transforms, bundled configurations and runs whose names match a pattern.

torch and torchvision, which take seconds, are imported by the lists that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from tl_trainer import runs
from tl_trainer.config.load import bundled_folder, load

ROW = "{:44} {:>8} {:>5}  {:22} {:>6}  {}"


def backbones(pattern: str) -> list[str]:
    """A line each: name, millions of parameters, input size, weights, top-1 on ImageNet, where the file is."""
    rows = [*_own(pattern), *_torchvision(pattern), *_timm(pattern)]
    heading = ROW.format("backbone", "params", "size", "weights", "top-1", "file")
    return [heading, *rows] if rows else []


def transforms(pattern: str) -> list[str]:
    """The names that `transforms` takes."""
    from tl_trainer.data.transforms import TRANSFORMS

    return [name for name in sorted([*TRANSFORMS, "ToTensor"]) if fnmatch(name.lower(), pattern.lower())]


def configs(pattern: str) -> list[str]:
    """The bundled configurations, each with the first line of its comment."""
    files = [path for path in sorted(bundled_folder().glob("*.yaml")) if fnmatch(path.name, pattern)]
    return [f"{path.name:26} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}" for path in files]


def past_runs(pattern: str) -> list[str]:
    """The runs, each with what is not as in default.yaml."""
    return runs.table(pattern, load("default.yaml").config.model_dump(mode="json"))


LISTS: dict[str, Callable[[str], list[str]]] = {
    "backbones": backbones,
    "transforms": transforms,
    "configs": configs,
    "runs": past_runs,
}


def _own(pattern: str) -> Iterator[str]:
    from tl_trainer.models import embedded

    if fnmatch(embedded.NAME, pattern):
        yield ROW.format(embedded.NAME, "4.7 M", 224, "DEFAULT", "75.1%", "comes with tl-trainer")


def _torchvision(pattern: str) -> Iterator[str]:
    import torch
    from torchvision.models import get_model_weights

    from tl_trainer.models import torchvision_models

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in sorted(torchvision_models.NAMES):
        if fnmatch(name, pattern):
            for member in get_model_weights(name):
                size = member.transforms().crop_size[0]
                top1 = member.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1")
                there = (folder / Path(member.url).name).exists()
                yield ROW.format(
                    name, f"{member.meta['num_params'] / 1e6:.1f} M", size, member.name, f"{top1:.1f}%" if top1 else "",
                    "here" if there else "download",
                )  # fmt: skip


def _timm(pattern: str) -> Iterator[str]:
    """timm's registry has neither sizes nor figures. It is slow to import, and so only read where it is asked for."""
    from tl_trainer.models import timm_models

    if not pattern.startswith(timm_models.PREFIX):
        if pattern == "*":
            yield "and more than a thousand of timm: tl-train --list backbones 'timm/*'"
        return
    for name, config in timm_models.pretrained(pattern.removeprefix(timm_models.PREFIX)):
        there = timm_models.cached(config)
        yield ROW.format(name, "", config.input_size[-1], config.tag, "", "here" if there else "download")
