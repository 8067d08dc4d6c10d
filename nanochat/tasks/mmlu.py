"""MMLU: questions from 57 subjects with four choices.

Train items are its auxiliary set, questions of other exams without a subject; test items are the test split of all
subjects. Source: cais/mmlu on the Hugging Face hub.
"""

from typing import Any

from nanochat.tasks import hub
from nanochat.tasks.common import Conversation, Split, Task, graded_letter, multiple_choice

LETTERS = "ABCD"


class MMLU(Task):
    """All subjects in a fixed random order; conversations carry `subject`. Raises UserError where data is absent."""

    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25
    published = True

    def __init__(self, split: Split, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = hub.source_text(self.name)
        self._table = hub.load_table(self.name, split)  # 100K train items: rows are made as they are asked for

    def num_examples(self) -> int:
        return self._table.num_rows

    def get_example(self, index: int) -> Conversation:
        row = hub.row(self._table, hub.fixed_order(self._table.num_rows)[index])
        item = multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])
        return {**item, "subject": row["subject"]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return graded_letter(conversation, completion)
