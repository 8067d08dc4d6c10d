"""chat.py and its script: batches against single items, the estimator, several ranks, what is written."""

import csv
import itertools
import json
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import cli, report, sandbox
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.eval import chat
from nanochat.eval.chat import (
    ChatScore,
    chat_core,
    chosen_items,
    evaluate_categorical,
    evaluate_generative,
    pass_at_k,
    write_results,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import checkpoint_dir, run_dir, tokenizer_dir
from nanochat.tasks import registry
from nanochat.tasks.common import Task, multiple_choice
from nanochat.tasks.registry import CHATCORE_TASKS, parse_tasks
from nanochat.tokenizer import RustBPETokenizer
from scripts import chat_eval as script
from tests.checkpoints import save_checkpoint
from tests.processes import run_processes

CPU = torch.device("cpu")
TOKENIZER = RustBPETokenizer.train_from_iterator(["which of them? a choice, and a longer choice"], 280)
VOCAB = TOKENIZER.get_vocab_size()


def text(seed: int) -> str:
    """A few words, of a length that differs a lot from seed to seed."""
    rng = random.Random(seed)
    return " ".join(rng.choice(["which", "of", "them", "choice", "longer"]) for _ in range(rng.randint(1, 40)))


class Pick(Task):
    """Multiple choice, with two to four letters."""

    name, eval_type, baseline, source = "Pick", "categorical", 0.25, "made up"

    def __init__(self, n: int = 20) -> None:
        super().__init__()
        self.n = n

    def num_examples(self) -> int:
        return self.n

    def get_example(self, index: int) -> dict:
        letters = "ABCD"[: 2 + index % 3]
        return multiple_choice(text(index), [f"choice {letter}" for letter in letters], letters, letters[index % 2])


class Say(Task):
    """Open questions; the right answer is the index, or, from a model that knows nothing, an even number of letters."""

    name, eval_type, source = "Say", "generative", "made up"

    def __init__(self, n: int = 20, exact: bool = True) -> None:
        super().__init__()
        self.n, self.exact = n, exact

    def num_examples(self) -> int:
        return self.n

    def get_example(self, index: int) -> dict:
        messages = [{"role": "user", "content": text(index)}, {"role": "assistant", "content": str(index)}]
        return {"messages": messages}

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"] if self.exact else len(completion) % 2 == 0


class TinyModel:
    """Random, causal, and dependent on the whole past; float64, so that padding cannot change a ranking."""

    def __init__(self, sequence_len: int = 512) -> None:
        generator = torch.Generator().manual_seed(3)
        self.wte = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64)
        self.head = torch.randn(8, VOCAB, generator=generator, dtype=torch.float64)
        self.config = SimpleNamespace(sequence_len=sequence_len)
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, idx: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(idx.shape))
        steps = torch.arange(1, idx.size(1) + 1, dtype=torch.float64)[:, None]
        return torch.tanh(self.wte[idx].cumsum(dim=1) / steps.sqrt()) @ self.head


class ScriptedEngine:
    """Answers with texts given beforehand: answers[index][sample]; knows the items by their prompts."""

    def __init__(self, task: Task, answers: dict[int, list[str]], sequence_len: int = 1024) -> None:
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=sequence_len))
        self.tokenizer = TOKENIZER
        self.index = {tuple(TOKENIZER.render_for_completion(task[i])): i for i in range(len(task))}
        self.answers_given = answers
        self.calls: list[dict] = []

    def answers(self, prompts, sampling, seeds, limits, rows):
        items = [self.index[tuple(prompt)] for prompt in prompts]
        self.calls.append({"items": items, "seeds": seeds, "rows": rows})
        for number in reversed(range(len(items))):  # in an order of its own
            prompt = list(prompts[number])
            texts = self.answers_given[items[number]][: sampling.num_samples]
            answers = [TOKENIZER.encode(text)[: limits[number]] for text in texts]
            yield number, [prompt + ids for ids in answers], [[0] * len(prompt) + [1] * len(ids) for ids in answers]


def generative(engine, task: Task, **changes) -> ChatScore:
    drawn = {"num_samples": 1, "max_new_tokens": 8, "temperature": 0.0, "top_k": 50}
    drawn |= {name: changes.pop(name) for name in drawn.keys() & changes.keys()}
    return evaluate_generative(engine, task, Sampling(**drawn), **{"batch_size": 4, **changes})


# ---- multiple choice


def slow_choices(model, task: Task, sequence_len: int) -> list[str]:
    """One prompt a forward, nothing padded."""
    chosen = []
    for index in range(len(task)):
        tokens = TOKENIZER.render_for_completion(task[index])
        if len(tokens) > sequence_len:
            tokens = [TOKENIZER.get_bos_token_id(), *tokens[-(sequence_len - 1) :]]
        logits = model(torch.tensor([tokens]))[0, -1]
        chosen.append(max(task[index]["letters"], key=lambda letter: float(logits[TOKENIZER.encode(letter)[0]])))
    return chosen


@pytest.mark.parametrize(("batch_size", "sequence_len"), [(1, 512), (4, 512), (100, 512), (3, 100)])
def test_batched_choices_equal_one_item_at_a_time(batch_size, sequence_len):
    task, model = Pick(), TinyModel(sequence_len)
    expected = slow_choices(TinyModel(sequence_len), task, sequence_len)
    score = evaluate_categorical(model, TOKENIZER, task, CPU, batch_size=batch_size)
    assert [record["chosen"] for record in score.records] == expected
    assert len(set(expected)) > 1
    assert [record["index"] for record in score.records] == list(range(20))
    assert sum(rows for rows, _ in model.shapes) == 20 and max(rows for rows, _ in model.shapes) <= batch_size
    assert all(width % 64 == 0 or width == sequence_len for _, width in model.shapes)
    assert model.shapes[0][1] == max(width for _, width in model.shapes) <= sequence_len
    for record in score.records:
        assert record["expected"] == "AB"[record["index"] % 2]
        assert record["passed"] == (record["chosen"] == record["expected"])


def test_long_prompts_keep_their_start_token_and_their_end():
    rows = []

    class Recorder(TinyModel):
        def __call__(self, idx):
            rows.extend(idx.tolist())
            return super().__call__(idx)

    task = Pick(6)
    evaluate_categorical(Recorder(40), TOKENIZER, task, CPU, batch_size=4)
    whole = [TOKENIZER.render_for_completion(task[i]) for i in range(6)]
    assert min(map(len, whole)) > 40
    assert sorted(rows) == sorted([TOKENIZER.get_bos_token_id(), *tokens[-39:]] for tokens in whole)


def test_only_the_letters_of_the_item_count():
    """The likeliest token is no letter, the second is D: items without D must take the third, B."""

    class Prefers(TinyModel):
        def __call__(self, idx):
            logits = torch.zeros(*idx.shape, VOCAB)
            for token, value in (("z", 9.0), ("D", 5.0), ("B", 3.0)):
                logits[..., TOKENIZER.encode(token)[0]] = value
            return logits

    score = evaluate_categorical(Prefers(), TOKENIZER, Pick(12), CPU, batch_size=5)
    assert "".join(record["chosen"] for record in score.records) == "BBD" * 4
    # B is right at odd items; of those 2, 5, 8 and 11 have a D
    assert [record["index"] for record in score.records if record["passed"]] == [1, 3, 7, 9]
    p = 4 / 12
    assert score.n == 12 and score.accuracy == pytest.approx(p)
    assert score.stderr == pytest.approx((p * (1 - p) / 12 + 1 / (4 * 12**2)) ** 0.5 / (1 + 1 / 12))
    assert score.centered == pytest.approx((p - 0.25) / 0.75)
    assert score.centered_stderr == pytest.approx(score.stderr / 0.75)
    assert score.pass_at == {} and (score.name, score.eval_type, score.published) == ("Pick", "categorical", False)


def test_a_letter_of_two_tokens_is_an_error():
    class Roman(Pick):
        def get_example(self, index):
            return multiple_choice("which?", ["a", "b"], ["I", "Zq"], "I")

    with pytest.raises(UserError, match=f"'Zq' is 2 tokens in tokenizer {TOKENIZER.hash}"):
        evaluate_categorical(TinyModel(), TOKENIZER, Roman(), CPU, batch_size=2)


def test_a_subset_is_the_same_for_all_and_spread():
    task = Pick(100)
    few = chosen_items(task, 10)
    assert few == chosen_items(task, 20)[:10] and len(set(few)) == 10 and max(few) > 50
    task.published = True  # its order is the published one
    assert chosen_items(task, 10) == list(range(10))
    task.published = False
    assert sorted(chosen_items(task, 1000)) == chosen_items(task) == list(range(100))
    score = evaluate_categorical(TinyModel(), TOKENIZER, task, CPU, batch_size=4, max_problems=10)
    assert [record["index"] for record in score.records] == sorted(few)
    with pytest.raises(UserError, match="Pick: no items"):
        chosen_items(Pick(0))


# ---- open questions


def test_generated_answers_are_graded_one_by_one():
    task = Say(7)
    answers = {i: [str(i) if (i + j) % 3 == 0 else "no" for j in range(4)] for i in range(7)}
    engine = ScriptedEngine(task, answers)
    score = generative(engine, task, num_samples=2, temperature=1.0, batch_size=3, seed=100)
    for i, record in enumerate(score.records):
        assert record["index"] == i and record["completions"] == answers[i][:2]
        assert record["samples_passed"] == [answer == str(i) for answer in answers[i][:2]]
        assert record["passed"] == (str(i) in answers[i][:2])
    assert score.accuracy == pytest.approx(5 / 7) and score.num_samples == 2
    (call,) = engine.calls
    assert call["seeds"] == [100 + 2 * item for item in call["items"]] and call["rows"] == 6
    lengths = [len(TOKENIZER.render_for_completion(task[item])) for item in call["items"]]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 7


def test_answers_end_where_the_context_does():
    task = Say(12)
    prompt = [len(TOKENIZER.render_for_completion(task[i])) for i in range(12)]
    limit = sorted(prompt)[8]  # four items or so have no room at all
    engine = ScriptedEngine(task, {i: ["x" * 50] for i in range(12)}, sequence_len=limit)
    for batch_size in (1, 5, 12):
        score = generative(engine, task, max_new_tokens=30, batch_size=batch_size)
        for record, length in zip(score.records, prompt, strict=True):
            if length < limit:
                assert record["completions"] == ["x" * min(30, limit - length)] and "error" not in record
            else:
                assert record["completions"] == record["samples_passed"] == [] and record["passed"] is False
                assert f"prompt of {length} tokens leaves no room" in record["error"]
        assert sum("error" in record for record in score.records) >= 4
        assert score.pass_at == {1: 0.0}


def tiny_gpt() -> GPT:
    model = GPT(GPTConfig(sequence_len=110, vocab_size=VOCAB, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight" or name.endswith("c_proj.weight"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("temperature", "num_samples"), [(0.0, 1), (1.0, 3)])
def test_answers_do_not_depend_on_the_batch(temperature, num_samples):
    engine, task = Engine(tiny_gpt(), TOKENIZER), Say(9, exact=False)
    options = {"temperature": temperature, "num_samples": num_samples, "max_new_tokens": 12}
    slow, rooms = {}, []
    for index in range(9):  # one prompt a call
        prompt = TOKENIZER.render_for_completion(task[index])
        room = min(12, engine.model.config.sequence_len - len(prompt))
        rooms.append(room)
        if room > 0:
            sequences, _ = engine.generate_batch(
                prompt, num_samples, max_tokens=room, temperature=temperature, top_k=50, seed=5 + index * num_samples
            )
            slow[index] = [TOKENIZER.decode(sequence[len(prompt) :]) for sequence in sequences]
    for batch_size in (2, 9):
        score = generative(engine, task, batch_size=batch_size, seed=5, **options)
        assert {r["index"]: r["completions"] for r in score.records if r["completions"]} == slow
    assert any(0 < room < 12 for room in rooms)
    assert len({answer for answers in slow.values() for answer in answers}) > num_samples


# ---- pass@k and composites


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_average_over_all_choices_of_k(outcomes, data):
    k = data.draw(st.integers(1, len(outcomes)))
    picks = list(itertools.combinations(outcomes, k))
    assert pass_at_k(len(outcomes), sum(outcomes), k) == pytest.approx(sum(map(any, picks)) / len(picks))


def score_of(name: str, passed: list, baseline: float = 0.0, published: bool = True, kind: str = "categorical"):
    records = [{"index": i, "passed": bool(p), "chosen": "A", "expected": "B"} for i, p in enumerate(passed)]
    return ChatScore(
        name=name, eval_type=kind, baseline=baseline, published=published, source="somewhere", records=records
    )


def test_pass_at_of_a_task():
    samples = [[True, False, False], [False, False, False], [True, True, False]]
    records = [
        {"index": i, "passed": any(s), "completions": ["a"] * 3, "samples_passed": s} for i, s in enumerate(samples)
    ]
    score = ChatScore(name="GSM8K", eval_type="generative", baseline=0.0, published=True, source="x", num_samples=3,
                      records=records)  # fmt: skip
    assert score.pass_at == pytest.approx({1: (1 / 3 + 0 + 2 / 3) / 3, 2: (2 / 3 + 0 + 1) / 3, 3: 2 / 3})
    assert score.pass_at[3] == pytest.approx(score.accuracy)
    assert score.pass_at_stderr(3) == pytest.approx(score.stderr)  # 0 or 1 an item
    assert 0 < score.pass_at_stderr(1) < score.stderr  # the mean of several samples spreads less


def test_composites_are_named_by_what_they_stand_on():
    five = [score_of(name, [1, 1, 0, 0], 0.25 if i < 3 else 0.0) for i, name in enumerate(CHATCORE_TASKS)]
    (whole,) = chat_core(five)
    assert whole.name == "ChatCORE" and whole.value == pytest.approx((3 * (0.25 / 0.75) + 2 * 0.5) / 5)
    assert whole.stderr == pytest.approx(five[4].stderr * np.sqrt(3 / 0.75**2 + 2) / 5)
    assert [task.name for task in whole.tasks] == list(CHATCORE_TASKS)
    other = [score_of("SpellingBee", [1, 0], published=False), score_of("Else", [1, 1], published=True)]
    part, offline = chat_core([*five[1:3], *other])
    assert part.name == "ChatCORE (2 of 5 tasks)" and [task.name for task in part.tasks] == ["ARC-Challenge", "MMLU"]
    assert offline.name == "ChatCORE-offline" and [task.name for task in offline.tasks] == ["SpellingBee"]
    assert offline.value == 0.5
    assert chat_core(other[1:]) == chat_core([]) == []


def test_written_files(tmp_path):
    task = Say(3)
    said = generative(ScriptedEngine(task, {i: [str(i * (i != 1)), "ü\n"] for i in range(3)}), task, num_samples=2)
    picked = evaluate_categorical(TinyModel(), TOKENIZER, Pick(5), CPU, batch_size=2)
    composites = chat_core([said, picked])
    path = write_results([said, picked], composites, tmp_path / "chat_eval", "sft_d4_000010")
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["task"] for line in lines] == ["Say"] * 3 + ["Pick"] * 5
    assert lines[1] == {
        "task": "Say",
        "index": 1,
        "passed": False,
        "completions": ["0", "ü\n"],
        "samples_passed": [False, False],
    }
    assert lines[3] == {"task": "Pick", **picked.records[0]}
    header, *rows = csv.reader(path.open())
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["Task"] for row in table] == ["Say", "Pick", "ChatCORE-offline"]
    assert [row["n"] for row in table] == ["3", "5", "8"]
    assert float(table[1]["Low"]) < float(table[1]["Accuracy"]) < float(table[1]["High"])
    assert float(table[0]["Accuracy"]) == pytest.approx(2 / 3, abs=1e-6) and table[0]["Samples"] == "2"
    assert float(table[2]["Centered"]) == pytest.approx(composites[0].value, abs=1e-6)
    assert sorted(file.name for file in path.parent.iterdir()) == ["sft_d4_000010.csv", "sft_d4_000010.jsonl"]


# ---- several ranks


def _score_on_this_rank() -> list:
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER)
    picked = evaluate_categorical(model, TOKENIZER, Pick(9), CPU, batch_size=2, max_problems=7)
    said = generative(engine, Say(9, exact=False))
    sampled = generative(engine, Say(9, exact=False), num_samples=2, temperature=1.0, max_problems=5)
    # with a single item the second rank has nothing to do, and must not hang the first
    single = generative(engine, Say(1, exact=False))
    return [score.records for score in (picked, said, sampled, single)]


def test_two_ranks_agree_with_one():
    alone = _score_on_this_rank()
    assert [len(records) for records in alone] == [7, 9, 5, 1]
    assert run_processes(2, _score_on_this_rank) == [alone, alone]


# ---- the script


class Published(Pick):
    name, published = "MMLU", True


class Absent(Pick):
    name = "ARC-Easy"

    def num_examples(self):
        raise UserError("no data of ARC-Easy in the store: run `python -m scripts.chat_data`")


class Talk(Say):
    name, eval_type = "SmolTalk", None


TASKS = {"MMLU": Published, "ARC-Easy": Absent, "SmolTalk": Talk, "Say": lambda: Say(6, exact=False)}


@pytest.fixture
def trained(store, monkeypatch):
    """A store with an untrained sft checkpoint, and stand-ins for the tasks."""
    monkeypatch.setenv("NANOCHAT_RUN_ID", "test")
    TOKENIZER.save(tokenizer_dir())
    model = tiny_gpt()
    meta = {"model_config": vars(model.config), "settings": {"source": "pydocs"}, "tokenizer_hash": TOKENIZER.hash}
    save_checkpoint(checkpoint_dir("sft", "d2"), 7, model, None, meta)
    sources = []

    def make_task(name, split, source=None):
        sources.append((split, source))
        return TASKS[name]()

    def parse_tasks(spec, split, source):
        return [make_task(name, split, source) for name in spec.replace("|", ",").split(",")]

    monkeypatch.setattr(chat, "make_task", make_task)
    monkeypatch.setattr(chat, "parse_tasks", parse_tasks)
    monkeypatch.setattr(chat, "GRADED_TASKS", [name for name in TASKS if name != "SmolTalk"])
    return store, sources


def run_script(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["chat_eval", *words, "--device-type=cpu"])
    cli.run(script.main, script.Settings)


def section() -> dict:
    (found,) = report.read_sections(run_dir())
    assert found["stage"] == "chat_eval_sft"
    return {**found, "notes": report.notes(found)}


def test_script_scores_what_has_data_and_reports(trained, monkeypatch, capsys):
    store, sources = trained
    run_script(monkeypatch, "-i", "sft", "-m", "8", "-b", "4")
    out = capsys.readouterr().out
    (left_out,) = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert left_out == f"left out: ARC-Easy: {_message(Absent)}"
    assert set(sources) == {("test", "pydocs")}
    found = section()
    table = found["tables"][0]
    assert [row[0] for row in table["rows"]] == ["MMLU", "Say"] and len(found["tables"]) == 1
    row = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert row["Items"] == 20 and row["Source"] == "made up"
    assert row["Guessing %"] == 50 and row["Guess"] == "always A"  # measured: half of the right answers are
    assert row["Centered"] == pytest.approx(2 * row["Accuracy"] - 1)
    metrics = found["metrics"]
    assert metrics["MMLU"] == row["Accuracy"] and metrics["MMLU standard error"] == row["Standard error"] > 0
    assert metrics["ChatCORE (1 of 5 tasks)"] == row["Centered"]
    assert metrics["ChatCORE-offline"] == metrics["Say"] and metrics["step"] == 7
    assert found["synthetic"] is True and found["settings"]["stage"] == "sft"
    (path,) = (store / "chat_eval").glob("*.csv")
    assert re.fullmatch(r"sft_d2_000007_[0-9a-f]{8}\.csv", path.name) and f"wrote {path}\n" in out
    records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    first = {name: next(r for r in records if r["task"] == name) for name in ("MMLU", "Say")}
    assert [sample["prompt"].split("]")[0] for sample in found["samples"]] == ["[Say", "[MMLU"]
    assert found["samples"][0]["text"] == first["Say"]["completions"][0]
    assert found["samples"][1]["text"].startswith(f"{first['MMLU']['chosen']} (right answer: A)")
    notes = " ".join(found["notes"])
    for words in ("MMLU (50 %)", "Say (0 %)", "Wilson", "not comparable", "Left out: ARC-Easy"):
        assert words in notes
    assert "sandbox" not in notes and "At most" not in notes
    assert [row[0] for row in csv.reader(path.open())][1:] == [
        "MMLU", "Say", "ChatCORE (1 of 5 tasks)", "ChatCORE-offline"]  # fmt: skip


def _message(task: type[Task]) -> str:
    with pytest.raises(UserError) as error:
        task().num_examples()
    return str(error.value)


def test_script_samples_named_tasks(trained, monkeypatch, capsys):
    run_script(
        monkeypatch, "--source=sft", "-a", "Say", "-t", "1.0", "-n", "4", "-x", "5", "-m", "6", "-g", "d2", "-s", "7"
    )
    found = section()
    assert "left out" not in capsys.readouterr().out
    assert found["tables"][1]["columns"] == ["Task", "pass@1", "pass@2", "pass@3", "pass@4"]
    name, *rates = found["tables"][1]["rows"][0]
    assert name == "Say" and rates == sorted(rates) and rates[-1] == pytest.approx(found["metrics"]["Say"])
    assert any("any of 4 samples" in note for note in found["notes"])
    assert any("At most 5 items" in note for note in found["notes"])
    assert "ChatCORE-offline" in found["metrics"]


class Code(Say):
    name, published, runs_code = "HumanEval", True, True


@pytest.fixture
def with_code(trained, monkeypatch):
    """HumanEval, not graded by running anything, on a kernel without layers."""
    monkeypatch.setitem(TASKS, "HumanEval", lambda: Code(3))
    monkeypatch.setattr(chat, "GRADED_TASKS", [name for name in TASKS if name != "SmolTalk"])
    monkeypatch.setattr(sandbox, "isolation_level", sandbox.Isolation)
    monkeypatch.delenv(sandbox.ALLOW_UNSAFE, raising=False)
    return trained


def test_script_says_where_code_ran(with_code, monkeypatch, capsys):
    for module in (sandbox, script):
        monkeypatch.setattr(module, "isolation_level", lambda: sandbox.Isolation(landlock=7, seccomp=True))
    run_script(monkeypatch, "-i", "sft", "-a", "HumanEval", "-m", "4")
    console = capsys.readouterr().out.splitlines()
    said = console.index("model-written code runs in this sandbox: process limits, Landlock (ABI 7), seccomp")
    assert console[said + 1].startswith("HumanEval (")  # before it does
    assert "Model-written code ran in this sandbox: process limits, Landlock (ABI 7), seccomp." in section()["notes"]
    assert section()["synthetic"] is False


def test_script_runs_code_without_a_sandbox_when_told_and_says_so(with_code, monkeypatch, capsys):
    monkeypatch.setenv(sandbox.ALLOW_UNSAFE, "0")  # taken back afterwards
    monkeypatch.setattr(script, "isolation_level", sandbox.Isolation)
    run_script(monkeypatch, "-i", "sft", "-a", "HumanEval", "-m", "4", "--unsafe-exec")
    danger = "this kernel grants no namespaces, Landlock or seccomp, so model-written code could reach your files"
    console = capsys.readouterr().out
    assert console.index(f"WARNING: HumanEval: {danger}") < console.index("HumanEval (")
    assert any(danger.replace("this kernel grants", "This kernel granted") in note for note in section()["notes"])


def test_without_a_sandbox_the_other_tasks_are_scored(with_code, monkeypatch, capsys):
    run_script(monkeypatch, "-i", "sft", "-m", "4")
    out = capsys.readouterr().out
    assert "HumanEval: this kernel grants no namespaces, Landlock or seccomp" in out and "runs in this" not in out
    assert [row[0] for row in section()["tables"][0]["rows"]] == ["MMLU", "Say"]
    assert any(note.startswith("Left out: HumanEval: this kernel grants no") for note in section()["notes"])


def test_without_a_sandbox_named_code_is_refused_before_anything_is_scored(with_code, monkeypatch, capsys):
    monkeypatch.setattr(script, "evaluate", None)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "-i", "sft", "-a", "MMLU|HumanEval")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: this kernel grants no namespaces") and "NANOCHAT_ALLOW_UNSAFE_CODE=1" in line


def test_a_question_without_a_reference_answer_is_shown(trained, monkeypatch):
    class Open(Say):
        def get_example(self, index):
            return {"messages": [{"role": "user", "content": f"which {index}?"}]}

        def evaluate(self, conversation, completion):
            return False

    monkeypatch.setitem(TASKS, "Say", lambda: Open(2))
    run_script(monkeypatch, "-i", "sft", "-a", "Say", "-m", "4")
    assert section()["samples"][0]["prompt"] == "[Say] which 0?"


def test_evaluations_with_other_settings_have_files_of_their_own():
    meta = {"tag": "d2", "step": 7}

    def name(tasks=(), **changes):
        return script.result_name(script.Settings(stage="sft", **changes), meta, list(tasks))

    assert name() == name(batch_size=3, device_type="cpu", model_tag="d2") == name(top_k=5, seed=1) == "sft_d2_000007"
    changes = [{"max_problems": 9}, {"max_problems": 8}, {"max_new_tokens": 9}, {"temperature": 0.5}]
    changes += [
        {"temperature": 0.5, "seed": 1},
        {"temperature": 0.5, "top_k": 1},
        {"temperature": 0.5, "num_samples": 2},
    ]
    names = [name(**change) for change in changes]
    names += [name([Say(9)], task_name="Say"), name([Say(8)], task_name="Say:8"), name([Pick(9)], task_name="Pick")]
    assert all(re.fullmatch(r"sft_d2_000007_[0-9a-f]{8}", one) for one in names) and len(set(names)) == len(names)
    assert name([Say(), Pick()], task_name="Say|Pick") == name([Pick(), Say()], task_name="Pick,Say")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-b", "4"], 2, "--stage requires an argument"),
        (["-i", "base"], 2, 'Choose from: "mid", "sft", "rl"'),
        (["-i", "sft", "-n", "2"], 1, "--num-samples=2 at --temperature=0: all answers would be the same"),
        (["-i", "sft", "-t", "-1"], 2, 'Invalid value "-1.0" for -t. Must be >= 0.'),
        (["-i", "mid"], 1, "no mid checkpoint"),
        (["-i", "sft", "-g", "d9"], 1, "no sft checkpoint tagged d9"),
        (["-i", "sft", "-s", "8"], 1, "there are: step 7"),
        (["-i", "sft", "-a", "SmolTalk"], 1, "SmolTalk has no answers to grade"),
        (["-i", "sft", "-a", "Say|Say"], 1, "Say is there twice"),
        (["-i", "sft", "-a", "ARC-Easy"], 1, "no data of ARC-Easy"),
    ],
)
def test_bad_input_is_one_line(trained, monkeypatch, capsys, words, code, message):
    with pytest.raises(SystemExit) as end:
        run_script(monkeypatch, *words)
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (run_dir() / "report").exists()


def test_the_stage_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat_eval"])
    with pytest.raises(SystemExit):
        cli.run(script.main, script.Settings)
    (line,) = capsys.readouterr().err.splitlines()
    assert "--stage requires an argument" in line


def test_another_tokenizer_is_one_line(trained, monkeypatch, capsys):
    RustBPETokenizer.train_from_iterator(["something else altogether"], 270).save(tokenizer_dir())
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "-i", "sft")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"was trained with tokenizer {TOKENIZER.hash}" in line


def test_unknown_tasks_are_named_with_those_there_are(trained, monkeypatch, capsys):
    monkeypatch.setattr(chat, "parse_tasks", parse_tasks)
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "-i", "sft", "-a", "Nope")
    (line,) = capsys.readouterr().err.splitlines()
    assert "Nope" in line and all(name in line for name in registry.TASKS)


def test_nothing_to_score_is_one_line(trained, monkeypatch, capsys):
    monkeypatch.setattr(chat, "GRADED_TASKS", ("ARC-Easy",))
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "-i", "sft")
    (line,) = capsys.readouterr().err.splitlines()
    assert "no task to score: ARC-Easy: no data" in line


def test_the_default_evaluation_has_the_plain_name(trained, monkeypatch):
    store, _ = trained
    run_script(monkeypatch, "-i", "sft")
    run_script(monkeypatch, "-i", "sft", "-x", "2")
    names = sorted(path.name for path in (store / "chat_eval").glob("*.csv"))
    assert len(names) == 2 and names[0] == "sft_d2_000007.csv"
