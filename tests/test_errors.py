"""The error tree: exit codes, the sentence about an unknown name, how a value is quoted and a name shown."""

from __future__ import annotations

import pytest

from tl_trainer import errors
from tl_trainer.errors import Interrupted, SettingError, TrainerError

CODES = {
    "TrainerError": 1,
    "RunError": 1,
    "InputError": 2,
    "DownloadError": 2,
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
