"""A checkpoint for other programs: written, compared with tl-trainer's own prediction, and only then put in place.

onnx and pt2 hold all from pixels to probabilities; safetensors the weights; hub a folder that timm loads.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tl_trainer
from tl_trainer.assembly import Parts, reopened
from tl_trainer.data.verify import verified
from tl_trainer.deployed import Deployed, Pixels
from tl_trainer.errors import InputError, RunError
from tl_trainer.ground.files import make_folder, write_text
from tl_trainer.ground.machine import is_out_of_memory
from tl_trainer.hub import save_for_timm, timm_logits

log = logging.getLogger(__name__)

OPSET = 18
IMAGES = 64
LEAST_AGREEMENT, LARGEST_DIFFERENCE = 0.999, 2e-3
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_BYTES = 3 * 2**29  # from here on torch.onnx writes the weights into a second file

Pictures = Sequence[Image.Image]
Run = Callable[[Tensor], Tensor]  # a batch of the export's input -> probabilities


@dataclass(frozen=True)
class Check:
    """How an export agrees with tl-trainer's own prediction. of: which images they were."""

    of: str
    images: int
    agreement: float  # share of the images with the same first class, or as probable a one within the tolerance
    largest_difference: float  # of a probability

    @property
    def passed(self) -> bool:
        return self.agreement >= LEAST_AGREEMENT and self.largest_difference <= LARGEST_DIFFERENCE

    def __str__(self) -> str:
        return (
            f"{self.agreement:.1%} agreement on {self.images} {self.of}, largest difference of a probability "
            f"{self.largest_difference:.1e}"
        )


def export(parts: Parts, to: str, out: Path, origin: str = "image", *, force: bool = False) -> dict[str, Any]:
    """Write the classifier, which is on the CPU in fp32, and check it; where it is, and how it agreed.

    to: one of FORMATS. origin: image, or tensor for what the network takes. force: replace what is there.
    Raises InputError for what cannot be exported so, RunError where the export does not agree.
    """
    if to == "onnx" and (missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]):
        raise InputError(f"--to onnx needs {', '.join(missing)}; run: pip install {' '.join(missing)}")
    about = out / "check.json" if to == "hub" else out.with_name(f"{out.name}.json")
    if not force and (there := [path for path in (out, about) if path.exists()]):
        raise InputError(f"{there[0]} exists; choose another name, or replace it with --force")
    origin = origin if to in ("onnx", "pt2") else "tensor"
    pixels = Pixels(parts.pipeline) if origin == "image" else None
    make_folder(out.parent, "OUT")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        unfinished = Path(folder, out.name)
        pictures, of = _pictures(parts)
        views = [parts.pipeline.batch(parts.pipeline.image(picture)[None]) for picture in pictures]
        inputs = [_pixels_of(picture) for picture in pictures] if pixels is not None else views
        log.info("writing %s, to be checked on %d %s", out, len(pictures), of)
        run = FORMATS[to](parts, pixels, inputs, unfinished)
        try:
            check = _compared(parts, run, views, inputs, of)
        finally:
            del run  # Windows removes no file that is open
        if not check.passed:
            raise RunError(f"{out} was not written, since it disagrees with tl-predict: {check}; please report it")
        _put(unfinished, out)
    result = {"path": str(out), "to": to, "from": origin, **asdict(check)}
    write_text(about, json.dumps(result) + "\n")
    return result


def described(parts: Parts, origin: str) -> dict[str, Any]:
    """What an export says of itself, as plain data."""
    saved = parts.saved
    assert saved is not None
    heads = parts.task.activations(saved.calibration)
    return {
        "labels": saved.classes,
        "temperature": saved.temperature,
        **({} if saved.thresholds is None else {"task": parts.task.kind, "thresholds": saved.thresholds}),
        **({"heads": [head._asdict() for head in heads]} if len(heads) > 1 else {}),
        "input": "uint8 (N, H, W, 3), upright RGB" if origin == "image" else "float32 (N, 3, H, W), preprocessed",
        "output": "probabilities (N, classes)",
        "preprocessing": saved.preprocessing,
        "backbone": saved.backbone["name"],
        "tl_trainer": tl_trainer.__version__,
    }


def _pictures(parts: Parts) -> tuple[Pictures, str]:
    """Validation images where they are there, else generated ones; what to call them."""
    try:
        split = reopened(parts).split("val").sample(IMAGES)
        split = verified(split, "val", parts.config.data.skipping_bad(), None)
    except InputError as error:
        log.warning("checked on generated images, since the validation images are not there: %s", error)
        return [*_generated()], "generated images"
    return [split.open(index) for index in range(len(split))], "validation images"


def _generated() -> Iterator[Image.Image]:
    """Coloured clouds in several sizes."""
    rng = np.random.default_rng(0)
    for _ in range(IMAGES):
        width, height, *cells = (int(value) for value in rng.integers((200, 200, 2, 2), (640, 640, 40, 40)))
        yield Image.fromarray(rng.integers(0, 256, (*cells, 3), dtype=np.uint8)).resize((width, height))


def _pixels_of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))[None]


@torch.inference_mode()
def _compared(parts: Parts, run: Run, views: Sequence[Tensor], inputs: Sequence[Tensor], of: str) -> Check:
    network, calibration = parts.network, parts.saved.calibration if parts.saved else None
    logits = torch.cat([network.logits(network.features(view)) for view in views])
    expected = parts.task.probabilities(logits, calibration)
    twice = run(torch.cat([inputs[0], inputs[0]]))  # a batch of another size than one
    found = torch.cat([twice[1:], *(run(one) for one in inputs[1:])]).double()
    first = expected.gather(1, found.argmax(dim=1, keepdim=True))[:, 0]
    same = (expected.amax(dim=1) - first <= LARGEST_DIFFERENCE).double().mean().item()
    difference = (found - expected).abs().max().item()
    return Check(of, len(inputs), same, difference if difference == difference else float("inf"))


def _program(parts: Parts, pixels: Pixels | None, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """The classifier as torch's program, for batches of any number and, from pixels, of any height and width."""
    dim, calibration = torch.export.Dim, parts.saved.calibration if parts.saved else None
    deployed = Deployed(pixels, parts.network.classifier, parts.task.activations(calibration))
    sizes = {0: dim("N"), **({1: dim("H"), 2: dim("W")} if pixels is not None else {})}
    example = torch.cat([inputs[0], inputs[0]])
    with _exporting(parts), torch.no_grad():
        return torch.export.export(deployed, (example,), dynamic_shapes={"images": sizes})


@contextmanager
def _exporting(parts: Parts) -> Iterator[None]:
    """torch's reason why the network cannot be expressed, as a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on its own code
            yield
    except Exception as error:  # torch's exporters raise all kinds
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{parts.backbone['name']} cannot be exported so with torch {torch.__version__} (ONNX opset {OPSET}): "
            f"{reason}; try another --to"
        ) from error


def _onnx(parts: Parts, pixels: Pixels | None, inputs: Sequence[Tensor], out: Path) -> Run:
    if (size := sum(value.nbytes for value in parts.network.classifier.state_dict().values())) >= ONNX_BYTES:
        raise InputError(
            f"the weights take {size / 1e9:.1f} GB, and one file of ONNX holds {ONNX_BYTES / 1e9:.1f}; use --to pt2"
        )
    program = _program(parts, pixels, inputs)
    import onnxruntime

    with _exporting(parts):
        found = torch.onnx.export(
            program, (), input_names=["images"], output_names=["probabilities"], dynamo=True, opset_version=OPSET,
            verbose=False,
        )  # fmt: skip
        assert found is not None
        about = described(parts, "tensor" if pixels is None else "image")
        plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
        found.model.metadata_props.update(plain)
        found.save(out)
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _pt2(parts: Parts, pixels: Pixels | None, inputs: Sequence[Tensor], out: Path) -> Run:
    about = json.dumps(described(parts, "tensor" if pixels is None else "image"))
    program = _program(parts, pixels, inputs)
    with _exporting(parts):
        torch.export.save(program, out, extra_files={"tl-trainer.json": about})
        loaded: Run = torch.export.load(out).module()
    return loaded


def _safetensors(parts: Parts, pixels: Pixels | None, inputs: Sequence[Tensor], out: Path) -> Run:
    from safetensors.torch import load_file, save

    classifier, saved = parts.network.classifier, parts.saved
    assert saved is not None
    state = {key: value.contiguous().clone() for key, value in classifier.state_dict().items()}
    out.write_bytes(save(state, {"tl-trainer": json.dumps(described(parts, "tensor"))}))
    loaded = load_file(out)
    if not all(torch.equal(loaded[key], value) for key, value in state.items()):
        raise RunError(f"{out.name} was not written: what was read back is not what was saved; is the disk sound?")
    return lambda images: parts.task.probabilities(
        torch.func.functional_call(classifier, loaded, images), saved.calibration
    )


def _hub(parts: Parts, pixels: Pixels | None, inputs: Sequence[Tensor], out: Path) -> Run:
    saved = parts.saved
    assert saved is not None
    save_for_timm(parts, described(parts, "tensor"), out)
    logits = timm_logits(out)
    return lambda images: parts.task.probabilities(logits(images), saved.calibration)


FORMATS: dict[str, Callable[[Parts, Pixels | None, Sequence[Tensor], Path], Run]] = {
    "onnx": _onnx,
    "pt2": _pt2,
    "safetensors": _safetensors,
    "hub": _hub,
}


def _put(unfinished: Path, out: Path) -> None:
    """Move what was checked to where it belongs; in a folder that is there other files stay."""
    try:
        if unfinished.is_dir() and out.is_dir():
            for file in unfinished.iterdir():
                file.replace(out / file.name)
        else:
            unfinished.replace(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}") from error
