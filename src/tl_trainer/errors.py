"""The exceptions a user can meet, as a small tree.

Each one is shown as one to three lines that name the file, the key or the line, and the remedy. `exit_code` is what
the commands end with: 2 for a wrong input, 1 for a run that failed, 128 + the signal's number for a signal.
"""

from __future__ import annotations


class TrainerError(Exception):
    """Anything the user is told about in a sentence instead of a traceback."""

    exit_code = 1


class RunError(TrainerError):
    """The inputs were right and the run failed all the same (disk full, out of memory, a loss that is not finite)."""


class InputError(TrainerError):
    """The user's input is wrong: usage, a file, a folder."""

    exit_code = 2


class DownloadError(InputError):
    """Weights that are not here and cannot be fetched."""


class DataError(InputError):
    """The dataset is not what was announced: classes, labels, images."""


class ImageError(DataError):
    """One image file cannot be used."""


class CheckpointError(InputError):
    """A checkpoint is not ours, is damaged, or does not fit."""


class SettingError(InputError):
    """One configuration key has a wrong value; the assembler adds the file and the line.

    `key` is the dotted path as it stands in the configuration, e.g. `model.backbone` or `transforms.train[2]`.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class ConfigError(InputError):
    """Everything that is wrong with a configuration, one line each."""


class Interrupted(TrainerError):
    """A signal ended the run after its state was saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
