import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import bins
from nanochat.data.bins import (
    HEADER_BYTES,
    MAGIC,
    describe_folder,
    open_tokens,
    read_header,
    tokenized_dir,
    write_tokens,
)
from nanochat.errors import UserError

ids = st.lists(st.integers(0, 65535), max_size=50)


def fill(folder, *names, tokens=(7, 1, 2)):
    """Token files of these names in `folder`."""
    for name in names:
        write_tokens(folder / name, np.array(tokens))
    return folder


def with_meta(folder, **changes):
    meta = {"vocab_size": 300, "document_token": 256, "tokenizer_hash": "ab" * 8, **changes}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# ---- one file


@given(st.lists(ids, max_size=5))
def test_bytes_are_those_of_the_format(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("tokens") / "x_train_000000.bin"
    flat = [token for part in parts for token in part]
    assert write_tokens(path, (np.array(part, dtype=np.int64) for part in parts)) == len(flat)
    expected = struct.pack("<256i", 20240520, 1, len(flat), *[0] * 253) + struct.pack(f"<{len(flat)}H", *flat)
    assert path.read_bytes() == expected
    assert read_header(path) == len(flat)
    tokens = open_tokens(path)
    assert tokens.dtype == np.uint16 and tokens.tolist() == flat


def test_an_array_and_a_stream_of_its_parts_are_the_same_file(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 1000).astype(np.uint16)
    write_tokens(tmp_path / "whole.bin", tokens)
    write_tokens(tmp_path / "parts.bin", iter(np.array_split(tokens, 7)))
    assert (tmp_path / "whole.bin").read_bytes() == (tmp_path / "parts.bin").read_bytes()
    mapped = open_tokens(tmp_path / "whole.bin")
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, tokens)


@pytest.mark.parametrize("bad", [65536, -1])
def test_ids_that_do_not_fit_leave_the_file_as_it_was(tmp_path, bad):
    path = tmp_path / "x.bin"
    write_tokens(path, np.array([1, 2]))
    with pytest.raises(UserError, match=rf"x\.bin: token {bad} does not fit"):
        write_tokens(path, iter([np.array([3]), np.array([4, bad])]))
    assert open_tokens(path).tolist() == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]


def test_a_stream_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield np.array([1])
        raise UserError("the text is damaged")

    with pytest.raises(UserError, match="the text is damaged"):
        write_tokens(tmp_path / "x.bin", broken())
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_the_header_can_count(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "MOST_TOKENS", 10)
    assert write_tokens(tmp_path / "x.bin", iter([np.zeros(6, int), np.zeros(4, int)])) == 10
    with pytest.raises(UserError, match="more than 10 tokens"):
        write_tokens(tmp_path / "y.bin", iter([np.zeros(6, int), np.zeros(5, int)]))


def header(magic=MAGIC, version=1, count=3, order="<"):
    return struct.pack(f"{order}256i", magic, version, count, *[0] * 253)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(order=">") + bytes(6), "another byte order"),
        (header(magic=20240801) + bytes(12), "20240801, llm.c's format of 32-bit tokens"),
        (b"<!DOCTYPE html><title>Sign in</title>".ljust(2000), "an HTML page"),
        (b"", "an empty file"),
        (b"PAR1" + bytes(2000), f"{0x31524150}: it is not a token file"),
        (header(version=2) + bytes(6), "version 2; this program reads version 1"),
        (header() + bytes(4), "is truncated: 2 tokens instead of 3"),
        (header()[:500], "is truncated: 0 tokens instead of 3"),
        (header() + bytes(5), r"is truncated: 2\.5 tokens instead of 3"),
        (header() + bytes(8), "is damaged: 4 tokens instead of 3"),
        (header(count=-1), "is damaged: 0 tokens instead of -1"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path, content, message):
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(content)
    for read in (read_header, open_tokens):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^its_name\.bin"):
        read_header(path, "its_name.bin")


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read_header(path)


# ---- a folder of them


def test_a_community_folder_is_gpt2s(tmp_path):
    fill(tmp_path, "fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin")
    found = describe_folder(tmp_path)
    assert [path.name for path in found.train] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert [path.name for path in found.val] == ["fineweb_val_000000.bin"]
    assert found.files("train") == found.train and found.files("val") == found.val
    assert (found.vocab_size, found.document_token, found.made_by) == (50304, 50256, None)
    assert found.tokenizer_hash == "gpt2"
    assert found.vocab_size == -(-50257 // 128) * 128


@pytest.mark.parametrize("name", ["train_000003.bin", "notes.bin"])
def test_without_meta_other_names_are_not_taken_for_gpt2(tmp_path, name):
    fill(tmp_path, "fineweb_train_000001.bin", "fineweb_val_000000.bin", name)
    with pytest.raises(UserError, match=f"no meta.json to say whose tokens these are, and {name}"):
        describe_folder(tmp_path)


def test_meta_says_whose_tokens_they_are(tmp_path):
    with_meta(fill(tmp_path, "train_000000.bin", "my_train_000001.bin", "val_000000.bin", "notes.bin"))
    found = describe_folder(tmp_path)
    assert {path.name for path in found.train} == {"train_000000.bin", "my_train_000001.bin"}
    assert (found.vocab_size, found.document_token, found.tokenizer_hash) == (300, 256, "ab" * 8)
    with_meta(tmp_path, splits={"train": {"notes.bin": 3}, "val": {"val_000000.bin": 3}})
    assert [path.name for path in describe_folder(tmp_path).train] == ["notes.bin"]
    with_meta(tmp_path, splits={"train": {"train_000009.bin": 3}, "val": {"val_000000.bin": 3}})
    with pytest.raises(UserError, match=r"train_000009\.bin is missing"):
        describe_folder(tmp_path)


@pytest.mark.parametrize("missing", ["train", "val"])
@pytest.mark.parametrize("meta", [False, True])
def test_a_split_without_files(tmp_path, missing, meta):
    fill(tmp_path, f"x_{'val' if missing == 'train' else 'train'}_000001.bin")
    if meta:
        with_meta(tmp_path)
    with pytest.raises(UserError, match=f"has no {missing} files"):
        describe_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 65537}, {"vocab_size": "300"}, {"document_token": 300}, {"tokenizer_hash": 5}, {"splits": []}],
)
def test_meta_that_cannot_be(tmp_path, change):
    with_meta(fill(tmp_path, "train_000000.bin", "val_000000.bin"), **change)
    with pytest.raises(UserError, match=r"meta\.json: expected vocab_size up to 65536"):
        describe_folder(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ("[]", "expected"), ("{}", "expected")])
def test_meta_that_is_damaged(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=message):
        describe_folder(tmp_path)


def test_a_name_is_looked_for_in_the_store(store, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for absent in ("fineweb10B", ""):
        with pytest.raises(UserError, match=r"scripts\.data_process\.download"):
            describe_folder(absent)
    folder = fill(tokenized_dir() / "fineweb10B", "fineweb_train_000001.bin", "fineweb_val_000000.bin")
    assert describe_folder("fineweb10B").path == describe_folder(folder).path == folder.resolve()


def test_fingerprint_changes_with_what_a_position_depends_on(tmp_path):
    fill(tmp_path, "train_000000.bin", "val_000000.bin")
    seen = [describe_folder(with_meta(tmp_path)).fingerprint]
    assert describe_folder(tmp_path).fingerprint == seen[0]
    seen.append(describe_folder(with_meta(tmp_path, document_token=7)).fingerprint)
    fill(tmp_path, "train_000001.bin")
    seen.append(describe_folder(tmp_path).fingerprint)
    fill(tmp_path, "train_000001.bin", tokens=[7])
    seen.append(describe_folder(tmp_path).fingerprint)
    assert len(set(seen)) == 4


def test_an_empty_file_maps_to_nothing(tmp_path):
    assert write_tokens(tmp_path / "x.bin", iter([])) == 0
    assert (tmp_path / "x.bin").stat().st_size == HEADER_BYTES and len(open_tokens(tmp_path / "x.bin")) == 0
