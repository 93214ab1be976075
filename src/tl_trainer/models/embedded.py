"""The backbone that comes with the package: small enough to lie in it, pretrained on pictures drawn by code.

It is registered with torchvision, so that everywhere else it is one more of torchvision's models.
"""

# Annotations are evaluated here: torchvision reads a model's weights off the signature of its builder.
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.transforms._presets import ImageClassification


class Block(nn.Module):
    """ReLU(body(x) + shortcut(x)), the residual block of He et al. (2016); a stride is that of its 3x3 convolution.

    With `middle` it is the bottleneck 1x1, 3x3, 1x1 of that width, else two 3x3.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, middle: int = 0) -> None:
        super().__init__()
        if middle:
            first, last = convolution(inputs, middle, 1), convolution(middle, outputs, 1)
            layers = [*first, nn.ReLU(inplace=True), *convolution(middle, middle, 3, stride)]
        else:
            layers, last = convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3)
        self.body = nn.Sequential(*layers, nn.ReLU(inplace=True), *last)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return self.relu(self.body(x) + self.shortcut(x))  # type: ignore[no-any-return]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias and its BatchNorm."""
    return [nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)]


class TinyResNet(nn.Sequential):
    """A residual network of 0.64 M parameters: (N, 3, H, W) -> 320 features (N, 320). It has no classifier.

    Whoever changes what it computes raises network.CACHE_VERSION: cached features are told apart by weights alone.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second = convolution(3, 32, 5, 2), convolution(32, 64, 3, 2)
        self.stem = nn.Sequential(*first, nn.ReLU(inplace=True), *second, nn.ReLU(inplace=True))
        self.layer1 = Block(64, 64)
        self.layer2 = Block(64, 128, stride=2)
        self.layer3 = nn.Sequential(Block(128, 320, stride=2, middle=96), Block(320, 320, middle=96))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Identity()


class TinyResNet_Weights(WeightsEnum):  # type: ignore[misc]
    """What scripts/pretrain_demo_backbone.py makes. They have never seen a photograph."""

    DRAWINGS_V1 = Weights(
        url=Path(__file__).with_name("tiny_resnet-be6d6d6a.pth").as_uri(),
        transforms=partial(ImageClassification, crop_size=96, resize_size=96),
        meta={"categories": [], "num_params": 639_136},
    )
    DEFAULT = DRAWINGS_V1


@register_model()  # type: ignore[untyped-decorator]
def tiny_resnet(weights: TinyResNet_Weights | None = None) -> TinyResNet:
    """The network with random weights; others are loaded by `models.backbones`, which checks their hash."""
    if weights is not None:
        raise ValueError("build_backbone loads the weights of tiny_resnet")
    return TinyResNet()
