"""What a newcomer types into the tiny model, in words and with numbers that it was not trained on: how much is answered
right, and whether it says so where it does not know.

    python -m benchmarks.plain_questions -i sft -g tiny-d4-pydocs
"""

from typing import Annotated, Literal

from benchmarks.output import Output, write_json
from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.engine import Engine, Sampling
from nanochat.files import read_jsonl
from nanochat.flags import DeviceFlags
from nanochat.runtime import compute_cleanup, compute_init
from nanochat.tasks.common import answer_number
from nanochat.tasks.identity import DATA

QUESTIONS: dict[str, int | str] = {
    "What is 12 + 30?": 42,
    "what's 17+26": 43,
    "How much is 58 minus 19?": 39,
    "What is 6 times 14?": 84,
    "Can you divide 144 by 6?": 24,
    "Tom has 12 apples and buys 7 more. How many apples are there?": 19,
    "I have 34 cookies and eat 6 of them. How many cookies are left?": 28,
    "If I have 50 dollars and spend 13, how much money do I have left?": 37,
    "There are 8 bags with 13 oranges in each bag. How many oranges are there in total?": 104,
    "Sarah is 31 years old. How old will she be in 12 years?": 43,
    "A book has 180 pages and I have read 75. How many pages are left?": 105,
    "Lisa shares 119 sweets equally among 7 friends. How many sweets does each friend get?": 17,
    "Can you spell strawberry?": "strawberry",
    "How do you spell elephant?": "elephant",
    "Spell banana": "banana",
    "Please spell the word guitar for me": "guitar",
    "How many r are in the word strawberry?": 3,
    "How many times does the letter n appear in banana?": 2,
    "How many e's are in elephant?": 2,
    "Count the letter o in chocolate.": 2,
}
UNKNOWN = (
    "Who was Queen Victoria?",
    "What is the capital of Hungary?",
    "Why do dogs bark?",
    "How do I make pancakes?",
    "Write a poem about spring.",
)
HONEST = frozenset(
    answer
    for line in read_jsonl(DATA)
    if line.get("intent", "").startswith(("fact_", "nonsense"))
    for answer in line["answers"]
)


@cli.program
class Settings(DeviceFlags, Output):
    """Ask a chat model plain questions."""

    stage: Annotated[Literal["mid", "sft", "rl"], cli.alias("-i")] = "sft"
    """Training stage of the checkpoint."""
    model_tag: Annotated[str | None, cli.alias("-g")] = None
    """Name of the run among the stage's checkpoints; default: the newest."""


def is_right(question: str, answer: str) -> bool:
    """A number behind `####`, letters behind a colon, or for what is not known one of the answers that say so."""
    match QUESTIONS.get(question):
        case None:
            return answer in HONEST
        case str(word):
            return answer.rpartition(":")[2].split() == list(word)
        case number:
            return answer_number(answer) == number


def main(settings: Settings) -> None:
    *_, device = compute_init(settings.device_type)
    model, tokenizer, _ = load_model(settings.stage, device, tag=settings.model_tag)
    asked = [*QUESTIONS, *UNKNOWN]
    prompts = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]}) for text in asked]
    answers = Engine(model, tokenizer).generate_many(prompts, Sampling(max_new_tokens=110, temperature=0.0))
    found = []
    for question, prompt, (rows, _) in zip(asked, prompts, answers, strict=True):
        answer = tokenizer.decode(rows[0][len(prompt) :])
        found.append({"question": question, "answer": answer, "right": is_right(question, answer)})
        print(f"{'right' if found[-1]['right'] else 'WRONG'}  {question}  {answer!r}")
    right = [one["right"] for one in found]
    plain, unknown = right[: len(QUESTIONS)], right[len(QUESTIONS) :]
    print(f"{sum(plain)} of {len(plain)} right, {sum(unknown)} of {len(unknown)} unknown ones answered honestly")
    write_json(settings, {"stage": settings.stage, "right": sum(plain), "honest": sum(unknown), "answers": found})
    compute_cleanup()


if __name__ == "__main__":
    cli.run(main, Settings)
