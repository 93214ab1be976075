"""tl-train where something is wrong or missing: what it says, and what it ends with."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from conftest import Run, draw_split, last_json
from test_end_to_end import SMALL
from tl_trainer.cli.train import _dry_report
from tl_trainer.errors import DownloadError
from tl_trainer.models import timm_models, torchvision_models

pytestmark = pytest.mark.usefixtures("without_pictures", "own_logging")


@pytest.fixture
def greys() -> Path:
    """Three classes that nobody could tell apart."""
    for number, split in enumerate(("train", "val")):
        draw_split(Path("greys", split), 8, size=40 + number, classes=dict.fromkeys("abc", (90, 90, 90)))
    return Path("greys")


NO_RATE = [word for word in SMALL if "lr=" not in word]


@pytest.mark.parametrize(("rate", "epochs"), [("1e3", 4), ("1e5", 1), ("1e30", 4)])
def test_a_run_whose_loss_is_absurd_fails_with_the_remedy(tl: Run, greys: Path, rate: str, epochs: int) -> None:
    done = tl("train", "--data-dir", greys, "--epochs", epochs, "--lr", rate, "--json", *NO_RATE)
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith("tl-train: after epoch ")
    assert "where guessing gives 1.1; lower the rate with --lr" in line
    assert not list(Path("runs").glob("*/result.json"))


def test_a_run_that_recovers_from_an_absurd_loss_goes_on(tl: Run, colours: Path) -> None:
    """What can be told apart is learned at any rate."""
    found = last_json(tl("train", "--data-dir", colours, "--epochs", 3, "--lr", "1e3", "--json", *NO_RATE))
    assert float(Path(found["run_dir"], "metrics.csv").read_text().splitlines()[1].split(",")[1]) > 1e3
    assert found["val"]["top1"] == 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--list"], "--list needs one of backbones, transforms, configs, runs, such as: tl-train --list backbones"),
        (["--list", "models"], "--list models *: unknown list 'models'"),
    ],
)
def test_what_can_be_listed_is_said(tl: Run, words: list[str], said: str) -> None:
    done = tl("train", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tl-train: {said}")


def test_without_a_word_it_says_how_to_start(tl: Run) -> None:
    done = tl("train")
    assert (done.returncode, done.stdout) == (2, "")
    first, *ways = done.stderr.splitlines()
    assert first == "tl-train: nothing to train on; start with one of"
    assert [way.split()[1] for way in ways] == ["--config", "photos/", "--help"]
    assert max(map(len, ways)) <= 80


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["colours", "model.backbone=timm/test_vit", "transforms.size=160"], "tl-train colours"),
        (
            ["colours", "--config", "dinov2.yaml", "model.backbone=timm/test_vit"],
            "tl-train colours --config dinov2.yaml 'model={}' transforms.size=null",
        ),
    ],
)
def test_without_a_network_the_whole_command_is_given_that_works(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], command: str
) -> None:
    def fetch(config: object, revision: object) -> Path:
        raise DownloadError("no network")

    monkeypatch.setattr(timm_models, "_fetch", fetch)
    done = tl("train", *words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"Or, without a network: {command}"
    assert tl(*command.replace("'", "").removeprefix("tl-").split(), "--dry-run").returncode == 0


def test_classes_of_one_training_image_are_named(tl: Run, colours: Path) -> None:
    for path in sorted((colours / "train" / "red").iterdir())[1:]:
        path.unlink()
    words = ("train", "--data-dir", colours, "--dry-run", *SMALL)
    assert "train has one image of 'red'; a class is learned from several" in tl(*words).stderr
    (colours / "train" / "red" / "00.jpg").write_bytes(b"x")
    said = "train has no image of 'red' left, and what was never seen is not predicted; replace them or remove it"
    assert said in tl(*words, "data.on_bad_image=skip").stderr


@pytest.mark.parametrize(("backbone", "room"), [("timm/test_vit", timm_models), ("alexnet", torchvision_models)])
def test_a_dry_run_downloads_nothing_and_says_so(
    tl: Run, colours: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, room: ModuleType
) -> None:
    for name in ("_fetch", "fetch"):
        monkeypatch.setattr(room, name, lambda *_: pytest.fail("downloaded"), raising=False)
    words = [word for word in SMALL if not word.startswith(("model.", "transforms."))]
    done = tl("train", "--data-dir", colours, "--dry-run", f"model.backbone={backbone}", *words)
    assert done.returncode == 0, done.stderr
    assert f"of {backbone} are not here yet; the dry run uses random ones" in done.stderr


def test_a_run_is_named_after_its_data_and_the_backbone_that_was_chosen(tl: Run, colours: Path) -> None:
    words = [word for word in SMALL if not word.startswith("model.backbone")]
    found = last_json(tl("train", "colours", "--epochs", 1, "--json", "model.backbone=shufflenet_v2_x0_5", *words))
    assert found["run_dir"] == "runs/colours-shufflenet_v2_x0_5-1"


def test_verbose_says_what_was_decided(tl: Run, colours: Path) -> None:
    said = tl("train", "--data-dir", colours, "--epochs", 1, "-v", *SMALL).stderr
    assert "val: 12 images, the dataset's own split" in said
    assert "features: kept, so each is computed once; 36 images to compute with an empty cache" in said
    assert "device: " in said and "transforms of val: Resize" in said


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "7 s"), (119, "119 s"), (600, "10 minutes"), (168_214, "47 hours")]
)
def test_an_estimate_is_in_a_unit_that_is_read_at_once(seconds: float, words: str) -> None:
    needs = {"seconds": seconds, "cache_bytes": 0, "memory_bytes": 0}
    report = _dry_report({"first_batch": [1], "loss": 0.1, "estimate": needs})
    assert f"a run takes about {words} before the report" in report


def test_the_cache_is_cleared_of_features_and_what_was_downloaded_is_named(tl: Run, tmp_path: Path) -> None:
    said = f"removed 0.0 MB of cached features: {tmp_path / 'cache' / 'features'}\n"
    assert tl("train", "--clear-cache").stdout == said
    shards = tmp_path / "cache" / "shards"
    (shards / "0123").mkdir(parents=True)
    (shards / "0123" / "a.tar").write_bytes(bytes(300_000))
    kept = f"kept 0.3 MB of downloaded shards and of where their images are: {shards}\n"
    assert tl("train", "--clear-cache").stdout == said + kept
    assert (shards / "0123" / "a.tar").exists()
