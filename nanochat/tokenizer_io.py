"""The files of a tokenizer directory: ranks, meta.json, and tokenizer.json for the `tokenizers` library. What each of
them is for is said in nanochat.tokenizer."""

import base64
import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nanochat.errors import UserError
from nanochat.files import atomic_write, parse_json

FILES = ("meta.json", "tokenizer.json", "tokenizer_config.json", "token_bytes.safetensors", "tiktoken.bpe")


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
        meta = parse_json((directory / "meta.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise unusable(directory, "meta.json is missing") from None
    except ValueError as error:
        raise unusable(directory, f"meta.json is damaged: {error}") from None
    if not isinstance(meta, dict) or not {"pattern", "special_tokens", "hash"} <= meta.keys():
        raise unusable(directory, "meta.json is damaged: it lacks pattern, special_tokens or hash")
    return meta


def read_ranks(directory: Path) -> tuple[dict[str, Any], bytes]:
    """(meta.json, content of tiktoken.bpe). Raises UserError where they are missing, damaged or do not fit."""
    meta = read_meta(directory)
    try:
        lines = (directory / "tiktoken.bpe").read_bytes()
    except FileNotFoundError:
        raise unusable(directory, "tiktoken.bpe is missing") from None
    found = fingerprint(lines, meta["pattern"], meta["special_tokens"])
    if found != meta["hash"]:
        raise unusable(directory, f"tiktoken.bpe or meta.json was changed: hash {found}, saved as {meta['hash']}")
    return meta, lines


def unusable(directory: Path, why: str) -> UserError:
    return UserError(f"no usable tokenizer in {directory}: {why}; run `python -m scripts.tok_train`")


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """All of them under temporary names first, then renamed, the first one last: a full disk leaves the old files as
    they were."""
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(atomic_write(directory / name)).write_bytes(content)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.json, which holds merges instead of ranks. Programs that load it (transformers, vLLM, exports) find special
# tokens inside text unless told otherwise (`encode_special_tokens = True`), which nanochat's own encoder never does.


def huggingface_json(ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str]) -> str:
    """The text of tokenizer.json. Raises ValueError where the ranks cannot come from byte-pair merging."""
    letters = byte_letters()
    spelled = {token: _spelled(token, letters) for token in ranks}
    merges = [(spelled[left], spelled[right]) for left, right in merges_from_ranks(ranks)]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special_tokens])
    return model.to_str()


def byte_letters() -> list[str]:
    """The letter that stands for each byte in tokenizer.json: itself where Latin-1 prints it, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _spelled(token: bytes, letters: Sequence[str]) -> str:
    return "".join(letters[byte] for byte in token)


def merges_from_ranks(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each token of two bytes or more was merged from, in order of rank. Encoding a token's bytes
    with only the tokens older than itself must end in exactly those two."""
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(pairs)
            if best >= rank:
                raise ValueError(f"token {rank} ({token!r}) is not a merge of two older tokens")
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]
