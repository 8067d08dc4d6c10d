"""Bits per byte of a checkpoint on train and validation text, beside simple baselines, and samples.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss --split-tokens=10485760

The text is that which the model was trained on (--source names another); every predictor codes the same bytes.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.cli import int_flag
from nanochat.data.text_rows import TextData
from nanochat.dataloader import row_batches
from nanochat.dataset import iter_documents
from nanochat.errors import UserError
from nanochat.eval.baselines import order0_bpb, trigram_bpb, xz_bpb
from nanochat.eval.bpb import BpbResult, measure_bpb
from nanochat.eval.samples import make_samples
from nanochat.runtime import DeviceType, compute_cleanup, compute_init, print0
from nanochat.sections import write_section
from nanochat.tokenizer import get_token_bytes

BASELINE_BYTES = 1 << 26  # train text that the baselines are counted on: 5 s for the 3-gram


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure the loss of a trained model."""

    stage: Literal["base", "mid", "sft", "rl"] = "base"
    """Training stage whose checkpoint is measured."""
    model_tag: str | None = None
    """Name of the run among the stage's checkpoints; default: the newest."""
    model_step: Annotated[int | None, int_flag(gte=0)] = None
    """Optimizer step of the checkpoint; default: the last."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 32
    """Rows per forward pass on each device."""
    split_tokens: Annotated[int, int_flag(gte=1)] = 1_048_576
    """Tokens measured on each of train and validation, over all devices."""
    source: str | None = None
    """Text source: fineweb-edu, climbmix, pydocs, local:DIR; default: what the model was trained on."""
    device_type: DeviceType = "auto"
    """auto, cpu, cuda or mps."""


def measured_text(tokenizer: Any, rows: np.ndarray, token_bytes: np.ndarray) -> bytes:
    """The very bytes that the model is scored on: the targets of rows (N, T + 1) without special tokens."""
    targets = rows[:, 1:].astype(np.int64).ravel()
    return tokenizer.decode_bytes(targets[token_bytes[targets] > 0])


def train_text(source: str) -> bytes:
    """The first BASELINE_BYTES of the train split."""
    pieces: list[bytes] = []
    size = 0
    for document in iter_documents(source, "train"):
        pieces.append(document.encode("utf-8", "replace"))
        size += len(pieces[-1])
        if size >= BASELINE_BYTES:
            break
    return b"".join(pieces)[:BASELINE_BYTES]


def baseline_table(train: bytes, val: bytes, model: BpbResult) -> list[list[Any]]:
    """Rows (predictor, bits per byte), worst code first as a rule; all on the same validation bytes."""
    return [
        ["order-0 bytes", order0_bpb(train, val)],
        ["byte 3-gram (Witten-Bell)", trigram_bpb(train, val)],
        ["xz -9e", xz_bpb(val)],
        ["this model", model.bpb],
    ]


def main(settings: Settings) -> None:
    _, rank, _, world_size, device = compute_init(settings.device_type)
    model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.model_step)
    source = settings.source or meta["settings"].get("source")
    if source is None:
        raise UserError("this checkpoint does not say what text it was trained on; name it with --source")
    token_bytes = get_token_bytes(device)
    length = model.config.sequence_len
    results, rows = {}, {}
    for split in ("train", "val"):
        rows[split] = TextData(source, tokenizer).fixed_rows(split, length, max(settings.split_tokens, length))
        share = row_batches(rows[split], settings.device_batch_size, device, rank, world_size)
        results[split] = measure_bpb(model, share, token_bytes)
        found = results[split]
        print0(f"{split}: {found.bpb:.4f} ± {found.stderr:.4f} bpb on {found.tokens:,} tokens, {found.bytes:,} bytes")
    if rank == 0:
        train = train_text(source)
        val = measured_text(tokenizer, rows["val"], token_bytes.cpu().numpy())
        table = baseline_table(train, val, results["val"])
        for name, bpb in table:
            print0(f"{name:<28} {bpb:.4f} bits per byte")
        samples = make_samples(model, tokenizer)
        for sample in samples:
            print0(f"--- {sample['text']}")
        write_section(
            "base_loss", "Base model loss", section(settings, meta, source, results, table, samples, len(train))
        )
    compute_cleanup()


def section(
    settings: Settings,
    meta: dict[str, Any],
    source: str,
    results: dict[str, BpbResult],
    table: list[list[Any]],
    samples: list[dict[str, str]],
    train_bytes: int,
) -> dict[str, Any]:
    """What the report shows of this stage."""
    splits = [[split, r.bpb, r.stderr, r.tokens, r.bytes] for split, r in results.items()]
    return {
        "settings": {**cli.as_dict(settings), "source": source},
        "metrics": {
            "train_bpb": results["train"].bpb,
            "train_bpb_stderr": results["train"].stderr,
            "val_bpb": results["val"].bpb,
            "val_bpb_stderr": results["val"].stderr,
            "step": meta["step"],
        },
        "tables": [
            {
                "title": "Bits per byte",
                "columns": ["Split", "bpb", "Standard error", "Tokens", "Bytes"],
                "rows": splits,
            },
            {"title": "The same validation text", "columns": ["Predictor", "Bits per byte"], "rows": table},
        ],
        "samples": samples,
        "notes": [
            f"Measured on {source}; the standard error is over rows.",
            f"order-0 and 3-gram are counted on {train_bytes:,} bytes of train text; xz sees the validation text only.",
        ],
        "synthetic": False,
    }


if __name__ == "__main__":
    cli.run(main, Settings)
