"""A classifier as a folder in the layout that timm and the Hugging Face hub read, with a model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from tl_trainer.assembly import Parts
from tl_trainer.errors import InputError
from tl_trainer.metrics import Activation
from tl_trainer.models import embedded
from tl_trainer.models.chain import TAPS
from tl_trainer.models.heads import UnitLinear
from tl_trainer.models.timm_models import PREFIX, construct

CARD = """\
---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm]
---
# {architecture}: {count} classes

A classifier of {labels}, trained with tl-trainer {version}: a new head on the backbone {backbone} ({weights}).

| | on the validation images |
|---|---|
{figures}

```python
import timm

model = timm.create_model("local-dir:<this folder>", pretrained=True).eval()
```

It gives logits. {probabilities}
"""


def save_for_timm(parts: Parts, about: dict[str, Any], out: Path) -> None:
    """Write model.safetensors, config.json and README.md. Raises InputError for what timm's models cannot be."""
    from timm.models import save_for_hf

    model = _as_timm(parts)
    config = {"label_names": about["labels"], "pretrained_cfg": _preprocessing(parts), "tl_trainer": about}
    save_for_hf(model, str(out), model_config=config, safe_serialization=True)
    (out / "README.md").write_text(_card(parts, about), encoding="utf-8")


def timm_logits(folder: Path) -> Callable[[Tensor], Tensor]:
    """The model in the folder as timm loads it: (N, 3, H, W) -> logits."""
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _as_timm(parts: Parts) -> nn.Module:
    """timm's own model with the weights of the backbone, and the head as its classifier."""
    name, head = parts.backbone["name"], [*parts.network.classifier.head.children()]
    last = head[-1]
    name = embedded.MODEL if name == embedded.NAME else name
    if not name.startswith(PREFIX):
        raise InputError(f"--to hub writes models of timm, and {name} is torchvision's; use --to safetensors or onnx")
    if any(isinstance(layer, UnitLinear) for layer in head):
        why = "its head scales the features to length 1 (train with model.head.normalise=none)"
    elif sum(isinstance(layer, nn.Linear) for layer in head) > 1:
        why = "its head has hidden layers"
    elif parts.backbone["tap"] not in TAPS[:2]:
        why = f"its features are those of model.tap: {parts.backbone['tap']}"
    else:
        why = ""
    if why:
        raise InputError(f"--to hub writes models as timm has them, and {why}; use --to safetensors or onnx")
    model = construct(name, parts.backbone.get("size"), num_classes=len(parts.task.classes))
    settings: Any = model.pretrained_cfg
    classifier = settings["classifier"]
    state = parts.network.classifier.backbone.model.state_dict()
    state = {**state, f"{classifier}.weight": last.weight, f"{classifier}.bias": last.bias}
    if state.keys() != model.state_dict().keys():
        raise InputError(f"--to hub: {name} with this tap is not the model that timm has; use --to safetensors or onnx")
    model.load_state_dict(state)
    return model


def _preprocessing(parts: Parts) -> dict[str, Any]:
    """The evaluation pipeline in timm's words; what these cannot say is in the configuration's `tl_trainer`."""
    view = parts.pipeline.image(Image.new("RGB", (400, 300)))
    size = [3, *view.shape[-2:]]
    found: dict[str, Any] = {"input_size": size, "mean": [*parts.pipeline.mean], "std": [*parts.pipeline.std]}
    for transform in parts.pipeline.transforms:
        if type(transform).__name__ == "Resize" and transform.size:
            # timm resizes to the floor of size / crop_pct.
            found["crop_pct"] = size[-1] / (transform.size[0] + 0.5) if transform.size[0] != size[-1] else 1.0
            found["interpolation"] = InterpolationMode(transform.interpolation).value
            found["crop_mode"] = "center" if len(transform.size) == 1 else "squash"
    return found


def _card(parts: Parts, about: dict[str, Any]) -> str:
    saved = parts.saved
    assert saved is not None
    figures = [f"| {name} | {value:.4g} |" for name, value in (saved.metrics or {}).items()]
    labels = about["labels"]
    return CARD.format(
        architecture=saved.backbone["name"],
        count=len(labels),
        labels=", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else ""),
        version=about["tl_trainer"],
        backbone=saved.backbone["name"],
        weights=saved.backbone["weights"],
        figures="\n".join(figures),
        probabilities=_probabilities(parts.task.activations(saved.calibration)),
    )


def _probabilities(heads: Sequence[Activation]) -> str:
    """What the logits have to go through, in words."""
    words = [f"the {'sigmoid' if head.several else 'softmax'} of the logits" for head in heads]
    if len(heads) == 1:
        return f"Probabilities are {words[0]} divided by {heads[0].temperature}."
    ends = [*accumulate(head.classes for head in heads)]
    rows = [
        f"- {end - head.classes} to {end - 1}: {said} divided by {head.temperature}"
        for end, head, said in zip(ends, heads, words, strict=True)
    ]
    return "\n".join(["Probabilities are, of the classes", *rows])
