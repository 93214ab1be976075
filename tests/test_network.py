"""A classifier on its device with the fast form of its frozen prefix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tl_trainer.errors import SettingError
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.classifier import Classifier
from tl_trainer.network import Network, resolve_device

TAPS = {"head": ("maxpool", 24 * 8 * 8), "stage2": ("stage2", 48 * 4 * 4), "all": ("maxpool", 24 * 8 * 8)}


def network_of(trainable: str, precision: str = "fp32") -> Network:
    tap, size = TAPS[trainable]
    torch.manual_seed(0)
    backbone = build_backbone("shufflenet_v2_x0_5", resolve_weights("shufflenet_v2_x0_5", "none"), tap, 0)
    return Network(Classifier(backbone, nn.Linear(size, 3), trainable), torch.device("cpu"), precision)


@pytest.mark.parametrize("trainable", ["head", "stage2", "all"])
def test_images_give_the_logits_of_the_classifier(trainable: str) -> None:
    net = network_of(trainable)
    net.classifier.eval()
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(net.logits(net.features(images)), net.classifier(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", ["head", "stage2", "all"])
def test_an_embedding_is_what_the_head_takes(trainable: str) -> None:
    net = network_of(trainable)
    net.classifier.eval()
    features = net.features(torch.randn(5, 3, 32, 32))
    assert torch.equal(net.classifier.head(net.embed(features)), net.logits(features))
    assert net.embed(features).dtype == torch.float32


def test_fp16_on_a_processor_is_refused() -> None:
    with pytest.raises(SettingError, match="fp16 needs CUDA") as caught:
        network_of("head", "fp16")
    assert caught.value.key == "train.precision"


@pytest.mark.parametrize(
    ("trainable", "precision", "words"),
    [
        ("head", "fp32", "on cpu, in fp32"),
        ("head", "bf16", "on cpu, in bf16"),
        ("all", "fp32", "on cpu, in fp32"),
    ],
)
def test_it_says_how_it_computes(trainable: str, precision: str, words: str) -> None:
    assert network_of(trainable, precision).describe() == words


def test_two_kinds_of_arithmetic_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_trainer.network.prefix_precision", lambda *_: "bf16")
    words = "on cpu, the frozen backbone in bf16, what trains in fp32"
    assert network_of("head", "auto").describe() == words


def test_devices_that_are_not_there_are_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingError, match=r"cuda:77: this machine has \d+ CUDA devices; use --device cpu"):
        resolve_device("cuda:77")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(("kind", "trainable", "last"), [
    ("cuda", "stage2", True), ("cuda", "all", True), ("cuda", "head", False),
    ("cpu", "stage2", True), ("cpu", "all", False),  # of which only stage2 has grouped convolutions
])  # fmt: skip
def test_what_trains_is_laid_out_channels_last(
    monkeypatch: pytest.MonkeyPatch, kind: str, trainable: str, last: bool
) -> None:
    move = Classifier.to
    here = lambda self, *device, **layout: self if device else move(self, **layout)  # noqa: E731
    monkeypatch.setattr(Classifier, "to", here)
    classifier = network_of(trainable).classifier
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    net = Network(classifier, torch.device(kind), "fp32")
    weight = net.classifier.backbone.model.conv1[0].weight  # of the whole classifier
    assert weight.is_contiguous(memory_format=torch.channels_last) == last
    assert all(torch.equal(value, before[key]) for key, value in net.classifier.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "trainable", "setting", "trains_in"),
    [
        ("cuda", "stage2", "auto", torch.bfloat16),
        ("cuda", "head", "auto", None),
        ("cuda", "stage2", "fp16", torch.float16),
        ("cuda", "all", "fp32", None),
        ("cpu", "stage2", "bf16", torch.bfloat16),
        ("cpu", "stage2", "auto", None),
    ],
)
def test_what_trains_is_in_lower_precision_on_a_gpu_and_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, kind: str, trainable: str, setting: str, trains_in: torch.dtype | None
) -> None:
    move = Classifier.to
    here = lambda self, *device, **layout: self if device else move(self, **layout)  # noqa: E731
    monkeypatch.setattr(Classifier, "to", here)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    net = Network(network_of(trainable).classifier, torch.device(kind), setting)
    assert net.autocast == trains_in
    seen: list[torch.dtype] = []
    net.classifier.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    entered: list[tuple[str, torch.dtype | None, bool]] = []
    autocast = torch.autocast

    def note(device: str, dtype: torch.dtype | None, *, enabled: bool) -> torch.autocast:
        entered.append((device, dtype, enabled))
        return autocast("cpu", dtype, enabled=enabled and dtype is torch.bfloat16)

    monkeypatch.setattr(torch, "autocast", note)
    size = {"stage2": (24, 8, 8), "head": (24, 8, 8), "all": (3, 32, 32)}[trainable]
    logits = net.logits(torch.randn(2, *size))
    assert logits.dtype == torch.float32
    assert entered == [(kind, trains_in, trains_in is not None)]
    assert seen == [torch.bfloat16 if trains_in is torch.bfloat16 else torch.float32]
