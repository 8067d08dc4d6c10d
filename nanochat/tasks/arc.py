"""ARC: science questions of school exams with three to five choices; the easy ones and the challenge set.

Source: allenai/ai2_arc on the Hugging Face hub (arXiv 1803.05457).
"""

from typing import Any

from nanochat.errors import UserError
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

    def conversation(self, row: dict[str, Any]) -> Conversation:
        choices, labels = row["choices"]["text"], row["choices"]["label"]
        if row["answerKey"] not in labels:
            raise UserError(f"{self.name} item {row['id']}: answer {row['answerKey']!r} is none of {', '.join(labels)}")
        letters = LETTERS[: len(choices)]  # some items label their choices 1 to 4
        return multiple_choice(row["question"], choices, letters, letters[labels.index(row["answerKey"])])
