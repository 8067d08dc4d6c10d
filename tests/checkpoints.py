"""Checkpoints for tests: one save, waited for."""

from pathlib import Path
from typing import Any

from torch import nn

from nanochat.checkpoint import step_dir
from nanochat.saver import Saver


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Any, meta: dict[str, Any]) -> Path:
    """Write one checkpoint, model.safetensors included; every rank calls this. Returns its folder."""
    saver = Saver(folder, model, optimizer, keep_last=1_000_000)
    try:
        saver.save(step, meta, last=True)
        saver.wait()
    finally:
        saver.close()
    return step_dir(folder, step)
