"""Compare the tokenizer's compression with GPT-2's and GPT-4's on several kinds of text, and check its round trip.

    python -m scripts.tok_eval

Nothing is downloaded: a baseline takes part where tiktoken's cache (TIKTOKEN_CACHE_DIR) already holds its ranks.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from nanochat import cli, sections
from nanochat.data.sources import first_documents, source_flag
from nanochat.files import read_jsonl
from nanochat.tokenizer import get_tokenizer

# five short texts of different kinds, written for this repository
TEXTS = {record["name"]: record["text"] for record in read_jsonl(Path(__file__).with_suffix(".jsonl"))}
SAMPLE_BYTES = 1_000_000  # of each of the train and validation shards
LONG, BAR = 16, 30  # bytes from which tokens are counted together; characters of the longest bar

# tiktoken's name of a baseline -> {address of a rank file: its sha256}; tiktoken caches under the sha1 of the address
BASELINES = json.loads(Path(__file__).with_name("tok_baselines.json").read_bytes())


@cli.program
class Settings:
    """Measure how well the tokenizer compresses."""

    source: Annotated[str, source_flag("Where the train and validation text comes from")] = "fineweb-edu"


import numpy as np
import tiktoken
from rich.console import Console
from rich.table import Table


def main(settings: Settings) -> None:
    kept = sections.keeps_results()
    tokenizer = get_tokenizer()
    texts = {name: [text] for name, text in TEXTS.items()}
    for split in ("train", "val"):
        texts[split] = list(first_documents(settings.source, split, SAMPLE_BYTES))
    sizes = {name: sum(len(text.encode()) for text in documents) for name, documents in texts.items()}

    tokens = {name: sum(map(len, tokenizer.encode(documents))) for name, documents in texts.items()}
    failed = [name for name, documents in texts.items()
              if any(tokenizer.decode(tokenizer.encode(text)) != text for text in documents)]  # fmt: skip
    ours = {name: sizes[name] / max(tokens[name], 1) for name in texts}
    own = [
        [name, f"{sizes[name]:,}", f"{tokens[name]:,}", f"{ours[name]:.3f}", "FAILED" if name in failed else "ok"]
        for name in texts
    ]
    compared = [[f"nanochat ({tokenizer.get_vocab_size():,})", *(f"{value:.2f}" for value in ours.values())]]
    notes = []
    for baseline in BASELINES:
        row, note = compare(baseline, texts, sizes, ours)
        compared.append(row)
        notes += note

    columns = ["Text", "Bytes", "Tokens", "Bytes per token", "Round trip"]
    title = "Bytes per token (in brackets: how much more, or less, nanochat's tokenizer packs into one)"
    tables = [
        {"title": "This tokenizer", "columns": columns, "rows": own},
        {"title": title, "columns": ["Tokenizer (vocabulary)", *texts], "rows": compared},
        histogram(tokenizer.token_byte_lengths()),
    ]
    metrics = {f"bytes_per_token_{name}": value for name, value in ours.items()} | {"hash": tokenizer.hash}
    data = {"settings": asdict(settings), "metrics": metrics, "tables": tables, "notes": notes}
    if kept:
        sections.write_section("tok_eval", "Tokenizer evaluation", data)
    for table in tables:
        print_table(table)
    for note in notes:
        print(f"note: {note}")
    if failed:
        raise RuntimeError(f"decode(encode(text)) differs from text on: {', '.join(failed)}")


def histogram(lengths: Sequence[int]) -> dict[str, Any]:
    """Table of how many tokens stand for 1, 2, ... bytes; special tokens (0) left out."""
    counts = np.bincount(np.minimum(lengths, LONG), minlength=LONG + 1)[1:].tolist()
    sizes, total, most = [*map(str, range(1, LONG)), f"{LONG} or more"], sum(counts), max(counts)
    rows = [
        [size, f"{n:,}", f"{n / total:.1%}", "█" * round(BAR * n / most)] for size, n in zip(sizes, counts, strict=True)
    ]
    return {"title": "Tokens by their length in bytes", "columns": ["Bytes", "Tokens", "Share", ""], "rows": rows}


def compare(
    name: str, texts: dict[str, list[str]], sizes: dict[str, int], ours: dict[str, float]
) -> tuple[list[str], list[str]]:
    """One row of the comparison (bytes per token on each text), and a note where the baseline is not at hand."""
    missing = missing_ranks(name)
    if missing:
        why, detail = missing
        return [f"{name}: not available: {why}", *["-"] * len(texts)], [f"{name}: {why}: {detail}"]
    encoding = tiktoken.get_encoding(name)
    cells = []
    for text, documents in texts.items():
        tokens = sum(len(encoding.encode_ordinary(document)) for document in documents)
        theirs = sizes[text] / max(tokens, 1)
        cells.append(f"{theirs:.2f} ({ours[text] / theirs - 1:+.1%})")
    return [f"{name} ({encoding.n_vocab:,})", *cells], []


def missing_ranks(name: str) -> tuple[str, str] | None:
    """(why, detail) where tiktoken would have to download this baseline's rank files; None where it would not. Checked
    before tiktoken is asked, which would fetch a missing file, and delete and fetch a damaged one."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder == "":
        return "no cache", "TIKTOKEN_CACHE_DIR is empty, which switches tiktoken's cache off"
    for address, sha256 in BASELINES[name].items():
        path = Path(folder or f"{tempfile.gettempdir()}/data-gym-cache", hashlib.sha1(address.encode()).hexdigest())
        try:
            content = path.read_bytes()
        except OSError:
            return "ranks not cached", f"{path} would be {address} (TIKTOKEN_CACHE_DIR names the folder)"
        if hashlib.sha256(content).hexdigest() != sha256:
            return "cached ranks damaged", f"{path} is not {address} as published"
    return None


def print_table(table: dict[str, Any]) -> None:
    """Drawn on a terminal; in a pipe or log, plain columns of full width."""
    columns, rows = table["columns"], table["rows"]
    console = Console()
    if console.is_terminal:
        drawn = Table(*columns, title=table["title"], title_justify="left")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(table["title"])
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


if __name__ == "__main__":
    cli.run(main, Settings)
