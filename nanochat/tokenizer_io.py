"""The files of a tokenizer directory: ranks, meta.json, and writing all of them or none. What is in them says
nanochat.tokenizer."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.errors import UserError


def rank_lines(tokens: Sequence[bytes]) -> bytes:
    """The content of tiktoken.bpe: a line a token, in base64, a space and its id."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def parse_ranks(lines: bytes) -> list[tuple[bytes, int]]:
    """(token, rank) from lines of base64 and number. Raises ValueError for any other line."""
    ranks = []
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks.append((base64.b64decode(token, validate=True), int(rank)))
        except ValueError:
            raise ValueError(f"line {number} is not a token in base64, a space and its id") from None
    return ranks


def fingerprint(ranks: bytes, pattern: str, special_tokens: Sequence[str]) -> str:
    """16 hex digits over the content of tiktoken.bpe, pattern and special tokens."""
    settled = json.dumps([pattern, special_tokens]).encode()
    return hashlib.sha256(ranks + settled).hexdigest()[:16]


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json. Raises UserError where it is absent or damaged."""
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise unusable(directory, "meta.json is missing") from None
    except ValueError as error:
        raise unusable(directory, f"meta.json is damaged: {error}") from None
    if not isinstance(meta, dict) or not {"pattern", "special_tokens", "hash"} <= meta.keys():
        raise unusable(directory, "meta.json is damaged: it lacks pattern, special_tokens or hash")
    return meta


def unusable(directory: Path, why: str) -> UserError:
    """What to tell who has this directory."""
    return UserError(f"no usable tokenizer in {directory}: {why}; run `python -m scripts.tok_train`")


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """All of them to `<name>.tmp` first, then renamed in order: a full disk leaves the old files as they were."""
    directory.mkdir(parents=True, exist_ok=True)
    staged = {directory / f"{name}.tmp": directory / name for name in files}
    try:
        for temporary, content in zip(staged, files.values(), strict=True):
            temporary.write_bytes(content)
        for temporary, final in staged.items():
            os.replace(temporary, final)
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)
