"""Bits per byte of a checkpoint on train and validation text, beside simple baselines, and samples.

    python -m scripts.base_loss
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.base_loss --split-tokens=10485760

The text is that which the model was trained on (--source names another); every predictor codes the same bytes. Another
checkpoint, or another program's model of the same tokens, is scored on the very rows that --write-rows writes:

    python -m scripts.base_loss --model-tag=d12 --write-rows=rows.npy
    python -m scripts.base_loss --model-tag=d12-other --rows=rows.npy
"""

import json
from pathlib import Path
from typing import Annotated

from nanochat import cli
from nanochat.cli import alias, int_flag
from nanochat.data.sources import source_flag
from nanochat.flags import DeviceFlags, ModelFlags, Stage


@cli.program
class Settings(ModelFlags, DeviceFlags):
    """Measure the loss of a trained model."""

    stage: Annotated[Stage, alias("-i")] = "base"
    device_batch_size: Annotated[int, int_flag(gte=1)] = 32
    """Rows per forward pass on each device."""
    split_tokens: Annotated[int, int_flag(gte=1)] = 1_048_576
    """Tokens measured on each of train and validation, over all devices."""
    source: Annotated[str | None, source_flag("Text; by default what the model was trained on")] = None
    rows: Path | None = None
    """Score the rows of this file, and nothing else: see nanochat.eval.row_files."""
    write_rows: Path | None = None
    """Write the validation rows to this file."""


from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nanochat.checkpoint import load_model
from nanochat.data.overlap import shared_lines
from nanochat.data.sources import dataset_bytes, first_documents
from nanochat.data.text_rows import TextData
from nanochat.errors import UserError, visible
from nanochat.eval import row_files
from nanochat.eval.baselines import XZ_BYTES, baselines, scored_bytes, train_text
from nanochat.eval.row_files import ALL_ROWS, CLEAN, IN_FULL, Bpb
from nanochat.eval.samples import make_samples
from nanochat.files import atomic_write_text
from nanochat.paths import get_base_dir, slug
from nanochat.runtime import compute_cleanup, compute_init, print0
from nanochat.sections import keeps_results, write_section

BASELINE_BYTES = 1 << 26  # train text that the baselines are counted on: 5 s for the 3-gram
OVERLAP_BYTES = 1 << 30  # train text in which lines of validation documents are looked for: 15 s


def main(settings: Settings) -> None:
    if settings.rows and settings.write_rows:
        raise UserError(f"--rows={settings.rows} --write-rows={settings.write_rows}: expected one of them")
    _, rank, _, world_size, device = compute_init(settings.device_type)
    kept = keeps_results("base_loss")
    model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.model_step)
    token_bytes = np.array(tokenizer.token_byte_lengths())
    length = model.config.sequence_len

    def score(rows: np.ndarray) -> np.ndarray:
        return row_files.score_rows(model, rows, settings.device_batch_size, device, rank, world_size)

    if settings.rows is not None:
        rows = row_files.read_rows(settings.rows, length, token_bytes, tokenizer.get_bos_token_id())
        found = shown(settings.rows.name, row_files.by_kind(score(rows), rows))
        data: dict[str, Any] = {
            "settings": cli.as_dict(settings),
            "metrics": {**metrics("rows", found), "step": meta["step"]},
            "tables": [kinds_table(f"Rows of {settings.rows.name}", found)],
        }
        if kept:
            write_section("base_loss_rows", "Base model loss on the rows of a file", data)
        return compute_cleanup()

    source = settings.source or meta["settings"].get("source")
    if source is None:
        raise UserError("this checkpoint does not say what text it was trained on; name it with --source")
    text, budget = TextData(source, tokenizer), max(settings.split_tokens, length)
    train_rows, _ = row_files.make_rows(text, "train", length, budget)
    val_rows, documents = row_files.make_rows(text, "val", length, budget, in_full=True)
    if settings.write_rows is not None and rank == 0:
        row_files.write_rows(settings.write_rows, val_rows)
    if rank == 0:
        counted = train_text(source, BASELINE_BYTES)
        coded = scored_bytes(tokenizer, row_files.packed(val_rows)["tokens"], token_bytes)
        # beside the scoring: xz alone takes half a minute
        coding = ThreadPoolExecutor(1).submit(baselines, counted, coded)
    train = shown("train", row_files.by_kind(score(train_rows), train_rows))
    nats = score(val_rows)
    val = shown("val", row_files.by_kind(nats, val_rows))
    if rank == 0:
        texts = [tokenizer.decode(ids) for ids in documents]
        if kept:
            write_documents(settings.stage, meta, row_files.by_document(nats, val_rows, texts))
        lines = shared_lines(texts, first_documents(source, "train", OVERLAP_BYTES))
        overlapping = shown("val, documents", row_files.by_overlap(nats, val_rows, lines))
        share = lines[:, 1].sum() / max(lines[:, 0].sum(), 1)
        print0(f"{share:.1%} of {lines[:, 0].sum():,} validation lines of 40 characters stand in the train text")
        samples = make_samples(model, tokenizer)
        predictors = {**coding.result(), "this model": val[ALL_ROWS].bpb}
        for name, bpb in predictors.items():
            print0(f"{name:<28} {bpb:.4f} bits per byte")
        for sample in samples:
            print0(f"--- {visible(sample['text'])}")
        data = {
            "settings": {**cli.as_dict(settings), "source": source},
            "metrics": {
                **metrics("train", train),
                **metrics("val", val | overlapping),
                "val_overlap": share,
                "step": meta["step"],
            },
            "tables": tables({"train": train, "val": val}, predictors, overlapping),
            "samples": samples,
            "facts": {
                "baseline_bytes": len(counted),
                "xz_bytes": min(len(counted), XZ_BYTES),
                "overlap_bytes": min(dataset_bytes(source, "train"), OVERLAP_BYTES),
                "lines": lines[:, 0].sum(),
            },
        }
        if kept:
            write_section("base_loss", "Base model loss", data)
    compute_cleanup()


def shown(name: str, found: dict[str, Bpb]) -> dict[str, Bpb]:
    for kind, bpb in found.items():
        counts = f"{bpb.tokens:,} tokens, {bpb.bytes:,} bytes, {bpb.documents:,} documents"
        print0(f"{name}, {kind}: {bpb.bpb:.4f} ± {bpb.stderr:.4f} bpb on {counts}")
    return found


def metrics(prefix: str, by_kind: dict[str, Bpb]) -> dict[str, float]:
    """Of rows as they are packed, of documents in full and of those that share nothing, where they were measured."""
    found: dict[str, float] = {}
    names = {ALL_ROWS: f"{prefix}_bpb", IN_FULL: f"{prefix}_bpb_in_full", CLEAN: f"{prefix}_bpb_without_overlap"}
    for kind, name in names.items():
        if kind in by_kind:
            found |= {name: by_kind[kind].bpb, f"{name}_stderr": by_kind[kind].stderr}
    return found


def write_documents(stage: str, meta: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    """base_loss/<tag>_<step>.jsonl, a line a document, which `nanochat.report compare` pairs with another run's."""
    name = f"{'' if stage == 'base' else f'{stage}_'}{slug(str(meta['tag']))}_{meta['step']:06d}.jsonl"
    lines = (json.dumps(record) + "\n" for record in documents)
    atomic_write_text(get_base_dir() / "base_loss" / name, "".join(lines))


def kinds_table(title: str, by_kind: dict[str, Bpb]) -> dict[str, Any]:
    columns = ["Of", "bpb", "Standard error", "Tokens", "Bytes", "Documents"]
    return {"title": title, "columns": columns, "rows": [[name, *found] for name, found in by_kind.items()]}


def tables(
    results: dict[str, dict[str, Bpb]], predictors: dict[str, float], overlapping: dict[str, Bpb]
) -> list[dict[str, Any]]:
    columns = ["Split", "bpb", "Standard error", "Tokens", "Bytes"]
    splits = [[split, *by_kind[ALL_ROWS][:4]] for split, by_kind in results.items()]
    rows = [list(pair) for pair in predictors.items()]
    return [
        {"title": "Bits per byte", "columns": columns, "rows": splits},
        {"title": "The same validation text", "columns": ["Predictor", "Bits per byte"], "rows": rows},
        kinds_table("Validation text by kind of row", results["val"]),
        kinds_table("Validation documents by what they share", overlapping),
    ]


if __name__ == "__main__":
    cli.run(main, Settings)
