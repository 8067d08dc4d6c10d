"""The table of text sources, and reading the shards of one: what the tokenizer, the loaders and the evaluations use.
Getting them is nanochat.dataset's."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.files import content_hash, hold
from nanochat.paths import data_dir

HASHING_THREADS = 16
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


@dataclass(frozen=True)
class HubSource:
    """A dataset repository whose shards are numbered from 0; the last one is for validation, always."""

    repo: str
    last: int
    revision: str = "main"  # the commit behind it is written to the manifest and asked for from then on


# All sources of text, by name: a repository, or the function that makes the shards on this machine, called with the
# source and the number of train shards to have (-1: all). One that takes a folder has its name with ":DIR".
SOURCES: dict[str, HubSource | str] = {
    "fineweb-edu": HubSource("karpathy/fineweb-edu-100b-shuffle", last=1822),
    "climbmix": HubSource("karpathy/climbmix-400b-shuffle", last=6542),
    "pydocs": "nanochat.data.pydocs:make_shards",
    "local:DIR": "nanochat.data.local:take_folder",
}
*_FIRST, _LAST = SOURCES
SOURCE_NAMES = f"{', '.join(_FIRST)} or {_LAST}"


def source_flag(what: str) -> Parameter:
    """The flag that names a source of text: `Annotated[str, source_flag("Text to read")]`."""
    return Parameter(help=f"{what}: {SOURCE_NAMES}.")


def canonical(source: str) -> str:
    """`source` with a folder made absolute. Raises UserError when there is no such source."""
    find_source(source)
    kind, colon, folder = source.partition(":")
    return f"{kind}:{Path(folder).expanduser().resolve()}" if colon else source


def find_source(source: str) -> HubSource | str:
    kind, colon, folder = source.partition(":")
    found = SOURCES.get(f"{kind}:DIR" if colon and folder else source)
    if found is None:
        raise UserError(f"--source={source}: expected {SOURCE_NAMES}")
    return found


def command(source: str) -> str:
    count = " -n 8" if isinstance(find_source(source), HubSource) else ""
    return f"python -m nanochat.dataset{count} --source={source}"


def list_shards(source: str, split: Split) -> list[Path]:
    """Shards of one split in order: those the manifest names, checked for presence, size and content. Raises UserError
    naming the command that gets them when there are none or one is damaged."""
    source = canonical(source)
    entries = _entries(source, split)
    if not hold(data_dir(source)):
        raise UserError(f"{data_dir(source)} is being replaced by another run: wait until that is done")
    for path, entry in entries.items():
        size = path.stat().st_size if path.exists() else None
        if size != entry["size"]:
            state = "is missing" if size is None else f"has {size:,} bytes instead of {entry['size']:,}"
            raise UserError(f"{path} {state}: run `{command(source)}` to mend it")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of the ranks on a node one is enough; see content_hash
        with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing leaves other threads alone
            for (path, entry), digest in zip(entries.items(), pool.map(content_hash, entries), strict=True):
                if entry["sha256"] != digest:
                    raise UserError(f"{path} has changed since it was written: run `{command(source)}` to mend it")
    return list(entries)


def iter_documents(source: str, split: Split) -> Iterator[str]:
    """Every document of one split, in the order of the shards. Raises UserError for absent or damaged shards."""
    for path in list_shards(source, split):
        yield from parquet.read_documents(path)


def first_documents(source: str, split: Split, size: int) -> Iterator[str]:
    """Documents from the start of a split until they hold `size` bytes of UTF-8."""
    return parquet.up_to(iter_documents(source, split), size, parquet.utf8_bytes)


def dataset_bytes(source: str, split: Split) -> int:
    """UTF-8 bytes of text in one split, from the manifest. Raises UserError when there is none."""
    return sum(entry["utf8_bytes"] for entry in _entries(canonical(source), split).values())


def text_hash(source: str) -> str:
    """16 hex digits that change with the text of a source. Raises UserError when there is none, or a shard is gone."""
    files = [[path.name, entry["split"], entry["sha256"]]
             for split in SPLITS if list_shards(source, split)
             for path, entry in _entries(canonical(source), split).items()]  # fmt: skip
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:16]


def _entries(source: str, split: Split) -> dict[Path, parquet.Manifest]:
    folder = data_dir(source)
    manifest = parquet.load_manifest(folder)
    found = {folder / name: entry for name, entry in manifest["files"].items() if entry["split"] == split}
    # two folders can have the same slug (/a/b and /a-b); the manifest says whose shards these are
    if not found or manifest.get("source") != source:
        raise UserError(f"no {split} shards of {source} in {folder}: run `{command(source)}`")
    return found
