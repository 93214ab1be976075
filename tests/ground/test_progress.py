"""Bars are drawn for those who asked, on a terminal, and the items are the same either way."""

from __future__ import annotations

import contextlib
import io
import threading

import pytest

from tl_trainer.ground.progress import StatusLine, bar, bars, bars_shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(screen: io.StringIO, *, shown: bool) -> str:
    with contextlib.redirect_stderr(screen), bars(shown):
        assert list(bar(range(3), "checking images", 3, unit="img")) == [0, 1, 2]
    return screen.getvalue()


def test_a_bar_is_drawn_on_a_terminal_where_it_was_asked_for() -> None:
    assert "checking images: " in drawn(Terminal(), shown=True)
    assert drawn(Terminal(), shown=False) == ""
    assert drawn(io.StringIO(), shown=True) == ""


def test_without_bars_the_items_are_passed_on_as_they_are() -> None:
    items = iter([1])
    assert bar(items, "images") is items


def test_what_was_asked_for_holds_within_the_block_only() -> None:
    assert not bars_shown()
    with pytest.raises(ValueError, match="of the block"), bars(True):
        with bars(False):
            assert not bars_shown()
        assert bars_shown()
        raise ValueError("of the block")
    assert not bars_shown()


def test_another_thread_has_not_asked() -> None:
    seen: list[bool] = []
    with bars(True):
        thread = threading.Thread(target=lambda: seen.append(bars_shown()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_a_status_line_is_written_over_and_leaves_nothing() -> None:
    screen = Terminal()
    with contextlib.redirect_stderr(screen), bars(True):
        status = StatusLine()
        assert status.possible
        for number in range(50):
            status.show(f"epoch {number}")
        status.close()
    assert "epoch 0" in screen.getvalue()
    assert "\n" not in screen.getvalue()
    assert screen.getvalue().endswith("\r")
    assert screen.getvalue().rstrip("\r").rpartition("\r")[2].strip() == ""


@pytest.mark.parametrize(("screen", "shown"), [(Terminal(), False), (io.StringIO(), True)])
def test_there_is_no_status_line_where_there_are_no_bars(screen: io.StringIO, shown: bool) -> None:
    with contextlib.redirect_stderr(screen), bars(shown):
        assert not StatusLine().possible
