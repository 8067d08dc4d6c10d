"""The text of an answer, as its tokens come, and what of a conversation the model still reads."""

import bisect
import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from nanochat.tokenizer import RustBPETokenizer

Kind = Literal["text", "call", "result"]
Turn = TypeVar("Turn")


class Part(NamedTuple):
    """A stretch of text, of a call of the calculator (whole), or of its result (whole)."""

    kind: Kind
    text: str


class AnswerText:
    """Turns tokens into parts. Never half a character; nothing of a stop string, which ends the text where it begins.

    What may be the beginning of a stop string waits until it is known not to be. Special tokens are no text.
    """

    def __init__(self, tokenizer: RustBPETokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.names = {tokenizer.encode_special(name): name for name in tokenizer.get_special_tokens()}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.kind: Kind = "text"
        self.held = ""  # text that may become a stop string, or a call that is not whole
        self.is_stopped = False

    def push(self, token: int) -> list[Part]:
        """What can be shown now that this token is here."""
        if self.is_stopped:
            return []
        if (name := self.names.get(token)) is None:
            self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
            return self._text() if self.kind == "text" else []
        parts = self.end()
        if not self.is_stopped:
            self.kind = {"<|python_start|>": "call", "<|output_start|>": "result"}.get(name, "text")  # type: ignore[assignment]
        return parts

    def end(self) -> list[Part]:
        """What is left, when no more tokens come."""
        if self.is_stopped:
            return []
        self.held += self.decoder.decode(b"", final=True)
        self.decoder.reset()
        parts = self._text() if self.kind == "text" else []
        if self.held and not self.is_stopped:
            parts.append(Part(self.kind, self.held))
        self.held, self.kind = "", "text"
        return parts

    def _text(self) -> list[Part]:
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            ready, self.held = self.held[: min(found)], ""
        else:
            keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
            ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return [Part("text", ready)] if ready else []


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of text may be the beginning of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def answer_parts(tokenizer: RustBPETokenizer, tokens: Iterable[int]) -> Iterator[Part]:
    """The parts of one answer, each as soon as its tokens are here."""
    text = AnswerText(tokenizer)
    for token in tokens:
        yield from text.push(token)
    yield from text.end()


def readable(parts: Iterable[Part], quoted: Callable[[str], str] = str) -> Iterator[str]:
    """What to show of parts where there is nothing but text: a call of the calculator reads [2+3 → 5], as `quoted`."""
    is_open = False
    for kind, text in parts:
        if kind == "result":
            yield quoted(f" → {text}]" if is_open else f"[→ {text}]")
            is_open = False
            continue
        if is_open:  # the call before got no result
            yield quoted("] " if kind == "call" else "]")
        is_open = kind == "call"
        yield quoted(f"[{text}") if is_open else text
    if is_open:
        yield quoted("]")


def turn_messages(tokenizer: RustBPETokenizer, turn: Sequence[int]) -> list[dict[str, Any]]:
    """The two messages of a turn (from <|user_start|> to <|assistant_end|>), as nanochat.chat_format has them."""
    kinds = {"text": "text", "call": "python", "result": "python_output"}
    end = turn.index(tokenizer.encode_special("<|user_end|>"))
    content: Any = []
    for kind, text in answer_parts(tokenizer, turn[end + 2 : -1]):
        if kind == "text" and content and content[-1]["type"] == "text":
            content[-1]["text"] += text
        else:
            content.append({"type": kinds[kind], "text": text})
    if all(part["type"] == "text" for part in content):
        content = "".join(part["text"] for part in content)
    return [
        {"role": "user", "content": tokenizer.decode(turn[1:end])},
        {"role": "assistant", "content": content},
    ]


def newest_turns(turns: Sequence[Turn], length: Callable[[Sequence[Turn]], int], room: int) -> Sequence[Turn]:
    """Without as many of the oldest turns, whole, as it takes for the length of the rest to be within `room`. Few are
    measured: where each had to be, a long conversation would hold up a server."""
    first = bisect.bisect_left(range(len(turns)), True, key=lambda start: length(turns[start:]) <= room)
    return turns[first:]
