"""A store with what the chat stages need: text, tokenizer and a base model trained for a few steps."""

import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nanochat import ledger, pipeline
from nanochat.paths import checkpoint_dir, run_dir, tokenizer_dir
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_train
from tests.data.test_text_rows import write_source
from tests.scripts.test_base_train import words

QUESTIONS = "How many apples does Ada have now? 0123456789 + - * = #### python output "
BASE = {"depth": 1, "aspect_ratio": 32, "head_dim": 32, "max_seq_len": 128, "device_batch_size": 4,
        "total_batch_size": 1024, "num_iterations": 3, "eval_tokens": 512, "core_metric_every": -1,
        "sample_every": -1, "eval_every": -1, "source": "pydocs", "device_type": "cpu", "model_tag": "m"}  # fmt: skip


@contextmanager
def in_store(folder: Path, like: Path | None = None) -> Iterator[Path]:
    """Within, the store is `folder`, first made a copy of another, and the run is called test."""
    if like is not None:
        subprocess.run(["cp", "-r", f"{like}/.", str(folder)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setenv("NANOCHAT_RUN_ID", "test")
        yield folder


def make_text() -> None:
    """Text, and a tokenizer that knows some words of questions."""
    documents = [words(seed) + QUESTIONS for seed in range(24)]
    write_source([documents[:10], documents[10:20], documents[20:]])
    RustBPETokenizer.train_from_iterator(documents, 320).save(tokenizer_dir())


def make_base(**changes: Any) -> None:
    """A base checkpoint, tagged m unless changes say otherwise."""
    base_train.main(base_train.Settings(**{**BASE, **changes}))


def kill_before_the_ledgers_line(stage: str, train: Callable[[], None]) -> str:
    """Have the runner train `stage` (its model is tagged m), forget that it ended, as after a kill between COMPLETE and
    the ledger's line, and look again: returns the status. Fails where the second call writes anything."""
    folder = checkpoint_dir(stage, "m")
    outputs = [str(folder), str(folder / "COMPLETE")]

    def execute(*_: object) -> tuple[int, deque[str], None]:
        train()
        return 0, deque(), None

    with mock.patch.object(pipeline, "_execute", execute):
        assert pipeline.run_stage(stage, ["bash"], [], outputs) == 0
        path = ledger.ledger_path(run_dir())
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:-1]))
        assert ledger.read(run_dir())[-1]["status"] == "started"
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
        assert pipeline.run_stage(stage, ["bash"], [], outputs) == 0
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    return str(ledger.read(run_dir())[-1]["status"])
