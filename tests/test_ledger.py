import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import files, ledger
from nanochat.paths import REPO


def records(count):
    return [{"stage": f"s{n}", "status": "finished", "note": "ä\n" * n} for n in range(count)]


def without_time(found):
    return [{key: value for key, value in record.items() if key != "time"} for record in found]


@given(count=st.integers(1, 5), cut=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_a_ledger_cut_short_anywhere_keeps_whole_lines_and_takes_new_ones(count, cut):
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        for record in records(count):
            ledger.append(run_dir, record)
        path = ledger.ledger_path(run_dir)
        kept = path.read_bytes()[:-cut]
        path.write_bytes(kept)
        before = without_time(ledger.read(run_dir))
        assert before == records(count)[: len(before)]
        assert len(before) >= kept.count(b"\n")
        ledger.append(run_dir, {"stage": "new", "status": "failed"})
        assert without_time(ledger.read(run_dir)) == [*before, {"stage": "new", "status": "failed"}]


def test_no_ledger_is_an_empty_one(tmp_path):
    assert ledger.read(tmp_path) == []
    assert ledger.span_seconds([]) == 0.0


def test_fingerprint_sees_content_names_and_globs(store):
    (store / "data").mkdir()
    for name in ("a", "b", "c.tmp"):
        (store / "data" / name).write_text(name)
    first = ledger.fingerprint(["data"])
    assert set(first) == {"data/a", "data/b"}  # half-written files do not count
    assert ledger.fingerprint(["data/[a]"]).keys() == {"data/a"}
    (store / "data" / "a").write_text("x")
    assert ledger.fingerprint(["data"])["data/a"] != first["data/a"]
    assert ledger.fingerprint([str(store / "data")]) == ledger.fingerprint(["data"])


def test_what_is_linked_counts_and_circles_end(store, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (store / "tasks").mkdir()
    for name in ("one", "two"):
        (other / name).symlink_to(other)
    (other / "test.jsonl").write_text("{}")
    (store / "tasks" / "gsm8k").symlink_to(other)
    before = ledger.fingerprint(["tasks"])
    assert list(before) == ["tasks/gsm8k/test.jsonl"]
    (other / "test.jsonl").write_text("[]")
    assert ledger.fingerprint(["tasks"]) != before


def test_a_small_file_rewritten_with_the_same_content_is_unchanged(store):
    (store / "tokenizer.json").write_text("{}")
    before = ledger.fingerprint(["tokenizer.json"])
    os.utime(store / "tokenizer.json", (1, 1))
    assert ledger.fingerprint(["tokenizer.json"]) == before


def test_a_large_file_is_told_by_content_and_read_once(store, monkeypatch):
    monkeypatch.setattr(files, "LARGE_BYTES", 3)
    shard = store / "shard"
    shard.write_text("12345")
    before = ledger.fingerprint(["shard"])
    os.utime(shard, (1, 1))
    assert ledger.unchanged(before)
    shutil.copy(shard, store / "copy")
    os.replace(store / "copy", shard)
    assert ledger.unchanged(before)
    monkeypatch.setattr(time, "time", lambda: shard.stat().st_ctime + 2)  # it has not been written just now
    assert ledger.unchanged(before)
    monkeypatch.setattr(files, "sha256_file", None)
    monkeypatch.setattr(files, "_hashes", {})  # as in another process
    assert ledger.unchanged(before)


def test_a_flipped_byte_of_a_large_file_is_seen_though_size_and_time_are_as_before(store, monkeypatch):
    monkeypatch.setattr(files, "LARGE_BYTES", 3)
    shard = store / "shard"
    shard.write_text("12345")
    monkeypatch.setattr(time, "time", lambda: shard.stat().st_ctime + 2)
    before, stat = ledger.fingerprint(["shard"]), shard.stat()
    time.sleep(0.02)
    with shard.open("r+") as file:
        file.write("2")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not ledger.unchanged(before)


@pytest.mark.parametrize("junk", ["", "not json", "[1]", '{"file": 3}', '{"file": "shard", "mark": "x", "sha256": 1}'])
def test_what_is_remembered_of_large_files_may_be_damaged(store, monkeypatch, junk):
    monkeypatch.setattr(files, "LARGE_BYTES", 3)
    monkeypatch.setattr(files, "_hashes", {})
    (store / "shard").write_text("12345")
    (store / "hashes.jsonl").write_text(junk + "\n")
    assert ledger.fingerprint(["shard"])["shard"] == f"5 {files.sha256_file(store / 'shard')[:16]}"


JUNK = [
    "junk",
    "null",
    "[" * 100_000,
    "\x00\x00",
    '{"stage": "dataset"}',
    '{"stage": "dataset", "status": "junk", "time": 1}',
    '{"stage": "dataset", "status": "finished", "time": "noon"}',
    '{"stage": ["dataset"], "status": "finished", "time": 1}',
    '{"stage": "dataset", "status": ["finished"], "time": 1}',
    '{"stage": "dataset", "status": "finished", "time": 1, "seconds": "long"}',
    '{"stage": "dataset", "status": "finished", "time": NaN}',
    '{"stage": "dataset", "status": "finished", "time": 1e999}',
    '{"stage": "dataset", "status": "finished", "time": 1, "seconds": -5}',
]


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "../../etc/passwd", "", "."])
def test_outputs_of_a_damaged_record_are_changed(store, name):
    assert not ledger.unchanged({name: "1 2"})


@pytest.mark.parametrize("junk", JUNK)
def test_a_junk_line_is_passed_over(tmp_path, junk):
    before = {"stage": "dataset", "status": "finished", "key": "k", "seconds": 1}
    ledger.append(tmp_path, before)
    with ledger.ledger_path(tmp_path).open("a") as file:
        file.write(junk + "\n")
    assert without_time([ledger.last_run(ledger.read(tmp_path), "dataset")]) == [before]
    assert ledger.status_of(ledger.read(tmp_path), "dataset") == "finished"


def test_the_name_of_a_folder_is_no_pattern(store):
    for folder in (store / "my [text]", store.parent / "own [text]"):
        folder.mkdir()
        (folder / "a").write_text("1")
    assert ledger.missing(["my [text]", str(store.parent / "own [text]")]) == []


def test_outputs_are_unchanged_until_one_is_gone(store):
    (store / "out").mkdir()
    (store / "out" / "a").write_text("1")
    outputs = ledger.fingerprint(["out"])
    (store / "out" / "more").write_text("2")
    assert ledger.unchanged(outputs)
    (store / "out" / "a").unlink()
    assert not ledger.unchanged(outputs)


@pytest.fixture
def tree(tmp_path):
    """A small repository: scripts.train -> nanochat.model -> nanochat.deep (lazily), and -> sections -> hardware."""
    files = {
        "scripts/__init__.py": "",
        "scripts/train.py": "from nanochat import model\nfrom nanochat.sections import write_section\n",
        "nanochat/__init__.py": "",
        "nanochat/model.py": "def f():\n    from .deep import g\n    return g()\n",
        "nanochat/deep.py": "import rustbpe\ndef g():\n    return 1\n",
        "nanochat/sections.py": "from nanochat import hardware\ndef write_section(): ...\n",
        "nanochat/hardware.py": "PRICE = 1\n",
        "nanochat/other.py": "x = 1\n",
        "rustbpe/src/lib.rs": "fn main() {}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_data_beside_a_module_counts_as_its_code(tree):
    seen = [ledger.code_version("scripts.train", tree)]
    for text in ("one\n", "two\n"):
        (tree / "nanochat/deep.jsonl").write_text(text)
        (tree / "nanochat/other.jsonl").write_text(text)  # of a module that is not imported
        seen.append(ledger.code_version("scripts.train", tree))
    assert len(set(seen)) == 3
    (tree / "nanochat/other.jsonl").write_text("three\n")
    assert ledger.code_version("scripts.train", tree) == seen[-1]


def test_the_conversations_about_the_assistant_are_code_of_the_chat_stages(monkeypatch):
    path = REPO / "nanochat" / "tasks" / "identity.jsonl"
    read_bytes = Path.read_bytes
    before = ledger.code_version("scripts.chat_sft")
    monkeypatch.setattr(Path, "read_bytes", lambda file: b"{}" if file == path else read_bytes(file))
    assert ledger.code_version("scripts.chat_sft") != before


@pytest.mark.parametrize(
    ("file", "text", "counts"),
    [
        ("scripts/train.py", "from nanochat import model\nx = 2\n", True),
        ("nanochat/deep.py", "import rustbpe\ndef g():\n    return 2\n", True),
        ("nanochat/__init__.py", "x = 1\n", True),
        ("rustbpe/src/lib.rs", "fn main() { panic!() }\n", True),
        ("nanochat/deep.py", "import rustbpe  # why\n\n\ndef g():\n    return 1\n", False),
        ("nanochat/sections.py", "def write_section(): return 1\n", False),
        ("nanochat/hardware.py", "PRICE = 2\n", False),
        ("nanochat/other.py", "x = 2\n", False),
    ],
)
def test_code_version_changes_with_the_code_that_a_stage_runs_and_only_with_that(tree, file, text, counts):
    before = ledger.code_version("scripts.train", tree)
    (tree / file).write_text(text)
    assert (ledger.code_version("scripts.train", tree) != before) == counts


def test_modules_that_only_describe_a_run_exist():
    for name in ledger.DESCRIBING_MODULES:
        path = REPO / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_the_crate_counts_only_for_stages_that_use_it(tree):
    before = ledger.code_version("nanochat.other", tree)
    (tree / "rustbpe/src/lib.rs").write_text("fn other() {}\n")
    assert ledger.code_version("nanochat.other", tree) == before


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("python -m scripts.train --depth=4", "scripts.train"),
        ("torchrun --standalone --nproc_per_node=8 -m scripts.train -m nanochat.model", "scripts.train"),
        ("python -m torch.distributed.run -m scripts.train", "scripts.train"),
        ("python -m nanochat.launch --nproc-per-node=8 -- -m scripts.train", "scripts.train"),
        ("python -m http.server", None),
        ("bash x.sh -m", None),
    ],
)
def test_the_module_of_a_command(tree, command, module):
    (tree / "nanochat/launch.py").write_text("")
    assert ledger.stage_module(command.split(), tree) == module


def test_summary_orders_stages_adds_attempts_and_shows_what_is_pending():
    found = [
        {"stage": "tok_train", "status": "finished", "time": 10, "key": "a", "seconds": 5},
        {"stage": "dataset", "status": "interrupted", "time": 20, "key": "old", "seconds": 100},
        {"stage": "dataset", "status": "interrupted", "time": 30, "key": "b", "seconds": 2},
        {"stage": "dataset", "status": "finished", "time": 40, "key": "b", "seconds": 3},
        {"stage": "mine", "status": "failed", "time": 50, "key": "c", "seconds": 1},
    ]
    rows = ledger.summarize(found)
    assert [row["stage"] for row in rows[:2]] == ["dataset", "tok_train"]
    assert rows[-1]["stage"] == "mine"
    assert rows[0]["seconds"] == 5
    assert {row["stage"]: row["status"] for row in rows}["base_train"] == "pending"
    assert "dataset_rest" not in [row["stage"] for row in rows]
    assert ledger.span_seconds(found) == 40


def history(*events):
    """Records from `stage status` words, one a second; finished ones took a second."""
    records = []
    for place, event in enumerate(events):
        stage, status, *copy = event.split()
        record = {"stage": stage, "status": status, "time": place, "key": "k", **({"copy": True} if copy else {})}
        records.append({**record, "seconds": 1} if status == "finished" else record)
    return records


CHAIN = [f"{stage} finished" for stage in ledger.STAGES]


def stale(*events):
    return [row["stage"] for row in ledger.summarize(history(*events)) if row["status"] == "stale"]


def test_every_need_is_a_stage_before():
    seen = set()
    for name, stage in ledger.STAGES.items():
        assert seen.issuperset(stage.needs)
        seen.add(name)


def test_a_chain_in_order_has_nothing_stale():
    assert stale(*CHAIN) == []
    assert stale(*CHAIN, *CHAIN) == []


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (["chat_sft started"], ["chat_eval_sft", "chat_rl", "chat_eval_rl"]),
        (["mid_train finished", "chat_eval_mid finished", "chat_sft failed"],
         ["chat_eval_sft", "chat_rl", "chat_eval_rl"]),
        (["eval_bundle finished"], ["base_eval"]),
        (["chat_data finished"], list(ledger.STAGES)[9:]),
        (["tok_eval finished", "base_loss finished", "base_eval finished", "chat_eval_mid failed"], []),
        (["chat_rl skipped", "chat_eval_rl skipped"], []),
        (["mid_train finished copy"], []),
        (["chat_data finished", "mid_train finished copy", "chat_eval_mid finished copy"],
         ["chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl"]),
    ],
)  # fmt: skip
def test_stale_is_what_stands_on_work_done_again(events, expected):
    assert stale(*CHAIN, *events) == expected


def test_the_time_of_a_copy_is_not_counted_twice():
    (row,) = [row for row in ledger.summarize(history("a finished", "a skipped", "a finished copy")) if "key" in row]
    assert (row["status"], row["seconds"]) == ("finished", 1)
