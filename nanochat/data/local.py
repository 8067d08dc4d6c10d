"""A folder of the user's own text as shards: parquet (column `text`), .jsonl (field `text`), .txt.

Documents are dropped when they repeat another one exactly, and ordered by a hash of their text: a shuffle that is the
same on every machine and does not depend on how the text is spread over files. The first per cent (at most 10 MB, at
least one document) is for validation. A folder that holds shard_*.parquet already keeps its shards and their order.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.paths import data_dir

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
VAL_SHARE = 0.01
MAX_VAL_BYTES = 10_000_000
SHARD_BYTES = 256_000_000  # UTF-8 bytes a train shard, about 100 MB compressed, as on the hub
WHOLE_TXT_BYTES = 65_536  # a .txt file up to this is one document
TXT_DOCUMENT_BYTES = 16_384  # a longer one is cut at the first blank line after this many
BUCKET_BYTES = 512_000_000  # input held in memory at once while ordering
MAX_BUCKETS = 256  # one open file each


def take_folder(source: str, num_files: int) -> None:
    """Convert the folder of `source`, or link its shards when it is in the standard layout (num_files of them for
    training, -1: all); nothing when it is unchanged."""
    origin, folder = Path(source.removeprefix("local:")), data_dir(source)
    inputs, ready = input_files(origin), sorted(origin.glob("shard_*.parquet"))
    manifest = parquet.load_manifest(folder)
    hash_ = fingerprint(origin, ready or inputs)
    about = {"source": source, "kind": "local files", "synthetic": False, "fingerprint": hash_}
    changed = any(manifest.get(key) != about[key] for key in ("source", "fingerprint"))
    if changed:
        parquet.about_to_replace(folder)
    if ready:
        *train, val = ready
        if not train:
            raise UserError(f"--source={source}: {val.name} stands alone: one shard is needed to train on besides")
        files = {} if changed else manifest["files"]
        for path in [val, *(train if num_files == -1 else train[:num_files])]:
            if not parquet.is_here(folder / path.name, files.get(path.name)):
                files[path.name] = adopt_shard(path, folder / path.name, "val" if path == val else "train")
    elif changed or not parquet.all_here(folder, manifest):
        files = convert(inputs, folder)
    else:
        print(f"{source}: shards are here")
        return
    parquet.replace_shards(folder, about, files)


def input_files(folder: Path) -> list[Path]:
    """Files with text below `folder`, sorted. Raises UserError when there are none."""
    if not folder.is_dir():
        raise UserError(f"--source=local:{folder}: no such folder")
    found = [path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file()]
    if not found:
        raise UserError(f"--source=local:{folder}: no {', '.join(SUFFIXES)} files there")
    return sorted(found)


def fingerprint(folder: Path, files: list[Path]) -> str:
    """Changes when a file is added, removed, resized or touched (names, sizes and times; contents are not read)."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def adopt_shard(path: Path, target: Path, split: str) -> parquet.Manifest:
    """Take a ready shard over as a hard link (a copy where the disks differ); returns its manifest entry."""
    entry = parquet.describe(path, split, str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
    return entry


def convert(files: list[Path], target: Path) -> parquet.Manifest:
    """Write the documents of `files` as shards into `target`; returns the manifest entries. Raises UserError for
    unreadable input (with file and line) and for fewer than two documents."""
    target.mkdir(parents=True, exist_ok=True)
    buckets = min(MAX_BUCKETS, 1 + sum(path.stat().st_size for path in files) // BUCKET_BYTES)
    with tempfile.TemporaryDirectory(dir=target, prefix="ordering-") as folder:
        _spread(files, Path(folder), buckets)
        val_bytes = min(MAX_VAL_BYTES, int(sum(map(_distinct_bytes, Path(folder).iterdir())) * VAL_SHARE))
        return parquet.write_shards(target, _ordered(Path(folder)), val_bytes, SHARD_BYTES)


def _spread(files: list[Path], folder: Path, buckets: int) -> None:
    """Write each document to one of `buckets` Arrow files by its hash."""
    schema = pa.schema([("text", pa.large_string())])
    waiting: list[list[str]] = [[] for _ in range(buckets)]
    sizes = [0] * buckets
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_file(str(folder / f"{i:03d}.arrow"), schema)) for i in range(buckets)]

        def flush(i: int) -> None:
            writers[i].write_table(pa.table({"text": waiting[i]}, schema))
            waiting[i], sizes[i] = [], 0

        for path in files:
            for text in read_documents(path):
                # buckets are ranges of the hash, so that one after the other they are in order
                i = int.from_bytes(parquet.text_hash(text)[:8], "big") * buckets >> 64
                waiting[i].append(text)
                sizes[i] += len(text.encode())
                if sizes[i] > 1 << 20:
                    flush(i)
        for i in range(buckets):
            flush(i)


def _read_bucket(path: Path) -> pa.ChunkedArray:
    with pa.memory_map(str(path)) as stream:
        return pa.ipc.open_file(stream).read_all().column("text")


def _distinct_bytes(path: Path) -> int:
    """UTF-8 bytes of the documents in a bucket, each counted once: repetitions must not move the validation split."""
    return pc.sum(pc.binary_length(pc.unique(_read_bucket(path)))).as_py() or 0


def _ordered(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        texts = _read_bucket(path).to_pylist()
        yield from (text for _, text in sorted({parquet.text_hash(text): text for text in texts}.items()))


# ----------------------------------------------------------------------------------------------------------------------
# Files -> documents


def read_documents(path: Path) -> Iterator[str]:
    """Documents of one file, without empty ones. Raises UserError naming the file and the line."""
    read = {".parquet": parquet.read_documents, ".txt": _from_txt}.get(path.suffix, _from_jsonl)
    return (text for text in read(path) if text.strip())


def _from_jsonl(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: expected an object with a string field `text`")
        yield text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair; UTF-8 cannot


def _from_txt(path: Path) -> Iterator[str]:
    if path.stat().st_size <= WHOLE_TXT_BYTES:
        yield "".join(line for _, line in _lines(path)).strip()
        return
    document: list[str] = []
    size = 0
    for _, line in _lines(path):
        document.append(line)
        size += len(line.encode())
        # a text without blank lines is cut at a line end once it is much too long
        if size >= TXT_DOCUMENT_BYTES and (not line.strip() or size >= 4 * TXT_DOCUMENT_BYTES):
            yield "".join(document).strip()
            document, size = [], 0
    yield "".join(document).strip()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, decompressed by its suffix."""
    number = 0
    try:
        with pa.input_stream(str(path), compression="detect") as raw:
            for number, line in enumerate(io.BufferedReader(raw, 1 << 20), 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read after line {number} ({error})") from None
