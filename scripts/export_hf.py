"""Write a checkpoint as a folder that Hugging Face Transformers loads, and put it on the hub.

    python -m scripts.export_hf -i sft -g d20 --out=d20-hf
    python -m scripts.export_hf -i sft -g d20 --out=d20-hf --push=me/d20                shows what would be sent
    HF_TOKEN=... python -m scripts.export_hf -i sft -g d20 --out=d20-hf --push=me/d20 --no-dry-run

The classic architecture is the model type `nanochat` of Transformers; every other one brings its code along, and is
loaded with trust_remote_code=True.
"""

from pathlib import Path
from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import alias
from nanochat.flags import ModelFlags


@cli.program
class Settings(ModelFlags):
    """Export a trained model to Transformers."""

    out: Annotated[Path, alias("-o")]
    """Folder to write; it must not exist yet, but with --push, which then sends it as it is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the file; bfloat16: half the size, and importing gives rounded weights."""
    push: str | None = None
    """Repository on the hub to send the folder to, as OWNER/NAME; HF_ENDPOINT names another hub."""
    private: bool = True
    """Of a repository that is new: only you see it."""
    dry_run: bool = True
    """With --push: only show what would be sent, and where to."""


import torch

from nanochat.checkpoint import load_model
from nanochat.hf.export import export, read_report
from nanochat.hf.push import push


def main(settings: Settings) -> None:
    out = settings.out.expanduser()
    if settings.push is None or not out.exists():
        model, tokenizer, meta = load_model(
            settings.stage, torch.device("cpu"), tag=settings.model_tag, step=settings.model_step
        )
        export(model, tokenizer, meta, out, dtype=getattr(torch, settings.dtype), report=read_report())
        size = sum(path.stat().st_size for path in out.iterdir())
        print(f"wrote {out} ({size / 1e6:,.1f} MB)")
    if settings.push is not None:
        push(out, settings.push, private=settings.private, dry_run=settings.dry_run)


if __name__ == "__main__":
    cli.run(main, Settings)
