"""Reads the folder that torch.distributed.checkpoint (DCP) has written, without running anything that is in it.

DCP's index, `.metadata`, is a pickle, and DCP's own reader calls whatever it names. Here everything that it names is a
stand-in; what is left are names and numbers, which have to agree with the files beside it. The tensors are read by
torch's weights-only loader. What is damaged or hostile may raise any Exception.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nanochat.dtensor import is_sharded, local, row_range


class Part(NamedTuple):
    """Rows of a tensor that one rank has written."""

    first: int
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


class Entry(NamedTuple):
    """One tensor; the parts are all its rows, in order."""

    shape: tuple[int, ...]
    parts: list[Part]


class _StandIn:
    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):  # in Python: the one in C takes 30 GB for a place in its memo that a file names
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("torch", "pathlib"):
            raise ValueError(f"its index names {module}.{name}, which no checkpoint does")
        return _StandIn

    def _fill(self, items: list[Any]) -> None:
        if not all(isinstance(key, str | _StandIn) for key in items[::2]):  # a tuple that holds the one before it
            raise ValueError("its index has keys that are no names")  # twice, and so on, takes hours to hash
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))  # type: ignore[attr-defined]

    # without sets, and dictionaries filled in other ways than it is written in
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in b"d\x90\x91\x96"
    }
    dispatch[pickle.SETITEMS[0]] = lambda self: self._fill(self.pop_mark())
    dispatch[pickle.SETITEM[0]] = lambda self: self._fill([self.stack.pop(-2), self.stack.pop()])


def read_index(path: Path) -> dict[str, Entry]:
    """The tensors in the folder `path`."""
    raw = _Unpickler(io.BytesIO((path / ".metadata").read_bytes())).load().state  # a file would be read in any length
    sizes = {part.name: part.stat().st_size for part in path.glob("__*.distcp")}
    places = {}
    for key, place in raw["storage_data"].items():
        file_name, offset, length = (place.state[field] for field in ("relative_path", "offset", "length"))
        name = key.state["fqn"]
        if not isinstance(file_name, str) or not isinstance(name, str):
            raise ValueError("its index has places that are no names")
        if not 0 <= offset <= offset + length <= sizes.get(file_name, -1):  # nor is a file elsewhere ever opened
            raise ValueError(f"{file_name!r:.50} is missing or too short")
        places[name, _size(key.state["offset"])] = file_name, offset, length
    index = {}
    for name, entry in raw["state_dict_metadata"].items():
        shape, parts, row = _size(entry.state["size"]), [], 0
        chunks = [(_size(chunk.state["offsets"]), _size(chunk.state["sizes"])) for chunk in entry.state["chunks"]]
        for start, part_shape in sorted(chunks):
            if (start, part_shape) != ((row, *[0] * (len(shape) - 1))[: len(shape)], (*part_shape[:1], *shape[1:])):
                raise ValueError(f"its index does not have {name} row by row")
            parts.append(Part(row, part_shape, *places[name, start]))
            row += part_shape[0] if shape else 1
        if row != (shape[0] if shape else 1):
            raise ValueError(f"its index has {row} rows of {name}, which has {shape[:1]}")
        index[name] = Entry(shape, parts)
    if (elements := sum(math.prod(entry.shape) for entry in index.values())) > sum(sizes.values()):
        raise ValueError(f"its index promises {elements} numbers, and the files have {sum(sizes.values())} bytes")
    return index


def _size(record: Any) -> tuple[int, ...]:
    return tuple(torch.Size(record.args[0]))


def _check_archive(stored: io.BytesIO, length: int) -> None:
    """Raise ValueError where a tensor's file would be larger in memory than it is: torch would unpack it first."""
    with zipfile.ZipFile(stored) as archive:
        parts = archive.infolist()
    if sum(part.file_size for part in parts) > length or any(part.compress_type for part in parts):
        raise ValueError("it has compressed tensors, which this program never writes")
    stored.seek(0)


@torch.no_grad()
def read_tensors(path: Path, index: dict[str, Entry], tensors: dict[str, Tensor]) -> None:
    """Fill all `tensors`, of which a rank may hold only some rows, without communication."""
    for name, tensor in tensors.items():
        rows, begin = torch.atleast_1d(local(tensor)), row_range(tensor)[0] if is_sharded(tensor) else 0
        for part in index[name].parts:
            count = part.shape[0] if part.shape else 1
            first, end = max(begin, part.first), min(begin + len(rows), part.first + count)
            if first >= end:
                continue
            with (path / part.file).open("rb") as file:
                file.seek(part.offset)
                stored = io.BytesIO(file.read(part.length))
            _check_archive(stored, part.length)
            value = torch.load(stored, map_location="cpu", weights_only=True)
            if value.shape != part.shape:
                raise ValueError(f"{name} has {tuple(value.shape)} where the index says {part.shape}")
            rows[first - begin : end - begin].copy_(torch.atleast_1d(value)[first - part.first : end - part.first])
