"""Material that tasks make from a text source, and the markers that say what it was made from.

task_data/<source>/<name>.json     source and fingerprint of the material <name>, sha256 of its files; written last
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanochat import dataset
from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.files import atomic_write, sha256_file
from nanochat.paths import data_dir, slug, task_data_dir
from nanochat.tasks.splits import stable_hash


def source_dir(source: str) -> Path:
    """Where material made from the text of `source` stands."""
    return task_data_dir() / slug(dataset.canonical(source))


def fingerprint(source: str, *about: object) -> str:
    """16 hex digits over the shards of `source` and `about`, what was made of them. UserError without shards."""
    source = dataset.canonical(source)
    dataset.dataset_bytes(source, "train")  # refuses a source that is absent, or whose folder is another's
    files = parquet.load_manifest(data_dir(source))["files"]
    content = [(name, entry["split"], entry["sha256"]) for name, entry in sorted(files.items())]
    return f"{stable_hash(source, content, about):016x}"


def is_made(folder: Path, name: str, made_from: str) -> bool:
    """Whether the material `name` stands in `folder`, as it was written, and was made from just this."""
    marker = _marker(folder, name)
    return marker.get("fingerprint") == made_from and not _damaged(folder, marker)


def mark_made(folder: Path, name: str, source: str, made_from: str, files: Iterable[str]) -> None:
    """Say so; to be called when all `files` (names in `folder`) of the material stand."""
    digests = {file: _sha256(folder / file) for file in files}
    marker = {"source": dataset.canonical(source), "fingerprint": made_from, "files": digests}
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def require_made(source: str, name: str, task: str) -> Path:
    """The folder of `source` with the material `name` in it, whole.

    Raises UserError with the command that makes it when it was not made, or a file of it is absent or was changed.
    """
    folder = source_dir(source)
    marker = _marker(folder, name)
    command = f"python -m scripts.chat_data --source={source} --tasks={task}"
    # two sources can have the same slug (local:/a/b and local:/a-b); the marker says whose material this is
    if marker.get("source") != dataset.canonical(source):
        raise UserError(f"no {name} of {source} in {folder}: run `{command}`")
    if damaged := _damaged(folder, marker):
        raise UserError(f"{folder}: {', '.join(damaged)} absent or damaged: run `{command}`")
    return folder


def _damaged(folder: Path, marker: dict[str, Any]) -> list[str]:
    """Names of the files that are not as they were written."""
    files = marker.get("files")
    if not isinstance(files, dict):
        return ["the list of files"]
    return [name for name, digest in files.items() if _sha256(folder / name) != digest]


def _sha256(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        return sha256_file(path)
    except FileNotFoundError:
        return None


def _marker(folder: Path, name: str) -> dict[str, Any]:
    try:
        marker = json.loads((folder / f"{name}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}
