"""model.weights names a run: its backbone, its preprocessing and its head go into the next one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import COLOURS, Run, draw_split, last_json
from tl_trainer import api, checkpoint
from tl_trainer.assembly import Setup, set_up
from tl_trainer.config.load import load
from tl_trainer.config.schema import HeadSection
from tl_trainer.errors import CheckpointError, ConfigError
from tl_trainer.ground.sealed import save_sealed
from tl_trainer.models.heads import new_head, take_head

pytestmark = pytest.mark.usefixtures("without_pictures", "own_logging")

OTHERS = {"amber": (250, 160, 20), "red": COLOURS["red"], "blue": COLOURS["blue"]}
TINY: dict[str, Any] = {
    "model.backbone": "shufflenet_v2_x0_5", "data.workers": 0, "train.batch_size": 8, "train.precision": "fp32",
    "output.tensorboard": False, "output.report": False, "transforms.train": "eval",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: the last stage and the head trained from random weights, at 32 px; blue, green, red."""
    folder = tmp_path_factory.mktemp("first")
    draw_split(folder / "colours" / "train", 4)
    draw_split(folder / "colours" / "val", 2, size=41)
    words = {
        **TINY, "model.weights": "none", "model.trainable": "conv5", "transforms.size": 32, "train.epochs": 2,
        "data.root": str(folder / "colours"), "output.dir": str(folder), "features.dir": str(folder / "features"),
    }  # fmt: skip
    return Path(api.train({}, **{key.replace(".", "__"): value for key, value in words.items()})["run_dir"])


@pytest.fixture
def others() -> Path:
    """An ImageFolder of amber, blue and red."""
    draw_split(Path("others", "train"), 3, size=42, classes=OTHERS)
    draw_split(Path("others", "val"), 2, size=43, classes=OTHERS)
    return Path("others")


def _set_up(run: Path, data: Path, **words: Any) -> Setup:
    changed = {key.replace("__", "."): value for key, value in words.items()}
    given = {"train.search": "off", "model.weights": str(run), "data.root": str(data), **changed}
    return set_up(load(None, {**TINY, **given}.items()))


def test_a_run_gives_its_backbone_its_preprocessing_and_the_rows_of_classes_of_the_same_name(
    run: Path, others: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tl_trainer")
    saved = checkpoint.load(run / "best.pth")
    parts = _set_up(run, others).parts
    assert saved.frozen is not None
    before, now = {**saved.frozen, **saved.trained}, parts.network.classifier.state_dict()
    assert before.keys() == now.keys()
    assert all(torch.equal(now[key], value) for key, value in before.items() if key.startswith("backbone."))
    weight, bias = now["head.0.weight"], now["head.0.bias"]
    assert torch.equal(weight[1:], before["head.0.weight"][[0, 2]])
    assert torch.equal(bias[1:], before["head.0.bias"][[0, 2]])
    fresh = _set_up(run, others, train__search="auto").parts.network.classifier.head.state_dict()
    assert torch.equal(weight[0], fresh["0.weight"][0]) and torch.equal(bias[0], fresh["0.bias"][0])
    assert not torch.equal(fresh["0.weight"][1:], weight[1:])
    assert parts.pipeline.steps == saved.preprocessing
    assert f"{run / 'best.pth'}: its backbone is taken, and of its head 2 of 3 classes; new: amber" in caplog.text
    assert "and not its head: train.search finds a new one; to go on with its own, set train.search: off" in caplog.text


@pytest.mark.parametrize(
    ("features", "section", "classes", "said"),
    [
        (1024, {}, "blue green red", ", and its head"),
        (1024, {"dropout": 0.5}, "red green", ", and its head"),
        (1024, {}, "red ape bee", ", and of its head 1 of 3 classes; new: ape, bee"),
        (1024, {}, "ape bee", ", and not its head, which has none of these classes"),
        (
            1024,
            {"hidden": [4]},
            "red",
            ", and not its head; to take it too, set model.head.hidden: [] and model.head.no",
        ),
        (
            1024,
            {"normalise": "l2"},
            "red",
            "not its head; to take it too, set model.head.hidden: [] and model.head.normalise: none",
        ),
        (1536, {}, "red", ", and not its head, which takes 1024 features and not 1536"),
    ],
)
def test_what_is_taken_of_the_head_is_said(
    run: Path, features: int, section: dict[str, Any], classes: str, said: str
) -> None:
    saved, names = checkpoint.load(run / "best.pth"), classes.split()
    head = new_head(features, len(names), HeadSection(**section))
    before = {key: value.clone() for key, value in head.state_dict().items()}
    assert said in take_head(head, names, saved)
    taken = {name for name in names if "not its" not in said and name in saved.classes}
    weight, old = head[-1].weight, saved.trained["head.0.weight"]
    for row, name in enumerate(names):
        expected = old[saved.classes.index(name)] if name in taken else [*before.values()][-2][row]
        assert torch.equal(weight[row], expected)


def test_the_features_of_the_same_weights_at_another_place_are_cached(run: Path, others: Path) -> None:
    shutil.copytree(run, "elsewhere/copy")
    computed = []
    for weights in (run, Path("elsewhere/copy/best.pth")):
        setup = _set_up(weights, others)
        setup.feeds()
        assert setup.parts.feeds.extractor is not None
        computed.append(setup.parts.feeds.extractor.computed)
    assert computed == [9 + 6, 0]


def test_the_next_run_needs_the_first_no_more(tl: Run, run: Path, others: Path) -> None:
    shutil.copytree(run, "first")
    words = [f"{key}={value}" for key, value in TINY.items()]
    done = last_json(tl("train", others, "--json", *words, "model.weights=first", "--epochs", 1))
    shutil.rmtree("first")
    figures = last_json(tl("eval", done["run_dir"], "--json"))
    assert {key: figures[key] for key in ("top1", "loss")} == {key: done["val"][key] for key in ("top1", "loss")}


def test_a_preprocessing_of_its_own_is_kept(run: Path, others: Path) -> None:
    steps = [{"Resize": {"size": [24, 40]}}, {"Grayscale": 3}]
    content = torch.load(run / "best.pth", weights_only=True)
    content["preprocessing"] = [*steps, {"ToImage": None}, *content["preprocessing"][-2:]]
    save_sealed(Path("own.pth"), content)
    setup = _set_up(Path("own.pth"), others, transforms__train="default")
    assert setup.parts.pipeline.steps == content["preprocessing"]
    assert setup.train_pipeline.steps[0] == {"RandomResizedCrop": {"size": [24, 40], "interpolation": "bilinear"}}
    with pytest.raises(ConfigError, match=r"transforms\.size: own\.pth has a preprocessing of its own, without a size"):
        _set_up(Path("own.pth"), others, transforms__size=32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"model__backbone": "alexnet"}, r"is of shufflenet_v2_x0_5, not of alexnet; set model\.backbone: shuffl"),
        ({"model__tap": "logits"}, r"model\.tap: .* has no model\.fc\.weight: its tap is penultimate; set"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_the_remedy(run: Path, others: Path, words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _set_up(run, others, **words)


def test_a_checkpoint_that_cannot_be_used_is_refused(run: Path, others: Path) -> None:
    content = torch.load(run / "best.pth", weights_only=True)
    save_sealed(Path("unended.pth"), {**content, "frozen": None})
    save_sealed(Path("head.pth"), {**content, "features": 7})
    save_sealed(Path("steps.pth"), {**content, "preprocessing": [{"Resice": 3}]})
    Path("folder/empty").mkdir(parents=True)
    for path, said in (
        ("unended.pth", "the run of unended.pth has not ended, so its backbone is not in it; end it with --resume"),
        ("head.pth", "the head in the checkpoint of model.weights does not fit its configuration"),
        ("steps.pth", "steps.pth: its preprocessing does not fit this version of torchvision"),
        ("folder/empty", "no best.pth in folder/empty; give the directory of a run, or a file"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=said):
            _set_up(Path(path), others)
