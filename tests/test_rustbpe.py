"""The Rust tokenizer, against tiktoken and against a trainer that is slow and plainly right."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe

# These take hand-written splitters, as the default pattern does.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
R50K_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind, and it's 2026 already.\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 345678))\n",
    "Ünïcödé: 中文字符, русский текст, العربية, हिन्दी, 😀😃 e\u0301 \u017f \u212a",
    "WE'LL they'Ve I'D you're   tabs\t\tand\r\nnewlines \n \n  end   ",
] * 5

# Any text, but thick with what the split pattern tells apart.
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet="aLlsS've tTr12½٣ \t\n\r\u00a0\u2028.,!\u017fé中😀\u0301"),
    st.lists(st.sampled_from([*CORPUS, " the", "lazy", "  ", "\n\n", "'ll", "345678"])).map("".join),
)


@pytest.fixture(scope="module")
def trained():
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(CORPUS), 400)
    return tokenizer


def as_tiktoken(tokenizer):
    ranks = dict(tokenizer.get_mergeable_ranks())
    assert len(ranks) == tokenizer.vocab_size
    return tiktoken.Encoding("same", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def reference(trained):
    return as_tiktoken(trained)


def naive_train(texts, vocab_size):
    """Recounts all pairs before every merge. One word is one chunk (the tests' pattern is `[a-z]+`)."""
    words = Counter(word for text in texts for word in text.split())
    words = {tuple(bytes([byte]) for byte in word.encode()): count for word, count in words.items()}
    ids = {bytes([byte]): byte for byte in range(256)}
    while len(ids) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        ids[left + right] = len(ids)
        joined = {}
        for word, count in words.items():
            parts = []
            for token in word:
                # A part just made by this merge never joins again in the same pass.
                if parts and not parts[-1][1] and (parts[-1][0], token) == (left, right):
                    parts[-1] = (left + right, True)
                else:
                    parts.append((token, False))
            joined[tuple(token for token, _ in parts)] = count
        words = joined
    return list(ids.items())


# Training


@pytest.mark.parametrize("seed", range(20))
def test_training_equals_recounting_every_time(seed):
    rng = random.Random(seed)
    letters = "abcd"[: 1 + seed % 4]
    texts = [" ".join("".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(8)) for _ in range(6)]
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), 300, buffer_size=1 + seed % 3, pattern="[a-z]+")
    assert tokenizer.get_mergeable_ranks() == naive_train(texts, 300)
    assert tokenizer.get_pattern() == "[a-z]+"


def test_training_does_not_depend_on_threads_or_buffers():
    program = """
import hashlib, random, rustbpe
rng = random.Random(0)
texts = [" ".join("".join(rng.choices("abcdeé \\n1", k=rng.randint(1, 30))) for _ in range(40)) for _ in range(400)]
for buffer_size in (1, 7, 8192):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator((text for text in texts), 700, buffer_size)
    print(hashlib.sha256(repr(tokenizer.get_mergeable_ranks()).encode()).hexdigest())
"""
    seen = set()
    for threads in ("1", "2", "3", "8"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.update(done.stdout.split())
    assert len(seen) == 1


def test_training_stops_early_when_no_pair_is_left():
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["ab", "ab"], 1000)
    assert tokenizer.vocab_size == 257
    assert tokenizer.get_mergeable_ranks()[256] == (b"ab", 256)
    tokenizer.train_from_iterator([], 1000)
    assert tokenizer.vocab_size == 256


def test_a_new_tokenizer_knows_bytes():
    tokenizer = rustbpe.Tokenizer()
    assert (tokenizer.vocab_size, tokenizer.get_pattern()) == (256, rustbpe.SPLIT_PATTERN)
    assert tokenizer.encode("hé") == list("hé".encode())


@pytest.mark.parametrize(
    "vocab_size, arguments, error, words",
    [
        (255, {}, ValueError, "vocab_size is 255"),
        (-1, {}, ValueError, "vocab_size is -1"),
        (2**40, {}, ValueError, f"vocab_size is {2**40}"),
        (300, {"buffer_size": 0}, ValueError, "buffer_size is 0"),
        (300, {"pattern": "(unclosed"}, ValueError, "(unclosed"),
        (300, {"iterator": ["fine", b"bytes"]}, TypeError, "document 1 of the iterator is a bytes"),
        (300, {"iterator": "one str"}, TypeError, "iterator is one str"),
        (300, {"iterator": ["\ud800"]}, ValueError, "surrogates"),
    ],
)
def test_training_errors_are_one_line_and_change_nothing(vocab_size, arguments, error, words):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["abab"], 257)
    before = tokenizer.get_mergeable_ranks()
    with pytest.raises(error) as raised:
        tokenizer.train_from_iterator(**{"iterator": ["text"], "vocab_size": vocab_size, **arguments})
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert tokenizer.get_mergeable_ranks() == before


def test_an_error_of_the_iterator_comes_through():
    def texts():
        yield "fine"
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        rustbpe.Tokenizer().train_from_iterator(texts(), 300)


@pytest.fixture
def listening_to_ctrl_c():
    """A shell that starts the tests in the background has them ignore SIGINT, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
def test_ctrl_c_stops_training_within_a_second(listening_to_ctrl_c):
    rng = random.Random(0)
    # Long chunks that hardly repeat: minutes of merging.
    texts = ["".join(rng.choices("abcdefghijklmnop", k=1_000_000)) for _ in range(10)]
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.5, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        rustbpe.Tokenizer().train_from_iterator(texts, 10_000_000)
    assert time.monotonic() - sent[0] < 3  # one second, and room for a busy machine


# Encoding


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_encoding_equals_tiktoken_and_decodes_to_the_text(trained, reference, text):
    ids = trained.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert trained.decode(ids) == text
    assert trained.decode_bytes(ids) == text.encode()


def test_encoding_equals_tiktoken_on_every_scalar_value(trained, reference):
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    for start in range(0, len(everything), 20_000):
        characters = everything[start : start + 20_000]
        for text in ("".join(characters), " a".join(characters), "1\n".join(characters)):
            assert trained.encode(text) == reference.encode_ordinary(text)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@pytest.mark.parametrize(
    "pattern",
    [GPT2_PATTERN, R50K_PATTERN, GPT4_PATTERN, O200K_PATTERN, LLAMA3_PATTERN, r"\w+", r"[\s\S]+"],
)
def test_other_patterns_equal_tiktoken(pattern, text):
    tokenizer = _trained_with(pattern)
    assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)


def _trained_with(pattern, known={}):  # noqa: B006 (a memo on purpose)
    if pattern not in known:
        known[pattern] = rustbpe.Tokenizer()
        known[pattern].train_from_iterator(CORPUS, 300, pattern=pattern)
    return known[pattern]


def test_special_tokens_are_ordinary_text(trained):
    text = "<|bos|><|endoftext|>"
    assert trained.decode(trained.encode(text)) == text
    assert len(trained.encode(text)) > 2


@pytest.mark.parametrize("unit", ["a", " ", "\n", "ab", " !", "1", "中", " x"])
def test_a_megabyte_of_one_thing_takes_less_than_a_second(unit):
    text = unit * (1_000_000 // len(unit.encode()))
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator([text[:5000]], 280)
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 1
    assert tokenizer.decode(ids) == text


def test_empty_input(trained):
    assert trained.encode("") == []
    assert trained.batch_encode([]) == []
    assert trained.batch_encode(["", ""]) == [[], []]
    assert trained.batch_encode_u32([]) == trained.batch_encode_u16([]) == (b"", bytes(8))
    assert trained.decode([]) == "" and trained.decode_bytes([]) == b""


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS), threads=st.sampled_from([None, 1, 2, 5]))
def test_batches_equal_single_texts(trained, texts, threads):
    check_batch(trained, texts, threads)


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
def test_large_batches_equal_single_texts(trained, threads):
    check_batch(trained, [text * n for n in range(60) for text in CORPUS[:4]], threads)


def check_batch(tokenizer, texts, threads):
    want = [tokenizer.encode(text) for text in texts]
    assert tokenizer.batch_encode(texts, num_threads=threads) == want
    for encode, dtype in ((tokenizer.batch_encode_u32, "<u4"), (tokenizer.batch_encode_u16, "<u2")):
        tokens, offsets = encode(iter(texts), threads)
        tokens, offsets = np.frombuffer(tokens, dtype), np.frombuffer(offsets, "<u8")
        assert len(offsets) == len(texts) + 1
        assert [tokens[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts))] == want


def test_large_vocabularies_do_not_fit_16_bits():
    singles = [(bytes([value]), value) for value in range(256)]
    pairs = [(bytes([left, right]), 256 + 256 * left + right) for left in range(256) for right in range(256)]
    fitting = rustbpe.Tokenizer.from_ranks((singles + pairs)[: 1 << 16], rustbpe.SPLIT_PATTERN)
    tokens, _ = fitting.batch_encode_u16([" \x7f"])
    assert np.frombuffer(tokens, "<u2").tolist() == fitting.encode(" \x7f")
    larger = rustbpe.Tokenizer.from_ranks((singles + pairs)[: (1 << 16) + 1], rustbpe.SPLIT_PATTERN)
    with pytest.raises(ValueError, match="65537 tokens do not fit 16 bits"):
        larger.batch_encode_u16(["a"])


def test_encoding_from_many_threads_at_once(trained):
    want = [trained.encode(text) for text in CORPUS]
    found = []
    workers = [
        threading.Thread(target=lambda: found.append([trained.encode(text) for text in CORPUS])) for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [want] * 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_encoding_still_works_after_fork():
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, rustbpe; t = rustbpe.Tokenizer(); x = ['ab ' * 50_000] * 4; t.batch_encode_u32(x, 2)\n"
            "pid = os.fork(); t.batch_encode_u32(x, 2)\n"
            "os._exit(0) if pid == 0 else os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
        ],
        timeout=60,
    )
    assert child.returncode == 0


def test_encoding_errors(trained):
    for call in (trained.encode, lambda text: trained.batch_encode([text])):
        with pytest.raises(ValueError, match="surrogates"):
            call("a\udcff")
    with pytest.raises(TypeError, match="texts is one str"):
        trained.batch_encode("text")
    with pytest.raises(ValueError, match="num_threads is 0"):
        trained.batch_encode(["text"], num_threads=0)
    with pytest.raises(TypeError):
        trained.batch_encode([b"bytes"])


# Decoding


@settings(max_examples=300, deadline=None)
@given(raw=st.binary() | st.lists(st.sampled_from(b" \x80\xa0\xbf\xe0\xed\xf0\xf4")).map(bytes))
def test_bytes_that_are_not_utf8_decode_as_in_python(raw):
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.decode(list(raw)) == raw.decode("utf-8", errors="replace")
    assert tokenizer.decode_bytes(list(raw)) == raw


@pytest.mark.parametrize("unknown", [400, -1, 2**32, 2**70])
def test_an_unknown_id_is_named(trained, unknown):
    for decode in (trained.decode, trained.decode_bytes):
        with pytest.raises(ValueError, match=f"token id {unknown} is unknown; ids must be 0..=399"):
            decode([1, unknown])


def test_ids_may_be_numpy_integers(trained):
    ids = trained.encode(CORPUS[0])
    assert trained.decode(np.array(ids)) == trained.decode(np.array(ids, dtype=np.uint16)) == CORPUS[0]


# Saved vocabularies


@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_a_saved_vocabulary_encodes_the_same(trained, text):
    assert _loaded(trained).encode(text) == trained.encode(text)


def _loaded(tokenizer, known={}):  # noqa: B006 (a memo on purpose)
    if tokenizer not in known:
        ranks = tokenizer.get_mergeable_ranks()
        random.Random(0).shuffle(ranks)
        known[tokenizer] = rustbpe.Tokenizer.from_ranks(ranks, tokenizer.get_pattern())
    return known[tokenizer]


def test_a_loaded_vocabulary_is_the_saved_one(trained):
    loaded = _loaded(trained)
    assert loaded.get_mergeable_ranks() == trained.get_mergeable_ranks()
    assert (loaded.get_pattern(), loaded.vocab_size) == (trained.get_pattern(), trained.vocab_size)


def test_byte_ids_need_not_be_byte_values(trained):
    shuffled = list(range(trained.vocab_size))
    random.Random(1).shuffle(shuffled)
    ranks = [(token, shuffled[rank]) for token, rank in trained.get_mergeable_ranks()]
    loaded = rustbpe.Tokenizer.from_ranks(ranks, GPT2_PATTERN)
    reference = as_tiktoken(loaded)
    for text in CORPUS:
        assert loaded.encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda ranks: ranks.append((b"ab", 257)), "token id 257 is out of range"),
        (lambda ranks: ranks.append((b"ab", -1)), "token id -1 is out of range"),
        (lambda ranks: ranks.append((b"ab", 7)), "token id 7 is given twice"),
        (lambda ranks: ranks.append((b"", 256)), "token id 256 is empty"),
        (lambda ranks: ranks.append((b"a", 256)), "same bytes"),
        (lambda ranks: ranks.pop(), "byte 0xff is no token"),
        (lambda ranks: ranks.clear(), "byte 0x00 is no token"),
    ],
)
def test_broken_ranks_are_refused(change, words):
    ranks = [(bytes([byte]), byte) for byte in range(256)]
    change(ranks)
    with pytest.raises(ValueError, match=words) as raised:
        rustbpe.Tokenizer.from_ranks(ranks, rustbpe.SPLIT_PATTERN)
    assert "\n" not in str(raised.value)


def test_a_broken_pattern_is_refused():
    ranks = [(bytes([byte]), byte) for byte in range(256)]
    with pytest.raises(ValueError, match="cannot compile the split pattern"):
        rustbpe.Tokenizer.from_ranks(ranks, "[z-a]")
