"""Words of a text source, some to train on and some to test on.

task_data/<source>/words.txt     one word a line, the most frequent first
task_data/<source>/words.json    what they were counted on; written last
"""

import re
from collections import Counter
from collections.abc import Iterable

from nanochat import dataset
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.tasks.common import Split
from nanochat.tasks.generated import fingerprint, is_made, mark_made, require_made, source_dir
from nanochat.tasks.splits import split_of

MAX_CHARS = 30_000_000  # of the train text; the rarest words kept are then still ordinary ones
CHUNK_CHARS = 1_000_000
MIN_COUNT = 5  # rarer ones are mostly typing errors and names
MAX_WORDS = 20_000
RULES = 1  # count up when the rules below change, so that words made by older ones are made again
# In running text: not a part of an identifier, a path, an address, a compound or a contraction (the `don` of don't)
_WORD = re.compile(r"(?<![\w.'\u2019@/\\-])[a-z]{3,12}(?![\w'\u2019@/\\-]|\.\w)")


def prepare(source: str) -> None:
    """Count the words of the train text of `source` and write them, unless they stand. UserError without text."""
    folder = source_dir(source)
    made_from = fingerprint(source, RULES, MAX_CHARS, MIN_COUNT, MAX_WORDS)
    if is_made(folder, "words", made_from):
        return
    words = frequent_words(dataset.iter_documents(source, "train"))
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "words.txt") as temporary:
        temporary.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    mark_made(folder, "words", source, made_from, ["words.txt"])


def frequent_words(documents: Iterable[str]) -> list[str]:
    """Lower-case ASCII words of 3 to 12 letters that occur at least MIN_COUNT times, the most frequent first."""
    counts: Counter[str] = Counter()
    chunk: list[str] = []
    size = total = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= CHUNK_CHARS:
            counts.update(_WORD.findall("\n".join(chunk)))
            total += size
            chunk, size = [], 0
            if total >= MAX_CHARS:
                break
    counts.update(_WORD.findall("\n".join(chunk)))
    # words as frequent as each other in alphabetical order: the order must not hang on which came first
    frequent = sorted((-count, word) for word, count in counts.items() if count >= MIN_COUNT)
    return [word for _, word in frequent[:MAX_WORDS]]


def load_words(source: str, split: Split) -> list[str]:
    """Words of one split, the most frequent first; about one in ten, by its hash, is for test.

    Raises UserError when they were not made yet or are damaged, or when the text has too few.
    """
    path = require_made(source, "words", "SpellingBee") / "words.txt"
    words = [word for word in path.read_text(encoding="utf-8").split() if split_of("word", word) == split]
    if not words:
        raise UserError(f"{path} has no words for {split}: the text of {source} is too short for tasks about words")
    return words
