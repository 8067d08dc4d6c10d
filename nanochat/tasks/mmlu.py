"""MMLU: questions from 57 subjects with four choices.

Train items are its auxiliary set, questions of other exams without a subject; test items are the test split of all
subjects. Source: cais/mmlu on the Hugging Face hub (arXiv 2009.03300).
"""

from typing import Any

from nanochat.errors import UserError
from nanochat.files import fields
from nanochat.tasks.common import Conversation, multiple_choice
from nanochat.tasks.hub import PublishedTask

LETTERS = "ABCD"


class MMLU(PublishedTask):
    """All subjects; conversations carry `subject`."""

    name = "MMLU"
    eval_type = "categorical"
    baseline = 0.25

    @staticmethod
    def conversation(row: dict[str, Any]) -> Conversation:
        types = {"question": str, "subject": str, "choices": list[str], "answer": int}
        question, subject, choices, answer = fields(row, **types)
        if not 0 <= answer < len(LETTERS):  # LETTERS[-1] is a letter too
            raise UserError(f"answer {answer}, expected 0 to 3; -1 marks rows without an answer: leave them out")
        return {**multiple_choice(question, choices, LETTERS, LETTERS[answer]), "subject": subject}
