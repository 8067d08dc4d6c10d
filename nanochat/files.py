"""Files: written so that a kill, a full disk or a second process leaves nothing half done; and what comes in with those
of other people, JSON, the fields of an item, names of files, checked where it comes in."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import reprlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from nanochat import paths
from nanochat.errors import UserError

T = TypeVar("T")

STRANGER_SECONDS = 24 * 3600.0  # after which a file that a process of another host was writing counts as left
LARGE_BYTES = 16 * 2**20  # files above this are hashed once (at about 1 GB/s) and remembered
_hashes: dict[Path, dict[str, dict[str, Any]]] = {}  # store -> file -> newest line of hashes.jsonl
_swept: set[Path] = set()  # folders, by this process
_held: dict[Path, int] = {}  # folder -> file descriptor
_ours: set[Path] = set()  # temporary paths of this process
_remembering = threading.Lock()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path`, for a file or a folder, that becomes `path` on success and is removed on failure."""
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent.glob("*.tmp"))
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, removed afterwards with what is still in it."""
    folder = temporary_path(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        _remove(folder)


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes `target`'s place in the end: whoever is killed meanwhile leaves the old one, the new one,
    or for an instant none, but never files of both."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as folder, temporary_folder(target.with_name(f"{target.name}.old")) as old:
        yield folder
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)


def temporary_path(path: Path) -> Path:
    """Beside `path`, for this process alone and known to `sweep`; without what a killed one of its number left."""
    found = path.with_name(f"{path.name}.{_process_space()}-{os.getpid()}.tmp")
    if found not in _ours:
        _ours.add(found)
        _remove(found)
    return found


@functools.cache
def _process_space() -> str:
    """8 hex digits for the processes whose numbers mean the same: those of this host, or of this container."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += f" {os.readlink('/proc/self/ns/pid')}"
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def sweep(found: Iterable[Path]) -> None:
    """Of these, remove what processes that were killed have left half written: those of `temporary_path` whose process
    is gone, and those of another host that have not changed in a day."""
    for path in found:
        if (match := re.search(r"\.([0-9a-f]{8})-(\d+)\.tmp$", path.name)) is None:
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            dead = True
            if match[1] != _process_space():
                dead = time.time() - path.lstat().st_ctime > STRANGER_SECONDS
            elif int(match[2]) == os.getpid():
                dead = path.name not in {one.name for one in _ours}
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(match[2]), 0)
                    dead = False
            if dead:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 into `path`, whose folder is created where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    """A safetensors file with the rights of any new file: that package's own can be read by their owner alone, and a
    model in a shared store by nobody else."""
    import safetensors.torch  # imports torch

    path.touch()
    rights = path.stat().st_mode
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(rights)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the content of `path`."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """As sha256_file. That of a large file is kept in hashes.jsonl of the store, and the file read again only when it
    is another (inode, size) or its time of change, which no program can set back, is another."""
    stat = path.stat()
    if stat.st_size <= LARGE_BYTES:
        return sha256_file(path)
    mark = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return remembered(path, mark, stat.st_ctime, lambda: sha256_file(path))


def remembered(path: Path, mark: Any, changed: float, compute: Callable[[], str]) -> str:
    """What was computed of a file or folder when its `mark` was the same, the last time; changed: when that was."""
    base = paths.get_base_dir()
    with _remembering:
        if base not in _hashes:
            _hashes[base] = {str(known.get("file")): known for known in read_jsonl(base / "hashes.jsonl")}
    name = os.path.relpath(path, base)
    if (known := _hashes[base].get(name, {})).get("mark") == mark and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    record = {"file": name, "mark": mark, "sha256": compute()}
    if time.time() - changed > 1:  # what is being written may change without a later time
        with _remembering, contextlib.suppress(OSError):  # where the store cannot be written, it is read again
            _hashes[base][name] = record
            append_jsonl(base / "hashes.jsonl", record)
    return str(record["sha256"])


def walk(folder: Path, onerror: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """All below `folder` that is no folder, links followed, each folder once: two that lie in each other never end."""
    seen = set()
    for place, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in names)


def hold(folder: Path, alone: bool = False) -> bool:
    """Until this process ends or lets go, keep others from replacing what is in `folder`; alone: to replace it oneself.
    False where others hold it against that."""
    if folder not in _held:
        _held[folder] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(_held[folder], (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        pass
    return True


def let_go() -> None:
    """Of every folder that this process holds."""
    while _held:
        os.close(_held.popitem()[1])


def link_files(source: Path, target: Path, replace: bool = True) -> None:
    """All files below `source` also below `target`, as hard links (copies where the disk has none): what is replaced or
    deleted in one later stays in the other. replace: also where `target` has another of that name."""
    target.mkdir(parents=True, exist_ok=True)
    files = [file for file in source.rglob("*") if file.is_file() and file.suffix != ".tmp"]
    for name in sorted(file.relative_to(source) for file in files):
        if not replace and (target / name).exists():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target / name) as temporary:
            try:
                os.link((source / name).resolve(), temporary)
            except OSError:
                shutil.copyfile(source / name, temporary)


def append_jsonl(path: Path, record: dict[str, Any], sync: bool = False) -> None:
    """Add one line to a JSON Lines file. A last line that a kill has cut short gets an end first, so that it spoils no
    other; sync: the line is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        torn = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file, without lines that are no object (cut short by a kill); none without a file."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


# ---- from elsewhere

DEEPEST = 64  # lists and objects within each other: what nests deeper ends in a RecursionError, here or later
EXPECTED = {str: "text", int: "a whole number", list: "a list", dict: "an object", list[str]: "a list of texts"}


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without BOM. Raises ValueError where it is none."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST):
        children = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [child for each in children if isinstance(each, list) for child in each]
    if level:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    return value


def shown(value: Any) -> str:
    """`value` for a message, however large it is and whatever characters it has."""
    return reprlib.repr(value)[:100]


def fields(value: Any, **types: Any) -> list[Any]:
    """The fields of an object by their names, each of the type given (one of EXPECTED). Raises UserError otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{shown(value)}, expected an object with {', '.join(types)}")
    for name, kind in types.items():
        if name not in value:
            raise UserError(f"lacks {name}")
        found = value[name]
        fits = isinstance(found, list if kind == list[str] else kind) and not isinstance(found, bool)
        if not fits or (kind == list[str] and not all(isinstance(each, str) for each in found)):
            raise UserError(f"{name} is {shown(found)}, expected {EXPECTED[kind]}")
    return [value[name] for name in types]


def inside(folder: Path, name: str) -> Path:
    """The file that is called `name` in `folder`. Raises UserError where the name, or a link on the way, leads out of
    it: whoever wrote the name could else have other files read and overwritten."""
    try:
        path = folder / name
        leads_out = ".." in path.relative_to(folder).parts or not path.resolve().is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):  # an absolute name, a null byte, links in a circle
        leads_out = True
    if leads_out:
        raise UserError(f"{shown(name)} leads out of {folder}: only files within it are read, no links out")
    return path


def from_json(cls: type[T], values: dict[str, Any]) -> T:
    """A dataclass whose fields all have defaults, from what a file says. Raises TypeError for names that it does not
    have, other types than the defaults', and numbers that no size or count of ours comes near."""
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = values.get(field.name, default)
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if isinstance(value, dict):  # of metrics, which may be NaN
            fits &= all(type(number) in (int, float) for number in value.values())
        elif type(default) in (int, float):
            fits = fits and abs(value) < 2**31
        if not fits:
            raise TypeError(f"{field.name} is {value!r:.50}")
    return cls(**values)
