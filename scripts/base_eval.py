"""The CORE metric of a checkpoint: few-shot tasks of the evaluation bundle in the artifact store.

    python -m scripts.base_eval
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.base_eval --max-per-task=500
    python -m scripts.base_eval --hf-path=/models/gpt2      a model that Transformers can load

Scores go to base_eval/<tag>_<step>.csv, the answer to every item to the .jsonl beside it.
"""

from pathlib import Path
from typing import Annotated

from nanochat import cli
from nanochat.cli import alias, count_flag, int_flag
from nanochat.flags import DeviceFlags, ModelFlags, Stage


@cli.program
class Settings(ModelFlags, DeviceFlags):
    """Score a trained model on the CORE tasks."""

    stage: Annotated[Stage, alias("-i")] = "base"
    max_per_task: Annotated[int, count_flag()] = -1
    """Items per task; -1 for all."""
    device_batch_size: Annotated[int, int_flag(gte=1)] = 8
    """Rows of full length per forward pass on each device; shorter prompts go more to a pass."""
    hf_path: Path | None = None
    """Folder of a model that Hugging Face Transformers can load, to be scored instead of a checkpoint."""
    trust_remote_code: bool = False
    """Run the modelling code that lies in --hf-path."""


import torch

from nanochat.checkpoint import load_model
from nanochat.errors import UserError
from nanochat.eval import foreign
from nanochat.eval.bundle import load_bundle
from nanochat.eval.core import Model, Tokenizer, evaluate_core, report_data, write_results
from nanochat.eval.shortcuts import measure
from nanochat.paths import eval_bundle_dir, get_base_dir, slug
from nanochat.runtime import compute_cleanup, compute_init, print0
from nanochat.sections import keeps_results, write_section


def load(settings: Settings, device: torch.device) -> tuple[Model, Tokenizer, int, str, dict[str, int]]:
    """(model, tokenizer, longest prompt in tokens, name of the files with results, metrics beside the score)."""
    if settings.hf_path is not None:
        other = next((name for name in ("model_tag", "model_step") if getattr(settings, name) is not None), None)
        if other or settings.stage != "base":
            flag = other.replace("_", "-") if other else "stage"
            raise UserError(f"--hf-path={settings.hf_path} and --{flag}: one model is scored; leave one of them out")
        name = f"hf_{slug(settings.hf_path.resolve().name)}"
        return *foreign.load(settings.hf_path, device, settings.trust_remote_code), name, {}
    model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.model_step)
    prefix = "" if settings.stage == "base" else f"{settings.stage}_"
    name = f"{prefix}{slug(str(meta['tag']))}_{meta['step']:06d}"
    return model, tokenizer, model.config.sequence_len, name, {"step": meta["step"]}


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
    model, tokenizer, length, name, metrics = load(settings, device)
    limits = {"device_batch_size": settings.device_batch_size, "max_per_task": settings.max_per_task}
    result = evaluate_core(model, tokenizer, bundle, device, sequence_len=length, log=print0, **limits)
    print0("{}, 95 % {:.4f} to {:.4f}".format(result, *result.interval))
    if rank == 0 and kept:
        path = write_results(result, get_base_dir() / "base_eval", name)
        print0(f"wrote {path}")
        data = report_data(result)
        data["metrics"] |= metrics
        stage, what = ("base_eval_hf", settings.hf_path.name) if settings.hf_path else ("base_eval", "base model")
        write_section(stage, f"{result.name}, {what}", {**about, **data})
    compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
