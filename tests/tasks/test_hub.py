import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.chat_format import conversation_pieces
from nanochat.data import hub as data_hub
from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.tasks import hub, humaneval
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.hub import HUB_TASKS, HubTask, fetch, fixed_order, load_rows, load_tables, source_text
from nanochat.tasks.registry import make_task, task_row
from tests.standin_hub import COMMIT, StandInHub, serving
from tests.tasks.hub_rows import arc_row, gsm8k_row, mmlu_row, parquet_rows, put, talk_row

TRAIN, TEST = "main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"
PARTS = [f"data/train-{i:05d}-of-00003.parquet" for i in range(3)]


@pytest.fixture(autouse=True)
def _store(store):
    pass


def serve(monkeypatch, task, repo, files, revision=COMMIT):
    """A context with `task` at a repository on loopback that has these files."""
    splits = {}
    for path in files:
        split = re.match("[a-z]+", path.rpartition("/")[2])[0]
        splits[split] = (*splits.get(split, ()), path)
    monkeypatch.setattr(data_hub, "FIRST_WAIT", 0.001)
    monkeypatch.setitem(HUB_TASKS, task, HubTask(repo, revision, splits, HUB_TASKS[task].columns))
    return serving(StandInHub(repo, files))


@pytest.fixture
def gsm8k(monkeypatch):
    files = {
        TRAIN: parquet_rows([gsm8k_row(i) for i in range(5)]),
        TEST: parquet_rows([gsm8k_row(i) for i in range(100, 103)]),
    }
    with serve(monkeypatch, "GSM8K", "someone/problems", files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def manifest(task):
    return json.loads((hub.folder(task) / "manifest.json").read_text())


# ---- the table


def test_every_revision_is_a_commit_and_every_file_begins_with_its_split():
    for task, data in HUB_TASKS.items():
        assert re.fullmatch("[0-9a-f]{40}", data.revision), task
        for split, paths in data.files.items():
            assert all(Path(path).name.startswith(f"{split}-") for path in paths), task
            assert len({Path(path).name for path in paths}) == len(paths)
            assert int(paths[0].rpartition("-of-")[2].removesuffix(".parquet")) == len(paths)


def test_before_anything_is_fetched_the_source_is_what_would_be():
    assert source_text("GSM8K") == "openai/gsm8k at e53f048"


# ---- fetching


def test_fetched_rows_are_those_of_the_repository(gsm8k, capsys):
    fetch("GSM8K", ["train", "test"])
    assert load_rows("GSM8K", "train") == [gsm8k_row(i) for i in range(5)]
    assert load_rows("GSM8K", "test") == [gsm8k_row(i) for i in range(100, 103)]
    assert [len(GSM8K(split)) for split in ("train", "test")] == [5, 3]
    assert source_text("GSM8K") == f"someone/problems at {COMMIT[:7]}"
    assert gsm8k.revisions == {COMMIT}
    assert "GSM8K train-00000-of-00001.parquet: 0.0 MB, 5 items" in capsys.readouterr().out
    about = manifest("GSM8K")
    assert (about["repo"], about["revision"]) == ("someone/problems", COMMIT)
    assert about["files"]["train-00000-of-00001.parquet"]["size"] == len(gsm8k.files[TRAIN])


def test_what_is_here_is_not_fetched_again(gsm8k):
    fetch("GSM8K", ["train"])
    before = len(gsm8k.requests)
    fetch("GSM8K", ["train"])
    assert len(gsm8k.requests) == before
    fetch("GSM8K", ["train", "test"])
    assert (gsm8k.gets(TRAIN), gsm8k.gets(TEST)) == (1, 1)


def test_a_truncated_file_is_not_read_and_is_fetched_again(gsm8k):
    fetch("GSM8K", ["train"])
    path = hub.folder("GSM8K") / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"no train items of GSM8K .*`python -m scripts.chat_data --tasks=GSM8K`"):
        load_rows("GSM8K", "train")
    fetch("GSM8K", ["train"])
    assert len(load_rows("GSM8K", "train")) == 5


def test_an_interrupted_split_is_not_read_and_goes_on_where_it_stopped(monkeypatch):
    files = {path: parquet_rows([talk_row(10 * i), talk_row(10 * i + 1)]) for i, path in enumerate(PARTS)}
    with serve(monkeypatch, "SmolTalk", "someone/talks", files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.faults[PARTS[1]] = [500] * data_hub.ATTEMPTS
        with pytest.raises(UserError, match=r"^SmolTalk: could not get .*--from-dir=FOLDER$"):
            fetch("SmolTalk", ["train"])
        with pytest.raises(UserError, match=r"no train items of SmolTalk in .*, or not all of them"):
            load_tables("SmolTalk", "train")
        fetch("SmolTalk", ["train"])
        assert server.gets(PARTS[0]) == 1
        tables = load_tables("SmolTalk", "train")
    rows = load_rows("SmolTalk", "train")
    assert all(row.keys() == {"messages"} for row in rows)  # other columns are left where they are
    assert [row["messages"][0]["content"] for row in rows] == [f"Say {n}." for n in (0, 1, 10, 11, 20, 21)]
    assert make_task("SmolTalk", "train")[0] == rows[fixed_order(6)[0]]
    assert load_tables("SmolTalk", "train") is tables  # read once


def test_another_pinned_revision_is_fetched_anew(gsm8k, monkeypatch):
    fetch("GSM8K", ["train"])
    path = hub.folder("GSM8K") / "manifest.json"
    path.write_text(path.read_text().replace(COMMIT, "f" * 40))
    with pytest.raises(UserError, match="no train items"):
        load_rows("GSM8K", "train")
    fetch("GSM8K", ["train"])
    assert gsm8k.gets(TRAIN) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "GSM8K: .*expected a parquet file, found something else"),
        (parquet_rows([{"prompt": "?", "answer": "!"}]), "GSM8K: .*no column question, found prompt, answer"),
    ],
)
def test_content_of_another_form_is_refused(gsm8k, content, message):
    gsm8k.files[TRAIN] = content
    with pytest.raises(UserError, match=message) as caught:
        fetch("GSM8K", ["train"])
    assert "\n" not in str(caught.value)
    assert not hub.folder("GSM8K").exists()


def test_absent_data_and_absent_splits_are_said():
    with pytest.raises(UserError, match=r"run `python -m scripts\.chat_data --tasks=MMLU`"):
        load_rows("MMLU", "test")
    with pytest.raises(UserError, match="HumanEval has no train split: it has test"):
        load_rows("HumanEval", "train")


# ---- taking files from a folder


@pytest.mark.parametrize(
    "place", ["gsm8k", "GSM8K", "gsm8k/main", "Gsm8k/deep/down"], ids=["repo", "task", "hub layout", "anywhere"]
)
@pytest.mark.parametrize("linked", [False, True])
def test_files_are_found_in_folders_of_several_names(tmp_path, place, linked):
    folder = tmp_path / "data" / place
    if linked:
        (tmp_path / "elsewhere").mkdir()
        folder.parent.mkdir(parents=True)
        folder.symlink_to(tmp_path / "elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train-00000-of-00001.parquet").write_bytes(parquet_rows([gsm8k_row(7)]))
    (folder / "test.parquet").write_bytes(parquet_rows([gsm8k_row(8)]))
    assert hub.take_local("GSM8K", tmp_path / "data") == ["train", "test"]
    assert load_rows("GSM8K", "train") == [gsm8k_row(7)]
    assert load_rows("GSM8K", "test") == [gsm8k_row(8)]
    digests = [entry["sha256"][:8] for entry in manifest("GSM8K")["files"].values()]
    assert source_text("GSM8K") == f"local directory (sha256 {', '.join(digests)})"


def test_a_checkout_of_the_hub_is_read_at_the_paths_of_the_hub(tmp_path):
    for name, row in {"main": gsm8k_row(1), "socratic": gsm8k_row(2)}.items():
        path = tmp_path / "gsm8k" / name / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(parquet_rows([row]))
    assert hub.take_local("GSM8K", tmp_path) == ["train"]
    assert load_rows("GSM8K", "train") == [gsm8k_row(1)]


def test_the_two_arc_sets_in_one_checkout_are_told_apart(tmp_path):
    path = tmp_path / "ai2_arc" / "ARC-Challenge" / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(parquet_rows([arc_row(1)]))
    assert hub.take_local("ARC-Easy", tmp_path) == []
    assert hub.take_local("ARC-Challenge", tmp_path) == ["test"]


def test_files_in_several_folders_are_not_guessed_between(tmp_path):
    for name in ("anatomy", "astronomy"):
        path = tmp_path / "mmlu" / name / "test-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(parquet_rows([mmlu_row(1, name)]))
    with pytest.raises(UserError, match=r"MMLU: test files in 2 folders, .*anatomy, .*astronomy: keep one"):
        hub.take_local("MMLU", tmp_path)


def test_part_of_a_split_is_refused(tmp_path):
    for index in (0, 2):
        path = tmp_path / "smol-smoltalk" / f"train-{index:05d}-of-00003.parquet"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(parquet_rows([talk_row(index)]))
    with pytest.raises(UserError, match="SmolTalk: 2 of 3 train files are in"):
        hub.take_local("SmolTalk", tmp_path)


def test_a_folder_without_the_data_gives_nothing_and_no_folder_is_an_error(tmp_path):
    assert hub.take_local("GSM8K", tmp_path) == []
    with pytest.raises(UserError, match=r"--from-dir=.*nowhere: no such folder"):
        hub.take_local("GSM8K", tmp_path / "nowhere")


def test_files_are_copied_once_and_again_when_they_change(tmp_path, monkeypatch):
    copies = []
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda *args: copies.append(args) or copy(*args))
    put(tmp_path, "GSM8K", train=[gsm8k_row(1)])
    assert hub.take_local("GSM8K", tmp_path) == ["train"]
    assert len(copies) == 1
    put(tmp_path, "GSM8K", train=[gsm8k_row(1), gsm8k_row(2)])
    assert len(copies) == 2
    assert len(load_rows("GSM8K", "train")) == 2


def test_a_folder_moved_or_touched_changes_nothing(tmp_path, monkeypatch):
    put(tmp_path / "a", "GSM8K", train=[gsm8k_row(1)])
    before = manifest("GSM8K")
    assert str(tmp_path) not in json.dumps(before)
    (tmp_path / "a").rename(tmp_path / "b")
    os.utime(tmp_path / "b" / "GSM8K" / "train-00000-of-00001.parquet", (1, 1))
    monkeypatch.setattr(shutil, "copyfile", None)  # nothing is copied again
    assert hub.take_local("GSM8K", tmp_path / "b") == ["train"]
    assert manifest("GSM8K") == before


def test_fetching_puts_published_files_in_the_place_of_local_ones(gsm8k, tmp_path):
    put(tmp_path, "GSM8K", train=[gsm8k_row(7)], test=[gsm8k_row(1)])
    assert hub.is_local("GSM8K", "train") and hub.is_local("GSM8K", "test")
    fetch("GSM8K", ["train", "test"])
    assert load_rows("GSM8K", "train") == [gsm8k_row(i) for i in range(5)]
    assert load_rows("GSM8K", "test") == [gsm8k_row(i) for i in range(100, 103)]
    assert source_text("GSM8K") == f"someone/problems at {COMMIT[:7]}"
    assert not hub.is_local("GSM8K", "train") and not hub.is_local("GSM8K", "test")


def test_local_files_stay_where_the_hub_cannot_be_reached(gsm8k, tmp_path):
    put(tmp_path, "GSM8K", train=[gsm8k_row(7)])
    before = manifest("GSM8K")
    gsm8k.faults[TRAIN] = [500] * data_hub.ATTEMPTS
    with pytest.raises(UserError, match=r"GSM8K: could not get .*give --from-dir=FOLDER again to go on with the local"):
        fetch("GSM8K", ["train"])
    assert manifest("GSM8K") == before and load_rows("GSM8K", "train") == [gsm8k_row(7)]


def test_local_files_of_one_split_are_kept_while_another_is_fetched(gsm8k, tmp_path):
    put(tmp_path, "GSM8K", test=[gsm8k_row(1)])
    fetch("GSM8K", ["train"])
    assert (gsm8k.gets(TRAIN), gsm8k.gets(TEST)) == (1, 0)
    assert load_rows("GSM8K", "test") == [gsm8k_row(1)]
    assert re.fullmatch(
        rf"local directory \(sha256 [0-9a-f]{{8}}\) and someone/problems at {COMMIT[:7]}", source_text("GSM8K")
    )


def test_local_files_replace_fetched_ones_wholly(monkeypatch, tmp_path):
    files = {path: parquet_rows([talk_row(i)]) for i, path in enumerate(PARTS)}
    with serve(monkeypatch, "SmolTalk", "someone/talks", files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        fetch("SmolTalk", ["train"])
    put(tmp_path, "SmolTalk", train=[talk_row(5)])
    assert len(load_rows("SmolTalk", "train")) == 1
    assert [path.name for path in hub.folder("SmolTalk").glob("*.parquet")] == ["train-00000-of-00001.parquet"]


def test_a_damaged_local_file_is_refused_and_leaves_nothing(tmp_path):
    path = tmp_path / "gsm8k" / "train.parquet"
    path.parent.mkdir()
    path.write_bytes(parquet_rows([gsm8k_row(1)])[:-20])
    with pytest.raises(UserError, match=r"gsm8k/train\.parquet: expected a parquet file, found something else or half"):
        hub.take_local("GSM8K", tmp_path)
    assert not list(hub.folder("GSM8K").glob("*"))


# ---- reading


def test_rows_wrapped_in_a_column_named_train_are_unwrapped(tmp_path):
    put(tmp_path, "MMLU", train=[{"train": mmlu_row(i)} for i in range(3)])
    assert load_rows("MMLU", "train") == [mmlu_row(i) for i in range(3)]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
def test_fixed_order_is_a_permutation_and_always_the_same(count):
    order = fixed_order(count)
    assert sorted(order) == list(range(count))
    fixed_order.cache_clear()
    assert fixed_order(count) == order
    if count == 5:  # shuffle(seed=42) of datasets 2.x and 3.x, in which published parts of data sets are taken
        assert order == (4, 2, 3, 1, 0)
    if count == 1000:
        assert 300 < sum(order[:500]) / 500 < 700  # items from everywhere among the first


# ---- rows that cannot be used are refused at the door, before their file counts


def provide(task, folder, rows, *more):
    """What scripts.chat_data does with a folder: a test split of these files, each from rows or a table."""
    for index, content in enumerate([rows, *more]):
        path = folder / task / f"test-{index:05d}-of-{1 + len(more):05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(parquet_rows(content))
    hub.take_local(task, folder, CHECKS[task])


HUMANEVAL_ROW = {
    "prompt": "def f():\n",
    "canonical_solution": "    pass\n",
    "test": "def check(f): f()\n",
    "entry_point": "f",
}
GOOD = {"MMLU": mmlu_row(1), "GSM8K": gsm8k_row(1), "ARC-Easy": arc_row(1), "SmolTalk": talk_row(1)}
GOOD["HumanEval"] = {"prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "", "entry_point": "f"}
CHECKS = {name: humaneval.check_row if name == "HumanEval" else task_row(name).load().conversation for name in GOOD}


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("MMLU", {"answer": -1}, "answer -1, expected 0 to 3; -1 marks rows without an answer: leave them out"),
        ("MMLU", {"answer": 4}, "answer 4, expected 0 to 3"),
        ("MMLU", {"answer": None}, "answer is None, expected a whole number"),
        ("MMLU", {"answer": "B"}, "answer is 'B', expected a whole number"),
        ("MMLU", {"answer": 2.0}, "answer is 2.0, expected a whole number"),
        ("MMLU", {"answer": True}, "answer is True, expected a whole number"),
        ("MMLU", {"choices": ["a", "b", "c"]}, "4 letters for 3 choices"),
        ("MMLU", {"choices": ["a", "b", "c", None]}, "choices is .*None.*expected a list of texts"),
        ("MMLU", {"choices": "abcd"}, "choices is 'abcd', expected a list of texts"),
        ("MMLU", {"choices": {"text": ["a"]}}, "choices is {'text'.*expected a list of texts"),
        ("MMLU", {"question": None}, "question is None, expected text"),
        ("MMLU", {"subject": 5}, "subject is 5, expected text"),
        ("GSM8K", {"answer": None}, "answer is None, expected text"),
        ("GSM8K", {"answer": 18}, "answer is 18, expected text"),
        ("GSM8K", {"answer": "18"}, "without `#### number`"),
        ("GSM8K", {"question": ["q"]}, r"question is \['q'\], expected text"),
        ("ARC-Easy", {"answerKey": None}, "answerKey is None, expected text"),
        ("ARC-Easy", {"answerKey": 1}, "answerKey is 1, expected text"),
        ("ARC-Easy", {"answerKey": "E"}, "answer 'E' is none of A, B, C, D"),
        ("ARC-Easy", {"choices": None}, "choices is None, expected an object"),
        ("ARC-Easy", {"choices": [{"text": "a", "label": "A"}]}, r"choices is \[.*expected an object"),
        ("ARC-Easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "labels A, B for 1 choices"),
        ("ARC-Easy", {"choices": {"text": list("abcdef"), "label": list("ABCDEF")}}, "for 6 choices, expected up to 5"),
        ("ARC-Easy", {"choices": {"text": ["a", "b"], "label": ["B", "B"]}}, "labels B, B"),
        ("ARC-Easy", {"choices": {"text": [1, 2], "label": ["A", "B"]}}, r"text is \[1, 2\], expected a list of texts"),
        ("ARC-Easy", {"choices": {"text": ["a"]}}, "label is None|lacks label"),
        ("SmolTalk", {"messages": None}, "conversation without messages"),
        ("SmolTalk", {"messages": [{"role": "user", "content": None}]}, "message 0: user content is NoneType"),
        ("SmolTalk", {"messages": "[]"}, "conversation without messages"),
        ("HumanEval", {"entry_point": "f("}, r"entry_point 'f\(' is no name"),
        ("HumanEval", {"test": None}, "test is None, expected text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_leaves_nothing(tmp_path, task, change, message):
    rows = [{**GOOD[task], **change}]
    with contextlib.suppress(pa.ArrowException, TypeError):  # where both can stand in one file
        parquet_rows([GOOD[task], *rows])
        rows = [GOOD[task], *rows]
    with pytest.raises(UserError, match=rf"test-00000-of-00001\.parquet: row \d: .*{message}") as caught:
        provide(task, tmp_path, rows)
    assert "\n" not in str(caught.value)
    assert not list(hub.folder(task).glob("*.parquet")) and not (hub.folder(task) / "manifest.json").exists()


def test_the_row_is_counted_from_0_over_all_row_groups(tmp_path):
    table = pa.Table.from_pylist([mmlu_row(i) for i in range(3000)] + [{**mmlu_row(1), "answer": -1}])
    with pytest.raises(UserError, match=r"parquet: row 3000: answer -1"):
        provide("MMLU", tmp_path, table)


def test_columns_that_stand_twice_and_bytes_that_are_no_text_are_one_line(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["#### 1"])]
    with pytest.raises(UserError, match=r"parquet: no column question, found question, question, answer$"):
        provide("GSM8K", tmp_path, pa.Table.from_arrays(columns, ["question", "question", "answer"]))
    no_text = pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string())
    with pytest.raises(UserError, match=r"parquet: row 1: .*utf-8") as caught:
        provide("GSM8K", tmp_path, pa.table({"question": no_text, "answer": ["#### 1"] * 2}))
    assert "\n" not in str(caught.value)


def test_rows_that_take_far_more_memory_than_their_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_BYTES", 10**6)
    rows = pa.table({"question": ["long " * 1000] * 1000, "answer": ["#### 1"] * 1000})
    with pytest.raises(UserError, match=r"parquet: .*rows take more than 1,000,000 bytes in memory"):
        provide("GSM8K", tmp_path, rows)


TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
LISTS = [pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, 4)]


@pytest.mark.parametrize("second", range(len(LISTS)))
@pytest.mark.parametrize("first", range(len(TYPES)))
def test_files_of_one_split_may_have_strings_and_lists_of_other_widths(tmp_path, first, second):
    def table(number, text, lists, integer):
        row = mmlu_row(number)
        strings = {name: pa.array([row[name]]).cast(text) for name in ("question", "subject")}
        choices = pa.array([row["choices"]], lists(pa.string()))
        return pa.table({**strings, "choices": choices, "answer": pa.array([row["answer"]], integer)})

    parts = [table(0, TYPES[first], LISTS[second], pa.int8()), table(1, pa.string(), pa.list_, pa.int64())]
    provide("MMLU", tmp_path, *parts)
    assert load_rows("MMLU", "test") == [mmlu_row(0), mmlu_row(1)]
    assert {make_task("MMLU", "test")[index]["messages"][1]["content"] for index in range(2)} == {"C"}


def test_downloaded_rows_are_checked_too(monkeypatch):
    with serve(monkeypatch, "MMLU", "someone/mmlu", {"all/test-00000-of-00001.parquet": parquet_rows([BAD])}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(UserError, match=r"^MMLU: .*row 0: answer -1"):
            task_row("MMLU").load().prepare("MMLU", "pydocs", None)
    assert not hub.folder("MMLU").exists()


def test_a_row_that_an_older_version_let_in_is_named_when_it_is_asked_for(tmp_path):
    put(tmp_path, "MMLU", test=[BAD])
    with pytest.raises(UserError, match="MMLU test, row 0: answer -1"):
        make_task("MMLU", "test")[0]


BAD = {**mmlu_row(0), "answer": -1}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(max_size=6) | st.just("#### 5"),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["text", "label", "role", "content", "type"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(GOOD)), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row_is_refused_or_rendered_and_graded(task, data):
    names = sorted(GOOD[task])
    row = {**GOOD[task], **data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))}
    try:
        CHECKS[task](row)
    except UserError as error:
        assert str(error)
        return
    if task == "HumanEval":
        assert row["entry_point"] in humaneval.build_check(row["prompt"], row["entry_point"], row["test"])
        return
    conversation = CHECKS[task](row)
    assert conversation_pieces(conversation)
    instance = object.__new__(task_row(task).load())
    if instance.eval_type == "categorical":
        assert [instance.evaluate(conversation, letter) for letter in conversation["letters"]].count(True) == 1
    if instance.eval_type == "generative":
        assert instance.evaluate(conversation, row["answer"]) in (True, False)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"\xff",
        b"[]",
        b'{"files": []}',
        b'{"files": {"a": 5}}',
        b'{"files": {"a": {"split": "test", "size": null, "sha256": ""}}}',
        b'{"files": {"../../../a": {"split": "test", "size": 1, "sha256": ""}}}',
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    put(tmp_path, "MMLU", test=[mmlu_row(1)])
    (hub.folder("MMLU") / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: delete") as caught:
        make_task("MMLU", "test")
    assert "\n" not in str(caught.value)
