"""Seconds that CORE takes with random weights: one item at a time, rows in batches, and rows that begin alike once.

    python -m benchmarks.core --bundle=/data/eval_bundle --out=core.json         d20 on a GPU
    python -m benchmarks.core --depth=4 --head-dim=64 --max-per-task=20          the store's bundle on a CPU
    python -m benchmarks.core --arch=ngram --depth=12 --ways=shared

Ways: `single`, as evaluators commonly do it: the options of one item in one forward pass, logits and losses of all
positions, and the host waits for each item; `batched`: items together, sorted by length; `shared`: what base_eval does.
Prompts are encoded with the store's tokenizer, within the time that is measured. On a CPU it is the process's own: with
OMP_NUM_THREADS=1 others on the machine matter little.
"""

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from benchmarks.measure import about
from benchmarks.output import Output, write_json
from nanochat import cli
from nanochat.cli import count_flag, int_flag
from nanochat.config import ArchFlags, build_config, resolve
from nanochat.errors import UserError
from nanochat.eval import core
from nanochat.eval.bundle import Task, load_bundle
from nanochat.eval.scores import Record, pad_rows
from nanochat.flags import DeviceFlags
from nanochat.gpt import GPT
from nanochat.hardware import peak_memory_bytes
from nanochat.paths import eval_bundle_dir
from nanochat.runtime import compute_cleanup, compute_dtype, compute_init, synchronize
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

PUBLISHED_ITEMS = 9_345  # of the 22 published tasks, at most 500 of each
WAYS = ("single", "batched", "shared")


@cli.program
class Settings(Output, DeviceFlags, ArchFlags):
    """Time the CORE metric."""

    bundle: Path | None = None
    """Folder of an evaluation bundle; default: the store's."""
    vocab_size: Annotated[int | None, int_flag(gte=64)] = None
    """Vocabulary of the model, where larger than the tokenizer's."""
    max_per_task: Annotated[int, count_flag()] = 500
    """Items per task; -1 for all."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 8
    """Rows of full length per forward pass, as base_eval has it."""
    ways: str = ",".join(WAYS)
    """What is measured, in this order."""


def main(settings: Settings) -> None:
    ways = settings.ways.split(",")
    if not set(ways) <= set(WAYS):
        raise UserError(f"--ways={settings.ways}: use some of {','.join(WAYS)}")
    device = compute_init(settings.device_type)[-1]
    tokenizer, bundle = get_tokenizer(), load_bundle(settings.bundle or eval_bundle_dir())
    vocab_size = max(settings.vocab_size or 0, tokenizer.get_vocab_size())
    config = build_config(resolve(settings), vocab_size, tokenizer.get_bos_token_id())
    with torch.device("meta"):
        model = GPT(config, compute_dtype(device))
    model.to_empty(device=device)
    model.init_weights(head_std=0.02, zero_proj=False)  # answers that differ
    model.eval()
    limits = {"sequence_len": config.sequence_len, "max_per_task": settings.max_per_task}
    limits["device_batch_size"] = settings.device_batch_size
    every: dict[str, Callable[[Task], list[Record]]] = {
        "single": lambda task: one_by_one(model, tokenizer, task, device, settings.max_per_task),
        "batched": lambda task: core.evaluate_task(lambda idx: model(idx), tokenizer, task, device, **limits).records,
        "shared": lambda task: core.evaluate_task(model, tokenizer, task, device, **limits).records,
    }
    measures = {way: every[way] for way in ways}
    for measure in measures.values():  # kernels are loaded on first use
        measure(dataclasses.replace(bundle.tasks[0], items=bundle.tasks[0].items[:8]))
    rows = [time_task(task, measures, device) for task in bundle.tasks]
    items = sum(row["items"] for row in rows)
    total = {way: sum(row["seconds"][way] for row in rows) for way in ways}
    for way, seconds in total.items():
        print(f"{way}: {seconds:.1f} s for {items:,} items, {seconds * PUBLISHED_ITEMS / items:.1f} s for "
              f"{PUBLISHED_ITEMS:,}; {ways[-1]} is {seconds / total[ways[-1]]:.2f} times as fast")  # fmt: skip
    result = about(settings, device, without=("out", "bundle")) | {"rows": rows, "items": items, "seconds": total}
    result |= {"parameters": model.num_params(), "memory_gib": peak_memory_bytes(device) / 2**30}
    write_json(settings, result)
    compute_cleanup()


def time_task(task: Task, measures: dict[str, Callable[[Task], list[Record]]], device: torch.device) -> dict[str, Any]:
    """Seconds of each way, and how far the answers of the others are those of the last."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds, found = {}, {}
    for way, measure in measures.items():
        core._remembered.clear()  # prompts are encoded each time
        synchronize(device)
        start = clock()
        found[way] = measure(task)
        seconds[way] = clock() - start
    *others, last = found.values()
    agree = {way: agreement(records, last) for way, records in zip(found, others, strict=False)}
    times = ", ".join(f"{way} {value:.2f} s" for way, value in seconds.items())
    same = ", ".join(f"{way} {one['same']} the same, loss {one['loss']:.1e} off" for way, one in agree.items())
    print(f"{task.label} ({len(last)} items): {times}; {same}", flush=True)
    return {"task": task.label, "kind": task.kind, "items": len(last), "seconds": seconds, "agree": agree}


@torch.no_grad()
def one_by_one(model: GPT, tokenizer: RustBPETokenizer, task: Task, device: torch.device, most: int) -> list[Record]:
    """The records of evaluate_task, an item at a time."""
    lines = list(range(len(task.items)))
    random.Random(1337).shuffle(lines)
    lines = lines[:most] if most > 0 else lines
    items, bos = [task.items[line] for line in lines], tokenizer.get_bos_token_id()
    records = []
    for i, item in enumerate(items):
        prompts = core.render_prompts(task, item, core.pick_shots(task, items, i))
        rows = core.make_rows(task.kind, tokenizer.encode(prompts, prepend=bos), model.config.sequence_len)
        idx = pad_rows([row.tokens for row in rows], max(len(row.tokens) for row in rows), bos).to(device)
        logits = model(idx)
        flat = logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()
        losses = F.cross_entropy(*flat, reduction="none").view(len(rows), -1)
        hits = logits[:, :-1].argmax(-1) == idx[:, 1:]
        means = [losses[j, row.start - 1 : row.end - 1].mean().item() for j, row in enumerate(rows)]
        if task.kind == "language_modeling":
            records.append({"correct": bool(hits[0, rows[0].start - 1 : rows[0].end - 1].all()), "loss": means[0]})
        else:
            chosen = means.index(min(means))
            records.append({"correct": chosen == item["gold"], "loss": means[item["gold"]], "chosen": chosen})
    return records


def agreement(found: list[Record], expected: list[Record]) -> dict[str, float]:
    """In how many items both have the same answer, and how far apart the losses of the right one are at most."""
    pairs = list(zip(found, expected, strict=True))
    same = sum(all(one[name] == other[name] for name in ("correct", "chosen") if name in one) for one, other in pairs)
    return {"same": same, "items": len(pairs), "loss": max(abs(one["loss"] - other["loss"]) for one, other in pairs)}


if __name__ == "__main__":
    cli.run(main, Settings)
