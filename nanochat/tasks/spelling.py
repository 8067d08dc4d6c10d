"""Spelling a word, and counting a letter in it: what a model that reads tokens cannot see and has to learn.

The words are those of the run's own text; test words are never asked about in training. They are from its rarer half: a
frequent word may be a token of its own, and nobody can spell a token that was never spelled to them. In training some
words are blends of two, `expresstwin`, so that the pieces of rare words are met more often.

    task_data/<source>/words.txt     one word a line, the most frequent first
    task_data/<source>/words.json    what they were counted on; written last

Letters stand apart by a space, `apple: a p p l e`. The split pattern lets one character that is neither letter nor
digit lead a run of letters, so each ` p` is a chunk of its own whatever the merges are: no token spans two letters.
A space and a letter is moreover what any English text merges first, for all 26 letters, so that a letter is one token,
the same one at every place, the question included. `a,p,p,l,e` would have chunks of that form too, but `,p` is merged
for some letters and not for others, as the text happens to have it, and the first letter would look different again.
For the same reason the word itself stands behind a space wherever an answer repeats it, as it mostly does in a
question: its tokens are copied, and need not be known under two names.
"""

import json
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import regex

from nanochat.data import parquet, sources
from nanochat.errors import TooLittleText, UserError
from nanochat.files import atomic_write_text, parse_json, read_jsonl, sha256_file
from nanochat.paths import slug, task_data_dir
from nanochat.tasks.common import (
    Conversation,
    GeneratedTask,
    Split,
    answered,
    call_calculator,
    item_rng,
    split_of,
    stable_hash,
    worded,
)

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ABSENT_SHARE = 0.15  # of the questions are about a letter that is not in the word
REPEATED_SHARE = 0.4  # are about one that occurs more than once, where the word has such: else 1 is nearly always right

MAX_CHARS = 30_000_000  # of the train text; the rarest words kept are then still ordinary ones
CHUNK_CHARS = 1_000_000
MIN_COUNT = 5  # rarer ones are mostly typing errors and names
MAX_WORDS = 20_000
RULES = 2  # count up when the rules below change, so that words made by older ones are made again
MIN_WORDS = 20  # with fewer, the tasks would be about remembering the answers
FOREIGN_SHARE = 0.01  # of the words; where fewer have other letters than a to z, those are from other languages
# Small letters, and those of scripts without small and large ones; a word of scripts without spaces has no end.
_LETTER = r"(?:[[\p{Ll}\p{Lo}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]\p{M}*+)"
# In running text: not a part of an identifier, a path, an address, a compound or a contraction (the `don` of don't)
_WORD = regex.compile(
    rf"(?<![\w\p{{N}}.'\u2019@/\\\-])(?:[a-z]{{3,12}}|{_LETTER}{{3,12}})(?![\w\p{{N}}'\u2019@/\\\-]|\.\w)", regex.V1
)  # a to z apart: twice as fast

TEST_SHARE = 0.2  # of the rarer half
BLENDED_SHARE = 0.3  # of the training items are about a word made of two
LIST_SHARE = 0.5  # of the spellings in training are of LISTED words: more words for as many tokens
LISTED = (2, 5)
SHORTEST, LONGEST = 3, 12  # letters of a word

# {"spell": question about {word}}, {"list": one about {words}} or {"count": one about {word} and {letter}}
_QUESTIONS = read_jsonl(Path(__file__).with_suffix(".jsonl"))
SPELL_QUESTIONS = [line["spell"] for line in _QUESTIONS if "spell" in line]
LIST_QUESTIONS = [line["list"] for line in _QUESTIONS if "list" in line]
COUNT_QUESTIONS = [line["count"] for line in _QUESTIONS if "count" in line]
QUOTATION = "'\"*\u2018\u2019\u201c\u201d"
QUOTES = ("{}", "{}", "'{}'", '"{}"')  # around the word, and around the letter; mostly none


class WordTask(GeneratedTask):
    """Questions about single words of a text source."""

    def __init__(self, split: Split, source: str, size: int | None = None, **kwargs: Any) -> None:
        """`size` items on words of the text `source`. Raises UserError before it is prepared."""
        super().__init__(split, size, **kwargs)
        self.words = load_words(source, split)
        # in a fixed random order: few items are a fair sample, and no word comes twice soon
        item_rng(self.name, split, "order").shuffle(self.words)
        self.source = f"generated from words of {source}"
        foreign = "".join(word for word in self.words if not word.isascii())
        self.letters = sorted(set(characters(foreign)))  # the alphabet of words that have others than a to z

    def get_example(self, index: int) -> Conversation:
        rng = item_rng(self.name, self.split, index)
        return answered(*self.ask(self.word(index, rng), rng))

    def word(self, index: int, rng: random.Random) -> str:
        """The word that item `index` asks about: in training at times the beginning of it and the end of another."""
        word = self.words[index % len(self.words)]
        if self.split == "train" and rng.random() < BLENDED_SHARE:
            other = rng.choice(self.words)
            blend = word[: rng.randint(1, len(word))] + other[rng.randrange(len(other)) :]
            plain = blend.isascii() and SHORTEST <= len(blend) <= LONGEST
            return blend if plain and split_of("word", blend, test_share=TEST_SHARE) == "train" else word
        return word

    @classmethod
    def prepare(cls, name: str, source: str, from_dir: Path | None = None) -> None:
        """Count the words of the train text and write them, unless they are there as they were written and were counted
        on this text by these rules. Raises UserError without text."""
        rules, whose = (RULES, MAX_CHARS, MIN_COUNT, MAX_WORDS), sources.canonical(source)
        fingerprint = f"{stable_hash(whose, sources.text_hash(source), rules):016x}"
        path, marker = _stored(source)
        if marker.get("fingerprint") == fingerprint and _is_whole(path, marker):
            return
        words = frequent_words(sources.iter_documents(source, "train"))
        atomic_write_text(path, "".join(f"{word}\n" for word in words))
        marker = {"source": whose, "fingerprint": fingerprint, "files": {path.name: sha256_file(path)}}
        atomic_write_text(path.with_suffix(".json"), json.dumps(marker, indent=1) + "\n")

    @abstractmethod
    def ask(self, word: str, rng: random.Random) -> tuple[str, Any]:
        """A question about `word` and the content of its answer."""


class SimpleSpelling(WordTask):
    """Spell a word; in training at times several."""

    name = "SimpleSpelling"

    def ask(self, word: str, rng: random.Random) -> tuple[str, Any]:
        quotes = rng.choice(QUOTES)
        if self.split == "train" and rng.random() < LIST_SHARE:
            more = rng.randint(*LISTED) - 1
            words = [word, *(self.word(rng.randrange(len(self.words)), rng) for _ in range(more))]
            listed = ", ".join(map(quotes.format, words))
            return worded(rng.choice(LIST_QUESTIONS), rng).format(words=listed), spelled(*words)
        return worded(rng.choice(SPELL_QUESTIONS), rng).format(word=quotes.format(word)), spelled(word)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the word stands before the last colon and after it exactly its letters, with white space between; of
        several words, each before its colon."""
        expected = _spellings(conversation["messages"][-1]["content"])
        return _spellings(completion)[-len(expected) :] == expected


class SpellingBee(WordTask):
    """How often a letter occurs in a word: spelled, counted along, and verified with the tool. In test no count is a
    safe guess, as 1 was, right in 48 of 100: words have a letter twice, and each count that a word has is asked about
    as often, with each letter."""

    name = "SpellingBee"

    def __init__(self, split: Split, source: str, size: int | None = None, **kwargs: Any) -> None:
        super().__init__(split, source, size, **kwargs)
        self.asked: dict[str, str] = {}
        if split == "test":
            offered = {word: counted_letters(word, self.alphabet(word)) for word in self.words}
            varied = [word for word in self.words if {0, 1, 2} <= set(offered[word])]
            self.words = varied if len(varied) >= MIN_WORDS else self.words
            self.asked = dict(zip(self.words, balanced([offered[word] for word in self.words]), strict=True))

    def alphabet(self, word: str) -> Iterable[str]:
        """Letters that a question about `word` may name."""
        return ALPHABET if word.isascii() else self.letters

    def ask(self, word: str, rng: random.Random) -> tuple[str, Any]:
        letter = self.asked.get(word) or _letter_to_count(word, self.alphabet(word), rng)
        question = worded(rng.choice(COUNT_QUESTIONS), rng)
        quoted = {name: rng.choice(QUOTES).format(text) for name, text in (("letter", letter), ("word", word))}
        return question.format(**quoted), _count(word, letter)


def spelled(*words: str) -> str:
    """`The word apple: a p p l e`, and so on for more words behind a semicolon."""
    return "The word " + "; ".join(f"{word}: {' '.join(characters(word))}" for word in words)


def _spellings(answer: str) -> list[list[str]]:
    """Each word that an answer spells, with a colon, and its letters."""
    pairs = [part.rpartition(":") for part in answer.rstrip().removesuffix(".").split(";") if ":" in part]
    return [[*(f"{word.strip(QUOTATION)}:" for word in said.split()[-1:]), *letters.split()]
            for said, _, letters in pairs]  # fmt: skip


def characters(word: str) -> list[str]:
    """What a reader takes for one letter each, a vowel sign or an accent included."""
    return list(word) if word.isascii() else regex.findall(r"\X", word)


def counted_letters(word: str, alphabet: Iterable[str]) -> dict[int, list[str]]:
    """Letters to ask about, by how often they occur in `word`."""
    letters = characters(word)
    # `न` occurs in `नि` for the tool, which knows nothing of vowel signs, and not for a reader: neither is asked about
    plain = [letter for letter in sorted({*letters, *alphabet}) if letters.count(letter) == word.count(letter)]
    counts = sorted({word.count(letter) for letter in plain})
    return {count: [letter for letter in plain if word.count(letter) == count] for count in counts} or {1: letters[:1]}


def balanced(offered: Iterable[dict[int, list[str]]]) -> list[str]:
    """A letter for each word: of a count drawn among those of the word, the one asked about least at it so far."""
    rng = item_rng("letters")
    asked: Counter[tuple[str, int]] = Counter()
    chosen = []
    for counts in offered:
        count = rng.choice(sorted(counts))
        surplus = {one: 3 * asked[one, count] - sum(asked[one, other] for other in range(3)) for one in counts[count]}
        letter = rng.choice([one for one in surplus if surplus[one] == min(surplus.values())])
        asked[letter, count] += 1
        chosen.append(letter)
    return chosen


def _letter_to_count(word: str, alphabet: Iterable[str], rng: random.Random) -> str:
    letters = characters(word)
    plain = [letter for letter in letters if letters.count(letter) == word.count(letter)]
    absent = sorted(letter for letter in set(alphabet) if letter not in word)
    repeated = sorted({letter for letter in plain if word.count(letter) > 1})
    drawn = rng.random()
    if absent and (drawn < ABSENT_SHARE or not plain):
        return rng.choice(absent)
    if drawn < ABSENT_SHARE + REPEATED_SHARE and repeated:
        return rng.choice(repeated)
    return rng.choice(plain or letters)


def _count(word: str, letter: str) -> list[dict[str, str]]:
    """Spelling, then each letter with the count so far: every token follows from the few before it."""
    count = 0
    running = []
    for one in characters(word):
        count += one == letter
        running.append(f"{one}{count}")
    by_hand = f"{spelled(word)}\nCount {letter}: {' '.join(running)}\n"
    verified = call_calculator(f"' {word}'.count('{letter}')", count)
    return [{"type": "text", "text": by_hand}, *verified, {"type": "text", "text": f"\n#### {count}"}]


# ---- words, some to train on and some to test on


def frequent_words(documents: Iterable[str]) -> list[str]:
    """Lower-case words of 3 to 12 letters that occur at least MIN_COUNT times, the most frequent first."""
    counts: Counter[str] = Counter()
    total = 0
    for chunk in map(list, parquet.parts(iter(documents), CHUNK_CHARS, len)):
        counts.update(_WORD.findall("\n".join(chunk)))
        total += sum(map(len, chunk))
        if total >= MAX_CHARS:
            break
    foreign = sum(count for word, count in counts.items() if not word.isascii())
    any_letters = foreign >= FOREIGN_SHARE * counts.total()
    # words as frequent as each other in alphabetical order: the order must not hang on which came first
    kept = {word: count for word, count in counts.items() if count >= MIN_COUNT and (any_letters or word.isascii())}
    return sorted(kept, key=lambda word: (-kept[word], word))[:MAX_WORDS]


def _stored(source: str) -> tuple[Path, dict[str, Any]]:
    """Where the words of a source lie, and what words.json beside them says."""
    path = task_data_dir() / slug(sources.canonical(source)) / "words.txt"
    try:
        marker = parse_json(path.with_suffix(".json").read_bytes())
    except (FileNotFoundError, ValueError):
        marker = None
    return path, marker if isinstance(marker, dict) else {}


def _is_whole(path: Path, marker: dict[str, Any]) -> bool:
    return path.exists() and marker.get("files") == {path.name: sha256_file(path)}


def load_words(source: str, split: Split) -> list[str]:
    """Words of one split, the most frequent first; of the rarer half about one in five, by its hash, is for test.
    Raises UserError when they were not made yet or are damaged, and TooLittleText where the text has too few."""
    path, marker = _stored(source)
    command = f"python -m scripts.chat_data --source={source} --tasks=SpellingBee"
    # two sources can have the same slug (local:/a/b and local:/a-b); the marker says whose words these are
    if marker.get("source") != sources.canonical(source):
        raise UserError(f"no words of {source} in {path.parent}: run `{command}`")
    if not _is_whole(path, marker):
        raise UserError(f"{path.parent}: {path.name} absent or damaged: run `{command}`")
    words = path.read_text(encoding="utf-8").split()
    tested = {word for word in words[len(words) // 2 :] if split_of("word", word, test_share=TEST_SHARE) == "test"}
    chosen = [word for word in words if (word in tested) == (split == "test")]
    if len(words) < MIN_WORDS or not chosen:
        found = f"{len(words)} frequent words between spaces, {len(chosen)} for {split}"
        raise TooLittleText(f"too few words in {source}: {found}; tasks about words need at least {MIN_WORDS}")
    return chosen
