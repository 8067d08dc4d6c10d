"""Train the tokenizer on the training documents of a text source.

    python -m scripts.tok_train --max-chars=2e9

Writes the tokenizer directory of the artifact store (see nanochat/tokenizer.py).
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from nanochat import cli, sections
from nanochat.cli import int_flag
from nanochat.data.sources import list_shards, source_flag
from nanochat.errors import UserError
from nanochat.paths import check_writable, tokenizer_dir
from nanochat.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, RustBPETokenizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train the byte-pair tokenizer."""

    source: Annotated[str, source_flag("Where the text comes from")] = "fineweb-edu"

    max_chars: Annotated[int, int_flag(gte=1)] = 2_000_000_000
    """Characters to train on at most."""

    doc_cap: Annotated[int, int_flag(gte=1)] = 10_000
    """Characters used of each document at most, so that a few long ones do not decide the vocabulary. Documents of your
    own (--source=local:DIR) have been cut into pieces of 10,000 at most, so that all of them is used."""

    vocab_size: Annotated[int, int_flag(gte=MIN_VOCAB_SIZE)] = 65_536
    """Tokens in the vocabulary, the nine special tokens included."""


if __name__ == "__main__":
    cli.start(Settings)  # before what is slow to import

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def main(settings: Settings) -> None:
    check_writable(tokenizer_dir())
    started = time.perf_counter()
    with shown_progress(settings.vocab_size) as (_, update):
        tokenizer, documents, characters = RustBPETokenizer.train_from_parquet(
            list_shards(settings.source, "train"),
            settings.vocab_size,
            max_chars=settings.max_chars,
            doc_cap=settings.doc_cap,
            progress=update,
        )
    if not documents:
        raise UserError(f"--source={settings.source}: its training shards hold no text to learn from")
    train_seconds = time.perf_counter() - started
    tokenizer.save(tokenizer_dir())

    metrics = {
        "train_seconds": train_seconds,
        "documents": documents,
        "characters": characters,
        "vocab_size": tokenizer.get_vocab_size(),
        "special_tokens": len(SPECIAL_TOKENS),
        **token_byte_statistics(tokenizer),
        "hash": tokenizer.hash,
    }
    size, notes = tokenizer.get_vocab_size(), []
    if size < settings.vocab_size:
        notes.append(f"The text ran out of pairs to merge: {size:,} tokens instead of {settings.vocab_size:,}.")
    data = {"settings": dataclasses.asdict(settings), "metrics": metrics, "notes": notes}
    sections.write_section("tok_train", "Tokenizer training", data)
    print(f"trained on {documents:,} documents, {characters:,} characters in {train_seconds:.1f} s")
    shortest, longest, mean, deviation = (metrics[f"token_bytes_{name}"] for name in ("min", "max", "mean", "std"))
    print(
        f"{size:,} tokens, {len(SPECIAL_TOKENS)} of them special; bytes per token: "
        f"min {shortest}, max {longest}, mean {mean:.4f}, std {deviation:.4f}"
    )
    for note in notes:
        print(f"note: {note}")
    print(f"saved in {tokenizer_dir()} (hash {tokenizer.hash})")


def token_byte_statistics(tokenizer: RustBPETokenizer) -> dict[str, float]:
    """Minimum, maximum, mean and standard deviation of bytes per token; special tokens do not count."""
    import torch

    lengths = torch.tensor([length for length in tokenizer.token_byte_lengths() if length > 0], dtype=torch.float64)
    return {
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "token_bytes_mean": lengths.mean().item(),
        "token_bytes_std": lengths.std().item(),
    }


@contextmanager
def shown_progress(vocab_size: int) -> Iterator[tuple[Progress, Callable[[int, int, int], None]]]:
    """Progress on a terminal, nothing in a log: how much text has been read, then a bar of the merges."""
    console, started = Console(), time.perf_counter()
    columns = [TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
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
