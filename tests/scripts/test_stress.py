"""scripts/stress in its short form: every row with a small count. And that a loss is counted, said and ends with 1."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from stress import __main__ as stress
from stress import hosts, tools

COUNTS = {
    "kill-training": 3,
    "kill-save": 8,
    "fsync-order": 6,
    "workers": 1,
    "disk-full": 2,
    "damaged-last": 10,
    "two-at-once": 2,
    "signals": 4,
    "orphans": 1,
    "killed-worker": 1,
    "small-shm": 2,
    "out-of-memory": 3,
    "extreme-shapes": 1,
    "second-user": 3,
    "malicious": 8,
    "mutated-checkpoints": 150,
    "mutated-images": 400,
    "odd-files": 2,
    "replaced-files": 4,
    "dataset-untouched": 1,
    "yaml": 18,
    "downloads": 4,
    "escapes": 2,
    "killed-ranks": 1,
    "ended-agents": 2,
    "two-nodes": 1,
    "shards": 120,
    "million": 4_000,
}
SLOW = ("ended-agents", "million")  # torchrun takes seconds to start


def test_every_row_has_a_short_form() -> None:
    assert COUNTS.keys() == stress.ROWS.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in stress.ROWS]
)
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    row, _ = stress.ROWS[name]
    try:
        outcome = row(COUNTS[name], tmp_path, random.Random(name))
    except tools.NotRun as reason:
        pytest.skip(str(reason))
    assert outcome.tried >= 1
    assert outcome.lost == 0, outcome.notes


def test_a_loss_is_in_the_table_and_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def losing(count: int, folder: Path, rng: random.Random) -> Any:
        outcome = tools.Outcome()
        for number in range(count):
            outcome.count("the weights" if number == 1 else None)
        return outcome

    def lacking(count: int, folder: Path, rng: random.Random) -> Any:
        raise tools.NotRun("needs root")

    monkeypatch.setattr(stress, "ROWS", {"losing": (losing, 40), "lacking": (lacking, 5)})
    monkeypatch.setattr(logging.getLogger("tl_trainer"), "setLevel", lambda level: None)  # the tests after this one log
    monkeypatch.setattr(sys, "argv", ["stress", "--share", "0.1", "--seed", "7"])
    assert stress.main() == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0] == "seed 7"
    assert table[2].split()[:3] == ["losing", "4", "1"]
    assert table[2].endswith("lost: the weights")
    assert table[3].endswith("not run: needs root")
    assert json.loads(last)["lost"] == 1
    monkeypatch.setattr(sys, "argv", ["stress", "lacking"])
    assert stress.main() == 0


def test_two_runs_are_the_same_only_if_everything_is() -> None:
    assert tools.difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) is None
    assert tools.difference({"a": "1"}, {"a": "1", "b": "2"}) == "b is None, not 2"
    assert tools.difference({"a": "1", "b": "3"}, {"a": "1", "b": "2"}) == "b is 3, not 2"


@pytest.mark.parametrize(("code", "signal_number"), [(3, 0), (0, 9)])
def test_a_child_gives_its_code_and_its_words(code: int, signal_number: int, tmp_path: Path) -> None:
    def body() -> int:
        print("a word", file=sys.stderr)  # noqa: T201
        if signal_number:
            tools.time.sleep(tools.PATIENCE)
        return code

    child = tools.Child(body, tmp_path)
    if signal_number:
        while "a word" not in child.said():
            tools.time.sleep(0.01)
        child.signal(signal_number)
    assert child.wait() == (-signal_number or code)
    assert child.said() == "a word\n"
    assert not child.group_alive()


ORDERLY = [  # as strace aligns them: short calls with spaces
    'write(7</r/.last.pth-1.tmp>, ""..., 9)  = 9',
    "fsync(7</r/.last.pth-1.tmp>)            = 0",
    'rename("/r/.last.pth-1.tmp", "/r/last.pth") = 0',
    "fsync(7</r>)                            = 0",
]


@pytest.mark.parametrize(
    ("calls", "problems"),
    [
        (ORDERLY * 2, [None, None]),
        ([ORDERLY[0], *ORDERLY[2:]], ["the last call before the rename to last.pth was write, not fsync"]),
        ([ORDERLY[1], ORDERLY[0], *ORDERLY[2:]], ["the last call before the rename to last.pth was write, not fsync"]),
        (ORDERLY[2:], ["the last call before the rename to last.pth was nothing, not fsync"]),
        (ORDERLY[:3], ["the folder was not synced after /r/last.pth"]),
        (ORDERLY[:3] + ORDERLY, ["the folder was not synced after /r/last.pth", None]),
        (['renameat2(AT_FDCWD, "/r/a", AT_FDCWD, "/r/best.pth", 0) = 0'],
         ["the last call before the rename to best.pth was nothing, not fsync"]),
        (['rename("/r/a", "/r/best.pth")           = 0'],
         ["the last call before the rename to best.pth was nothing, not fsync"]),
        (['rename("/r/a", "/r/config.yaml")        = 0'], []),
    ],
)  # fmt: skip
def test_the_order_of_a_save_is_read_from_the_trace(calls: list[str], problems: list[str | None]) -> None:
    assert list(hosts.out_of_order(calls)) == problems
