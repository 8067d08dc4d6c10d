"""Who may write into a checkpoint folder: a new run, or the one that was stopped there. Two runs never share one."""

import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.runtime import get_dist_info, print0

Resume = Literal["never", "auto"]

# Settings that change what is measured or where, but not (except for rounding) what the weights become; the tags are
# the folder itself.
OBSERVERS = {"run", "eval_every", "eval_tokens", "eval_questions", "eval_samples", "core_metric_every",
             "core_metric_max_per_task", "sample_every", "save_every", "resume", "device_type", "device_batch_size",
             "model_tag", "out_tag", "parallel", "use_fsdp", "keep_last", "keep_every", "monitor_interval",
             "coord_check", "coord_check_every", "warm_kernels"}  # fmt: skip
VISIBLE_SECONDS = 90.0  # directories of network file systems are cached for up to a minute
# What else must be the same for a run to be the same one.
ORIGINS = ("tokenizer_hash", "parent", "data")


def describe_run(
    stage: str,
    settings: dict[str, Any],
    config: GPTConfig,
    tokenizer_hash: str,
    recipe: dict[str, Any],
    num_iterations: int,
    parent: dict[str, Any] | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """What every checkpoint says of its run. parent: what load_model says of the checkpoint that training starts from;
    recipe: what later stages take over from this one (source, batch sizes, learning rates ...); data: a hash of what is
    trained on, where the settings do not tell."""
    about = {
        "stage": stage,
        "settings": settings,
        "model_config": asdict(config),
        "tokenizer_hash": tokenizer_hash,
        "recipe": recipe,
        "num_iterations": num_iterations,
        "world_size": get_dist_info().world_size,
    }
    if data is not None:
        about["data"] = data
    if parent is not None:
        about["parent"] = {name: parent[name] for name in ("stage", "tag", "step", "identity")}
    return about


def earlier_run(
    folder: Path, resume: Resume, meta_now: dict[str, Any], usual: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """meta.json of the checkpoint to resume from, or None to start (every rank calls this, and gets the same).

    What another run left in `folder` is set aside (resume="auto"), or refused with a UserError ("never"). Another run:
    one that is complete, or differs from meta_now in its settings, its tokenizer or the model it started from. usual:
    what settings were as long as there was no flag for them, for runs of older versions.
    """
    started_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not dist.is_initialized():
        return _look(folder, resume, meta_now, started_again, usual or {})
    # torchrun counts on each node for itself, and only where a process died
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, started_again)
    # Rank 0 alone looks: on a shared disk the others may see the newest checkpoint only a minute later.
    answer: list[Any] = [None, None]  # meta, the user's mistake
    if get_dist_info().rank == 0:
        try:
            answer[0] = _look(folder, resume, meta_now, any(counts), usual or {})
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer)
    meta, mistake = answer
    if mistake is not None:
        raise UserError(mistake)
    if meta is not None:
        _await_everywhere(checkpoint.step_dir(folder, meta["step"]) / "COMMITTED")
    return meta


def _await_everywhere(path: Path) -> None:
    """Wait until every host sees `path`. Raises UserError, on all ranks, where one does not."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    blind: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(blind, None if path.exists() else socket.gethostname())
    if hosts := sorted({host for host in blind if host is not None}):
        raise UserError(
            f"{path.parent} is not there on {', '.join(hosts)}: NANOCHAT_BASE_DIR must be one folder that all share"
        )


def _look(
    folder: Path, resume: Resume, meta_now: dict[str, Any], started_again: bool, usual: dict[str, Any]
) -> dict[str, Any] | None:
    steps = checkpoint.committed_steps(folder)
    if not steps:
        return None
    complete = (folder / checkpoint.COMPLETE).exists()
    if started_again:
        resume = "auto"  # torchrun started all ranks again (--max-restarts): what is there is this run's own
        complete = False
    if resume == "never":
        tag = "--model-tag" if meta_now["stage"] == "base" else "--out-tag"
        how, auto = (", complete", "sets it aside") if complete else ("", "continues it")
        raise UserError(
            f"{folder} holds a run already (step {steps[-1]}{how}): {tag}=NAME writes elsewhere, --resume=auto {auto}"
        )
    meta = checkpoint.read_meta(folder, steps[-1])
    before = {**usual, **meta["settings"]}
    changed = [key for key, value in meta_now["settings"].items() if key not in OBSERVERS and before.get(key) != value]
    changed += [key.removesuffix("_hash") for key in ORIGINS if meta.get(key) != meta_now.get(key)]
    if not changed and not complete:
        return meta
    why = f"differs in {', '.join(changed)}" if changed else "is complete"
    print0(f"the run in {folder} {why}: kept as {checkpoint.set_aside(folder).name}, starting anew")
    return None
