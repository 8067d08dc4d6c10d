"""Tokens on disk: the `.bin` files of the modded-nanogpt and llm.c community, and folders of them.

A file: 256 int32, little-endian ([0] = 20240520, [1] = 1, [2] = number of tokens, below 2³¹, the rest 0), then the
tokens as uint16, little-endian. Every document starts with the document token (GPT-2: 50256; ours: <|bos|>). A file
need not begin or end where a document does.

A folder that this program wrote has a meta.json: {"vocab_size", "document_token", "tokenizer_hash"} and, optionally,
"splits": {"train": {name: tokens}, "val": {…}}; without them the names of the files tell. A folder from elsewhere has
none. It is taken for GPT-2's (vocabulary 50257 padded to 50304, document token 50256) only if its files are named as
the community names them, <data>_train_000001.bin and <data>_val_000000.bin: nothing in a file says whose tokens it has.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.paths import get_base_dir

MAGIC, VERSION = 20240520, 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MOST_TOKENS = 2**31 - 1  # in one file: its count is an int32
MOST_IDS = 1 << 16  # uint16
LLAMA_MAGIC = 20240801  # llm.c's files of 32-bit tokens
GPT2: dict[str, Any] = {
    "vocab_size": 50304,
    "document_token": 50256,
    "tokenizer_hash": None,
}  # 50257 padded to a multiple of 128
COMMUNITY_NAME = re.compile(r".+_(train|val)_\d+\.bin")
OUR_NAME = re.compile(r"(?:.+_)?(train|val)_\d+\.bin")
Split = Literal["train", "val"]


@dataclass(frozen=True)
class TokenFolder:
    """A folder of token files, all of one tokenizer."""

    path: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    vocab_size: int
    """Rows of the embedding: no token of the files is as large."""
    document_token: int
    """Starts every document."""
    tokenizer_hash: str | None
    """Of the tokenizer of this program that made them; None: GPT-2's."""

    def files(self, split: Split) -> tuple[Path, ...]:
        return self.train if split == "train" else self.val

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change when files are added or removed, or their lengths or the tokenizer change."""
        counts = [[path.name, read_header(path)] for path in (*self.train, *self.val)]
        about = [self.vocab_size, self.document_token, self.tokenizer_hash, counts]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# One file


def write_tokens(path: Path, tokens: np.ndarray | Iterable[np.ndarray]) -> int:
    """Write one array of ids, or one after the other those of an iterator (never more than one in memory), to `path`;
    returns their number. Atomic: `path` appears when it is whole.

    Raises UserError for ids that uint16 cannot hold and for more than 2³¹ - 1 of them.
    """
    parts = [tokens] if isinstance(tokens, np.ndarray) else tokens
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))  # no magic yet
        for part in parts:
            count += len(part)
            if count > MOST_TOKENS:
                raise UserError(f"{path.name}: more than {MOST_TOKENS:,} tokens; write them to several files")
            file.write(_as_uint16(part, path.name))
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, count
        file.seek(0)
        file.write(header.tobytes())
    return count


def _as_uint16(part: np.ndarray, name: str) -> bytes:
    if part.dtype != np.uint16 and part.size and not (part.min() >= 0 and part.max() < MOST_IDS):
        wrong = int(part.min() if part.min() < 0 else part.max())
        raise UserError(f"{name}: token {wrong} does not fit; these files hold 0 to {MOST_IDS - 1}")
    return part.astype("<u2", copy=False).tobytes()


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
    if not head:
        return "an empty file"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page"
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


# ----------------------------------------------------------------------------------------------------------------------
# A folder of them


def tokenized_dir() -> Path:
    """Where the artifact store keeps token files: one folder below it for each text and tokenizer."""
    return get_base_dir() / "tokenized_data"


def describe_folder(directory: str | Path) -> TokenFolder:
    """What is in a folder: a path, or the name of one below tokenized_data/ in the store.

    Raises UserError when there is no such folder, it lacks files to train on or to validate on, its meta.json is
    damaged, or it has none and its files are not named as the community names them.
    """
    folder = _find(directory)
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
    except FileNotFoundError:
        meta = None
    except ValueError as error:
        raise UserError(f"{folder / 'meta.json'} is damaged ({error}): make the folder again") from None
    if meta is None:
        splits, about = _by_name(folder, COMMUNITY_NAME), GPT2
        strangers = sorted(path.name for path in folder.glob("*.bin") if not COMMUNITY_NAME.fullmatch(path.name))
        if strangers:
            raise UserError(
                f"{folder} has no meta.json to say whose tokens these are, and {strangers[0]} is not named as GPT-2's "
                "community files are (fineweb_train_000001.bin): finish or repeat scripts.data_process.tokenize_text"
            )
    else:
        about = _checked(meta, folder)
        splits = _as_listed(meta["splits"], folder) if "splits" in meta else _by_name(folder, OUR_NAME)
    for split in ("train", "val"):
        if not splits[split]:
            raise UserError(f"{folder} has no {split} files (*_{split}_000000.bin): one at least is needed")
    return TokenFolder(
        path=folder,
        train=splits["train"],
        val=splits["val"],
        vocab_size=about["vocab_size"],
        document_token=about["document_token"],
        tokenizer_hash=about["tokenizer_hash"],
    )


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
    """`meta` where it is what it should be."""
    whole = isinstance(meta, dict) and {"vocab_size", "document_token", "tokenizer_hash"} <= meta.keys()
    if whole:
        size, document, name = meta["vocab_size"], meta["document_token"], meta["tokenizer_hash"]
        whole = isinstance(size, int) and isinstance(document, int) and 0 <= document < size <= MOST_IDS
        whole = whole and (name is None or isinstance(name, str)) and isinstance(meta.get("splits", {}), dict)
    if not whole:
        raise UserError(
            f"{folder / 'meta.json'}: expected vocab_size up to {MOST_IDS}, a document_token below it and "
            "tokenizer_hash; make the folder again"
        )
    return meta


def _by_name(folder: Path, pattern: re.Pattern[str]) -> dict[str, tuple[Path, ...]]:
    """Files of each split by what their names say, sorted."""
    found: dict[str, tuple[Path, ...]] = {"train": (), "val": ()}
    for path in sorted(folder.glob("*.bin")):
        if match := pattern.fullmatch(path.name):
            found[match[1]] += (path,)
    return found


def _as_listed(splits: dict[str, Any], folder: Path) -> dict[str, tuple[Path, ...]]:
    """Files of each split that meta.json names, each of them there."""
    listed = {split: tuple(folder / name for name in sorted(splits.get(split, {}))) for split in ("train", "val")}
    for path in (*listed["train"], *listed["val"]):
        if not path.is_file():
            raise UserError(f"{path} is missing: make the folder again (meta.json names it)")
    return listed
