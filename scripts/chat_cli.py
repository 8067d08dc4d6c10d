"""Talk to a model in the terminal.

    python -m scripts.chat_cli                                   the newest fine-tuned model
    python -m scripts.chat_cli -i base -p "The capital of Italy is"
    python -m scripts.chat_cli -g d20 < questions.txt            a message a line

Answers go to stdout, everything else to stderr. A call of the calculator is shown as [2+3 → 5].
"""

import codecs
import contextlib
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.cli import alias, float_flag, int_flag
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.models import require_model
from nanochat.runtime import DeviceType, compute_cleanup, compute_init
from nanochat.tokenizer import repaired

STOPS = ("<|assistant_end|>", "<|bos|>")
Part = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Talk to a trained model. In the chat, `clear` forgets what was said; `quit`, `exit` or Ctrl-D ends."""

    stage: Annotated[Literal["base", "mid", "sft", "rl"], alias("-i")] = "sft"
    """Training stage of the model. A base model knows no chat: it goes on with the text it is given."""
    model_tag: Annotated[str | None, alias("-g")] = None
    """Name of the run among the stage's checkpoints; default: the newest."""
    model_step: Annotated[int | None, int_flag(gte=0), alias("-s")] = None
    """Optimizer step of the checkpoint; default: the last."""
    prompt: Annotated[str | None, alias("-p")] = None
    """Answer this one message and exit."""
    temperature: Annotated[float, float_flag(gte=0), alias("-t")] = 0.6
    """Spread of sampling; 0 always takes the likeliest token."""
    top_k: Annotated[int, int_flag(gte=0), alias("-k")] = 50
    """Sample from this many likeliest tokens; 0 for all."""
    max_tokens: Annotated[int, int_flag(gte=1), alias("-m")] = 512
    """Length of an answer in tokens, at most; never more than half of the model's context."""
    seed: Annotated[int, int_flag(gte=0)] = 42
    """Seed of the first answer; each further one takes the next."""
    device_type: DeviceType = "auto"
    """auto, cpu, cuda or mps."""


def main(settings: Settings) -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # neither side may fail on a character that it cannot write
            stream.reconfigure(errors="replace")
    with contextlib.redirect_stdout(sys.stderr):
        require_model(settings.stage, settings.model_tag)
        device = compute_init(settings.device_type)[-1]
        model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.model_step)
    chat = Chat(Engine(model, tokenizer), settings)
    if chat.is_base:
        print("A base model has seen no chat: it goes on with your text.", file=sys.stderr)
    try:
        if settings.prompt is not None:
            chat.answer(settings.prompt)
        else:
            converse(chat, f"{settings.stage} model {meta['tag']}, step {meta['step']}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
    compute_cleanup()


def converse(chat: "Chat", title: str) -> None:
    """Answer what the user types, or the lines of stdin where it is not a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{title}. `clear` starts anew, `quit` or Ctrl-D ends.", file=sys.stderr)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (being imported, it lets input() edit lines and recall earlier ones)
    for line in _typed() if terminal else sys.stdin:
        message = line.strip()
        if message.lower() in ("quit", "exit"):
            return
        if message.lower() == "clear":
            chat.clear()
            print("(forgotten)", file=sys.stderr)
        elif message:
            try:
                chat.answer(message)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


class Chat:
    """One conversation: what was said so far, and how the next answer is made and shown."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.is_base = settings.stage == "base"
        self.max_tokens = min(settings.max_tokens, engine.model.config.sequence_len // 2)
        self.messages: list[dict[str, Any]] = []
        self.answers = 0

    def clear(self) -> None:
        self.messages = []

    def answer(self, message: str) -> None:
        """Print the answer as it comes, and remember it. Raises UserError for a message that is too long."""
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = self._text(message) if self.is_base else self.engine.prompt({"messages": messages}, self.max_tokens)
        parts: list[Part] = []
        for text in stream_text(self.engine.tokenizer, self._tokens(prompt), parts):
            print(text, end="", flush=True)
        print(flush=True)
        self.answers += 1
        if not self.is_base:
            self.messages = [*messages, {"role": "assistant", "content": content(parts)}]

    def _text(self, text: str) -> list[int]:
        """Prompt of a base model: a document that begins with `text`."""
        tokenizer = self.engine.tokenizer
        tokens = [tokenizer.encode_special("<|bos|>"), *tokenizer.encode(repaired(text))]
        room = self.engine.model.config.sequence_len - self.max_tokens
        if len(tokens) > room:
            raise UserError(f"the text is {len(tokens):,} tokens long, the model has room for {room:,}: shorten it")
        return tokens

    def _tokens(self, prompt: list[int]) -> Iterator[int]:
        """The tokens of the answer as they are made, without the one that ends it."""
        stops = [self.engine.tokenizer.encode_special(name) for name in STOPS]
        columns = self.engine.generate(
            prompt,
            max_tokens=self.max_tokens,
            temperature=self.settings.temperature,
            top_k=self.settings.top_k or None,
            seed=self.settings.seed + self.answers,
        )
        for (token,), _ in columns:
            if token in stops:
                return
            yield token


def stream_text(tokenizer: Any, tokens: Iterable[int], parts: list[Part]) -> Iterator[str]:
    """What to show of an answer, token by token; `parts` is filled with its parts (see nanochat/chat_format.py).

    Never a part of a character: its bytes are held back until it is whole. Special tokens are not shown, but
    <|python_start|>2+3<|python_end|><|output_start|>5<|output_end|> reads [2+3 → 5].
    """
    parts.append({"type": "text", "text": ""})
    bracket_open = False
    for special, text in _pieces(tokenizer, tokens):
        if special in ("<|python_start|>", "<|output_start|>"):
            is_call = special == "<|python_start|>"
            if is_call:
                yield "] [" if bracket_open else "["
            else:
                yield " → " if bracket_open else "[→ "
            bracket_open = True
            parts.append({"type": "python" if is_call else "python_output", "text": ""})
        elif special in ("<|python_end|>", "<|output_end|>"):
            if bracket_open and special == "<|output_end|>":
                bracket_open = False
                yield "]"
            parts.append({"type": "text", "text": ""})
        elif text:
            if bracket_open and parts[-1]["type"] == "text":  # a call that got no output
                bracket_open = False
                yield "]"
            parts[-1]["text"] += text
            yield text
    if bracket_open:
        yield "]"


def _pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[tuple[str, str]]:
    """(name of a special token, "") or ("", whole characters)."""
    specials = {tokenizer.encode_special(name): name for name in tokenizer.get_special_tokens()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token in specials:
            yield "", decoder.decode(b"", final=True)  # a character that was never finished
            yield specials[token], ""
        else:
            yield "", decoder.decode(tokenizer.decode_bytes([token]))
    yield "", decoder.decode(b"", final=True)


def content(parts: list[Part]) -> str | list[Part]:
    """Content of an assistant message made of these parts: a string where there is only text."""
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [part for part in parts if part["text"] or part["type"] != "text"]


if __name__ == "__main__":
    cli.run(main, Settings)
