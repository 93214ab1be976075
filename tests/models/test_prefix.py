"""The frozen prefix: the same numbers as the plain stages, with BatchNorm folded, in another precision, compiled only
where that pays.

The networks are random ones whose BatchNorm has statistics of noise and, as trained ones mostly have, outputs on the
positive side of ReLU: without that a deep random network is chaotic and turns rounding into another image.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tl_trainer.data.images import load
from tl_trainer.data.transforms import Pipeline, Preprocessing, spell_out
from tl_trainer.errors import SettingError
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.chain import Stage
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.prefix import DTYPES, IMAGES_WORTH_COMPILING, FrozenPrefix, pays_to_compile, prefix_precision

CPU = torch.device("cpu")
SIDES = {  # name: the side of the images
    "alexnet": 64,
    "vgg16": 64,
    "resnet152": 64,
    "efficientnet_v2_s": 64,
    "densenet121": 64,
    "swin_t": 64,
    "vit_b_32": 64,
    "shufflenet_v2_x0_5": 64,
    "vgg11_bn": 64,
}
BATCH_NORMS = {"densenet121": 62}  # before a ReLU or after a concatenation; in all others every one follows a conv
MIDDLE = {
    "alexnet": "features.8",
    "vgg16": "classifier.0",
    "resnet152": "layer3",
    "efficientnet_v2_s": "features.4",
    "densenet121": "features.denseblock3",
    "swin_t": "features.5",
    "vit_b_32": "head",
    "shufflenet_v2_x0_5": "stage3",
    "vgg11_bn": "features.15",  # in a row of convolution, BatchNorm, ReLU
}


class Network(NamedTuple):
    """A classifier whose backbone is frozen, four images, and what the plain stages make of them."""

    name: str
    classifier: Classifier
    images: Tensor
    expected: Tensor


@pytest.fixture(scope="module", params=SIDES)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """One network at a time, for they are large."""
    name = request.param
    backbone = build_backbone(name, resolve_weights(name, "none", SIDES[name]), "penultimate", 7)
    torch.manual_seed(7)
    images = torch.randn(4, 3, SIDES[name], SIDES[name])
    settle(backbone, images)
    classifier = Classifier(backbone, nn.Linear(2, 2), "head").eval()
    yield Network(name, classifier, images, classifier.prefix(images))


def settle(backbone: nn.Module, images: Tensor) -> None:
    """Give BatchNorm the statistics of noise, and weights as after training."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, 1.0, 0.1)
    if norms:
        with torch.no_grad():
            backbone.train()(torch.cat([images, torch.randn_like(images)]))
    backbone.eval()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-4 of the largest value, where the images are told apart by far more than that."""
    largest = expected.abs().max().item()
    assert largest > 1e-3
    assert (expected[0] - expected[1]).abs().max().item() > 0.05 * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * largest)


def batch_norms(prefix: FrozenPrefix) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in prefix.network.modules())


def test_fp32_equals_the_plain_stages(network: Network) -> None:
    before = state_of(network.classifier)
    prefix = FrozenPrefix(network.classifier.frozen, CPU, "fp32")
    actual = prefix(network.images)
    assert actual.dtype == torch.float32
    assert_same(actual, network.expected)
    assert_same(prefix(network.images.contiguous(memory_format=torch.channels_last)), network.expected)
    assert batch_norms(prefix) == BATCH_NORMS.get(network.name, 0)
    assert state_of(network.classifier) == before
    assert torch.equal(network.classifier.prefix(network.images), network.expected)


def state_of(classifier: Classifier) -> list[Any]:
    """The modules with their kind and mode, the tensors with their memory and the number of changes to it."""
    tensors = [(name, value.dtype, value.data_ptr(), value._version) for name, value in classifier.state_dict().items()]
    return [*((name, type(module), module.training) for name, module in classifier.named_modules()), *tensors]


def test_bf16_has_the_direction_of_fp32(network: Network) -> None:
    before = state_of(network.classifier)
    prefix = FrozenPrefix(network.classifier.frozen, CPU, "bf16")
    actual = prefix(network.images)
    assert actual.dtype == torch.bfloat16
    actual, expected = actual.float().flatten(1), network.expected.flatten(1)
    assert cosine_similarity(actual, expected).min().item() >= 0.999
    assert cosine_similarity(expected[0], expected[1], dim=0).item() < 0.996
    dtypes = {value.dtype for value in prefix.network.parameters()}
    assert dtypes == {torch.bfloat16}
    assert state_of(network.classifier) == before


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "resnet152", "efficientnet_v2_s"])
def test_bf16_has_the_direction_of_fp32_on_photographs(photos: Path, name: str) -> None:
    preset = Preprocessing(
        resize=64, crop=64, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear"
    )
    pipeline = Pipeline(spell_out("default", preset, train=False), "transforms.eval")
    paths = sorted((photos / "val").rglob("*.jpg"))[::60]
    images = pipeline.batch(torch.stack([pipeline.image(load(path)) for path in paths]))
    backbone = build_backbone(name, resolve_weights(name, "none"), "penultimate", 7)
    settle(backbone, images)
    classifier = Classifier(backbone, nn.Linear(2, 2), "head").eval()
    expected = classifier.prefix(images).flatten(1)
    actual = FrozenPrefix(classifier.frozen, CPU, "bf16")(images).float().flatten(1)
    assert cosine_similarity(actual, expected).min().item() >= 0.999
    assert cosine_similarity(expected[:1], expected[1:]).max().item() < 0.996


def test_a_prefix_up_to_a_middle_stage(network: Network) -> None:
    if MIDDLE[network.name] == "head":
        pytest.skip("not a chain")
    classifier = Classifier(network.classifier.backbone, nn.Linear(2, 2), MIDDLE[network.name]).eval()
    assert 0 < len(classifier.frozen) < len(network.classifier.frozen)
    prefix = FrozenPrefix(classifier.frozen, CPU, "fp32")
    assert_same(prefix(network.images), classifier.prefix(network.images))
    with torch.inference_mode():
        features = prefix(network.images)
        for stage in classifier.trained:
            features = stage.module(features)
    assert_same(features, network.expected)


def test_calls_are_counted() -> None:
    prefix = FrozenPrefix([Stage("conv", nn.Conv2d(3, 4, 3))], CPU, "fp32")
    assert prefix.calls == 0
    for _ in range(3):
        prefix(torch.zeros(2, 3, 8, 8))
    assert prefix.calls == 3


def test_weights_are_a_copy_in_channels_last_without_gradient() -> None:
    conv = nn.Conv2d(3, 4, 3)
    prefix = FrozenPrefix([Stage("conv", conv)], CPU, "fp32")
    images = torch.randn(2, 3, 8, 8)
    before = prefix(images).clone()
    with torch.no_grad():
        conv.weight.zero_()
    assert torch.equal(prefix(images), before)
    (weight,) = [value for value in prefix.network.parameters() if value.dim() == 4]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(value.requires_grad for value in prefix.network.parameters())
    assert not prefix(images).requires_grad


def test_dropout_stays_off_while_the_rest_trains() -> None:
    backbone = build_backbone("alexnet", resolve_weights("alexnet", "none"), "penultimate", 7)
    classifier = Classifier(backbone, nn.Linear(4096, 2), "head").eval()
    images = torch.randn(2, 3, 64, 64)
    expected = classifier.prefix(images)
    assert any(isinstance(stage.module, nn.Dropout) for stage in classifier.frozen)
    prefix = FrozenPrefix(classifier.train().frozen, CPU, "fp32")
    assert_same(prefix(images), expected)
    assert torch.equal(prefix(images), prefix(images))


class Twice(nn.Module):
    """A convolution whose output is used before and after BatchNorm, so that the two cannot become one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.norm(x)


class Untraceable(nn.Module):
    """What it does depends on the values, which a trace does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x * 2 if x.sum() > 0 else x


def conv_and_norm(*, bias: bool = True, affine: bool = True, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(3, 6, 3, bias=bias, groups=groups), nn.BatchNorm2d(6, affine=affine)]


@pytest.mark.parametrize(
    ("modules", "left"),
    [
        (conv_and_norm(), 0),
        (conv_and_norm(bias=False), 0),
        (conv_and_norm(affine=False), 0),
        (conv_and_norm(groups=3), 0),
        ([nn.Sequential(*conv_and_norm(), nn.ReLU(inplace=True))], 0),
        ([nn.BatchNorm2d(3), *conv_and_norm()], 1),
        ([nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)], 1),
        ([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)], 0),
        ([Twice()], 1),
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Untraceable(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)], 1),
    ],
)
def test_batch_norm_is_folded_where_it_directly_follows_a_convolution(modules: list[nn.Module], left: int) -> None:
    torch.manual_seed(3)
    chain = nn.Sequential(*modules).train()
    for module in chain.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    images = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        chain(3 * torch.randn(16, 3, 12, 12) + 1)
        expected = chain.eval()(images)
    prefix = FrozenPrefix([Stage(str(index), module) for index, module in enumerate(modules)], CPU, "fp32")
    assert batch_norms(prefix) == left
    assert_same(prefix(images), expected)
    with torch.no_grad():
        assert torch.equal(chain(images), expected)


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "arm64"])
@pytest.mark.parametrize(("avx512_bf16", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_is_bf16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, machine: str, avx512_bf16: bool, amx: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    native = machine != "arm64" and (avx512_bf16 or amx)
    assert prefix_precision("auto", CPU) == ("bf16" if native else "fp32")
    assert prefix_precision("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize("native", [False, True])
def test_auto_on_a_gpu_is_bf16_only_where_it_is_not_emulated(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert prefix_precision("auto", torch.device("cuda", 0)) == ("bf16" if native else "fp32")


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_that_is_asked_for_is_used(precision: str, device: str) -> None:
    assert prefix_precision(precision, torch.device(device)) == precision


def test_fp16_is_for_cuda_only() -> None:
    assert prefix_precision("fp16", torch.device("cuda")) == "fp16"
    for device in ("cpu", "mps"):
        with pytest.raises(SettingError, match=f"fp16 needs CUDA, this run is on {device}; use fp32 or bf16") as caught:
            prefix_precision("fp16", torch.device(device))
        assert caught.value.key == "train.precision"
    assert set(DTYPES) == {"fp32", "bf16", "fp16"}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of the calls of torch.compile, which are made to do nothing."""
    calls: list[dict[str, Any]] = []

    def compile_nothing(network: nn.Module, **options: Any) -> nn.Module:
        calls.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return calls


def test_compiled_only_where_told(compiled: list[dict[str, Any]]) -> None:
    for wanted, calls in ((False, []), (True, [{"options": {"freezing": True}}])):
        FrozenPrefix([Stage("conv", nn.Conv2d(3, 4, 3))], CPU, "fp32", compiled=wanted)
        assert compiled == calls


def test_compiling_pays_for_enough_images(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    enough = IMAGES_WORTH_COMPILING["cpu"]
    assert [pays_to_compile(CPU, images) for images in (0, 1, enough - 1, enough)] == [False, False, False, True]
    assert not pays_to_compile(torch.device("mps"), 10**9)  # where it is not known to
    assert not caplog.records


def test_without_a_compiler_it_goes_on_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not pays_to_compile(CPU, IMAGES_WORTH_COMPILING["cpu"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "performance.compile needs a C++ compiler" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="there is no C++ compiler here")
def test_really_compiled_stages_compute_the_same() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    images = torch.rand(4, 3, 16, 16)
    expected = FrozenPrefix([Stage("conv", module)], CPU, "fp32")(images)
    actual = FrozenPrefix([Stage("conv", module)], CPU, "fp32", compiled=True)(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
