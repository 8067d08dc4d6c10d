"""Train the tokenizer on the training documents of a text source.

    python -m scripts.tok_train --max-chars=2e9

Writes the tokenizer directory of the artifact store (see nanochat/tokenizer.py).
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanochat import report, settings
from nanochat.dataset import iter_documents
from nanochat.errors import UserError
from nanochat.paths import tokenizer_dir
from nanochat.settings import whole
from nanochat.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, RustBPETokenizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train the byte-pair tokenizer."""

    source: str = "fineweb-edu"
    """Where the text comes from: fineweb-edu, climbmix, pydocs or local:DIR."""

    max_chars: Annotated[int, whole(gte=1)] = 2_000_000_000
    """Characters to train on at most."""

    doc_cap: Annotated[int, whole(gte=1)] = 10_000
    """Characters used of each document at most, so that a few long ones do not decide the vocabulary."""

    vocab_size: Annotated[int, whole(gte=MIN_VOCAB_SIZE)] = 65_536
    """Tokens in the vocabulary, the nine special tokens included."""


@dataclass
class Taken:
    """How much text has gone into training so far."""

    documents: int = 0
    characters: int = 0


def main(settings_: Settings) -> None:
    taken = Taken()
    started = time.perf_counter()
    with _progress() as progress:
        texts = take(iter_documents(settings_.source, "train"), settings_.max_chars, settings_.doc_cap, taken)
        first = next(texts, None)
        if first is None:
            raise UserError(f"--source={settings_.source}: its training shards hold no text to learn from")
        texts = _shown(itertools.chain([first], texts), progress, taken, settings_.max_chars)
        tokenizer = RustBPETokenizer.train_from_iterator(texts, settings_.vocab_size)
    train_seconds = time.perf_counter() - started
    tokenizer.save(tokenizer_dir())

    metrics = {
        "train_seconds": train_seconds,
        "documents": taken.documents,
        "characters": taken.characters,
        "vocab_size": tokenizer.get_vocab_size(),
        "special_tokens": len(SPECIAL_TOKENS),
        **token_byte_statistics(tokenizer),
        "hash": tokenizer.hash,
    }
    notes = []
    if tokenizer.get_vocab_size() < settings_.vocab_size:
        notes.append(
            f"The text ran out of pairs to merge: {tokenizer.get_vocab_size():,} tokens "
            f"instead of {settings_.vocab_size:,}."
        )
    data = {"settings": dataclasses.asdict(settings_), "metrics": metrics, "notes": notes}
    report.write_section("tok_train", "Tokenizer training", data)
    _print_summary(metrics, notes)


def take(documents: Iterable[str], max_chars: int, doc_cap: int, taken: Taken) -> Iterator[str]:
    """The first `doc_cap` characters of each non-empty document until `max_chars` are reached; the last one is cut.

    Counts into `taken` as it goes.
    """
    for document in documents:
        text = document[: min(doc_cap, max_chars - taken.characters)]
        if not text:
            continue
        taken.documents += 1
        taken.characters += len(text)
        yield text
        if taken.characters >= max_chars:
            return


def token_byte_statistics(tokenizer: RustBPETokenizer) -> dict[str, float]:
    """Minimum, maximum, mean and standard deviation of bytes per token; special tokens do not count."""
    lengths = torch.tensor([length for length in tokenizer.token_byte_lengths() if length > 0], dtype=torch.float64)
    return {
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "token_bytes_mean": lengths.mean().item(),
        "token_bytes_std": lengths.std().item(),
    }


def _progress() -> Progress:
    """A bar on a terminal, nothing in a log."""
    console = Console()
    columns = [TextColumn("reading text"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn()]
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _shown(texts: Iterable[str], progress: Progress, taken: Taken, max_chars: int) -> Iterator[str]:
    bar = progress.add_task("", total=max_chars)
    for index, text in enumerate(texts):
        yield text
        if index % 1024 == 0:
            progress.update(bar, completed=taken.characters)
    progress.update(bar, completed=max_chars)  # there may have been less text than allowed


def _print_summary(metrics: dict[str, Any], notes: list[str]) -> None:
    print(
        f"trained on {metrics['documents']:,} documents, {metrics['characters']:,} characters "
        f"in {metrics['train_seconds']:.1f} s"
    )
    print(
        f"{metrics['vocab_size']:,} tokens, {metrics['special_tokens']} of them special; bytes per token: "
        f"min {metrics['token_bytes_min']}, max {metrics['token_bytes_max']}, "
        f"mean {metrics['token_bytes_mean']:.4f}, std {metrics['token_bytes_std']:.4f}"
    )
    for note in notes:
        print(f"note: {note}")
    print(f"saved in {tokenizer_dir()} (hash {metrics['hash']})")


if __name__ == "__main__":
    settings.run(main, Settings)
