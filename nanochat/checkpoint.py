"""Checkpoints on disk: the layout, and how they are found, read, exported and deleted (nanochat.saver writes them).

    checkpoints/<stage>/<tag>/step_000123/state/              fp32 weights and optimizer state, written by
                                                              torch.distributed.checkpoint: model.<name>,
                                                              optimizer.<name>.<kind>
                                          model.safetensors   the weights in one file: of a run's last step, or exported
                                          meta.json           settings, model config, loop, loader and RNG state
                                          COMMITTED           written last; readers ignore folders without it
    checkpoints/<stage>/<tag>/tokenizer/                      that the run was trained with
    checkpoints/<stage>/<tag>/COMPLETE                        the run that writes here has reached its last step

Tensors are stored by name and offset in the unsharded tensor: any number of ranks reads them in any layout, each its
own rows in place, without communication.

    python -m nanochat.checkpoint export --stage=base --tag=d12 --out=d12.safetensors
"""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from nanochat import cli


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


if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanochat.dtensor import is_sharded, local, row_range
from nanochat.errors import UserError
from nanochat.files import atomic_write, atomic_write_text, sha256_file
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.paths import checkpoint_dir, get_base_dir, slug, tokenizer_dir
from nanochat.runtime import compute_dtype, get_dist_info, print0
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.tokenizer_io import read_meta as read_tokenizer_meta

STAGE_SCRIPTS = {  # which writes the checkpoints of each training stage
    "base": "scripts.base_train",
    "mid": "scripts.mid_train",
    "sft": "scripts.chat_sft",
    "rl": "scripts.chat_rl",
}
COMPLETE = "COMPLETE"  # file beside the steps of a run that has reached its last one
FORMAT = 2  # of meta.json and the layout


def step_dir(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def committed_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    names = [path.parent.name for path in folder.glob("step_*/COMMITTED")]
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d+", name))


def rng_state() -> dict[str, Any]:
    """State of every generator a training run may draw from, JSON-able."""
    state: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes().hex(), "python": random.getstate()}
    kind, keys, *rest = np.random.get_state()
    state["numpy"] = [kind, np.asarray(keys).tolist(), *rest]
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
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))


# ---- which checkpoints there are


def list_models() -> dict[str, list[str]]:
    """Stage -> tags of its runs that have a complete checkpoint; stages without any are left out."""
    tags = {stage: [path.name for path in _runs(stage)] for stage in STAGE_SCRIPTS}
    return {stage: names for stage, names in tags.items() if names}


def _runs(stage: str) -> list[Path]:
    return sorted(path for path in checkpoint_dir(stage, "x").parent.glob("*") if committed_steps(path))


def find_run(stage: str, tag: str | None = None) -> Path:
    """Folder of a run of `stage`: the one of this tag, or the newest. Raises UserError, which lists the runs of all
    stages, where it has no complete checkpoint."""
    if folders := [path for path in _runs(stage) if tag is None or path.name == slug(tag)]:
        return max(folders, key=lambda path: step_dir(path, committed_steps(path)[-1]).stat().st_mtime)
    wanted = f"{stage} checkpoint" if tag is None else f"{stage} checkpoint tagged {tag}"
    runs = "; ".join(f"{name}: {', '.join(tags)}" for name, tags in list_models().items())
    raise UserError(
        f"no {wanted} in {checkpoint_dir(stage, 'x').parent.parent}: run `python -m {STAGE_SCRIPTS[stage]}` first; "
        f"there are {runs or 'none at all (`bash speedrun.sh` runs all stages)'}"
    )


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """meta.json of one checkpoint. Raises UserError when it is absent, damaged or of another format."""
    path = step_dir(folder, step) / "meta.json"
    if not (path.parent / "COMMITTED").exists():
        steps = ", ".join(f"step {step}" for step in committed_steps(folder))
        raise UserError(f"no checkpoint {path.parent}; there are: {steps or 'none'}")
    with _damage_reported(path, OSError, ValueError, KeyError, TypeError):
        meta = json.loads(path.read_text())
        written = meta["format"]
    if written != FORMAT:
        raise UserError(f"{path} has format {written}, this program reads {FORMAT}: use the program that wrote it")
    return meta


# ---- reading


def load_model(
    stage: str, device: torch.device, tag: str | None = None, step: int | None = None
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """(unsharded model in evaluation mode, its tokenizer, meta) of a training stage's checkpoint; see find_model."""
    model, tokenizer, meta = find_model(stage, device, tag, step)
    fill_model(model, device, meta)
    return model.eval(), tokenizer, meta


def find_model(
    stage: str, device: torch.device, tag: str | None = None, step: int | None = None
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """(model on the meta device, to be sharded or not and then filled; its tokenizer; meta) of a checkpoint: without a
    tag of the stage's newest run, without a step its last. Raises UserError when there is none, when files are damaged,
    or when the tokenizer that it was trained with is nowhere in the store."""
    folder = find_run(stage, tag)
    step = step if step is not None else committed_steps(folder)[-1]
    meta = read_meta(folder, step)
    tokenizer = _find_tokenizer(folder, step, meta["tokenizer_hash"])
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]), compute_dtype(device))
    # a hash of meta.json, timings and all, tells this checkpoint from one that another run left at the same place
    identity = sha256_file(step_dir(folder, step) / "meta.json")[:16]
    return model, tokenizer, {**meta, "stage": stage, "step": step, "tag": folder.name, "identity": identity}


def _find_tokenizer(folder: Path, step: int, wanted: str) -> RustBPETokenizer:
    """That of this hash: beside the checkpoint, where it was trained by this version; else the store's, or any other
    run's. Raises UserError where none is."""
    base = get_base_dir()
    others = [*base.glob("checkpoints/*/*/tokenizer"), *base.glob("runs/*/tokenizer")]
    for place in (folder / "tokenizer", tokenizer_dir(), base / "tokenizer", *others):
        with suppress(UserError):  # one that is absent or damaged
            if read_tokenizer_meta(place)["hash"] == wanted:
                return RustBPETokenizer.from_directory(place)
    raise UserError(
        f"{step_dir(folder, step)} was trained with tokenizer {wanted}, the store holds {get_tokenizer().hash}: train "
        f"again, or put that tokenizer into {folder / 'tokenizer'}"
    )


def fill_model(model: GPT, device: torch.device, meta: dict[str, Any]) -> None:
    """Allocate the model of find_model and load its weights; each rank reads its own rows."""
    folder = checkpoint_dir(meta["stage"], meta["tag"])
    model.to_empty(device=device)
    load_weights(folder, meta["step"], model)
    model.init_buffers()
    print0(f"loaded {step_dir(folder, meta['step'])}")


def load_weights(folder: Path, step: int, model: nn.Module) -> None:
    """Fill `model` in place. Raises UserError for files that are damaged or belong to another model."""
    path = step_dir(folder, step) / "model.safetensors"
    weights = model.state_dict()
    if path.exists():
        _read_file(path, weights)
    else:
        _read_state(path.with_name("state"), {f"model.{name}": tensor for name, tensor in weights.items()}, "model.")


def load_optimizer(folder: Path, step: int, optimizer: MuonAdamW, num_steps: int) -> None:
    """Fill the optimizer's state in place (the number of ranks and the layout may differ from the writer's)."""
    state = {f"optimizer.{name}": tensor for name, tensor in optimizer.named_state().items()}
    _read_state(step_dir(folder, step) / "state", state)
    optimizer.num_steps = num_steps


@torch.no_grad()
def _read_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill all `tensors` from a safetensors file, one at a time."""
    with _damage_reported(path, OSError, SafetensorError), safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _check_shapes(path, shapes, tensors)
        for name, tensor in tensors.items():
            if is_sharded(tensor):
                first, end = row_range(tensor)
                local(tensor).copy_(file.get_slice(name)[first:end])
            else:
                tensor.copy_(file.get_tensor(name))


def _read_state(path: Path, tensors: dict[str, Tensor], complete: str | None = None) -> None:
    """Fill all `tensors` from the folder `path`; complete: which has none but these whose names begin so."""
    shapes = _state_shapes(path)
    checked = (name for name in shapes if name in tensors or (complete is not None and name.startswith(complete)))
    _check_shapes(path, {name: shapes[name] for name in checked}, tensors)
    _fill(path, tensors)


def _state_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from torch.distributed.checkpoint import FileSystemReader  # takes 3 s: only where a file of weights does not do

    with _damage_reported(path, Exception):  # a damaged pickle can raise anything
        entries: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items()}


def _fill(path: Path, tensors: dict[str, Tensor]) -> None:
    """What dcp.load does, without its collectives: a rank that has nothing to read need not take part."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

    reader = FileSystemReader(path)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _damage_reported(path, Exception):  # nor is there a limit to what a damaged archive raises
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        planner.set_up_planner(tensors, metadata, is_coordinator=True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _check_shapes(path: Path, found: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in found.items():
        if wanted.get(name) != shape:
            raise UserError(f"{path}: {name} is {shape}, the model has {wanted.get(name)}")
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{path} lacks {len(missing)} tensors: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")


@contextmanager
def _damage_reported(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"{path} is damaged ({reason}); delete the folder {path.parent} and use an earlier step"
        raise UserError(message) from None


# ---- writing


def write_weights(state: Path, out: Path) -> None:
    """Weights from the folder `state` into the safetensors file `out`; holds them all on the CPU."""
    shapes = _state_shapes(state)
    weights = {name: torch.empty(shape) for name, shape in sorted(shapes.items()) if name.startswith("model.")}
    _fill(state, weights)
    with atomic_write(out) as temporary:
        named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        safetensors.torch.save_file(named, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def export(folder: Path, step: int, out: Path | None = None) -> Path:
    """Write the weights of one checkpoint as a single safetensors file (default: into its folder); returns its path."""
    read_meta(folder, step)
    out = out or step_dir(folder, step) / "model.safetensors"
    write_weights(step_dir(folder, step) / "state", out)
    return out


def update_meta(folder: Path, step: int, known: dict[str, Any]) -> None:
    """Add to meta.json what came to be known after the checkpoint was saved (rank 0)."""
    path = step_dir(folder, step) / "meta.json"
    atomic_write_text(path, json.dumps({**json.loads(path.read_text()), **known}, indent=1) + "\n")


def mark_complete(folder: Path) -> None:
    """Say that the run writing into `folder` is done, its section of the report included (rank 0 calls this last)."""
    if get_dist_info().rank == 0:
        (folder / COMPLETE).touch()


def prune(folder: Path, keep_last: int, keep_every: int = -1) -> None:
    """Delete all checkpoints but the newest `keep_last` and those of every `keep_every`-th step (if > 0)."""
    for step in committed_steps(folder)[:-keep_last]:
        if keep_every <= 0 or step % keep_every:
            discard(step_dir(folder, step))


def discard(checkpoint: Path) -> None:
    """Delete one checkpoint, if it exists. COMMITTED goes first: half a folder is never read."""
    (checkpoint / "COMMITTED").unlink(missing_ok=True)
    if checkpoint.exists():
        shutil.rmtree(checkpoint)


def set_aside(folder: Path) -> Path:
    """Rename a folder of earlier checkpoints to the first free `<name>.<n>`: another run is about to take its name."""
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    return folder.rename(next(name for name in names if not name.exists()))


# ---- python -m nanochat.checkpoint


def main(settings: Settings) -> None:
    folder = find_run(settings.stage, settings.tag)
    step = settings.step if settings.step >= 0 else committed_steps(folder)[-1]
    out = export(folder, step, settings.out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")


if __name__ == "__main__":
    cli.run(main, Settings)
