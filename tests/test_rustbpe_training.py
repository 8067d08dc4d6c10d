"""Training from parquet shards, with bounded memory, and what it says while it works."""

import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from scripts.tok_eval import TEXTS

DOCUMENTS = [f"{text}\n{number}" for number in range(12) for text in TEXTS.values()]


def write(path, documents, rows=5, compression="zstd", **columns):
    table = pa.table({"text": pa.array(documents, pa.string()), **columns})
    pq.write_table(table, path, row_group_size=rows, compression=compression)
    return path


def ranks(train):
    tokenizer = rustbpe.Tokenizer()
    result = train(tokenizer)
    return tokenizer.get_mergeable_ranks(), result


def take(documents, max_chars, doc_cap):
    """Slow reference: the documents that training takes."""
    taken, left = [], max_chars
    for document in documents:
        text = (document or "")[: min(doc_cap, left)]
        if text:
            taken.append(text)
            left -= len(text)
    return taken


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
def test_shards_give_what_their_documents_give(tmp_path, compression):
    half = len(DOCUMENTS) // 2
    paths = [write(tmp_path / f"{i}.parquet", part, compression=compression)
             for i, part in enumerate((DOCUMENTS[:half], DOCUMENTS[half:]))]  # fmt: skip
    wanted, _ = ranks(lambda tokenizer: tokenizer.train_from_iterator(DOCUMENTS, 700))
    found, taken = ranks(lambda tokenizer: tokenizer.train_from_parquet(paths, 700))
    assert found == wanted
    assert taken == (len(DOCUMENTS), sum(map(len, DOCUMENTS)))


texts = st.lists(st.one_of(st.none(), st.text(max_size=12), st.sampled_from(["", "añb €", "the the the"])), max_size=12)


@given(texts, st.integers(1, 60), st.integers(1, 15), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_limits_cut_between_characters_as_slicing_does(tmp_path_factory, documents, max_chars, doc_cap, rows):
    path = write(tmp_path_factory.mktemp("shard") / "a.parquet", documents, rows)
    kept = take(documents, max_chars, doc_cap)
    wanted, _ = ranks(lambda tokenizer: tokenizer.train_from_iterator(kept, 300))
    found, taken = ranks(
        lambda tokenizer: tokenizer.train_from_parquet([path], 300, max_chars=max_chars, doc_cap=doc_cap)
    )
    assert found == wanted
    assert taken == (len(kept), sum(map(len, kept)))


def test_another_column_and_other_string_types(tmp_path):
    other = pa.array(DOCUMENTS, pa.large_string())
    path = write(tmp_path / "a.parquet", [""] * len(DOCUMENTS), body=other, number=pa.array(range(len(DOCUMENTS))))
    wanted, _ = ranks(lambda tokenizer: tokenizer.train_from_iterator(DOCUMENTS, 400))
    assert ranks(lambda tokenizer: tokenizer.train_from_parquet([str(path)], 400, column="body"))[0] == wanted


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("absent.parquet", "text", "absent.parquet: No such file"),
        ("junk.parquet", "text", "junk.parquet is not a parquet file"),
        ("good.parquet", "story", 'good.parquet has no column "story"; it has text, number, list.list.element'),
        ("good.parquet", "number", 'column "number" of .*good.parquet holds INT64, not text'),
        ("good.parquet", "list.list.element", "holds lists, not text"),
    ],
)
def test_shards_that_cannot_be_used_are_one_line_errors(tmp_path, name, column, words):
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 no parquet")
    write(tmp_path / "good.parquet", ["a"], number=pa.array([1]), list=pa.array([["a"]]))
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(DOCUMENTS, 300)
    before = tokenizer.get_mergeable_ranks()
    with pytest.raises(ValueError, match=words) as error:
        tokenizer.train_from_parquet([tmp_path / "good.parquet", tmp_path / name], 300, column=column)
    assert "\n" not in str(error.value)
    assert tokenizer.get_mergeable_ranks() == before


def test_a_shard_that_is_cut_short_is_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", DOCUMENTS)
    data = bytearray(path.read_bytes())
    data[100:600] = bytes(500)  # the footer is whole, the pages are not
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0: ") as error:
        rustbpe.Tokenizer().train_from_parquet([path], 300)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_chars": 0}, "max_chars is 0; it must be at least 1"),
        ({"doc_cap": -1}, "doc_cap is -1; it must be at least 1"),
        ({"max_distinct_words": 10}, "max_distinct_words is 10; it must be at least 1000"),
        ({"vocab_size": 255}, "vocab_size is 255"),
        ({"pattern": "(a"}, "cannot compile the split pattern"),
    ],
)
def test_limits_that_cannot_be(tmp_path, arguments, words):
    path = write(tmp_path / "a.parquet", ["a"])
    with pytest.raises(ValueError, match=words):
        rustbpe.Tokenizer().train_from_parquet([path], **{"vocab_size": 300, **arguments})


# ---- bounded memory


def rare_words(count):
    """Documents in which each of `count` words comes once, among common ones."""
    return [f" the common words word{number}x" for number in range(count)]


def test_pruning_rare_words_keeps_what_is_common(tmp_path):
    documents = rare_words(5000)
    exact, _ = ranks(lambda tokenizer: tokenizer.train_from_iterator(documents, 270))
    pruned, _ = ranks(
        lambda tokenizer: tokenizer.train_from_iterator(documents, 270, buffer_size=500, max_distinct_words=1000)
    )
    assert pruned == exact
    path = write(tmp_path / "a.parquet", documents, rows=500)
    found, _ = ranks(lambda tokenizer: tokenizer.train_from_parquet([path], 270, max_distinct_words=1000))
    assert found == exact


def test_a_cap_that_is_not_reached_changes_nothing():
    wanted, _ = ranks(lambda tokenizer: tokenizer.train_from_iterator(DOCUMENTS, 700))
    capped, _ = ranks(lambda tokenizer: tokenizer.train_from_iterator(DOCUMENTS, 700, max_distinct_words=100_000))
    assert capped == wanted


# ---- progress


@pytest.mark.parametrize("parquet", [False, True])
def test_progress_ends_with_everything(tmp_path, parquet):
    said = []
    tokenizer = rustbpe.Tokenizer()
    if parquet:
        path = write(tmp_path / "a.parquet", DOCUMENTS)
        tokenizer.train_from_parquet([path], 400, progress=lambda *numbers: said.append(numbers))
    else:
        tokenizer.train_from_iterator(DOCUMENTS, 400, progress=lambda *numbers: said.append(numbers))
    total = sum(len(document.encode()) for document in DOCUMENTS)
    assert said == sorted(said)
    assert said[-1] == (len(DOCUMENTS), total, 400 - 256) and (len(DOCUMENTS), total, 0) in said


def test_an_error_of_the_callback_stops_training_and_changes_nothing():
    def stop(*numbers):
        raise RuntimeError("enough")

    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(RuntimeError, match="enough"):
        tokenizer.train_from_iterator(DOCUMENTS, 400, progress=stop)
    assert tokenizer.vocab_size == 256


def test_ctrl_c_stops_training_from_shards_within_a_second(tmp_path):
    path = write(tmp_path / "a.parquet", DOCUMENTS * 20, rows=100)
    tokenizer = rustbpe.Tokenizer()
    main = threading.main_thread().ident
    threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.train_from_parquet([path] * 5000, 300)
    assert 0.4 < time.perf_counter() - started < 1.5
    assert tokenizer.vocab_size == 256
