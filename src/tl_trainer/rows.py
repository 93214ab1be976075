"""The rows of tl-predict as text, JSON, JSON lines and CSV, each written as soon as it is there."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import IO

from tl_trainer.ground import distributed
from tl_trainer.ground.wording import printable
from tl_trainer.known import Neighbour
from tl_trainer.multilabel import NO_LABEL
from tl_trainer.predict import Extras, Row, Source
from tl_trainer.tasks import prediction_columns


def by_ranks(
    rows_of: Callable[[Iterable[Source]], Iterator[Row]], inputs: Iterable[Source], batch_size: int
) -> Iterator[Row]:
    """The rows of all inputs in their order, on every rank: of as many batches as there are ranks each predicts one."""
    if (world := distributed.world()) == 1:
        yield from rows_of(inputs)
        return
    rank = distributed.rank()
    rows = rows_of(one for number, one in enumerate(inputs) if number // batch_size % world == rank)
    while any(of_ranks := distributed.gathered([*islice(rows, batch_size)])):
        for of_rank in of_ranks:
            yield from of_rank


def write_rows(
    rows: Iterable[Row], form: str, file: IO[str], classes: int, extras: Extras | None = None, own: Sequence[str] = ()
) -> Counter[str | None]:
    """Write the rows as they come, in one of FORMATS; how many images each class has, None being those with an error.

    classes: the most that a row has. extras: what else it says. own: what `columns_of` gives where an image may have
    several labels or heads.
    """
    extras = extras or Extras()
    columns = [*(own or prediction_columns(classes)), *(["set"] if extras.coverage is not None else [])]
    columns += ["accepted"] if extras.reject else []
    columns += [f"{name}_{rank}" for rank in range(1, extras.neighbours + 1) for name in ("neighbour", "similarity")]
    tally: Counter[str | None] = Counter()

    def counted() -> Iterator[Row]:
        for row in rows:
            tally[_said(row) if row.error is None else None] += 1
            yield row

    FORMATS[form](counted(), file, columns)
    return tally


def columns_of(task: str, heads: Sequence[str], classes: int) -> list[str]:
    """The columns of CSV where an image may have several labels, or heads; empty where it has one class."""
    if heads:
        return ["path", *(column for head in heads for column in (head, f"{head}_probability")), "error"]
    return [*prediction_columns(classes), "labels"] if task == "multilabel" else []


def _said(row: Row) -> str:
    """The class of an image in words, or its labels."""
    if row.labels is None and row.heads is None:
        return row.predictions[0].label
    return " + ".join(of.label for of in (row.predictions if row.labels is None else row.labels)) or NO_LABEL


def _write_text(rows: Iterable[Row], file: IO[str], _: Sequence[str]) -> None:
    for row in rows:
        said = row.predictions if row.labels is None else row.labels
        guesses = "  ".join(f"{printable(guess.label)} {guess.probability:.1%}" for guess in said)
        if row.labels == [] and row.predictions:
            best = row.predictions[0]
            guesses = f"{NO_LABEL}  (the most probable: {printable(best.label)} {best.probability:.1%})"
        if row.accepted is False:
            guesses = f"none of these  ({guesses})"
        if row.set is not None:
            guesses += f"  {{{', '.join(map(printable, row.set))}}}"
        guesses += "".join(f"\n  {_nearest(one)}" for one in row.neighbours or ())
        # An image's error names its path already.
        file.write(f"{printable(row.path)}  {guesses}\n" if row.error is None else f"error: {printable(row.error)}\n")
        file.flush()


def _nearest(one: Neighbour) -> str:
    return f"similarity {one.similarity:.3f}  {printable(one.path)} ({printable(one.label)})"


def _write_jsonl(rows: Iterable[Row], file: IO[str], _: Sequence[str]) -> None:
    for row in rows:
        file.write(json.dumps(row.plain(), ensure_ascii=False) + "\n")
        file.flush()


def _write_json(rows: Iterable[Row], file: IO[str], _: Sequence[str]) -> None:
    separator = "[\n"
    for row in rows:
        file.write(separator + json.dumps(row.plain(), ensure_ascii=False))
        file.flush()
        separator = ",\n"
    file.write("[]\n" if separator == "[\n" else "\n]\n")


def _write_csv(rows: Iterable[Row], file: IO[str], columns: Sequence[str]) -> None:
    """The columns of the report's predictions.csv and what was asked for; nobody knows the label, so it is empty."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells: dict[str, object] = {"path": row.path, "error": row.error, "accepted": row.accepted}
        cells["set"] = None if row.set is None else json.dumps(row.set, ensure_ascii=False)  # a name may have commas
        if row.labels is not None:
            cells["labels"] = json.dumps([of.label for of in row.labels], ensure_ascii=False)
        for head, block in (row.heads or {}).items():
            names, shares = [of.label for of in block.said], [of.probability for of in block.said]
            several = block.labels is not None
            cells[head] = json.dumps(names, ensure_ascii=False) if several else names[0]
            cells[f"{head}_probability"] = json.dumps(shares) if several else shares[0]
        for rank, guess in enumerate(row.predictions if row.heads is None else (), start=1):
            name = "predicted" if rank == 1 else f"class_{rank}"
            cells |= {name: guess.label, "probability" if rank == 1 else f"probability_{rank}": guess.probability}
        for rank, one in enumerate(row.neighbours or (), start=1):
            cells |= {f"neighbour_{rank}": one.path, f"similarity_{rank}": one.similarity}
        writer.writerow([cells.get(column) for column in columns])
        file.flush()


FORMATS: dict[str, Callable[[Iterable[Row], IO[str], Sequence[str]], None]] = {
    "text": _write_text,
    "json": _write_json,
    "jsonl": _write_jsonl,
    "csv": _write_csv,
}
