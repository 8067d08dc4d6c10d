"""Files full of tensors: one safetensors file, or parts as torch.distributed.checkpoint writes them.

A tensor is filled where it is: on any device, and of a DTensor only the rows that this rank holds. Ranks read on their
own, without communication.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochat.dtensor import is_sharded, local, row_range
from nanochat.errors import UserError
from nanochat.files import atomic_write

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata


@torch.no_grad()
def read_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill all `tensors` from a safetensors file, one at a time."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_shapes(path, found, tensors)
            for name, tensor in tensors.items():
                if is_sharded(tensor):
                    first, end = row_range(tensor)
                    local(tensor).copy_(file.get_slice(name)[first:end])
                else:
                    tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from None


def read_parts(path: Path, prefix: str, tensors: dict[str, Tensor], leftover: bool = False) -> None:
    """Fill all `tensors` from the parts in `path`, wherever these were cut; leftover: there may be more in there."""
    reader, metadata = _open_state(path)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
    found = {n: shape for n, shape in shapes.items() if n in tensors or (n.startswith(prefix) and not leftover)}
    _check_shapes(path, found, tensors)
    _fill(reader, metadata, tensors)


def _open_state(path: Path) -> "tuple[FileSystemReader, Metadata]":
    from torch.distributed.checkpoint import FileSystemReader  # takes 3 s: only where a file of weights does not do

    reader = FileSystemReader(path)
    try:
        metadata = reader.read_metadata()
    except Exception as error:  # a damaged pickle can raise anything
        raise damaged(path, error) from None
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    return reader, metadata


def _fill(reader: "FileSystemReader", metadata: "Metadata", tensors: dict[str, Tensor]) -> None:
    """What dcp.load does, without its collectives: a rank that has nothing to read need not be here."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        planner.set_up_planner(tensors, metadata, is_coordinator=True)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    except Exception as error:  # nor is there a limit to what a damaged archive raises
        raise damaged(Path(reader.path), error) from None


def _check_shapes(path: Path, found: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in found.items():
        if wanted.get(name) != shape:
            raise UserError(f"{path}: {name} is {shape}, the model has {wanted.get(name)}")
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{path} lacks {len(missing)} tensors: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")


def write_file(state: Path, out: Path) -> None:
    """Weights from the parts in `state` to the safetensors file `out`: 8 bytes with the length of a JSON header, the
    header (what lies where), then the fp32 values, little-endian."""
    reader, metadata = _open_state(state)
    entries = {name: entry for name, entry in sorted(metadata.state_dict_metadata.items()) if name.startswith("model.")}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + 4 * entry.size.numel()  # type: ignore[union-attr]
        about = {"dtype": "F32", "shape": list(entry.size), "data_offsets": [begin, end]}  # type: ignore[union-attr]
        header[name.removeprefix("model.")] = about
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers map the file and want the values aligned
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            tensor = torch.empty(entry.size, dtype=torch.float32)  # type: ignore[union-attr]
            _fill(reader, metadata, {name: tensor})
            file.write(tensor.numpy().astype("<f4", copy=False).data)
        file.flush()
        os.fsync(file.fileno())


def damaged(path: Path, error: BaseException) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{path} is damaged ({reason}); delete the folder {path.parent} and use an earlier step")
