"""ARC: science questions of school exams with three to five choices; the easy ones and the challenge set.

Source: allenai/ai2_arc on the Hugging Face hub (arXiv 1803.05457).
"""

from typing import Any

from nanochat.errors import UserError
from nanochat.files import fields
from nanochat.tasks.common import Conversation, Split, multiple_choice
from nanochat.tasks.hub import PublishedTask

LETTERS = "ABCDE"


class ARC(PublishedTask):
    """ARC-Easy or ARC-Challenge."""

    eval_type = "categorical"
    baseline = 0.25

    def __init__(self, subset: str, split: Split, **kwargs: Any) -> None:
        self.name = subset
        super().__init__(split, **kwargs)

    @staticmethod
    def conversation(row: dict[str, Any]) -> Conversation:
        question, options, answer = fields(row, question=str, choices=dict, answerKey=str)
        choices, labels = fields(options, text=list[str], label=list[str])
        if answer not in labels:
            raise UserError(f"answer {answer!r} is none of {', '.join(labels)}")
        letters = LETTERS[: len(choices)]  # some items label their choices 1 to 4
        if not len(letters) == len(choices) == len(labels) == len(set(labels)):
            raise UserError(f"labels {', '.join(labels)} for {len(choices)} choices, expected up to {len(LETTERS)}")
        return multiple_choice(question, choices, letters, letters[labels.index(answer)])
