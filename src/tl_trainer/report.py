"""`--report`: the figures of an evaluation as files to read by machine, and as one page to look at."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from tl_trainer.checkpoint import library_versions
from tl_trainer.data.dataset import Split
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import InputError
from tl_trainer.evaluation import Evaluation
from tl_trainer.explain import GradCam
from tl_trainer.ground.files import csv_text, write_bytes, write_text
from tl_trainer.ground.wording import printable
from tl_trainer.known import Neighbour
from tl_trainer.label_report import LabelPredictions
from tl_trainer.metrics import Scores, best_classes, confusion, surest_mistakes
from tl_trainer.models.classifier import Classifier
from tl_trainer.single_label import SingleLabel
from tl_trainer.tasks import prediction_columns

MISTAKES = 12
NEIGHBOURS = 3
PAIRS_SHOWN = 6
EXAMPLES = 4
SIDE = 224  # pixels of the longer side of an example
SQUARE = 1000  # classes up to which confusion_matrix.csv has a column for each


def write_report(
    folder: Path, evaluation: Evaluation, classifier: Classifier, pipeline: Pipeline, about: dict[str, Any]
) -> Path:
    """Write every file of the report into `folder`, which is there; the path of its page.

    about: what the page tells of its origin: `name`, `checkpoint`, the configuration as YAML under `config`. Of a run
    also its `overview`, `advice` and PNG files by name under `pictures`, of heads that were found `searches` (of each
    what `Found.summary` gives, the rows `shown` and its `picture`) and `forecast` (`sentence` and `how`), of others
    which their `weights` are.
    `nearest`: what gives the NEIGHBOURS nearest training images of each image of a split, where features are at hand.
    Raises RunError where a file cannot be written, ImageError where an image is gone.
    """
    measured, classes = evaluation.measured, evaluation.checkpoint.classes
    pictures = {f"{name}.png": data for name, data in evaluation.pictures.items()}
    pictures |= about.get("pictures", {})
    checkpoint = evaluation.checkpoint
    split, scores, task = evaluation.split, evaluation.scores, evaluation.task
    predictions: Predictions | LabelPredictions
    if not isinstance(task, SingleLabel):
        predictions = LabelPredictions(split, task, scores, checkpoint.calibration)
    else:
        predictions = Predictions(split, classes, scores, checkpoint.calibration)
    per_class = measured["per_class"]
    texts = {
        "metrics.json": json.dumps(measured, indent=1, allow_nan=False) + "\n",
        "per_class.csv": csv_text(next(iter(per_class), ()), (row.values() for row in per_class)),
        **predictions.tables(),
        "report.html": template(predictions.page).render(
            measured=measured,
            pictures={name: _data_uri(data, "png") for name, data in pictures.items()},
            pairs=list(_pair_examples(evaluation, predictions)),
            mistakes=_mistakes(evaluation, predictions, classifier, pipeline, about.get("nearest")),
            about=about,
            duplicates=[*map(printable, evaluation.duplicates)],
            versions=library_versions(),
        ),
    }
    for name, data in pictures.items():
        write_bytes(folder / name, data)
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / "report.html"


class Predictions:
    """The best classes of each image, their probabilities, and which of the images are wrong, surest first."""

    page = "report.html"

    def __init__(self, split: Split, classes: Sequence[str], scores: Scores, temperature: float | None) -> None:
        self.split, self.classes, self.scores = split, classes, scores
        self.best, self.probability = best_classes(scores, temperature, 5)
        self.wrong = surest_mistakes(scores, temperature, len(self.best))

    def shown_for(self, index: int) -> int:
        """The class whose evidence a picture of the image shows: the one that was predicted."""
        return int(self.best[index, 0])

    def of_pair(self, label: int, predicted: int) -> Iterator[int]:
        """The images with a label that were taken for a class, the surest mistakes first."""
        return (at for at in self.wrong if (self.split.targets[at], self.shown_for(at)) == (label, predicted))

    def tables(self) -> dict[str, str]:
        """CSV files by name: the confusion matrix, and a row per image."""
        return {"confusion_matrix.csv": _confusion_table(self.scores, self.classes), "predictions.csv": self.table()}

    def table(self) -> str:
        """predictions.csv."""
        return csv_text(self.columns(), self.rows())

    def columns(self) -> list[str]:
        """The header of predictions.csv."""
        return prediction_columns(self.best.shape[1])

    def rows(self) -> Iterator[list[Any]]:
        """The rows of predictions.csv, in the split's order."""
        names, split = self.classes, self.split
        for name, label, best, shares in zip(
            split.names, split.targets, self.best.tolist(), self.probability.tolist(), strict=True
        ):
            guesses = [cell for index, share in zip(best, shares, strict=True) for cell in (names[index], _six(share))]
            yield [name, names[label], *guesses, ""]

    def caption(self, index: int) -> dict[str, str]:
        """What is written below an example."""
        names, split = self.classes, self.split
        return {
            "path": printable(split.names[index]),
            "label": printable(names[split.targets[index]]),
            "predicted": printable(names[int(self.best[index, 0])]),
            "probability": f"{float(self.probability[index, 0]):.1%}",
        }


def _pair_examples(evaluation: Evaluation, predictions: Predictions | LabelPredictions) -> Iterator[dict[str, Any]]:
    """The most-confused pairs, each with photographs that were taken for the other class."""
    index = {name: number for number, name in enumerate(evaluation.checkpoint.classes)}
    for pair in evaluation.measured["most_confused"][:PAIRS_SHOWN]:
        examples = islice(predictions.of_pair(index[pair["label"]], index[pair["predicted"]]), EXAMPLES)
        pictures = [
            {"image": thumbnail(evaluation.split.open(i, draft=SIDE)), **predictions.caption(i)} for i in examples
        ]
        yield {**pair, "examples": pictures}


def _mistakes(
    evaluation: Evaluation,
    predictions: Predictions | LabelPredictions,
    classifier: Classifier,
    pipeline: Pipeline,
    nearest: Callable[[Split], list[list[Neighbour]]] | None,
) -> list[dict[str, Any]]:
    """The mistakes that the classifier is surest of, as it saw them, each beside the evidence for what it said."""
    cam, shown, indices = GradCam(classifier), [], predictions.wrong[:MISTAKES]
    images = ((index, pipeline.image(evaluation.split.open(index))) for index in indices)
    for _, group in groupby(images, lambda image: image[1].shape):  # one batch, unless the transforms fix no size
        numbers, tensors = zip(*group, strict=True)
        batch, explained = torch.stack(tensors), True
        try:
            pictures = cam.pictures(pipeline, batch, [*map(predictions.shown_for, numbers)])
        except InputError:  # a backbone without a spatial stage
            pictures = [*map(functional.to_pil_image, pipeline.denormalise(pipeline.batch(batch)))]
            explained = False
        for index, picture in zip(numbers, pictures, strict=True):
            shown.append({"image": thumbnail(picture, 2 * SIDE), "explained": explained, **predictions.caption(index)})
    alike = nearest(evaluation.split.subset(indices)) if nearest and indices else [[] for _ in shown]
    return [{**mistake, "nearest": found} for mistake, found in zip(shown, alike, strict=True)]


def _confusion_table(scores: Scores, classes: Sequence[str]) -> str:
    """A row per label and a column per predicted class; of more than SQUARE classes, a row per cell that is not 0."""
    matrix = confusion(scores, len(classes))
    if len(classes) <= SQUARE:
        counts = matrix.among(torch.arange(len(classes))).tolist()
        return csv_text(["label", *classes], ([name, *row] for name, row in zip(classes, counts, strict=True)))
    cells = zip(matrix.labels.tolist(), matrix.predicted.tolist(), matrix.counts.tolist(), strict=True)
    rows = ([classes[label], classes[predicted], count] for label, predicted, count in cells)
    return csv_text(["label", "predicted", "count"], rows)


def _six(share: float) -> float:
    return round(share, 6)


def thumbnail(picture: Image.Image, side: int = SIDE) -> str:
    """A small JPEG as the address of an `img`."""
    picture = picture.copy()
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def template(name: str) -> Any:
    """A page of the package, to be rendered."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tl_trainer", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(percent=_percent, printable=printable)
    return environment.get_template(name)


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"
