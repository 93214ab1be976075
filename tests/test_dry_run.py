"""A dry run: as far as the first batch, and nothing on disk."""

from __future__ import annotations

from pathlib import Path

from test_run import WORDS
from tl_trainer.config.load import load
from tl_trainer.dry_run import dry_run


def test_a_dry_run_reads_images_and_writes_nothing(colours: Path, tmp_path: Path) -> None:
    loaded, before = load(None, [("data.root", str(colours)), *WORDS]), sorted(tmp_path.rglob("*"))
    assert dry_run(loaded)["first_batch"] == [8, 3, 64, 64]
    assert sorted(tmp_path.rglob("*")) == before
