"""Several backbones: each is judged by the head that is found on its features, and the right one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import Run, last_json
from tl_trainer import probe, run, search
from tl_trainer.api import train
from tl_trainer.errors import InputError, Interrupted
from tl_trainer.ground.signals import StopRequest
from tl_trainer.logistic import STRENGTHS
from tl_trainer.models.timm_models import construct
from tl_trainer.probe import Probe, chosen

NAMES = ["timm/test_resnet", "timm/test_efficientnet"]
LIST = f"model.backbone=[{', '.join(NAMES)}]"
ROW = Probe("a", "none", 0.9, [0.8, 1.0], 0.3, "logistic regression", 100, "100 validation images", 50.0, 10, 1.0)


@pytest.mark.parametrize(
    ("others", "place"),
    [
        ([{"top1": 0.89}], 0),
        ([{"top1": 0.91}], 1),
        ([{"loss": 0.2}], 1),
        ([{"top1": 0.88, "images_per_second": 100.0}], 1),  # the standard error of 90% of 100 images is 3%
        ([{"top1": 0.88, "images_per_second": 99.0}], 0),
        ([{"top1": 0.86, "images_per_second": 500.0}], 0),
        ([{"top1": 0.89, "images_per_second": 100.0}, {"top1": 0.88, "images_per_second": 200.0}], 2),
        ([{"top1": 1.0}, {"top1": 0.99, "images_per_second": 500.0}], 1),
    ],
)
def test_the_best_goes_on_unless_another_is_as_good_and_twice_as_fast(others: list[dict[str, Any]], place: int) -> None:
    assert chosen([ROW, *(replace(ROW, **other) for other in others)]) == place


@pytest.fixture
def words(colours: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run on few images whose head is found among few; without a fixed speed two backbones may be either's turn."""
    monkeypatch.setattr(search, "STRENGTHS", STRENGTHS[::6])
    monkeypatch.setattr(probe, "_speed", lambda _: 100.0)
    settings = {"model.weights": "none", "transforms.train": "eval", "transforms.eval": [{"Resize": [64, 64]}],
                "output.report": False, "output.tensorboard": False}  # fmt: skip
    return [str(colours), *(f"{key}={json.dumps(value)}" for key, value in settings.items())]


def test_a_run_goes_on_with_the_best_and_says_how_each_did(
    words: list[str], tl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = sorted(Path(words[0], "train").rglob("*.jpg"))[0]
    copy.with_name("copy.jpg").write_bytes(copy.read_bytes())
    Path(words[0], "val", copy.parent.name, "again.jpg").write_bytes(copy.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(run, "conclude", _interrupted)
        killed = tl("train", *words, LIST)
    assert killed.returncode == 130
    assert killed.stderr.count("of 25 train images are in val too") == 1  # the run says it, for all of them
    table = killed.stderr.split("the best first:\n")[1].splitlines()
    assert table[0].split() == ["backbone", "weights", "top-1", "95%", "interval", "images/s", "parameters"]
    assert {line.strip("> ").split()[0] for line in table[1:3]} == set(NAMES)
    [taken] = [line.split()[1] for line in table[1:3] if line.startswith(">")]
    assert table[3] == f"{taken} (none) goes on: the best"
    [run_dir] = Path("runs").iterdir()
    assert run_dir.name == f"colours-{taken.removeprefix('timm/')}-1"
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["backbone"] == taken

    monkeypatch.setattr(probe, "probe", _interrupted)  # it is not repeated
    result = last_json(tl("train", *words, LIST, "--resume", "--json"))
    rows = result["probed"]
    assert [row["backbone"] for row in rows if row["taken"]] == [taken]
    assert [row["top1"] for row in rows] == sorted((row["top1"] for row in rows), reverse=True)
    assert all(row["interval"][0] < row["top1"] <= row["interval"][1] + 1e-9 for row in rows)
    counts = {name: construct(name, None, num_classes=0).parameters() for name in NAMES}
    assert {row["backbone"]: row["parameters"] for row in rows} == {
        name: sum(parameter.numel() for parameter in parameters) for name, parameters in counts.items()
    }
    [own] = [row for row in rows if row["taken"]]
    assert (own["top1"], own["loss"]) == (result["search"]["top1"], result["search"]["loss"])
    assert own["head"] == f"{result['search']['method']}, {result['search']['settings']}"
    assert json.loads((run_dir / "result.json").read_text()) == result
    assert last_json(tl("train", *words, LIST, "--resume", "--json")) == result
    other = tl("train", *words, f"model.backbone=[{NAMES[0]}, resnet18]" if taken == NAMES[1] else
               f"model.backbone=[{NAMES[1]}, resnet18]", "--resume", run_dir)  # fmt: skip
    assert f"this run has model.backbone: '{taken}', not" in other.stderr


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_of_weights_those_are_taken_whose_features_tell_the_classes_apart(
    words: list[str], tl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of weights of zeros are the same for every image; the advice on them is to compare."""
    state = construct(NAMES[0], None).state_dict()
    torch.save({key: torch.zeros_like(value) for key, value in state.items()}, "zeros.pth")
    torch.save(state, "drawn.pth")
    done = tl("train", *words, f"model.backbone={NAMES[0]}", "model.weights=[zeros.pth, drawn.pth]")
    assert done.returncode == 0, done.stderr
    assert f"of 2 that were compared: {NAMES[0]} (drawn.pth)" in done.stdout
    assert yaml.safe_load(Path("runs/colours-test_resnet-1/config.yaml").read_text())["model"]["weights"] == "drawn.pth"
    alone = last_json(tl("train", *words, f"model.backbone={NAMES[0]}", "model.weights=zeros.pth", "--json"))
    assert "probed" not in alone
    assert alone["advice"][0]["try"].endswith(f"'model={{backbone: [{NAMES[0]}, convnext_tiny]}}'")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([LIST, "model.weights=[none, DEFAULT]"], "model.weights: is a list, and so is model.backbone; compare one of"),
        (["model.backbone=[resnet18, resnet18]"], "model.backbone: names 'resnet18' twice; leave one of them out"),
        (["model.backbone=[resnet18]"], "model.backbone: is a list of names to compare, and has fewer than two; add"),
        (["model.backbone=[]"], "model.backbone: is a list of names to compare, and has fewer than two; add"),
        (["model.backbone=[resnet18, 5]"], "should be a name, or a list of names to compare, not ['resnet18', 5]"),
        (["model.backbone=[timm/test_resnet, resnet19]"], "model.backbone: unknown backbone 'resnet19'"),
        (
            ["model.backbone=resnet18", "model.weights=[DEFAULT, IMAGENET1K_V1]"],
            "DEFAULT and IMAGENET1K_V1 are the same",
        ),
        ([LIST, "model.trainable=all"], "kept features, and here the backbone is to be fine-tuned; name one"),
        ([LIST, "train.epochs=5"], "the head is to be trained (train.search is off where epochs, optimizer or sched"),
        ([LIST, "features.cache=off"], "kept features, and here features.cache is off; name one"),
        ([LIST, "model.head.dropout=0.5"], "kept features, and here the head has dropout; name one"),
        ([LIST, "model.extra=[{pool: mean}]"], "kept features, and here model.extra trains new stages; name one"),
        ([LIST, "--dry-run"], "model.backbone: is a list, and only a run that trains compares its entries"),
        (
            [LIST, "--folds", "5"],
            "model.backbone: is a list, and only a run that trains compares its entries",
        ),
        ([LIST, "--check"], "model.backbone: is a list, and only a run that trains compares its entries"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_image_is_read(
    words: list[str], more: list[str], said: str, tl: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_trainer.assembly.open_dataset", _interrupted)
    refused = tl("train", *words, *more)
    assert refused.returncode == 2, refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stderr.startswith("tl-train: the command line: model.")
    assert said in refused.stderr
    assert not [path for path in Path().glob("runs/*") if "check" not in path.name]


def test_the_list_stands_in_the_printed_configuration(words: list[str], tl: Run) -> None:
    printed = tl("train", *words, LIST, "--print-config").stdout
    Path("printed.yaml").write_text(printed)
    assert yaml.safe_load(printed)["model"]["backbone"] == NAMES
    assert tl("train", "--config", "printed.yaml", "--print-config").stdout == printed


def test_a_request_to_stop_ends_the_comparison(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stop, asked = StopRequest(), dict(_pairs(words[1:]))
    find_head: Callable[..., Any] = probe.find_head

    def stopping(*arguments: Any) -> Any:
        stop.signal = 2
        return find_head(*arguments)

    monkeypatch.setattr(probe, "find_head", stopping)
    with pytest.raises(Interrupted, match="stopped while backbones were compared; the same command goes on"):
        train({"data": {"root": words[0]}}, stop=stop, **{**asked, "model__backbone": NAMES})
    assert not any(Path("runs").iterdir())


def _pairs(words: list[str]) -> list[tuple[str, Any]]:
    return [(key.replace(".", "__"), json.loads(value)) for key, _, value in (word.partition("=") for word in words)]


def test_no_checkpoint_has_a_list(words: list[str]) -> None:
    result = train({"data": {"root": words[0]}}, **{**dict(_pairs(words[1:])), "model__backbone": NAMES[0]})
    with pytest.raises(InputError, match=r"model\.backbone: should be text, not"):
        train(resume=result["run_dir"], model__backbone=NAMES)
