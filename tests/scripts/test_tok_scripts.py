"""scripts/tok_train.py and scripts/tok_eval.py: what is read, written, shown and refused."""

import base64
import hashlib
import json

import pytest
import tiktoken
import tiktoken.load
import tiktoken_ext.openai_public
import tokenizers
from cyclopts import CycloptsError

from nanochat import cli
from nanochat.data.parquet import write_shard
from nanochat.errors import UserError
from nanochat.paths import run_dir, tokenizer_dir
from nanochat.tokenizer import get_tokenizer
from scripts import tok_eval, tok_train
from scripts.tok_eval import TEXTS
from tests.test_rustbpe import O200K_PATTERN

DOCUMENTS = {"train": [TEXTS["news"], "", TEXTS["code"], TEXTS["science"]], "val": [TEXTS["maths"]]}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty artifact store, a stand-in text source, and an empty tiktoken cache."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("NANOCHAT_RUN_ID", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    shard = tmp_path / "train.parquet"
    write_shard(shard, DOCUMENTS["train"])
    monkeypatch.setattr(tok_train, "list_shards", lambda source, split: [shard])
    monkeypatch.setattr(tok_eval, "first_documents", lambda source, split, size: iter(DOCUMENTS[split]))
    return tmp_path


@pytest.fixture
def trained(store):
    tok_train.main(tok_train.Settings(vocab_size=600))
    return store


def _section(stage: str) -> dict:
    return json.loads((run_dir() / "report" / f"{stage}.json").read_text())


# ---- tok_train


def test_training_saves_a_tokenizer_and_a_report_section(store, capsys):
    tok_train.main(tok_train.Settings(vocab_size=600, doc_cap=1000, max_chars=2500))
    tokenizer, metrics = get_tokenizer(), _section("tok_train")["metrics"]
    assert tokenizer.get_vocab_size() == metrics["vocab_size"] == 600
    assert (metrics["documents"], metrics["characters"], metrics["special_tokens"]) == (3, 2500, 9)
    assert metrics["hash"] == tokenizer.hash and metrics["train_seconds"] > 0
    lengths = [len(token) for token, _ in tokenizer.get_mergeable_ranks()]
    assert (metrics["token_bytes_min"], metrics["token_bytes_max"]) == (1, max(lengths))
    mean = sum(lengths) / len(lengths)
    assert metrics["token_bytes_mean"] == pytest.approx(mean)
    spread = sum((length - mean) ** 2 for length in lengths) / (len(lengths) - 1)
    assert metrics["token_bytes_std"] == pytest.approx(spread**0.5)
    assert _section("tok_train")["settings"]["doc_cap"] == 1000
    shown = capsys.readouterr().out
    assert "3 documents, 2,500 characters" in shown and tokenizer.hash in shown and "\x1b" not in shown


def test_only_the_training_split_is_read(store, monkeypatch):
    asked, shards = [], tok_train.list_shards("", "")
    monkeypatch.setattr(tok_train, "list_shards", lambda *words: asked.append(words) or shards)
    tok_train.main(tok_train.Settings(source="pydocs", vocab_size=265))
    assert asked == [("pydocs", "train")]


def test_short_text_is_noted(store, capsys):
    write_shard(store / "train.parquet", ["ab ab ab"])
    tok_train.main(tok_train.Settings(vocab_size=5000))
    (note,) = _section("tok_train")["notes"]
    assert f"{get_tokenizer().get_vocab_size():,} tokens instead of 5,000" in note and note in capsys.readouterr().out


MARKED = {
    "Hindi": "भारत एक विशाल देश है जहाँ अनेक भाषाएँ बोली जाती हैं",
    "Tamil": "தமிழ் மொழி உலகின் பழமையான மொழிகளில் ஒன்று",
    "Thai": "ประเทศไทยมีประชากรประมาณเจ็ดสิบล้านคนที่นี่",
    "accents of their own": "Cafe\u0301, e\u0301te\u0301 et a\u0300 bientot\u0302",
}
UNMARKED = {
    "English": "The cat's café, 1234 naïve tests",
    "Russian": "Она сидела дома и ждала",
    "Arabic": "مرحبا كيف حالك اليوم",
    "Chinese": "我们今天在这里学习汉语",
    "emoji": "❤\ufe0f👍🏽 1\ufe0f\u20e3 ok ❤\ufe0f❤\ufe0f",
}


@pytest.mark.parametrize("name", [*MARKED, *UNMARKED])
def test_words_keep_their_vowel_signs_where_they_have_many(store, name, capsys):
    """Cut at each, Hindi had 5.1 bytes a token of 4,096, kept in 9.1. All other text is tokenized as it was."""
    text = (MARKED | UNMARKED)[name]
    write_shard(store / "train.parquet", [f"{text}. {text}!"] * 20)
    tok_train.main(tok_train.Settings(vocab_size=400, pattern="default"))
    plain = get_tokenizer()
    tok_train.main(tok_train.Settings(vocab_size=400))
    chosen, notes = get_tokenizer(), _section("tok_train")["notes"]
    assert any("have vowel signs" in note for note in notes) == (name in MARKED)
    assert (chosen.hash == plain.hash) == (name in UNMARKED)
    assert chosen.decode(chosen.encode(text)) == text
    published = tokenizers.Tokenizer.from_file(str(tokenizer_dir() / "tokenizer.json"))
    assert published.encode(text, add_special_tokens=False).ids == chosen.encode(text)
    if name in MARKED:
        assert chosen.get_pattern() == O200K_PATTERN and len(chosen.encode(text)) < len(plain.encode(text))


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_text_is_refused_and_nothing_is_written(store, documents):
    write_shard(store / "train.parquet", documents)
    with pytest.raises(UserError, match="no text"):
        tok_train.main(tok_train.Settings(source="pydocs"))
    assert not tokenizer_dir().exists()


def test_a_damaged_shard_is_one_line_and_nothing_is_written(store):
    (store / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train\.parquet is not a parquet file"):
        tok_train.main(tok_train.Settings(source="pydocs"))
    assert not tokenizer_dir().exists()


def test_progress_shows_text_and_then_merges(monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    with tok_train.shown_progress(vocab_size=1265) as (progress, update):
        (task,) = progress.tasks
        update(1234, 10**9, 0)
        assert task.description.startswith("1,234 documents, ") and task.total is None
        update(1234, 10**9, 250)
        assert task.description == "merging pairs" and task.percentage == 25


def test_command_line_refuses_a_vocabulary_that_is_too_small(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(tok_train.Settings, ["--vocab_size=264"])
    complaint = capsys.readouterr().err
    assert end.value.code == 2 and complaint.count("\n") == 1
    assert "264" in complaint and "265" in complaint


def test_command_line_refuses_a_vocabulary_that_the_crate_cannot_number():
    assert cli.read(tok_train.Settings, ["--vocab-size=2147483647"]).vocab_size == 2**31 - 1
    with pytest.raises(CycloptsError, match=r"--vocab-size. Must be <= 2147483647"):
        cli.read(tok_train.Settings, ["--vocab-size=2147483648"])


def test_command_line_takes_round_numbers_in_scientific_notation():
    assert cli.parse(tok_train.Settings, ["--max_chars=2e9", "--vocab-size", "265"]).max_chars == 2_000_000_000


# ---- tok_eval


def test_the_histogram_counts_every_token_but_the_special_ones(trained, capsys):
    tok_eval.main(tok_eval.Settings())
    table = _section("tok_eval")["tables"][2]
    lengths = [len(token) for token, _ in get_tokenizer().get_mergeable_ranks()]
    found = {row[0]: int(row[1].replace(",", "")) for row in table["rows"]}
    assert sum(found.values()) == len(lengths) and found["1"] == 256
    assert found["16 or more"] == sum(length >= 16 for length in lengths)
    assert max(len(row[3]) for row in table["rows"]) == tok_eval.BAR
    assert table["title"] in capsys.readouterr().out


def test_evaluation_without_baselines_says_why_and_downloads_nothing(trained, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("tiktoken would have gone to the network")

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    tok_eval.main(tok_eval.Settings())
    own, compared, _ = _section("tok_eval")["tables"]
    assert [row[0] for row in own["rows"]] == [*TEXTS, "train", "val"]
    assert all(row[-1] == "ok" for row in own["rows"])
    assert [row[0] for row in compared["rows"]] == [
        "nanochat (600)",
        *(f"{name}: not available: ranks not cached" for name in ("gpt2", "cl100k_base", "o200k_base")),
    ]
    assert all(len(row) == len(table["columns"]) for table in (own, compared) for row in table["rows"])
    assert "TIKTOKEN_CACHE_DIR" in capsys.readouterr().out


def test_figures_are_bytes_over_tokens(trained):
    tok_eval.main(tok_eval.Settings())
    tokenizer, section = get_tokenizer(), _section("tok_eval")
    for name, text in [*TEXTS.items(), ("val", TEXTS["maths"])]:
        expected = len(text.encode()) / len(tokenizer.encode(text))
        assert section["metrics"][f"bytes_per_token_{name}"] == pytest.approx(expected)
    train_bytes = sum(len(text.encode()) for text in DOCUMENTS["train"])
    assert section["tables"][0]["rows"][-2][1] == f"{train_bytes:,}"


def test_evaluation_without_a_tokenizer(store):
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        tok_eval.main(tok_eval.Settings())


def test_a_failed_round_trip_is_loud_and_named(trained, monkeypatch):
    tokenizer = get_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda ids: "something else")
    monkeypatch.setattr(tok_eval, "get_tokenizer", lambda: tokenizer)
    with pytest.raises(RuntimeError, match="news"):
        tok_eval.main(tok_eval.Settings())
    assert _section("tok_eval")["tables"][0]["rows"][0][-1] == "FAILED"


@pytest.fixture
def cached_baseline(trained, monkeypatch):
    """The cached rank file of a baseline with our own ranks, under an address of its own."""
    address = "https://ranks.invalid/own.tiktoken"
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(t), i) for t, i in get_tokenizer().get_mergeable_ranks())
    sha256 = hashlib.sha256(ranks).hexdigest()
    monkeypatch.setattr(tok_eval, "BASELINES", {"own": {address: sha256}})

    def own() -> dict:
        mergeable = tiktoken.load.load_tiktoken_bpe(address, expected_hash=sha256)
        return {
            "name": "own",
            "pat_str": get_tokenizer().get_pattern(),
            "mergeable_ranks": mergeable,
            "special_tokens": {},
        }

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiktoken.Encoding(**own()))
    path = trained / "cache" / hashlib.sha1(address.encode()).hexdigest()
    path.parent.mkdir()
    path.write_bytes(ranks)
    return path


def test_a_cached_baseline_is_compared(cached_baseline):
    tok_eval.main(tok_eval.Settings())
    ours, theirs = _section("tok_eval")["tables"][1]["rows"]
    assert ours[0] == "nanochat (600)" and theirs[0] == "own (591)"
    assert theirs[1:] == [f"{cell} (+0.0%)" for cell in ours[1:]]  # the same ranks, the same figures


def test_a_damaged_cached_baseline_is_left_alone(cached_baseline, monkeypatch):
    cached_baseline.write_bytes(b"half a fi")
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    tok_eval.main(tok_eval.Settings())
    assert _section("tok_eval")["tables"][1]["rows"][1][0] == "own: not available: cached ranks damaged"
    assert cached_baseline.read_bytes() == b"half a fi"


def test_switched_off_cache_means_no_baselines(store, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    why, _ = tok_eval.missing_ranks("gpt2")
    assert why == "no cache"


def test_addresses_and_hashes_are_those_of_the_installed_tiktoken(monkeypatch):
    asked = {}

    def record_one(address, expected_hash):
        asked[address] = expected_hash
        return {}

    def record_two(vocab_bpe_file, encoder_json_file, vocab_bpe_hash, encoder_json_hash):
        asked.update({vocab_bpe_file: vocab_bpe_hash, encoder_json_file: encoder_json_hash})
        return {}

    public = tiktoken_ext.openai_public
    monkeypatch.setattr(public, "load_tiktoken_bpe", record_one)
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", record_two)
    for name, files in tok_eval.BASELINES.items():
        asked.clear()
        public.ENCODING_CONSTRUCTORS[name]()
        assert asked == files


def test_table_is_plain_in_a_pipe_and_drawn_on_a_terminal(capsys, monkeypatch):
    table = {"title": "A title", "columns": ["Text", "Bytes"], "rows": [["x" * 150, "1"], ["y", "22"]]}
    tok_eval.print_table(table)
    plain = capsys.readouterr().out
    assert plain.splitlines()[2] == "x" * 150 + "  1" and "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    tok_eval.print_table(table)
    assert "┃" in capsys.readouterr().out
