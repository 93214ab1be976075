"""A folder has one user at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tl_trainer.ground.locks import sole_use


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = "from pathlib import Path; from tl_trainer.ground.locks import sole_use\nwith sole_use(Path('.')): pass"
    words = [sys.executable, "-c", code]
    with sole_use(tmp_path):
        refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert "another tl-train is at work in it" in refused.stderr
    assert subprocess.run(words, cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_who_waits_for_a_folder_gets_it_in_the_end(tmp_path: Path) -> None:
    code = (
        "import logging; from pathlib import Path; from tl_trainer.ground.locks import sole_use\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "with sole_use(Path('.'), wait=True): print(Path('fetched').exists())"
    )
    with sole_use(tmp_path):
        words = [sys.executable, "-c", code]
        waiting = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        assert "waiting for another process that is at work in ." in waiting.stderr.readline()
        (tmp_path / "fetched").touch()
    assert waiting.communicate(timeout=60)[0] == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_does_not_hold_the_folder(tmp_path: Path) -> None:
    """The loader's workers are forked, and live on for seconds when the run is killed."""
    with sole_use(tmp_path):
        (wait, end), (ready, begun) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(begun, b"!")
            os.close(end)
            os.read(wait, 1)
            os._exit(0)
        os.read(ready, 1)
    with sole_use(tmp_path):
        os.close(end)
    os.waitpid(child, 0)
    for descriptor in (wait, ready, begun):
        os.close(descriptor)


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with sole_use(tmp_path) as held:
        assert not held
    with pytest.raises(ValueError, match="of the block") as raised, sole_use(tmp_path):
        raise ValueError("of the block")
    assert raised.value.__context__ is None
