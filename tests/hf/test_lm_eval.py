"""lm-evaluation-harness with our adapter against slow references, our own evaluator, and its own `hf` model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.eval.bundle import load_bundle
from nanochat.eval.core import evaluate_task
from nanochat.hf.export import export
from nanochat.hf.lm_eval_tasks import write_tasks
from nanochat.paths import checkpoint_dir, get_base_dir
from nanochat.tokenizer import SPECIAL_TOKENS
from scripts.tok_eval import TEXTS
from tests.checkpoints import save_checkpoint
from tests.hf.conftest import meta_of

harness = pytest.importorskip(
    "lm_eval", reason="lm_eval is not installed: the extra `eval` of pyproject.toml brings it"
)

from lm_eval.api.instance import Instance  # noqa: E402

from nanochat.hf.lm_eval import MARK, NanochatLM  # noqa: E402

CPU = torch.device("cpu")
BUNDLE = {
    "copa": (
        "multiple_choice",
        [{"query": f"The man {x} because", "choices": ["he was tired.", "he was late.", "it ☃"], "gold": i % 2}
         for i, x in enumerate(("slept", "ran", "cried", "sang", "ate", "sat"))],
    ),
    "winograd": (
        "schema",
        [{"context_options": [f"The {a} saw the {b} and it", f"The {b} saw the {a} and it"], "continuation": "fled.",
          "gold": 1} for a, b in (("dog", "cat"), ("fox", "hen"), ("boy", "wolf"))],
    ),
    "jeopardy": (
        "language_modeling",
        [{"context": f"Q {i}: what comes after {i}? ", "continuation": f"{i + 1}"} for i in range(5)],
    ),
}  # fmt: skip


def write_bundle(folder: Path) -> None:
    (folder / "eval_data").mkdir(parents=True)
    entries = []
    for label, (kind, items) in BUNDLE.items():
        (folder / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        entries.append({"label": label, "dataset_uri": f"{label}.jsonl", "num_fewshot": [2], "icl_task_type": kind})
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Random baseline\n" + "".join(f"{name},0\n" for name in BUNDLE)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_model, tokenizer):
    """A store with a model whose context holds every prompt, a bundle, and the model's export beside it."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        model = make_model("nanochat", n_layer=2, sequence_len=256)
        meta = meta_of(model, tokenizer, stage="base", tag="7")
        tokenizer.save(get_base_dir() / "tokenizer")
        save_checkpoint(checkpoint_dir("base", "7"), 7, model, None, meta)
        write_bundle(get_base_dir() / "eval_bundle")
        export(model, tokenizer, meta, folder / "hf")
        yield folder


@pytest.fixture(scope="module")
def judge(store) -> NanochatLM:
    return NanochatLM.create_from_arg_string("stage=base,tag=7", {"batch_size": 3, "device": "cuda:0"})


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


# ---- text

said = st.text(max_size=12) | st.sampled_from([*SPECIAL_TOKENS, f"a<|bos|>{MARK}b", " x ", "the"])


@given(st.lists(said, min_size=1, max_size=5), st.booleans())
@settings(max_examples=100)
def test_only_the_template_makes_special_tokens(judge, tokenizer, texts, system):
    """Names of special tokens in what was said stay text, and the ids are those that our own chat reads."""
    texts = [text.replace(MARK, "\ufffd") for text in texts]
    roles = ["user", "assistant"] * 3
    history = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    history = [{"role": "system", "content": "be kind"}, *history] if system else history
    wanted = tokenizer.render_for_completion({"messages": history})
    asked = history if history[-1]["role"] == "user" else history[:-1]
    assert judge.tok_encode(judge.apply_chat_template(asked)) == wanted
    whole, _ = tokenizer.render_conversation({"messages": history})
    if history[-1]["role"] == "assistant":
        assert judge.tok_encode(judge.apply_chat_template(history, add_generation_prompt=False)) == whole[:-1]


def test_a_mark_in_what_was_said_is_taken_out(judge, tokenizer):
    text = judge.apply_chat_template([{"role": "user", "content": f"<|bos|>{MARK}"}])
    assert judge.tok_encode(text) == tokenizer.render_for_completion(
        {"messages": [{"role": "user", "content": "<|bos|>\ufffd"}]}
    )


def test_bos_is_in_front_once(judge, tokenizer):
    bos = tokenizer.get_bos_token_id()
    assert judge.tok_encode("the") == [bos, *tokenizer.encode("the")]
    assert judge.tok_encode("the", add_special_tokens=False) == tokenizer.encode("the")
    assert judge.tok_encode(f"<|bos|>{MARK}the") == [bos, *tokenizer.encode("the")]
    assert judge.tok_encode("<|bos|>") == [bos, *tokenizer.encode("<|bos|>")]


# ---- scores


@torch.no_grad()
def slowly(judge, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One row, without padding."""
    tokens = [*context, *continuation]
    logits = judge.model(torch.tensor([tokens[:-1]]))[0, -len(continuation) :].log_softmax(-1)
    wanted = torch.tensor(continuation)
    return logits.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(1) == wanted).all())


def test_loglikelihood_is_that_of_single_rows(judge):
    pairs = [("The dog", " ran away"), ("", "the"), ("a ", "b"), ("x" * 300, " the end"), ("the", ""), ("é", "☃ the")]
    found = judge.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (logprob, greedy) in zip(pairs, found, strict=True):
        context, continuation = (
            judge._encode_pair(*pair) if pair[0] else ([judge.prefix_token_id], judge.tok_encode(pair[1], False))
        )
        if not continuation:
            assert (logprob, greedy) == (0.0, True)
            continue
        context = context[-(judge.max_length + 1 - len(continuation)) :]
        wanted = slowly(judge, context, continuation)
        assert logprob == pytest.approx(wanted[0], abs=1e-4) and greedy == wanted[1]


def test_rolling_sees_each_token_once(judge, tokenizer):
    long = next(iter(TEXTS.values()))
    texts = ["the dog", long[:1500], ""]
    found = judge.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    for text, total in zip(texts, found, strict=True):
        ids = tokenizer.encode(text, prepend="<|bos|>")
        wanted = 0.0
        done = 1
        while done < len(ids):
            end = min(len(ids), done + judge.max_length)
            start = max(0, end - judge.max_length - 1)
            wanted += slowly(judge, ids[start:done], ids[done:end])[0]
            done = end
        assert total == pytest.approx(wanted, abs=1e-3)


# ---- answers


def test_answers_are_the_engines_up_to_where_they_are_to_end(judge, tokenizer):
    prompts = ["The dog", "a", "Once upon a time there was"]
    engine = Engine(judge.model, tokenizer)
    specials = set(map(tokenizer.encode_special, SPECIAL_TOKENS))

    def ours(prompt: str, count: int) -> str:
        ids = tokenizer.encode(prompt, prepend="<|bos|>")
        (row,), _ = engine.generate_batch(ids, max_tokens=count, temperature=0.0)
        return tokenizer.decode([i for i in row[len(ids) :] if i not in specials])

    whole = [ours(prompt, 40) for prompt in prompts]
    stop = whole[0][10:13]
    settings = [{"until": [], "max_gen_toks": 40}, {"until": [stop, "never"], "max_gen_toks": 40}, {"max_gen_toks": 5}]
    asked = [(prompt, setting) for setting in settings for prompt in prompts]
    found = judge.generate_until(requests("generate_until", *asked))
    assert found[:3] == whole
    assert found[3:6] == [text.split(stop)[0] for text in whole] and found[3] != whole[0]
    assert found[6:] == [ours(prompt, 5) for prompt in prompts]
    with pytest.raises(UserError, match="max_gen_toks=256: must be less than the context of 256 tokens"):
        judge.generate_until(requests("generate_until", ("a", {"until": []})))


def test_what_cannot_be_judged(store):
    with pytest.raises(UserError, match="stage=final: use one of base, mid, sft, rl"):
        NanochatLM(stage="final")


# ---- whole tasks


def evaluate(out: Path, model: str, **arguments) -> dict:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(out), include_defaults=False)
    names = [f"core_{label}" for label in BUNDLE]
    return harness.simple_evaluate(
        model, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0, device="cpu", **arguments
    )


def test_tasks_of_a_bundle_get_our_numbers_from_all_three(store, judge, tokenizer, tmp_path):
    bundle = load_bundle(get_base_dir() / "eval_bundle")
    counts = write_tasks(bundle, tokenizer, tmp_path / "tasks")
    assert {label: count["same"] for label, count in counts.items()} == {"copa": 6, "winograd": 3, "jeopardy": 5}
    found = evaluate(tmp_path / "tasks", judge, batch_size=3)
    path = f"pretrained={store / 'hf'},add_bos_token=True"
    theirs = evaluate(tmp_path / "tasks", "hf", model_args=path, batch_size=3)
    for task in bundle.tasks:
        ours = evaluate_task(judge.model, tokenizer, task, CPU, sequence_len=256)
        name = f"core_{task.label}"
        by_line = {record["line"]: record for record in ours.records}
        for result in (found, theirs):
            assert result["results"][name]["acc,none"] == pytest.approx(ours.accuracy)
            for sample in result["samples"][name]:
                record, gold = by_line[sample["doc"]["line"]], sample["doc"].get("gold", 0)
                logprob = sample["filtered_resps"][gold][0]
                assert -logprob / sample["doc"]["tokens"][gold] == pytest.approx(record["loss"], abs=1e-4)
                assert sample["acc"] == record["correct"]
        for sample, other in zip(found["samples"][name], theirs["samples"][name], strict=True):
            for (mine, greedy), (its, its_greedy) in zip(
                sample["filtered_resps"], other["filtered_resps"], strict=True
            ):
                assert mine == pytest.approx(its, abs=1e-4) and greedy == its_greedy


def test_where_lm_eval_divides_a_text_elsewhere_is_said(tokenizer, tmp_path):
    task = load_bundle_of(tmp_path, [{"query": "x", "choices": ["é", "è"], "gold": 0}])
    (counts,) = write_tasks(task, tokenizer, tmp_path / "tasks").values()
    assert counts.total() == 1 and counts["same"] == 0, counts
    with pytest.raises(UserError, match="is there already"):
        write_tasks(task, tokenizer, tmp_path / "tasks")


def load_bundle_of(folder: Path, items: list[dict]):
    (folder / "b" / "eval_data").mkdir(parents=True)
    (folder / "b" / "eval_data" / "copa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    entry = {"label": "copa", "dataset_uri": "copa.jsonl", "num_fewshot": [0], "icl_task_type": "multiple_choice"}
    (folder / "b" / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [{**entry, "continuation_delimiter": ""}]}))
    (folder / "b" / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncopa,50\n")
    return load_bundle(folder / "b")


@pytest.mark.slow
def test_two_ranks_from_the_command_line(store, judge, tokenizer, tmp_path):
    write_tasks(load_bundle(get_base_dir() / "eval_bundle"), tokenizer, tmp_path / "tasks")
    words = ["-m", "nanochat.hf.lm_eval", "--model", "nanochat", "--model_args", "stage=base,tag=7", "--tasks", "core"]
    words += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    launch = [sys.executable, "-m", "nanochat.launch", "--nproc-per-node=2", "--", *words]
    subprocess.run(launch, check=True, timeout=600)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    alone = evaluate(tmp_path / "tasks", judge)["results"]
    for label in BUNDLE:
        name = f"core_{label}"
        assert results[name]["acc,none"] == pytest.approx(alone[name]["acc,none"])
