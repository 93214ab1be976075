"""The README tells the truth: its map is the import contract and the code, its YAML the defaults, its files exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from tl_trainer.config.load import bundled_folder
from tl_trainer.config.schema import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _map() -> list[list[str]]:
    """The modules of each floor, from the top down."""
    rows = README.split("| floor | module of `tl_trainer` | what it does |")[1].splitlines()[2:]
    found = [re.fullmatch(r"\| (\d+) \| `([a-z_.]+)` \| [^|]+ \|", row) for row in rows if row.startswith("|")]
    pairs = [(int(row[1]), row[2]) for row in found if row]
    assert len(pairs) == len(found)
    floors = sorted({floor for floor, _ in pairs}, reverse=True)
    assert floors == list(range(len(floors), 0, -1))
    return [[name for floor, name in pairs if floor == number] for number in floors]


def test_the_map_names_every_module_once() -> None:
    source = ROOT / "src" / "tl_trainer"
    modules = {
        path.relative_to(source).with_suffix("").as_posix().replace("/", ".")
        for path in source.rglob("*.py")
        if path.name != "__init__.py"
    }
    named = [name for row in _map() for name in row]
    assert sorted(named) == sorted(modules)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_map_is_the_contract_that_is_enforced() -> None:
    import tomllib

    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [layer.split(" | ") for layer in contract["layers"]]
    below_the_commands = [row for row in _map() if not row[0].startswith("cli.")]
    assert layers[0] == ["cli"]
    assert below_the_commands == layers[1:]


def test_the_configuration_shown_is_the_defaults() -> None:
    shown = yaml.safe_load(README.split("```yaml\n")[1].split("```")[0].replace("1e-3", "0.001"))
    assert shown == Config().model_dump()


def test_every_bundled_configuration_is_listed() -> None:
    listed = re.findall(r"^\| `([a-z0-9-]+\.yaml)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in bundled_folder().glob("*.yaml"))


def test_every_script_it_names_is_there() -> None:
    for name in re.findall(r"scripts/[a-z_0-9./]+[a-z]", README):
        assert (ROOT / name).is_file(), name


def test_no_file_and_no_function_has_outgrown_its_room() -> None:
    import ast

    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
