"""Rows from images, as the classifier gives them for one image at a time: their order, how far ahead images are read,
how many classes, the temperature, the views."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from shards import write_tar
from tiny import CLASSES, tiny_classifier, tiny_template
from tl_trainer import predict as module_under_test
from tl_trainer.assembly import Parts
from tl_trainer.config.load import load
from tl_trainer.data import images
from tl_trainer.data.images import Decoding
from tl_trainer.data.transforms import PlainSteps, Preprocessing, spell_out, tta_pipelines
from tl_trainer.errors import InputError
from tl_trainer.feeds import Feeds
from tl_trainer.network import Network
from tl_trainer.predict import Asked, Predictor, Row, expand_inputs, line_waiting
from tl_trainer.rows import FORMATS, write_rows
from tl_trainer.single_label import SingleLabel

PRESET = Preprocessing(resize=12, crop=8, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
CROPPED = spell_out("default", PRESET, train=False)
ANY_SIZE = spell_out([], PRESET, train=False)
BAD = {0, 3, 4, 5, 6, 10}  # of the eleven that `paths` gives


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Pictures of noise, no two alike or of one size, and among them what is none: missing, empty, cut, a folder."""
    generator = torch.Generator().manual_seed(0)
    found = [tmp_path / f"{index:02}.png" for index in range(11)]
    for index, path in enumerate(found):
        noise = torch.randint(0, 256, (20 + index, 30 - index, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray((noise * torch.rand(3, generator=generator)).byte().numpy()).save(path)
    found[0].unlink()
    found[3].write_bytes(b"")
    found[4].write_bytes(found[4].read_bytes()[:200])
    found[5].unlink()
    found[5].mkdir()
    found[6].write_text("no picture")
    found[10].unlink()
    return [str(path) for path in found]


def restored(temperature: float | None = None) -> Parts:
    """The tiny classifier with weights that spread the probabilities."""
    torch.manual_seed(0)
    classifier = tiny_classifier().eval()
    with torch.no_grad():
        classifier.head[-1].weight.mul_(20)
    network, saved = Network(classifier, torch.device("cpu"), "fp32"), replace(tiny_template(), temperature=temperature)
    (pipeline,) = tta_pipelines(CROPPED, None)
    feeds = Feeds(network, None, batch_size=4, workers=0, seed=0)
    return Parts(load(None), SingleLabel(saved.classes), network, pipeline, saved.backbone, 4, feeds, saved)


def predictor(
    temperature: float | None = None, *, topk: int = 5, steps: PlainSteps = CROPPED, tta: str | None = None
) -> Predictor:
    return Predictor(restored(temperature), topk, tta_pipelines(steps, tta))


def one_by_one(path: str, temperature: float, steps: PlainSteps, tta: str | None) -> list[float]:
    """The probability of each class: the mean over the views, then the temperature."""
    classifier, picture = restored().network.classifier, images.load(Path(path))
    with torch.no_grad():
        views = [
            classifier(pipeline.batch(pipeline.image(picture).unsqueeze(0)))[0].softmax(dim=0)
            for pipeline in tta_pipelines(steps, tta)
        ]
    mean = torch.stack(views).mean(dim=0) ** (1 / temperature)
    shares: list[float] = (mean / mean.sum()).tolist()
    return shares


def shares(row: Row) -> list[float]:
    """The probabilities in the order of the classes."""
    return [guess.probability for guess in sorted(row.predictions, key=lambda guess: guess.index)]


@pytest.mark.parametrize("steps", [CROPPED, ANY_SIZE], ids=["one size", "any size"])
@pytest.mark.parametrize(("temperature", "tta"), [(None, None), (2.5, None), (2.5, "flip")])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 100])
def test_each_row_is_what_its_image_gives_alone(
    paths: list[str], batch_size: int, temperature: float | None, tta: str | None, steps: PlainSteps
) -> None:
    rows = list(predictor(temperature, steps=steps, tta=tta).rows(paths, batch_size))
    assert [row.path for row in rows] == paths
    assert {index for index, row in enumerate(rows) if row.error is not None} == BAD
    for row in rows:
        if row.error is None:
            assert shares(row) == pytest.approx(one_by_one(row.path, temperature or 1, steps, tta), abs=2e-6)
            assert all(guess.label == "abc"[guess.index] for guess in row.predictions)
        else:
            assert row.predictions == []
            assert row.path in row.error
    assert len({tuple(shares(row)) for row in rows if row.error is None}) == len(paths) - len(BAD)


def test_many_images_are_drawn_no_further_ahead_than_two_batches(paths: list[str]) -> None:
    drawn = 0

    def counted() -> Iterator[str]:
        nonlocal drawn
        for path in paths * 6:
            drawn += 1
            yield path

    rows = predictor().rows(counted(), batch_size=4)
    assert drawn == 0
    for number, row in enumerate(rows):
        assert row.path == paths[number % len(paths)]
        assert number < drawn <= number + 2 * 4
    assert number + 1 == drawn == 66


@pytest.mark.parametrize("there", [True, False])
def test_the_next_batch_is_decoded_ahead_where_it_is_there(paths: list[str], there: bool) -> None:
    drawn: list[str] = []
    rows = predictor().rows((drawn.append(path) or path for path in paths), 4, lambda: there)
    for number in range(4):
        assert next(rows).path == paths[number]
        assert drawn == paths[: 8 if there else 4]
    assert len(list(rows)) == 7


def test_a_list_is_there_and_an_iterator_is_not(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(images, "load", lambda path, decoding: decoded.append(str(path)) or Image.new("RGB", (20, 20)))
    for inputs, ahead in ((paths, 2), (iter(paths), 1)):
        decoded.clear()
        rows = predictor().rows(inputs, 1)
        next(rows)
        rows.close()
        assert decoded == paths[:ahead]


@pytest.mark.skipif(sys.platform == "win32", reason="nothing says there whether a pipe has a line")
def test_a_row_leaves_before_the_next_path_comes(paths: list[str]) -> None:
    """Of a pipe in which a line is written only when the row for the one before has come."""
    reading, writing = os.pipe()
    answered: queue.Queue[Row] = queue.Queue()

    def answer() -> None:
        with os.fdopen(reading) as stdin:
            for row in predictor().rows(expand_inputs(["-"], stdin), 1, partial(line_waiting, stdin)):
                answered.put(row)

    answering = threading.Thread(target=answer, daemon=True)
    answering.start()
    for path in paths[:3]:
        os.write(writing, f"{path}\n".encode())
        assert answered.get(timeout=20).path == path
    os.close(writing)
    answering.join()


def test_a_name_that_is_too_long_is_an_error_row(paths: list[str]) -> None:
    long = "x" * 5000
    bad, good = predictor().rows(expand_inputs([long, paths[1]], io.StringIO()), 4)
    assert bad.path == long
    assert bad.error is not None
    assert "cannot be read: File name too long" in bad.error
    assert good.error is None


@pytest.mark.parametrize("form", FORMATS)
def test_the_images_of_an_archive_have_the_rows_of_their_files(paths: list[str], tmp_path: Path, form: str) -> None:
    names = {f"x/{Path(path).name}": Path(path) for path in paths if Path(path).is_file()}
    write_tar(tmp_path / "a.tar", {**{name: path.read_bytes() for name, path in names.items()}, "x/1.cls": "1"})

    def written(inputs: Iterable[str]) -> str:
        text = io.StringIO()
        write_rows(predictor().rows(expand_inputs(inputs, io.StringIO(f"{tmp_path}/a.tar\n")), 4), form, text, 2)
        return text.getvalue()

    rows = written([f"{tmp_path}/a.tar"])
    plain = written([str(path) for path in names.values()])
    for name, path in names.items():
        plain = plain.replace(str(path), f"{tmp_path}/a.tar/{name}")
    assert rows == plain
    assert rows == written(["-"]) == written([f"{tmp_path}/*.tar"])


def test_an_archive_that_is_cut_ends_with_an_error_row(paths: list[str], tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.png": Path(paths[1]).read_bytes(), "2.cls": "x" * 600, "2.png": b"x"})
    for length, name in ((path.stat().st_size // 10240 * 10240 - 7000, "2.cls"), (0, "(the rest)")):
        path.write_bytes(path.read_bytes()[:length])
        *good, last = predictor().rows(expand_inputs([str(path)], io.StringIO()), 4)
        assert all(row.error is None for row in good)
        assert last.error is not None
        assert (last.path, last.error.partition(" cannot")[0]) == (f"{path}/{name}", f"{path}/{name}: {path}")


def test_of_what_is_no_file_of_the_system_nothing_is_known() -> None:
    assert not line_waiting(io.StringIO("a.jpg\n"))


def test_images_are_decoded_in_a_thread_per_core(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def pool(threads: int) -> ThreadPoolExecutor:
        made.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(module_under_test, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(module_under_test, "cores", lambda: 7, raising=False)
    assert len(list(predictor().rows(paths[:1]))) == 1
    assert made == [7]


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_any_number_of_images_has_as_many_rows(paths: list[str], count: int) -> None:
    assert [row.path for row in predictor().rows(iter(paths[:count]), batch_size=4)] == paths[:count]


@pytest.mark.parametrize("topk", [1, 2, CLASSES, CLASSES + 1, 1000])
def test_as_many_classes_as_asked_for_and_there_are_best_first(paths: list[str], topk: int) -> None:
    (row,) = predictor(topk=topk).rows(paths[1:2], batch_size=4)
    found = [(guess.index, guess.probability) for guess in row.predictions]
    expected = one_by_one(paths[1], 1, CROPPED, None)
    best = sorted(range(CLASSES), key=expected.__getitem__, reverse=True)[:topk]
    assert [index for index, _ in found] == best
    assert [share for _, share in found] == pytest.approx([expected[index] for index in best], abs=2e-6)


def test_a_temperature_changes_the_probabilities_and_not_the_order(paths: list[str]) -> None:
    plain, one, cold, hot = (list(predictor(value).rows(paths, 4)) for value in (None, 1.0, 0.5, 4.0))
    assert plain == one
    for rows in (cold, hot):
        assert [[guess.index for guess in row.predictions] for row in rows] == [
            [guess.index for guess in row.predictions] for row in plain
        ]
    for low, middle, high in zip(cold, plain, hot, strict=True):
        if middle.error is None:
            assert max(shares(low)) > max(shares(middle)) > max(shares(high)) > 1 / CLASSES


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("-", "-: no paths on stdin"),
        ("empty", "empty: no images in this folder"),
        ("*.jpg", r"\*.jpg: nothing matches"),
        ("a.tar", "a.tar: no images in this archive"),
    ],
)
def test_what_names_no_image_is_refused(argument: str, message: str) -> None:
    Path("empty").mkdir()
    write_tar(Path("a.tar"), {"1.cls": "1"})
    with pytest.raises(InputError, match=message):
        list(expand_inputs([argument], io.StringIO("\n")))


def test_pictures_in_memory_are_images_too(paths: list[str]) -> None:
    with Image.open(paths[1]) as picture:
        from_file, from_picture = predictor().rows([paths[1], picture], 4)
    assert from_picture == Row("image 2", from_file.predictions)


def test_a_picture_in_memory_that_would_become_huge_is_a_row_too(paths: list[str]) -> None:
    strip = Image.new("L", (1_000_000, 1))
    bad, good = predictor().rows([strip, paths[1]], 4)
    assert bad.error is not None
    assert bad.error.startswith("the picture: 1,000,000 x 1 pixels would be resized to 12,000,000 x 12, more than ")
    assert good.error is None


def test_nothing_is_opened_a_second_time_for_its_evidence(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    load_ = images.load

    def once(path: Path, decoding: Decoding) -> Image.Image:
        opened.append(str(path))
        picture = load_(path, decoding)
        path.unlink()  # it would be gone by then
        return picture

    monkeypatch.setattr(images, "load", once)
    (tmp_path / "evidence").mkdir()
    rows = list(
        Predictor(restored(), 1, tta_pipelines(CROPPED, "flip"), Asked(tmp_path / "evidence")).rows(paths[1:3], 4)
    )
    assert [row.error for row in rows] == [None, None]
    assert sorted(opened) == paths[1:3]
    assert len(list((tmp_path / "evidence").iterdir())) == 2
