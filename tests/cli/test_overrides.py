"""Keys on top of a checkpoint: tl-eval and tl-predict take key=value for what the checkpoint has not decided."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import Run, last_json
from test_end_to_end import SMALL
from tiny import tiny_template
from tl_trainer import api, checkpoint, errors
from tl_trainer.cli import eval as tl_eval
from tl_trainer.cli import predict as tl_predict
from tl_trainer.cli import train as tl_train

COMMANDS = {"train": tl_train, "eval": tl_eval, "predict": tl_predict}


pytestmark = pytest.mark.usefixtures("own_logging")

ON_A_CHECKPOINT = {"eval": ["--checkpoint", "best.pth"], "predict": ["a.jpg", "--checkpoint", "best.pth"]}
FIXED = (
    "is fixed by the checkpoint; keys that can be set: device, data.source, data.root, data.download, "
    "data.val_fraction, data.on_bad_image, data.on_duplicates, data.skip, data.max_megapixels, data.workers, "
    "data.csv.label_separator, data.csv.label_columns, data.csv.multilabel_columns, data.csv.labels, data.csv.images,"
    " data.csv.image_column, data.csv.label_column, data.csv.split_column, data.csv.suffix, data.webdataset.train, "
    "data.webdataset.val, data.webdataset.test, data.webdataset.image, data.webdataset.label, "
    "data.webdataset.classes, data.parquet.label_separator, data.parquet.label_columns, "
    "data.parquet.multilabel_columns, data.parquet.files, data.parquet.image_column, data.parquet.label_column, "
    "data.parquet.split_column, features.cache, features.views, features.dir, features.limit_gb, train.batch_size, "
    "train.precision, output.neighbours_mb"
)


@pytest.mark.parametrize("command", ON_A_CHECKPOINT)
@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["features.cach=off"],
            ["features.cach: unknown key 'cach'; did you mean 'cache'? (valid: cache, dir, limit_gb, views)"],
        ),
        (
            ["devise=cpu"],
            [
                "devise: unknown key 'devise'; did you mean 'device'? (valid: data, device, features, model, output, "
                "performance, seed, train, transforms)"
            ],
        ),
        (["features.cache=maybe"], ["features.cache: unknown value 'maybe' (valid: auto, off)"]),
        (["model.backbone=x"], [f"model.backbone: {FIXED}"]),
        (["train.epochs=3"], [f"train.epochs: {FIXED}"]),
        (["seed=1", "device=cpu", "output.dir=x"], [f"seed: {FIXED}", f"output.dir: {FIXED}"]),
    ],
)
def test_a_wrong_key_on_top_of_a_checkpoint_is_refused_with_the_right_ones(
    command: str, words: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tiny_template(), Path("best.pth"))
    assert COMMANDS[command].main([*ON_A_CHECKPOINT[command], *words]) == 2
    lines = "\n".join(f"the command line: {message}" for message in messages)
    assert capsys.readouterr() == ("", f"tl-{command}: {lines}\n")


@pytest.mark.parametrize(
    ("command", "words"),
    [("train", ["--config", "demo"]), *((name, ON_A_CHECKPOINT[name]) for name in ON_A_CHECKPOINT)],
)
@pytest.mark.parametrize(
    "word", ["progress=true", "config=x", "checkpoint=x", "resume=x", "stop=x", "data__root=x", "features.cache__x=off"]
)
def test_a_name_that_only_the_api_knows_is_no_key(
    command: str, words: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tiny_template(), Path("best.pth"))
    assert COMMANDS[command].main([*words, word]) == 2
    key = word.partition("=")[0]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"tl-{command}: {key}: no key of the configuration; write key=value")


@pytest.mark.parametrize(
    ("command", "words", "overrides"),
    [
        (
            "eval",
            ["features.cache=off", "--data-dir", "b", "-b", "7", "-j", "2", "--on-bad-image", "skip", "data.workers=1"],
            {"features.cache": "off", "data.root": "b", "train.batch_size": 7, "data.workers": 2,
             "data.on_bad_image": "skip"},
        ),
        ("predict", ["device=cuda", "--device", "cpu", "features.limit_gb=1.5"], {"device": "cpu",
         "features.limit_gb": 1.5}),
        ("predict", [], {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("quiet", [False, True])
def test_words_and_flags_are_keys_and_a_flag_wins(
    command: str, words: list[str], overrides: dict[str, object], quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []

    def load_(path: object, **given: object) -> None:
        calls.append({"path": str(path), **given})
        raise errors.InputError("seen")

    monkeypatch.setattr(api, "load", load_)
    assert COMMANDS[command].main([*ON_A_CHECKPOINT[command], *words, *["--quiet"] * quiet]) == 2
    assert calls == [{"path": "best.pth", "progress": not quiet, **overrides}]


def test_a_key_alone_names_no_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert tl_predict.main(["features.cache=off", "--checkpoint", "best.pth"]) == 2
    assert (
        capsys.readouterr().err
        == "tl-predict: no images: give files, folders, tar archives, globs, or - for paths on stdin\n"
    )


@pytest.mark.parametrize("word", ["stray", "stray.yaml"])
def test_a_stray_word_is_no_key(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is suggested instead is something that the command takes."""
    assert tl_eval.main(["--checkpoint", "best.pth", word]) == 2
    assert capsys.readouterr().err == (
        f"tl-eval: {word!r} is not an override; write key=value, e.g. features.cache=off\n"
    )
    assert tl_train.main(["--config", "demo", "stray.yaml"]) == 2
    assert capsys.readouterr().err == "tl-train: 'stray.yaml' is not an override; write --config stray.yaml\n"


@pytest.mark.parametrize("command", ON_A_CHECKPOINT)
def test_a_key_that_only_the_api_knows_is_answered_with_one_that_the_command_takes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[command].main([*ON_A_CHECKPOINT[command], "stop=1"]) == 2
    assert capsys.readouterr().err.endswith("write key=value, e.g. features.cache=off\n")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("class=*.jpg", "class=*.jpg: nothing matches"),
        ("class=?.jpg", "class=?.jpg: nothing matches"),
        ("a=" + "x" * 5000, "the command line: a: unknown key 'a'"),
        ("transforms.eval=[{Resize: 64}]", "the command line: transforms.eval: is fixed by the checkpoint"),
    ],
)
def test_a_glob_is_no_key_and_a_word_may_be_long(word: str, message: str, tl: Run, colours: Path) -> None:
    last_json(tl("train", "--data-dir", colours, "--epochs", 1, "--json", *SMALL))
    refused = tl("predict", colours / "val" / "red" / "00.jpg", word)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"tl-predict: {message}")
    shutil.copyfile(colours / "val" / "red" / "00.jpg", "class=1.jpg")
    if "class" in word:
        assert tl("predict", word).stdout.startswith("class=1.jpg  ")


@pytest.mark.parametrize(("flag", "name"), [("--topk", "--topk"), ("-b", "-b/--batch-size")])
def test_numbers_of_tl_predict_are_positive(flag: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tl_predict.main(["a.jpg", flag, "0"])
    assert ended.value.code == 2
    assert f"argument {name}: must be 1 or more, not 0" in capsys.readouterr().err
