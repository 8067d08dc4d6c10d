"""Score a chat model on its tasks: multiple choice, arithmetic, code.

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i mid -a "ARC-Easy|GSM8K" -x 200
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.chat_eval -i rl -a GSM8K -t 1.0 -n 8

Scores go to chat_eval/<stage>_<tag>_<step>.csv, the answer to every item to the .jsonl beside it. A run with tasks,
items or sampling of its own has `_` and 8 hex digits of them behind the step, so that it overwrites no other.
"""

from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import alias, count_flag, float_flag, int_flag, seed_flag
from nanochat.flags import CodeFlags, DeviceFlags


@cli.program
class Settings(CodeFlags, DeviceFlags):
    """Score a chat model on multiple-choice and open questions."""

    stage: Annotated[Literal["mid", "sft", "rl"], alias("-i", "--source")]
    """Training stage whose checkpoint is scored."""
    task_name: Annotated[str | None, alias("-a")] = None
    """Tasks, joined by | or a comma; default: every task whose data is in the store."""
    temperature: Annotated[float, float_flag(gte=0), alias("-t")] = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    max_new_tokens: Annotated[int, int_flag(gte=1), alias("-m")] = 512
    """Longest answer, in tokens; prompt and answer together stay within the model's sequence length."""
    num_samples: Annotated[int, int_flag(gte=1), alias("-n")] = 1
    """Answers to each open question; it passes when any of them is right (pass@n)."""
    top_k: Annotated[int, int_flag(gte=1), alias("-k")] = 50
    """Tokens to sample from, the likeliest ones."""
    batch_size: Annotated[int, int_flag(gte=1), alias("-b")] = 32
    """Items at a time on each device; open questions take num-samples rows each."""
    model_tag: Annotated[str | None, alias("-g")] = None
    """Name of the run among the stage's checkpoints; default: the newest."""
    step: Annotated[int | None, int_flag(gte=0), alias("-s")] = None
    """Optimizer step of the checkpoint; default: the last."""
    max_problems: Annotated[int, count_flag(), alias("-x")] = -1
    """Items per task; -1 for all. Of published data sets the first in the order in which others take parts of them, of
    generated ones some that are spread over the task."""
    seed: Annotated[int, seed_flag()] = 42
    """Seed of sampling; each answer to each item has one of its own."""


import time
from dataclasses import replace
from typing import Any

from nanochat.checkpoint import load_model
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.eval.chat import chat_core, evaluate, pick_tasks, report_data, write_results
from nanochat.eval.shortcuts import best_of, of_task
from nanochat.paths import get_base_dir, slug
from nanochat.runtime import compute_cleanup, compute_init, print0
from nanochat.sandbox import allow_unsafe, isolation_level
from nanochat.sections import duration, keeps_results, write_section
from nanochat.tasks.common import Task, stable_hash


def main(settings: Settings) -> None:
    if settings.temperature == 0 and settings.num_samples > 1:
        raise UserError(
            f"--num-samples={settings.num_samples} at --temperature=0: all answers would be the same; "
            "set a temperature such as 1.0, or one sample"
        )
    _, rank, _, _, device = compute_init(settings.device_type)
    allow_unsafe(settings.unsafe_exec)
    kept = keeps_results("chat_eval")
    model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.step)
    tasks, left_out = pick_tasks(settings.task_name, meta["settings"].get("source"))
    if left_out:
        print0(f"left out: {'; '.join(left_out)}")
    level = isolation_level() if any(task.runs_code for task in tasks) else None
    if level:
        print0(f"model-written code runs in this sandbox: {level.describe()}")
    engine = Engine(model, tokenizer)
    sampling = Sampling(
        num_samples=settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
    )
    limits = {"batch_size": settings.batch_size, "max_problems": settings.max_problems}
    scores = []
    for task in tasks:
        started = time.perf_counter()
        baseline, guess = best_of(of_task(task))
        score = evaluate(engine, task, sampling, settings.seed, **limits)
        scores.append(replace(score, baseline=baseline, guess=guess))
        print0(f"{scores[-1].name} ({scores[-1].how}): {scores[-1]}, {duration(time.perf_counter() - started)}")
    composites = chat_core(scores)
    for group in composites:
        print0(str(group))
    if rank == 0 and kept:
        path = write_results(scores, composites, get_base_dir() / "chat_eval", result_name(settings, meta, tasks))
        print0(f"wrote {path}")
        data = report_data(tasks, scores, composites)
        data["metrics"]["step"] = meta["step"]
        data["facts"] |= {"left_out": left_out, "sandbox": None}
        if level:
            data["facts"] |= {"sandbox": level.describe(), "danger": level.danger()}
        title = f"Chat evaluation, {settings.stage}"
        write_section(f"chat_eval_{settings.stage}", title, {"settings": cli.as_dict(settings), **data})
    compute_cleanup()


def result_name(settings: Settings, meta: dict[str, Any], tasks: list[Task]) -> str:
    """Name of the files: stage, tag and step, and what tells this evaluation from one with the defaults."""
    name = f"{settings.stage}_{slug(str(meta['tag']))}_{meta['step']:06d}"
    # as parsed: the same tasks written in another way or order are the same evaluation
    named = None if settings.task_name is None else tuple(sorted((task.name, len(task)) for task in tasks))
    chosen, default = _choices(settings, named), _choices(Settings(stage=settings.stage), None)
    return name if chosen == default else f"{name}_{stable_hash(*chosen) >> 32:08x}"


def _choices(settings: Settings, named: tuple[tuple[str, int], ...] | None) -> tuple[object, ...]:
    """The settings that answers depend on; without sampling, those of sampling do not matter."""
    sampling = (settings.top_k, settings.seed) if settings.temperature else None
    shared = (settings.max_problems, settings.num_samples, settings.temperature, settings.max_new_tokens)
    return (named, *shared, sampling)


if __name__ == "__main__":
    cli.run(main, Settings)
