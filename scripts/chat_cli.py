"""Talk to a model in the terminal.

    python -m scripts.chat_cli                                   the newest fine-tuned model
    python -m scripts.chat_cli -i base -p "The capital of Italy is"
    python -m scripts.chat_cli -g d20 < questions.txt            a message a line

Answers go to stdout, everything else to stderr: Markdown is set at a terminal, and is plain text elsewhere. A call of
the calculator is shown as [2+3 → 5]. /help shows what else can be typed.
"""

from typing import Annotated

from nanochat import cli
from nanochat.cli import alias, float_flag, int_flag, seed_flag
from nanochat.flags import DeviceFlags, ModelFlags


@cli.program
class Settings(ModelFlags, DeviceFlags):
    """Talk to a trained model; one of stage base goes on with your text. In the chat, /help shows the commands; `quit`,
    `exit` or Ctrl-D ends."""

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


import contextlib
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nanochat.checkpoint import list_models, load_model
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError, visible
from nanochat.files import atomic_write_text
from nanochat.paths import get_base_dir
from nanochat.runtime import compute_cleanup, compute_init
from nanochat.serve.terminal import literal, show_markdown, typed
from nanochat.serve.text import answer_parts, newest_turns, readable, turn_messages
from nanochat.tokenizer import RustBPETokenizer, repaired

HELP = """/clear               forget what was said; so does `clear`
/save FILE           write the conversation as JSON
/load FILE           go on with a conversation that was saved
/temp X              temperature of what is said from now on
/model STAGE[/TAG]   another model, which reads the conversation so far; without a name: which there are
/quit                end; so do `quit`, `exit` and Ctrl-D
A message that begins with / needs a space before it."""


def main(settings: Settings) -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # neither side may fail on a character that it cannot write
            stream.reconfigure(errors="replace")
    with contextlib.redirect_stdout(sys.stderr):
        device = compute_init(settings.device_type)[-1]
        chat = Chat(*load(device, settings.stage, settings.model_tag, settings.model_step), settings)
    try:
        if settings.prompt is not None:
            chat.answer(settings.prompt)
        else:
            converse(chat)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    compute_cleanup()


def load(device: torch.device, stage: str, tag: str | None = None, step: int | None = None) -> tuple[Engine, str]:
    """(a model of the store, its name). Raises UserError."""
    model, tokenizer, meta = load_model(stage, device, tag=tag, step=step)
    if stage == "base":
        print("A base model has seen no chat: it goes on with your text.", file=sys.stderr)
    return Engine(model, tokenizer), f"{stage}/{meta['tag']}"


def converse(chat: "Chat") -> None:
    """Answer what the user types, or the lines of stdin where it is not a terminal."""
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{chat.name}. /help shows the commands, `quit` or Ctrl-D ends.", file=sys.stderr)
    for line in typed(get_base_dir() / "chat_history") if terminal else sys.stdin:
        command, argument = parsed(line)
        if command == "/quit":
            return
        try:
            if command:
                obey(chat, command, argument)
            elif message := line.strip():
                chat.answer(message)
        except UserError as error:
            print(f"error: {visible(str(error))}", file=sys.stderr)


def parsed(line: str) -> tuple[str, str]:
    """(command, what it is applied to); of a message, two empty strings."""
    command, *rest = line.split(maxsplit=1) or [""]
    if line.strip().lower() in ("clear", "quit", "exit"):
        command = f"/{command}"
    elif line[0] != "/" or not re.fullmatch(r"/\w*", command):  # /usr/bin is no command either
        return "", ""
    return "/quit" if command.lower() == "/exit" else command.lower(), "".join(rest).strip()


def obey(chat: "Chat", command: str, argument: str) -> None:
    """Raises UserError for what is no command."""
    said = HELP
    if command == "/clear":
        chat.turns.clear()
        said = "(forgotten)"
    elif command == "/save":
        chat.save(_file(command, argument))
        said = f"({len(chat.turns)} turns are in {argument})"
    elif command == "/load":
        chat.load(_file(command, argument))
        said = f"({len(chat.turns)} turns)"
    elif command == "/temp":
        chat.warm(argument)
        said = f"(temperature {chat.sampling.temperature:g})"
    elif command == "/model":
        if argument:
            chat.change(argument)
        models = ", ".join(f"{stage}/{tag}" for stage, tags in list_models().items() for tag in tags)
        said = f"({chat.name})" if argument else f"({chat.name}; there are {models})"
    elif command != "/help":
        raise UserError(f"{command}: no such command: /help shows them; put a space before a message that begins so")
    print(visible(said), file=sys.stderr)


def _file(command: str, argument: str) -> Path:
    if not argument:
        raise UserError(f"{command}: say which file, as in {command} talk.json")
    return Path(argument).expanduser()


class Chat:
    """One conversation, as the tokens that the model has read and written."""

    def __init__(self, engine: Engine, name: str, settings: Settings) -> None:
        self.settings, self.turns, self.answers = settings, list[list[int]](), 0
        self.temperature = settings.temperature
        self._use(engine, name)

    def _use(self, engine: Engine, name: str) -> None:
        self.engine, self.name, self.is_base = engine, name, name.startswith("base/")
        self.context = engine.model.config.sequence_len
        self.max_tokens = min(self.settings.max_tokens, self.context // 2)

    @property
    def sampling(self) -> Sampling:
        top_k = self.settings.top_k or None
        return Sampling(max_new_tokens=self.max_tokens, temperature=self.temperature, top_k=top_k)

    def answer(self, message: str) -> None:
        """Print the answer as it comes, and remember it. Raises UserError for a message that is too long."""
        tokenizer = self.engine.tokenizer
        bos = tokenizer.encode_special("<|bos|>")
        if self.is_base:
            question = tokenizer.encode(repaired(message))
        else:
            question = tokenizer.render_for_completion({"messages": [{"role": "user", "content": message}]})[1:]
        prompt = [bos, *itertools.chain(*self._kept(1 + len(question))), *question]
        written: list[int] = []
        parts = answer_parts(tokenizer, self._sample(prompt, written))
        console = Console(highlight=False)
        if sys.stdout.isatty() and not (self.is_base or console.is_dumb_terminal):
            show_markdown(map(visible, readable(parts, literal)), console)
        else:
            for text in map(visible, readable(parts)):
                print(text, end="", flush=True)
            print(flush=True)
        self.answers += 1
        if not self.is_base:
            self.turns.append([*question, *written, tokenizer.encode_special("<|assistant_end|>")])

    def _kept(self, length: int) -> list[list[int]]:
        """The newest turns that fit into the context with `length` more tokens and an answer."""
        room = self.context - self.max_tokens
        if length > room:
            raise UserError(
                f"the message is {length:,} tokens long, and the model's context of {self.context:,} leaves {room:,} "
                f"beside an answer of {self.max_tokens:,}: shorten it"
            )
        turns = [] if self.is_base else self.turns
        return list(newest_turns(turns, lambda some: sum(map(len, some)), room - length))

    def _sample(self, prompt: list[int], written: list[int]) -> Iterator[int]:
        """The tokens of the answer as they are sampled, without the one that ends it; `written` gets them too."""
        for (token,), _ in self.engine.stream(prompt, self.sampling, (self.settings.seed + self.answers) % 2**64):
            if token in self.engine.tools.stops:
                return
            written.append(token)
            yield token

    # ---- commands; all raise UserError

    def save(self, file: Path) -> None:
        """Write the conversation, all of it; over another one, but not over anything else."""
        try:
            if file.exists():
                _read_turns(file, self.engine.tokenizer)
            data = {"model": self.name, "messages": self._messages()}
            atomic_write_text(file, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"/save {file}: {error.strerror}: choose another name") from None

    def load(self, file: Path) -> None:
        """Go on with a conversation that was saved, instead of this one."""
        self.turns = _read_turns(file, self.engine.tokenizer)

    def warm(self, temperature: str) -> None:
        """Another temperature."""
        try:
            value = float(temperature)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UserError(f"/temp {temperature}: say a number that is 0 or more, as in /temp 0.6")
        self.temperature = value

    def change(self, name: str) -> None:
        """Another model, that reads what was said so far in its own tokens."""
        stage, _, tag = name.partition("/")
        if stage not in list_models():
            raise UserError(f"/model {name}: no model of stage {stage!r}; there are {', '.join(list_models())}")
        with contextlib.redirect_stdout(sys.stderr):
            engine, found = load(self.engine.model.get_device(), stage, tag or None)
        self.turns = _turns(self._messages(), engine.tokenizer)
        self._use(engine, found)

    def _messages(self) -> list[dict[str, Any]]:
        return [message for turn in self.turns for message in turn_messages(self.engine.tokenizer, turn)]


def _turns(messages: list[Any], tokenizer: RustBPETokenizer) -> list[list[int]]:
    """Each question with its answer, from <|user_start|> to <|assistant_end|>."""
    ids, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=sys.maxsize) if messages else ([], [])
    starts = [i for i, token in enumerate(ids) if token == tokenizer.encode_special("<|user_start|>")]
    return [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def _read_turns(file: Path, tokenizer: RustBPETokenizer) -> list[list[int]]:
    """Of a file that /save wrote, or that has a conversation as it is trained on. Raises UserError."""
    try:
        messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
        turns = _turns(messages, tokenizer)
        if turns and turns[-1][-1] != tokenizer.encode_special("<|assistant_end|>"):
            raise UserError("its last message has no answer")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{file} holds no conversation: expected JSON, {{"messages": [...]}}') from None
    except UserError as error:
        raise UserError(f"{file} holds no conversation: {error}") from None
    return turns


if __name__ == "__main__":
    cli.run(main, Settings)
