"""Byte-level BPE: training and encoding."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike

SPLIT_PATTERN: str

class Tokenizer:
    def __init__(self) -> None: ...
    @staticmethod
    def from_ranks(ranks: list[tuple[bytes, int]], pattern: str) -> Tokenizer: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        max_distinct_words: int | None = None,
        progress: Callable[[int, int, int], object] | None = None,
    ) -> None: ...
    def train_from_parquet(
        self,
        paths: Sequence[str | PathLike[str]],
        vocab_size: int,
        column: str = "text",
        max_chars: int | None = None,
        doc_cap: int | None = None,
        pattern: str | None = None,
        max_distinct_words: int | None = None,
        progress: Callable[[int, int, int], object] | None = None,
    ) -> tuple[int, int]: ...
    def encode(self, text: str) -> list[int]: ...
    def batch_encode(self, texts: Iterable[str], num_threads: int | None = None) -> list[list[int]]: ...
    def batch_encode_u32(self, texts: Iterable[str], num_threads: int | None = None) -> tuple[bytes, bytes]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...
    @property
    def vocab_size(self) -> int: ...
    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]: ...
