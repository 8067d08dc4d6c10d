"""nanochat/tokenizer.py: encoding, vocabulary, files."""

import base64
import json
import os

import numpy as np
import pytest
import safetensors.torch
import tiktoken
import tiktoken.load
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.tokenizer import (
    FILES,
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
    huggingface_json,
    merges_from_ranks,
    repaired,
)
from scripts.tok_eval import TEXTS

VOCAB_SIZE = 900
TRAINING_TEXTS = list(TEXTS.values())

# What breaks splitters and byte encoders: joined emoji, combining marks, right-to-left, unusual spaces and digits,
# long s and the Kelvin sign (case-insensitive contractions), line ends of all kinds, control characters, specials.
# fmt: off
ODD = [
    "👩‍👩‍👧‍👦", "e\u0301", "שלום", "٣٤٥", "\u00a0", "\u2028", "\u0085", "\u3000", "\u017f", "\u212a", "'\u017f",
    "'S", "'Ll", "'re", "\r\n", "\n\n", "\t", "\x00", "\x1f", "   ", "123456", "½", "x²", "한국어",
    "\U0001d518\U0001d52b", "\ufeff", "\ufffd", "\U0010ffff", "--", " ?!", "a", "don't",
    "<|bos|>", "<|assistant_end|>", "<|", "|>", "_",
]
# fmt: on
odd_text = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=8))).map("".join)

many = settings(max_examples=300)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(TRAINING_TEXTS), VOCAB_SIZE)


@pytest.fixture(scope="module")
def reference(tokenizer) -> tiktoken.Encoding:
    """tiktoken with the same ranks."""
    specials = {name: tokenizer.encode_special(name) for name in SPECIAL_TOKENS}
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("same", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens=specials)


@pytest.fixture(scope="module")
def huggingface(tokenizer) -> tokenizers.Tokenizer:
    """The `tokenizers` library on our tokenizer.json, told to leave special tokens in text alone as we do."""
    ranks = dict(tokenizer.get_mergeable_ranks())
    loaded = tokenizers.Tokenizer.from_str(huggingface_json(ranks, tokenizer.get_pattern(), SPECIAL_TOKENS))
    loaded.encode_special_tokens = True
    return loaded


@pytest.fixture
def store(tokenizer, tmp_path, monkeypatch):
    """An artifact store that holds the tokenizer; its tokenizer directory."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


# ---- encoding


@many
@given(text=odd_text)
def test_encode_equals_tiktoken(tokenizer, reference, text):
    assert tokenizer.encode(text) == reference.encode_ordinary(text)


@many
@given(text=odd_text)
def test_encode_equals_tokenizers_library(tokenizer, huggingface, text):
    assert tokenizer.encode(text) == huggingface.encode(text).ids


@pytest.mark.parametrize("kind", TEXTS)
def test_known_texts_agree_and_compress(tokenizer, reference, huggingface, kind):
    text = TEXTS[kind]
    ids = tokenizer.encode(text)
    assert ids == reference.encode_ordinary(text) == huggingface.encode(text).ids
    assert huggingface.decode(ids) == text
    assert len(ids) < 0.6 * len(text.encode())


@given(text=odd_text)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


def test_a_tokenizer_is_kept_where_it_is_and_written_where_it_is_not_whole(tmp_path):
    one, other = (RustBPETokenizer.train_from_iterator([text] * 9, 280) for text in ("one and one", "quite another"))
    for content in (None, b"", b"{}"):
        for name in FILES:
            one.keep(tmp_path)
            before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
            one.keep(tmp_path)
            assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before
            if content is None:
                (tmp_path / name).unlink()
            else:
                (tmp_path / name).write_bytes(content)
            one.keep(tmp_path)
            assert {path: path.read_bytes() for path in before} == {
                path: content for path, (_, content) in before.items()
            }
    other.keep(tmp_path)
    assert RustBPETokenizer.from_directory(tmp_path).hash == other.hash != one.hash


def test_lone_surrogates_are_named(tokenizer):
    words = r"has U\+D83D, half of a surrogate pair, at character 3"
    for call in (
        tokenizer.encode,
        tokenizer.encode_ordinary,
        lambda text: tokenizer.encode(text, allowed_special="all"),
    ):
        with pytest.raises(ValueError, match=f"the text {words}"):
            call("abc\ud83d!")
    with pytest.raises(ValueError, match=r"the text .* at character 8"):  # of the text, not of what follows a name
        tokenizer.encode("<|bos|>a\ud83d", allowed_special="all")
    for call in (
        tokenizer.encode,
        tokenizer.batch_encode,
        lambda texts: tokenizer.encode(texts, allowed_special="all"),
    ):
        with pytest.raises(ValueError, match=f"text 1 {words}"):
            call(["fine", "abc\ud83d!"])


@given(text=st.text(alphabet=st.characters(categories=["Cs", "Ll", "So"])))
def test_repaired_text_is_what_tiktoken_makes_of_lone_surrogates(tokenizer, reference, text):
    ids = tokenizer.encode(repaired(text))
    assert ids == reference.encode_ordinary(text)
    assert tokenizer.decode(ids) == repaired(text) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    conversation = {"messages": [{"role": "user", "content": text}]}  # from JSON, which can spell them
    assert tokenizer.render_conversation(conversation, max_tokens=10**6)[0][2:-1] == ids


@many
@given(text=odd_text, allowed=st.one_of(st.just("all"), st.sets(st.sampled_from(SPECIAL_TOKENS), max_size=3)))
def test_special_tokens_where_they_are_allowed_as_in_tiktoken(tokenizer, reference, text, allowed):
    wanted = reference.encode(text, allowed_special=allowed, disallowed_special=())
    assert tokenizer.encode(text, allowed_special=allowed) == wanted
    assert tokenizer.encode([text, "", text], allowed_special=allowed) == [wanted, [], wanted]
    assert tokenizer.encode(text) == tokenizer.encode_ordinary(text) == reference.encode_ordinary(text)


def test_an_unknown_special_token_cannot_be_allowed(tokenizer):
    with pytest.raises(ValueError, match=r"'<\|end\|>' is not a special token"):
        tokenizer.encode("text", allowed_special={"<|end|>"})


@given(text=odd_text)
def test_text_never_becomes_a_special_token(tokenizer, text):
    first_special = tokenizer.get_bos_token_id()
    hostile = text + "".join(SPECIAL_TOKENS) + text
    for ids in (tokenizer.encode(hostile), tokenizer.encode([hostile])[0], tokenizer.batch_encode([hostile])[0]):
        assert max(ids) < first_special
    ids, _ = tokenizer.render_conversation({"messages": [{"role": "user", "content": hostile}]}, max_tokens=10**6)
    specials = [tokenizer.id_to_token(i) for i in ids if i >= first_special]
    assert specials == ["<|bos|>", "<|user_start|>", "<|user_end|>"]


@given(texts=st.lists(odd_text, max_size=6), num_threads=st.integers(1, 4))
def test_batches_equal_single_texts(tokenizer, texts, num_threads):
    one_by_one = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode(texts, num_threads=num_threads) == one_by_one
    arrays = tokenizer.batch_encode(texts, num_threads=num_threads)
    assert [array.tolist() for array in arrays] == one_by_one
    assert all(array.dtype == np.uint16 for array in arrays)


def test_numpy_ids_are_wide_enough_for_the_vocabulary(tokenizer, monkeypatch):
    for vocab_size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        monkeypatch.setattr(tokenizer, "get_vocab_size", lambda size=vocab_size: size)
        (array,) = tokenizer.batch_encode(["some text"])
        assert array.dtype == dtype and array.base is None  # owns its memory: the batch can be freed


def test_prepend_and_append(tokenizer):
    plain, bos, end = tokenizer.encode("hello"), tokenizer.get_bos_token_id(), tokenizer.encode_special("<|user_end|>")
    assert tokenizer.encode("hello", prepend="<|bos|>") == [bos, *plain]
    assert tokenizer("hello", prepend=bos, append="<|user_end|>") == [bos, *plain, end]
    assert tokenizer.encode("hello", prepend=0) == [0, *plain]  # an id, though falsy
    assert tokenizer.encode(["hello", ""], prepend=bos, append=end) == [[bos, *plain, end], [bos, end]]
    assert tokenizer.encode([]) == [] and tokenizer.encode("") == []
    with pytest.raises(TypeError, match="bytes"):
        tokenizer.encode(b"hello")


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    last = tokenizer.get_vocab_size() - 1
    assert tokenizer.decode(np.array([last])) == tokenizer.decode(torch.tensor([last])) == "<|output_end|>"
    for wrong in (-1, last + 1):
        with pytest.raises(ValueError, match=str(wrong)):
            tokenizer.decode([0, wrong])


def test_a_character_cut_in_two_decodes_to_replacement(tokenizer):
    ids = list("é".encode())  # the first 256 ids are the bytes
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids[:1]) == "\ufffd" and tokenizer.decode_bytes(ids[:1]) == "é".encode()[:1]


# ---- vocabulary and special tokens


def test_vocabulary_size_counts_the_specials(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert len(tokenizer.get_mergeable_ranks()) == VOCAB_SIZE - 9


def test_special_tokens_follow_the_mergeable_ones(tokenizer):
    names = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
    names += ["python_start", "python_end", "output_start", "output_end"]
    assert tokenizer.get_special_tokens() == [f"<|{name}|>" for name in names]
    ids = [tokenizer.encode_special(f"<|{name}|>") for name in names]
    assert ids == list(range(VOCAB_SIZE - 9, VOCAB_SIZE)) and tokenizer.get_bos_token_id() == ids[0]
    assert [tokenizer.id_to_token(i) for i in ids] == tokenizer.get_special_tokens()
    with pytest.raises(ValueError, match="nothing_of_ours"):
        tokenizer.encode_special("nothing_of_ours")


def test_digits_are_split_in_twos(tokenizer):
    learned_from_digits = RustBPETokenizer.train_from_iterator(["1234567890" * 50], MIN_VOCAB_SIZE + 50)
    assert max(len(token) for token, _ in learned_from_digits.get_mergeable_ranks()) == 2


def test_smallest_vocabulary_is_bytes_and_specials():
    tokenizer = RustBPETokenizer.train_from_iterator(["some text"], MIN_VOCAB_SIZE)
    assert tokenizer.get_vocab_size() == 265 and tokenizer.decode(tokenizer.encode("naïve")) == "naïve"
    with pytest.raises(UserError, match=r"vocab_size=264.*265"):
        RustBPETokenizer.train_from_iterator(["some text"], MIN_VOCAB_SIZE - 1)


def test_too_little_text_gives_a_smaller_vocabulary():
    assert RustBPETokenizer.train_from_iterator(["ab ab"], 1000).get_vocab_size() < 300


def test_an_error_in_the_text_stream_reaches_the_caller():
    def broken():
        yield "some text"
        raise UserError("shard 3 is damaged")

    with pytest.raises(UserError, match="shard 3"):
        RustBPETokenizer.train_from_iterator(broken(), 300)


def test_training_is_deterministic_and_the_hash_tells_tokenizers_apart(tokenizer):
    again = RustBPETokenizer.train_from_iterator(iter(TRAINING_TEXTS), VOCAB_SIZE)
    assert again.hash == tokenizer.hash and len(again.hash) == 16
    smaller = RustBPETokenizer.train_from_iterator(iter(TRAINING_TEXTS), VOCAB_SIZE - 1)
    other_text = RustBPETokenizer.train_from_iterator([TEXTS["code"]], VOCAB_SIZE)
    assert len({tokenizer.hash, smaller.hash, other_text.hash}) == 3


# ---- files


@given(text=odd_text)
def test_loaded_tokenizer_is_the_saved_one(tokenizer, tmp_path_factory, text):
    directory = tmp_path_factory.getbasetemp() / "round_trip"
    if not directory.exists():
        tokenizer.save(directory)
    loaded = _cached_load(directory)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text


_loaded: dict = {}


def _cached_load(directory) -> RustBPETokenizer:
    if directory not in _loaded:
        _loaded[directory] = RustBPETokenizer.from_directory(directory)
    return _loaded[directory]


def test_saved_files(tokenizer, store):
    files = ["meta.json", "tiktoken.bpe", "token_bytes.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(store)) == files
    loaded = get_tokenizer()
    assert loaded.hash == tokenizer.hash == json.loads((store / "meta.json").read_text())["hash"]
    assert loaded.get_mergeable_ranks() == tokenizer.get_mergeable_ranks()
    assert loaded.get_pattern() == tokenizer.get_pattern()
    assert loaded.get_special_tokens() == tokenizer.get_special_tokens()
    line = (store / "tiktoken.bpe").read_text().splitlines()[300].split(" ")
    assert (base64.b64decode(line[0]), int(line[1])) == tokenizer.get_mergeable_ranks()[300]


def test_tokenizer_json_loads_from_its_file(tokenizer, store):
    other = tokenizers.Tokenizer.from_file(str(store / "tokenizer.json"))
    text = TEXTS["maths"]
    assert other.encode(text).ids == tokenizer.encode(text)
    assert other.get_vocab_size() == tokenizer.get_vocab_size()
    assert [other.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))


def test_tiktoken_loads_the_ranks(tokenizer, store):
    assert tiktoken.load.load_tiktoken_bpe(str(store / "tiktoken.bpe")) == dict(tokenizer.get_mergeable_ranks())


def test_saving_again_replaces(store):
    other = RustBPETokenizer.train_from_iterator([TEXTS["code"]], 300)
    other.save(store)
    assert get_tokenizer().hash == other.hash and len(get_token_bytes()) == 300


def test_a_full_disk_leaves_the_previous_tokenizer(tokenizer, store, monkeypatch):
    other = RustBPETokenizer.train_from_iterator([TEXTS["code"]], 300)
    write_bytes = type(store).write_bytes

    def write_until_full(path, content):
        if path.name.startswith("tiktoken.bpe."):
            write_bytes(path, content[:5])
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(type(store), "write_bytes", write_until_full)
    with pytest.raises(OSError):
        other.save(store)
    assert get_tokenizer().hash == tokenizer.hash and len(get_token_bytes()) == VOCAB_SIZE
    assert not list(store.glob("*.tmp"))


def test_no_tokenizer_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for load in (get_tokenizer, get_token_bytes):
        with pytest.raises(UserError, match=r"meta.json is missing.*python -m scripts\.tok_train"):
            load()


@pytest.mark.parametrize("name", ["tiktoken.bpe", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage", "flipped"])
def test_damaged_files_are_one_line_errors(store, name, damage):
    path = store / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": content[:middle], "garbage": b"\xff\x00{]", "flipped": flipped}[damage])
    for load in (get_tokenizer, get_token_bytes):
        with pytest.raises(UserError, match=r"no usable tokenizer.*python -m scripts\.tok_train") as error:
            load()
        assert "\n" not in str(error.value)


def test_files_of_two_tokenizers_are_refused(store):
    meta = (store / "meta.json").read_bytes()
    RustBPETokenizer.train_from_iterator([TEXTS["code"]], 300).save(store)
    (store / "meta.json").write_bytes(meta)
    for load in (get_tokenizer, get_token_bytes):
        with pytest.raises(UserError, match="no usable tokenizer"):
            load()


def test_token_bytes_are_those_of_the_raw_tokens(tokenizer, store):
    sizes = get_token_bytes()
    assert sizes.dtype == torch.int32 and sizes.shape == (VOCAB_SIZE,)
    assert sizes.tolist() == [len(tokenizer.decode_bytes([i])) for i in range(VOCAB_SIZE - 9)] + [0] * 9
    # a lone byte of a longer character is one byte, though a string of it would be U+FFFD: three
    assert sizes[tokenizer.encode("\U0001f9ff")].sum() == 4
    assert safetensors.torch.load_file(store / "token_bytes.safetensors")["token_bytes"].equal(sizes)
    for text in TEXTS.values():
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_merges_from_ranks_refuses_what_no_merging_gives():
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256, b"ab": 257}
    with pytest.raises(ValueError, match="256"):
        list(merges_from_ranks(ranks))
