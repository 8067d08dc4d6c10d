"""Bits per byte of a checkpoint on train and validation text, beside simple baselines, and samples.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss --split-tokens=10485760

The text is that which the model was trained on (--source names another); every predictor codes the same bytes.
"""

from dataclasses import dataclass
from typing import Annotated

from nanochat import cli
from nanochat.cli import int_flag
from nanochat.data.sources import source_flag
from nanochat.flags import CheckpointFlags


@dataclass(frozen=True, kw_only=True)
class Settings(CheckpointFlags):
    """Measure the loss of a trained model."""

    device_batch_size: Annotated[int, int_flag(gte=1)] = 32
    """Rows per forward pass on each device."""
    split_tokens: Annotated[int, int_flag(gte=1)] = 1_048_576
    """Tokens measured on each of train and validation, over all devices."""
    source: Annotated[str | None, source_flag("Text; by default what the model was trained on")] = None


if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

from typing import Any

from nanochat.checkpoint import load_model
from nanochat.data.text_rows import TextData
from nanochat.dataloader import row_batches
from nanochat.errors import UserError, visible
from nanochat.eval.bpb import BpbResult, baselines, measure_bpb, scored_bytes, train_text
from nanochat.eval.samples import make_samples
from nanochat.runtime import compute_cleanup, compute_init, print0
from nanochat.sections import keeps_results, write_section
from nanochat.tokenizer import get_token_bytes

BASELINE_BYTES = 1 << 26  # train text that the baselines are counted on: 5 s for the 3-gram


def main(settings: Settings) -> None:
    _, rank, _, world_size, device = compute_init(settings.device_type)
    kept = keeps_results()
    model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.model_step)
    source = settings.source or meta["settings"].get("source")
    if source is None:
        raise UserError("this checkpoint does not say what text it was trained on; name it with --source")
    token_bytes = get_token_bytes(device, tokenizer)
    length = model.config.sequence_len
    results, rows, metrics = {}, {}, {}
    for split in ("train", "val"):
        rows[split] = TextData(source, tokenizer).fixed_rows(split, length, max(settings.split_tokens, length))
        share = row_batches(rows[split], settings.device_batch_size, device, rank, world_size)
        results[split] = found = measure_bpb(model, share, token_bytes)
        metrics |= {f"{split}_bpb": found.bpb, f"{split}_bpb_stderr": found.stderr}
        print0(f"{split}: {found.bpb:.4f} ± {found.stderr:.4f} bpb on {found.tokens:,} tokens, {found.bytes:,} bytes")
    if rank == 0:
        train = train_text(source, BASELINE_BYTES)
        val = scored_bytes(tokenizer, rows["val"], token_bytes.cpu().numpy())
        predictors = {**baselines(train, val), "this model": results["val"].bpb}
        for name, bpb in predictors.items():
            print0(f"{name:<28} {bpb:.4f} bits per byte")
        samples = make_samples(model, tokenizer)
        for sample in samples:
            print0(f"--- {visible(sample['text'])}")
        data = {
            "settings": {**cli.as_dict(settings), "source": source},
            "metrics": {**metrics, "step": meta["step"]},
            "tables": tables(results, predictors),
            "samples": samples,
            "facts": {"baseline_bytes": len(train)},
        }
        if kept:
            write_section("base_loss", "Base model loss", data)
    compute_cleanup()


def tables(results: dict[str, BpbResult], predictors: dict[str, float]) -> list[dict[str, Any]]:
    columns = ["Split", "bpb", "Standard error", "Tokens", "Bytes"]
    splits = [[split, r.bpb, r.stderr, r.tokens, r.bytes] for split, r in results.items()]
    rows = [list(pair) for pair in predictors.items()]
    return [
        {"title": "Bits per byte", "columns": columns, "rows": splits},
        {"title": "The same validation text", "columns": ["Predictor", "Bits per byte"], "rows": rows},
    ]


if __name__ == "__main__":
    cli.run(main, Settings)
