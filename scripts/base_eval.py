"""The CORE metric of a checkpoint: few-shot tasks of the evaluation bundle in the artifact store.

    python -m scripts.base_eval
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.base_eval --max-per-task=500

Scores go to base_eval/<tag>_<step>.csv, the answer to every item to the .jsonl beside it.
"""

from dataclasses import dataclass
from typing import Annotated

from nanochat import cli
from nanochat.cli import count_flag, int_flag
from nanochat.flags import CheckpointFlags


@dataclass(frozen=True, kw_only=True)
class Settings(CheckpointFlags):
    """Score a trained model on the CORE tasks."""

    max_per_task: Annotated[int, count_flag()] = -1
    """Items per task; -1 for all."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 8
    """Rows of full length per forward pass on each device; shorter prompts go more to a pass."""


if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

from nanochat.checkpoint import load_model
from nanochat.eval.bundle import load_bundle
from nanochat.eval.core import evaluate_core, report_data, write_results
from nanochat.eval.shortcuts import measure
from nanochat.paths import eval_bundle_dir, get_base_dir, slug
from nanochat.runtime import compute_cleanup, compute_init, print0
from nanochat.sections import keeps_results, write_section


def main(settings: Settings) -> None:
    _, rank, _, _, device = compute_init(settings.device_type)
    kept = keeps_results("base_eval")
    bundle = measure(load_bundle(eval_bundle_dir()))
    about = {"settings": cli.as_dict(settings), "notes": bundle.notes}
    for note in bundle.notes:
        print0(note)
    if not bundle.tasks:
        write_section("base_eval", f"{bundle.name}, base model", {**about, "facts": {"kind": bundle.kind}})
        compute_cleanup()
        return
    model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.model_step)
    limits = {"device_batch_size": settings.device_batch_size, "max_per_task": settings.max_per_task}
    length = model.config.sequence_len
    result = evaluate_core(model, tokenizer, bundle, device, sequence_len=length, log=print0, **limits)
    print0(str(result))
    if rank == 0 and kept:
        prefix = "" if settings.stage == "base" else f"{settings.stage}_"
        name = f"{prefix}{slug(str(meta['tag']))}_{meta['step']:06d}"
        path = write_results(result, get_base_dir() / "base_eval", name)
        print0(f"wrote {path}")
        data = report_data(result)
        data["metrics"]["step"] = meta["step"]
        write_section("base_eval", f"{result.name}, base model", {**about, **data})
    compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
