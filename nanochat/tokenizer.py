"""Text <-> token ids: byte-pair encoding by the `rustbpe` crate, special tokens, conversations with loss masks.

A tokenizer directory holds five files:
    tiktoken.bpe               one line a token: base64 of its bytes, a space, its id (what from_directory reads)
    meta.json                  pattern, special tokens, vocabulary size, hash, sums of the other files; written last
    tokenizer.json             the same tokenizer for the `tokenizers` library and what is built on it
    tokenizer_config.json      by which transformers loads that, with the chat template (nanochat.chat_format)
    token_bytes.safetensors    int32 (vocab,): what get_token_bytes returns, for programs without this module
Ids: the mergeable tokens first (0-255 are the single bytes), then the special tokens.

Encoding looks for special tokens in text only where it is told to (allowed_special); otherwise encode_special and the
rendering of conversations make them.
"""

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import rustbpe
from nanochat.chat_format import Piece, completion_pieces, conversation_pieces, tokenizer_config
from nanochat.errors import UserError
from nanochat.files import atomic_write, parse_json, sha256_file
from nanochat.paths import tokenizer_dir

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = [
    "<|bos|>",  # starts every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the python tool
    "<|python_end|>",
    "<|output_start|>",  # what the tool printed
    "<|output_end|>",
]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
FILES = ("meta.json", "tokenizer.json", "tokenizer_config.json", "token_bytes.safetensors", "tiktoken.bpe")
Allowed: TypeAlias = Collection[str] | Literal["all"]


class RustBPETokenizer:
    """Byte-level BPE. Any text round-trips; lone surrogates, which no UTF-8 has, are a ValueError (see `repaired`)."""

    def __init__(self, core: rustbpe.Tokenizer, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> None:
        self._core = core
        ranks = core.get_mergeable_ranks()
        self._token_bytes = [bytes(token) for token, _ in sorted(ranks, key=lambda pair: pair[1])]
        self._specials = {name: len(ranks) + i for i, name in enumerate(special_tokens)}

    @classmethod
    def train_from_iterator(cls, iterator: Iterable[str], vocab_size: int) -> "RustBPETokenizer":
        """Train on texts. `vocab_size` counts the special tokens; too little text gives a smaller vocabulary. Memory
        grows with the distinct words, not with the text."""
        core = rustbpe.Tokenizer()
        core.train_from_iterator(iter(iterator), _mergeable(vocab_size))
        return cls(core)

    @classmethod
    def train_from_parquet(
        cls,
        paths: Sequence[Path],
        vocab_size: int,
        max_chars: int | None = None,
        doc_cap: int | None = None,
        progress: Callable[[int, int, int], object] | None = None,
        pattern: str | None = None,
    ) -> tuple["RustBPETokenizer", int, int]:
        """(tokenizer, documents, characters) from the non-empty texts of parquet shards, in order, each cut after
        doc_cap characters, up to max_chars in all. Read and split on all threads, without passing through Python.
        progress(documents, bytes, merges) is called about ten times a second. Raises UserError for shards that are
        absent or damaged, or lack the column `text`."""
        core = rustbpe.Tokenizer()
        size = _mergeable(vocab_size)
        try:
            documents, characters = core.train_from_parquet(
                list(paths), size, max_chars=max_chars, doc_cap=doc_cap, pattern=pattern, progress=progress
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(core), documents, characters

    @classmethod
    def from_directory(cls, directory: str | Path) -> "RustBPETokenizer":
        """Load what `save` wrote. Raises UserError where files are missing, damaged or of two different tokenizers."""
        directory = Path(directory)
        meta = read_meta(directory)
        try:
            lines = (directory / "tiktoken.bpe").read_bytes()
        except FileNotFoundError:
            raise unusable(directory, "tiktoken.bpe is missing") from None
        found = fingerprint(lines, meta["pattern"], meta["special_tokens"])
        if found != meta["hash"]:
            raise unusable(directory, f"tiktoken.bpe or meta.json was changed: hash {found}, saved as {meta['hash']}")
        return cls(rustbpe.Tokenizer.from_ranks(parse_ranks(lines), meta["pattern"]), meta["special_tokens"])

    def save(self, directory: str | Path) -> None:
        """Write the files of a tokenizer directory. A full disk leaves the previous ones as they were."""
        ranks = dict(self.get_mergeable_ranks())
        sizes = {"token_bytes": np.array(self.token_byte_lengths(), dtype=np.int32)}
        files = {
            "tokenizer.json": huggingface_json(ranks, self.get_pattern(), self.get_special_tokens()).encode(),
            "tokenizer_config.json": tokenizer_config(self.get_special_tokens()).encode(),
            "token_bytes.safetensors": safetensors.numpy.save(sizes, {"tokenizer_hash": self.hash}),
            "tiktoken.bpe": rank_lines(self._token_bytes),
        }
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        meta = (json.dumps({**self._meta(), "sha256": sums}, indent=2) + "\n").encode()
        Path(directory).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # renamed once all are written, meta.json last
            for name, content in {"meta.json": meta, **files}.items():
                stack.enter_context(atomic_write(Path(directory) / name)).write_bytes(content)

    def keep(self, directory: Path) -> None:
        """As `save`, which takes 3.7 s for 65,536 tokens, unless all is there as it was written."""
        with contextlib.suppress(UserError, OSError):
            meta = read_meta(directory)
            sums = meta.pop("sha256", {})
            if meta == self._meta() and sums == {name: sha256_file(directory / name) for name in FILES[1:]}:
                return
        self.save(directory)

    def _meta(self) -> dict[str, Any]:
        """What meta.json says of the tokenizer."""
        return {
            "pattern": self.get_pattern(),
            "special_tokens": self.get_special_tokens(),
            "vocab_size": self.get_vocab_size(),
            "hash": self.hash,
        }

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over ranks, pattern and specials; ties checkpoints and tokenized data to this tokenizer."""
        return fingerprint(rank_lines(self._token_bytes), self.get_pattern(), self.get_special_tokens())

    def get_vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._token_bytes) + len(self._specials)

    def get_special_tokens(self) -> list[str]:
        """Names of the special tokens in the order of their ids."""
        return list(self._specials)

    def encode_special(self, name: str) -> int:
        """Id of a special token. Raises ValueError for any other name."""
        if name not in self._specials:
            raise ValueError(f"{name!r} is not a special token: {', '.join(self._specials)}")
        return self._specials[name]

    def get_bos_token_id(self) -> int:
        return self._specials["<|bos|>"]

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """(bytes, id) of every token but the special ones, by id."""
        return [(token, rank) for rank, token in enumerate(self._token_bytes)]

    def get_pattern(self) -> str:
        """The regular expression that cuts text into the chunks within which tokens are merged."""
        return self._core.get_pattern()

    def token_byte_lengths(self) -> list[int]:
        """Bytes of text that each id stands for, from the raw bytes of the token; 0 for special tokens."""
        return [len(token) for token in self._token_bytes] + [0] * len(self._specials)

    @overload
    def encode(self, text: str, *args: Any, **options: Any) -> list[int]: ...

    @overload
    def encode(self, text: list[str], *args: Any, **options: Any) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: str | int | None = None,
        append: str | int | None = None,
        num_threads: int = 8,
        allowed_special: Allowed = (),
    ) -> list[int] | list[list[int]]:
        """Ids of one text, or of each text of a list in parallel. `prepend`, `append`: a special token's name or id.
        Names of special tokens in the text are text, but those of `allowed_special` ("all": of all) become their ids,
        the longest where two begin at one place. Raises ValueError for lone surrogates and for unknown names."""
        named = [self.encode_special(token) if isinstance(token, str) else token for token in (prepend, append)]
        before, after = ([] if token is None else [token] for token in named)
        if not isinstance(text, (str, list)):
            raise TypeError(f"encode takes a string or a list of strings, not {type(text).__name__}")
        allowed = self._allowed(allowed_special)
        try:
            if isinstance(text, str):
                (row,) = self._encode_with([text], allowed, 1) if allowed else [self._core.encode(text)]
                return before + row + after
            rows = self._encode_with(text, allowed, num_threads)
        except UnicodeEncodeError:
            raise _surrogate_error(text) from None
        return [before + row + after for row in rows] if before or after else rows

    __call__ = encode

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special. Raises ValueError for lone surrogates."""
        try:
            return self._core.encode(text)
        except UnicodeEncodeError:
            raise _surrogate_error(text) from None

    def batch_encode(self, texts: Sequence[str], num_threads: int = 8) -> list[np.ndarray]:
        """One array of ids a text: uint16 where the vocabulary fits (<= 65,536), else uint32. Nothing in the texts is
        special. Raises ValueError for lone surrogates."""
        narrow = self.get_vocab_size() <= 1 << 16
        encode = self._core.batch_encode_u16 if narrow else self._core.batch_encode_u32
        try:
            tokens, offsets = encode(texts, num_threads)
        except UnicodeEncodeError:
            raise _surrogate_error(texts) from None
        ids = np.frombuffer(tokens, dtype="<u2" if narrow else "<u4")
        bounds = np.frombuffer(offsets, dtype="<u8").tolist()
        # copies: a text kept in a packing buffer must not keep its whole batch in memory
        return [ids[start:end].astype(ids.dtype.type) for start, end in itertools.pairwise(bounds)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The raw bytes, special tokens by their names. Raises ValueError for an id outside the vocabulary."""
        table = self._all_bytes
        values = [int(i) for i in ids]
        if values and not (min(values) >= 0 and max(values) < len(table)):
            raise ValueError(f"ids from {min(values)} to {max(values)}: expected 0 to {len(table) - 1}")
        return b"".join([table[i] for i in values])

    def decode(self, ids: Iterable[int]) -> str:
        """Text, special tokens by their names; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def id_to_token(self, id: int) -> str:
        return self.decode([id])

    def render_conversation(
        self, conversation: Mapping[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of equal length <= max_tokens; mask is 1 on the tokens to train on. See nanochat/chat_format.py.
        Raises UserError where the conversation is not well formed."""
        return self._encode_pieces(conversation_pieces(conversation), max_tokens)

    def render_for_completion(self, conversation: Mapping[str, Any]) -> list[int]:
        """Ids up to the <|assistant_start|> of the answer to come, included; a final assistant message is dropped."""
        return self._encode_pieces(completion_pieces(conversation), max_tokens=None)[0]

    def _encode_pieces(self, pieces: list[Piece], max_tokens: int | None) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        mask: list[int] = []
        for piece in pieces:
            new = [self.encode_special(piece.text)] if piece.special else self.encode_ordinary(repaired(piece.text))
            ids += new
            mask += [int(piece.trained)] * len(new)
        return ids[:max_tokens], mask[:max_tokens]

    def _allowed(self, allowed: Allowed) -> list[str]:
        """Names, the longest first."""
        names = list(self._specials) if allowed == "all" else list(allowed)
        for name in names:
            self.encode_special(name)  # raises for an unknown one
        return sorted(names, key=len, reverse=True)

    def _encode_with(self, texts: list[str], allowed: list[str], num_threads: int) -> list[list[int]]:
        if not allowed:
            return self._core.batch_encode(texts, num_threads)
        names = re.compile("(" + "|".join(map(re.escape, allowed)) + ")")
        split = [names.split(text) for text in texts]  # text and names in turn
        encoded = iter(self._core.batch_encode([part for parts in split for part in parts[::2]], num_threads))
        rows = []
        for parts in split:
            ids = next(encoded)
            for name in parts[1::2]:
                ids += [self._specials[name], *next(encoded)]
            rows.append(ids)
        return rows

    @functools.cached_property
    def _all_bytes(self) -> list[bytes]:
        return self._token_bytes + [name.encode() for name in self._specials]


def _mergeable(vocab_size: int) -> int:
    """Tokens of a vocabulary that are not special. Raises UserError where there is no room for them."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={vocab_size}: must be at least {MIN_VOCAB_SIZE} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    return vocab_size - len(SPECIAL_TOKENS)


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer of the artifact store. Raises UserError where it is absent or damaged."""
    return RustBPETokenizer.from_directory(tokenizer_dir())


def get_token_bytes(device: "str | torch.device" = "cpu", tokenizer: RustBPETokenizer | None = None) -> "torch.Tensor":
    """int32 (vocab,): bytes of text that each id of `tokenizer` (None: the store's) stands for, 0 for specials. Raises
    UserError as get_tokenizer."""
    import torch

    # from the ranks, whose hash was checked, rather than from token_bytes.safetensors: bits per byte hang on it
    return torch.tensor((tokenizer or get_tokenizer()).token_byte_lengths(), dtype=torch.int32, device=device)


def repaired(text: str) -> str:
    """`text` itself, unless it has lone surrogates (JSON can spell them): those become U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _surrogate_error(texts: str | Sequence[str]) -> ValueError:
    """What to raise where one of these could not be UTF-8. Looked for only then: before, all text was encoded twice."""
    named = {"the text": texts} if isinstance(texts, str) else {f"text {i}": text for i, text in enumerate(texts)}
    for what, text in named.items():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X}, half of a surrogate pair, at character {error.start}"
            return ValueError(f"{what} has {found}: UTF-8 has no such thing; see nanochat.tokenizer.repaired")
    raise AssertionError("all of these are UTF-8")


# ---- Files of a tokenizer directory


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


def unusable(directory: Path, why: str) -> UserError:
    return UserError(f"no usable tokenizer in {directory}: {why}; run `python -m scripts.tok_train`")


# ---- tokenizer.json, which holds merges instead of ranks

# Programs that load it (transformers, vLLM, exports) find special tokens inside text unless told otherwise
# (`encode_special_tokens = True`), which nanochat's own encoder never does.


def huggingface_json(ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str]) -> str:
    """The text of tokenizer.json. Raises ValueError where the ranks cannot come from byte-pair merging."""
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
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
