"""ARC: science questions of school exams with three to five choices; the easy ones and the challenge set.

Source: allenai/ai2_arc on the Hugging Face hub.
"""

from typing import Any, Literal

from nanochat.errors import UserError
from nanochat.tasks import hub
from nanochat.tasks.common import Conversation, Split, Task, graded_letter, multiple_choice

LETTERS = "ABCDE"


class ARC(Task):
    """One of the two sets, in a fixed random order. Raises UserError where its data is absent."""

    eval_type = "categorical"
    baseline = 0.25
    published = True

    def __init__(self, subset: Literal["ARC-Easy", "ARC-Challenge"], split: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = subset
        self.source = hub.source_text(subset)
        self._rows = hub.load_rows(subset, split)

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        row = self._rows[hub.fixed_order(len(self._rows))[index]]
        choices, labels = row["choices"]["text"], row["choices"]["label"]
        if row["answerKey"] not in labels:
            raise UserError(f"{self.name} item {row['id']}: answer {row['answerKey']!r} is none of {', '.join(labels)}")
        letters = LETTERS[: len(choices)]  # some items label their choices 1 to 4
        return multiple_choice(row["question"], choices, letters, letters[labels.index(row["answerKey"])])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return graded_letter(conversation, completion)
