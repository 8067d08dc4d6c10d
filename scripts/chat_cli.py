"""Talk to a model in the terminal.

    python -m scripts.chat_cli                                   the newest fine-tuned model
    python -m scripts.chat_cli -i base -p "The capital of Italy is"
    python -m scripts.chat_cli -g d20 < questions.txt            a message a line

Answers go to stdout, everything else to stderr. A call of the calculator is shown as [2+3 → 5].
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import alias, float_flag, int_flag, seed_flag
from nanochat.flags import DeviceFlags


@dataclass(frozen=True, kw_only=True)
class Settings(DeviceFlags):
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
    seed: Annotated[int, seed_flag()] = 42
    """Seed of the first answer; each further one takes the next."""


if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

import contextlib
import io
import itertools
import sys
from collections.abc import Iterable, Iterator

from nanochat.checkpoint import load_model
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError, visible
from nanochat.runtime import compute_cleanup, compute_init
from nanochat.tokenizer import RustBPETokenizer, repaired


def main(settings: Settings) -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # neither side may fail on a character that it cannot write
            stream.reconfigure(errors="replace")
    with contextlib.redirect_stdout(sys.stderr):
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
            chat.turns.clear()
            print("(forgotten)", file=sys.stderr)
        elif message:
            try:
                chat.answer(message)
            except UserError as error:
                print(f"error: {visible(str(error))}", file=sys.stderr)


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


class Chat:
    """One conversation, as the tokens that the model has read and written."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.is_base = settings.stage == "base"
        self.context = engine.model.config.sequence_len
        self.max_tokens = min(settings.max_tokens, self.context // 2)
        top_k = settings.top_k or None
        self.sampling = Sampling(max_new_tokens=self.max_tokens, temperature=settings.temperature, top_k=top_k)
        self.turns: list[list[int]] = []  # each a question with its answer, from <|user_start|> to <|assistant_end|>
        self.answers = 0

    def answer(self, message: str) -> None:
        """Print the answer as it comes, and remember it. Raises UserError for a message that is too long."""
        tokenizer = self.engine.tokenizer
        bos = tokenizer.encode_special("<|bos|>")
        if self.is_base:
            question = tokenizer.encode(repaired(message))
        else:
            question = tokenizer.render_for_completion({"messages": [{"role": "user", "content": message}]})[1:]
        self._make_room(1 + len(question))
        written: list[int] = []
        for text in readable(tokenizer, self._sample([bos, *itertools.chain(*self.turns), *question], written)):
            print(visible(text), end="", flush=True)
        print(flush=True)
        self.answers += 1
        if not self.is_base:
            self.turns.append([*question, *written, tokenizer.encode_special("<|assistant_end|>")])

    def _make_room(self, length: int) -> None:
        """Forget the oldest turns, until what is left, `length` more tokens and an answer fit into the context."""
        room = self.context - self.max_tokens
        if length > room:
            raise UserError(
                f"the message is {length:,} tokens long, and the model's context of {self.context:,} leaves {room:,} "
                f"beside an answer of {self.max_tokens:,}: shorten it"
            )
        while sum(map(len, self.turns)) + length > room:
            del self.turns[0]

    def _sample(self, prompt: list[int], written: list[int]) -> Iterator[int]:
        """The tokens of the answer as they are sampled, without the one that ends it; `written` gets them too."""
        for (token,), _ in self.engine.stream([prompt], self.sampling, [(self.settings.seed + self.answers) % 2**64]):
            if token in self.engine.stops:
                return
            written.append(token)
            yield token


def readable(tokenizer: RustBPETokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """What to show of an answer, piece by piece, never a part of a character. Special tokens are not shown, but
    <|python_start|>2+3<|python_end|><|output_start|>5<|output_end|> reads [2+3 → 5]."""
    names = {tokenizer.encode_special(name): name for name in tokenizer.get_special_tokens()}
    ids, copy = itertools.tee(tokens)
    is_open = within = False  # a bracket; and whether what comes belongs between its brackets
    for token, piece in itertools.zip_longest(ids, tokenizer.decode_stream(copy)):
        name = names.get(token, "")
        text = piece.removesuffix(name)
        if text:
            if is_open and not within:  # a call that got no output
                is_open = False
                yield "]"
            yield text
        if name == "<|python_start|>":
            yield "] [" if is_open else "["
            is_open = within = True
        elif name == "<|output_start|>":
            yield " → " if is_open else "[→ "
            is_open = within = True
        elif name in ("<|python_end|>", "<|output_end|>"):
            within = False
            if is_open and name == "<|output_end|>":
                is_open = False
                yield "]"
    if is_open:
        yield "]"


if __name__ == "__main__":
    cli.run(main, Settings)
