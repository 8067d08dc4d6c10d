"""Score a chat model on its tasks: multiple choice, arithmetic, code.

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i mid -a "ARC-Easy|GSM8K" -x 200
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -i rl -a GSM8K -t 1.0 -n 8

Scores go to chat_eval/<stage>_<tag>_<step>.csv, the answer to every item to the .jsonl beside it. A run with tasks,
items or sampling of its own has `_` and 8 hex digits of them behind the step, so that it overwrites no other.
"""

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from nanochat import cli
from nanochat.checkpoint import load_model
from nanochat.cli import alias, float_flag, int_flag
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.eval.chat import (
    Composite,
    TaskScore,
    Tokenizer,
    chat_core,
    evaluate_categorical,
    evaluate_generative,
    write_results,
)
from nanochat.paths import get_base_dir, slug
from nanochat.runtime import DeviceType, compute_cleanup, compute_init, print0
from nanochat.sandbox import isolation_level, require_isolation
from nanochat.sections import duration, write_section
from nanochat.tasks.common import Task
from nanochat.tasks.registry import GRADED_TASKS, make_task, parse_tasks
from nanochat.tasks.splits import stable_hash

SAMPLES = 3  # conversations shown in the report
RUNS_CODE = "HumanEval"


@dataclass(frozen=True, kw_only=True)
class Settings:
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
    max_problems: Annotated[int, int_flag(gte=-1), alias("-x")] = -1
    """Items per task, spread over it; -1 for all."""
    seed: Annotated[int, int_flag(gte=0)] = 42
    """Seed of sampling; each answer to each item has one of its own."""
    device_type: DeviceType = "auto"
    """auto, cpu, cuda or mps."""


def main(settings: Settings) -> None:
    if settings.temperature == 0 and settings.num_samples > 1:
        raise UserError(
            f"--num-samples={settings.num_samples} at --temperature=0: all answers would be the same; "
            "set a temperature such as 1.0, or one sample"
        )
    _, rank, _, _, device = compute_init(settings.device_type)
    model, tokenizer, meta = load_model(settings.stage, device, tag=settings.model_tag, step=settings.step)
    tasks, left_out = pick_tasks(settings.task_name, meta["settings"].get("source"))
    if left_out:
        print0(f"left out: {'; '.join(left_out)}")
    if any(task.name == RUNS_CODE for task in tasks):
        print0(f"model-written code runs in this sandbox: {isolation_level().describe()}")
    engine = Engine(model, tokenizer)
    scores = []
    for task in tasks:
        started = time.perf_counter()
        scores.append(evaluate(settings, engine, tokenizer, task))
        print0(f"{line(scores[-1])}, {duration(time.perf_counter() - started)}")
    composites = chat_core(scores)
    for group in composites:
        print0(f"{group.name}: {group.value:.4f} ± {group.stderr:.4f}")
    if rank == 0:
        path = write_results(scores, composites, get_base_dir() / "chat_eval", result_name(settings, meta, tasks))
        print0(f"wrote {path}")
        data = section(settings, meta, tasks, scores, composites, left_out)
        write_section(f"chat_eval_{settings.stage}", f"Chat evaluation, {settings.stage}", data)
    compute_cleanup()


def pick_tasks(names: str | None, source: str | None) -> tuple[list[Task], list[str]]:
    """(tasks to score, `name: why` of those left out for want of data or of a sandbox).

    Raises UserError for a named task that is unknown, lacks data or a sandbox, cannot be graded or is named twice, and
    when nothing is left.
    """
    if names is not None:
        tasks = parse_tasks(names, "test", source)
        for task in tasks:
            if task.eval_type is None:
                raise UserError(f"--task-name={names}: {task.name} has no answers to grade; leave it out")
            if sum(task.name == other.name for other in tasks) > 1:
                raise UserError(f"--task-name={names}: {task.name} is there twice; name it once")
            _check_ready(task)
        return tasks, []
    tasks, left_out = [], []
    for name in GRADED_TASKS:
        try:
            task = make_task(name, "test", source)
            _check_ready(task)
            tasks.append(task)
        except UserError as error:
            left_out.append(f"{name}: {error}")
    if not tasks:
        raise UserError(f"no task to score: {'; '.join(left_out)}")
    return tasks, left_out


def _check_ready(task: Task) -> None:
    """Raises UserError where its data is absent or its answers may not be run: now, not in an hour."""
    len(task)
    if task.name == RUNS_CODE:
        require_isolation()


def result_name(settings: Settings, meta: dict[str, Any], tasks: list[Task]) -> str:
    """Name of the files: stage, tag and step, and what tells this evaluation from one with the defaults."""
    name = f"{settings.stage}_{slug(str(meta['tag']))}_{meta['step']:06d}"
    # as parsed: the same tasks written in another way or order are the same evaluation
    named = None if settings.task_name is None else tuple(sorted((task.name, len(task)) for task in tasks))
    own, plain = _choices(settings, named), _choices(Settings(stage=settings.stage), None)
    return name if own == plain else f"{name}_{stable_hash(*own):016x}"[:-8]


def _choices(settings: Settings, named: tuple[tuple[str, int], ...] | None) -> tuple[object, ...]:
    """The settings that answers depend on; without sampling, those of sampling do not matter."""
    sampling = (settings.top_k, settings.seed) if settings.temperature else None
    shared = (settings.max_problems, settings.num_samples, settings.temperature, settings.max_new_tokens)
    return (named, *shared, sampling)


def evaluate(settings: Settings, engine: Engine, tokenizer: Tokenizer, task: Task) -> TaskScore:
    """Score one task the way it is graded."""
    shared = {"batch_size": settings.batch_size, "max_problems": settings.max_problems}
    if task.eval_type == "categorical":
        device = engine.model.get_device()
        return evaluate_categorical(engine.model, tokenizer, task, device, **shared)
    return evaluate_generative(
        engine,
        tokenizer,
        task,
        Sampling(
            num_samples=settings.num_samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
        ),
        seed=settings.seed,
        **shared,
    )


def line(score: TaskScore) -> str:
    """One task for the console."""
    kind = f"{score.eval_type}, pass@{score.num_samples}" if score.num_samples > 1 else score.eval_type
    return (
        f"{score.name} ({kind}): accuracy {score.accuracy:.4f} ± {score.stderr:.4f}, "
        f"centered {score.centered:.4f}, {score.n} items"
    )


# ---- the report's section


def section(
    settings: Settings,
    meta: dict[str, Any],
    tasks: list[Task],
    scores: list[TaskScore],
    composites: list[Composite],
    left_out: list[str],
) -> dict[str, Any]:
    """What the report shows of this stage."""
    metrics: dict[str, Any] = {}
    for score in scores:
        metrics |= {score.name: score.accuracy, f"{score.name} standard error": score.stderr}
    for group in composites:
        metrics |= {group.name: group.value, f"{group.name} standard error": group.stderr}
    return {
        "settings": cli.as_dict(settings),
        "metrics": {**metrics, "step": meta["step"]},
        "tables": tables(scores),
        "samples": samples(tasks, scores),
        "notes": notes(settings, scores, composites, left_out),
        "synthetic": any(not score.published for score in scores),
    }


def tables(scores: list[TaskScore]) -> list[dict[str, Any]]:
    columns = ["Task", "Type", "Items", "Guessing %", "Accuracy", "Standard error", "Centered", "Source"]
    rows = [[s.name, s.eval_type, s.n, 100 * s.baseline, s.accuracy, s.stderr, s.centered, s.source] for s in scores]
    found = [{"title": "Chat tasks", "columns": columns, "rows": rows}]
    sampled = [score for score in scores if score.num_samples > 1]
    if sampled:
        ks = list(sampled[0].pass_at)
        rows = [[score.name, *score.pass_at.values()] for score in sampled]
        found.append({"title": "Pass@k", "columns": ["Task", *(f"pass@{k}" for k in ks)], "rows": rows})
    return found


def samples(tasks: list[Task], scores: list[TaskScore]) -> list[dict[str, str]]:
    """The first item of each of the first tasks, generated answers before letters: they show more."""
    shown = []
    for task, score in sorted(zip(tasks, scores, strict=True), key=lambda pair: pair[1].eval_type != "generative"):
        record = score.records[0]
        if score.eval_type == "categorical":
            text = f"{record['chosen']} (right answer: {record['expected']})"
        else:
            text = record["completions"][0] if record["completions"] else f"({record['error']})"
        # not the last but one: some puzzles have no reference answer behind the question
        asked = [message for message in task[record["index"]]["messages"] if message["role"] == "user"]
        question = " ".join(str(asked[-1]["content"]).split())
        shown.append({"prompt": f"[{score.name}] {question}", "text": text})
    return shown[:SAMPLES]


def notes(settings: Settings, scores: list[TaskScore], composites: list[Composite], left_out: list[str]) -> list[str]:
    """What a reader must know to read the numbers."""
    found = ["Centred accuracy: 0 is guessing, 1 is perfect."]
    for group in composites:
        basis = ", ".join(f"{name} ({100 * baseline:.4g} %)" for name, baseline in group.baselines.items())
        found.append(f"{group.name} is the plain mean of the centred accuracies of (guessing in brackets): {basis}.")
    if any(not score.published for score in scores):
        found.append("Tasks of ChatCORE-offline were generated by this program: not comparable with published tasks.")
    found.append("Standard errors are binomial: they cover the choice of items, not the spread between training runs.")
    if settings.num_samples > 1:
        found.append(f"Generative tasks: an item passes when any of {settings.num_samples} samples is right.")
    if settings.max_problems > 0:
        found.append(f"At most {settings.max_problems} items a task were scored.")
    crowded = {score.name: sum("error" in record for record in score.records) for score in scores}
    for name, count in crowded.items():
        if count:
            found.append(f"{name}: {count} items counted as failed because their prompt left no room for an answer.")
    if any(score.name == RUNS_CODE for score in scores):
        found.append(f"Model-written code ran in this sandbox: {isolation_level().describe()}.")
    return found + [f"Left out: {why}" for why in left_out]


if __name__ == "__main__":
    cli.run(main, Settings)
