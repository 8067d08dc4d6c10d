"""Shards on disk: parquet files with a column `text`, and the manifest that says which of them are whole.

    base_data/<source>/shard_00000.parquet ...   base_data/<source>/manifest.json

A shard counts only once the manifest names it; the manifest is replaced atomically after each shard.
"""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.errors import UserError
from nanochat.files import atomic_write, atomic_write_text, content_hash, fields, hold, parse_json, sha256_file

T = TypeVar("T")
ROW_GROUP = 1024  # documents
GROUP_BYTES = 2**30  # that a row group may take in memory, however small its file
GROUP_RATIO = 100  # or so many times what it takes on the disk: text is compressed to a third
CODECS = {"UNCOMPRESSED", "SNAPPY", "ZSTD"}  # what every reader has, rustbpe too, which reads shards by itself
COUNTS: dict[str, dict[str, Any]] = {"documents": {"utf8_bytes": int}, "rows": {"origin": str}, "tokens": {}}
Manifest = dict[str, Any]


def load_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; one without files where there is none. Raises UserError when it is damaged."""
    path = folder / "manifest.json"
    try:
        manifest: Manifest = parse_json(path.read_bytes())
        (files,) = fields(manifest, files=dict)
        for name, entry in files.items():
            count = counted(entry)
            fields(entry, split=str, size=int, sha256=str, **{count: int}, **COUNTS[count])
            if Path(name).name != name:  # it is read, and removed, by this name
                raise ValueError(f"{name} is not in {folder}")
    except FileNotFoundError:
        return {"files": {}}
    except (TypeError, ValueError, UserError):  # TypeError: an entry that is a number
        raise UserError(f"{path} is damaged: delete {folder} and get the data again") from None
    return manifest


def counted(entry: Manifest) -> str:
    """What is counted in a file of this kind, one of COUNTS."""
    return next((name for name in COUNTS if name in entry), "documents")


def update_manifest(folder: Path, about: Manifest, files: Manifest, replace: bool = False) -> None:
    """Add `files` (and the facts `about` the source) to the manifest, or make them all there is. Locked and read again
    on each call, because a second download may be filling the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "manifest.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {} if replace else load_manifest(folder)["files"]
        manifest = {**about, "files": dict(sorted({**before, **files}.items()))}
        atomic_write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def replace_shards(folder: Path, about: Manifest, files: Manifest, pattern: str = "shard_*.parquet") -> None:
    """Make `files` all there is of a source, and remove its other shards, those that match `pattern`."""
    update_manifest(folder, about, files, replace=True)
    for path in folder.glob(pattern):
        if path.name not in files:
            path.unlink()


def about_to_replace(folder: Path) -> None:
    """Raises UserError where a run reads the shards in `folder`: it must not go on with others."""
    if folder.exists() and not hold(folder, alone=True):
        raise UserError(
            f"{folder} is being read by a run and would be replaced: wait for its end, or set another store"
        )


def is_here(path: Path, entry: Manifest | None) -> bool:
    """Whether a file has the size and the content that its manifest entry says: a flipped byte changes no size."""
    if entry is None or not path.is_file() or path.stat().st_size != entry["size"]:
        return False
    if not (same := entry["sha256"] == content_hash(path)):
        print(f"{path} has changed since it was written: it is made or fetched again", flush=True)
    return same


def all_here(folder: Path, manifest: Manifest) -> bool:
    files = manifest["files"]
    return bool(files) and all(is_here(folder / name, entry) for name, entry in files.items())


def describe(path: Path, split: str, name: str | None = None) -> Manifest:
    """Manifest entry of one shard, every row read on the way: size, sha256, documents, characters, UTF-8 bytes. Raises
    UserError (under `name`) when the file is not parquet with a string column `text` that every reader can read."""
    documents = characters = utf8_bytes = 0
    file = open_shard(path, name)
    if others := codecs(file) - CODECS:
        raise UserError(f"{name or path}: compressed by {', '.join(others)}; expected {', '.join(sorted(CODECS))}")
    for group in range(file.num_row_groups):
        column = _read_column(file, group, name or path.name)
        documents += len(column) - column.null_count
        characters += pc.sum(pc.utf8_length(column)).as_py() or 0
        utf8_bytes += pc.sum(pc.binary_length(column)).as_py() or 0
    return {
        "split": split,
        "size": path.stat().st_size,
        "sha256": sha256_file(path),
        "documents": documents,
        "characters": characters,
        "utf8_bytes": utf8_bytes,
    }


def open_shard(path: Path, name: str | None = None) -> pq.ParquetFile:
    """Open one shard. Raises UserError (under `name`) when it is not parquet or lacks a string column `text`."""
    name = name or str(path)
    try:
        file = pq.ParquetFile(pa.OSFile(os.fsencode(path)))  # bytes: a name need not be UTF-8
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{name} does not exist") from None
        raise UserError(f"{name}: expected a parquet file, found {_kind(path)}; delete it and get it again") from None
    schema = file.schema_arrow
    if schema.names.count("text") != 1:
        raise UserError(f"{name}: expected a column `text`, found {', '.join(schema.names) or 'none'}")
    kind = schema.field("text").type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if values not in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
        raise UserError(f"{name}: expected strings in column `text`, found {kind}")
    return file


def codecs(file: pq.ParquetFile) -> set[str]:
    """How the texts of a shard are compressed."""
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    columns = (group.column(index) for group in groups for index in range(group.num_columns))
    return {column.compression for column in columns if column.path_in_schema == "text"}


def read_texts(file: pq.ParquetFile, group: int, name: str) -> list[str]:
    """Documents of one row group, without nulls. Raises UserError when its bytes are damaged."""
    return [text for text in _read_column(file, group, name).to_pylist() if text is not None]


def read_documents(path: Path) -> Iterator[str]:
    """Every document of a shard, in order. Raises UserError where it is absent or damaged."""
    file = open_shard(path)
    for group in range(file.num_row_groups):
        yield from read_texts(file, group, str(path))


def batches(
    file: pq.ParquetFile, group: int, columns: list[str] | None = None, kind: pa.DataType | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a group; kind: that the one column is turned into. Raises ArrowInvalid where they are far larger in
    memory than on the disk: one text that a million rows refer to takes 2 KB there and all memory here."""
    about = file.metadata.row_group(group)
    parts = [about.column(index) for index in range(about.num_columns)]
    unpacked = sum(part.total_uncompressed_size for part in parts)
    limit = max(GROUP_BYTES, GROUP_RATIO * sum(part.total_compressed_size for part in parts))
    most_rows = max(1, min(ROW_GROUP, limit // max(1, unpacked)))  # if each is as large as all that the file has
    size = 0
    if max(unpacked, about.num_rows) <= limit:
        for batch in file.iter_batches(most_rows, [group], columns, use_threads=False):
            batch = batch if kind is None else pa.record_batch([batch[0].cast(kind)], batch.schema.names)
            if (size := size + batch.nbytes) > limit:
                break
            yield batch
        else:
            return
    raise pa.ArrowInvalid(f"its rows take more than {limit:,} bytes in memory, {GROUP_RATIO} times those on the disk")


def _read_column(file: pq.ParquetFile, group: int, name: str) -> pa.ChunkedArray:
    kind = file.schema_arrow.field("text").type
    if kind not in (pa.string(), pa.large_string()):  # a dictionary, views, bytes
        kind = pa.large_string()
    try:
        column = pa.chunked_array([batch[0] for batch in batches(file, group, ["text"], kind)], kind)
        column.validate(full=True)  # else what is not UTF-8 is found hours later
        return column
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}: row group {group} is damaged ({reason}); delete it and get it again") from None


def _kind(path: Path) -> str:
    with open(path, "rb") as stream:
        head = stream.read(64)
    return strange_kind(head) or ("a truncated one" if head.startswith(b"PAR1") else "something else")


def strange_kind(head: bytes) -> str:
    """What a file that begins with `head` is, where a server sent it in the place of data; else empty."""
    head = head.lstrip().lower()
    if not head:
        return "an empty file"
    return "an HTML page" if head.startswith((b"<!doctype", b"<html")) else ""


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def write_shard(path: Path, documents: Iterable[str], row_group: int = ROW_GROUP) -> None:
    """Write documents as zstd parquet in row groups of `row_group` documents, atomically."""
    schema = pa.schema([("text", pa.string())])
    with atomic_write(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        stream = iter(documents)
        while group := list(itertools.islice(stream, row_group)):
            writer.write_table(pa.table({"text": group}, schema))


def text_hash(text: str) -> bytes:
    """What decides a document's place: it depends on its text alone, so the order is the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def utf8_bytes(text: str) -> int:
    return len(text.encode())


def write_shards(
    folder: Path, documents: Iterable[str], val_bytes: int, shard_bytes: int, row_group: int = ROW_GROUP
) -> Manifest:
    """Write `documents`, already in their final order, as validation shard and train shards; returns entries. The first
    documents, up to `val_bytes` of UTF-8 (at least one), are for validation and become the last shard; the rest fills
    train shards of `shard_bytes` each. Raises UserError when nothing is left to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = iter(documents)
    held: list[str] = []
    size = 0
    for text in stream:
        size += utf8_bytes(text)
        if held and size > val_bytes:
            break
        held.append(text)
    else:
        raise UserError(f"{len(held)} documents are too few: one is needed for validation and one to train on")
    entries: Manifest = {}
    for part in parts(itertools.chain([text], stream), shard_bytes, utf8_bytes):
        name = shard_name(len(entries))
        write_shard(folder / name, part, row_group)
        entries[name] = describe(folder / name, "train")
    name = shard_name(len(entries))
    write_shard(folder / name, held, row_group)
    entries[name] = describe(folder / name, "val")
    return entries


def up_to(items: Iterable[T], limit: int, size_of: Callable[[T], int]) -> Iterator[T]:
    """The first of `items`, at least one, until together they reach `limit`."""
    size = 0
    for item in items:
        yield item
        size += size_of(item)
        if size >= limit:
            return


def parts(items: Iterator[T], limit: int, size_of: Callable[[T], int]) -> Iterator[Iterator[T]]:
    """`items` in parts that reach `limit`, the last aside; each is to be read before the next."""
    for first in items:
        yield up_to(itertools.chain([first], items), limit, size_of)
