"""What a conversation looks like to the model: an ordered list of pieces, each trained on or not.

A conversation is {"messages": [{"role", "content"}, ...]}: at most one `system` message first, then `user` and
`assistant` in turn. `content` is a string; an assistant's may also be a list of parts {"type", "text"} with type
`text`, `python` (code that the model writes) or `python_output` (what running it printed).

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> content <|assistant_end|> <|user_start|> ...

Trained on (mask 1): what the model must produce itself, that is assistant text, python calls with their brackets, and
<|assistant_end|>. Not trained on (mask 0): everything it is given, tool output included.

Special tokens and text are kept apart here, so text that spells "<|bos|>" stays text; the tokenizer encodes the pieces.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.errors import UserError


class Piece(NamedTuple):
    """One special token (`text` is its name) or one stretch of ordinary text."""

    text: str
    special: bool
    trained: bool


# part type -> (opening special, closing special, trained on)
TOOL_PARTS = {
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}


def conversation_pieces(conversation: Mapping[str, Any]) -> list[Piece]:
    """The whole conversation. Raises UserError where it is not of the form above; the input is not changed."""
    pieces = [Piece("<|bos|>", special=True, trained=False)]
    for role, content, where in _checked_turns(conversation):
        if role == "assistant":
            pieces += _assistant_turn(content, where)
        else:
            pieces += _bracketed("<|user_start|>", content, "<|user_end|>", trained=False)
    return pieces


def completion_pieces(conversation: Mapping[str, Any]) -> list[Piece]:
    """The conversation up to where the assistant speaks next: its last message, if there, is left out."""
    messages = _messages(conversation)
    if _role(messages[-1], f"message {len(messages) - 1}") == "assistant":
        messages = messages[:-1]
    pieces = conversation_pieces({"messages": messages})
    return [*pieces, Piece("<|assistant_start|>", special=True, trained=False)]


def _assistant_turn(content: str | list[Any], where: str) -> list[Piece]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    pieces = [Piece("<|assistant_start|>", special=True, trained=False)]
    for index, part in enumerate(parts):
        new = _assistant_part(part, f"{where}, part {index}")
        if not (pieces[-1].special or new[0].special):  # text after text is one text: no word is cut between them
            before = pieces.pop()
            new[0] = before._replace(text=before.text + new[0].text)
        pieces += new
    return [*pieces, Piece("<|assistant_end|>", special=True, trained=True)]


def _assistant_part(part: Any, where: str) -> list[Piece]:
    if not isinstance(part, Mapping):
        raise UserError(f'{where}: expected {{"type", "text"}}, got {type(part).__name__}')
    kind, text = part.get("type"), part.get("text")
    if kind not in ("text", *TOOL_PARTS):
        raise UserError(f"{where}: unknown type {kind!r}; use text, {', '.join(TOOL_PARTS)}")
    if not isinstance(text, str):
        raise UserError(f"{where}: its text is {type(text).__name__}, expected a string")
    if kind == "text":
        return [Piece(text, special=False, trained=True)]
    opening, closing, trained = TOOL_PARTS[kind]
    return _bracketed(opening, text, closing, trained)


def _bracketed(opening: str, text: str, closing: str, trained: bool) -> list[Piece]:
    return [Piece(opening, True, trained), Piece(text, False, trained), Piece(closing, True, trained)]


def _checked_turns(conversation: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(role, content, name for errors) of each turn, the system message merged into the first user's."""
    messages = _messages(conversation)
    has_system = _role(messages[0], "message 0") == "system"
    turns = []
    for index, message in enumerate(messages[has_system:]):
        where = f"message {index + has_system}"
        role, expected = _role(message, where), ("user", "assistant")[index % 2]
        if role != expected:
            raise UserError(
                f"{where}: role is {role!r}, expected {expected!r}: user and assistant take turns, "
                f"after at most one system message"
            )
        turns.append((role, _content(message, where), where))
    if has_system:
        system = _content(messages[0], "message 0")
        if not turns:
            raise UserError("message 0: a system message alone; a user message must follow")
        role, content, where = turns[0]
        turns[0] = (role, f"{system}\n\n{content}", where)
    return turns


def _messages(conversation: Mapping[str, Any]) -> list[Any]:
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('conversation without messages: expected {"messages": [{"role", "content"}, ...]}')
    return messages


def _role(message: Any, where: str) -> str:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise UserError(f'{where}: expected {{"role", "content"}} with role system, user or assistant')
    return role


def _content(message: Mapping[str, Any], where: str) -> Any:
    content = message.get("content")
    parts_allowed = message["role"] == "assistant"
    if not isinstance(content, str) and not (parts_allowed and isinstance(content, list)):
        expected = "a string or a list of parts" if parts_allowed else "a string"
        raise UserError(f"{where}: {message['role']} content is {type(content).__name__}, expected {expected}")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# The same as a Jinja2 template, for programs that know it by that: transformers, vLLM, llama.cpp. `apply_chat_template`
# of a tokenizer that was loaded from a tokenizer directory gives the ids of `render_conversation`, and its
# {% generation %} marks the same mask. One difference lies in those programs: they find special tokens inside text,
# where nanochat leaves them text. What a conversation may not be is an error here too.

CHAT_TEMPLATE = (Path(__file__).parent / "data" / "chat_template.jinja").read_text(encoding="utf-8")


def tokenizer_config(special_tokens: list[str]) -> str:
    """The text of tokenizer_config.json, by which transformers loads tokenizer.json as a fast tokenizer."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "additional_special_tokens": special_tokens,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return json.dumps(config, indent=2) + "\n"
