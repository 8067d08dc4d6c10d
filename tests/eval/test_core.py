"""core.py: the batched scorer against a slow one, the prompts, the bundle's checks, several ranks."""

import csv
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.eval.bundle import PUBLISHED_TASKS, Task, load_bundle
from nanochat.eval.core import (
    CoreScore,
    evaluate_core,
    evaluate_task,
    make_rows,
    pick_shots,
    render_prompts,
    write_results,
)
from tests.processes import run_processes

BOS = 256
CPU = torch.device("cpu")
DATA = Path(os.environ.get("NANOCHAT_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


class ByteTokenizer:
    """One token a byte."""

    def encode(self, text, prepend=None):
        if isinstance(text, list):
            return [self.encode(one, prepend) for one in text]
        return ([] if prepend is None else [prepend]) + list(text.encode())

    def get_bos_token_id(self) -> int:
        return BOS


class TinyModel(torch.nn.Module):
    """Random, causal, and dependent on the whole past; float64, so that padding cannot change a ranking."""

    def __init__(self, vocab_size: int = 257, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.wte = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64)
        self.head = torch.randn(width, vocab_size, generator=generator, dtype=torch.float64)
        self.forwards = 0

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        steps = torch.arange(1, idx.size(1) + 1, dtype=torch.float64)[:, None]
        return torch.tanh(self.wte[idx].cumsum(dim=1) / steps.sqrt()) @ self.head


def values(score: CoreScore, name: str) -> list:
    """One field of every record; -1 for the option chosen in language modelling, which has none."""
    return [record.get(name, -1) for record in score.records]


class Oracle(ByteTokenizer):
    """Knows how each text goes on that it has encoded."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], int] = {}

    def encode(self, text, prepend=None):
        ids = super().encode(text, prepend)
        if isinstance(text, str):
            self.known |= {tuple(ids[:n]): ids[n] for n in range(1, len(ids))}
        return ids

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        found = [[self.known.get(tuple(row[: n + 1]), 0) for n in range(len(row))] for row in idx.tolist()]
        return 20.0 * torch.nn.functional.one_hot(torch.tensor(found), 257).float()


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(["alpha", "beta", "be", "gamma", "delta", "epsilon"]) for _ in range(count))


def make_task(kind: str, n: int, num_fewshot: int, seed: int = 0, delimiter: str = " ") -> Task:
    rng = random.Random(seed)
    items = []
    for _ in range(n):
        options = [words(rng, rng.randint(1, 5)) for _ in range(rng.randint(2, 4))]
        gold = rng.randrange(len(options))
        if kind == "multiple_choice":
            items.append({"query": words(rng, 6), "choices": options, "gold": gold})
        elif kind == "schema":
            items.append({"context_options": options, "continuation": words(rng, 3), "gold": gold})
        else:
            items.append({"context": words(rng, 6) + "  ", "continuation": rng.choice("abcde")})
    return Task(label=kind, kind=kind, num_fewshot=num_fewshot, delimiter=delimiter, baseline=25.0, items=items)


def write_bundle(path: Path, tasks: list[Task]) -> Path:
    entries = []
    for task in tasks:
        file = path / "eval_data" / "some" / f"{task.label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(item) + "\n" for item in task.items))
        entry = {"label": task.label, "dataset_uri": f"some/{task.label}.jsonl", "num_fewshot": [task.num_fewshot]}
        entries.append({**entry, "icl_task_type": task.kind, "continuation_delimiter": task.delimiter})
    (path / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    lines = "".join(f"{task.label},{task.baseline}\n" for task in tasks)
    (path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + lines)
    return path


# ---- a slow, obvious scorer: one prompt a forward, one item at a time


def slow_losses(model, tokens: list[int]) -> tuple[list[float], list[bool]]:
    """(loss, hit) of predicting tokens[i], at index i; nothing at 0."""
    logits = model(torch.tensor([tokens]))[0].float()
    losses, hits = [0.0], [False]
    for i in range(1, len(tokens)):
        losses.append(float(-torch.log_softmax(logits[i - 1], dim=0)[tokens[i]]))
        hits.append(int(logits[i - 1].argmax()) == tokens[i])
    return losses, hits


def slow_task(model, tokenizer, task: Task, sequence_len: int, max_per_task: int = -1) -> list[tuple]:
    """(correct, chosen, loss of the right answer) an item."""
    data = list(task.items)
    random.Random(1337).shuffle(data)
    data = data[:max_per_task] if max_per_task > 0 else data
    out = []
    for index, item in enumerate(data):
        rest = [i for i in range(len(data)) if i != index]
        shots = [data[i] for i in random.Random(1234 + index).sample(rest, task.num_fewshot)]
        joint, prompts = task.delimiter, []
        if task.kind == "multiple_choice":
            head = "".join(s["query"] + joint + s["choices"][s["gold"]] + "\n\n" for s in shots)
            prompts = [head + item["query"] + joint + choice for choice in item["choices"]]
        elif task.kind == "schema":
            head = "".join(s["context_options"][s["gold"]] + joint + s["continuation"] + "\n\n" for s in shots)
            prompts = [head + option + joint + item["continuation"] for option in item["context_options"]]
        else:
            head = "".join(s["context"].strip() + joint + s["continuation"] + "\n\n" for s in shots)
            prompts = [head + item["context"].strip() + joint + item["continuation"]]
        rows = [tokenizer.encode(prompt, prepend=BOS) for prompt in prompts]
        spans = []
        for row in rows:
            if task.kind == "multiple_choice":
                start = 0
                while start < min(map(len, rows)) - 1 and len({r[start] for r in rows}) == 1:
                    start += 1
            elif task.kind == "schema":
                start = len(row)
                while (
                    start > 1
                    and all(len(r) >= len(row) - start + 1 for r in rows)
                    and (len({r[start - 1 - len(row)] for r in rows}) == 1)
                ):
                    start -= 1
            else:
                start = len(tokenizer.encode((head + item["context"].strip() + joint).rstrip(), prepend=BOS))
            cut = max(0, len(row) - sequence_len)
            losses, hits = slow_losses(model, row[cut:])
            start = max(1, start - cut)
            spans.append((float(np.mean(losses[start:])), all(hits[start:])))
        if task.kind == "language_modeling":
            out.append((spans[0][1], -1, spans[0][0]))
        else:
            chosen = min(range(len(spans)), key=lambda i: spans[i][0])
            out.append((chosen == item["gold"], chosen, spans[item["gold"]][0]))
    return out


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
@pytest.mark.parametrize(("num_fewshot", "sequence_len", "device_batch_size"), [(0, 512, 4), (3, 512, 1), (2, 70, 3)])
def test_batched_equals_one_prompt_a_forward(kind, num_fewshot, sequence_len, device_batch_size):
    task = make_task(kind, n=12, num_fewshot=num_fewshot, delimiter="\nAnswer: ")
    model, tokenizer = TinyModel(), ByteTokenizer()
    expected = slow_task(model, tokenizer, task, sequence_len)
    model.forwards = 0
    result = evaluate_task(model, tokenizer, task, CPU, sequence_len=sequence_len, device_batch_size=device_batch_size)
    assert values(result, "correct") == [correct for correct, _, _ in expected]
    assert values(result, "chosen") == [chosen for _, chosen, _ in expected]
    np.testing.assert_allclose(values(result, "loss"), [loss for _, _, loss in expected], rtol=1e-5)
    if device_batch_size > 1 and sequence_len > 100:
        assert model.forwards < len(expected)  # several items share a forward


@given(st.sampled_from(["multiple_choice", "schema"]), st.integers(0, 10_000), st.integers(0, 3), st.integers(1, 20))
@hypothesis_settings(max_examples=12, deadline=None)
def test_any_items_and_truncation(kind, seed, num_fewshot, max_per_task):
    task = make_task(kind, n=12, num_fewshot=num_fewshot, seed=seed)
    max_per_task = max(max_per_task, num_fewshot + 1)
    expected = slow_task(TinyModel(), ByteTokenizer(), task, 256, max_per_task)
    result = evaluate_task(
        TinyModel(), ByteTokenizer(), task, CPU, sequence_len=256, device_batch_size=2, max_per_task=max_per_task
    )
    assert values(result, "correct") == [correct for correct, _, _ in expected]
    order = list(range(12))
    random.Random(1337).shuffle(order)
    assert values(result, "line") == order[:max_per_task]


def test_bf16_logits_are_scored_in_fp32():
    task = make_task("multiple_choice", n=10, num_fewshot=1)
    low = evaluate_task(lambda idx: TinyModel()(idx).bfloat16(), ByteTokenizer(), task, CPU, sequence_len=512)
    high = evaluate_task(lambda idx: TinyModel()(idx).bfloat16().double(), ByteTokenizer(), task, CPU, sequence_len=512)
    np.testing.assert_allclose(values(low, "loss"), values(high, "loss"), rtol=1e-5)


def test_prompts_of_the_three_kinds():
    mc = make_task("multiple_choice", 1, 0, delimiter="\nAnswer: ")
    shot = {"query": "1+1?", "choices": ["3", "2"], "gold": 1}
    item = {"query": "2+2?", "choices": ["4", "5"], "gold": 0}
    assert render_prompts(mc, item, [shot]) == [
        "1+1?\nAnswer: 2\n\n2+2?\nAnswer: 4",
        "1+1?\nAnswer: 2\n\n2+2?\nAnswer: 5",
    ]
    schema = make_task("schema", 1, 0)
    shot = {"context_options": ["the cat", "the dog"], "continuation": "barked", "gold": 1}
    item = {"context_options": ["A sun", "A moon"], "continuation": "shone", "gold": 0}
    assert render_prompts(schema, item, [shot]) == ["the dog barked\n\nA sun shone", "the dog barked\n\nA moon shone"]
    lm = make_task("language_modeling", 1, 0)
    shot = {"context": " a b \n", "continuation": "c"}
    item = {"context": "d e ", "continuation": "f"}
    assert render_prompts(lm, item, [shot]) == ["a b c\n\nd e", "a b c\n\nd e f"]


def test_shots_never_hold_the_item_and_repeat():
    task = make_task("multiple_choice", n=12, num_fewshot=10)
    for index, item in enumerate(task.items):
        shots = pick_shots(task, task.items, index)
        assert len(shots) == 10 and all(shot is not item for shot in shots)
        assert shots == pick_shots(task, task.items, index)
    assert len(pick_shots(task, task.items[:4], 0)) == 3


def test_rows_stay_inside_the_window_and_keep_an_answer():
    same = make_rows("multiple_choice", [[BOS, 1, 2], [BOS, 1, 2]], 10)  # identical options
    assert all(row.end - row.start == 1 for row in same)
    prefix = make_rows("multiple_choice", [[BOS, 1, 2], [BOS, 1, 2, 3]], 10)  # one option begins another
    assert [row.tokens[row.start : row.end] for row in prefix] == [[2], [2, 3]]
    long = make_rows("language_modeling", [[BOS, 1, 2, 3], [BOS, 1, 2, 3, 4, 5]], 4)[0]
    assert (long.tokens, long.start, long.end) == ([2, 3, 4, 5], 2, 4)
    answer_too_long = make_rows("language_modeling", [[BOS, 1], [BOS, 1, 2, 3, 4, 5]], 3)[0]
    assert (answer_too_long.tokens, answer_too_long.start, answer_too_long.end) == ([3, 4, 5], 1, 3)
    merged = make_rows("language_modeling", [[BOS, 7, 8], [BOS, 7, 9, 10]], 10)[0]  # merged across the border
    assert merged.tokens[merged.start : merged.end] == [9, 10]


def test_oracle_scores_one_and_centering():
    oracle, task = Oracle(), make_task("language_modeling", 20, 2)
    result = evaluate_task(oracle, oracle, task, CPU, sequence_len=512)
    assert result.accuracy == 1.0 and 0.02 < result.stderr < 0.03 and result.centered == 1.0
    task = make_task("multiple_choice", 40, 0)
    guess = evaluate_task(TinyModel(), ByteTokenizer(), task, CPU, sequence_len=512)
    p = guess.accuracy
    assert 0 < p < 1 and guess.n == 40
    assert guess.centered == pytest.approx((p - 0.25) / 0.75)
    assert guess.centered_stderr == pytest.approx(guess.stderr / 0.75)


def test_core_is_the_plain_mean_and_files_say_so(tmp_path):
    tasks = [make_task("multiple_choice", 20, 1), make_task("schema", 30, 0), make_task("language_modeling", 10, 1)]
    bundle = load_bundle(write_bundle(tmp_path, tasks))
    assert bundle.name == "CORE-custom (3 tasks)"
    lines = []
    result = evaluate_core(TinyModel(), ByteTokenizer(), bundle, CPU, sequence_len=512, log=lines.append)
    assert result.value == pytest.approx(np.mean([task.centered for task in result.tasks]))
    assert result.stderr == pytest.approx(np.sqrt(sum(task.centered_stderr**2 for task in result.tasks)) / 3)
    assert len(lines) == 3
    path = write_results(result, tmp_path / "base_eval", "d4_000010")
    table = list(csv.reader(path.open()))
    assert table[0] == ["Task", "Accuracy", "Centered", "n", "stderr", "Low", "High", "Baseline", "Guess"]
    assert [row[0] for row in table[1:]] == ["multiple_choice", "schema", "language_modeling", "CORE-custom (3 tasks)"]
    assert float(table[-1][2]) == pytest.approx(result.value, abs=1e-6)
    items = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert len(items) == 60
    assert sum(item["correct"] for item in items if item["task"] == "schema") == sum(values(result.tasks[1], "correct"))
    by_line = {item["line"]: item for item in items if item["task"] == "multiple_choice"}
    for line, item in by_line.items():  # the line numbers lead back to the data
        assert item["correct"] == (item["chosen"] == tasks[0].items[line]["gold"])


def test_names(tmp_path):
    def named(labels: list[str]) -> str:
        tasks = []
        for label in labels:
            task = make_task("schema", 3, 0)
            tasks.append(Task(**{**vars(task), "label": label}))
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        return load_bundle(write_bundle(folder, tasks)).name

    labels = sorted(PUBLISHED_TASKS)
    assert len(labels) == 22
    assert named(labels) == "CORE"
    assert named(labels[:10]) == "CORE (10 of 22 tasks)"
    assert named(["offline_x", *labels[:2]]) == "CORE-offline (3 tasks)"


def _score_on_this_rank() -> dict:
    task = make_task("multiple_choice", n=9, num_fewshot=2)
    result = evaluate_task(TinyModel(), ByteTokenizer(), task, CPU, sequence_len=512, device_batch_size=2)
    # with a single item the second rank has nothing to do, and must not hang the first
    single = evaluate_task(TinyModel(), ByteTokenizer(), make_task("schema", 1, 0), CPU, sequence_len=64)
    return {name: values(result, name) for name in ("correct", "chosen", "loss")} | {"single": values(single, "loss")}


def test_two_ranks_agree_with_one():
    alone = _score_on_this_rank()
    for of_rank in run_processes(2, _score_on_this_rank):
        assert of_rank["correct"] == alone["correct"]
        assert of_rank["chosen"] == alone["chosen"]
        np.testing.assert_allclose(of_rank["loss"], alone["loss"], rtol=1e-12)
        np.testing.assert_allclose(of_rank["single"], alone["single"], rtol=1e-12)


# ---- damaged bundles: one line each


def damage_missing_yaml(path: Path) -> None:
    (path / "core.yaml").unlink()


def damage_yaml(path: Path) -> None:
    (path / "core.yaml").write_text("icl_tasks: [")


def damage_empty_yaml(path: Path) -> None:
    (path / "core.yaml").write_text("")


def damage_kind(path: Path) -> None:
    config = path / "core.yaml"
    config.write_text(config.read_text().replace("icl_task_type: schema", "icl_task_type: essay"))


def damage_baseline(path: Path) -> None:
    (path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nother,25\n")


def damage_baseline_value(path: Path) -> None:
    (path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nschema,100\n")


def damage_columns(path: Path) -> None:
    (path / "eval_meta_data.csv").write_text("a,b\n1,2\n")


def damage_data(path: Path) -> None:
    (path / "eval_data/some/schema.jsonl").unlink()


def damage_json(path: Path) -> None:
    file = path / "eval_data/some/schema.jsonl"
    file.write_text(file.read_text()[:-20])


def damage_gold(path: Path) -> None:
    file = path / "eval_data/some/schema.jsonl"
    file.write_text('{"context_options": ["a", "b"], "continuation": "c", "gold": 2}\n')


def damage_field(path: Path) -> None:
    (path / "eval_data/some/schema.jsonl").write_text('{"continuation": "c", "gold": 0}\n')


def damage_marker(path: Path) -> None:
    (path / "bundle.json").write_text("{")


def damage_bytes(path: Path) -> None:
    (path / "eval_data/some/schema.jsonl").write_bytes(b"\xff\xfe\x00")


def damage_list_line(path: Path) -> None:
    (path / "eval_data/some/schema.jsonl").write_text("[1, 2]\n")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_missing_yaml, "core.yaml is missing"),
        (damage_yaml, "damaged"),
        (damage_empty_yaml, "damaged"),
        (damage_kind, "essay"),
        (damage_baseline, "no row in eval_meta_data.csv"),
        (damage_baseline_value, "100.0"),
        (damage_columns, "Eval Task"),
        (damage_data, "schema.jsonl is missing"),
        (damage_json, "schema.jsonl line 3 is not JSON"),
        (damage_gold, "gold 2"),
        (damage_field, "context_options"),
        (damage_marker, "bundle.json is damaged"),
        (damage_bytes, "damaged"),
        (damage_list_line, "damaged"),
    ],
)
def test_damaged_bundle_is_one_clear_line(tmp_path, damage, word):
    write_bundle(tmp_path, [make_task("schema", 3, 0)])
    load_bundle(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=word):
        load_bundle(tmp_path)


@pytest.mark.skipif(not (DATA / "eval_bundle").is_dir(), reason=f"no real bundle at {DATA / 'eval_bundle'}")
def test_real_bundle_runs():
    bundle = load_bundle(DATA / "eval_bundle")
    assert bundle.name == "CORE (10 of 22 tasks)"
    assert sum(len(task.items) for task in bundle.tasks) == 15_869
    result = evaluate_core(TinyModel(), ByteTokenizer(), bundle, CPU, sequence_len=1024, max_per_task=6)
    assert [task.n for task in result.tasks] == [6] * 10
    for task, scored in zip(bundle.tasks[:4], result.tasks[:4], strict=True):
        few = Task(**{**vars(task), "num_fewshot": scored.num_fewshot})
        expected = slow_task(TinyModel(), ByteTokenizer(), few, 1024, 6)
        assert values(scored, "correct") == [correct for correct, _, _ in expected]


# ---- items and tables from elsewhere: refused in one line, or scored without an error

GOOD_ITEMS = {
    "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 1},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a", "continuation": "b"},
}


def write_item(path: Path, kind: str, line: bytes, **entry) -> Path:
    """A bundle of one task with a good item on line 1 and `line` on line 2."""
    write_bundle(path, [Task(**{**vars(make_task(kind, 1, 0)), "items": [GOOD_ITEMS[kind]]})])
    with (path / f"eval_data/some/{kind}.jsonl").open("ab") as stream:
        stream.write(line + b"\n")
    config = yaml.safe_load((path / "core.yaml").read_text())
    config["icl_tasks"][0] |= entry
    (path / "core.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("language_modeling", {"context": None}, "context is None, expected text"),
        ("language_modeling", {"context": 5}, "context is 5, expected text"),
        ("language_modeling", {"continuation": 42}, "continuation is 42, expected text"),
        ("language_modeling", {"continuation": " "}, "the text to score is empty"),
        ("multiple_choice", {"choices": "ab"}, "choices is 'ab', expected a list of texts"),
        ("multiple_choice", {"choices": ["a", 2]}, r"choices is \['a', 2\], expected a list of texts"),
        ("multiple_choice", {"choices": []}, "gold 1 is not one of 0 options"),
        ("multiple_choice", {"choices": ["a"], "gold": 0}, "gold 0 is not one of 1 options"),
        ("multiple_choice", {"choices": {"text": ["a", "b"]}}, "choices is {.*}, expected a list of texts"),
        ("multiple_choice", {"gold": 2}, "gold 2 is not one of 2 options"),
        ("multiple_choice", {"gold": -1}, "gold -1 is not one of 2 options"),
        ("multiple_choice", {"gold": "1"}, "gold is '1', expected a whole number"),
        ("multiple_choice", {"gold": True}, "gold is True, expected a whole number"),
        ("multiple_choice", {"gold": None}, "gold is None, expected a whole number"),
        ("multiple_choice", {"query": ["q"]}, r"query is \['q'\], expected text"),
        ("multiple_choice", {"query": "", "choices": ["", "a"]}, "the text to score is empty"),
        ("schema", {"context_options": [None, "b"]}, r"context_options is \[None, 'b'\], expected a list of texts"),
        ("schema", {"continuation": None}, "continuation is None, expected text"),
        ("schema", {"continuation": ""}, "the text to score is empty"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named_with_its_line(tmp_path, kind, change, message):
    write_item(tmp_path, kind, json.dumps(GOOD_ITEMS[kind] | change).encode())
    with pytest.raises(UserError, match=rf"{kind}\.jsonl line 2: {message}") as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[" * 200_000, r"line 2 is not JSON \(nested deeper than 64 levels\)"),
        (b'{"context": ' * 800 + b"1" + b"}" * 800, r"line 2 is not JSON \(nested deeper"),
        (b'{"context": "\xff", "continuation": "b"}', "line 2 is not JSON .*utf-8"),
        (b"null", "line 2: None, expected an object with context, continuation"),
        (b"9" * 5000, "line 2 is not JSON"),
        (b'{"context": "' + b"x" * 10**6 + b'"}', "line 2: lacks continuation"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line, message):
    write_item(tmp_path, "language_modeling", line)
    with pytest.raises(UserError, match=rf"language_modeling\.jsonl {message}") as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"continuation_delimiter": None}, "task schema: continuation_delimiter is None, expected text"),
        ({"continuation_delimiter": 5}, "task schema: continuation_delimiter is 5, expected text"),
        ({"num_fewshot": None}, "task schema: num_fewshot is None"),
        ({"num_fewshot": []}, r"task schema: num_fewshot is \[\]"),
        ({"num_fewshot": ["5"]}, "task schema: num_fewshot is '5'"),
        ({"num_fewshot": -1}, "task schema: num_fewshot is -1, expected 0 to"),
        ({"num_fewshot": 10**30}, "task schema: num_fewshot is 10*, expected 0 to"),
        ({"num_fewshot": float("inf")}, "task schema: num_fewshot is inf"),
        ({"label": 5}, "label is 5, expected text"),
        ({"label": "a\x1b[31m"}, "its label is not printable"),
        ({"icl_task_type": "essay"}, "unknown icl_task_type 'essay', expected multiple_choice, schema"),
        ({"icl_task_type": ["schema"]}, "icl_task_type is .*expected text"),
        ({"dataset_uri": 5}, "dataset_uri is 5, expected text"),
        ({"dataset_uri": ""}, "is missing"),
        ({"dataset_uri": "../../../../.bashrc"}, r"'../../../../.bashrc' leads out of .*eval_data"),
        ({"dataset_uri": "../core.yaml"}, "leads out of"),
        ({"dataset_uri": "some/../../../tokenizer/meta.json"}, "leads out of"),
        ({"dataset_uri": "/etc/passwd"}, "leads out of"),
        ({"dataset_uri": "a\0b"}, "leads out of"),
        ({"dataset_uri": "x" * 300}, "x{100} is missing"),
    ],
)
def test_a_task_that_cannot_be_run_is_named(tmp_path, entry, message):
    write_item(tmp_path, "schema", b"", **entry)
    with pytest.raises(UserError, match=f"damaged .*{message}") as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", ["eval_data", "eval_data/some", "eval_data/some/schema.jsonl", "core.yaml"])
def test_links_out_of_a_bundle_are_refused_and_within_it_followed(tmp_path, link):
    path = write_bundle(tmp_path / "bundle", [make_task("schema", 3, 0)])
    (path / link).rename(tmp_path / "elsewhere")
    (path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        load_bundle(path)
    (path / link).unlink()
    (tmp_path / "elsewhere").rename(path / "beside")
    (path / link).symlink_to(path / "beside")
    if link.startswith("eval_data/some/"):
        with pytest.raises(UserError, match="leads out of"):  # of eval_data
            load_bundle(path)
    (tmp_path / "linked").symlink_to(write_bundle(tmp_path / "whole", [make_task("schema", 3, 0)]))
    assert load_bundle(tmp_path / "linked").tasks[0].uri == "some/schema.jsonl"


def explosion(line, first, depth=30):
    """YAML of a few hundred bytes in which each value holds the one before it twice."""
    lines = [f"a0: &a0 {first}", *(f"a{n + 1}: &a{n + 1} {line.format(n)}" for n in range(depth))]
    return "\n".join([*lines, f"icl_tasks: [*a{depth}]"]).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("core.yaml", b"[" * 20_000, "nested too deeply"),
        ("core.yaml", b"\xff\xfe", "core.yaml is not UTF-8"),
        ("core.yaml", b"icl_tasks: {a: 1}", "icl_tasks is .*expected a list"),
        ("core.yaml", b"icl_tasks: [5]", "5, expected an object with label"),
        ("core.yaml", b"icl_tasks: [!!timestamp x]", "damaged"),
        ("core.yaml", b"icl_tasks: [!!int '']", "damaged"),
        ("core.yaml", b"icl_tasks: &a [*a]", "expected an object with label"),
        ("core.yaml", b"icl_tasks: [&a {<<: [&b {<<: [*a, *a], c: *a}, *b, *b, *a], d: *b}]", "lacks label"),
        ("core.yaml", explosion("{{<<: [*a{0}, *a{0}]}}", "{b: 1}"), "once aliases are written out"),
        ("core.yaml", explosion("{{<<: *a{0}, c{0}: *a{0}}}", "{b: 1}"), "once aliases are written out"),
        ("core.yaml", explosion("[*a{0}, *a{0}]", "5"), "once aliases are written out"),
        ("core.yaml", explosion("{{? [*a{0}, *a{0}] : *a{0}}}", "5"), "once aliases are written out"),
        ("core.yaml", b"icl_tasks: [" + b"1:" * 200_000 + b"1]", "core.yaml has more than 262,144 characters"),
        ("eval_meta_data.csv", b"\xff", "eval_meta_data.csv is not UTF-8"),
        ("eval_meta_data.csv", b"Eval Task,Random baseline\nschema,nan\n", "baseline nan"),
        ("eval_meta_data.csv", b"Eval Task,Random baseline\nschema\n", "damaged"),
        ("eval_meta_data.csv", b"Eval Task,Random baseline\nschema," + b"1" * 200_000, "damaged"),
        ("bundle.json", b"[" * 20_000, "bundle.json is damaged"),
        ("bundle.json", b'{"kind": "<b>", "source": ""}', "bundle.json is damaged: kind '<b>'"),
        ("bundle.json", b'{"kind": "offline", "source": 5}', "bundle.json is damaged .source is 5"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, name, content, message):
    (write_bundle(tmp_path, [make_task("schema", 3, 0)]) / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value)


def test_aliases_and_merge_keys_of_an_honest_bundle_are_read(tmp_path):
    path = write_bundle(tmp_path, [make_task("schema", 3, 0), make_task("language_modeling", 3, 1)])
    expected = load_bundle(path)
    first, second = yaml.safe_load((path / "core.yaml").read_text())["icl_tasks"]
    common, first_rest = {"num_fewshot": first.pop("num_fewshot")}, first
    text = f"common: &c {json.dumps(common)}\nicl_tasks:\n- {{<<: *c, {json.dumps(first_rest)[1:-1]}}}\n"
    (path / "core.yaml").write_text(f"{text}- {{<<: [*c, *c], {json.dumps(second)[1:-1]}}}\n")
    assert load_bundle(path) == expected


def test_a_bom_and_windows_line_ends_change_nothing(tmp_path):
    path = write_bundle(tmp_path, [make_task("multiple_choice", 5, 1, delimiter="\nAnswer: ")])
    plain = load_bundle(path)
    for file in (path / "core.yaml", path / "eval_meta_data.csv", path / "eval_data/some/multiple_choice.jsonl"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load_bundle(path) == plain


def test_without_a_delimiter_the_layout_has_a_space_and_an_empty_one_is_kept(tmp_path):
    assert load_bundle(write_item(tmp_path / "a", "schema", b"", continuation_delimiter="")).tasks[0].delimiter == ""
    config = tmp_path / "a" / "core.yaml"
    config.write_text(config.read_text().replace("continuation_delimiter:", "another_key:"))
    assert load_bundle(tmp_path / "a").tasks[0].delimiter == " "


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(st.characters(codec=None), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
FIELD_NAMES = sorted({name for item in GOOD_ITEMS.values() for name in item})


@given(
    st.sampled_from(sorted(GOOD_ITEMS)),
    st.dictionaries(st.sampled_from(FIELD_NAMES), JSON | st.just(["", "a b"]), max_size=3),
    st.sampled_from(["", " ", "\nAnswer: "]),
    st.integers(0, 2),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_item_is_refused_or_scored(tmp_path_factory, kind, change, delimiter, shots):
    item = GOOD_ITEMS[kind] | change
    path = tmp_path_factory.mktemp("bundle")
    write_item(path, kind, json.dumps(item).encode(), continuation_delimiter=delimiter, num_fewshot=shots)
    try:
        bundle = load_bundle(path)
    except UserError as error:
        assert f"{kind}.jsonl line 2" in str(error) and "\n" not in str(error)
        return
    (score,) = evaluate_core(TinyModel(), ByteTokenizer(), bundle, CPU, sequence_len=64).tasks
    assert score.n == 2 and all(np.isfinite(values(score, "loss")))
