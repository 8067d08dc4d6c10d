"""Checkpoints on disk: the layout, and how they are found, read, exported and deleted (nanochat.saver writes them).

    checkpoints/<stage>/<tag>/step_000123/state/              fp32 weights and optimizer state, written by
                                                              torch.distributed.checkpoint: model.<name>,
                                                              optimizer.<name>.<kind>
                                          model.safetensors   the weights in one file: of a run's last step, or exported
                                          meta.json           settings, model config, loop, loader and RNG state
                                          COMMITTED           written last; readers ignore folders without it. SHA-256
                                                              of each file, as `sha256sum -c COMMITTED` reads it
    checkpoints/<stage>/<tag>/tokenizer/                      that the run was trained with
    checkpoints/<stage>/<tag>/COMPLETE                        the run that writes here has reached its last step

Tensors are stored by name and offset in the unsharded tensor: any number of ranks reads them in any layout, each its
own rows in place, without communication.

    python -m nanochat.checkpoint export --stage=base --tag=d12 --out=d12.safetensors
"""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat import cli
from nanochat.flags import Stage


@dataclass(frozen=True)
class Settings:
    """Write the weights of a checkpoint as one safetensors file, for other programs."""

    action: Literal["export"] = "export"
    """export: the only one"""
    _: KW_ONLY
    stage: Stage = "base"
    """training stage that made the checkpoint"""
    tag: str | None = None
    """run of that stage; by default the newest"""
    step: Annotated[int, cli.int_flag(gte=-1)] = -1
    """step of the checkpoint; -1: the last"""
    out: Path | None = None
    """file to write; by default model.safetensors in the folder of the checkpoint"""


if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanochat import dcp
from nanochat.dtensor import is_sharded, local, row_range
from nanochat.errors import UserError
from nanochat.files import atomic_write, atomic_write_text, from_json, save_tensors, sha256_file, walk
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.paths import checkpoint_dir, get_base_dir, slug, tokenizer_dir
from nanochat.runtime import compute_dtype, on_first_rank, print0
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.tokenizer import read_meta as read_tokenizer_meta

STAGE_SCRIPTS = {  # which writes the checkpoints of each training stage
    "base": "scripts.base_train",
    "mid": "scripts.mid_train",
    "sft": "scripts.chat_sft",
    "rl": "scripts.chat_rl",
}
COMPLETE = "COMPLETE"  # file beside the steps of a run that has reached its last one
FORMAT = 2  # of meta.json and the layout
META_TYPES = {"stage": str, "tokenizer_hash": str, "step": int, "optimizer_steps": int, "num_iterations": int,
              "world_size": int, "settings": dict, "model_config": dict, "recipe": dict, "loop": dict, "loader": dict,
              "parent": dict, "before": dict, "rng": list}  # fmt: skip
HASHING_THREADS = 16
WTE = "transformer.wte.weight"


class Damaged(UserError):
    """A checkpoint that is not as it was saved, or was never one of ours."""


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
    """meta.json of one checkpoint. Raises UserError when it is absent or of another format, Damaged when it is no JSON
    or holds values of other types than are written."""
    path = step_dir(folder, step) / "meta.json"
    if not (path.parent / "COMMITTED").exists():
        steps = ", ".join(f"step {step}" for step in committed_steps(folder))
        raise UserError(f"no checkpoint {path.parent}; there are: {steps or 'none'}")
    with damage_reported(path, OSError, ValueError, KeyError, TypeError, RecursionError):
        if strange := [p.name for p in walk(path.parent) if p.exists() and not p.is_file()]:  # a pipe is read for ever
            raise ValueError(f"beside it {strange[0]} is no file")
        meta: dict[str, Any] = json.loads(path.read_text())
        written = meta["format"]
        for name, kind in META_TYPES.items():
            if name in meta and type(meta[name]) is not kind:
                raise TypeError(f"{name} is {meta[name]!r:.50}, no {kind.__name__}")
        for name, value in meta.get("recipe", {}).items():
            number = type(value) in (int, float) and name.endswith(("_size", "_len")) <= value < 2**31  # those from 1
            if not (number or type(value) is {"source": str, "use_muon": bool}.get(name)):
                raise TypeError(f"recipe: {name} is {value!r:.50}")
        for name, value in meta.get("loader", {}).items():  # names, and where the order of the data stands
            if type(value) is not str and (np.asarray(value).dtype.kind not in "iu" or np.min(value) < 0):
                raise TypeError(f"loader: {name} is {value!r:.50}")
    if written != FORMAT:
        raise UserError(
            f"{path} has format {written!r:.50}, this program reads {FORMAT}: use the program that wrote it"
        )
    return meta


# ---- is it whole


def newest(folder: Path, resume: bool = False) -> dict[str, Any]:
    """meta.json of the newest checkpoint of `folder` that is whole (see check); damaged ones after it are set aside,
    saying so. Raises Damaged, and touches nothing, where none is whole. For one process; `on_first_rank` of several."""
    damaged: list[tuple[Path, Damaged]] = []
    for step in reversed(committed_steps(folder)):
        path = step_dir(folder, step)
        before = _committed(path)
        try:
            meta = check(folder, step, resume)
        except UserError as error:
            if _committed(path) != before:  # a training run has deleted or amended it meanwhile
                return newest(folder, resume)
            if not isinstance(error, Damaged):
                raise
            damaged.append((path, error))
            continue
        for path, reason in damaged:
            try:
                (folder / COMPLETE).unlink(missing_ok=True)  # the run has lost its last step, and can make it again
                kept = f"kept as {set_aside(path, '.damaged').name}"
            except OSError as denied:  # somebody else's
                kept = f"left where it is ({denied.strerror})"
            print0(f"{reason}; {kept}, step {step} is used")
        return meta
    raise damaged[0][1] if damaged else UserError(f"there is no checkpoint in {folder} any more")


def check(folder: Path, step: int, resume: bool = False) -> dict[str, Any]:
    """meta.json of a checkpoint whose files are as they were saved; without `resume` only those that a model is read
    from, which also have to fit its config. Raises Damaged, or UserError where there is none."""
    meta, path = read_meta(folder, step), step_dir(folder, step)
    weights = path / "model.safetensors"
    shapes = {} if resume else _file_shapes(weights) if weights.exists() else _state_shapes(path / "state")
    with damage_reported(path / "meta.json", ValueError, KeyError, TypeError, UserError):
        if meta.setdefault("step", step) != step:
            raise ValueError(f"it is of step {meta['step']}")
        if not resume:
            if lacking := {"model_config", "tokenizer_hash", "settings"} - meta.keys():
                raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
            config = from_json(GPTConfig, meta["model_config"])  # looked at before a billion layers are built
            wanted = {WTE: torch.empty(config.vocab_size, config.n_embd, device="meta")}
            _check_shapes(path, {name: shape for name, shape in shapes.items() if name == WTE}, wanted)
            layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.h.")})
            if layers != config.n_layer:
                raise UserError(f"n_layer is {config.n_layer}, the weights have {layers} layers")
    verify(path, *([""] if resume else []))
    return meta


def _committed(path: Path) -> bytes | None:
    try:
        return (path / "COMMITTED").read_bytes()
    except OSError:
        return None


def sums(path: Path) -> list[tuple[str, str]]:
    """(SHA-256, name) of the files of the checkpoint `path`; two while one is replaced, none where it is older."""
    with damage_reported(path / "COMMITTED", ValueError, OSError):
        lines = (path / "COMMITTED").read_text().splitlines()
        found = [re.fullmatch(r"([0-9a-f]{64})  ((?:state/)?[.\w]+)", line) for line in lines]
        pairs = [(match[1], match[2]) for match in found if match]
        if len(pairs) < len(lines) or (pairs and "meta.json" not in {name for _, name in pairs}):
            raise ValueError("it has other lines than `sha256sum` writes of a checkpoint's files")
    return pairs


def write_sums(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    with atomic_write(path / "COMMITTED") as temporary:
        temporary.write_text("".join(f"{digest}  {name}\n" for digest, name in pairs))


def _record(path: Path, name: str, *digests: str) -> None:
    """Have COMMITTED say that the file `name` has one of these; a checkpoint without any stays so."""
    if pairs := sums(path):
        write_sums(path, [pair for pair in pairs if pair[1] != name] + [(digest, name) for digest in digests])


def verify(path: Path, *prefixes: str) -> None:
    """Raise Damaged where a file whose name begins with one of these (without any: what a model is read from) is not as
    COMMITTED says. model.safetensors may be missing: state/ has the weights too."""
    model = ("meta.json", "model.safetensors" if (path / "model.safetensors").exists() else "state/")
    listed = [(digest, name) for digest, name in sums(path) if name.startswith(prefixes or model)]
    names = sorted({name for _, name in listed if (path / name).is_file()})
    with damage_reported(path, OSError), ThreadPoolExecutor(HASHING_THREADS) as pool:
        found = dict(zip(names, pool.map(sha256_file, [path / name for name in names]), strict=True))
    for name in dict.fromkeys(name for _, name in listed):
        shown = path / "state" if name.startswith("state/") else path / name
        with damage_reported(shown, ValueError):
            if name not in found and name != "model.safetensors":
                raise ValueError(f"{Path(name).name} is missing")
            if name in found and (found[name], name) not in listed:
                raise ValueError(f"the content of {Path(name).name} is not what was saved")


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
    tag of the stage's newest run, without a step the last that is whole; all ranks get the same. Raises UserError when
    there is none, when files are damaged, or when the tokenizer that it was trained with is nowhere in the store."""

    def choose() -> tuple[Path, dict[str, Any]]:
        folder = find_run(stage, tag)
        return folder, newest(folder) if step is None else check(folder, step)

    folder, meta = on_first_rank(choose)
    path = step_dir(folder, meta["step"])
    tokenizer = _find_tokenizer(path, meta["tokenizer_hash"])
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]), compute_dtype(device))
    # a hash of meta.json, timings and all, tells this checkpoint from one that another run left at the same place
    identity = sha256_file(path / "meta.json")[:16]
    return model, tokenizer, {**meta, "stage": stage, "tag": folder.name, "identity": identity}


def _find_tokenizer(path: Path, wanted: str) -> RustBPETokenizer:
    """That of this hash: beside the checkpoint, where it was trained by this version; else the store's, or any other
    run's. Raises UserError where none is."""
    base, own = get_base_dir(), path.parent / "tokenizer"
    others = [*base.glob("checkpoints/*/*/tokenizer"), *base.glob("runs/*/tokenizer")]
    for place in (own, tokenizer_dir(), base / "tokenizer", *others):
        with suppress(UserError):  # one that is absent or damaged
            if read_tokenizer_meta(place)["hash"] == wanted:
                return RustBPETokenizer.from_directory(place)
    raise UserError(
        f"{path} was trained with tokenizer {wanted}, the store holds {get_tokenizer().hash}: train again, or put that "
        f"tokenizer into {own}"
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
    _check_shapes(path, _file_shapes(path), tensors)
    with damage_reported(path, OSError, SafetensorError), safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if is_sharded(tensor):
                first, end = row_range(tensor)
                local(tensor).copy_(file.get_slice(name)[first:end])
            else:
                tensor.copy_(file.get_tensor(name))


def _file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with damage_reported(path, OSError, SafetensorError, ValueError), safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if strange := [name for name, part in parts.items() if "F" not in part.get_dtype()]:
            raise ValueError(f"{strange[0]} is {parts[strange[0]].get_dtype()}, no floating-point numbers")
    return {name: tuple(part.get_shape()) for name, part in parts.items()}


def _read_state(path: Path, tensors: dict[str, Tensor], complete: str | None = None) -> None:
    """Fill all `tensors` from the folder `path`; complete: which has none but these whose names begin so."""
    with damage_reported(path, Exception):  # a damaged pickle or archive can raise anything
        index = dcp.read_index(path)
    checked = (name for name in index if name in tensors or (complete is not None and name.startswith(complete)))
    _check_shapes(path, {name: index[name].shape for name in checked}, tensors)
    with damage_reported(path, Exception):
        dcp.read_tensors(path, index, tensors)


def _state_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the weights in the folder `path`."""
    with damage_reported(path, Exception):
        index = dcp.read_index(path)
    return {name.removeprefix("model."): index[name].shape for name in sorted(index) if name.startswith("model.")}


def _check_shapes(path: Path, found: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in found.items():
        if wanted.get(name) != shape:
            raise UserError(f"{path}: {name} is {shape}, the model has {wanted.get(name)}")
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{path} lacks {len(missing)} tensors: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")


@contextmanager
def damage_reported(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raise Damaged, which names the file, in place of these."""
    try:
        yield
    except kinds as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Damaged(f"{path} is damaged ({reason}); take another step, or put a copy of this one back") from None


# ---- writing


def write_weights(state: Path, out: Path) -> None:
    """Weights from the folder `state` into the safetensors file `out`; holds them all on the CPU."""
    weights = {name: torch.empty(shape) for name, shape in _state_shapes(state).items()}
    _read_state(state, {f"model.{name}": tensor for name, tensor in weights.items()})
    with atomic_write(out) as temporary:
        save_tensors(weights, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def export(folder: Path, step: int, out: Path | None = None) -> Path:
    """Write the weights of one checkpoint as a single safetensors file (default: into its folder); returns its path."""
    read_meta(folder, step)
    path = step_dir(folder, step)
    verify(path, "meta.json", "state/")
    write_weights(path / "state", out or path / "model.safetensors")
    if out is None:
        _record(path, "model.safetensors", sha256_file(path / "model.safetensors"))
    return out or path / "model.safetensors"


def update_meta(folder: Path, step: int, known: dict[str, Any]) -> None:
    """Add to meta.json what came to be known after the checkpoint was saved (rank 0)."""
    path = step_dir(folder, step)
    text = json.dumps({**json.loads((path / "meta.json").read_text()), **known}, indent=1) + "\n"
    old, new = sha256_file(path / "meta.json"), hashlib.sha256(text.encode()).hexdigest()
    _record(path, "meta.json", old, new)  # a kill between the two leaves a checkpoint that is whole
    atomic_write_text(path / "meta.json", text)
    _record(path, "meta.json", new)


def mark_complete(folder: Path, section: Path) -> None:
    """Say that the run writing into `folder` is done (rank 0 calls this last), and the SHA-256 of what nothing else of
    it has: its section of the report, its tokenizer."""
    kept = [section, *sorted(path for path in (folder / "tokenizer").glob("*") if path.suffix != ".tmp")]
    lines = (f"{sha256_file(path)}  {os.path.relpath(path, get_base_dir())}\n" for path in kept)
    atomic_write_text(folder / COMPLETE, "".join(lines))


def is_complete(folder: Path) -> bool:
    """Whether that was said, and these are still as they were (earlier versions did not say what they are)."""
    base = get_base_dir()
    with suppress(OSError, ValueError):
        sums = [line.partition("  ") for line in (folder / COMPLETE).read_text(errors="replace").splitlines()]
        return all((base / name).is_file() and sha256_file(base / name) == digest for digest, _, name in sums)
    return False


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


def set_aside(folder: Path, mark: str = "") -> Path:
    """Rename a folder to the first free `<name><mark>.<n>`: another is about to take its name."""
    names = (folder.with_name(f"{folder.name}{mark}.{number}") for number in itertools.count(1))
    return folder.rename(next(name for name in names if not name.exists()))


# ---- python -m nanochat.checkpoint


def main(settings: Settings) -> None:
    folder = find_run(settings.stage, settings.tag)
    step = settings.step if settings.step >= 0 else newest(folder)["step"]
    out = export(folder, step, settings.out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:,.1f} MB)")


if __name__ == "__main__":
    cli.run(main, Settings)
