"""Checkpoints on disk: what lies where, how it is read, exported and thrown away (nanochat.saver writes them).

    checkpoints/<stage>/<tag>/step_000123/state/              weights (fp32) and optimizer state, in parts
                                                              (torch.distributed.checkpoint): model.<name>,
                                                              optimizer.<name>.<kind>
                                          model.safetensors   the weights in one file: of a run's last step, or exported
                                          meta.json           settings, model config, loop, loader and RNG state
                                          COMMITTED           written last: without it nothing here exists for a reader
    checkpoints/<stage>/<tag>/COMPLETE                        the run that writes here has reached its last step

Every tensor lies under its name and its place in the whole, so any number of ranks can take it up, in any layout.

    python -m nanochat.checkpoint export --stage=base --tag=d12 --out=d12.safetensors
"""

import hashlib
import json
import random
import re
import shutil
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from nanochat import cli
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.paths import checkpoint_dir, slug
from nanochat.runtime import compute_dtype, get_dist_info, print0
from nanochat.tensor_files import damaged, read_file, read_parts, write_file

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer

# What makes the checkpoints of each training stage.
STAGE_SCRIPTS = {
    "base": "scripts.base_train",
    "mid": "scripts.mid_train",
    "sft": "scripts.chat_sft",
    "rl": "scripts.chat_rl",
}
COMPLETE = "COMPLETE"  # file beside the steps of a run that has reached its last one
FORMAT = 2  # of meta.json and the layout; raised when old readers could not read new checkpoints


def step_dir(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps of whole checkpoints under `folder`, ascending."""
    names = [path.parent.name for path in folder.glob("step_*/COMMITTED")]
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))


def save(folder: Path, step: int, model: GPT, optimizer: MuonAdamW | None, meta: dict[str, Any]) -> Path:
    """Write one checkpoint, model.safetensors included, and wait for it (every rank calls this). Returns its folder."""
    from nanochat.saver import Saver  # which builds on this module

    saver = Saver(folder, model, optimizer, keep_last=1_000_000)
    try:
        saver.save(step, meta, last=True)
        saver.wait()
    finally:
        saver.close()
    return step_dir(folder, step)


def rng_state() -> dict[str, Any]:
    """State of every generator a training run may draw from, JSON-able."""
    state: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes().hex(), "python": random.getstate()}
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state["numpy"] = [kind, np.asarray(keys).tolist(), position, has_gauss, gauss]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo of rng_state."""

    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """meta.json of one checkpoint. Raises UserError when it is absent, damaged or of a newer format."""
    path = step_dir(folder, step) / "meta.json"
    if not (path.parent / "COMMITTED").exists():
        raise UserError(f"no checkpoint {path.parent}; there are: {_present(folder)}")
    try:
        meta = json.loads(path.read_text())
        newer = meta["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from None
    if newer:
        raise UserError(f"{path} has format {meta['format']}, this program reads {FORMAT}: update the program")
    return meta


def load_weights(folder: Path, step: int, model: nn.Module) -> None:
    """Fill `model` in place, on any device; where its weights are DTensors, each rank reads the rows that it holds.

    Ranks read on their own, without communication. Raises UserError for files that are damaged or belong to another
    model.
    """
    path = step_dir(folder, step) / "model.safetensors"
    weights = model.state_dict()
    if path.exists():
        read_file(path, weights)
    else:
        read_parts(path.with_name("state"), "model.", weights)


def load_optimizer(folder: Path, step: int, optimizer: MuonAdamW, num_steps: int) -> None:
    """Fill the optimizer's state in place (the number of ranks and the layout may differ from the writer's)."""
    read_parts(step_dir(folder, step) / "state", "optimizer.", optimizer.named_state(), leftover=True)
    optimizer.num_steps = num_steps


def export(folder: Path, step: int, out: Path | None = None) -> Path:
    """Write the weights of one checkpoint as a single safetensors file (default: into its folder); returns its path.

    Holds one tensor at a time, on the CPU. Raises UserError when there is no such checkpoint or it is damaged.
    """
    read_meta(folder, step)
    path = step_dir(folder, step)
    out = out or path / "model.safetensors"
    write_file(path / "state", out)
    return out


def load_model(
    stage: str, device: torch.device, tag: str | None = None, step: int | None = None
) -> tuple[GPT, "RustBPETokenizer", dict[str, Any]]:
    """(whole model in evaluation mode, its tokenizer, meta) of a training stage's checkpoint; see find_model."""
    model, tokenizer, meta = find_model(stage, device, tag, step)
    fill_model(model, device, meta)
    return model.eval(), tokenizer, meta


def find_model(
    stage: str, device: torch.device, tag: str | None = None, step: int | None = None
) -> tuple[GPT, "RustBPETokenizer", dict[str, Any]]:
    """(model without memory yet, to be cut over ranks or not and then filled; its tokenizer; meta) of a checkpoint.

    Without a tag the stage's newest run, without a step its last checkpoint. Raises UserError when there is none, when
    files are damaged, or when the tokenizer in the store is not the one the model was trained with.
    """
    from nanochat.tokenizer import get_tokenizer

    folder = _find_folder(stage, tag)
    step = step if step is not None else committed_steps(folder)[-1]
    meta = read_meta(folder, step)
    tokenizer = get_tokenizer()
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise UserError(
            f"{step_dir(folder, step)} was trained with tokenizer {meta['tokenizer_hash']}, the store holds "
            f"{tokenizer.hash}: train again, or put that tokenizer back"
        )
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]), compute_dtype(device))
    return (
        model,
        tokenizer,
        {**meta, "stage": stage, "step": step, "tag": folder.name, "identity": identity(folder, step)},
    )


def fill_model(model: GPT, device: torch.device, meta: dict[str, Any]) -> None:
    """Give the model of find_model its memory and its weights; each rank reads what it holds of them."""
    folder = checkpoint_dir(meta["stage"], meta["tag"])
    model.to_empty(device=device)
    load_weights(folder, meta["step"], model)
    model.init_buffers()
    print0(f"loaded {step_dir(folder, meta['step'])}")


def identity(folder: Path, step: int) -> str:
    """Tells this checkpoint from one that another run left at the same place: a hash of meta.json, timings and all."""
    return hashlib.sha256((step_dir(folder, step) / "meta.json").read_bytes()).hexdigest()[:16]


def recipe(meta: dict[str, Any]) -> dict[str, Any]:
    """What a stage decided and later ones go on with: source, max_seq_len, device_batch_size, total_batch_size, the
    learning rates at that batch, weight_decay."""
    if "recipe" not in meta:
        raise UserError(f"the {meta['stage']} checkpoint {meta['tag']} is of an older version: train it again")
    return meta["recipe"]


def _find_folder(stage: str, tag: str | None) -> Path:
    parent = checkpoint_dir(stage, "x").parent
    if tag is not None:
        tag = slug(tag)  # as it was written
        if not committed_steps(parent / tag):
            raise UserError(f"no {stage} checkpoint tagged {tag} in {parent}; there are: {_present(parent)}")
        return parent / tag
    folders = [path for path in parent.glob("*") if committed_steps(path)]
    if not folders:
        raise UserError(f"no {stage} checkpoint in {parent}: run `python -m {STAGE_SCRIPTS[stage]}` first")
    return max(folders, key=lambda path: step_dir(path, committed_steps(path)[-1]).stat().st_mtime)


def _present(folder: Path) -> str:
    if steps := committed_steps(folder):
        return ", ".join(f"step {step}" for step in steps)
    names = sorted(path.name for path in folder.glob("*") if committed_steps(path))
    return ", ".join(names) or "none"


def update_meta(folder: Path, step: int, known: dict[str, Any]) -> None:
    """Add to meta.json what came to be known after the checkpoint was saved (rank 0)."""
    path = step_dir(folder, step) / "meta.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**json.loads(path.read_text()), **known}, indent=1) + "\n")


def mark_complete(folder: Path) -> None:
    """Say that the run writing into `folder` is done, its section of the report included: rank 0's last deed."""
    if get_dist_info().rank != 0:
        return
    with atomic_write(folder / COMPLETE) as temporary:
        temporary.touch()


def prune(folder: Path, keep_last: int, keep_every: int = -1) -> None:
    """Delete all checkpoints but the newest `keep_last` and those of every `keep_every`-th step (if > 0); rank 0."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    for step in committed_steps(folder)[:-keep_last]:
        if keep_every <= 0 or step % keep_every:
            discard(step_dir(folder, step))


def discard(checkpoint: Path) -> None:
    """Delete one checkpoint, if it is there. COMMITTED goes first: half a folder is never read."""
    (checkpoint / "COMMITTED").unlink(missing_ok=True)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)


def set_aside(folder: Path) -> Path:
    """Rename a folder of earlier checkpoints to the first free `<name>.<n>`: another run is about to take its name."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    return target


@dataclass(frozen=True)
class Settings:
    """Write the weights of a checkpoint as one safetensors file, for other programs."""

    action: Literal["export"] = "export"
    """export: the only one"""
    _: KW_ONLY
    stage: Literal["base", "mid", "sft", "rl"] = "base"
    """training stage that made the checkpoint"""
    tag: str | None = None
    """run of that stage; by default the newest"""
    step: Annotated[int, cli.int_flag(gte=-1)] = -1
    """step of the checkpoint; -1: the last"""
    out: Path | None = None
    """file to write; by default model.safetensors in the folder of the checkpoint"""


def main(asked: Settings) -> None:
    """Export, and say where to."""
    folder = _find_folder(asked.stage, asked.tag)
    step = asked.step if asked.step >= 0 else committed_steps(folder)[-1]
    out = export(folder, step, asked.out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")


if __name__ == "__main__":
    cli.run(main, Settings)
