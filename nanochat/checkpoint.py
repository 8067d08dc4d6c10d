"""Atomic checkpoints: weights, optimizer state and everything needed to go on exactly.

    checkpoints/<stage>/<tag>/step_000123/model.safetensors   weights, fp32, whole
                                          state/              optimizer state (torch.distributed.checkpoint)
                                          meta.json           settings, model config, loop, loader and RNG state
                                          COMMITTED           written last: without it nothing here exists for a reader
    checkpoints/<stage>/<tag>/COMPLETE                        the run that writes here has reached its last step

The optimizer state lies under parameter names, so any number of ranks can take it up.
"""

import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.paths import checkpoint_dir, slug
from nanochat.runtime import barrier, compute_dtype, print0
from nanochat.shards import replacing

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
FORMAT = 1  # of meta.json and the layout; raised when old readers could not read new checkpoints


def step_dir(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps of whole checkpoints under `folder`, ascending."""
    names = [path.parent.name for path in folder.glob("step_*/COMMITTED")]
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))


def save(folder: Path, step: int, model: GPT, optimizer: MuonAdamW | None, meta: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` (every rank calls this) and return its folder.

    It is written under another name and renamed when whole, so that a full disk or a kill leaves the earlier ones as
    they were. meta must be JSON-able; the RNG state of every rank is added here.
    """
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    rank = dist.get_rank() if distributed else 0
    target = step_dir(folder, step)
    partial = folder / f".partial_{step:06d}"
    rng: list[Any] = [rng_state()]
    if distributed:
        rng = [None] * dist.get_world_size()
        dist.all_gather_object(rng, rng_state())
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        _check_space(folder, model, optimizer)
        if optimizer is not None:
            import torch.distributed.checkpoint as dcp  # takes 3 s: only for those who train

            with _no_lone_process_warning():
                dcp.save(optimizer.named_state(), checkpoint_id=str(partial / "state"), no_dist=not distributed)
        if rank == 0:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, partial / "model.safetensors")
            steps = optimizer.num_steps if optimizer is not None else 0
            document = {"format": FORMAT, "step": step, "optimizer_steps": steps, **meta, "rng": rng}
            (partial / "meta.json").write_text(json.dumps(document, indent=1) + "\n")
            (partial / "COMMITTED").touch()
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    except SafetensorError as error:  # how a full disk shows from inside safetensors
        raise UserError(f"cannot write {partial}: {error}; free some space and run again with --resume=auto") from None
    finally:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    barrier()
    return target


def _check_space(folder: Path, model: GPT, optimizer: MuonAdamW | None) -> None:
    """Raise UserError when the checkpoint will not fit: what a full disk raises from inside the writers is anything
    from OSError to a RuntimeError about an archive."""
    ranks = optimizer.world if optimizer is not None else 1
    state = optimizer.named_state().values() if optimizer is not None else []
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in state]
    needed = sum(tensor.nbytes for tensor in model.state_dict().values()) + ranks * sum(t.nbytes for t in local)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"disk full: the checkpoint needs {needed / 1e6:,.0f} MB and {folder} has {free / 1e6:,.0f} MB left; free "
            "some space and run again with --resume=auto"
        )


@contextmanager
def _no_lone_process_warning() -> Iterator[None]:
    """torch warns at each save and load that it takes a process without a group for a lone one; here it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


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
        raise _damaged(path, error) from None
    if newer:
        raise UserError(f"{path} has format {meta['format']}, this program reads {FORMAT}: update the program")
    return meta


def _damaged(path: Path, error: BaseException) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{path} is damaged ({reason}); delete the folder {path.parent} and use an earlier step")


def load_weights(folder: Path, step: int, model: GPT, device: torch.device) -> None:
    """Fill `model` in place. Raises UserError for files that are damaged or belong to another model."""
    path = step_dir(folder, step) / "model.safetensors"
    try:
        weights = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if wanted.get(name) != tuple(tensor.shape):
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, the model has {wanted.get(name)}")
    if missing := wanted.keys() - weights.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing)[:3])} of {len(missing)} weights")
    model.load_state_dict(weights)


def load_optimizer(folder: Path, step: int, optimizer: MuonAdamW, num_steps: int) -> None:
    """Fill the optimizer's state in place (every rank calls this; the number of ranks may differ from the writer's)."""
    import torch.distributed.checkpoint as dcp

    path = step_dir(folder, step) / "state"
    no_dist = not (dist.is_initialized() and dist.get_world_size() > 1)
    try:
        with _no_lone_process_warning():
            dcp.load(optimizer.named_state(), checkpoint_id=str(path), no_dist=no_dist)
    except (OSError, RuntimeError, ValueError, EOFError, dcp.api.CheckpointException) as error:
        raise _damaged(path, error) from None
    optimizer.num_steps = num_steps


def load_model(
    stage: str, device: torch.device, tag: str | None = None, step: int | None = None
) -> tuple[GPT, "RustBPETokenizer", dict[str, Any]]:
    """(model in evaluation mode, its tokenizer, meta) of a training stage's checkpoint.

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
    model.to_empty(device=device)
    load_weights(folder, step, model, device)
    model.init_buffers()
    print0(f"loaded {step_dir(folder, step)}")
    return model.eval(), tokenizer, {**meta, "tag": folder.name, "identity": identity(folder, step)}


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


def mark_complete(folder: Path) -> None:
    """Say that the run writing into `folder` has reached its last step."""
    with replacing(folder / COMPLETE) as temporary:
        temporary.touch()


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (rank 0). COMMITTED goes first: half a folder is never read."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    for step in committed_steps(folder)[:-keep]:
        (step_dir(folder, step) / "COMMITTED").unlink()
        shutil.rmtree(step_dir(folder, step))


def set_aside(folder: Path) -> Path:
    """Rename a folder of earlier checkpoints to the first free `<name>.<n>`: another run is about to take its name."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    return target
