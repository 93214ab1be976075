"""A teacher: the loss it makes, what it says of the images, what it costs, and what is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from conftest import draw_split
from tl_trainer import api, checkpoint, range_test
from tl_trainer.assembly import restore, set_up
from tl_trainer.config.load import load
from tl_trainer.errors import ConfigError, DataError
from tl_trainer.loop import Training
from tl_trainer.range_test import Point
from tl_trainer.run import new_training
from tl_trainer.teacher import Teacher, teacher_of

pytestmark = pytest.mark.usefixtures("without_pictures", "own_logging")

WORDS: dict[str, Any] = {
    "model.backbone": "shufflenet_v2_x0_5", "model.weights": "none", "data.workers": 0, "train.batch_size": 8,
    "train.precision": "fp32", "train.optimizer.lr": 0.01, "output.tensorboard": False, "output.report": False,
    "transforms.train": "eval",
}  # fmt: skip
STUDENT = {"model.tap": "maxpool", "transforms.size": 24, "seed": 3}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's run directory, beside the folder `colours` that it learned from, at 32 px."""
    folder = tmp_path_factory.mktemp("teacher")
    draw_split(folder / "colours" / "train", 4)
    draw_split(folder / "colours" / "val", 2, size=41)
    words = {**WORDS, "model.trainable": "conv5", "transforms.size": 32, "train.epochs": 3}
    return train(folder, words)


def train(folder: Path, words: dict[str, Any], **options: Any) -> Path:
    places = {"data.root": folder / "colours", "output.dir": folder, "features.dir": folder / "features"}
    given = {**words, **({} if options else {key: str(place) for key, place in places.items()})}
    return Path(api.train(**options, **{key.replace(".", "__"): value for key, value in given.items()})["run_dir"])


def student(taught: Path, **words: Any) -> dict[str, Any]:
    """The words of a student of the run."""
    return {**WORDS, **STUDENT, "train.teacher.checkpoint": str(taught), **words}


def test_the_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(1)
    said, logits = (3 * torch.randn(shape, 4, generator=generator, dtype=torch.float64) for shape in (7, 3))
    indices, hard, temperature, alpha = torch.tensor([6, 0, 2]), torch.tensor(1.7, dtype=torch.float64), 2.5, 0.3
    soft = 0.0
    for row, index in enumerate(indices.tolist()):
        p = [math.exp(value / temperature) for value in said[index].tolist()]
        q = [math.exp(value / temperature) for value in logits[row].tolist()]
        p, q = ([value / sum(values) for value in values] for values in (p, q))
        soft += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 3
    loss = Teacher(said, temperature, alpha)(hard, logits, indices)
    assert loss.item() == pytest.approx(alpha * temperature**2 * soft + (1 - alpha) * 1.7, rel=1e-9)
    assert Teacher(said, temperature, 0.0)(hard, logits, indices).item() == pytest.approx(1.7)
    assert Teacher(said, temperature, 1.0)(hard, said[indices], indices).item() == pytest.approx(0, abs=1e-12)


def test_it_sees_each_image_in_its_own_preprocessing_once_and_its_features_are_kept(taught: Path) -> None:
    words = {**student(taught), "data.root": str(taught.parent / "colours")}
    setup = set_up(load(None, words.items()))
    teacher, again = teacher_of(setup), teacher_of(setup)
    assert teacher is not None and again is not None
    parts, split = restore(taught / "best.pth"), setup.dataset.split("train")
    images = parts.pipeline.batch(torch.stack([parts.pipeline.image(split.open(index)) for index in range(12)]))
    assert images.shape[-1] == 32 and setup.parts.pipeline.image(split.open(0)).shape[-1] == 24
    with torch.inference_mode():
        expected = parts.network.logits(parts.network.features(images))
    torch.testing.assert_close(teacher.logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(again.logits, teacher.logits)
    stores = [len(path.read_bytes()) for path in Path("cache").rglob("*.keys")]
    assert stores == [12 * 40]  # and none is computed for the student before it trains
    setup.teach = teacher
    training = new_training(setup, (feeds := setup.feeds()), setup.new_state(2), lambda: None)
    batch = next(iter(feeds["train"].batches.epoch(0, training.device)))
    logits = feeds["train"].logits(batch.inputs)
    hard = functional.cross_entropy(logits, batch.targets)
    assert training.step.loss(batch).item() == teacher(hard, logits, batch.indices).item() != hard.item()


def test_a_teacher_that_learned_smoothed_labels_is_named(taught: Path, caplog: pytest.LogCaptureFixture) -> None:
    smoothed = train(taught.parent, {**WORDS, "train.epochs": 1, "train.loss.label_smoothing": 0.1})
    for run, said in ((smoothed, 1), (taught, 0)):
        caplog.clear()
        words = {**student(run), "data.root": str(taught.parent / "colours")}
        teacher_of(set_up(load(None, words.items())))
        assert sum("label_smoothing: 0.1, which makes a worse teacher" in text for text in caplog.messages) == said


def test_the_range_test_is_of_the_loss_that_the_teacher_makes(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def of_step(training: Training, lr: float) -> list[Point]:
        seen.append(training.step.teach)
        return [Point(lr, 2.0, 2.0)]

    monkeypatch.setattr(range_test, "curve", of_step)
    words = {**student(taught), "data.root": str(taught.parent / "colours")}
    range_test.find_rate(load(None, words.items()))
    assert [type(teach) for teach in seen] == [Teacher]


def test_the_columns_are_in_the_students_order(taught: Path) -> None:
    shutil.copytree(taught, "renamed")
    saved = checkpoint.load(taught / "best.pth", mapped=False)
    saved.classes[:] = ["red", "blue", "green"]
    checkpoint.save(saved, Path("renamed/best.pth"))
    logits = []
    for run in (taught, Path("renamed")):
        words = {**student(run), "data.root": str(taught.parent / "colours")}
        teacher = teacher_of(set_up(load(None, words.items())))
        assert teacher is not None
        logits.append(teacher.logits)
    assert torch.equal(logits[1], logits[0][:, [1, 2, 0]])


def test_a_resumed_run_is_taught_as_one_that_was_not_stopped_and_by_the_same_teacher(taught: Path) -> None:
    words = student(taught, **{"model.head.dropout": 0.3, "train.search": "off"})
    whole = train(taught.parent, {**words, "train.epochs": 3})
    stopped = train(taught.parent, {**words, "train.epochs": 2})
    alone = train(taught.parent, {**words, "train.epochs": 3, "train.teacher.checkpoint": None})
    train(taught.parent, {"train.epochs": 3}, resume=stopped)
    one, other, third = (checkpoint.load(run / "last.pth").trained for run in (whole, stopped, alone))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not all(torch.equal(value, third[key]) for key, value in one.items())
    best = (taught / "best.pth").read_bytes()
    try:
        shutil.copyfile(alone / "best.pth", taught / "best.pth")
        with pytest.raises(DataError, match=r"train\.teacher\.checkpoint is not the file that this run began with"):
            train(taught.parent, {"train.epochs": 4}, resume=stopped)
    finally:
        (taught / "best.pth").write_bytes(best)


def test_a_teacher_of_other_classes_is_refused_with_both_lists(taught: Path) -> None:
    draw_split(Path("others", "train"), 2, classes={"amber": (250, 160, 20), "red": (220, 40, 30)})
    Path("others/train/amber/00.jpg").write_bytes(b"never read")
    with pytest.raises(
        ConfigError, match=r"knows the classes blue, green, red, and the data has amber, red; take a tea"
    ):
        set_up(load(None, {**student(taught), "data.root": "others"}.items()))


def test_a_teacher_that_is_not_there_is_named_with_its_key(taught: Path) -> None:
    words = {**student(taught), "data.root": str(taught.parent / "colours"), "train.teacher.checkpoint": "gone"}
    with pytest.raises(ConfigError, match=r": train\.teacher\.checkpoint: gone: cannot be read: No such file"):
        set_up(load(None, words.items()))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            {"search": "auto", "teacher": {"checkpoint": "x"}},
            "train: teacher is for training by epochs, and search finds the head without; leave out teacher, or set",
        ),
        (
            {"mixup": 0.2, "teacher": {"checkpoint": "x"}},
            "train: the logits of a teacher are kept for single images, not for mixtures of two; leave out",
        ),
        ({"teacher": {"alpha": 0.9}}, "train.teacher: temperature and alpha are of a teacher, and there is none"),
        ({"teacher": {"checkpoint": "x", "alpha": 1.1}}, "train.teacher.alpha: should be 1 or less"),
        ({"teacher": {"checkpoint": "x", "temperature": 0}}, "train.teacher.temperature: should be more than 0"),
    ],
)
def test_settings_that_make_no_teacher_are_refused(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load({"train": train})
    phases = [{"trainable": "head", "search": "auto"}, {"trainable": "all"}]
    assert load({"train": {"teacher": {"checkpoint": "x"}, "phases": phases}}).config.train.search == "off"
    assert load({"train": {"teacher": {"checkpoint": "x"}}}).config.train.search == "off"
