"""A classifier on its device with the fast form of its frozen prefix: what training, evaluation and prediction run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tl_trainer.errors import SettingError
from tl_trainer.ground import distributed
from tl_trainer.ground.machine import require_memory
from tl_trainer.models.classifier import Classifier
from tl_trainer.models.prefix import DTYPES, FrozenPrefix, prefix_precision
from tl_trainer.models.synced import synchronised


class Network:
    """The classifier and its frozen prefix. `prefix` is made when the first image needs it.

    precision: `auto`, fp32, bf16 or fp16, as in `train.precision`. compiled: whether the prefix is compiled.
    Raises SettingError for a precision that the device does not have.
    """

    def __init__(self, classifier: Classifier, device: torch.device, precision: str, *, compiled: bool = False) -> None:
        require_memory()
        self.classifier = classifier.to(device)
        if _faster_channels_last(classifier, device):
            self.classifier.to(memory_format=torch.channels_last)
        self.device = device
        self.precision = prefix_precision(precision, device)
        # The part that trains follows the prefix to lower precision on a GPU, on a processor only when told to.
        lower = self.precision != "fp32" and (
            precision != "auto" or (device.type == "cuda" and classifier.trained != [])
        )
        self.autocast = DTYPES[self.precision] if lower else None
        self.compiled = compiled
        self._prefix: FrozenPrefix | None = None
        self._suffix: Callable[[Tensor], Tensor] = classifier.suffix

    def prefix(self) -> FrozenPrefix:
        """The fast frozen prefix."""
        if self._prefix is None:
            self._prefix = FrozenPrefix(self.classifier.frozen, self.device, self.precision, compiled=self.compiled)
        return self._prefix

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> the frozen prefix's output, float32; the images where nothing is frozen."""
        if not self.classifier.frozen:
            return images
        # A copy, since autograd cannot save what was made in inference mode.
        return self.prefix()(images).to(torch.float32, copy=True)

    def embed(self, features: Tensor) -> Tensor:
        """The frozen prefix's output, float32 -> the input of the head, (N, features) float32."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.classifier.embed(features).float()

    def logits(self, features: Tensor) -> Tensor:
        """The frozen prefix's output, float32 -> (N, classes) float32."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            suffix = self._suffix if torch.is_grad_enabled() else self.classifier.suffix
            logits: Tensor = suffix(features)
            return logits.float()

    @contextlib.contextmanager
    def replicated(self) -> Iterator[None]:
        """Within the block `logits` have the gradients of all ranks; nothing changes where there is only one."""
        if distributed.world() == 1:
            yield
            return
        from torch.nn.parallel import DistributedDataParallel

        # static_graph: some backbones have weights that nothing depends on.
        with synchronised(self.classifier):
            self._suffix = DistributedDataParallel(_Suffix(self.classifier), static_graph=True)
            try:
                yield
            finally:
                self._suffix = self.classifier.suffix

    def describe(self) -> str:
        """Device and arithmetic in words."""
        trained = self.precision if self.autocast else "fp32"
        if not self.classifier.frozen or trained == self.precision:
            return f"on {self.device.type}, in {trained}"
        return f"on {self.device.type}, the frozen backbone in {self.precision}, what trains in {trained}"


def _faster_channels_last(classifier: Classifier, device: torch.device) -> bool:
    """Whether what trains is faster in the layout in which the frozen prefix gives its output.

    On a GPU everything is. On a processor networks with grouped convolutions are up to 1.5 times as fast
    (EfficientNet-Lite0), and others up to a fifth slower (VGG16).
    """
    modules = [module for stage in classifier.trained for module in stage.module.modules()]
    grouped = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in modules)
    return bool(modules) if device.type == "cuda" else grouped and device.type == "cpu"


class _Suffix(nn.Module):
    """What trains as a module, which is what DistributedDataParallel takes."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        """As `Classifier.suffix`."""
        return self.classifier.suffix(features)


def resolve_device(setting: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu. Raises SettingError for a device that this machine does not have."""
    if setting == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        setting = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(setting)
    if device.type == "cuda" and device.index is None and distributed.world() > 1:
        device = torch.device("cuda", distributed.local_rank())
    elif device.type == "cuda" and (ranks := distributed.local_world()) > 1:
        raise SettingError("device", f"{setting} is one GPU for {ranks} ranks of a host; set cuda: each takes its own")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SettingError("device", f"{setting}: this machine has {count} CUDA devices; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device", "mps: this machine has no Apple GPU that torch can use; use --device cpu")
    return device
