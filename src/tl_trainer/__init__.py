"""Transfer learning for image classification: `train` makes a classifier, `load` gives one back.

    result = tl_trainer.train("imagefolder-alexnet.yaml", data__root="photos")
    model = tl_trainer.load(result["checkpoint"])
    model.predict(["a.jpg", "b.jpg"])[0].predictions

torch is imported with the first of these names that needs it, so `import tl_trainer` takes no time.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_trainer.api import Model, check, cross_validate, load, train
    from tl_trainer.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ImageError,
        InputError,
        Interrupted,
        RunError,
        TrainerError,
    )
    from tl_trainer.ground.signals import StopRequest
    from tl_trainer.metrics import Prediction
    from tl_trainer.predict import Extras, Row

__version__ = "0.3.0"

_ORIGINS = {
    "tl_trainer.api": ("Model", "check", "cross_validate", "load", "train"),
    "tl_trainer.errors": (
        "CheckpointError", "ConfigError", "DataError", "ImageError", "InputError", "Interrupted", "RunError",
        "TrainerError",
    ),
    "tl_trainer.ground.signals": ("StopRequest",),
    "tl_trainer.predict": ("Extras", "Row"),
    "tl_trainer.metrics": ("Prediction",),
}  # fmt: skip
__all__ = [
    "CheckpointError", "ConfigError", "DataError", "Extras", "ImageError", "InputError", "Interrupted", "Model",
    "Prediction", "Row", "RunError", "StopRequest", "TrainerError", "__version__", "check", "cross_validate",
    "load", "train",
]  # fmt: skip

logging.getLogger(__name__).addHandler(logging.NullHandler())  # or Python would print warnings on stderr


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used (PEP 562)."""
    for module, names in _ORIGINS.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
