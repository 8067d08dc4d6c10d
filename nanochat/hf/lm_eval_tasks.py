"""An evaluation bundle as local tasks of lm-evaluation-harness, item for item what scripts.base_eval scores.

    python -m nanochat.hf.lm_eval_tasks --out=core-tasks
    python -m nanochat.hf.lm_eval --model nanochat --model_args stage=base --include_path core-tasks --tasks core

Prompts are written with their examples, and divided where our evaluator divides them: between what all options share
and where they differ. lm_eval divides a text where the encoding of the context alone ends; `differs` counts the items
where that is somewhere else. The right option is the one with the smallest loss per token, so that tasks are for one
tokenizer.
"""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from nanochat import cli
from nanochat.errors import UserError

GROUP = "core"


@cli.program
class Settings:
    """Write the store's evaluation bundle as tasks of lm-evaluation-harness, for the store's tokenizer."""

    out: Path
    """Folder to write; it must not exist yet."""
    max_per_task: Annotated[int, cli.count_flag()] = -1
    """Items per task, the ones that base_eval takes with this flag; -1 for all."""


import numpy as np
import yaml

from nanochat.eval.bundle import Bundle, Task, load_bundle
from nanochat.eval.core import Row, make_rows, pick_shots, render_prompts
from nanochat.files import atomic_write
from nanochat.paths import eval_bundle_dir
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer, repaired


def write_tasks(
    bundle: Bundle, tokenizer: RustBPETokenizer, out: Path, max_per_task: int = -1
) -> dict[str, Counter[str]]:
    """Write a YAML and a JSONL file a task, and the group of them all. Returns for each task how many items lm_eval
    divides as we do ("same"), and why it does not the others. Raises UserError where `out` exists."""
    if out.exists():
        raise UserError(f"{out} is there already: remove it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    with atomic_write(out) as folder:
        folder.mkdir()
        for task in bundle.tasks:
            lines = list(range(len(task.items)))
            random.Random(1337).shuffle(lines)  # as evaluate_task does
            lines = lines[:max_per_task] if max_per_task > 0 else lines
            items = [task.items[line] for line in lines]
            documents = [{"line": line, **document(task, items, i, tokenizer)} for i, line in enumerate(lines)]
            found[task.label] = Counter(each["split"] for each in documents)
            text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents)
            (folder / f"{task.label}.jsonl").write_text(text, encoding="utf-8")
            text = yaml.safe_dump(task_settings(task, out.absolute() / f"{task.label}.jsonl"), sort_keys=False)
            (folder / f"{task.label}.yaml").write_text(text.replace(FUNCTION_QUOTED, FUNCTION), encoding="utf-8")
        names = [f"{GROUP}_{task.label}" for task in bundle.tasks]
        (folder / "group.yaml").write_text(yaml.safe_dump({"group": GROUP, "task": names}), encoding="utf-8")
    return found


FUNCTION = "!function nanochat.hf.lm_eval_tasks.by_loss_per_token"
FUNCTION_QUOTED = f"'{FUNCTION}'"


def task_settings(task: Task, data: Path) -> dict[str, Any]:
    """A task's YAML."""
    texts: dict[str, Any]
    if task.kind == "language_modeling":
        texts = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "answer"}
    elif task.kind == "multiple_choice":
        choices = {"doc_to_text": "context", "doc_to_choice": "options", "doc_to_target": "gold"}
        texts = {"output_type": "multiple_choice", **choices, "process_results": FUNCTION}
    else:  # options are contexts, and the answer is the same: to lm_eval, the number of the right one is the text
        choices = {"doc_to_text": "gold", "doc_to_choice": "options", "doc_to_target": "answer"}
        texts = {"output_type": "multiple_choice", **choices, "process_results": FUNCTION}
    return {
        "task": f"{GROUP}_{task.label}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **texts,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def by_loss_per_token(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Our rule of the right option, for lm_eval."""
    means = [logprob / count for (logprob, _), count in zip(results, doc["tokens"], strict=True)]
    return {"acc": float(int(np.argmax(means)) == doc["gold"])}


def document(task: Task, items: Sequence[dict[str, Any]], index: int, tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """One of these items, which are a task's examples too: its texts, how many tokens are scored of each option, and
    whether lm_eval divides them as we do."""
    item = items[index]
    prompts = [repaired(prompt) for prompt in render_prompts(task, item, pick_shots(task, items, index))]
    encoded = tokenizer.encode(prompts, prepend=tokenizer.get_bos_token_id())
    rows = make_rows(task.kind, encoded, max(map(len, encoded)))
    prompts = prompts[-len(rows) :]  # of language modelling the second, which has the continuation
    pairs = [_divided(prompt, row, tokenizer) for prompt, row in zip(prompts, rows, strict=True)]
    reasons = [_difference(*pair, row, tokenizer) for pair, row in zip(pairs, rows, strict=True)]
    split = next((reason for reason in reasons if reason), "same")
    about = {"split": split, "tokens": [row.end - row.start for row in rows]}
    if task.kind == "language_modeling":
        return {**about, "context": pairs[0][0], "answer": pairs[0][1]}
    contexts, answers = zip(*pairs, strict=True)
    if task.kind == "multiple_choice":
        return {**about, "context": contexts[0], "options": list(answers), "gold": item["gold"]}
    return {**about, "options": list(contexts), "answer": answers[0], "gold": item["gold"]}


def _divided(prompt: str, row: Row, tokenizer: RustBPETokenizer) -> tuple[str, str]:
    """(context, continuation) where the scored tokens begin, or where the character does that this cuts in two."""
    before = tokenizer.decode_bytes(np.asarray(row.tokens)[1 : row.start])
    context = before.decode("utf-8", "ignore")
    return context, prompt[len(context) :]


def _difference(context: str, answer: str, row: Row, tokenizer: RustBPETokenizer) -> str:
    """Why lm_eval scores other tokens of the pair than we do; empty where it scores the same."""
    tokens = np.asarray(row.tokens).tolist()
    kept = context.rstrip()  # lm_eval takes the spaces at the end to the continuation
    if kept == context and context.encode() != tokenizer.decode_bytes(tokens[1 : row.start]):
        return "a character is divided"
    if kept != context:
        return "space before the answer"
    if tokenizer.encode(context) != tokens[1 : row.start]:
        return "tokens merge across the border"
    return "" if tokenizer.encode(context + answer) == tokens[1:] else "the text is encoded otherwise"


def main(settings: Settings) -> None:
    found = write_tasks(
        load_bundle(eval_bundle_dir()), get_tokenizer(), settings.out.expanduser(), settings.max_per_task
    )
    for label, counts in found.items():
        others = "".join(f"; {count:,} not: {reason}" for reason, count in counts.items() if reason != "same")
        print(f"{GROUP}_{label}: {counts['same']:,} of {counts.total():,} items divided as in base_eval{others}")


if __name__ == "__main__":
    cli.run(main, Settings)
