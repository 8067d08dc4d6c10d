"""Writing and reading files so that a kill, a full disk or a second process leaves nothing half done."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes `path` on success and is removed on failure."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """`text` as UTF-8 into `path`, whose folder is created where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the content of `path`."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def append_jsonl(path: Path, record: dict[str, Any], sync: bool = False) -> None:
    """Add one line to a JSON Lines file. A last line that a kill has cut short gets an end first, so that it spoils no
    other; sync: the line is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        torn = file.tell() > 0 and _last_byte(file) != b"\n"
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    byte: bytes = file.read(1)
    return byte


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file, without lines that are no JSON object (cut short by a kill); none where there
    is no file."""
    records = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records
