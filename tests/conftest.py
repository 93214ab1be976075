"""What the tests share: pictures made on the spot, the commands, a file server on this machine."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

# Networks this small lose more by waiting for a second thread than they gain, above all on a busy machine. Read when
# NumPy, SciPy and torch are imported; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from PIL import Image

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "hymenoptera_data"
COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_finish() -> None:
    """Spare the collector the modules and tests, which stay to the end: it would look through all of them again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches, and each works in a folder of its own."""
    monkeypatch.setenv("TL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("TL_CHECKPOINT", raising=False)
    monkeypatch.chdir(tmp_path)


def draw_split(folder: Path, count: int, size: int = 40, classes: dict[str, tuple[int, int, int]] = COLOURS) -> None:
    """`count` JPEG files per class, each nearly its class's colour, so that a linear head learns them at once."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            shade = tuple(max(0, min(255, value + 7 * (index % 5) - 14)) for value in colour)
            Image.new("RGB", (size + index, size), shade).save(folder / name / f"{index:02}.jpg")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Ctrl-C interrupts, as at a terminal: a shell starts what it puts into the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def own_logging() -> Iterator[None]:
    """The package's logger as it was, after commands that set it up."""
    package = logging.getLogger("tl_trainer")
    handlers, level = package.handlers[:], package.level
    yield
    package.handlers[:] = handlers
    package.setLevel(level)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run in this process draw nothing for TensorBoard, which takes more than the rest of a run this small.

    What it draws is for test_tracking.py and test_tensorboard.py.
    """
    monkeypatch.setattr("tl_trainer.tracking.Tracker._draw", lambda *_: None)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a report in this process show one blank pixel for each figure: matplotlib takes a second for each.

    What they show is for test_plots.py and test_report.py.
    """
    blank = io.BytesIO()
    Image.new("RGB", (1, 1)).save(blank, "PNG")
    for module in ("evaluation", "outcome"):
        monkeypatch.setattr(f"tl_trainer.{module}.png", lambda figure: blank.getvalue())


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """An ImageFolder with train and val: three classes of nearly uniform colour, 8 and 4 images each."""
    draw_split(tmp_path / "colours" / "train", 8)
    draw_split(tmp_path / "colours" / "val", 4, size=41)  # no copies of those
    return tmp_path / "colours"


@pytest.fixture
def photos() -> Path:
    """Real photographs, which are not part of the project."""
    if not PHOTOS.is_dir():
        pytest.skip(f"the hymenoptera photographs are not at {PHOTOS}")
    return PHOTOS


def console(command: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a console command in a process of its own, as a user would."""
    words = [str(Path(sys.executable).with_name(f"tl-{command}")), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


def load_script(path: Path) -> ModuleType:
    """A script as a module, so that its functions can be tested."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tl(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a console command's entry point in this process, which saves the seconds that importing torch takes."""

    def run(command: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in arguments]
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = importlib.import_module(f"tl_trainer.cli.{command}").main(words)
            except SystemExit as exit_:
                code = exit_.code
        return subprocess.CompletedProcess([f"tl-{command}", *words], code, out.getvalue(), err.getvalue())

    return run


def last_json(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object that a command printed; fails with its stderr where it did not end with 0."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1, result.stdout
    found: dict[str, Any] = json.loads(result.stdout)
    return found


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(URL, folder) of an HTTP server on 127.0.0.1 that serves the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()
