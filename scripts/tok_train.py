"""Train the tokenizer on the training documents of a text source.

    python -m scripts.tok_train --max-chars=2e9

Writes the tokenizer directory of the artifact store (see nanochat/tokenizer.py).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from nanochat import cli, sections
from nanochat.cli import int_flag
from nanochat.data import parquet
from nanochat.data.sources import list_shards, source_flag
from nanochat.errors import UserError
from nanochat.paths import check_writable, tokenizer_dir
from nanochat.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, RustBPETokenizer

# GPT-4o's pattern. Ours, like GPT-4's, ends a word at each vowel sign, so that most of Hindi stays in single letters.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKED = 0.05  # share of letters with a mark from which on auto takes it: Hindi, Tamil .5, Thai .2, Arabic .01


@cli.program
class Settings:
    """Train the byte-pair tokenizer."""

    source: Annotated[str, source_flag("Where the text comes from")] = "fineweb-edu"

    max_chars: Annotated[int, int_flag(gte=1)] = 2_000_000_000
    """Characters to train on at most."""

    doc_cap: Annotated[int, int_flag(gte=1)] = 10_000
    """Characters used of each document at most, so that a few long ones do not decide the vocabulary. Documents of your
    own (--source=local:DIR) have been cut into pieces of 10,000 at most, so that all of them is used."""

    vocab_size: Annotated[int, int_flag(gte=MIN_VOCAB_SIZE, lte=2**31 - 1)] = 65_536
    """Tokens in the vocabulary, the nine special tokens included."""

    pattern: Literal["auto", "default", "o200k"] = "auto"
    """How words are told apart: o200k (GPT-4o's) keeps vowel signs and accents of their own in them, as Hindi and Thai
    have; auto: where one letter in 20 has such a mark."""


import regex
from rich.progress import Progress

from nanochat.dataset import progress_bar


def main(settings: Settings) -> None:
    check_writable(tokenizer_dir())
    started, notes = time.perf_counter(), []
    shards = list_shards(settings.source, "train")
    pattern = O200K if settings.pattern == "o200k" else None
    if settings.pattern == "auto" and (share := marked_share(shards)) >= MARKED:
        pattern = O200K
        notes.append(
            f"{share:.0%} of the letters have vowel signs or accents of their own: words are told apart as GPT-4o's "
            "tokenizer does, which keeps them in (--pattern=o200k)."
        )
    with shown_progress(settings.vocab_size) as (_, update):
        tokenizer, documents, characters = RustBPETokenizer.train_from_parquet(
            shards,
            settings.vocab_size,
            max_chars=settings.max_chars,
            doc_cap=settings.doc_cap,
            progress=update,
            pattern=pattern,
        )
    if not documents:
        raise UserError(f"--source={settings.source}: its training shards hold no text to learn from")
    train_seconds = time.perf_counter() - started
    tokenizer.save(tokenizer_dir())

    size, statistics = tokenizer.get_vocab_size(), token_byte_statistics(tokenizer)
    metrics = {
        "train_seconds": train_seconds,
        "documents": documents,
        "characters": characters,
        "vocab_size": size,
        "special_tokens": len(SPECIAL_TOKENS),
        **statistics,
        "hash": tokenizer.hash,
    }
    if size < settings.vocab_size:
        notes.append(f"The text ran out of pairs to merge: {size:,} tokens instead of {settings.vocab_size:,}.")
    data = {"settings": dataclasses.asdict(settings), "metrics": metrics, "notes": notes}
    sections.write_section("tok_train", "Tokenizer training", data)
    print(f"trained on {documents:,} documents, {characters:,} characters in {train_seconds:.1f} s")
    shortest, longest, mean, deviation = statistics.values()
    print(
        f"{size:,} tokens, {len(SPECIAL_TOKENS)} of them special; bytes per token: "
        f"min {shortest}, max {longest}, mean {mean:.4f}, std {deviation:.4f}"
    )
    for note in notes:
        print(f"note: {note}")
    print(f"saved in {tokenizer_dir()} (hash {tokenizer.hash})")


def marked_share(shards: list[Path]) -> float:
    """Share of the letters with a mark behind them, of up to eight shards' first documents."""
    letters = with_mark = 0
    for path in shards[:: -(-len(shards) // 8) or 1]:
        with contextlib.suppress(UserError):  # a damaged shard is named by what reads all of it
            file = parquet.open_shard(path)
            for text in parquet.read_texts(file, 0, str(path)) if file.num_row_groups else ():
                letters += len(regex.findall(r"\p{L}", text[:500]))
                with_mark += len(regex.findall(r"\p{L}\p{M}", text[:500]))
    return with_mark / max(letters, 1)


def token_byte_statistics(tokenizer: RustBPETokenizer) -> dict[str, float]:
    import torch

    lengths = torch.tensor([length for length in tokenizer.token_byte_lengths() if length > 0], dtype=torch.float64)
    return {
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "token_bytes_mean": lengths.mean().item(),
        "token_bytes_std": lengths.std().item(),
    }


@contextlib.contextmanager
def shown_progress(vocab_size: int) -> Iterator[tuple[Progress, Callable[[int, int, int], None]]]:
    """Progress on a terminal, nothing in a log: how much text has been read, then a bar of the merges."""
    started = time.perf_counter()
    with progress_bar(in_bytes=False) as progress:
        bar = progress.add_task("reading text", total=None)

        def update(documents: int, text_bytes: int, merges: int) -> None:
            if merges:
                total = vocab_size - MIN_VOCAB_SIZE
                progress.update(bar, description="merging pairs", completed=merges, total=total)
            else:
                rate = text_bytes / 1e6 / (time.perf_counter() - started)
                progress.update(bar, description=f"{documents:,} documents, {rate:,.0f} MB/s")

        yield progress, update


if __name__ == "__main__":
    cli.run(main, Settings)
