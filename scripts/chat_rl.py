"""Reinforcement learning: the model answers questions, and answers that earn more than the others get likelier.

    python -m scripts.chat_rl --model-tag=d12
    python -m nanochat.launch --nproc-per-node=8 -- -m scripts.chat_rl --task=GSM8K

The method is in nanochat/train/rollouts.py; learning rates are those of the SFT run times --init-lr-frac.
"""

from dataclasses import replace
from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import float_flag, int_flag
from nanochat.flags import CodeFlags, ParentFlags


@cli.program
class Settings(CodeFlags, ParentFlags):
    """Train a chat model by reinforcement on questions whose answers can be graded."""

    task: str = "GSM8K"
    """Questions to train on, of several tasks as Name[:first items][*repeats], joined by commas; their test items are
    what pass@k is measured on."""

    # ---- the model to start from
    source_stage: Literal["sft", "mid"] = "sft"
    """Stage to start from."""

    # ---- the answers
    questions_per_step: Annotated[int, int_flag(gte=1)] = 16
    """Questions per optimizer step, over all devices."""
    num_samples: Annotated[int, int_flag(gte=2)] = 16
    """Answers to each question."""
    max_new_tokens: Annotated[int, int_flag(gte=1)] = 256
    """Tokens of an answer, at most."""
    temperature: Annotated[float, float_flag(gte=0.01)] = 1.0
    """Sampling temperature; at 1 the answers are drawn from the very distribution that is trained."""
    top_k: Annotated[int, int_flag(gte=0)] = 0
    """Draw from the k likeliest tokens only; 0: from all."""

    # ---- the optimizer
    device_batch_size: Annotated[int, int_flag(gte=1)] = 16
    """Answers per forward and backward pass on each device; 16 times as many are sampled together."""
    init_lr_frac: Annotated[float, float_flag(gte=0)] = 0.05
    warmdown_ratio: Annotated[float, float_flag(gte=0, lte=1)] = 1.0

    # ---- watching it
    eval_every: Annotated[int, int_flag(gte=-1)] = 60
    """Steps between measurements of pass@k on test questions; -1: only before and after."""
    eval_questions: Annotated[int, int_flag(gte=1)] = 400
    """Test questions in these."""
    eval_samples: Annotated[int, int_flag(gte=1)] = 8
    """Answers to each."""
    save_every: Annotated[int, int_flag(gte=-1)] = 60


from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nanochat import parallel
from nanochat.cluster.observer import ClusterObserver
from nanochat.config import LEARNING_RATES
from nanochat.engine import Engine, Sampling
from nanochat.errors import TooLittleText, UserError
from nanochat.eval.chat import evaluate_generative, ready
from nanochat.eval.samples import make_chat_samples
from nanochat.optim.schedule import make_schedule
from nanochat.runtime import compute_cleanup, compute_init, out_of_memory_is_one_line, print0
from nanochat.sandbox import allow_unsafe
from nanochat.sections import STDERR_SUFFIXES, metric_text
from nanochat.tasks.common import Conversation, Task, TaskMixture
from nanochat.tasks.registry import TaskSpec, make_task, parse_spec
from nanochat.train.chat import plan_steps
from nanochat.train.loop import train
from nanochat.train.rollouts import REWARD, RolloutLoader, loss_of_taught, questions_at_once, row_width
from nanochat.train.run import Evaluation, TrainingRun, attempt, claim, final_samples, finish, load_parent

FALLBACK = "Arithmetic"  # needs neither text nor data
PASS_AT_K = "right answers to test questions"
MEMORY_ADVICE = "halve --device-batch-size (but for rounding the result stays the same), or lower --max-new-tokens"


class GradedMixture(TaskMixture):
    """A mixture of tasks whose answers are generated; each answer is graded by the task that its question is from."""

    eval_type = "generative"

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__(tasks)
        self.name = ", ".join(dict.fromkeys(task.name for task in tasks))
        self.source = "; ".join(dict.fromkeys(task.source for task in tasks))
        self.published = all(task.published for task in tasks)

    def get_example(self, index: int) -> Conversation:
        return {**super().get_example(index), "task": self.items[index][0]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return self.tasks[conversation["task"]].evaluate(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        return self.tasks[conversation["task"]].reward(conversation, completion)


def question_task(spec: str, split: Literal["train", "test"], source: str | None) -> Task:
    """The task, or all of several mixed. Raises UserError for one whose answers cannot be generated and graded,
    or may not be run."""
    tasks: list[Task] = []
    items = parse_spec(spec)
    if split == "test":  # all items of each
        items = [TaskSpec(name) for name in dict.fromkeys(item.name for item in items)]
    for item in items:
        task = make_task(item.name, split, source, *([] if item.count is None else [item.count]))
        if task.eval_type != "generative":
            others = "use GSM8K, Arithmetic, SpellingBee or the like"
            raise UserError(f"--task={item.name}: its answers are not generated; {others}")
        tasks += [ready(task)] * item.repeats
    return tasks[0] if len(tasks) == 1 else GradedMixture(tasks)


def sampling(settings: Settings, num_samples: int) -> Sampling:
    return Sampling(
        num_samples=num_samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k or None,
    )


def pass_at_k(settings: Settings, engine: Engine, task: Task) -> Callable[[int], dict[str, float]]:
    """step -> share of test questions with a right answer among k samples, for k = 1, 2, 4, … eval_samples, with its
    standard error over the questions."""
    wanted = {2**i for i in range(settings.eval_samples.bit_length())} | {settings.eval_samples}

    def measure(step: int) -> dict[str, float]:
        score = evaluate_generative(
            engine,
            task,
            sampling(settings, settings.eval_samples),
            batch_size=questions_at_once(settings.device_batch_size, settings.eval_samples),
            max_problems=settings.eval_questions,
            seed=settings.seed,
        )
        found: dict[str, float] = {}
        for k in sorted(wanted):
            name = f"Eval/pass@{k}"
            found[name] = score.pass_at[k]
            found[f"{name} standard error"] = score.pass_at_stderr(k)
        return found

    return measure


def main(settings: Settings) -> None:
    _, rank, _, world_size, device = compute_init(settings.device_type)
    allow_unsafe(settings.unsafe_exec)
    model, tokenizer, parent, policy = load_parent(settings.source_stage, settings, device)
    recipe, note = parent["recipe"], ""
    try:
        questions, test = (question_task(settings.task, split, recipe["source"]) for split in ("train", "test"))
    except TooLittleText as error:
        note = f"Left out: {settings.task}: {error}; the model practises on {FALLBACK} instead"
        print0(note)
        settings = replace(settings, task=FALLBACK)
        questions, test = (question_task(FALLBACK, split, None) for split in ("train", "test"))
    num_iterations = plan_steps(settings, len(questions), settings.questions_per_step)
    width = row_width(tokenizer, questions, settings.max_new_tokens, model.config.sequence_len)
    rows = settings.questions_per_step * settings.num_samples
    print0(f"{questions.name}: {len(questions):,} questions ({questions.source}), {len(test):,} to test on")
    print0(f"{num_iterations:,} steps of {settings.questions_per_step} questions x {settings.num_samples} answers, "
           f"rows of {width} tokens")  # fmt: skip

    rates = {name: recipe[name] * settings.init_lr_frac for name in LEARNING_RATES}
    optimizer = model.setup_optimizer(**rates, weight_decay=0.0, use_muon=recipe["use_muon"])
    engine = Engine(model, tokenizer)
    measure = pass_at_k(settings, engine, test)

    # ---- where it goes, and whether some of it is there already
    tag = settings.out_tag or parent["tag"]
    claimed = claim("rl", tag, settings, model, tokenizer, policy, optimizer, recipe, num_iterations, parent)
    if claimed.earlier is None:  # this very run is complete
        compute_cleanup()
        return
    loader = RolloutLoader(
        engine,
        questions,
        sampling(settings, settings.num_samples),
        settings.questions_per_step,
        settings.device_batch_size,
        width,
        rank,
        world_size,
        settings.seed,
        state=claimed.earlier.get("loader"),
        unsharded=lambda: parallel.unsharded_params(model, policy),
    )

    # ---- train
    run = TrainingRun(
        **vars(claimed),
        forward=partial(loss_of_taught, model),
        loader=loader,
        tokens_per_step=rows * width,
        schedule=make_schedule(num_iterations, 0.0, settings.warmdown_ratio, 0.0),
        grad_clip=settings.grad_clip,
        evaluations=[Evaluation(settings.eval_every, True, measure, optional=PASS_AT_K)],
        step_metrics=lambda: loader.metrics,
        observer=ClusterObserver(),
        memory_advice=MEMORY_ADVICE,
    )
    with out_of_memory_is_one_line(device, MEMORY_ADVICE), parallel.unsharded_params(model, policy):
        before = run.earlier["before"] if run.earlier else attempt(run.state, PASS_AT_K, partial(measure, 0), {})
    run.meta["before"] = before
    print0("before: " + " | ".join(f"{name} {value:.4f}" for name, value in before.items()))
    outcome = train(run)
    if outcome.finished:  # on all ranks alike; one that was told to stop has no time for samples
        samples = final_samples(run, lambda: make_chat_samples(model, tokenizer))
        data = describe(run, outcome.metrics, questions, test, samples)
        finish(run, "chat_rl", "Reinforcement learning", {**data, "notes": [note] if note else []})
    compute_cleanup()


def describe(
    run: TrainingRun, final: dict[str, Any], questions: Task, test: Task, samples: list[dict[str, str]]
) -> dict[str, Any]:
    """The report's section."""
    before, latest, settings = run.meta["before"], run.state.latest, run.meta["settings"]
    passed = {name: None for name in [*before, *latest] if name.startswith("Eval/pass@")}
    names = [name for name in passed if not name.endswith(STDERR_SUFFIXES)]
    rows = [[name.removeprefix("Eval/"), *(metric_text({**passed, **found}, name) for found in (before, latest))]
            for name in names]  # fmt: skip
    items = min(settings["eval_questions"], len(test))
    # a "token" of these is a place in a padded row, and the time is mostly that of sampling
    speed = ("tokens", "tokens per second", "final train_loss")
    table = {
        "title": f"Right answers on {items} test questions of {test.name} ({test.source})",
        "columns": ["", "Before", "After"],
        "rows": rows,
    }
    return {
        "settings": settings,
        "metrics": {
            "reward in the last step": latest[REWARD],
            **{name.replace("Eval/", "first "): value for name, value in before.items()},
            **{name: value for name, value in final.items() if name not in speed},
        },
        "tables": [table],
        "samples": samples,
        "facts": {"questions": len(questions)},
        "synthetic": not questions.published,
    }


if __name__ == "__main__":
    cli.run(main, Settings)
