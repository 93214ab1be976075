"""The checkpoint format: what is saved comes back, and every other file is refused in one line without running it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_trainer
from tiny import tiny_classifier
from tl_trainer.checkpoint import Checkpoint, library_versions, load, save
from tl_trainer.data.dataset import name_hashes
from tl_trainer.errors import CheckpointError, RunError
from tl_trainer.ground.sealed import save_sealed

NAMES = ["ant/1.jpg", "bee/\udcff.jpg"]  # any bytes may be a file's name


def example() -> Checkpoint:
    return Checkpoint(
        config={"seed": 3, "model": {"backbone": "alexnet", "head": {"hidden": [256], "dropout": 0.5}}},
        classes=["ant", "bee", "ÿ #1"],
        preprocessing=[{"Resize": {"size": 256}}, {"ToImage": None}],
        backbone={"name": "alexnet", "weights": "IMAGENET1K_V1", "tap": "penultimate", "sha256": "ab" * 32},
        features=4,
        trained={"head.0.weight": torch.randn(3, 4), "head.0.bias": torch.randn(3).bfloat16()},
        frozen={"backbone.model.features.1.num_batches_tracked": torch.tensor(7)},
        epoch=12,
        metrics={"loss": 0.25, "top1": 0.875, "top5": 1.0, "n": 8},
        val_split=torch.tensor(name_hashes(NAMES)),
        val_images=["cd" * 8],
        temperature=1.25,
        conformal=torch.tensor([0.0, 0.25], dtype=torch.float64),
        resume={"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "random": {"cpu": torch.get_rng_state()}},
    )


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected
        assert type(found) is type(expected)


def content_of(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    save(checkpoint, path)
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def older(content: dict[str, Any], version: int) -> dict[str, Any]:
    """The content of a file of version 2 to 5."""
    content = {key: value for key, value in content.items() if key != "thresholds"}
    if version == 5:
        return content | {"version": 5}
    if version == 4:
        return {key: value for key, value in content.items() if key != "conformal"} | {"version": 4}
    missing = {"val_split", "conformal", *(["features"] if version == 2 else [])}
    kept = {key: value for key, value in content.items() if key not in missing}
    return {**kept, "version": version, "val_names": NAMES}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "best.pth"


def test_what_is_saved_comes_back(path: Path) -> None:
    save(example_ := example(), path)
    assert_equal(asdict(load(path)), asdict(example_))


@pytest.mark.parametrize("name", ["frozen", "metrics", "val_split", "temperature", "conformal", "resume"])
def test_what_may_be_absent_comes_back_as_none(path: Path, name: str) -> None:
    save(replace(example(), **{name: None}), path)
    assert getattr(load(path), name) is None


def test_a_checkpoint_says_what_it_is_and_what_wrote_it(path: Path) -> None:
    content = content_of(example(), path)
    assert content["format"] == "tl-trainer checkpoint"
    assert content["version"] == 6
    assert content["libraries"] == library_versions()
    assert content["libraries"]["tl-trainer"] == tl_trainer.__version__
    assert content["libraries"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "content", [{"state_dict": {}, "epoch": 3}, {"format": "another"}, {}, [1, 2], torch.zeros(3), None]
)
def test_the_file_of_another_program(path: Path, content: Any) -> None:
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"best\.pth: not a checkpoint of tl-trainer; give best\.pth or last\.pth"
    ):
        load(path)


@pytest.mark.parametrize("version", [1, 7])
def test_another_version_says_what_wrote_it(path: Path, version: int) -> None:
    content = content_of(example(), path)
    save_sealed(path, {**content, "version": version, "libraries": {"tl-trainer": "9.8.7"}})
    with pytest.raises(CheckpointError, match=rf"best\.pth: format version {version}, .* reads 2 to 6; .*9\.8\.7"):
        load(path)


@pytest.mark.parametrize("version", [2, 3, 4, 5, 6])
def test_a_backbone_that_was_removed_says_what_wrote_the_file(path: Path, version: int) -> None:
    content = content_of(replace(example(), backbone={**example().backbone, "name": "tiny_resnet"}), path)
    save_sealed(path, {**content, "version": version, "libraries": {"tl-trainer": "0.1.2"}})
    with pytest.raises(CheckpointError, match=r"best\.pth: its backbone, tiny_resnet, .* wrote it \('?0\.1\.2'?\)$"):
        load(path)


@pytest.mark.parametrize("name", [field.name for field in fields(Checkpoint)])
def test_a_field_of_the_wrong_kind_is_named(path: Path, name: str) -> None:
    content = content_of(example(), path)
    save_sealed(path, {**content, name: ("words",)})
    with pytest.raises(
        CheckpointError, match=rf"best\.pth: damaged checkpoint: {name} is missing or of the wrong kind"
    ):
        load(path)


def test_the_width_in_a_file_of_version_2_is_that_of_the_heads_first_matrix(path: Path) -> None:
    """Whatever else trains, and however many layers the head has."""
    trained = dict(tiny_classifier("all").trained_state())
    content = content_of(replace(example(), trained=trained), path)
    save_sealed(path, older(content, 2))
    assert load(path).features == 4
    assert [value.shape[-1] for value in trained.values() if value.dim() == 2] == [4, 8]


def test_a_file_of_version_4_has_no_conformal_scores(path: Path) -> None:
    save_sealed(path, older(content_of(example(), path), 4))
    assert load(path).conformal is None


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_of_an_older_version_has_the_names_of_the_validation_split(path: Path, version: int) -> None:
    content = content_of(example(), path)
    save_sealed(path, older(content, version))
    read = {"trained": content["trained"], "resume": content["resume"], "conformal": None}
    assert_equal(asdict(load(path)), asdict(example()) | read)
    save_sealed(path, {**older(content, version), "val_names": None})
    assert load(path).val_split is None
    for names in ("ant", [1], {}):
        save_sealed(path, {**older(content, version), "val_names": names})
        with pytest.raises(CheckpointError, match="damaged checkpoint: val_split is missing or of the wrong kind"):
            load(path)


@pytest.mark.parametrize("split", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), torch.tensor(7), [7]])
def test_hashes_of_names_are_whole_numbers(path: Path, split: Any) -> None:
    save_sealed(path, {**content_of(example(), path), "val_split": split})
    with pytest.raises(CheckpointError, match="damaged checkpoint: val_split is missing or of the wrong kind"):
        load(path)


def test_a_validation_split_takes_eight_bytes_an_image(path: Path) -> None:
    save(example(), path)
    before = path.stat().st_size
    many = torch.tensor(name_hashes(f"class/{number:07}.jpg" for number in range(10_000)))
    save(replace(example(), val_split=many), path)
    assert len(many.unique()) == 10_000
    assert path.stat().st_size - before < 81_000


def test_a_file_of_version_2_does_not_say_how_wide_the_head_is(path: Path) -> None:
    content = older(content_of(example(), path), 2)
    for trained in ({}, {"head.0.bias": torch.zeros(3)}, {1: 2}, None):
        save_sealed(path, {**content, "trained": trained})
        with pytest.raises(CheckpointError, match=r"damaged checkpoint: (features|trained) is missing"):
            load(path)


@pytest.mark.parametrize("name", [field.name for field in fields(Checkpoint)])
def test_a_missing_field_is_named(path: Path, name: str) -> None:
    content = content_of(example(), path)
    del content[name]
    save_sealed(path, content)
    with pytest.raises(CheckpointError, match=f"damaged checkpoint: {name} is missing"):
        load(path)


@pytest.mark.parametrize(
    ("name", "value"), [("trained", {"head.0.weight": [[1.0]]}), ("frozen", {"x": None}), ("classes", ["ant", 7])]
)
def test_what_is_in_a_field_is_of_the_right_kind_as_well(path: Path, name: str, value: Any) -> None:
    save_sealed(path, {**content_of(example(), path), name: value})
    with pytest.raises(CheckpointError, match=f"damaged checkpoint: {name} is missing or of the wrong kind"):
        load(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -1, -200])
def test_a_truncated_file(path: Path, keep: int) -> None:
    save(example(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert len(path.read_bytes()) < len(whole)
    with pytest.raises(CheckpointError, match=r"best\.pth: damaged"):
        load(path)


def test_every_flipped_bit_is_found(path: Path) -> None:
    save(example(), path)
    whole, rng = path.read_bytes(), random.Random(0)
    places = [*range(0, 64), *range(len(whole) - 64, len(whole)), *rng.sample(range(len(whole)), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"best\.pth: "):
            load(path)
    path.write_bytes(whole)
    assert_equal(asdict(load(path)), asdict(load(path)))


def test_torch_itself_reads_a_checkpoint(path: Path) -> None:
    save(example(), path)
    assert torch.load(path, weights_only=True)["classes"] == ["ant", "bee", "ÿ #1"]


@pytest.mark.parametrize("libraries", [None, [], {}, {"tl-trainer": ["x" * 9999]}])
def test_a_newer_version_may_say_anything_about_what_wrote_it(path: Path, libraries: Any) -> None:
    save_sealed(path, {**content_of(example(), path), "version": "4" * 9999, "libraries": libraries})
    with pytest.raises(
        CheckpointError, match=r"best\.pth: format version '4+\.\.\.4+', this tl-trainer reads 2 to 6"
    ) as caught:
        load(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_missing_file_and_a_folder(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best\.pth: cannot be read"):
        load(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"best\.pth: cannot be read"):
        load(path)


class Malicious:
    """A pickle that leaves a file behind when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_never_executed(path: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "executed"
    content = {**content_of(example(), path), "config": Malicious(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"best\.pth: refused: it holds more than plain data"):
        load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file does nothing, so the test shows nothing"


def test_a_folder_that_is_not_there_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*best\.pth"):
        save(example(), tmp_path / "gone" / "best.pth")


def test_a_save_replaces_the_old_file_and_leaves_no_other(path: Path) -> None:
    save(example(), path)
    save(replace(example(), epoch=13), path)
    assert load(path).epoch == 13
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["best.pth"]


def test_a_disk_that_is_full_at_any_byte(path: Path) -> None:
    resource = pytest.importorskip("resource")
    save(example(), path)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, len(whole), 101):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(RunError, match=r"cannot write .*best\.pth: File too large"):
                save(replace(example(), epoch=13), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [file.name for file in path.parent.iterdir() if file.is_file()] == ["best.pth"]
    assert path.read_bytes() == whole
