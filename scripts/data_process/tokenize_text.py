"""Tokenize a text source once and for all, with the tokenizer of the artifact store.

    python -m scripts.data_process.tokenize_text --source=local:DIR --shard-tokens=1e8

Get the text (python -m nanochat.dataset) and the tokenizer (python -m scripts.tok_train) first. Writes token files (see
nanochat/data/bins.py) and, last, their meta.json to tokenized_data/<source>-<tokenizer hash> of the artifact store,
for `scripts.base_train --source=bin:<source>-<tokenizer hash>`. <|bos|> starts every document.
"""

from typing import Annotated

from nanochat import cli
from nanochat.cli import int_flag
from nanochat.data.sources import source_flag


@cli.program
class Settings:
    """Tokenize text into token files."""

    source: Annotated[str, source_flag("Where the text comes from")] = "fineweb-edu"

    shard_tokens: Annotated[int, int_flag(gte=1, lte=2_000_000_000)] = 100_000_000
    """Tokens in a file; the document that reaches it is still written whole."""


import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.data import parquet
from nanochat.data.bins import HEADER_BYTES, MOST_IDS, tokenized_dir, write_tokens
from nanochat.data.sources import Split, canonical, dataset_bytes, iter_documents, text_hash
from nanochat.dataset import progress_bar
from nanochat.errors import UserError
from nanochat.files import atomic_write_text
from nanochat.paths import slug
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

BATCH_CHARS = 1 << 23  # encoded at a time: keeps all threads busy and takes some 100 MB


def main(settings: Settings) -> None:
    """Tokenize both splits, unless that has been done. Raises UserError for absent text or tokenizer, a vocabulary
    that uint16 cannot hold, and a split without text."""
    source = canonical(settings.source)
    tokenizer = get_tokenizer()
    if tokenizer.get_vocab_size() > MOST_IDS:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens; token files hold 16 bits, at most {MOST_IDS}: "
            "train on the text itself (--source without bin:), or train a smaller tokenizer"
        )
    folder = tokenized_dir() / f"{slug(source)}-{tokenizer.hash}"
    meta = describe(source, tokenizer, settings.shard_tokens)
    if _is_complete(folder, meta):
        print(f"{source}: tokenized already")
    else:
        (folder / "meta.json").unlink(missing_ok=True)  # while the files change, nobody is to trust them
        meta["splits"] = {}
        for split in ("train", "val"):
            meta["splits"][split] = write_split(tokenizer, source, split, folder, settings.shard_tokens)
        names = {name for files in meta["splits"].values() for name in files}
        for path in folder.glob("*.bin"):
            if path.name not in names:  # of an earlier, longer tokenization
                path.unlink()
        atomic_write_text(folder / "meta.json", json.dumps(meta, indent=1) + "\n")
    print(f"in {folder}; train on it with --source=bin:{folder.name}")


def describe(source: str, tokenizer: RustBPETokenizer, shard_tokens: int) -> dict[str, Any]:
    """meta.json but for the files: what is written depends on nothing else."""
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "document_token": tokenizer.get_bos_token_id(),
        "tokenizer_hash": tokenizer.hash,
        "source": source,
        "text_hash": text_hash(source),
        "shard_tokens": shard_tokens,
    }


def _is_complete(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether `folder` holds just what `meta` describes, every file of its full size."""
    try:
        found = json.loads((folder / "meta.json").read_bytes())
        files = [file for part in found.pop("splits").values() for file in part.items()]
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return False  # absent or damaged: written anew
    sizes = [(folder / name, HEADER_BYTES + 2 * tokens) for name, tokens in files]
    return found == meta and all(path.exists() and path.stat().st_size == size for path, size in sizes)


def write_split(
    tokenizer: RustBPETokenizer, source: str, split: Split, folder: Path, shard_tokens: int
) -> dict[str, int]:
    """Write the documents of one split as {split}_000000.bin and so on; returns the tokens of each file. These names
    are not the community's: without its meta.json the folder is not taken for one of GPT-2 tokens."""
    files: dict[str, int] = {}
    started = time.perf_counter()
    with progress_bar() as progress:
        bar = progress.add_task(split, total=dataset_bytes(source, split))
        documents = encoded_documents(tokenizer, source, split, lambda done: progress.advance(bar, done))
        for part in parquet.parts(documents, shard_tokens, len):
            name = f"{split}_{len(files):06d}.bin"
            files[name] = write_tokens(folder / name, part)
            seconds = time.perf_counter() - started
            rate = sum(files.values()) / seconds
            print(f"{name}: {files[name]:,} tokens ({rate / 1e6:.2f} M tokens/s)", flush=True)
    if not files:
        raise UserError(f"--source={source}: its {split} split holds no text")
    return files


def encoded_documents(
    tokenizer: RustBPETokenizer, source: str, split: Split, on_bytes: Any = lambda done: None
) -> Iterator[np.ndarray]:
    """Ids (N,) uint16 of every document that is not empty, <|bos|> first, in the order of the source. At most
    BATCH_CHARS and one document are held at a time; on_bytes(n) follows the progress in bytes of text."""
    bos = np.array([tokenizer.get_bos_token_id()], dtype=np.uint16)
    threads = os.cpu_count() or 1
    documents = (text for text in iter_documents(source, split) if text)
    for texts in map(list, parquet.parts(documents, BATCH_CHARS, len)):
        for ids in tokenizer.batch_encode(texts, threads):
            yield np.concatenate([bos, ids])
        on_bytes(sum(map(parquet.utf8_bytes, texts)))


if __name__ == "__main__":
    cli.run(main, Settings)
