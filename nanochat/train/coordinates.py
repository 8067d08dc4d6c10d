"""The size of what each module puts out ("coordinates"), measured between training steps for the coordinate check of
nanochat.studies.coord_check."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.files import append_jsonl
from nanochat.gpt import GPT
from nanochat.parallel import disable_compile
from nanochat.runtime import rank_and_world

COORD = "Activations/coord_l1"  # mean |x| of a module's output, on fixed rows
LOGITS = "lm_head"
TABLES = ("value_embeds", "ngram_embeds")
WATCHED = ("attn", "attn.c_q", "attn.c_k", "attn.c_v", "mlp.c_fc", "mlp", "")  # in each block; "": the block itself


def watched_modules(model: GPT) -> dict[str, nn.Module]:
    """What is measured, by the name that records give it: `wte`, `h.0.attn` (what attention adds to the residual
    stream), `h.0.mlp`, `h.0` (the stream behind block 0), queries, keys, values, MLP hidden units, the tables
    `value_embeds.0` and `ngram_embeds.0`, and `lm_head`."""
    found: dict[str, nn.Module] = {"wte": model.transformer["wte"]}
    for kind, tables in model.transformer.named_children():
        if kind in TABLES:
            found |= {f"{kind}.{index}": table for index, table in tables.named_children()}
    blocks: Any = model.transformer["h"]
    for index, block in enumerate(blocks):
        modules = dict(block.named_modules())
        for part in WATCHED:
            if part in modules:
                found[".".join(filter(None, (f"h.{index}", part)))] = modules[part]
    return found | {LOGITS: model.lm_head}


@contextmanager
def watching(model: GPT) -> Iterator[dict[str, dict[str, float]]]:
    """Module -> statistics of its output in the forward pass made inside the `with`; the hooks are gone afterwards.

    lm_head's output is taken times the model's logit multiplier, which lies outside the module. A second call of the
    same module in the pass is recorded as `name#2`.
    """
    seen: dict[str, dict[str, float]] = {}
    calls: Counter[str] = Counter()

    def hook(name: str, factor: float) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise TypeError(f"{name} puts out a {type(output).__name__}: the coordinate check reads tensors only")
            calls[name] += 1
            seen[name if calls[name] == 1 else f"{name}#{calls[name]}"] = statistics(output.detach() * factor)

        return record

    handles = []
    try:
        for name, module in watched_modules(model).items():
            factor = model.config.logit_multiplier if name == LOGITS else 1.0
            handles.append(module.register_forward_hook(hook(name, factor)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def statistics(x: Tensor) -> dict[str, float]:
    """Over all entries: l1 = mean |x|, l2 = root mean square, mean and std."""
    x = x.float()
    stacked = torch.stack([x.abs().mean(), x.square().mean().sqrt(), x.mean(), x.std()])
    return dict(zip(("l1", "l2", "mean", "std"), stacked.tolist(), strict=True))


def measure(model: GPT, rows: Tensor) -> dict[str, dict[str, float]]:
    """Statistics of each watched module on rows (B, T), uncompiled: compiled code would not call new hooks. Not of
    tables of n-grams before their first update: they begin at zero, which has no slope."""
    with torch.no_grad(), disable_compile(model), watching(model) as seen:
        model(rows)
    return {name: stats for name, stats in seen.items() if stats["l1"] > 0 or not name.startswith("ngram_embeds.")}


def record(model: GPT, path: Path, rows: Tensor, step: int) -> dict[str, float]:
    """Measure after `step` updates, append that to a JSONL file, which `scripts.coord_check --from` compares with those
    of runs at other widths, and return mean |x| as metrics. Every rank must call it; rank 0 writes. rows (B, T): the
    same at every step and width."""
    seen = measure(model, rows)
    if rank_and_world()[0] == 0:
        for module, stats in seen.items():
            append_jsonl(path, {"width": model.config.n_embd, "seed": 0, "module": module, "t": step + 1, **stats})
    return {f"{COORD}/{module}": stats["l1"] for module, stats in seen.items()}
