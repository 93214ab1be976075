"""Weights: their names and preprocessing, fetched by HTTP into torch's cache, and read from a state_dict file.

The server is on 127.0.0.1; torchvision's enum member is given a URL there, with the file's real hash in its name as
in torchvision's own URLs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import pickle
import re
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import (
    MNASNet,
    ResNet50_Weights,
    ResNet152_Weights,
    ShuffleNet_V2_X0_5_Weights,
    VGG16_Weights,
    WeightsEnum,
    get_model_weights,
)

from tl_trainer.errors import CheckpointError, InputError, SettingError
from tl_trainer.models import torchvision_models
from tl_trainer.models.backbones import BACKBONES, build_backbone, resolve_weights
from tl_trainer.models.weights import with_versions

NAME = "shufflenet_v2_x0_5"
WEIGHTS = ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
State = dict[str, Tensor]
Publish = Callable[[WeightsEnum, State], Path]


def noise(name: str = NAME, **options: Any) -> State:
    """A state dict of torchvision's model with every number different from its initial value."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None, **options).state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = torch.rand(value.shape, generator=generator)
        else:  # the number of batches that BatchNorm has seen
            state[key] = torch.tensor(17)
    return state


def content_of(state: State) -> tuple[bytes, str]:
    """What torch.save writes, and the beginning of its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()[:10]


@pytest.fixture
def publish(file_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Serve a state dict as the file of torchvision weights; returns the served file."""
    url, folder = file_server

    def run(weights: WeightsEnum, state: State) -> Path:
        content, digest = content_of(state)
        file = folder / f"model-{digest}.pth"
        file.write_bytes(content)
        monkeypatch.setattr(weights.value, "url", f"{url}/{file.name}")
        return file

    return run


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where torch keeps downloaded weights, see conftest.py."""
    return tmp_path / "torch" / "hub" / "checkpoints"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def assert_holds(model: nn.Module, state: State) -> None:
    found = model.state_dict()
    assert found
    assert found.keys() <= state.keys()
    for key, value in found.items():
        assert torch.equal(value, state[key]), key


def test_an_unknown_backbone_names_the_key_and_the_nearest() -> None:
    with pytest.raises(SettingError, match="did you mean 'resnet152'") as caught:
        resolve_weights("resnet153", "DEFAULT")
    assert caught.value.key == "model.backbone"


def test_a_detection_model_is_no_backbone() -> None:
    assert "fasterrcnn_resnet50_fpn" not in BACKBONES
    with pytest.raises(SettingError, match="unknown backbone"):
        resolve_weights("fasterrcnn_resnet50_fpn", "none")


def test_weights_by_name_by_path_and_none(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    assert resolve_weights("resnet152", "DEFAULT").name == "IMAGENET1K_V2"
    assert resolve_weights("resnet152", "IMAGENET1K_V1").name == "IMAGENET1K_V1"
    assert resolve_weights("resnet152", "none").fetch is None
    mine = resolve_weights("resnet152", "mine")
    assert mine.fetch is not None
    assert (mine.name, mine.fetch()) == ("mine", Path("mine"))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("IMAGENET1K_V9", "did you mean 'IMAGENET1K_V1'.* DEFAULT, IMAGENET1K_V1, a file's path, none"),
        ("IMAGENET1K_FEATURES", "unknown weights of alexnet"),  # those are VGG16's
        ("missing.pth", "no such file: missing.pth"),
        ("~/no/such", "no such file: ~/no/such"),
        ("~nobody-is-called-so/x", "no such file: ~nobody-is-called-so/x"),
    ],
)
def test_unknown_weights_name_the_key_and_the_choices(weights: str, expected: str) -> None:
    with pytest.raises(SettingError, match=expected) as caught:
        resolve_weights("alexnet", weights)
    assert caught.value.key == "model.weights"


def test_preprocessing_is_the_weights_own() -> None:
    v1, v2 = (resolve_weights("resnet152", weights.name).preset for weights in ResNet152_Weights)
    assert (v1.resize, v1.crop) == (256, 224)
    assert (v2.resize, v2.crop) == (232, 224)
    assert v2.mean == (0.485, 0.456, 0.406)
    assert v2.std == (0.229, 0.224, 0.225)
    assert v2.interpolation == "bilinear"


@pytest.mark.parametrize("weights", ["none", "mine.pth"])
def test_preprocessing_of_unnamed_weights_is_the_defaults(weights: str) -> None:
    Path("mine.pth").write_bytes(b"")
    assert resolve_weights("alexnet", weights).preset == resolve_weights("alexnet", "DEFAULT").preset
    assert resolve_weights("efficientnet_v2_s", weights).preset.crop == 384


@pytest.mark.parametrize("weights", ResNet50_Weights, ids=lambda weights: weights.name)
def test_a_file_of_torchvisions_has_the_preprocessing_of_its_weights_whatever_it_is_called(
    weights: WeightsEnum, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Found by its content: the name of the other weights, which is wrong here, says nothing."""
    caplog.set_level(logging.INFO)
    (other,) = set(ResNet50_Weights) - {weights}
    path = Path(Path(other.url).name)
    path.write_bytes(b"weights")
    monkeypatch.setattr(weights.value, "url", f"https://nowhere/model-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth")
    found = resolve_weights("resnet50", str(path))
    assert found.preset == resolve_weights("resnet50", weights.name).preset
    assert found.name == path.name
    assert found.fetch is not None
    assert found.fetch() == path
    assert caplog.messages == [f"{path}: the weights {weights.name} of resnet50, with their preprocessing"]


def test_a_file_that_nobody_knows_says_whose_preprocessing_it_gets(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = saved(noise())
    build_backbone(NAME, resolve_weights(NAME, str(path)), "logits", 0)
    assert caplog.messages == [
        f"{path}: these are not torchvision's own weights, so images are preprocessed as for {NAME} IMAGENET1K_V1; "
        "set transforms.size, or "
        "transforms.eval and transforms.train, for another preprocessing"
    ]


def test_every_weights_entry_can_be_told_by_its_hash() -> None:
    for name in torchvision_models.NAMES:
        hashes = [torchvision_models._named_hash(Path(weights.url)) for weights in get_model_weights(name)]
        assert all(len(digest) >= 8 for digest in hashes), name
        assert len(set(hashes)) == len(hashes), name


def test_weights_for_another_size_scale_the_resize_with_it() -> None:
    half = resolve_weights("resnet152", "IMAGENET1K_V2", 112).preset
    assert (half.resize, half.crop) == (116, 112)


def test_weights_by_name_are_downloaded_once(publish: Publish, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = noise()
    served = publish(WEIGHTS, state)
    assert_holds(build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0).model, state)
    assert files_in(cache) == [served.name]
    assert (cache / served.name).read_bytes() == served.read_bytes()
    assert WEIGHTS.url in caplog.text
    caplog.clear()
    served.unlink()  # a second request would end in a 404
    assert_holds(build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "penultimate", 0).model, state)
    assert caplog.text == ""


def test_a_file_that_torch_has_cached_needs_no_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = noise()
    content, digest = content_of(state)
    cache.mkdir(parents=True)
    (cache / f"model-{digest}.pth").write_bytes(content)
    monkeypatch.setattr(WEIGHTS.value, "url", f"http://{closed_port()}/model-{digest}.pth")
    assert_holds(build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0).model, state)


def test_a_wrong_hash_is_refused_and_no_file_is_left(publish: Publish, cache: Path) -> None:
    served = publish(WEIGHTS, noise())
    served.write_bytes(served.read_bytes() + b"more")
    with pytest.raises(InputError, match="download is damaged") as caught:
        build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0)
    assert WEIGHTS.url in str(caught.value)
    assert str(caught.value).count("\n") < 3
    assert files_in(cache) == []


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda content: b"", lambda content: content + b"x"]
)
def test_a_damaged_file_in_the_cache_is_downloaded_again(
    publish: Publish, cache: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    state = noise()
    served = publish(WEIGHTS, state)
    cache.mkdir(parents=True)
    (cache / served.name).write_bytes(damage(served.read_bytes()))
    caplog.set_level("WARNING", logger="tl_trainer")
    assert_holds(build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0).model, state)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(cache / served.name) in caplog.text
    assert (cache / served.name).read_bytes() == served.read_bytes()


def test_of_two_processes_that_want_a_file_the_second_finds_it(
    publish: Publish, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, fetched = noise(), []
    served = publish(WEIGHTS, state)

    @contextlib.contextmanager
    def after_another(folder: Path, *, wait: bool) -> Iterator[None]:
        assert (folder, wait) == (cache, True)
        fetched.append(served.name)
        served.rename(folder / served.name)
        yield

    monkeypatch.setattr(torchvision_models, "sole_use", after_another)
    assert_holds(build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0).model, state)
    assert fetched == files_in(cache) == [served.name]


class _Cut(BaseHTTPRequestHandler):
    """Announces the whole file and hangs up after half of it."""

    content = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def cutting_server() -> Iterator[str]:
    """The address of a server that hangs up in the middle of every file."""
    with HTTPServer(("127.0.0.1", 0), _Cut) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_connection_that_is_cut_leaves_no_file(
    cutting_server: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, digest = content_of(noise())
    monkeypatch.setattr(_Cut, "content", content)
    monkeypatch.setattr(WEIGHTS.value, "url", f"http://{cutting_server}/model-{digest}.pth")
    with pytest.raises(InputError) as caught:
        build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0)
    assert WEIGHTS.url in str(caught.value)
    assert str(caught.value).count("\n") < 3
    assert files_in(cache) == []
    assert socket.getdefaulttimeout() is None  # the stall timeout is for the download alone


def closed_port() -> str:
    """An address on this machine that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_offline_two_lines_name_the_url_the_place_and_the_alternatives(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WEIGHTS.value, "url", f"http://{closed_port()}/model-0123456789.pth")
    with pytest.raises(InputError) as caught:
        build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{WEIGHTS.url} cannot be downloaded: ")
    assert "refused" in first
    assert str(cache / "model-0123456789.pth") in second
    assert "or set model.weights to a state_dict file. The weights of efficientnet_lite0 come with" in second
    assert files_in(cache) == []


def test_a_file_that_the_server_does_not_have(publish: Publish, cache: Path) -> None:
    publish(WEIGHTS, noise()).unlink()
    with pytest.raises(InputError, match=r"cannot be downloaded: .*[Nn]ot found"):
        build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0)
    assert files_in(cache) == []


def test_a_cache_that_cannot_be_written(publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(WEIGHTS, noise())
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be downloaded"):
        build_backbone(NAME, resolve_weights(NAME, "IMAGENET1K_V1"), "logits", 0)


def test_vgg16_features_are_weights_for_the_pooled_tap(publish: Publish) -> None:
    weights = VGG16_Weights.IMAGENET1K_FEATURES
    features = {key: value for key, value in noise("vgg16").items() if key.startswith("features.")}
    publish(weights, {**features, "classifier.0.bias": torch.full((4096,), torch.nan)})
    model = build_backbone("vgg16", resolve_weights("vgg16", weights.name), "pooled", 0).model
    assert model.state_dict().keys() == features.keys()
    assert_holds(model, features)


def saved(state: Any, name: str = "weights.pth") -> Path:
    torch.save(state, name)
    return Path(name).absolute()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_from_a_file(prefix: str) -> None:
    state = noise()
    path = saved({prefix + key: value for key, value in state.items()})
    assert_holds(build_backbone(NAME, resolve_weights(NAME, str(path)), "logits", 0).model, state)


def test_a_file_from_before_torch_0_4_does_not_count_batches() -> None:
    state = noise()
    path = saved({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")})
    model = build_backbone(NAME, resolve_weights(NAME, str(path)), "logits", 0).model
    assert_holds(model, {key: torch.tensor(0) if key.endswith("_tracked") else value for key, value in state.items()})


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The versions of its layout that MNASNet was told while it was filled, and without which it refuses."""
    told: list[int | None] = []
    load = MNASNet._load_from_state_dict

    def listen(model: MNASNet, state: State, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        told.append(metadata.get("version"))
        load(model, state, prefix, metadata, *rest)

    monkeypatch.setattr(MNASNet, "_load_from_state_dict", listen)
    return told


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_keeps_the_versions_it_was_saved_with(version: int, versions: list[int | None]) -> None:
    state: Any = noise("mnasnet1_0")  # whose two layouts are the same
    state._metadata[""]["version"] = version
    weights = resolve_weights("mnasnet1_0", str(saved(state)))
    assert_holds(build_backbone("mnasnet1_0", weights, "logits", 0).model, state)
    assert versions == [version]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_0"])
def test_a_plain_dict_has_the_versions_of_the_model(name: str, prefix: str, versions: list[int | None]) -> None:
    state = noise(name)
    path = saved({prefix + key: value for key, value in state.items()})
    assert not hasattr(torch.load(path, weights_only=True), "_metadata")
    assert_holds(build_backbone(name, resolve_weights(name, str(path)), "penultimate", 0).model, state)
    assert versions == [2]


def test_versions_within_a_wrapper_are_those_of_the_model(versions: list[int | None]) -> None:
    """DistributedDataParallel is saved with a version of its own, 1, as any module that has none to tell."""
    state, wrapper = noise("mnasnet0_5"), nn.Module()
    with torch.device("meta"):
        wrapper.module = torchvision.models.get_model("mnasnet0_5", weights=None)
    wrapper.load_state_dict(with_versions({f"module.{key}": state[key] for key in state}, wrapper), assign=True)
    path = saved(wrapper.state_dict())
    assert torch.load(path, weights_only=True)._metadata[""] == {"version": 1}
    versions.clear()
    assert_holds(build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", str(path)), "penultimate", 0).model, state)
    assert versions == [2]


@pytest.mark.parametrize(
    "versions", [5, [""], {"": 1}, {"": "1"}, {1: {"version": 1}}, {"fc": None}, {"": {"version": "1"}}]
)
def test_versions_that_are_none_are_refused(versions: Any) -> None:
    state = OrderedDict(noise())
    state._metadata = versions  # type: ignore[attr-defined]
    with pytest.raises(
        CheckpointError, match=r"weights\.pth: damaged: _metadata does not hold the versions of its mod"
    ):
        build_backbone(NAME, resolve_weights(NAME, str(saved(state))), "logits", 0)


def test_mnasnets_first_layout_is_refused_by_the_tensor_that_differs() -> None:
    state: Any = noise("mnasnet0_5")
    state["layers.0.weight"] = torch.zeros(32, 3, 3, 3)
    state._metadata[""]["version"] = 1
    with pytest.raises(CheckpointError, match=r"layers\.0\.weight is \(32, 3, 3, 3\), mnasnet0_5 has \(16, 3, 3, 3\)"):
        build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", str(saved(state))), "penultimate", 0)


def test_mnasnets_second_layout_under_the_version_of_the_first_is_refused() -> None:
    state: Any = noise("mnasnet0_5")
    state._metadata[""]["version"] = 1
    expected = r"weights\.pth: the tensors of mnasnet0_5 are not in the layout of the version .*layers"
    with pytest.raises(CheckpointError, match=expected):
        build_backbone("mnasnet0_5", resolve_weights("mnasnet0_5", str(saved(state))), "penultimate", 0)


def test_densenets_old_names() -> None:
    state = noise("densenet121")
    path = saved({re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): v for key, v in state.items()})
    old = torch.load(path, weights_only=True)
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert "features.denseblock4.denselayer16.conv.2.weight" in old
    assert_holds(build_backbone("densenet121", resolve_weights("densenet121", str(path)), "logits", 0).model, state)


@pytest.mark.parametrize("tap", ["penultimate", "pooled"])
def test_another_number_of_classes_does_not_matter_below_the_last_linear(tap: str) -> None:
    state = noise(num_classes=7)
    assert_holds(build_backbone(NAME, resolve_weights(NAME, str(saved(state))), tap, 0).model, state)


def test_the_inceptions_weights_expect_the_input_of_another_framework() -> None:
    model = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False, transform_input=True)
    backbone = build_backbone("googlenet", resolve_weights("googlenet", str(saved(model.state_dict()))), "logits", 0)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(backbone(images), model.eval()(images))
        model.transform_input = False
        assert not torch.equal(backbone(images), model(images))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("conv5.0.weight"), "1 tensors are missing, the first conv5.0.weight"),
        (lambda state: state.update({"fc.bias": torch.zeros(7)}), r"fc\.bias is \(7,\), .* has \(1000,\)"),
        (lambda state: state.update({"fc.bias": [1.0]}), "not a state_dict"),
        (lambda state: state.clear(), "not a state_dict"),
    ],
)
def test_a_file_that_does_not_fit_is_named(change: Callable[[State], None], expected: str) -> None:
    state = noise()
    change(state)
    path = saved(state)
    with pytest.raises(CheckpointError, match=expected) as caught:
        build_backbone(NAME, resolve_weights(NAME, str(path)), "logits", 0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_models_weights() -> None:
    path = saved(noise("squeezenet1_1"))
    with pytest.raises(CheckpointError, match=f"not weights of {NAME}: .* the first conv1.0.weight"):
        build_backbone(NAME, resolve_weights(NAME, str(path)), "penultimate", 0)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_what_a_training_script_saved_is_unwrapped_and_said(key: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tl_trainer")
    state = {f"module.{name}": value for name, value in noise().items()}
    path = saved({key: state, "epoch": 3, "optimizer": {"state": {}}})
    backbone = build_backbone(NAME, resolve_weights(NAME, str(path)), "logits", 0)
    assert torch.equal(backbone.model.state_dict()["fc.bias"], state["module.fc.bias"])
    assert f"{path}: the weights are taken from its {key!r}" in caplog.messages


def test_a_pickled_model_is_answered_with_how_to_save_its_tensors(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError, match=r"refused.*; of a pickled model save the tensors: torch\.save\(model\.st"
    ):
        build_backbone(NAME, resolve_weights(NAME, str(tmp_path / "model.pth")), "logits", 0)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"state_dict": {}, "epoch": 3}])
def test_a_file_that_is_no_state_dict(content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.pth: not a state_dict"):
        build_backbone(NAME, resolve_weights(NAME, str(saved(content))), "penultimate", 0)


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04" + b"\0" * 64])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pth: damaged or not a PyTorch file"):
        build_backbone(NAME, resolve_weights(NAME, str(path)), "penultimate", 0)


class Malicious:
    """A pickle that leaves a file behind when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def save_as_before_torch_1_6(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_as_plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("write", "read", "expected"),
    [
        (torch.save, lambda path: torch.load(path, weights_only=False), "refused"),
        (save_as_before_torch_1_6, lambda path: torch.load(path, weights_only=False), "refused"),
        (save_as_plain_pickle, lambda path: pickle.loads(path.read_bytes()), "not a PyTorch file"),  # noqa: S301
    ],
)
def test_a_pickle_that_runs_code_is_refused_and_never_executed(
    tmp_path: Path, write: Callable[[Any, Path], None], read: Callable[[Path], object], expected: str
) -> None:
    mark, path = tmp_path / "executed", tmp_path / "weights.pth"
    write({**noise(), "fc.bias": Malicious(mark)}, path)
    with pytest.raises(CheckpointError, match=rf"weights\.pth: .*{expected}"):
        build_backbone(NAME, resolve_weights(NAME, str(path)), "penultimate", 0)
    assert not mark.exists()
    read(path)
    assert mark.exists(), "the file does nothing, so the test shows nothing"
