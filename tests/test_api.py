"""tl_trainer from Python: the names, what they give, what they raise, and that nothing is written to stderr."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tl_trainer
from conftest import Run, draw_split, last_json
from tl_trainer import assembly, saver

SMALL: dict[str, Any] = {
    "model": {"backbone": "timm/test_resnet", "weights": "none"},
    "transforms": {"train": "eval", "eval": [{"Resize": [64, 64]}]},
    "train": {"epochs": 2, "batch_size": 8, "optimizer": {"lr": 0.02}},
    "output": {"report": False, "tensorboard": False},
    "data": {"workers": 0},
}


@pytest.fixture(autouse=True)
def _no_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has set up no logging; the commands of other tests have."""
    monkeypatch.setattr(logging.getLogger("tl_trainer"), "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logging.getLogger("tl_trainer"), "level", logging.NOTSET)


def trained(folder: Path, **more: Any) -> dict[str, Any]:
    return tl_trainer.train(SMALL, data__root=str(folder), **more)


def test_the_public_names_are_these() -> None:
    assert sorted(tl_trainer.__all__) == [
        "CheckpointError", "ConfigError", "DataError", "Extras", "ImageError", "InputError", "Interrupted", "Model",
        "Prediction", "Row", "RunError", "StopRequest", "TrainerError", "__version__", "check", "cross_validate",
        "load", "train",
    ]  # fmt: skip
    assert all(getattr(tl_trainer, name) is not None for name in tl_trainer.__all__)
    assert dir(tl_trainer) == tl_trainer.__all__
    public = {name for name in vars(tl_trainer.Model) if not name.startswith("_")}
    assert public == {
        "classes", "task", "heads", "temperature", "predict", "rows", "evaluate", "embed", "explain", "export",
        "add_class",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="'tl_trainer' has no attribute 'trian'"):
        _ = tl_trainer.trian


def test_importing_takes_no_torch() -> None:
    program = "import sys, tl_trainer; print([name for name in ('torch', 'torchvision', 'PIL') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_a_run_and_what_its_checkpoint_knows(colours: Path, tl: Run, capfd: pytest.CaptureFixture[str]) -> None:
    result = trained(colours, seed=3, train__epochs=3)
    assert result == {**json.loads(Path(result["run_dir"], "result.json").read_text()), "seconds": result["seconds"]}
    assert (result["epochs"], result["val"]["n"]) == (3, 12)
    model = tl_trainer.load(result["checkpoint"])
    assert model.classes == ["blue", "green", "red"]
    assert model.temperature is None  # twelve images are too few
    assert model.evaluate()["top1"] == result["val"]["top1"]
    red = colours / "val" / "red" / "00.jpg"
    rows = model.predict([red, Image.open(red), str(colours / "gone.jpg")], topk=2)
    assert [row.path for row in rows] == [str(red), "image 2", str(colours / "gone.jpg")]
    assert rows[0].predictions == rows[1].predictions
    assert len(rows[0].predictions) == 2
    assert rows[2].error is not None
    assert "gone.jpg: cannot be read" in rows[2].error
    assert model.predict(red)[0] == tl_trainer.Row(str(red), model.predict(str(red))[0].predictions)
    assert capfd.readouterr() == ("", "")
    printed = json.loads(tl("predict", red, "--checkpoint", result["checkpoint"], "--format", "jsonl").stdout)
    assert printed["predictions"] == [vars(guess) for guess in model.predict(red)[0].predictions]


def test_dark_pictures_are_named_once_whatever_is_made_of_them(colours: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tl_trainer.load(trained(colours)["checkpoint"])
    caplog.clear()
    pictures = [Image.open(colours / "val" / "red" / "00.jpg"), *(Image.new("I;16", (40, 40), 900),) * 2]
    for use in (model.predict, model.embed):
        use(pictures)
        assert caplog.messages == [
            "2 of 3 images have no grey value above a quarter of their range and would be nearly black, e.g. image 2, "
            "whose largest is 900; set data.value_range to what is white in them, such as 1023"
        ]
        caplog.clear()


def test_embeddings_are_what_the_head_sees(colours: Path) -> None:
    model = tl_trainer.load(trained(colours)["run_dir"])
    paths = [colours / "val" / name / "00.jpg" for name in model.classes]
    features = model.embed(paths, batch_size=2)
    assert (features.shape, features.dtype) == ((3, 96), torch.float32)
    torch.testing.assert_close(model.embed(Image.open(paths[1])), features[1:2])
    assert model.embed([]).shape == (0, 96)
    head = model._parts.network.classifier.head
    expected = head(features).softmax(dim=1).max(dim=1).values.tolist()
    shown = [row.predictions[0].probability for row in model.predict(paths)]
    assert shown == pytest.approx(expected, abs=2e-6)
    with pytest.raises(tl_trainer.ImageError, match=r"nothing\.jpg: cannot be read"):
        model.embed("nothing.jpg")


def test_evidence_for_a_class(colours: Path) -> None:
    model = tl_trainer.load(trained(colours)["run_dir"])
    red = colours / "val" / "red" / "00.jpg"
    said = model.predict(red)[0].predictions[0].label
    picture = model.explain(red)
    assert picture.size == (64 + 6 + 64, 64)
    assert picture.tobytes() == model.explain(Image.open(red), said).tobytes()
    assert any(picture.tobytes() != model.explain(red, label).tobytes() for label in model.classes)
    with pytest.raises(tl_trainer.InputError, match="unknown class 'rde'; did you mean 'red'"):
        model.explain(red, "rde")
    (row,) = model.rows([red], extras=tl_trainer.Extras(evidence="evidence"))
    assert [path.name for path in Path("evidence").iterdir()] == [f"00001-00-{row.predictions[0].label}.png"]


def test_overrides_on_a_checkpoint(colours: Path) -> None:
    run_dir = trained(colours)["run_dir"]
    draw_split(Path("more"), 2)
    model = tl_trainer.load(run_dir, data__root="more", train__batch_size=2, **{"features.cache": "off"})
    assert model.evaluate("all")["n"] == 6
    page = model.evaluate(report="page")["report"]
    assert Path(page).is_file()
    with pytest.raises(tl_trainer.ConfigError, match="unknown key 'catch'; did you mean 'cache'"):
        tl_trainer.load(run_dir, features__catch="off")
    with pytest.raises(
        tl_trainer.ConfigError, match=r"model\.backbone: is fixed by the checkpoint; keys that can be set"
    ):
        tl_trainer.load(run_dir, model__backbone="vgg16")


def test_the_commands_sentences_are_raised(colours: Path, tl: Run) -> None:
    for words in (
        {"train__epochs": 0},
        {"model__backbone": "alexnett"},
        {"data__root": "nowhere"},
        {"device": "cuda:7"},
    ):
        with pytest.raises(tl_trainer.InputError) as raised:
            tl_trainer.train(**words)
        printed = tl("train", *(f"{key.replace('__', '.')}={value}" for key, value in words.items()))
        assert printed.returncode == raised.value.exit_code == 2
        assert printed.stderr == f"tl-train: {raised.value}\n"
    with pytest.raises(tl_trainer.InputError, match=r"did you mean 'demo\.yaml'"):
        tl_trainer.train("demmo.yaml")
    with pytest.raises(tl_trainer.ConfigError, match=r"^the configuration: train\.epochs: should be"):
        tl_trainer.train({"train": {"epochs": "many"}})
    with pytest.raises(tl_trainer.CheckpointError, match="cannot be read"):
        tl_trainer.load("nofile.pth")


def test_what_torch_says_of_memory_is_a_run_error(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(assembly, "new_classifier", fail)
    with pytest.raises(tl_trainer.RunError, match=r"^out of memory; lower --batch-size"):
        trained(colours)


def test_a_thread_trains_without_signals_and_stops_when_it_is_asked(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "SECONDS_BETWEEN_SAVES", 0.0)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop, ended = tl_trainer.StopRequest(), list[BaseException]()

    def run() -> None:
        try:
            trained(colours, stop=stop, train__epochs=10_000)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive() and not Path("runs/run-1/last.pth").exists():
        thread.join(0.01)
    stop.signal = signal.SIGTERM
    thread.join()
    assert isinstance(ended[0], tl_trainer.Interrupted)
    assert str(ended[0]) == "stopped; continue with --resume runs/run-1"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    done = len(Path("runs/run-1/metrics.csv").read_text().splitlines()) - 1
    result = tl_trainer.train(resume="runs/run-1", train__epochs=done + 2)
    assert result["epochs"] == done + 2


def test_two_threads_cannot_go_on_with_one_run(colours: Path) -> None:
    run_dir = trained(colours)["run_dir"]
    inside, refused = threading.Event(), threading.Event()

    class Waits(tl_trainer.StopRequest):
        def __enter__(self) -> tl_trainer.StopRequest:
            inside.set()
            assert refused.wait(60)
            return super().__enter__()

    results: list[dict[str, Any]] = []
    words: dict[str, Any] = {"resume": run_dir, "train__epochs": 4}
    first = threading.Thread(target=lambda: results.append(tl_trainer.train(stop=Waits(), **words)))
    first.start()
    assert inside.wait(60)
    try:
        with pytest.raises(tl_trainer.InputError, match=f"{run_dir}: another tl-train is at work in it"):
            tl_trainer.train(**words)
    finally:
        refused.set()
        first.join()
    assert results[0]["epochs"] == 4


def test_the_newest_run_is_found(colours: Path) -> None:
    with pytest.raises(tl_trainer.InputError, match="no run of this configuration under runs"):
        trained(colours, resume=True)
    stop = tl_trainer.StopRequest()
    stop.signal = signal.SIGINT
    with pytest.raises(tl_trainer.Interrupted):
        trained(colours, stop=stop)
    result = trained(colours, resume=True)
    assert result["epochs"] == 2
    assert trained(colours, resume=True) == result


def test_progress_is_shown_to_who_asks(colours: Path, tl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Bar(list[Any]):
        def __init__(self, items: Any, description: str, *_: Any, **__: Any) -> None:
            super().__init__(items)
            shown.append(description)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    trained(colours)
    assert shown == []
    trained(colours, progress=True, seed=1)
    assert shown[:2] == ["checking train images", "checking val images"]
    assert "epoch 1/2" in shown


def test_the_command_is_the_same_call(colours: Path, tl: Run) -> None:
    words = [
        "model={backbone: timm/test_resnet, weights: none}", "transforms={train: eval, eval: [{Resize: [64, 64]}]}",
        "train={epochs: 2, batch_size: 8, optimizer: {lr: 0.02}}", "output={report: false, tensorboard: false}",
        "data={workers: 0}",
    ]  # fmt: skip
    printed = last_json(tl("train", "--json", *words, "--data-dir", colours))
    called = trained(colours)
    paths = ("run_dir", "checkpoint", "seconds", "advice")
    assert {**printed, **dict.fromkeys(paths)} == {**called, **dict.fromkeys(paths)}
    one, two = (torch.load(result["checkpoint"], weights_only=True) for result in (printed, called))
    assert all(torch.equal(one["trained"][key], two["trained"][key]) for key in one["trained"])
