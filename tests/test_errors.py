"""The error tree: exit codes, the sentence about an unknown name, how a value is quoted and a name shown."""

from __future__ import annotations

import pytest

from tl_trainer import errors
from tl_trainer.errors import Interrupted, RunError, SettingError, TrainerError
from tl_trainer.ground.machine import is_out_of_memory, require_memory
from tl_trainer.ground.wording import printable, shown, unknown

CODES = {
    "TrainerError": 1,
    "RunError": 1,
    "InputError": 2,
    "DataError": 2,
    "ImageError": 2,
    "CheckpointError": 2,
    "SettingError": 2,
    "ConfigError": 2,
}


@pytest.mark.parametrize("name", CODES)
def test_exit_code(name: str) -> None:
    assert getattr(errors, name).exit_code == CODES[name]


def test_no_error_is_missing_above() -> None:
    tree = [
        value.__name__
        for value in vars(errors).values()
        if getattr(value, "__module__", "") == errors.__name__ and isinstance(value, type)
    ]
    assert sorted(tree) == sorted([*CODES, "Interrupted"])
    assert all(issubclass(getattr(errors, name), TrainerError) for name in tree)


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_a_signal_ends_with_128_and_its_number(number: int, code: int) -> None:
    assert Interrupted(number, "stopped").exit_code == code


def test_a_setting_error_keeps_key_and_message_apart() -> None:
    error = SettingError("model.tap", "wrong")
    assert (error.key, error.message, str(error)) == ("model.tap", "wrong", "model.tap: wrong")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("adm", "unknown name 'adm'; did you mean 'adam' or 'adamw'? (valid: adam, adamw, sgd)"),
        ("adamw2", "unknown name 'adamw2'; did you mean 'adamw' or 'adam'? (valid: adam, adamw, sgd)"),
        ("lion", "unknown name 'lion' (valid: adam, adamw, sgd)"),
        (5, "unknown name 5 (valid: adam, adamw, sgd)"),
        (None, "unknown name nothing (valid: adam, adamw, sgd)"),
    ],
)
def test_unknown_lists_the_valid_names_and_the_nearest(given: object, sentence: str) -> None:
    assert unknown("name", given, ["sgd", "adamw", "adam"]) == sentence


def test_unknown_does_not_list_hundreds_of_names() -> None:
    sentence = unknown("backbone", "name007x", [f"name{n:03}" for n in range(200)])
    assert "did you mean 'name007'" in sentence
    assert "(valid: 200 names, listed by `tl-train --print-schema`)" in sentence


def test_a_value_is_quoted_on_one_short_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"
    assert len(shown("x" * 100_000)) < 150
    assert len(shown([["x" * 1000] * 1000] * 1000)) < 5000
    assert len(unknown("name", "x" * 100_000, ["x"])) < 200


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("\x1b[31m\0", r"\x1b[31m\x00"),
        ("a\nb\r\tc\v", r"a\nb\r\tc\x0b"),
        ("\x7f\x85\x9b", r"\x7f\x85\x9b"),
        ("\u202egpj\u202c", r"\u202egpj\u202c"),
        ("\u2066\u200fx\u2069", r"\u2066\u200fx\u2069"),
        (b"caf\xe9\x80".decode("utf-8", "surrogateescape"), r"caf\udce9\udc80"),
    ],
)
def test_what_would_move_the_cursor_is_shown_as_an_escape(name: str, text: str) -> None:
    assert printable(name) == text
    assert printable(f"é{name}🐝") == f"é{text}🐝"
    assert text.isascii()


@pytest.mark.parametrize(
    "name",
    [
        "", "a b/c.jpg", r"$a_b$ \n <b>&amp;", "café", "cafe\u0301", "Größe", "Ελλάδα", "Москва", "עברית", "العربية",
        "हिन्दी", "ไทย", "日本語", "한국어", "ⵜⴰⵎⴰⵣⵉⵖⵜ", "🐝🦋", "☀\ufe0f", "👍🏽", "€½°",
    ],
)  # fmt: skip
def test_letters_of_every_script_and_emoji_stay_as_they_are(name: str) -> None:
    assert printable(name) == name


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution forward propagation"), False),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError(2, "No such file or directory", "out of memory/a.jpg"), False),
        (ValueError("damaged"), False),
    ],
)
def test_out_of_memory_has_many_words(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_too_little_memory_to_begin_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that start later take memory which nobody can be told is missing: the system aborts the process."""
    require_memory()
    monkeypatch.setattr(errors, "_SPARE", 1 << 62)
    with pytest.raises(RunError, match=r"^out of memory: .* close other programs"):
        require_memory()
