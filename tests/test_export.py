"""What tl-export writes, run by onnxruntime, torch and timm alone; what it refuses; a failed one leaves nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import tl_trainer
from conftest import Run, draw_split
from tiny import tiny_classifier
from tl_trainer import export as module_under_test
from tl_trainer.cli.export import FORMATS
from tl_trainer.deployed import Pixels
from tl_trainer.network import Network

NAMES = ["blue", "green", "red"]
SMALL: dict[str, Any] = {
    "model": {"backbone": "timm/test_vit", "weights": "none", "head": {"normalise": "none"}},
    "transforms": {"train": "eval", "eval": [{"Resize": 36}, {"CenterCrop": 32}], "size": 32},
    "train": {"epochs": 1, "batch_size": 8, "precision": "fp32"},
    "output": {"report": False, "tensorboard": False},
    "data": {"workers": 0},
    "features": {"cache": "off"},
}

SERVING = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").partition("\n## Serving\n")[2]

pytestmark = pytest.mark.usefixtures("own_logging")


def served(blocks: int = 1) -> dict[str, Any]:
    """The names that the first so many pieces of code in the README's section on serving define."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", SERVING.partition("\n## ")[0], re.DOTALL)[:blocks]:
        exec(code, names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained ViT and its images."""
    folder = tmp_path_factory.mktemp("export")
    draw_split(folder / "photos" / "train", 4)
    draw_split(folder / "photos" / "val", 3, size=43)
    tl_trainer.train(
        SMALL, data__root=str(folder / "photos"), output__dir=str(folder / "runs"), features__dir=str(folder / "cache")
    )
    return folder


@pytest.fixture(scope="module")
def best(folder: Path) -> Path:
    return folder / "runs" / "run-1" / "best.pth"


@pytest.fixture
def picture(folder: Path) -> Path:
    return folder / "photos" / "val" / "red" / "01.jpg"


@pytest.fixture(scope="module")
def trained(best: Path) -> tl_trainer.Model:
    return tl_trainer.load(best)


@pytest.fixture(params=["tiny", pytest.param("vit", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, best: Path) -> tl_trainer.Model:
    """The ViT, or a few layers in its place, for which torch's exporters take a tenth of the time."""
    model = tl_trainer.load(best)
    if request.param == "tiny":
        model._parts.network = Network(tiny_classifier().eval(), torch.device("cpu"), "fp32")
    return model


def expected(model: tl_trainer.Model, picture: Path) -> list[float]:
    """tl-predict's probabilities in the order of the classes."""
    row = model.predict(picture)[0]
    return [guess.probability for guess in sorted(row.predictions, key=lambda guess: guess.index)]


def pixels(picture: Path) -> np.ndarray[Any, Any]:
    return np.stack([np.array(Image.open(picture))] * 3)


def test_the_formats_of_the_command_are_these() -> None:
    assert sorted(FORMATS) == sorted(module_under_test.FORMATS)


def test_onnx_takes_pixels_and_says_what_it_is(
    model: tl_trainer.Model, picture: Path, tl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tl_trainer.api, "load", lambda *_, **__: model)
    result = tl("export", "--checkpoint", "best.pth", "--to", "onnx", "a.onnx")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("a.onnx: 100.0% agreement on 9 validation images, largest difference of a prob")
    session = onnxruntime.InferenceSession("a.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": pixels(picture)})[0]
    assert found == pytest.approx(np.array([expected(model, picture)] * 3), abs=1e-4)
    Path("a.onnx").rename("photos.onnx")
    assert [*served()["classify"](picture.read_bytes()).values()] == pytest.approx(expected(model, picture), abs=1e-4)
    Path("photos.onnx").rename("a.onnx")
    of_input, of_output = session.get_inputs()[0], session.get_outputs()[0]
    assert (of_input.name, of_input.type, of_input.shape[3]) == ("images", "tensor(uint8)", 3)
    assert (of_output.name, of_output.type, len(of_output.shape)) == ("probabilities", "tensor(float)", 2)
    assert 'name: "images", data_type: TYPE_UINT8, dims: [ -1, -1, -1, 3 ]' in SERVING  # what Triton is told
    assert 'name: "probabilities", data_type: TYPE_FP32, dims: [ -1, -1 ]' in SERVING
    about = {entry.key: entry.value for entry in onnx.load("a.onnx").metadata_props}
    assert json.loads(about["labels"]) == NAMES
    assert json.loads(about["temperature"]) is None
    assert json.loads(Path("a.onnx.json").read_text())["agreement"] == 1
    assert sorted(path.name for path in Path().iterdir()) == ["a.onnx", "a.onnx.json"]


def test_fastapi_serves_what_the_readme_says(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("fastapi.testclient")

    class Session:
        def __init__(self, path: str) -> None:
            assert path == "photos.onnx"

        def get_modelmeta(self) -> Any:
            return SimpleNamespace(custom_metadata_map={"labels": json.dumps(NAMES)})

        def run(self, _: None, inputs: dict[str, Any]) -> list[Any]:
            assert inputs["images"].shape == (1, 43, 44, 3)
            return [np.array([[0.25, 0.25, 0.5]], np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    client = testing.TestClient(served(blocks=2)["app"])
    assert client.post("/", content=picture.read_bytes()).json() == {"blue": 0.25, "green": 0.25, "red": 0.5}
    assert client.post("/", content=b"no image").status_code == 415


def test_pt2_takes_what_the_network_takes_with_from_tensor(model: tl_trainer.Model, picture: Path) -> None:
    model.export("pt2", "a.pt2", origin="tensor")
    extra = {"tl-trainer.json": ""}
    program = torch.export.load("a.pt2", extra_files=extra).module()
    pipeline = model._parts.pipeline
    view = pipeline.batch(pipeline.image(Image.open(picture))[None])
    assert program(view)[0].tolist() == pytest.approx(expected(model, picture), abs=1e-5)
    assert json.loads(extra["tl-trainer.json"])["input"] == "float32 (N, 3, H, W), preprocessed"


def test_the_order_of_the_two_resizes_is_decided_in_the_graph(best: Path) -> None:
    pipeline = tl_trainer.load(best)._parts.pipeline
    noise = torch.randint(0, 256, (1, 90, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = {1: torch.export.Dim("H"), 2: torch.export.Dim("W")}
    program = torch.export.export(Pixels(pipeline), (noise,), dynamic_shapes={"images": sizes}).module()
    for pixels in (noise, noise.transpose(1, 2)):  # Pillow 13 takes the height of the first and the width of the second
        view = pipeline.batch(pipeline.image(Image.fromarray(pixels[0].numpy()))[None])
        torch.testing.assert_close(program(pixels), view, atol=1e-6, rtol=0)


def test_safetensors_hold_the_weights_and_what_belongs_to_them(trained: tl_trainer.Model) -> None:
    trained.export("safetensors", "a.safetensors")
    state = trained._parts.network.classifier.state_dict()
    with safe_open("a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tl-trainer"])["labels"] == NAMES
        assert {*file.keys()} == {*state}
        assert all(torch.equal(file.get_tensor(key), value) for key, value in state.items())


def test_timm_alone_loads_the_folder_of_the_hub(trained: tl_trainer.Model, picture: Path) -> None:
    result = trained.export("hub", "hub")
    assert (result["agreement"], result["images"]) == (1, 9)
    loaded = timm.create_model("local-dir:hub", pretrained=True).eval()
    assert loaded.pretrained_cfg["label_names"] == NAMES
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    classifier, pipeline = trained._parts.network.classifier, trained._parts.pipeline
    view = pipeline.batch(pipeline.image(Image.open(picture))[None])
    torch.testing.assert_close(transform(Image.open(picture))[None], view, atol=0.02, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(view), classifier(view), atol=1e-4, rtol=0)
    assert "3 classes" in Path("hub/README.md").read_text()


def test_without_its_images_generated_ones_are_taken_and_it_says_so(
    best: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = tl_trainer.load(best, data__root="gone").export("safetensors", "a.safetensors")
    assert (result["of"], result["images"]) == ("generated images", 64)
    assert "checked on generated images, since the validation images are not there: gone" in caplog.text


def test_an_export_that_disagrees_fails_with_the_figures_and_leaves_nothing(
    trained: tl_trainer.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module_under_test.FORMATS, "onnx", lambda *_: lambda images: torch.eye(3)[: len(images)])
    with pytest.raises(tl_trainer.RunError, match=r"a\.onnx was not written, .*% agreement on 9 validation images"):
        trained.export("onnx", "a.onnx")
    assert [*Path().iterdir()] == []


def test_another_first_class_that_is_as_probable_agrees(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tl_trainer.load(best)
    model._parts.take_head([(torch.zeros(3, model._parts.features), torch.zeros(3))], unit=False)
    near = torch.tensor([[1 / 3 - 1e-6, 1 / 3, 1 / 3 + 1e-6]])
    monkeypatch.setitem(module_under_test.FORMATS, "safetensors", lambda *_: lambda images: near.repeat(len(images), 1))
    monkeypatch.setattr(module_under_test, "_put", lambda *_: None)
    assert model.export("safetensors", "a.safetensors")["agreement"] == 1


def test_what_is_there_is_kept_without_force(trained: tl_trainer.Model) -> None:
    for name in ("a.safetensors", "b.safetensors.json"):
        Path(name).write_text("mine")
    with pytest.raises(tl_trainer.InputError, match=r"a\.safetensors exists; choose another name, or .* --force"):
        trained.export("safetensors", "a.safetensors")
    assert Path("a.safetensors").read_text() == "mine"
    trained.export("safetensors", "a.safetensors", force=True)
    assert Path("a.safetensors").stat().st_size > 1000
    with pytest.raises(tl_trainer.InputError, match=r"^b\.safetensors\.json exists; .* --force"):
        trained.export("safetensors", "b.safetensors")
    Path("hub").mkdir()
    Path("hub/mine.txt").write_text("mine")
    trained.export("hub", "hub", force=True)
    assert Path("hub/mine.txt").read_text() == "mine"
    assert Path("hub/config.json").is_file()


def test_a_package_that_is_missing_is_named_with_the_line_of_pip(
    trained: tl_trainer.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(tl_trainer.InputError, match=r"^--to onnx needs onnxruntime; run: pip install onnxruntime$"):
        trained.export("onnx", "a.onnx")


def test_what_torch_cannot_express_is_said(trained: tl_trainer.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no such operator: fold\nmore")

    monkeypatch.setattr(torch.export, "export", fail)
    words = r"timm/test_vit cannot be exported so .*ONNX opset 18\): no such operator: fold; try another --to$"
    with pytest.raises(tl_trainer.InputError, match=words):
        trained.export("onnx", "a.onnx", origin="tensor")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_a_full_disk_is_not_torchs_fault(trained: tl_trainer.Model, error: Exception) -> None:
    with pytest.raises(type(error)), module_under_test._exporting(trained._parts):
        raise error


def test_an_unreadable_image_is_left_out_of_the_check(folder: Path, best: Path) -> None:
    shutil.copytree(folder / "photos", "photos")
    Path("photos/val/red/01.jpg").write_text("no image")
    result = tl_trainer.load(best, data__root="photos").export("safetensors", "a.safetensors")
    assert (result["of"], result["images"]) == ("validation images", 8)


def test_what_torch_would_write_into_two_files_is_refused(
    trained: tl_trainer.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "ONNX_BYTES", 1000)
    with pytest.raises(tl_trainer.InputError, match=r"the weights take .* GB, and .*; use --to pt2"):
        trained.export("onnx", "a.onnx")


def test_a_head_that_timm_does_not_have_is_refused_for_the_hub(best: Path) -> None:
    model = tl_trainer.load(best)
    model._parts.take_head([(torch.zeros(3, model._parts.features), torch.zeros(3))], unit=True)
    with pytest.raises(tl_trainer.InputError, match=r"length 1 \(train with model\.head\.normalise=none\)"):
        model.export("hub", "hub")
