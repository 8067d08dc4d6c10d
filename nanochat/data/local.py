"""A folder of the user's own text as shards: parquet and CSV (column `text`), JSON Lines (field `text`), plain text.

Long documents are cut into pieces. Documents are dropped when they repeat another one exactly, and ordered by a hash of
their text: a shuffle that is the same on every machine and does not depend on how the text is spread over files. The
first ones are for validation: one per cent of the bytes (at most 10 MB), of little text up to ten. Near-duplicates,
pieces of one document and parts of one .txt file are on the same side, where there is enough else. A folder that holds
shard_*.parquet already keeps its shards and their order. Links are followed.
"""

import codecs
import collections
import csv
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat.data import overlap, parquet
from nanochat.errors import UserError
from nanochat.files import atomic_write, content_hash, remembered, temporary_folder, walk
from nanochat.paths import data_dir

COMPRESSED = {"": None, ".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
VAL_SHARE = 0.01
MIN_VAL_BYTES = 500_000  # fewer measure little, so of less than 50 MB more than VAL_SHARE is held out, but
MAX_VAL_SHARE = 0.1  # never more than this
MAX_VAL_BYTES = 10_000_000
PIECE = 10_000  # characters of a document at most: what scripts/tok_train.py reads of one
MIN_PIECE_BYTES = 100  # a document is not cut below this to fit into the validation split
SHARD_BYTES = 256_000_000  # UTF-8 bytes a train shard, about 100 MB compressed, as on the hub
WHOLE_TXT_BYTES = 65_536  # a .txt file up to this is one document
TXT_DOCUMENT_BYTES = 16_384  # a longer one is cut at the first blank line after this many
LONGEST_LINE = 2**30  # bytes of one document in a file of many: it is held in memory, in several forms
LONGEST_PART = 2**26  # bytes of a line of .txt that are read at once
BATCH = 256  # documents that near-duplicates are looked for of at once


def take_folder(source: str, num_files: int) -> None:
    """Convert the folder of `source`, or link its shards when it is in the standard layout (num_files of them for
    training, -1: all); nothing when it is unchanged."""
    origin, folder = Path(source.removeprefix("local:")), data_dir(source)
    inputs, others, ready = _taken(origin)
    manifest = parquet.load_manifest(folder)
    about = {"source": source, "kind": "local files", "synthetic": False, **fingerprint(origin, inputs)}
    kinds = collections.Counter(path.suffix or "without a suffix" for path in others)
    if left_out := ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())[:10]):
        print(f"{source}: left out {left_out}")
        about["left_out"] = left_out
    before = manifest["files"] if manifest.get("source") == source else {}
    # another date of the same text is no change, and another text of the same date is damage to a ready shard
    same = [key for key in ("content", "dates") if manifest.get(key) == about[key]]
    changed = not before or same in ([], [] if ready else ["dates"])
    if changed:
        parquet.about_to_replace(folder)
    if ready:
        *train, val = inputs
        if not train:
            raise UserError(f"--source={source}: {val.name} stands alone: one shard is needed to train on besides")
        files = {} if changed else dict(before)
        for path in [val, *(train if num_files == -1 else train[:num_files])]:
            known = files.get(path.name)
            if not parquet.is_here(folder / path.name, known):
                split = "val" if path == val else "train"
                files[path.name] = adopt_shard(path, folder / path.name, split, known and known["sha256"])
        _check_splits(source, val, files)
        if edited := [name for name in files if name in before and files[name]["sha256"] != before[name]["sha256"]]:
            about["changed"] = ", ".join(edited)
            print(f"{source}: of other content and date than when taken over, trained on as it is: {about['changed']}")
    elif changed or not parquet.all_here(folder, manifest):
        files = convert(inputs, folder)
    else:
        files = before
    if files == before and "content" in same:
        print(f"{source}: shards are here")
    else:
        parquet.replace_shards(folder, about, files)


def _taken(origin: Path) -> tuple[list[Path], list[Path], bool]:
    """The files below `origin` that are read, those that are left out, and whether the former are ready shards."""
    files = all_files(origin)
    inputs = sorted(filter(_is_text, files))
    if not inputs:
        packed = ", ".join(filter(None, COMPRESSED))
        raise UserError(
            f"--source=local:{origin}: no .parquet, {', '.join(FORMATS)} files there (or {packed} of the latter)"
        )
    ready = [path for path in inputs if path.parent == origin and path.match("shard_*.parquet")]
    if any(path.is_dir() for path in origin.glob("shard_*.parquet")):  # as Spark writes one file: parts in a folder
        ready = []
    taken = ready or inputs
    known = set(map(os.path.realpath, taken))
    return taken, [path for path in files if os.path.realpath(path) not in known], bool(ready)


def text_hash(source: str) -> str:
    """Changes with the text that a source has to offer: once it does, the dataset stage runs again."""
    origin = Path(source.removeprefix("local:"))
    inputs, _, _ = _taken(origin)
    return fingerprint(origin, inputs)["content"]


def _check_splits(source: str, val: Path, files: parquet.Manifest) -> None:
    """Raises UserError for a split without text. Says so when more text is held out than is left to train on."""
    sizes = {"val": 0, "train": 0}
    for entry in files.values():
        sizes[entry["split"]] += entry["utf8_bytes"]
    if not sizes["val"] or (not sizes["train"] and len(files) > 1):
        raise UserError(f"--source={source}: no text in {val.name if sizes['train'] else 'the shards to train on'}")
    if sizes["val"] > sizes["train"] > 0:
        print(f"{source}: {val.name}, which is for validation as the last shard, has more text than all others")


def all_files(folder: Path) -> list[Path]:
    """Files below `folder`. Raises UserError for a link that leads nowhere, and for folders that may not be read."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    if not folder.is_dir():
        raise UserError(f"--source=local:{folder}: no such folder")
    found = list(walk(folder, onerror=refuse))
    for path in found:
        if path.is_symlink() and not path.exists() and _is_text(path):
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there: copy that too")
    return [path for path in found if path.is_file()]


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def fingerprint(folder: Path, files: list[Path]) -> dict[str, str]:
    """Of text files in `folder`: `dates` changes when one is added, removed, resized or touched, `content` with names
    and contents. They are read when something was done to one since the last time (as files.content_hash has it)."""
    dates, touched, content, newest = hashlib.sha256(), hashlib.sha256(), hashlib.sha256(), 0.0
    for path in files:
        stat = path.stat()
        name = os.fsencode(path.relative_to(folder))
        dates.update(b"%s\0%d\0%d\n" % (name, stat.st_size, stat.st_mtime_ns))
        touched.update(b"%s\0%d\0%d\n" % (name, stat.st_ino, stat.st_ctime_ns))
        newest = max(newest, stat.st_ctime)

    def read() -> str:
        with ThreadPoolExecutor() as pool:  # hashing leaves other threads alone
            for path, digest in zip(files, pool.map(content_hash, files), strict=True):
                content.update(b"%s\0%s\n" % (os.fsencode(path.relative_to(folder)), digest.encode()))
        return content.hexdigest()

    mark = [dates.hexdigest(), touched.hexdigest()]
    return {"dates": mark[0], "content": remembered(folder, mark, newest, read)}


def adopt_shard(path: Path, target: Path, split: str, known: str | None = None) -> parquet.Manifest:
    """Take a ready shard over as a hard link (a copy where the disks differ), or written anew where a later reader
    could not use it as it is; returns its manifest entry. known: the sha256 that it had when it was taken over before,
    and still should have by its date. Raises UserError when it is damaged."""
    _refuse_pointer(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        if _is_usable(path):
            entry = parquet.describe(path, split, str(path))
            try:
                os.link(path.resolve(), temporary)  # of the file itself: the store is no place for links to elsewhere
            except OSError:
                shutil.copyfile(path, temporary)
        else:
            print(f"{path}: written anew, because of its compression or because of long documents", flush=True)
            parquet.write_shard(temporary, (piece for text in read_documents(path) for piece in pieces(text)))
            entry = parquet.describe(temporary, split, str(path))
        if known not in (None, entry["sha256"]):
            raise UserError(
                f"{path} has other content than when it was taken over, but the same date and size: it is damaged; get "
                f"it again, or `touch` it to train on it as it is"
            )
    return entry


def _is_usable(path: Path) -> bool:
    """Whether rustbpe can decompress a shard, and documents are so short that it learns from most of the text."""
    file = parquet.open_shard(path)
    if parquet.codecs(file) - parquet.CODECS:
        return False
    lengths = [len(text) for text in parquet.read_documents(path)]
    return 2 * sum(min(length, PIECE) for length in lengths) >= sum(lengths)


def convert(files: list[Path], target: Path) -> parquet.Manifest:
    """Write the documents of `files` as shards into `target`; returns the manifest entries. Raises UserError for
    unreadable input (with file and line) and for fewer than two documents."""
    target.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target / "ordering") as folder:
        keys, sizes, marks = _collect(files, folder / "documents.arrow")
        order = np.argsort(keys, kind="stable")
        sizes, marks, repeated = sizes[order], marks[order], np.append(False, keys[order][1:] == keys[order][:-1])
        sizes[repeated] = 0  # they must not move the validation split
        val_bytes = held_out_bytes(int(sizes.sum()))
        most = min(MAX_VAL_BYTES, int(sizes.sum() * MAX_VAL_SHARE))
        held, torn = overlap.hold_out(overlap.clusters(marks), sizes, val_bytes, most)
        if torn:
            print("note: nothing of the size of the validation split stands apart: parts of the same are on both sides")
        held, left = held & ~repeated, ~held & ~repeated
        with pa.memory_map(str(folder / "documents.arrow")) as stream:
            texts = pa.ipc.open_file(stream).read_all()["text"]
            documents: Iterator[str] = (
                texts[place].as_py() for place in [*order[held].tolist(), *order[left].tolist()]
            )
            if held.any():
                val_bytes = int(sizes[held].sum())
            else:
                head = next(documents)
                cut = len(head.encode()) > val_bytes >= MIN_PIECE_BYTES
                parts = pieces(head, val_bytes // 4) if cut else [head]  # of at most four bytes a character
                documents = itertools.chain(parts, documents)
            return parquet.write_shards(target, documents, val_bytes, SHARD_BYTES)


def held_out_bytes(total: int) -> int:
    """UTF-8 bytes to hold out of `total`."""
    enough = min(MIN_VAL_BYTES, int(total * MAX_VAL_SHARE))
    return min(MAX_VAL_BYTES, max(enough, int(total * VAL_SHARE)))


# Where a long document is cut, best first: between paragraphs, sentences, lines, words.
SENTENCE = r"[.!?…]+[\"'”’»)\]]*\s+|[。！？｡؟۔।॥]+[”’」』）》]*\s*"  # noqa: RUF001
BOUNDARIES = [re.compile(pattern) for pattern in (r"\n\s*\n", SENTENCE, r"[\n\r]+", r"\s+")]


def pieces(text: str, limit: int = PIECE) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters, which joined are `text` again."""
    start = 0
    while len(text) - start > limit:
        half, end = start + limit // 2, start + limit
        for boundary in BOUNDARIES:
            if ends := [match.end() for match in boundary.finditer(text, half, end)]:
                end = ends[-1]
                break
        else:
            cut = end
            while cut > half and (unicodedata.category(text[cut])[0] in "MC" or text[cut - 1] == "\u200d"):
                cut -= 1  # accents, joiners and the like belong to the letter before them
            end = cut if cut > half else end
        yield text[start:end]
        start = end
    yield text[start:]


def _collect(files: list[Path], path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write each document, or its pieces, to the Arrow file `path`. Returns what they are ordered by (N,), their UTF-8
    bytes (N,) and the marks (N, C) that each shares with others of its document or file and with near-duplicates."""
    schema = pa.schema([("text", pa.large_string())])
    about: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    keyed = (each for file in files for each in _keyed(file))
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        while batch := list(itertools.islice(keyed, BATCH)):
            keys, wholes, texts = zip(*batch, strict=True)
            column = pa.array(texts, pa.large_string())
            writer.write_batch(pa.record_batch([column], schema))
            groups = np.frombuffer(b"".join(whole[:8] for whole in wholes), np.uint64)
            marks = np.column_stack([groups, overlap.sketches(texts)])
            about.append((np.array(keys, "S16"), pc.binary_length(column).to_numpy(), marks))
    if not about:
        raise UserError(f"no text in {', '.join(map(str, files[:3]))}{' …' * (len(files) > 3)}: nothing to train on")
    found, sizes, marks = map(np.concatenate, zip(*about, strict=True))
    return found, sizes, marks


def _keyed(path: Path) -> Iterator[tuple[bytes, bytes, str]]:
    """What each document of a file, or piece of one, is ordered and told apart by, and the key of what it is a part of.
    A document that repeats itself keeps all its pieces."""
    whole = None
    for text in read_documents(path):
        key = parquet.text_hash(text)
        whole = whole if whole and _format(path) == ".txt" else key  # a .txt file is one text, however many parts
        for number, piece in enumerate(pieces(text)):
            if piece.strip():
                yield key if piece == text else parquet.text_hash(f"{key.hex()} {number}"), whole, piece


# ---- Files -> documents


def read_documents(path: Path) -> Iterator[str]:
    """Documents of one file, without empty ones and nulls. Raises UserError naming the file and the line."""
    _refuse_pointer(path)
    read = FORMATS.get(_format(path), parquet.read_documents)
    return (text for text in read(path) if text.strip())


def _refuse_pointer(path: Path) -> None:
    """Raises UserError for what a clone without Git LFS has in the place of a large file: as .txt it would be trained
    on."""
    with open(path, "rb") as stream:
        if stream.read(32).startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a Git LFS pointer, which has no text: run `git lfs pull` where it comes from")


def _format(path: Path) -> str:
    """The suffix that says what is in a file."""
    kinds = [suffix.lower() for suffix in path.suffixes if suffix.lower() in FORMATS]
    return kinds[-1] if kinds and path.suffix.lower() != ".parquet" else ".parquet"


def _from_jsonl(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        match record:
            case {"text": str(text)}:
                yield text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair; UTF-8 cannot
            case {"text": None}:  # as a null row of parquet
                pass
            case _:
                raise UserError(f"{path}, line {number}: expected an object with a string field `text`")


def _from_csv(path: Path) -> Iterator[str]:
    csv.field_size_limit(LONGEST_LINE)  # 128 KiB otherwise; a quote that never ends would take in the whole file
    lines = (line for _, line in _lines(path))
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if names.count("text") != 1:
            raise UserError(f"{path}: expected a column `text` in its first line, found {', '.join(names)[:200]}")
        place = names.index("text")
        for row in reader:
            if row and len(row) != len(names):
                raise UserError(f"{path}, line {reader.line_num}: {len(row)} columns instead of {len(names)}")
            yield row[place] if row else ""
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _from_txt(path: Path) -> Iterator[str]:
    lines = (line for _, line in _lines(path, cut=True))
    head = list(parquet.up_to(lines, WHOLE_TXT_BYTES + 1, parquet.utf8_bytes))
    if sum(map(parquet.utf8_bytes, head)) <= WHOLE_TXT_BYTES:
        yield "".join(head).strip()
        return
    document: list[str] = []
    size = 0
    for line in itertools.chain(head, lines):
        document.append(line)
        size += parquet.utf8_bytes(line)
        # a text without blank lines is cut at a line end once it is much too long
        if size >= TXT_DOCUMENT_BYTES and (not line.strip() or size >= 4 * TXT_DOCUMENT_BYTES):
            yield "".join(document).strip()
            document, size = [], 0
    yield "".join(document).strip()


def _lines(path: Path, cut: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file, decompressed by its suffix. cut: long ones come in parts; otherwise they are
    refused: a few MB that are compressed may hold one of any length."""
    number, longest = 1, LONGEST_PART if cut else LONGEST_LINE
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        file = pa.OSFile(os.fsencode(path))  # bytes: a name need not be UTF-8
        raw = pa.input_stream(file, COMPRESSED.get(path.suffix.lower()))
        with file, raw, io.BufferedReader(raw, 1 << 20) as stream:
            while part := stream.readline(longest):
                goes_on = len(part) == longest and not part.endswith(b"\n")
                if goes_on and not cut:
                    raise UserError(
                        f"{path}, line {number}: longer than {longest:,} bytes; cut it, or bring it as .txt"
                    )
                yield number, decoder.decode(part, final=not goes_on)
                number += not goes_on
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file first") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read after line {number - 1} ({error})") from None


FORMATS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".jsonl": _from_jsonl,
    ".ndjson": _from_jsonl,
    ".txt": _from_txt,
    ".csv": _from_csv,
    ".tsv": _from_csv,
}
SUFFIXES = (".parquet", *(name + packed for name in FORMATS for packed in COMPRESSED))
