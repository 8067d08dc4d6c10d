"""Conversations of the user's own, to train on: a JSONL file with one conversation a line.

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]
    {"messages": [{"role": "system", "content": "..."}, {"role": "user", ...}, {"role": "assistant", ...}]}

nanochat/chat_format.py says what a conversation may look like. About one in 20 is kept to measure on.
"""

import json
from pathlib import Path
from typing import Any

from nanochat.chat_format import conversation_pieces
from nanochat.errors import UserError
from nanochat.files import parse_json
from nanochat.tasks.common import Conversation, Split, Task, split_of

TEST_SHARE = 0.05  # of the conversations


class CustomJSON(Task):
    """The conversations of a file in its order. Raises UserError with file and line for what cannot be used. About one
    in 20, by the hash of its messages, is in the test split, the others in the train split: equal ones never stand in
    both, and adding lines moves none. A short file may have no test split, but always a train split."""

    def __init__(self, filepath: str | Path, split: Split = "train", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        path = Path(filepath).expanduser()
        self.name = path.name
        self.source = f"file {path.name}"
        conversations = load_conversations(path)
        splits = [
            split_of("customjson", json.dumps(each, sort_keys=True), test_share=TEST_SHARE) for each in conversations
        ]
        if "train" not in splits:
            splits = ["train"] * len(splits)
        self.items = [conversation for conversation, its in zip(conversations, splits, strict=True) if its == split]


def load_conversations(path: Path) -> list[Conversation]:
    """All conversations of a JSONL file, checked; blank lines are ignored. Raises UserError with file and line."""
    try:
        with open(path, "rb") as stream:
            lines = [(number, line) for number, line in enumerate(stream, start=1) if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSONL file") from None
    if not lines:
        raise UserError(f"{path}: no conversations; expected one a line, as JSON")
    return [_conversation(line, f"{path}:{number}") for number, line in lines]


def _conversation(line: bytes, where: str) -> Conversation:
    try:
        value = parse_json(line)
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, list | dict):
        raise UserError(f'{where}: {type(value).__name__}, expected a list of messages or {{"messages": [...]}}')
    conversation: Conversation = {"messages": value if isinstance(value, list) else value.get("messages")}
    try:
        conversation_pieces(conversation)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if all(message["role"] != "assistant" for message in conversation["messages"]):
        raise UserError(f"{where}: no assistant message, so there is nothing to learn from it")
    return conversation
