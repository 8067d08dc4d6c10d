"""Token files, the row source of text that was tokenized before: the `.bin` files of the modded-nanogpt and llm.c
community, and folders of them.

- A file: 256 int32, little-endian ([0] = 20240520, [1] = 1, [2] = number of tokens, below 2³¹, the rest 0), then the
  tokens as uint16, little-endian. Every document starts with the document token (GPT-2: 50256; ours: <|bos|>). A file
  need not begin or end where a document does.
- A folder that this program wrote has a meta.json: {"vocab_size", "document_token", "tokenizer_hash"} and, optionally,
  "splits": {"train": {name: tokens}, "val": {…}}. One from elsewhere is taken for GPT-2's only if its files are named
  as the community names them, <data>_train_000001.bin and <data>_val_000000.bin: nothing in a file says whose it is.
- A row is sequence_len + 1 tokens from a document token on, in the order of the data; the next row begins at the first
  document token at or behind its end. What lies between is skipped (docs/decisions.md says how much that is). Rows do
  not run over from one file to the next; after the last file the first one comes again.
- State: every rank finds all row starts itself, in the background and one file ahead (0.03 to 0.2 s for 10⁸ tokens),
  so two integers do: the file, counted through all epochs, and the offset in it where the last row ended.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.data.parquet import strange_kind, up_to
from nanochat.data.rows import RowSource, TrainData
from nanochat.data.sources import SPLITS, Split
from nanochat.errors import UserError
from nanochat.files import atomic_write, parse_json
from nanochat.paths import get_base_dir
from nanochat.runtime import print0
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

MAGIC, VERSION = 20240520, 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MOST_TOKENS = 2**31 - 1  # in one file: its count is an int32
MOST_IDS = 1 << 16  # uint16
LLAMA_MAGIC = 20240801  # llm.c's files of 32-bit tokens
GPT2: dict[str, Any] = {"vocab_size": 50304, "document_token": 50256, "tokenizer_hash": None}  # 50257 ids, padded
COMMUNITY_NAME = re.compile(r".+_(train|val)_\d+\.bin")
OUR_NAME = re.compile(r"(?:.+_)?(train|val)_\d+\.bin")
SCAN_TOKENS = 1 << 26  # looked at in one go: bounds what a file of 2³¹ tokens takes in memory to 64 MB
VAL_TOKENS = 10_485_760  # the validation set of the speedrun: the first so many


class TokenFolder(TrainData):
    """A folder of token files, all of one tokenizer: `made_by` is the hash of this program's that made them, None means
    GPT-2's. No token of the files is as large as vocab_size."""

    def __init__(self, path: Path, train: tuple[Path, ...], val: tuple[Path, ...], meta: dict[str, Any]) -> None:
        self.path, self.train, self.val, self.source = path, train, val, f"bin:{path}"
        self.vocab_size, self.document_token = meta["vocab_size"], meta["document_token"]
        self.made_by: str | None = meta["tokenizer_hash"]
        self.tokenizer_hash = self.made_by or "gpt2"

    @functools.cached_property
    def tokenizer(self) -> RustBPETokenizer | None:  # type: ignore[override]
        """The store's tokenizer if it made the files."""
        try:
            tokenizer = get_tokenizer() if self.made_by is not None else None
        except UserError:  # none has been trained, and none is needed
            return None
        return tokenizer if tokenizer is not None and tokenizer.hash == self.made_by else None

    @functools.cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """16 hex digits that change when files are added or removed, or their lengths or the tokenizer change."""
        counts = [[path.name, read_header(path)] for path in (*self.train, *self.val)]
        about = [self.vocab_size, self.document_token, self.made_by, counts]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def files(self, split: Split) -> tuple[Path, ...]:
        return self.train if split == "train" else self.val

    def rows(self, sequence_len: int, seed: int = 0) -> "BinRows":
        return BinRows(self, sequence_len)

    def fixed_rows(self, split: Split, sequence_len: int, max_tokens: int = VAL_TOKENS) -> np.ndarray:
        """The first max_tokens tokens of the split, one behind the other whatever documents begin, uint16. A row's last
        token is the first of the next, so that inputs and targets are the same stream, one apart."""
        wanted = max_tokens // sequence_len * sequence_len + 1
        parts = (open_tokens(path)[:wanted] for path in self.files(split))
        stream = np.concatenate(list(up_to(parts, wanted, len)))[:wanted]
        if len(stream) <= sequence_len:
            raise self.too_little_data(split, sequence_len)
        rows = np.lib.stride_tricks.sliding_window_view(stream, sequence_len + 1)[::sequence_len].copy()
        self.check_vocabulary(rows)
        return rows

    def horizon_in_epochs(self, sequence_len: int, tokens: int, rows_per_step: int = 1) -> tuple[float, float]:
        """From the first train file that holds a row."""
        counts = [read_header(path) for path in self.train]
        for path, count in zip(self.train, counts, strict=True):
            rows = len(self.row_starts(open_tokens(path), sequence_len + 1))
            if rows:
                trained_share = rows * sequence_len / count
                return tokens / (trained_share * sum(counts)), 1 - rows * (sequence_len + 1) / count
        raise self.too_little_data("train", sequence_len)

    def row_starts(self, tokens: np.ndarray, row_len: int) -> np.ndarray:
        """Starts (R,) int64 of the training rows in the tokens of one file, all of the vocabulary."""
        self.check_vocabulary(tokens)
        return row_starts(document_starts(tokens, self.document_token), len(tokens), row_len)

    def check_vocabulary(self, tokens: np.ndarray) -> None:
        """Raises UserError for a token that is too large: on a GPU it would end in a device-side assert."""
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            raise UserError(f"{self.path} has token {largest}, but a vocabulary of {self.vocab_size}: other tokenizer?")

    def too_little_data(self, split: Split, sequence_len: int) -> UserError:
        aligned = " from the start of a document on" if split == "train" else ""
        return UserError(
            f"too little data: none of the {len(self.files(split))} {split} file(s) of {self.path} fills a row of "
            f"{sequence_len + 1} tokens{aligned}; get more data or lower --max-seq-len"
        )


# ---- Rows


class BinRows(RowSource):
    """The rows of a folder in their order. Raises UserError where a file is damaged; in steps() where no file holds a
    full row, a token is not in the vocabulary, or the tokens are not those of the state."""

    def __init__(self, folder: TokenFolder, sequence_len: int) -> None:
        self.folder, self.sequence_len, self.filler_token = folder, sequence_len, folder.document_token
        self.ends = np.cumsum([read_header(path) for path in folder.train])
        self._position = 0, 0  # file, counted through all epochs, and offset behind the last row taken
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="scan")

    def identity(self) -> dict[str, Any]:
        return {"sequence_len": self.sequence_len, "files": self.folder.fingerprint}

    def seek(self, state: dict[str, Any]) -> None:
        self._position = state["file"], state["offset"]

    def _scan(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, row starts) of file `number`."""
        # a plain view: taking a slice of a memmap itself costs 2 µs, of this one 0.3 µs
        tokens = np.asarray(open_tokens(self.folder.train[number % len(self.folder.train)]))
        return tokens, self.folder.row_starts(tokens, self.sequence_len + 1)

    def in_order(self) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
        number, offset = self._position
        row_len = self.sequence_len + 1
        empty = 0
        ahead = self._pool.submit(self._scan, number)
        while True:
            tokens, starts = ahead.result()
            ahead = self._pool.submit(self._scan, number + 1)
            place = int(np.searchsorted(starts, offset))
            if offset and (place == 0 or starts[place - 1] + row_len != offset):
                raise UserError(
                    f"cannot resume the data order: no row ends at token {offset:,}; the tokens have changed"
                )
            for start in starts[place:].tolist():
                row = tokens[start : start + row_len]
                yield row[:-1], row[1:], (number, start + row_len)
            empty = 0 if len(starts) else empty + 1
            if empty == len(self.folder.train):
                raise self.folder.too_little_data("train", self.sequence_len)
            number, offset = number + 1, 0

    def state(self, position: tuple[int, int]) -> dict[str, Any]:
        return {"file": position[0], "offset": position[1]}

    def epoch(self, position: tuple[int, int]) -> float:
        epochs, file = divmod(position[0], len(self.ends))
        before = int(self.ends[file - 1]) if file else 0
        return epochs + (before + position[1]) / max(int(self.ends[-1]), 1)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def document_starts(tokens: np.ndarray, document_token: int) -> np.ndarray:
    """Positions (D,) int64 of the document token."""
    parts = range(0, len(tokens), SCAN_TOKENS)
    found = [np.flatnonzero(tokens[first : first + SCAN_TOKENS] == document_token) + first for first in parts]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def row_starts(documents: np.ndarray, count: int, row_len: int) -> np.ndarray:
    """Starts (R,) int64 of the rows of row_len tokens among `count`: each the first of `documents` (sorted positions)
    at or behind the end of the row before it."""
    documents = documents[documents <= count - row_len]
    following = np.searchsorted(documents, documents + row_len).tolist()  # of each document, were it to begin a row
    chosen = []
    place = 0
    while place < len(following):
        chosen.append(place)
        place = following[place]
    return documents[np.array(chosen, dtype=np.int64)]


# ---- One file


def write_tokens(path: Path, tokens: np.ndarray | Iterable[np.ndarray]) -> int:
    """Write one array of ids, or those of an iterator one after the other, to `path` atomically; returns their number.
    Raises UserError for ids that uint16 cannot hold and for more than 2³¹ - 1 of them."""
    parts = [tokens] if isinstance(tokens, np.ndarray) else tokens
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))  # no magic yet
        for part in parts:
            count += len(part)
            if count > MOST_TOKENS:
                raise UserError(f"{path.name}: more than {MOST_TOKENS:,} tokens; write them to several files")
            if part.dtype != np.uint16 and (wrong := part[(part < 0) | (part >= MOST_IDS)]).size:
                raise UserError(f"{path.name}: token {wrong[0]} does not fit; these files hold 0 to {MOST_IDS - 1}")
            file.write(part.astype("<u2", copy=False).tobytes())
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, count
        file.seek(0)
        file.write(header.tobytes())
    return count


def read_header(path: Path, name: str | None = None) -> int:
    """Number of tokens in a file, its header and its size checked. Raises UserError (under `name`) where it is no such
    file, or not a whole one."""
    name = name or str(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            size = file.seek(0, 2)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{name}: no such file") from None
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), dtype="<i4").tolist()
    if magic != MAGIC:
        raise UserError(f"{name}: expected a token file (magic {MAGIC}), found {_kind(head, magic)}")
    if version != VERSION:
        raise UserError(f"{name}: token file of version {version}; this program reads version {VERSION}")
    if size != HEADER_BYTES + 2 * count:
        have = max(size - HEADER_BYTES, 0) / 2
        state = "truncated" if have < count else "damaged"
        raise UserError(f"{name} is {state}: {have:,.10g} tokens instead of {count:,}; delete it and get it again")
    return count


def _kind(head: bytes, magic: int) -> str:
    """What a file that begins with `head` seems to be."""
    if kind := strange_kind(head):
        return kind
    if int.from_bytes(head[:4], "big") == MAGIC:
        return "one of another byte order (big-endian): convert it to little-endian"
    if magic == LLAMA_MAGIC:
        return f"magic {magic}, llm.c's format of 32-bit tokens, which is not read here"
    return f"{magic}: it is not a token file"


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, (N,) uint16, mapped and not read. Raises UserError as read_header."""
    count = read_header(path)
    if count == 0:  # nothing can be mapped
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


# ---- A folder of them


def tokenized_dir() -> Path:
    """Where the artifact store keeps token files: one folder below it for each text and tokenizer."""
    return get_base_dir() / "tokenized_data"


def describe_folder(directory: str | Path) -> TokenFolder:
    """What is in a folder: a path, or the name of one below tokenized_data/ in the store. Raises UserError when there
    is none, it lacks files of a split, or nothing says whose tokens these are."""
    folder = _find(directory)
    names = sorted(path.name for path in folder.glob("*.bin"))
    try:
        meta = _checked(parse_json((folder / "meta.json").read_bytes()), folder)
    except FileNotFoundError:
        meta = GPT2
        if strangers := [name for name in names if not COMMUNITY_NAME.fullmatch(name)]:
            raise UserError(
                f"{folder} has no meta.json to say whose tokens these are, and {strangers[0]} is not named as GPT-2's "
                "community files are (fineweb_train_000001.bin): finish or repeat scripts.data_process.tokenize_text"
            ) from None
    except ValueError as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({error}): make the folder again") from None
    train, val = (_files(folder, split, names, meta.get("splits")) for split in SPLITS)
    return TokenFolder(folder, train, val, meta)


def _files(folder: Path, split: Split, names: list[str], listed: dict[str, Any] | None) -> tuple[Path, ...]:
    """The files of a split: those that meta.json lists, else by their names."""
    if listed is None:
        chosen = [name for name in names if (match := OUR_NAME.fullmatch(name)) and match[1] == split]
    else:
        chosen = sorted(listed.get(split, {}))
    for name in chosen:
        if name not in names:
            raise UserError(f"{folder / name} is missing: make the folder again (meta.json names it)")
    if not chosen:
        raise UserError(f"{folder} has no {split} files (*_{split}_000000.bin): one at least is needed")
    return tuple(folder / name for name in chosen)


def open_folder(directory: str) -> TokenFolder:
    """describe_folder, and a note where the tokenizer of its tokens is not at hand."""
    folder = describe_folder(directory)
    if folder.tokenizer is None:
        whose = folder.made_by or "GPT-2's"
        print0(f"note: {folder.path} has tokens of {whose} tokenizer: losses per token, no samples, no CORE")
    return folder


def _find(directory: str | Path) -> Path:
    places = dict.fromkeys([Path(directory).expanduser(), tokenized_dir() / directory])
    for folder in places:
        if str(directory) and folder.is_dir():
            return folder.resolve()
    raise UserError(
        f"bin:{directory}: no folder {' or '.join(map(str, places))}; get one with `python -m "
        "scripts.data_process.download` or make it with `python -m scripts.data_process.tokenize_text`"
    )


def _checked(meta: Any, folder: Path) -> dict[str, Any]:
    match meta:
        case {"vocab_size": int(size), "document_token": int(document), "tokenizer_hash": str() | None} if (
            0 <= document < size <= MOST_IDS and isinstance(meta.get("splits", {}), dict)
        ):
            return meta
    raise UserError(
        f"{folder / 'meta.json'}: expected vocab_size up to {MOST_IDS}, a document_token below it and tokenizer_hash; "
        "make the folder again"
    )
