"""What a run logs, as TensorBoard itself serves it and, where there is a browser, shows it."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode
from urllib.request import ProxyHandler, build_opener

import numpy as np
import pytest
import yaml
from PIL import Image

import tl_trainer
from browser import browser, rendered
from conftest import COLOURS, draw_split
from test_end_to_end import SMALL

DIRECT = build_opener(ProxyHandler({}))  # past any proxy of the environment
EVERY_EPOCH = {"train/loss", "val/loss", "val/top1", "val/top5", "lr", "time/images_per_second"}
FINAL = {f"final/{split}_{figure}" for split in ("val", "test") for figure in ("loss", "top1", "top5")}
# The page around TensorBoard: it looks through frames and shadow roots for how many points the projector has loaded.
AROUND = """<title>nothing</title><iframe src="ADDRESS#projector" width="1100" height="800"></iframe><script>
function points(root) {
  for (const element of root.querySelectorAll("*")) {
    const within = element.shadowRoot ?? element.contentDocument;
    const found = element.classList.contains("numDataPoints") ? element.textContent : within && points(within);
    if (found) return found;
  }
}
setInterval(() => { document.title = `${points(document)} points` }, 100);
</script>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one short run."""
    folder = tmp_path_factory.mktemp("tensorboard")
    for index, (split, count) in enumerate({"train": 8, "val": 4, "test": 3}.items()):
        draw_split(folder / "colours" / split, count, size=40 + index)
    folders = {"data.root": "colours", "output.dir": "runs", "features.dir": "features"}
    keys = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in SMALL)}
    keys |= {key: str(folder / name) for key, name in folders.items()}
    tl_trainer.train(None, train__epochs=3, **keys)
    return folder / "runs"


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[str]:
    """The address of TensorBoard for that run."""
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--host", "127.0.0.1", "--port", "0",
             "--load_fast=false", "--reload_interval=0", "--reload_task=blocking"]  # fmt: skip
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(120, process.kill)
        limit.start()
        try:
            assert process.stderr is not None
            said = ""
            while not (address := re.search(r"http://127\.0\.0\.1:\d+/", said)):
                line = process.stderr.readline()
                assert line, f"TensorBoard ended, saying {said}"
                said += line
            yield address.group()
        finally:
            limit.cancel()
            process.terminate()


def asked(address: str, route: str, **query: object) -> bytes:
    with DIRECT.open(f"{address}data/{route}?{urlencode(query)}", timeout=60) as answer:
        return bytes(answer.read())


def test_tensorboard_serves_what_a_run_logs(served: str, runs: Path) -> None:
    def plugin(route: str, **query: object) -> Any:
        return json.loads(asked(served, f"plugin/{route}", **query))

    listing = json.loads(asked(served, "plugins_listing"))
    enabled = {name for name, plugin in listing.items() if plugin["enabled"]}
    assert {"scalars", "images", "graphs", "text", "pr_curves", "hparams"} <= enabled

    tags = plugin("scalars/tags")["run-1"]
    assert set(tags) == EVERY_EPOCH | FINAL | {f"f1/{name}" for name in COLOURS}
    with (runs / "run-1" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = plugin("scalars/scalars", run="run-1", tag="val/loss")
    assert {step: value for _, step, value in logged} == pytest.approx(
        {int(row["epoch"]): float(row["val_loss"]) for row in rows}
    )

    assert set(plugin("images/tags")["run-1"]) == {"train/images", "val/confusion_matrix", "val/reliability"}
    for tag in ("train/images", "val/confusion_matrix", "val/reliability"):
        newest = plugin("images/images", run="run-1", tag=tag, sample=0)[-1]
        data = asked(served, "plugin/images/individualImage", **dict(parse_qsl(newest["query"])))
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert min(picture.size) > 100
    assert set(plugin("pr_curves/tags")["run-1"]) == {f"precision_recall/{name}" for name in COLOURS}

    experiment = plugin("hparams/experiment", request="{}")
    assert {"model.backbone", "train.optimizer.lr", "seed"} <= {info["name"] for info in experiment["hparamInfos"]}
    assert {info["name"]["tag"] for info in experiment["metricInfos"]} == FINAL

    assert plugin("projector/runs") == ["run-1"]
    (embedding,) = plugin("projector/info", run="run-1")["embeddings"]
    query = {"run": "run-1", "name": embedding["tensorName"]}
    tensor = np.frombuffer(asked(served, "plugin/projector/tensor", **query), np.float32)
    assert tensor.reshape(embedding["tensorShape"]).shape == (12, 12)
    assert tensor.std() > 0
    metadata = asked(served, "plugin/projector/metadata", **query).decode()
    assert metadata == "".join(f"{name}\n" * 4 for name in COLOURS)
    with Image.open(io.BytesIO(asked(served, "plugin/projector/sprite_image", **query))) as sprite:
        assert sprite.size == (4 * 48, 4 * 48)


@browser
def test_the_projector_shows_a_point_per_validation_image(
    served: str, file_server: tuple[str, Path], tmp_path: Path
) -> None:
    address, folder = file_server
    (folder / "around.html").write_text(AROUND.replace("ADDRESS", served))
    flags = ("--disable-web-security", "--disable-site-isolation-trials", "--window-size=1200,900")
    assert rendered(f"{address}/around.html", tmp_path / "profile", *flags) == "12 points"
