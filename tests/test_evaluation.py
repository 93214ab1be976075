"""A checkpoint on a split: which split, its scores, and which figures may be told of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import COLOURS, Run, draw_split
from test_report import BARELY, draw_splits, evaluated, table, trained
from tiny import SCORES, tiny_template
from tl_trainer import checkpoint
from tl_trainer.assembly import restore
from tl_trainer.data.dataset import Files, Split, name_hashes
from tl_trainer.errors import DataError
from tl_trainer.evaluation import Evaluation, evaluate_checkpoint
from tl_trainer.single_label import SingleLabel

pytestmark = pytest.mark.usefixtures("without_pictures", "without_figures")

BEST = Path("runs/run-1/best.pth")


def evaluation(what: str, temperature: float | None, contents: Sequence[bytes]) -> Evaluation:
    """Of three images with these hashes, by a checkpoint whose temperature was fitted on one that begins with cd."""
    names = [f"{index}.jpg" for index in range(3)]
    split = Split(Files([Path(name) for name in names], names), SCORES.targets.tolist(), range(3), contents)
    saved = replace(tiny_template(), temperature=temperature)
    return Evaluation(what, "the pictures", split, SCORES, saved, SingleLabel(saved.classes))


OTHERS = [bytes([index]) * 32 for index in range(3)]
SHARED = [*OTHERS[:2], b"\xcd" * 32]


@pytest.mark.parametrize(
    ("what", "temperature", "contents", "reason"),
    [
        ("test", 2.0, OTHERS, None),
        ("val", 2.0, OTHERS, None),  # of another dataset
        ("all", 2.0, OTHERS, None),
        ("test", None, OTHERS, "this checkpoint has no temperature: it is a last.pth, its run has not ended, or its"),
        ("val", None, SHARED, "this checkpoint has no temperature"),
        ("val", 2.0, SHARED, "the temperature was fitted on 1 of these images"),
        ("test", 2.0, SHARED, "the temperature was fitted on 1 of these images"),  # whatever the split is called
        ("train", 2.0, SHARED, "the temperature was fitted on 1 of these images"),
        ("train", 2.0, OTHERS, "the network was trained on these images"),
    ],
)
def test_why_figures_with_the_temperature_are_withheld(
    what: str, temperature: float | None, contents: list[bytes], reason: str | None
) -> None:
    found = evaluation(what, temperature, contents)
    measured = found.measured
    assert measured["calibration"]["temperature"] == temperature
    assert (measured["calibration"]["after"] is None) == (reason is not None)
    assert ("calibration.after" in measured["undefined"]) == (reason is not None)
    assert measured["undefined"].get("calibration.after", "").startswith(reason or "")
    task = found.task.measure(SCORES, temperature, measured["undefined"].get("calibration.after"))
    assert measured == {"split": what, "data": "the pictures", "tta": None, **task}


def test_the_headline_has_no_row_per_class() -> None:
    found = evaluation("test", 2.0, OTHERS)
    assert found.headline.keys() == found.measured.keys() - {"per_class"}
    assert found.measured is found.measured, "measured twice"
    json.dumps(found.measured, allow_nan=False)


def draw_dataset(sizes: dict[str, int]) -> None:
    """`data` with so many images per class in each split, in none where it is `all`; other pictures than the run's."""
    for number, (split, size) in enumerate(sizes.items()):
        draw_split(Path("data") if split == "all" else Path("data", split), size, size=44 + 8 * number)


@pytest.mark.parametrize(
    ("sizes", "expected", "images"),
    [
        ({"train": 3, "val": 2, "test": 1}, "test", 3),
        ({"train": 3, "val": 2}, "val", 6),
        ({"train": 3, "test": 2}, "test", 6),
        ({"test": 2}, "test", 6),
        ({"all": 2}, "all", 6),
    ],
)
def test_the_split_that_is_taken_where_none_is_named(
    tl: Run, colours: Path, sizes: dict[str, int], expected: str, images: int
) -> None:
    trained(tl, colours)
    draw_dataset(sizes)
    found = evaluate_checkpoint(restore(BEST, [("data.root", "data")]))
    assert (found.what, len(found.split), found.data) == (expected, images, "data")
    assert len(found.scores.targets) == len(found.split.contents) == images


@pytest.mark.parametrize(
    ("sizes", "what", "expected", "images"),
    [
        ({"all": 2}, None, "all", 6),  # none of the run's
        ({"train": 3, "test": 2}, None, "test", 6),  # which needs none of the images that the run held out
        ({"train": 3, "test": 2}, "test", "test", 6),
        ({"all": 2}, "all", "all", 6),
    ],
)
def test_a_run_that_drew_its_validation_split_is_evaluated_on_other_images(
    tl: Run, tmp_path: Path, sizes: dict[str, int], what: str | None, expected: str, images: int
) -> None:
    draw_split(tmp_path / "flat", 5)
    result = trained(tl, tmp_path / "flat")
    own = evaluate_checkpoint(restore(BEST))
    assert own.what == "val"
    assert own.checkpoint.val_split is not None
    assert own.checkpoint.val_split.tolist() == name_hashes(own.split.names)
    assert own.task.figures(own.scores) == result["val"]
    draw_dataset(sizes)
    for path in Path("data").rglob("*.jpg"):
        path.rename(path.with_name(f"other-{path.name}"))
    found = evaluate_checkpoint(restore(BEST, [("data.root", "data")]), what)
    assert (found.what, len(found.split)) == (expected, images)
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"3 of 3 images of the run's val split are gone"):
            evaluate_checkpoint(restore(BEST, [("data.root", "data")]), split)


def test_bad_images_are_left_out_where_the_configuration_says_so(tl: Run, colours: Path) -> None:
    trained(tl, colours)
    (colours / "val" / "green" / "01.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match="1 of 12 val images cannot be used"):
        evaluate_checkpoint(restore(BEST))
    found = evaluate_checkpoint(restore(BEST, [("data.on_bad_image", "skip")]))
    assert found.measured["n"] == len(found.split) == len(found.scores.logits) == 11
    assert "green/01.jpg" not in [Path(name).as_posix() for name in found.split.names]
    assert [found.task.caption(target) for target in found.scores.targets.tolist()] == [
        Path(name).parent.name for name in found.split.names
    ]


def test_a_cache_that_cannot_be_written_is_left_out(
    tl: Run, colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = trained(tl, colours)
    (tmp_path / "file").write_text("")
    found = evaluate_checkpoint(restore(BEST, [("features.dir", str(tmp_path / "file" / "features"))]))
    assert [message for message in caplog.messages if message.endswith("going on without the cache")]
    assert {key: found.measured[key] for key in ("top1", "top5", "n")} == {
        key: result["val"][key] for key in ("top1", "top5", "n")
    }
    assert found.measured["loss"] == pytest.approx(result["val"]["loss"], abs=1e-5)


def test_views_are_averaged_as_probabilities(tl: Run, colours: Path) -> None:
    """With the mirror image: the mean of what either gives, in logits whose softmax it is."""
    trained(tl, colours, *BARELY)
    parts = restore(BEST)
    plain, mean = evaluate_checkpoint(parts), evaluate_checkpoint(parts, tta="flip")
    assert (mean.tta, mean.measured["tta"], plain.measured["tta"]) == ("flip", "flip", None)
    shares = []
    for mirrored in (False, True):
        batch = torch.stack([parts.pipeline.image(plain.split.open(index)) for index in range(12)])
        inputs = parts.pipeline.batch(batch)
        with torch.inference_mode():
            features = parts.network.features(inputs.flip(-1) if mirrored else inputs)
            shares.append(parts.network.logits(features).double().softmax(dim=1))
    torch.testing.assert_close(mean.scores.logits.double().softmax(dim=1), sum(shares) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tta", ["flip", "fivecrop", "tencrop"])
def test_views_are_averaged_in_evaluation_and_in_prediction_alike(tl: Run, colours: Path, tta: str) -> None:
    draw_split(colours / "test", 3)
    trained(tl, colours, "transforms.eval=[{Resize: 72}, {CenterCrop: 64}]", *BARELY)
    plain, mean = evaluated(tl), evaluated(tl, "--tta", tta)
    assert mean["loss"] != plain["loss"]
    rows = table(Path("report/predictions.csv"))
    checkpoint = ["--checkpoint", "runs/run-1/best.pth", "--format", "jsonl"]
    done = tl("predict", colours / "test", *checkpoint, "--tta", tta)
    for line, row in zip(done.stdout.splitlines(), rows, strict=True):
        guesses = {guess["label"]: guess["probability"] for guess in json.loads(line)["predictions"]}
        assert guesses[row["predicted"]] == pytest.approx(float(row["probability"]), abs=2e-3)


def test_crops_need_a_crop(tl: Run, colours: Path) -> None:
    trained(tl, colours)
    done = tl("eval", "--checkpoint", "runs/run-1/best.pth", "--tta", "fivecrop")
    assert done.returncode == 2
    assert "--tta fivecrop needs a CenterCrop in the preprocessing, which is Resize, ToImage" in done.stderr


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("val", "the temperature was fitted on 30 of these images"),
        ("train", "the network was trained on these images"),
        ("test", None),
    ],
)
def test_the_temperature_is_measured_on_other_images_only(
    tl: Run, tmp_path: Path, split: str, reason: str | None
) -> None:
    draw_splits(tmp_path / "data", 10, COLOURS)
    trained(tl, tmp_path / "data")
    found = evaluated(tl, "--split", split)
    assert found["calibration"]["temperature"] > 0
    assert (found["calibration"]["after"] is None) == (reason is not None)
    assert found["undefined"].get("calibration.after", "").startswith(reason or "")
    if split == "val":  # the same images, elsewhere and under other names
        (tmp_path / "data" / "val").rename(tmp_path / "moved")
        (tmp_path / "moved" / "red" / "00.jpg").rename(tmp_path / "moved" / "red" / "other.jpg")
        moved = evaluated(tl, "--data-dir", tmp_path / "moved", "--split", "all")
        assert moved["undefined"] == found["undefined"]


def test_an_output_that_is_not_finite_is_refused(tl: Run, colours: Path) -> None:
    trained(tl, colours)
    path = Path("runs/run-1/best.pth")
    damaged = checkpoint.load(path)
    damaged.trained["head.0.weight"] = damaged.trained["head.0.weight"].clone().fill_(float("nan"))
    checkpoint.save(damaged, Path("nan.pth"))
    for words in (["eval"], ["predict", colours / "val"]):
        done = tl(*words, "--checkpoint", "nan.pth")
        assert done.returncode == 1
        assert "the network's output is not finite" in done.stderr
        assert "nan%" not in done.stdout


def test_tl_eval_finds_what_training_logged_whatever_the_temperature(tl: Run, tmp_path: Path) -> None:
    draw_splits(tmp_path / "data", 10, COLOURS)
    (tmp_path / "data" / "test").rename(tmp_path / "test")
    result = trained(tl, tmp_path / "data")
    restored = restore(Path("runs/run-1/best.pth"), [("device", "cpu")])
    assert restored.saved is not None
    assert restored.saved.temperature not in (None, 1.0)
    again = evaluated(tl)
    assert {key: again[key] for key in result["val"]} == result["val"]
