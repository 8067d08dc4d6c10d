"""GSM8K: word problems of grade school, answered step by step, with a calculator.

An answer in the data reads `He sells 3 * 5 = <<3*5=15>>15 apples. ... #### 15`. Each `<<expression=result>>` becomes a
call of the calculator and what it gave back. Source: openai/gsm8k on the Hugging Face hub (arXiv 2110.14168).
"""

import re
from decimal import Decimal
from typing import Any

from nanochat.errors import UserError
from nanochat.files import fields
from nanochat.tasks.common import Conversation, answer_numbers, answered
from nanochat.tasks.hub import PublishedTask

_CALL = re.compile(r"<<([^<>]*)>>")
_UNIT = r"%|[ \t]percent"  # some answers are a share; published graders read the number


class GSM8K(PublishedTask):
    """Word problems with calls of the calculator."""

    name = "GSM8K"
    eval_type = "generative"

    @staticmethod
    def conversation(row: dict[str, Any]) -> Conversation:
        question, answer = fields(row, question=str, answer=str)
        parts = answer_parts(answer)
        if final_number(parts[-1]["text"]) is None:  # nothing could be graded against it
            raise UserError("an answer without `#### number` at its end")
        return answered(question, parts)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the number after the first `####` of the completion is that of the reference, 10.0 being 10."""
        return final_number(completion) == final_number(conversation["messages"][-1]["content"][-1]["text"])


def answer_parts(answer: str) -> list[dict[str, str]]:
    """An answer as parts of an assistant message: text, python (the expression), python_output (its result), text, …
    Marks that do not hold `expression=result` are left out: the text around them says what they say."""
    parts: list[dict[str, str]] = []
    end = 0
    text = ""
    for call in _CALL.finditer(answer):
        text += answer[end : call.start()]
        end = call.end()
        expression, _, result = call[1].rpartition("=")
        if expression.strip() and result.strip():
            parts += [_part("text", text)] if text else []
            parts += [_part("python", expression), _part("python_output", result)]
            text = ""
    return [*parts, _part("text", text + answer[end:])]


def final_number(text: str) -> Decimal | None:
    """The number after the first `####`, as published graders take it; None where there is none or another value."""
    return (answer_numbers(text, _UNIT) or [None])[0]


def _part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}
