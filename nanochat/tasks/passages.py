"""Prose of a text source, and questions with one right choice made from it: for the offline bundle."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import regex

from nanochat.data.parquet import up_to

MAX_CHARS = 10_000_000  # of documents read; ten times what the questions need
MAX_RUN = 16  # sentences of a passage: a paragraph that goes on for pages is several
MIN_DOCUMENTS = 8  # wrong choices come from three other documents; a text of fewer has passages instead
MAX_WAITING = 64  # blocks that are not full; a question that joins none of them is left out
MIN_SENTENCES = 500  # a text with fewer, and LINES times as many lines (posts, chats, code), is read line by line
LINES = 4  # prose broken into lines has up to twice as many

# Scripts written without spaces between words, and how many letters of the Latin script one of theirs stands for: the
# limits below are in those.
_KANA, _SOUTHEAST = r"\p{Hiragana}\p{Katakana}", r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_DENSE = regex.compile(rf"[\p{{Han}}{_KANA}]")
_HALF_DENSE = regex.compile(rf"[{_SOUTHEAST}\p{{Hangul}}]")
_UNSPACED = regex.compile(rf"[\p{{Han}}{_KANA}{_SOUTHEAST}]")
_LETTER = regex.compile(r"[\p{L}\p{M}]")
# Words of an unspaced script cannot be told without a dictionary: two Han letters, four syllables or so, stand for one.
_ONE_WORD = (
    rf"(?:\p{{Han}}{{2}}|[\p{{Katakana}}\u30fc]{{2,}}|(?:(?=[{_SOUTHEAST}])\p{{L}}\p{{M}}*){{4}}"
    rf"|[[\p{{L}}\p{{M}}]--[\p{{Han}}{_KANA}{_SOUTHEAST}]]+)"
)
_WORD = regex.compile(_ONE_WORD, regex.V1)
_LAST_WORD = regex.compile(rf"(.*?)({_ONE_WORD})[.!?\p{{SB=ST}}]*", regex.V1)
# Sentences end as in UAX #29: a full stop of the scripts that have one of their own (SB=ST) always; `. ! ? …` before
# white space and a letter that is no small one, or a letter of a dense script; Thai and Lao have none, but spaces.
_OPENING, _CLOSING = "[«“„—–「『]", "[»”」』]"
_SENTENCE_END = regex.compile(
    rf"[\p{{SB=ST}}--[!?]]+{_CLOSING}*\s*"
    rf"|[.!?…]+{_CLOSING}*(?:\s+(?={_OPENING}?\s?[\p{{Lu}}\p{{Lt}}\p{{Lo}}\p{{Georgian}}])|(?=[\p{{Han}}{_KANA}]))"
    r"|(?<=[\p{Thai}\p{Lao}])\s+(?=[\p{Thai}\p{Lao}])",
    regex.V1,
)
_WHOLE = regex.compile(rf"{_OPENING}?\s?(?=[\p{{L}}--\p{{Ll}}]|\p{{Georgian}}).*"
                       rf"([.!?…\p{{SB=ST}}]{_CLOSING}*|[\p{{Thai}}\p{{Lao}}])", regex.V1)  # fmt: skip

Item = dict[str, Any]


@dataclass(frozen=True)
class Passage:
    """Consecutive sentences of one paragraph of document number `document`."""

    document: int
    sentences: list[str]

    @property
    def joint(self) -> str:
        """What stands between its sentences and words: nothing where most of it is written without spaces."""
        return "" if unspaced("".join(self.sentences)) else " "


class Pair(NamedTuple):
    """A question and its right answer, from document number `document`."""

    document: int
    query: str
    answer: str


T = TypeVar("T")
Maker = Callable[[Passage, random.Random], T | None]


def find_passages(documents: Iterable[str]) -> list[Passage]:
    """Runs of prose sentences, no sentence twice, from the first MAX_CHARS characters of `documents`; runs of lines
    where it has few sentences. Where the passages are of fewer than MIN_DOCUMENTS documents, each counts as one."""
    texts = list(up_to(documents, MAX_CHARS, len))
    passages = _runs(texts, _sentences, _is_prose)
    sentences = sum(len(passage.sentences) for passage in passages)
    if sentences < MIN_SENTENCES:
        lines = _runs(texts, str.splitlines, _is_line)
        if sum(len(passage.sentences) for passage in lines) > LINES * sentences:
            passages = lines
    if len({passage.document for passage in passages}) < MIN_DOCUMENTS:
        passages = [Passage(number, passage.sentences) for number, passage in enumerate(passages)]
    return passages


def _runs(texts: Sequence[str], units: Callable[[str], list[str]], usable: Callable[[str], bool]) -> list[Passage]:
    """Runs of usable units (sentences, lines) of a paragraph, up to MAX_RUN long, no unit twice."""
    passages: list[Passage] = []
    seen: set[str] = set()

    def fits(unit: str) -> bool:
        fresh = unit not in seen
        seen.add(unit)
        return fresh and usable(unit)

    for number, text in enumerate(texts):
        for paragraph in regex.split(r"\n\s*\n", text):
            for good, group in itertools.groupby(units(paragraph), fits):
                run = list(group)
                if good:
                    passages += [Passage(number, run[i : i + MAX_RUN]) for i in range(0, len(run), MAX_RUN)]
    return passages


def unspaced(text: str) -> bool:
    """Whether most of its letters are of scripts without spaces between words."""
    return 2 * len(_UNSPACED.findall(text)) > len(_LETTER.findall(text))


def width(text: str) -> int:
    """Length of a text in letters of the Latin script: one of Han says as much as three of them."""
    return len(text) + 2 * len(_DENSE.findall(text)) + len(_HALF_DENSE.findall(text))


def _sentences(paragraph: str) -> list[str]:
    text = " ".join(paragraph.split())
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    pieces = (text[start:end].strip() for start, end in itertools.pairwise([0, *ends, len(text)]))
    return [piece for piece in pieces if piece]


def _is_prose(sentence: str) -> bool:
    return (
        40 <= width(sentence) <= 300
        and (len(sentence.split()) >= 6 or unspaced(sentence))
        and _letters(sentence) >= 0.88 * width(sentence)
        and "--" not in sentence  # an underlined heading that stood in the paragraph
        and _WHOLE.fullmatch(sentence) is not None
    )


def _is_line(line: str) -> bool:
    return 20 <= width(line) <= 300 and len(words_of(line)) >= 4 and _letters(line) >= 0.8 * width(line)


def _letters(text: str) -> int:
    return width("".join(_LETTER.findall(text))) + text.count(" ")


def draw_items(make: Maker[T], passages: Sequence[Passage], rng: random.Random) -> list[T]:
    """What `make` gives for each passage, in random order; it may give nothing. Needs MIN_DOCUMENTS documents."""
    if len({passage.document for passage in passages}) < MIN_DOCUMENTS:
        return []
    made = (make(passage, rng) for passage in shuffled(passages, rng))
    return [item for item in made if item is not None]


def draw_blocks(
    make: Maker[Pair],
    passages: Sequence[Passage],
    rng: random.Random,
    size: int = 4,
    fits: Callable[[str, str], bool] = lambda query, wrong: True,
) -> list[list[Pair]]:
    """Pairs that `make` gives for passages, in blocks of `size` from different documents, whose answers are the choices
    of each of its questions. A choice is then right as often as any other, so that its length, its words, its place
    say nothing. `fits(query, answer of another)`."""
    blocks: list[list[Pair]] = []
    waiting: list[list[Pair]] = []

    def joins(pair: Pair, block: list[Pair]) -> bool:
        apart = all(one.document != pair.document and one.answer != pair.answer for one in block)
        both = ((a.query, b.answer) for one in block for a, b in ((one, pair), (pair, one)))
        return apart and all(itertools.starmap(fits, both))

    for pair in draw_items(make, passages, rng):
        block = next((block for block in waiting if joins(pair, block)), None)
        if block is None:
            waiting += [[pair]] if len(waiting) < MAX_WAITING else []
            continue
        block.append(pair)
        if len(block) == size:
            blocks.append(block)
            waiting.remove(block)
    return blocks


def block_items(blocks: Iterable[Sequence[Pair]], rng: random.Random) -> list[Item]:
    """Multiple-choice items, one a pair; within a block the right one is once at each place."""
    items = []
    for block in blocks:
        places = shuffled(range(len(block)), rng)
        for pair, place in zip(block, places, strict=True):
            wrong = shuffled((one.answer for one in block if one is not pair), rng)
            items.append({"query": pair.query, "choices": [*wrong[:place], pair.answer, *wrong[place:]], "gold": place})
    return items


def next_sentence(passage: Passage, rng: random.Random) -> Pair | None:
    """Up to three sentences, and the one that follows."""
    if len(passage.sentences) < 2:
        return None
    cut = rng.randrange(1, len(passage.sentences))
    before = passage.joint.join(passage.sentences[max(0, cut - 3) : cut])
    return Pair(passage.document, before, passage.sentences[cut])


def seen_word(passage: Passage, rng: random.Random) -> Pair | None:
    """A sentence, and a word that stood in it."""
    sentence = rng.choice(passage.sentences)
    words = long_words(sentence)
    return Pair(passage.document, f"Text: {sentence}\nA word from the text:", rng.choice(words)) if words else None


def unseen(query: str, word: str) -> bool:
    """Whether a word of another sentence is a wrong answer to a question of seen_word."""
    return word not in query.lower()


def shuffled(values: Iterable[Any], rng: random.Random) -> list[Any]:
    values = list(values)
    rng.shuffle(values)
    return values


def words_of(text: str) -> list[str]:
    """The words of a text; pieces of a word's length where it is written without spaces."""
    return _WORD.findall(text)


def ending(sentence: str) -> tuple[str, str]:
    """(what stands before the last word, that word without the marks behind it): empty where it ends otherwise."""
    found = _LAST_WORD.fullmatch(sentence)
    if found is None or not (unspaced(found[2]) or found[1].endswith(" ")):
        return "", ""
    return found[1].strip(), found[2]


def long_words(sentence: str) -> list[str]:
    return [word for word in words_of(sentence) if width(word) >= 5 and word == word.lower()]
