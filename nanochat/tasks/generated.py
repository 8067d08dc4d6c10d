"""Material that tasks make from a text source, and the marker that says what it was made from.

task_data/<source>/<name>.json     source and fingerprint of the material <name>, sha256 of its files; written last
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat.data import sources
from nanochat.errors import UserError
from nanochat.files import atomic_write_text, parse_json, sha256_file
from nanochat.paths import slug, task_data_dir
from nanochat.tasks.common import stable_hash


def generate(source: str, name: str, rules: tuple[object, ...], make: Callable[[], dict[str, str]]) -> None:
    """Write the material `name`, unless it is there as it was written and was made from this text by these `rules`.
    make() -> the text of each of its files by name. Raises UserError without shards of `source`, and as `make` does."""
    folder = _folder(source)
    marker = _marker(folder, name)
    fingerprint = f"{stable_hash(sources.canonical(source), sources.text_hash(source), rules):016x}"
    if marker.get("fingerprint") == fingerprint and not _damaged(folder, marker):
        return
    files = make()
    for file, text in files.items():
        atomic_write_text(folder / file, text)
    digests = {file: sha256_file(folder / file) for file in files}
    marker = {"source": sources.canonical(source), "fingerprint": fingerprint, "files": digests}
    atomic_write_text(folder / f"{name}.json", json.dumps(marker, indent=1) + "\n")


def require(source: str, name: str, task: str) -> Path:
    """The folder of `source` with the material `name` in it, undamaged. Raises UserError with the command that makes it
    when it was not made, or a file of it is absent or was changed."""
    folder = _folder(source)
    marker = _marker(folder, name)
    command = f"python -m scripts.chat_data --source={source} --tasks={task}"
    # two sources can have the same slug (local:/a/b and local:/a-b); the marker says whose material this is
    if marker.get("source") != sources.canonical(source):
        raise UserError(f"no {name} of {source} in {folder}: run `{command}`")
    if damaged := _damaged(folder, marker):
        raise UserError(f"{folder}: {', '.join(damaged)} absent or damaged: run `{command}`")
    return folder


def _folder(source: str) -> Path:
    return task_data_dir() / slug(sources.canonical(source))


def _damaged(folder: Path, marker: dict[str, Any]) -> list[str]:
    """Names of the files that are not as they were written."""
    files = marker.get("files")
    if not isinstance(files, dict):
        return ["the list of files"]
    paths = {name: folder / name for name in files}
    return [name for name, path in paths.items() if not path.exists() or sha256_file(path) != files[name]]


def _marker(folder: Path, name: str) -> dict[str, Any]:
    try:
        marker = parse_json((folder / f"{name}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}
