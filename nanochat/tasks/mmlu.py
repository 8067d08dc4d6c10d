"""MMLU: questions from 57 subjects with four choices.

Train items are its auxiliary set, questions of other exams without a subject; test items are the test split of all
subjects. Source: cais/mmlu on the Hugging Face hub (arXiv 2009.03300).
"""

from typing import Any

from nanochat.tasks.common import Conversation, multiple_choice
from nanochat.tasks.hub import PublishedTask

LETTERS = "ABCD"


class MMLU(PublishedTask):
    """All subjects; conversations carry `subject`."""

    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25

    def conversation(self, row: dict[str, Any]) -> Conversation:
        item = multiple_choice(row["question"], row["choices"], LETTERS, LETTERS[row["answer"]])
        return {**item, "subject": row["subject"]}
