"""scripts/data_process: downloading tokens from a hub, and making them from text."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from huggingface_hub import constants

from nanochat import cli, dataset
from nanochat.data import hub, sources
from nanochat.data.bins import describe_folder, open_tokens, tokenized_dir, write_tokens
from nanochat.dataloader import RowLoader
from nanochat.errors import UserError
from nanochat.paths import slug, tokenizer_dir
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from scripts.data_process import download, tokenize_text
from tests.standin_hub import COMMIT, StandInHub, serving

REPO, VAL = "kjj0/fineweb10B-gpt2", "fineweb_val_000000.bin"
DOCUMENTS = [f"Document {i}: {'naïve café, ' * (i % 7)}and so on. {i * i}" for i in range(60)] + ["long " * 3000]


def train_name(index):
    return f"fineweb_train_{index:06d}.bin"


# ---- download


@pytest.fixture
def server(store, tmp_path, monkeypatch):
    """fineweb10B with four small train files."""
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.001)
    monkeypatch.setitem(download.DATASETS, "fineweb10B", download.TokenDataset(REPO, "fineweb", 4))
    files = {}
    for index, name in enumerate([VAL, *map(train_name, range(1, 5))]):
        write_tokens(tmp_path / name, np.array([50256, index, index + 1] * 50))
        files[name] = (tmp_path / name).read_bytes()
    with serving(StandInHub(REPO, files)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def get(**options):
    download.main(cli.parse(download.Settings, [f"--{name}={value}" for name, value in options.items()]))
    return describe_folder("fineweb10B")


def in_store():
    return sorted(path.name for path in (tokenized_dir() / "fineweb10B").iterdir() if path.suffix in (".bin", ".tmp"))


@pytest.mark.parametrize("workers", [1, 4])
def test_train_files_and_the_validation_file_arrive(server, workers, capsys):
    found = get(dataset="fineweb10B", shards=3, num_workers=workers)
    assert [path.name for path in found.train] == [train_name(i) for i in (1, 2, 3)]
    assert [path.name for path in found.val] == [VAL] and found.document_token == 50256
    for path in (*found.train, *found.val):
        assert path.read_bytes() == server.files[path.name]
    assert "fineweb10B train: 3 files, 450 tokens" in capsys.readouterr().out
    assert server.revisions == {"main", COMMIT}  # the first one fixes the commit
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert manifest["revision"] == COMMIT
    checksum = hashlib.sha256(server.files[VAL]).hexdigest()
    assert manifest["files"][VAL] == {"split": "val", "size": 1324, "tokens": 150, "sha256": checksum}
    loader = RowLoader(found.rows(8), 4, 2)
    assert loader.next_batch().inputs[:, 0].tolist() == [50256] * 2
    loader.close()


def test_more_files_are_added_to_those_that_are_here(server, capsys):
    get(shards=1)
    (tokenized_dir() / "fineweb10B" / VAL).write_bytes(b"damaged")
    get(shards=2)
    assert [server.gets(name) for name in (VAL, train_name(1), train_name(2))] == [2, 1, 1]
    assert "1 of 3 files are here" in capsys.readouterr().out
    get(shards=2)
    assert server.gets(train_name(2)) == 1 and "3 of 3 files are here" in capsys.readouterr().out


def test_a_cut_connection_is_taken_up_again(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client waits for a second
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    server.faults[train_name(1)] = ["cut", 503]
    found = get(shards=1)
    assert found.train[0].read_bytes() == server.files[train_name(1)]
    ranges = [wanted for method, name, wanted in server.requests if (method, name) == ("GET", train_name(1))]
    assert ranges == [None, "bytes=600-", "bytes=600-"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"<!doctype html>".ljust(len(raw)), "found an HTML page"),
        (lambda raw: raw[:4][::-1] + raw[4:], "another byte order"),
        (lambda raw: raw[:-20], "truncated: 140 tokens instead of 150"),
    ],
)
def test_what_is_no_token_file_is_refused_and_not_kept(server, change, message):
    """A mirror without the hub's sha256: the file's own header has to tell."""
    server.plain = True
    server.files[train_name(2)] = change(server.files[train_name(2)])
    with pytest.raises(UserError, match=rf"^{train_name(2)}.*{message}"):
        get(shards=2, num_workers=1)
    assert in_store() == [train_name(1), VAL]


def test_more_files_than_there_are(server):
    with pytest.raises(UserError, match="--shards=5: fineweb10B has 4 train files"):
        get(shards=5)
    assert not server.requests


def test_without_a_network_it_says_what_else_there_is(store, monkeypatch):
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"scripts\.data_process\.tokenize_text"):
        get(shards=1)
    assert in_store() == []


def test_a_dataset_that_is_not_known(capsys):
    with pytest.raises(SystemExit):
        cli.parse(download.Settings, ["--dataset=fineweb9B"])
    assert "fineweb9B" in capsys.readouterr().err


# ---- tokenize_text


@pytest.fixture
def source(store, tmp_path):
    """Text of one's own in the store, and a tokenizer."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    dataset.main(dataset.Settings(source=f"local:{folder}"))
    RustBPETokenizer.train_from_iterator(DOCUMENTS, 300).save(tokenizer_dir())
    return f"local:{folder}"


def tokenize(source, **options):
    words = [f"--source={source}", *(f"--{name}={value}" for name, value in options.items())]
    tokenize_text.main(cli.parse(tokenize_text.Settings, words))
    (folder,) = tokenized_dir().iterdir()
    return describe_folder(folder)


def tokens_of(files):
    return np.concatenate([open_tokens(path) for path in files]).tolist()


@pytest.mark.parametrize("batch_chars", [1, 500, 1 << 23])
@pytest.mark.parametrize("shard_tokens", [1, 700, 10**8])
def test_every_document_comes_once_behind_bos(source, monkeypatch, batch_chars, shard_tokens):
    monkeypatch.setattr(tokenize_text, "BATCH_CHARS", batch_chars)
    found = tokenize(source, **{"shard-tokens": shard_tokens})
    tokenizer = get_tokenizer()
    for split in ("train", "val"):
        documents = list(sources.iter_documents(source, split))
        expected = itertools.chain(*tokenizer.encode(documents, prepend="<|bos|>"))
        assert tokens_of(found.files(split)) == list(expected)
        assert shard_tokens > 1 or len(found.files(split)) == len(documents)
        assert shard_tokens < 10**8 or len(found.files(split)) == 1
    longest = max(len(tokenizer.encode(text)) for text in DOCUMENTS) + 1
    sizes = [len(open_tokens(path)) for path in found.train]
    assert all(shard_tokens <= size < shard_tokens + longest for size in sizes[:-1])
    assert all(open_tokens(path)[0] == tokenizer.get_bos_token_id() for path in found.train)
    assert sizes[-1] > 0


def test_meta_says_whose_tokens_they_are(source):
    found = tokenize(source)
    tokenizer = get_tokenizer()
    assert (found.vocab_size, found.document_token) == (tokenizer.get_vocab_size(), tokenizer.get_bos_token_id())
    assert found.tokenizer_hash == tokenizer.hash
    assert found.path.name == f"{slug(sources.canonical(source))}-{tokenizer.hash}"
    meta = json.loads((found.path / "meta.json").read_text())
    assert meta["splits"]["train"] == {"train_000000.bin": len(open_tokens(found.train[0]))}
    assert meta["source"] == sources.canonical(source)


def test_what_is_done_is_done_once_and_again_when_something_changed(source, tmp_path, capsys, monkeypatch):
    found = tokenize(source, **{"shard-tokens": 500})
    stamps = {path: path.stat().st_mtime_ns for path in found.path.iterdir()}
    again = tokenize(source, **{"shard-tokens": 500})
    assert (again.fingerprint, again.path) == (found.fingerprint, found.path)
    assert "tokenized already" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in found.path.iterdir()}

    all_tokens = tokens_of(found.train)
    fewer = tokenize(source, **{"shard-tokens": 5000})  # other files, the same tokens, none of the old left over
    assert len(fewer.train) < len(found.train) and tokens_of(fewer.train) == all_tokens
    assert len(list(fewer.path.glob("*.bin"))) == len(fewer.train) + len(fewer.val)

    fewer.train[0].write_bytes(fewer.train[0].read_bytes()[:-2])  # damaged: written anew
    assert tokens_of(tokenize(source, **{"shard-tokens": 5000}).train) == all_tokens

    (tmp_path / "texts" / "b.txt").write_text("one more document")
    dataset.main(dataset.Settings(source=source))
    before = len(all_tokens) + len(tokens_of(fewer.val))
    more = tokenize(source, **{"shard-tokens": 5000})
    assert len(tokens_of(more.train + more.val)) > before


def test_an_interrupted_run_is_not_taken_for_a_whole_one(source, monkeypatch):
    write = tokenize_text.write_tokens

    def interrupted(path, tokens):
        if path.name == "val_000000.bin":
            raise KeyboardInterrupt
        return write(path, tokens)

    monkeypatch.setattr(tokenize_text, "write_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize(source)
    (folder,) = tokenized_dir().iterdir()
    with pytest.raises(UserError, match=r"no meta\.json .*tokenize_text"):
        describe_folder(folder)
    monkeypatch.setattr(tokenize_text, "write_tokens", write)
    assert len(tokenize(source).val) == 1


def test_text_is_streamed(source, monkeypatch):
    """What is read is written before much more is read."""
    read = 0
    written_at = []

    def documents(source, split):
        nonlocal read
        for text in ["ab" * 50] * 200:
            read += 1
            yield text

    write = tokenize_text.write_tokens

    def watched(path, tokens):
        count = write(path, tokens)
        written_at.append((read, count))
        return count

    monkeypatch.setattr(tokenize_text, "BATCH_CHARS", 1000)
    monkeypatch.setattr(tokenize_text, "iter_documents", documents)
    monkeypatch.setattr(tokenize_text, "write_tokens", watched)
    tokenize_text.write_split(get_tokenizer(), source, "train", tokenized_dir(), 100)
    assert written_at[0][0] <= 40 and read == 200 and len(written_at) > 10


def test_a_vocabulary_that_16_bits_cannot_hold(source, monkeypatch):
    tokenizer = get_tokenizer()
    monkeypatch.setattr(tokenizer, "get_vocab_size", lambda: 65537)
    monkeypatch.setattr(tokenize_text, "get_tokenizer", lambda: tokenizer)
    with pytest.raises(UserError, match="the tokenizer has 65537 tokens"):
        tokenize_text.main(tokenize_text.Settings(source=source))
    assert not tokenized_dir().exists()


def test_no_text_and_no_tokenizer(source, store, monkeypatch):
    with pytest.raises(UserError, match=r"python -m nanochat\.dataset --source=pydocs"):
        tokenize_text.main(tokenize_text.Settings(source="pydocs"))
    monkeypatch.setattr(tokenize_text, "iter_documents", lambda source, split: iter([""]))
    with pytest.raises(UserError, match="its train split holds no text"):
        tokenize_text.main(tokenize_text.Settings(source=source))
    (tokenizer_dir() / "meta.json").unlink()
    with pytest.raises(UserError, match=r"scripts\.tok_train"):
        tokenize_text.main(tokenize_text.Settings(source=source))
