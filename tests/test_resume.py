"""--resume: which run, who may, what it refuses, and the end that a killed run still lacks."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import Run, draw_split, last_json
from test_end_to_end import SMALL
from tl_trainer import checkpoint, run, saver
from tl_trainer.data.dataset import name_hashes
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.sealed import save_sealed

pytestmark = pytest.mark.usefixtures("without_pictures")

RUN = Path("runs/run-1")


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "seconds": 0}


def test_a_run_of_an_older_version_that_lacks_a_key_goes_on(tl: Run, colours: Path) -> None:
    """With its default, whether the configuration is given or the run's own is taken."""
    words = ("--data-dir", colours, "--epochs", 1, "--json", *SMALL)
    last_json(tl("train", *words))
    for number, more in enumerate([words, ("--json",)], 2):
        last = checkpoint.load(RUN / "last.pth")
        for key in ("max_megapixels", "value_range"):
            del last.config["data"][key]
        checkpoint.save(last, RUN / "last.pth")
        assert last_json(tl("train", *more, "--resume", RUN, "--epochs", number))["epochs"] == number


def final_figures() -> dict[str, list[float]]:
    """TensorBoard's, in the order in which they were logged."""
    events = EventAccumulator(str(RUN))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("final/")]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_was_killed_behind_its_last_save_gets_its_figures_and_its_report(
    tl: Run, colours: Path, named: bool
) -> None:
    words = ("--data-dir", colours, "--epochs", 2, "--json", *SMALL, "output.report=true")
    whole = last_json(tl("train", *words))
    figures = final_figures()
    assert figures
    kept = {name: (RUN / name).read_bytes() for name in ("best.pth", "metrics.csv")}
    weights = checkpoint.load(RUN / "last.pth").trained
    (RUN / "result.json").unlink()  # the last thing that a run does
    shutil.rmtree(RUN / "report")
    resumed = tl("train", "--resume", RUN, "--json") if named else tl("train", *words, "--resume")
    assert without_seconds(last_json(resumed)) == without_seconds(whole)
    assert "all 2 epochs are done; nothing is trained again" in resumed.stderr
    assert (RUN / "report" / "report.html").is_file()
    assert without_seconds(json.loads((RUN / "result.json").read_text())) == without_seconds(whole)
    assert {name: (RUN / name).read_bytes() for name in kept} == kept
    after = checkpoint.load(RUN / "last.pth").trained
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert final_figures() == figures


def test_a_bare_resume_of_a_complete_run_gives_its_result(tl: Run, colours: Path) -> None:
    """So that a loop which restarts a run until it ends with 0 ends, also where the last kill came behind all."""
    words = ("--data-dir", colours, "--epochs", 1, *SMALL)
    result = last_json(tl("train", *words, "--json"))
    kept = {path.name: path.read_bytes() for path in RUN.iterdir() if path.is_file()}
    again = tl("train", *words, "--json", "--resume")
    assert last_json(again) == result
    assert f"{RUN} is complete; nothing was left to do" in again.stderr
    assert "best epoch 1 of 1" in tl("train", *words, "--resume").stdout
    assert {path.name: path.read_bytes() for path in RUN.iterdir() if path.is_file()} == kept
    named = tl("train", "--resume", RUN)
    assert named.returncode == 2
    assert "all 1 epochs are done; set train.epochs higher" in named.stderr
    assert tl("train", *words, "--resume", "--print-config").returncode == 0


def test_a_run_that_train_stop_ended_says_so(tl: Run, colours: Path) -> None:
    stop = '{"metric": "loss", "patience": 1, "min_delta": 9}'
    last_json(tl("train", "--data-dir", colours, "--epochs", 9, "--json", *SMALL, f"train.stop={stop}"))
    for more in ((), ("--epochs", 5)):
        done = tl("train", "--resume", RUN, *more)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (
            2, f"tl-train: {RUN}: train.stop ended the run after 2 epochs; start a new run to train longer"
        )  # fmt: skip


def test_the_newest_run_decides_though_an_older_one_is_unfinished(tl: Run, colours: Path) -> None:
    words = ("train", "--data-dir", colours, "--epochs", 1, *SMALL)
    for _ in range(2):
        last_json(tl(*words, "--json"))
    (RUN / "result.json").unlink()
    assert last_json(tl(*words, "--resume", "--json"))["run_dir"] == str(RUN.with_name("run-2"))
    assert not (RUN / "result.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_result_is_named(tl: Run, colours: Path, content: str) -> None:
    words = ("train", "--data-dir", colours, "--epochs", 1, *SMALL)
    last_json(tl(*words, "--json"))
    (RUN / "result.json").write_text(content)
    refused = tl(*words, "--resume")
    assert refused.returncode == 2
    assert f"{RUN / 'result.json'}: damaged; remove it, and --resume writes it again" in refused.stderr


def test_a_run_that_goes_on_behind_its_end_has_one_end(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    longer = last_json(tl("train", "--resume", RUN, "--epochs", 2, "--json"))
    assert json.loads((RUN / "result.json").read_text()) == longer
    assert {len(values) for values in final_figures().values()} == {1}


def test_a_run_that_goes_on_is_not_complete_until_it_has_ended(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    monkeypatch.setattr(run, "fit", lambda *_: 1 / 0)
    assert tl("train", "--resume", RUN, "--epochs", 2).returncode == 1
    assert not (RUN / "result.json").exists()


def test_a_run_of_version_2_is_gone_on_with(tl: Run, colours: Path) -> None:
    """Its files know neither the width of the head's input nor the size of the images of their backbone, but the names
    of the validation images."""
    words = ("--data-dir", colours / "train", "--json", *SMALL)
    whole = last_json(tl("train", *words, "--epochs", 2))
    last_json(tl("train", *words, "--epochs", 1))
    second = RUN.with_name("run-2")
    with (second / "split.csv").open() as file:
        names = [name for name, split in csv.reader(file) if split == "val"]
    for name in ("last.pth", "best.pth"):
        content = torch.load(second / name, weights_only=True)
        assert content.pop("val_split").tolist() == name_hashes(names)
        del content["features"], content["backbone"]["size"]
        save_sealed(second / name, {**content, "version": 2, "val_names": names})
    resumed = last_json(tl("train", "--resume", second, "--epochs", 2, "--json"))
    assert resumed["val"] == whole["val"]
    one, two = (checkpoint.load(run_dir / "last.pth").trained for run_dir in (RUN, second))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_fewer_epochs_end_a_run_where_it_stands(tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between epochs best.pth has no backbone; it gets it although nothing is trained any more."""

    def killed(self: saver.Saver) -> None:
        if self.state.progress.epoch == 2:
            self.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saver.Saver, "save_if_due", killed)
        assert tl("train", "--data-dir", colours, "--epochs", 9, *SMALL).returncode == 130
    assert checkpoint.load(RUN / "best.pth").frozen is None
    ended = tl("train", "--resume", RUN, "--epochs", 2, "--json")
    assert last_json(ended)["epochs"] == 2
    assert checkpoint.load(RUN / "best.pth").frozen
    with (RUN / "metrics.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["epoch", "1", "2"]


def test_a_killed_run_gets_the_temperature_that_a_whole_one_has(
    tl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no later epoch is better, so that the best epoch's scores are those of an earlier session."""
    draw_split(tmp_path / "data" / "train", 8)
    draw_split(tmp_path / "data" / "val", 10)
    words = ("train", "--data-dir", tmp_path / "data", "--epochs", 2, *SMALL, "train.optimizer.lr=1.0e-30")
    last_json(tl(*words, "--json"))
    expected = checkpoint.load(RUN / "best.pth").temperature

    def killed(self: saver.Saver) -> None:
        if self.state.progress.epoch == 1:
            self.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saver.Saver, "save_if_due", killed)
        assert tl(*words).returncode == 130
    second = RUN.with_name("run-2")
    assert checkpoint.load(second / "best.pth").temperature is None
    told = tl("eval", "--checkpoint", second, "--json")
    assert "its run has not ended" in last_json(told)["undefined"]["calibration.after"]
    last_json(tl("train", "--resume", second, "--json"))
    assert checkpoint.load(second / "best.pth").temperature == expected is not None


def test_a_run_that_another_process_trains_is_not_even_read(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    (RUN / ".last.pth-7.tmp").touch()
    monkeypatch.setattr(checkpoint, "load", lambda path, **_: pytest.fail("it was read"))
    with sole_use(RUN):
        refused = tl("train", "--resume", RUN, "--epochs", 2)
    assert refused.returncode == 2
    assert refused.stderr == f"tl-train: {RUN}: another tl-train is at work in it; wait for it, or end it first\n"
    assert (RUN / ".last.pth-7.tmp").exists()


def test_a_look_at_a_run_that_another_process_trains_is_allowed(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    (RUN / ".last.pth-7.tmp").touch()
    with sole_use(RUN):
        for flag in ("--print-config", "--dry-run"):
            assert tl("train", "--resume", RUN, "--epochs", 2, flag).returncode == 0
        assert (RUN / ".last.pth-7.tmp").exists()
    last_json(tl("train", "--resume", RUN, "--epochs", 2, "--json"))
    assert not (RUN / ".last.pth-7.tmp").exists()


def test_the_newest_run_is_found_beside_one_whose_description_is_damaged(tl: Run, colours: Path) -> None:
    words = ("train", "--data-dir", colours, *SMALL)
    for _ in range(2):
        last_json(tl(*words, "--epochs", 2, "--json"))
    RUN.with_name("run-2").joinpath("config.yaml").write_bytes(b"{\xff")
    (RUN / "result.json").unlink()
    assert last_json(tl(*words, "--epochs", 2, "--resume", "--json"))["run_dir"] == str(RUN)


def test_no_file_that_the_run_will_replace_is_memory_mapped(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows would not let it be replaced."""
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    last_json(tl("train", "--resume", RUN, "--epochs", 2, "--json"))
    (RUN / "last.pth").write_bytes(b"damaged, so that the one before is read too")
    mapped, read = {}, torch.load

    def note(path: Path, **options: Any) -> Any:
        mapped[path.name] = options["mmap"]
        return read(path, **options)

    monkeypatch.setattr(torch, "load", note)
    last_json(tl("train", "--resume", RUN, "--epochs", 3, "--json"))
    assert mapped == {"last.pth": False, ".last.previous.pth": False, "best.pth": False}


def test_nothing_is_removed_beside_a_file_that_is_no_checkpoint(tl: Run, tmp_path: Path) -> None:
    (tmp_path / "last.pth").write_text("nonsense")
    (tmp_path / ".notes.tmp").write_text("somebody's")
    assert tl("train", "--resume", tmp_path).returncode == 2
    assert (tmp_path / ".notes.tmp").exists()


@pytest.mark.parametrize(
    "forged",
    [
        {"best": {"loss": None, "top1": 0.5, "top5": 1.0, "n": 12}},
        {"best": {"loss": 0.5, "top1": "0.5", "top5": 1.0, "n": 12}},
        {"best": {"loss": float("nan"), "top1": 0.5, "top5": 1.0, "n": 12}},
        {"best": {"loss": 0.5, "top1": 0.5}},
        {"best": None},
        {"best": {}},
        {"epoch": None},
        {"epoch": -1},
        {"batch": 2},  # of no images
        {"loss": "0"},
        {"seconds": None},
        {"epoch": True, "best_epoch": True},
        {"best_epoch": 2},
        {"best": {"loss": 0.5, "top1": 2.0, "top5": 1.0, "n": 12}},
        {"another": 1},
        {"of_stop": {"best": {"loss": 0.5}, "epochs": 0}},
    ],
)
def test_forged_figures_are_refused_when_they_are_read(tl: Run, colours: Path, forged: dict[str, Any]) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    content = torch.load(RUN / "last.pth", weights_only=True)
    content["resume"]["progress"].update(forged)
    content["metrics"] = content["resume"]["progress"]["best"]
    save_sealed(RUN / "last.pth", content)
    refused = tl("train", "--resume", RUN, "--epochs", 2)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"tl-train: {RUN / 'last.pth'}: damaged checkpoint: resume.progress is missing or of the wrong kind\n"
    )


@pytest.mark.parametrize("metrics", [None, {}, {"loss": "low"}])
def test_a_forged_best_pth_is_refused(tl: Run, colours: Path, metrics: Any) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    save_sealed(RUN / "best.pth", {**torch.load(RUN / "best.pth", weights_only=True), "metrics": metrics})
    refused = tl("train", "--resume", RUN, "--epochs", 2)
    assert refused.returncode == 2
    assert refused.stderr.endswith(f"{RUN / 'best.pth'}: damaged checkpoint: metrics is missing or of the wrong kind\n")


@pytest.mark.parametrize("plateau", [{"factor": None}, {"factor": math.nan}, {"factor": 2.0}, {}, None])
def test_a_forged_schedule_is_refused(tl: Run, colours: Path, plateau: Any) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    content = torch.load(RUN / "last.pth", weights_only=True)
    content["resume"]["plateau"] = plateau
    save_sealed(RUN / "last.pth", content)
    refused = tl("train", "--resume", RUN, "--epochs", 2)
    assert refused.returncode == 2
    assert f"{RUN / 'last.pth'}: does not fit this run: " in refused.stderr.splitlines()[-1]
    assert (RUN / "result.json").exists()
    assert "epochs: 1" in (RUN / "config.yaml").read_text()


def test_a_forged_mean_of_epochs_is_refused(tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 2, "train.soup=2", "--json", *SMALL))
    content = torch.load(RUN / "last.pth", weights_only=True)
    assert [len(entry) for entry in content["resume"]["soup"]] == [3, 3]
    damaged = "damaged checkpoint: resume.soup is missing or of the wrong kind"
    other = "does not fit this run: ValueError: the weights kept for their mean are those of epochs [] of 2"
    for forged, said in ((None, damaged), ([[1, {"loss": "low"}, {}]], damaged), ([], other)):
        content["resume"]["soup"] = forged
        save_sealed(RUN / "last.pth", content)
        refused = tl("train", "--resume", RUN, "--epochs", 3)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].endswith(said)


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_images_under_the_same_names_are_refused(tl: Run, colours: Path, split: str) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    Image.new("RGB", (40, 40), "white").save(colours / split / "red" / "00.jpg")
    refused = tl("train", "--resume", RUN, "--epochs", 2)
    assert refused.returncode == 2
    what = {"train": "training", "val": "validation"}[split]
    assert refused.stderr.splitlines()[-1].endswith(f"the {what} images are not those this run began with")
