"""timm's models: the numbers of timm's own forward, names and tags, and files that do not fit.

The images are smaller than the models' own, which position embeddings and windows follow.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch.nn.functional import cosine_similarity

from tl_trainer.data.images import load
from tl_trainer.data.transforms import Pipeline, spell_out
from tl_trainer.errors import CheckpointError, InputError, SettingError
from tl_trainer.models import timm_models
from tl_trainer.models.backbones import build_backbone, empty_backbone, feature_size, resolve_weights
from tl_trainer.models.listing import LISTS
from tl_trainer.models.prefix import FrozenPrefix

CPU = torch.device("cpu")
SIZES = {
    "resnet50": 64, "convnext_tiny": 64, "vit_small_patch16_224": 64, "vit_small_patch14_dinov2": 56,
    "deit3_small_patch16_224": 64, "swin_tiny_patch4_window7_224": 112, "tf_efficientnet_lite0": 65,
    "efficientnet_b0": 64, "mobilenetv3_large_100": 64, "regnety_016": 64, "eva02_tiny_patch14_224": 56,
    "vit_base_patch16_siglip_224": 64,
}  # fmt: skip
TINY = "timm/test_vit"


@pytest.mark.parametrize("name", SIZES)
def test_features_and_logits_are_timms_own(name: str) -> None:
    full, size = f"timm/{name}", SIZES[name]
    weights = resolve_weights(full, "none", size)
    backbone = build_backbone(full, weights, "penultimate", 3)
    torch.manual_seed(3)
    reference = timm_models.construct(full, size)
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        expected = reference.forward_head(reference.forward_features(images), pre_logits=True)  # type: ignore[operator]
        assert torch.equal(backbone(images), expected.flatten(1))
        assert feature_size(backbone, full, weights, "penultimate", images[0]) == expected.shape[1]
        if reference.num_classes:
            assert torch.equal(build_backbone(full, weights, "logits", 3)(images), reference(images))
        for precision in ("fp32", "bf16"):
            found = FrozenPrefix(backbone.stages, CPU, precision)(images).float().flatten(1)
            if precision == "fp32":
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
            assert cosine_similarity(found, expected).min() >= 0.999
        again = empty_backbone(full, False, "penultimate", size)
        again.load_state_dict(backbone.state_dict(), assign=True)
        assert torch.equal(again(images), expected.flatten(1))


def test_padding_follows_the_size_of_the_images() -> None:
    backbone = build_backbone(
        "timm/tf_efficientnet_lite0", resolve_weights("timm/tf_efficientnet_lite0", "none"), "blocks", 0
    )
    prefix = FrozenPrefix(backbone.stages, CPU, "fp32")
    for side in (64, 65, 67, 64):
        images = torch.randn(1, 3, side, side + 3)
        with torch.inference_mode():
            torch.testing.assert_close(prefix(images).flatten(1), backbone(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_small_patch14_dinov2", "vit_base_patch16_siglip_224"])
def test_preprocessing_is_timms_own(name: str, photos: Path) -> None:
    config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    theirs = create_transform(**config, is_training=False)
    pipeline = Pipeline(spell_out("default", resolve_weights(f"timm/{name}", "none").preset, train=False), "x")
    for path in sorted((photos / "val").rglob("*.jpg"))[::60]:
        picture = load(path)
        ours = pipeline.batch(pipeline.image(picture)[None])[0]
        std = torch.tensor(config["std"]).view(-1, 1, 1)
        assert ((ours - theirs(picture)) * std).abs().max() <= 1 / 255


def test_the_tokens_of_a_vision_transformer() -> None:
    name = "timm/vit_tiny_patch16_224"
    weights, images = resolve_weights(name, "none", 64), torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    tokens = timm_models.construct(name, 64).forward_features(images)  # type: ignore[operator]
    parts = {"cls": tokens[:, 0], "patch_mean": tokens[:, 1:].mean(dim=1)}
    parts["cls+patch_mean"] = torch.cat([parts["cls"], parts["patch_mean"]], dim=1)
    for tap, expected in parts.items():
        backbone = build_backbone(name, weights, tap, 0)
        torch.testing.assert_close(backbone(images), expected)
        assert backbone.features == expected.shape[1]
    with pytest.raises(SettingError, match="timm/resnet50 has no tokens; use penultimate"):
        build_backbone("timm/resnet50", resolve_weights("timm/resnet50", "none"), "cls", 0)


def test_a_model_that_is_no_chain_is_used_as_a_whole() -> None:
    """Its positions are made for each size anew, by a forward that cannot be read off."""
    backbone, images = build_backbone(TINY, resolve_weights(TINY, "none"), "penultimate", 0), torch.randn(2, 3, 96, 96)
    torch.manual_seed(0)
    reference = timm_models.construct(TINY, None)
    with torch.inference_mode():
        expected = reference.forward_head(reference.forward_features(images), pre_logits=True)  # type: ignore[operator]
        assert torch.equal(backbone(images), expected)
        torch.testing.assert_close(FrozenPrefix(backbone.stages, CPU, "fp32")(images), expected)
    assert [stage.name for stage in backbone.stages] == ["body"]


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        ("timm/resnet5O", "none", "model.backbone: unknown backbone 'timm/resnet5O'; did you mean 'timm/resnet50'"),
        ("timm/resnet50.nope", "DEFAULT", r"unknown weights of timm/resnet50 'nope'.*a1_in1k"),
        ("timm/resnet50", "a9_in1k", r"unknown weights of timm/resnet50 'a9_in1k'; did you mean .*'a3_in1k'"),
        ("timm/resnet50", "mine.safetensors", "model.weights: no such file: mine.safetensors"),
        (
            "resnet5O",
            "none",
            r"unknown backbone 'resnet5O'; did you mean 'resnet50'.*those of timm are called timm/<name>",
        ),
    ],
)
def test_wrong_names_are_told_with_the_right_ones(backbone: str, weights: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve_weights(backbone, weights)


def saved(name: str, seed: int, path: str) -> Path:
    torch.manual_seed(seed)
    state = {key: value.contiguous() for key, value in timm_models.construct(name, None).state_dict().items()}
    save_file(state, path) if path.endswith(".safetensors") else torch.save(state, path)
    return Path(path)


@pytest.mark.parametrize("path", ["mine.safetensors", "mine.pth"])
def test_weights_from_a_file(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """And whose preprocessing it gets."""
    caplog.set_level(logging.INFO, "tl_trainer")
    saved(TINY, 5, path)
    images = torch.randn(1, 3, 160, 160)
    found = build_backbone(TINY, resolve_weights(TINY, path), "logits", 0)
    torch.manual_seed(5)
    assert torch.equal(found(images), timm_models.construct(TINY, None)(images))
    assert [message for message in caplog.messages if path in message] == [
        f"{path}: preprocessed as {TINY}.r160_in1k; set transforms.size, or transforms.eval and transforms.train, for "
        "another preprocessing"
    ]


def test_a_file_that_does_not_fit_is_told_with_the_tensors_of_both() -> None:
    saved("timm/test_resnet", 0, "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"other\.safetensors: not weights of timm/test_vit: it has \d+ tensors \(\w"
    ):
        build_backbone(TINY, resolve_weights(TINY, "other.safetensors"), "penultimate", 0)
    data = saved(TINY, 0, "cut.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: damaged or not a safetensors file"):
        build_backbone(TINY, resolve_weights(TINY, "cut.safetensors"), "penultimate", 0)


def test_a_model_for_one_size_says_so() -> None:
    name = "timm/xcit_nano_12_p16_224"
    with pytest.raises(SettingError, match=rf"{name} takes images of 224 px only, not 100") as raised:
        build_backbone(name, resolve_weights(name, "none", 100), "logits", 0)
    assert raised.value.key == "transforms.size"


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError) as raised:
        build_backbone("timm/test_vit", resolve_weights("timm/test_vit", "DEFAULT"), "penultimate", 0)
    first, second = str(raised.value).splitlines()
    assert first.startswith(
        "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors cannot be down"
    )
    assert second == (
        "Fetch that file on another machine, and set model.weights to it. The weights of efficientnet_lite0 come with "
        "tl-trainer."
    )


def test_weights_in_the_hubs_cache_are_used_and_their_revision_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "ab" * 20
    folder = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    saved(TINY, 5, str(folder / "snapshots" / commit / "model.safetensors"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    backbone = build_backbone(TINY, resolve_weights(TINY, "DEFAULT"), "penultimate", 0)
    assert backbone.revision == commit
    again = build_backbone(TINY, resolve_weights(TINY, f"r160_in1k@{commit}"), "penultimate", 0)
    assert torch.equal(backbone(torch.ones(1, 3, 160, 160)), again(torch.ones(1, 3, 160, 160)))


def test_lists() -> None:
    heading, *rows = LISTS["backbones"]("*")
    assert heading.split() == ["backbone", "params", "size", "weights", "top-1", "file"]
    assert rows[0].split() == [
        "efficientnet_lite0",
        "4.7",
        "M",
        "224",
        "DEFAULT",
        "75.1%",
        "comes",
        "with",
        "tl-trainer",
    ]
    assert any(row.split()[:4] == ["resnet152", "60.2", "M", "224"] for row in rows)
    assert LISTS["backbones"]("timm/resnet50*")[1].startswith("timm/resnet50")
    assert LISTS["backbones"]("nothing*") == []
    assert LISTS["transforms"]("*flip") == ["RandomHorizontalFlip", "RandomVerticalFlip"]
    assert LISTS["configs"]("dem*")[0].startswith("demo.yaml ")


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "test_vit", "mobilenetv3_small_050"])
def test_pooled_is_what_the_classifier_sees_where_the_pooling_is_in_the_head(name: str) -> None:
    full, size = f"timm/{name}", {"swin_tiny_patch4_window7_224": 112, "test_vit": None}.get(name, 64)
    weights = resolve_weights(full, "none", size)
    images = torch.randn(1, 3, weights.preset.crop, weights.preset.crop)
    torch.manual_seed(0)
    reference = timm_models.construct(full, weights.preset.crop)
    backbone = build_backbone(full, weights, "pooled", 0)
    with torch.inference_mode():
        found = backbone(images)
        if name != "mobilenetv3_small_050":  # which has a layer between the two
            expected = reference.forward_head(reference.forward_features(images), pre_logits=True)  # type: ignore[operator]
            assert torch.equal(found, expected.flatten(1))
    assert found.shape[1] < 2000


def test_a_register_token_is_no_class_token() -> None:
    name = "timm/vit_little_patch16_reg4_gap_256"
    with pytest.raises(SettingError, match=f"{name} has no class token; use patch_mean or penultimate"):
        build_backbone(name, resolve_weights(name, "none", 64), "cls", 0)


@pytest.mark.parametrize("name", ["timm/hf-hub:somebody/x", "timm/local-dir:/etc", "fasterrcnn_resnet50_fpn"])
def test_a_checkpoint_cannot_name_what_is_no_backbone(name: str) -> None:
    with pytest.raises(SettingError, match="unknown backbone"):
        empty_backbone(name, False, "penultimate")


class Hub(SimpleHTTPRequestHandler):
    """As much of the hub as a download needs: one file, its commit and its hash; `sent` is how much of it comes."""

    data, sent, commit = b"", 1.0, "cd" * 20

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path == "/timm/test_vit.r160_in1k/resolve/main/model.safetensors" else 404)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(self.data).hexdigest()}"')
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.data[: int(self.sent * len(self.data))])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A hub on 127.0.0.1 that has weights of TINY, and an empty cache."""

    class Mine(Hub):
        data = saved(TINY, 5, "served.safetensors").read_bytes()

    with ThreadingHTTPServer(("127.0.0.1", 0), Mine) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in (
            ("ENDPOINT", address),
            ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(tmp_path / "hub")),
            ("HF_HUB_DISABLE_XET", True),
        ):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        yield Mine
        server.shutdown()
        thread.join()


def test_weights_come_from_the_hub_once_and_name_their_commit(hub: type[Hub]) -> None:
    backbone = build_backbone(TINY, resolve_weights(TINY, "DEFAULT"), "penultimate", 0)
    assert backbone.revision == hub.commit
    expected = build_backbone(TINY, resolve_weights(TINY, "served.safetensors"), "penultimate", 0)
    images = torch.ones(1, 3, 160, 160)
    assert torch.equal(backbone(images), expected(images))
    hub.data = b""  # from here on the server has nothing to give
    again = build_backbone(TINY, resolve_weights(TINY, f"r160_in1k@{hub.commit}"), "penultimate", 0)
    assert torch.equal(again(images), expected(images))


def test_a_download_that_is_cut_off_says_where_it_came_from(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.sent = 0.5
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's own pause between its attempts
    with pytest.raises(InputError, match=r"^http://127\.0\.0\.1:\d+/timm/test_vit.*cannot be downloaded: .+\nFetch"):
        build_backbone(TINY, resolve_weights(TINY, "DEFAULT"), "penultimate", 0)


def test_weights_that_want_images_padded_are_refused() -> None:
    name = "timm/deepseek_vit_412m"
    if not timm.is_model("deepseek_vit_412m"):
        pytest.skip("this version of timm has no model whose images are padded")
    with pytest.raises(SettingError, match="padded to a square"):
        resolve_weights(name, "DEFAULT")
