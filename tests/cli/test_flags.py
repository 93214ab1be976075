"""The commands' public surface, held still: flags, exit codes, what an error looks like, what --help costs."""

from __future__ import annotations

import argparse
import gc
import io
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

import tl_trainer.resume
from conftest import Run
from tl_trainer import __version__, errors
from tl_trainer.cli import check as tl_check
from tl_trainer.cli import eval as tl_eval
from tl_trainer.cli import export as tl_export
from tl_trainer.cli import predict as tl_predict
from tl_trainer.cli import train as tl_train
from tl_trainer.cli.main import TTA, _check_floors, new_parser, run_command
from tl_trainer.config.load import load
from tl_trainer.config.schema import Config
from tl_trainer.data.transforms import tta_pipelines

COMMANDS = {
    "train": tl_train,
    "check": tl_check,
    "eval": tl_eval,
    "predict": tl_predict,
    "export": tl_export,
}
COMMON = ["--debug", "--help", "--quiet", "--verbose", "--version", "-h", "-v"]
FLAGS = {
    "train": [
        "--add-class", "--apply", "--batch-size", "--check", "--checkpoint", "--clear-cache", "--config", "--data-dir",
        "--device", "--dry-run", "--epochs", "--find-lr", "--folds", "--from", "--json", "--list", "--lr", "--output",
        "--print-config", "--print-schema", "--resume", "--seed", "--workers", "-b", "-j", "words",
    ],
    "check": ["--config", "--data-dir", "--device", "--json", "--output", "--workers", "-j", "words"],
    "eval": [
        "--batch-size", "--checkpoint", "--coverage", "--data-dir", "--device", "--ignore-extra", "--json",
        "--on-bad-image", "--report", "--split", "--tta", "--workers", "-b", "-j", "overrides",
    ],
    "export": ["--checkpoint", "--force", "--from", "--json", "--to", "out", "overrides"],
    "predict": [
        "--batch-size", "--checkpoint", "--coverage", "--device", "--embed", "--explain", "--force", "--format",
        "--neighbours", "--output", "--reject", "--topk", "--tta", "-b",
        "paths",
    ],
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("own_logging")

# What there is


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_are_these(command: str) -> None:
    actions = COMMANDS[command].build_parser()._actions
    names = [name for action in actions for name in action.option_strings or [action.dest]]
    assert sorted(names) == sorted(COMMON + FLAGS[command])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_explained(command: str) -> None:
    parser = COMMANDS[command].build_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    assert parser.description and parser.epilog


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_can_be_parsed(command: str) -> None:
    parser = COMMANDS[command].build_parser()
    lines = [line for line in (parser.epilog or "").splitlines() if f"tl-{command} " in line]
    assert lines
    for line in lines:
        words = re.findall(r"'[^']*'|\S+", line.partition(f"tl-{command} ")[2])
        parser.parse_intermixed_args([word.strip("'") for word in words])


def test_every_short_flag_of_tl_train_is_a_key_of_the_configuration() -> None:
    options = vars(tl_train.build_parser().parse_args([]))
    for flag, key in tl_train.FLAGS.items():
        assert flag in options
        value: Any = Config()
        for part in key.split("."):
            value = getattr(value, part)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_garbage_collector_rests_while_torch_is_imported(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collecting = []

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "tl_trainer.api":
                collecting.append(gc.isenabled())
                raise KeyboardInterrupt

    for name in ("torch", "tl_trainer.api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(tl_trainer, "api", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    words = {
        "train": ["--dry-run"],
        "check": ["demo.yaml"],
        "eval": ["--checkpoint", "x"],
        "predict": ["a.jpg", "--checkpoint", "x"],
        "export": ["a.onnx", "--to", "onnx", "--checkpoint", "x"],
    }
    try:
        assert COMMANDS[command].main(words[command]) == 130
        assert collecting == [False]
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_choices_and_defaults() -> None:
    args = tl_predict.build_parser().parse_args(["a.jpg", "b.jpg"])
    assert (args.paths, args.topk, args.format, args.output) == (["a.jpg", "b.jpg"], 5, "text", None)
    for value in ("text", "json", "jsonl", "csv"):
        assert tl_predict.build_parser().parse_args(["-", "--format", value]).format == value
    for value in ("train", "val", "test", "all"):
        assert tl_eval.build_parser().parse_args(["--checkpoint", "x", "--split", value]).split == value


def test_each_choice_of_tta_is_one_that_the_transforms_know() -> None:
    steps = [{"CenterCrop": 8}, {"ToImage": None}]
    assert {name: len(tta_pipelines(steps, name)) for name in TTA} == {"flip": 2, "fivecrop": 5, "tencrop": 10}
    for command, words in ((tl_eval, ["--checkpoint", "x"]), (tl_predict, ["x"])):
        assert command.build_parser().parse_args(words).tta is None
        assert [command.build_parser().parse_args([*words, "--tta", name]).tta for name in TTA] == [*TTA]


@pytest.mark.parametrize("command", COMMANDS)
def test_installed_commands_say_their_version_and_help(command: str, tl: Run) -> None:
    [installed] = entry_points(group="console_scripts", name=f"tl-{command}")
    assert installed.value == f"tl_trainer.cli.{command}:main"
    assert tl(command, "--version").stdout == f"tl-trainer {__version__}\n"
    result = tl(command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: tl-{command} ")


@pytest.mark.parametrize(
    ("command", "words", "imported"),
    [
        *((command, ["--help"], []) for command in COMMANDS),
        *(("train", ["--list", what], ["pydantic"]) for what in ("configs", "runs")),
    ],
)
def test_help_and_lists_of_files_import_nothing_slow(command: str, words: list[str], imported: list[str]) -> None:
    Path("runs", "a-1").mkdir(parents=True)
    Path("runs", "a-1", "best.pth").touch()
    code = f"""if True:
        import sys
        from tl_trainer.cli.{command} import main
        try:
            end = main({words})
        except SystemExit as raised:
            end = raised.code
        assert end == 0
        print(sorted({{"torch", "torchvision", "pydantic", "numpy", "PIL"}} & set(sys.modules)))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == str(imported)


# Exit codes

EMPTY = [
    ("train", ["--data-dir", ""]),
    ("train", ["--output", ""]),
    ("eval", ["--checkpoint", ""]),
    ("eval", ["--checkpoint", "best.pth", "--data-dir", ""]),
    ("eval", ["--checkpoint", "best.pth", "--report", ""]),
    ("export", ["", "--to", "onnx"]),
    ("predict", [""]),
    ("predict", ["a.jpg", "--checkpoint", ""]),
    ("predict", ["a.jpg", "--explain", ""]),
    ("predict", ["a.jpg", "--output", ""]),
]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--nonsense"]),
        ("train", ["--epochs", "many"]),
        ("train", ["--lr"]),
        ("train", ["--config"]),
        ("eval", ["--checkpoint", "best.pth", "--split", "dev"]),
        ("eval", ["--checkpoint", "best.pth", "--stray"]),
        ("export", ["a.onnx"]),
        ("export", ["a.onnx", "--to", "tflite"]),
        ("predict", []),
        ("predict", ["a.jpg", "--format", "xml"]),
        ("predict", ["a.jpg", "--topk", "x"]),
        *EMPTY,
    ],
)
def test_a_usage_error_ends_with_2(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        COMMANDS[command].main(words)
    assert end.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"tl-{command}: error: " in output.err
    assert ("is empty; is a shell variable not set?" in output.err) == ((command, words) in EMPTY)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["--config", "nope"], "tl-train: --config nope: no such file, and unknown bundled configuration"),
        ("train", ["photos"], "tl-train: 'photos' is no folder and no CSV file here, and not key=value\n"),
        ("train", ["--epochs", "0"], "tl-train: the command line: train.epochs: should be 1 or more"),
        ("train", ["--lr", "nan"], "tl-train: the command line: train.optimizer.lr: should be "),
        (
            "train",
            ["--resume", "nope"],
            "tl-train: --resume nope: no such file; give a run directory or its last.pth\n",
        ),
        ("eval", ["--checkpoint", "nope"], "tl-eval: nope: cannot be read: No such file or directory\n"),
        ("train", ["a=" + "x" * 5000], "tl-train: the command line: a: unknown key 'a'"),
        ("train", ["--resume", "a=" + "x" * 5000], "tl-train: the command line: a: unknown key 'a'"),
        ("train", ["x" * 5000], "tl-train: 'xxx"),
        ("eval", [], "tl-eval: no checkpoint: give --checkpoint FILE or set TL_CHECKPOINT; ./runs has no best.pth\n"),
        ("predict", ["a.jpg"], "tl-predict: no checkpoint: give --checkpoint FILE or set TL_CHECKPOINT; ./runs has no"),
    ],
)
def test_a_wrong_input_is_a_sentence_and_ends_with_2(
    command: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[command].main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert len(output.err.splitlines()) <= 3
    assert "Traceback" not in output.err


def fail_with(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def command(args: argparse.Namespace) -> int:
        raise error

    return command


NO_MEMORY = "tl-x: out of memory; lower --batch-size, or the number of --workers\n"


class OutOfMemoryError(RuntimeError):
    """torch's has this name too."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.TrainerError("so"), 1, "tl-x: so\n"),
        (errors.RunError("so"), 1, "tl-x: so\n"),
        (errors.InputError("so"), 2, "tl-x: so\n"),
        (errors.DataError("so"), 2, "tl-x: so\n"),
        (errors.ImageError("so"), 2, "tl-x: so\n"),
        (errors.CheckpointError("so"), 2, "tl-x: so\n"),
        (errors.SettingError("model.tap", "so"), 2, "tl-x: model.tap: so\n"),
        (errors.ConfigError("a: so\nb: so"), 2, "tl-x: a: so\nb: so\n"),
        (errors.Interrupted(2, "so"), 130, "tl-x: so\n"),
        (errors.Interrupted(15, "so"), 143, "tl-x: so\n"),
        (KeyboardInterrupt(), 130, "tl-x: interrupted\n"),
        (OutOfMemoryError("CUDA"), 1, "tl-x: the GPU is out of memory; lower --batch-size or use --device cpu\n"),
        (MemoryError(), 1, NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, NO_MEMORY),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n...: can't allocate memory"), 1, NO_MEMORY),
        (OSError(12, "Cannot allocate memory", "a.jpg"), 1, NO_MEMORY),
        (
            ImportError("/x/lib.so: failed to map segment from shared object"),
            1,
            "tl-x: /x/lib.so: failed to map segment from shared object; close other programs or raise the limit on "
            "memory (ulimit -v), unless it is mounted noexec\n",
        ),
        (OSError(36, "File name too long", "x" * 5000), 1, f"tl-x: '{'x' * 57}...{'x' * 58}': File name too long\n"),
        (errors.InputError("a\x1b[2J\nb\r"), 2, "tl-x: a\\x1b[2J\nb\\r\n"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            "tl-x: a process that loads images was killed, perhaps because memory ran out; try fewer with --workers\n",
        ),
        (KeyError("x"), 1, "tl-x: unexpected KeyError: 'x'\nrun it again with --debug to see where\n"),
    ],
)
def test_an_error_is_shown_and_ends_with_its_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(new_parser("tl-x", "", ""), fail_with(error), []) == code
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("error", [errors.InputError("so"), KeyError("x")])
def test_debug_shows_the_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(new_parser("tl-x", "", ""), fail_with(error), ["--debug"])
    assert code == (2 if isinstance(error, errors.InputError) else 1)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert "in command" in shown and "\ntl-x: " in shown


def test_a_closed_pipe_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run_command(new_parser("tl-x", "", ""), fail_with(BrokenPipeError()), []) == 141
    assert stderr.closed


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], ["note", "warning: careful"]),
        (["--quiet"], ["warning: careful"]),
        (["-v"], ["debug: detail", "note", "warning: careful"]),
    ],
)
def test_how_much_is_said(words: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def command(args: argparse.Namespace) -> int:
        log = logging.getLogger("tl_trainer.somewhere")
        log.debug("detail")
        log.info("note")
        log.warning("careful")
        return 0

    assert run_command(new_parser("tl-x", "", ""), command, words) == 0
    output = capsys.readouterr()
    assert (output.out, output.err.splitlines()) == ("", shown)


# Version floors


def test_the_floors_are_those_of_the_advisories() -> None:
    required = {text.partition(";")[0].strip() for text in metadata.requires("tl-trainer") or []}
    assert {"torch>=2.10", "pillow>=12.3"} <= required


@pytest.mark.parametrize(
    ("command", "words"),
    [("train", ["--print-config"]), ("eval", ["--checkpoint", "x"]), ("predict", ["x.jpg"])],
)
@pytest.mark.parametrize(
    ("library", "version", "message"),
    [
        (
            "torch",
            "2.9.1+cu128",
            "torch 2.9.1+cu128 is installed, >=2.10 is needed; run: pip install --upgrade 'torch>=2.10'",
        ),
        ("pillow", "12.2.0", "pillow 12.2.0 is installed, >=12.3 is needed; run: pip install --upgrade 'pillow>=12.3'"),
    ],
)
def test_a_library_below_its_floor_is_refused_in_one_line(
    command: str,
    words: list[str],
    library: str,
    version: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _check_floors.cache_clear()
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == library else installed(name))
    assert COMMANDS[command].main(words) == 2
    assert capsys.readouterr() == ("", f"tl-{command}: {message}\n")


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cpu", "2.11.0.dev20260101", "3.0"])
def test_a_library_at_its_floor_or_above_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_floors.cache_clear()
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "torch" else installed(name))
    assert run_command(new_parser("tl-x", "", ""), lambda args: 0, []) == 0


# tl-train: from words to a configuration


def test_print_config_shows_what_the_words_and_flags_make_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.tap=pooled", "--config", "demo", "train.epochs=3", "--epochs", "4", "-b", "7", "--lr", "1e-2"]
    words += [
        "--data-dir",
        "photos",
        "-j",
        "2",
        "--device",
        "cpu",
        "--seed",
        "5",
        "--output",
        "out",
        "model.tap=logits",
    ]
    assert tl_train.main([*words, "--print-config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    config, demo = load("printed.yaml").config, load("demo").config
    assert (config.train.epochs, config.train.batch_size, config.train.optimizer.lr) == (4, 7, 1e-2)
    assert (config.data.root, config.data.workers, config.device) == ("photos", 2, "cpu")
    assert (config.seed, config.output.dir, config.model.tap) == (5, "out", "logits")
    assert (config.model.backbone, config.train.schedule) == (demo.model.backbone, demo.train.schedule)


def test_print_schema_is_json_with_the_known_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert tl_train.main(["--print-schema"]) == 0
    printed = capsys.readouterr().out
    for name in ('"resnet152"', '"RandomRotation"', '"additionalProperties": false'):
        assert name in printed


@pytest.mark.parametrize(
    ("words", "target", "overrides"),
    [
        (["--resume"], None, []),
        (["--resume", "runs/demo-1"], "runs/demo-1", []),
        (["--resume", "train.epochs=3"], None, [("train.epochs", 3)]),
        (
            ["device=cpu", "--resume", "train.epochs=3", "--seed", "1"],
            None,
            [("device", "cpu"), ("train.epochs", 3), ("seed", 1)],
        ),
        (["--resume", "lr=1e-3"], "lr=1e-3", []),
    ],
)
def test_resume_takes_a_run_or_nothing_and_never_an_override(
    words: list[str], target: str | None, overrides: list[tuple[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def resume(*arguments: object, hold: bool, again: bool) -> None:
        assert hold and not again
        calls.append(arguments)
        raise errors.InputError("seen")

    Path("lr=1e-3").mkdir()
    monkeypatch.setattr(tl_trainer.resume, "resume", resume)
    assert tl_train.main(["--config", "demo", *words]) == 2
    assert calls == [(target, "demo", overrides)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "two datasets: a and b; give one"),
        (["a", "--data-dir", "b"], "two datasets: a and b; give one"),
        (["config=x"], "config: no key of the configuration"),
        (["train__epochs=5"], "train__epochs: no key of the configuration"),
        (["c"], "'c' is no folder and no CSV file here, and not key=value"),
    ],
)
def test_words_that_cannot_be_meant(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
    assert tl_train.main(words) == 2
    assert capsys.readouterr().err.startswith(f"tl-train: {message}")


def test_data_beside_a_configuration_is_what_it_is_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    Path("dogs").mkdir()
    Path("dogs/labels.csv").write_text("id,label\n")
    assert tl_train.main(["--config", "demo", "dogs/labels.csv", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["data"]["source"], printed["data"]["root"], printed["train"]["epochs"]) == ("csv", "dogs", 100)
