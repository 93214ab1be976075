from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conftest import Run, draw_split
from stress.ranks import forked
from stress.tools import rows_in
from tl_trainer import checkpoint
from tl_trainer.config.load import load
from tl_trainer.errors import ConfigError, SettingError
from tl_trainer.ground import distributed
from tl_trainer.network import resolve_device
from tl_trainer.settings import check_settings

ALIKE = ["device=cpu", "train.precision=fp32", "data.workers=0", "output.report=false", "output.tensorboard=false"]
EPOCHS = [
    "train.search=off", "train.epochs=2", "train.batch_size=8", "train.accumulate=2", "train.ema.decay=0.9",
    "model.backbone=alexnet", "model.weights=none", "train.loss.class_weights=balanced",
]  # fmt: skip


def ranks(count: int, *words: object) -> list[subprocess.CompletedProcess[str]]:
    """tl-train by ranks that are forked from here."""
    children = forked("train", count, *words, logs=Path("ranks"), cache=Path("cache"))
    return [
        subprocess.CompletedProcess(words, child.code or 0, child.out.read_text(), child.said()) for child in children
    ]


def launched(*words: object) -> subprocess.CompletedProcess[str]:
    """tl-train by two ranks of torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*torchrun, "-m", "tl_trainer.cli.train", *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


def weights(run_dir: str) -> dict[str, Tensor]:
    return checkpoint.load(Path(run_dir) / "best.pth").trained


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_find_the_head_of_one(count: int, tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the images without overlap; what they leave is bit for bit what one process leaves."""
    done = ranks(count, colours, "--json", "--output", "many", *ALIKE)
    assert [rank.returncode for rank in done] == [0] * count, done
    assert [rank.stdout.count("\n") for rank in done] == [1, *[0] * (count - 1)]
    assert [rank.stderr.count("run directory") for rank in done] == [1, *[0] * (count - 1)]
    assert rows_in(Path("cache")) == 36
    monkeypatch.setenv("TL_CACHE", "one")
    alone = tl("train", colours, "--json", "--output", "alone", *ALIKE)
    assert alone.returncode == 0, alone.stderr
    many, one = json.loads(done[0].stdout), json.loads(alone.stdout)
    assert (many["val"], many["search"]) == (one["val"], one["search"])
    assert {path.name for path in Path(many["run_dir"]).iterdir()} == {
        path.name for path in Path(one["run_dir"]).iterdir()
    }
    theirs, own = weights(many["run_dir"]), weights(one["run_dir"])
    assert all(theirs[key].equal(own[key]) for key in own)


def test_ranks_find_several_heads_of_one(tl: Run, tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 12)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jpg"))
    rows = [f"{name},{Path(name).parent.name},{'wide' if number % 2 else ''}" for number, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,colour,tags", *rows]))
    csv = "{labels: labels.csv, image_column: id, label_columns: [colour, tags], multilabel_columns: [tags]}"
    words = [f"data.root={tmp_path}", "data.source=csv", "data.task=multitask", f"data.csv={csv}", *ALIKE, "--json"]
    done, alone = ranks(2, *words, "--output", "many"), tl("train", *words, "--output", "alone")
    assert [rank.returncode for rank in done] == [alone.returncode] * 2 == [0] * 2, done
    many, one = json.loads(done[0].stdout), json.loads(alone.stdout)
    assert (many["val"], many["search"]) == (one["val"], one["search"])
    hidden = ranks(2, *words, "model.head.hidden=[4]", "--output", "many")
    assert "data.task: multitask is trained for epochs by one process so far" in hidden[0].stderr + hidden[1].stderr


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks_train_what_one_trains(count: int, tl: Run, tmp_path: Path) -> None:
    """With 17 images the last batch has one, so all ranks but one have none of it."""
    photos = tmp_path / "photos"
    draw_split(photos / "train", 6, size=64)
    (photos / "train" / "red" / "05.jpg").unlink()
    draw_split(photos / "val", 2, size=65)
    done = ranks(count, photos, "--json", "--output", "many", *ALIKE, *EPOCHS)
    assert [rank.returncode for rank in done] == [0] * count, done
    alone = tl("train", photos, "--json", "--output", "alone", *ALIKE, *EPOCHS)
    assert alone.returncode == 0, alone.stderr
    many, one = json.loads(done[0].stdout), json.loads(alone.stdout)
    assert many["val"]["n"] == one["val"]["n"] == 6
    theirs, own = weights(many["run_dir"]), weights(one["run_dir"])
    assert all((theirs[key] - own[key]).abs().max() < 1e-5 for key in own)


def test_ranks_predict_what_one_predicts_in_the_same_order(tl: Run, colours: Path, tmp_path: Path) -> None:
    assert tl("train", colours, "--output", "runs", *ALIKE).returncode == 0
    (colours / "val" / "blue" / "00.jpg").write_bytes(b"no image")
    words = [colours, "--checkpoint", next(Path("runs").glob("*/best.pth")), "--format", "csv", "--batch-size", "4"]
    alone = tl("predict", *words)
    done = forked("predict", 3, *words, logs=tmp_path / "ranks")
    assert [child.code for child in done] == [alone.returncode] * 3 == [1] * 3
    assert [child.out.read_text() for child in done] == [alone.stdout, "", ""]


@pytest.mark.parametrize("more", [["--embed", "x.npz"], ["--explain", "x"], ["-"]])
def test_what_one_process_predicts_is_refused_for_ranks(
    tl: Run, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    done = tl("predict", "x.jpg", *more)
    assert done.returncode == 2
    assert "is the work of one process; start it without torchrun" in done.stderr


def test_an_error_of_one_rank_is_said_once_with_its_name(colours: Path) -> None:
    (colours / "train" / "blue" / "03.jpg").write_bytes(b"no image")
    done = launched(colours, *ALIKE)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("tl-train: ")]
    assert len(said) == 1
    assert said[0].startswith("tl-train: rank ")
    assert "1 of 24 train images cannot be used" in said[0]


def test_one_gpu_for_all_ranks_of_a_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "local_world", lambda: 2)
    with pytest.raises(SettingError, match="cuda:1 is one GPU for 2 ranks of a host; set cuda: each takes its own"):
        resolve_device("cuda:1")


def test_hosts_with_other_files_are_told_the_first_difference(tmp_path: Path) -> None:
    """Of which group an image is belongs to it, since groups decide what is held out."""
    for host in ("0", "1"):
        draw_split(folder := tmp_path / host, 2)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
        groups = ["a", "b", "b", "c", "c", "a" if host == "0" else "b"]
        rows = [f"{name},{Path(name).parent.name},{group}" for name, group in zip(names, groups, strict=True)]
        (folder / "labels.csv").write_text("\n".join(["id,label,group", *rows]))
    csv = "data.csv={labels: labels.csv, image_column: id, label_column: label, group_column: group}"
    words = ["data.source=csv", "data.root=.", csv, "--output", str(tmp_path / "runs"), *ALIKE]

    def on_its_host() -> None:
        os.chdir(tmp_path / os.environ["RANK"])

    done = forked("train", 2, *words, logs=tmp_path / "ranks", prepare=on_its_host)
    assert [child.code for child in done] == [2, 2]
    [said] = [line for child in done for line in child.said().splitlines() if line.startswith("tl-train: ")]
    last = sorted((tmp_path / "0" / "red").iterdir())[-1].name
    assert "labels.csv is not the same for all ranks: rank 0 on" in said
    assert f"has the all image red/{last} of class 2 in the group a where rank 1 on" in said
    assert f"has the all image red/{last} of class 2 in the group b; give all hosts the same files" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"WORLD_SIZE": "4"}, "started as one of 4 processes (WORLD_SIZE), and RANK is not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many', not a number of processes"),
    ],
)
def test_a_world_that_cannot_be_is_named(
    tl: Run, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], said: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    done = tl("train", "--print-config")
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("count", ["1", "0", ""])
def test_a_world_of_one_is_alone(tl: Run, monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert tl("train", "--print-config").returncode == 0


def test_alone_everything_gives_back_what_it_is_given() -> None:
    assert distributed.gathered(3) == distributed.together(lambda: 3) == [3]
    assert distributed.from_first(lambda: 3) == distributed.host_by_host(lambda: 3) == distributed.largest(3) == 3
    assert [*distributed.handed_out(3)] == [0, 1, 2]
    assert distributed.piece(10_000, 500, 16) == 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": {"source": "csv", "task": "multilabel"}, "train": {"epochs": 2}},
            "data.task: multilabel is trained for epochs by one process so far",
        ),
        ({"train": {"soup": 2, "batch_size": 8}}, "train.soup: is the work of one process so far"),
        ({"train": {"epochs": 2, "batch_size": 7}}, "train.batch_size: 7 images cannot be divided among 2 ranks"),
    ],
)
def test_what_ranks_do_not_do_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        check_settings(load(given))
