"""offline_bundle.py: generated tasks are real questions, repeat exactly, and never pass for CORE."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.eval.bundle import load_bundle
from nanochat.eval.offline_bundle import RECIPES, copy_bundle, make_items, write_offline_bundle
from nanochat.tasks.passages import find_passages

NOUNS = [
    "engine", "garden", "letter", "market", "number", "planet", "record", "signal", "teacher", "village",
    "window", "bridge", "castle", "doctor",
]  # fmt: skip
VERBS = [
    "describes", "follows", "guards", "improves", "measures", "observes", "prepares", "recalls", "supports",
    "watches",
]  # fmt: skip


def document(seed: int) -> str:
    """Sentences that share words, so that last words recur; a table and code that must not be taken for prose."""
    rng = random.Random(seed)
    topic = f"{rng.choice(NOUNS)}{'abcdefghij'[seed % 10]}{'klmnopqrst'[seed // 10 % 10]}"
    paragraphs = []
    for _ in range(4):
        sentences = []
        for _ in range(4):
            one, two, three = rng.sample(NOUNS, 3)
            sentences.append(
                f"The {topic} {rng.choice(VERBS)} every {one} near the {two} and the {three} of the {topic}."
            )
        paragraphs.append(" ".join(sentences))
    return "\n\n".join([*paragraphs, "x = {1: 2}; y[3] += 4; print(x, y, {5: [6, 7, 8]}, 9 ** 10, 11 // 12)."])


def documents(count: int = 60) -> list[str]:
    return [document(seed) for seed in range(count)]


def test_passages_are_prose_and_never_twice():
    passages = find_passages([*documents(), *documents()])
    sentences = [sentence for passage in passages for sentence in passage.sentences]
    assert len(sentences) == len(set(sentences)) > 500
    assert not any("print" in sentence for sentence in sentences)


def test_items_are_answerable():
    tasks = make_items(find_passages(documents()))
    assert list(tasks) == list(RECIPES) and all(50 <= len(items) <= 148 for items in tasks.values())
    whole = [" ".join(text.split()) for text in documents()]
    for item in tasks["offline_next_sentence"]:
        follows = [any(f"{item['query']} {choice}" in text for text in whole) for choice in item["choices"]]
        assert follows == [i == item["gold"] for i in range(4)]
    for item in tasks["offline_sentence_order"]:
        standing = [any(f"{item['query']} {choice}" in text for text in whole) for choice in item["choices"]]
        assert standing == [i == item["gold"] for i in range(2)]
        assert sorted(item["choices"][0].split()) == sorted(item["choices"][1].split())
    for item in tasks["offline_seen_word"]:
        text = item["query"].lower()
        assert [choice in text for choice in item["choices"]] == [i == item["gold"] for i in range(4)]
    for item in tasks["offline_last_word"]:
        assert item["continuation"] in item["context"].split()
        assert any(f"{item['context']} {item['continuation']}" in text for text in whole)
    for item in tasks["offline_context_swap"]:
        follows = [
            any(f"{option} {item['continuation']}" in text for text in whole) for option in item["context_options"]
        ]
        assert follows == [i == item["gold"] for i in range(2)]
    for item in tasks["offline_copy_words"]:
        assert item["continuation"] in item["context"]


def test_gold_is_spread_evenly():
    """A model that always takes the same place must not beat guessing."""
    tasks = make_items(find_passages(documents()))
    for label, recipe in RECIPES.items():
        golds = [item["gold"] for item in tasks[label] if "gold" in item]
        for place in set(golds):
            assert golds.count(place) / len(golds) == recipe.baseline / 100, (label, place)


def test_same_text_same_bundle_in_another_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.eval.test_offline_bundle import documents; "
        "from nanochat.eval.offline_bundle import write_offline_bundle; "
        "write_offline_bundle(documents(), 'pydocs', Path(sys.argv[1]))"
    )
    texts = []
    for seed in ("1", "2"):
        target = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", code, str(target)], check=True, env=environment, cwd=root)
        files = sorted(path for path in target.rglob("*") if path.is_file())
        texts.append([(path.relative_to(target), path.read_bytes()) for path in files])
    assert texts[0] == texts[1] and len(texts[0]) == len(RECIPES) + 3


def test_the_bundle_says_what_it_is(tmp_path):
    bundle = write_offline_bundle(documents(), "pydocs", tmp_path / "eval_bundle")
    assert bundle == load_bundle(tmp_path / "eval_bundle")
    assert bundle.name == f"CORE-offline ({len(RECIPES)} tasks)" and bundle.source == "pydocs"
    assert {task.kind for task in bundle.tasks} == {"multiple_choice", "schema", "language_modeling"}
    assert any(task.num_fewshot for task in bundle.tasks)
    marker = json.loads((tmp_path / "eval_bundle" / "bundle.json").read_text())
    assert marker["kind"] == "offline" and marker["tasks"] == list(RECIPES)
    for task in bundle.tasks:
        options = {len(item.get("choices", item.get("context_options", []))) for item in task.items}
        assert task.baseline == (0 if options == {0} else 100 / options.pop())
    (tmp_path / "eval_bundle" / "bundle.json").unlink()
    assert load_bundle(tmp_path / "eval_bundle").kind == "offline"  # the names of its tasks say it too
    assert os.listdir(tmp_path) == ["eval_bundle"]


def test_what_the_text_has_too_little_for_is_left_out(tmp_path):
    target = tmp_path / "eval_bundle"
    write_offline_bundle(documents(), "pydocs", target)
    bundle = write_offline_bundle(documents(15), "other", target)
    assert 0 < len(bundle.tasks) < len(RECIPES) and bundle.kind == "offline"
    left_out = [reason.split(":")[0] for reason in bundle.left_out]
    assert sorted([task.label for task in bundle.tasks] + left_out) == sorted(RECIPES)
    why = "items in the held-out text of other, at least 50 are needed"
    assert all(reason.endswith(why) for reason in bundle.left_out)
    assert bundle.notes == [f"Left out: {reason}" for reason in bundle.left_out]


@pytest.mark.parametrize("texts", [[], ["No prose here."] * 50, documents(1)])
def test_a_bundle_without_a_task_is_one(tmp_path, texts):
    target = tmp_path / "eval_bundle"
    bundle = write_offline_bundle(texts, "other", target)
    assert bundle.tasks == [] and len(bundle.left_out) == len(RECIPES) and bundle == load_bundle(target)
    assert bundle.name == "CORE-offline (0 tasks)" and bundle.kind == "offline"
    assert bundle.notes[0].startswith("No CORE task could be made from this text")
    assert copy_bundle(target, tmp_path / "copy") == bundle
    (target / "bundle.json").unlink()  # nothing says any more that it may be empty
    with pytest.raises(UserError, match="lists no tasks"):
        load_bundle(target)


def test_copy_checks_first_and_replaces_whole(tmp_path):
    origin, target = tmp_path / "origin", tmp_path / "eval_bundle"
    write_offline_bundle(documents(), "pydocs", origin)
    (origin / "junk.bin").write_bytes(b"0" * 10)
    target.mkdir()
    (target / "stale").write_text("old")
    copied = copy_bundle(origin, target)
    assert copied.name == load_bundle(origin).name
    assert not (target / "stale").exists() and not (target / "junk.bin").exists()
    assert copy_bundle(target, target) == copied
    (origin / "eval_data" / "offline" / "offline_copy_words.jsonl").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        copy_bundle(origin, target)
    assert load_bundle(target) == copied
    with pytest.raises(UserError, match=r"core\.yaml"):
        copy_bundle(tmp_path / "nowhere", target)


def test_published_layout_is_marked_published(tmp_path):
    origin = tmp_path / "origin"
    (origin / "eval_data" / "a").mkdir(parents=True)
    entry = "{label: copa, dataset_uri: a/copa.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}"
    (origin / "core.yaml").write_text(f"icl_tasks: [{entry}]\n")
    (origin / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncopa,50\n")
    (origin / "eval_data" / "a" / "copa.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    bundle = copy_bundle(origin, tmp_path / "store" / "eval_bundle")
    assert bundle.kind == "published" and bundle.name == "CORE (1 of 22 tasks)"
    assert json.loads((tmp_path / "store" / "eval_bundle" / "bundle.json").read_text())["kind"] == "published"


@pytest.mark.parametrize("uri", ["../../../victim.jsonl", "../../../tokenizer/meta.json", "a/../../../../victim.jsonl"])
def test_a_bundle_never_writes_outside_its_folder(tmp_path, uri):
    origin, store = tmp_path / "deep" / "er" / "origin", tmp_path / "s" / "t" / "store"
    (origin / "eval_data" / "a").mkdir(parents=True)
    (store / "tokenizer").mkdir(parents=True)
    entry = {"label": "copa", "dataset_uri": uri, "num_fewshot": [0], "icl_task_type": "multiple_choice"}
    (origin / "core.yaml").write_text(json.dumps({"icl_tasks": [entry]}))
    (origin / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncopa,50\n")
    named = origin / "eval_data" / uri
    named.parent.mkdir(parents=True, exist_ok=True)
    named.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="leads out of"):
        copy_bundle(origin, store / "eval_bundle")
    assert sorted(tmp_path.rglob("*")) == before
