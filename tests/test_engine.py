import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine import Batch, Engine, KVCache, Sampling
from nanochat.engine.sampling import TOOL_TOKENS, sample_next_token
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig

SPECIALS = {name: number for number, name in enumerate(TOOL_TOKENS)}
BOS, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(6)
FIRST_CHARACTER = 6


def drawn(**options):
    """One token by these rules."""
    return Sampling(max_new_tokens=1, **options)


class FakeTokenizer:
    """Special tokens, then one token a character from ' ' on."""

    def encode_special(self, name):
        return SPECIALS[name]

    def encode(self, text):
        return [ord(character) - 32 + FIRST_CHARACTER for character in text]

    def decode(self, ids):
        return "".join(chr(token - FIRST_CHARACTER + 32) for token in ids)


class Script:
    """Stands in for a model: prompt i is followed by script[i], whatever else is heard; then by <|assistant_end|>."""

    config = GPTConfig(sequence_len=64, vocab_size=110, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)

    def __init__(self, *scripts):
        self.scripts = [list(script) for script in scripts]
        self.heard = []

    def get_device(self):
        return torch.device("cpu")

    def __call__(self, idx, kv_cache):
        names = kv_cache.k_cache[0, :, 0, 0, 0]  # which prompt a row belongs to travels in its first key
        if kv_cache.get_pos() == 0:
            names.copy_(torch.arange(idx.size(0)))
        kv_cache.begin(idx.size(1))
        kv_cache.advance(idx.size(1))
        self.heard.append(idx[:, -1].tolist())
        step = len(self.heard) - 1
        logits = torch.zeros(idx.size(0), idx.size(1), 110)
        for row, name in enumerate(names.long().tolist()):
            said = self.scripts[name]
            logits[row, -1, said[step] if step < len(said) else END] = 1e4
        return logits


@pytest.fixture(scope="module")
def engine():
    model = GPT(GPTConfig(sequence_len=24, vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3, generator=generator)
    return Engine(model.eval(), FakeTokenizer())


@torch.no_grad()
def slow_greedy(model, tokens, count):
    """The whole sequence through the model again for every token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in (BOS, END):
            return tokens[:-1]
    return tokens


def test_greedy_equals_recomputing_everything(engine):
    prompt = [5, 9, 3, 22]
    sequences, masks = engine.generate_batch(prompt, num_samples=2, max_tokens=15, temperature=0)
    assert sequences[0] == sequences[1] == slow_greedy(engine.model, prompt, 15)
    assert masks[0] == [0] * 4 + [1] * (len(sequences[0]) - 4)


def test_rows_differ_from_the_first_token_on_and_repeat_by_seed(engine):
    first = next(column for column, _ in engine.generate([5], num_samples=8, max_tokens=1, seed=3))
    assert len(set(first)) > 1
    again = next(column for column, _ in engine.generate([5], num_samples=8, max_tokens=1, seed=3))
    assert first == again


def test_a_row_gets_the_same_tokens_alone_and_in_a_batch(engine):
    alone, _ = engine.generate_batch([5, 6], num_samples=1, max_tokens=12, seed=11)
    batch, _ = engine.generate_batch([5, 6], num_samples=4, max_tokens=12, seed=11)
    assert alone[0] == batch[0]


def test_top_k_one_is_greedy_and_temperature_zero_needs_no_numbers():
    logits = torch.randn(6, 40)
    assert torch.equal(sample_next_token(logits, torch.rand(6), drawn(top_k=1)), logits.argmax(-1))
    assert torch.equal(sample_next_token(logits, torch.empty(0), drawn(temperature=0.0)), logits.argmax(-1))


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.0, 0.1]])).expand(3000, -1)
    uniform = torch.rand(3000, generator=torch.Generator().manual_seed(0))
    for top_k, expected in ((None, [0.7, 0.2, 0.0, 0.1]), (2, [7 / 9, 2 / 9, 0.0, 0.0])):
        counts = torch.bincount(sample_next_token(logits, uniform, drawn(top_k=top_k)), minlength=4) / 3000
        torch.testing.assert_close(counts, torch.tensor(expected), atol=0.04, rtol=0)
        assert counts[2] == 0
    sharp = sample_next_token(logits, uniform, drawn(temperature=0.5))  # probabilities go with their squares
    assert (sharp == 0).float().mean() == pytest.approx(0.49 / 0.54, abs=0.03)


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([None, 1, 3, 400]))
def test_a_sample_is_the_token_at_which_the_sum_passes_the_number(seed, number, top_k):
    logits = 4 * torch.randn(1, 300, generator=torch.Generator().manual_seed(seed))
    token = sample_next_token(logits, torch.tensor([number]), drawn(temperature=0.7, top_k=top_k)).item()
    order = logits[0].argsort(descending=True).tolist() if top_k and top_k < 300 else list(range(300))
    kept = order[: top_k or 300]
    probabilities = (logits[0, kept].double() / 0.7).softmax(0).tolist()
    before = sum(probabilities[: kept.index(token)])
    assert before - 1e-5 <= number <= before + probabilities[kept.index(token)] + 1e-5


def test_several_prompts_at_once_are_as_each_alone(engine):
    prompts = [[5, 9, 3, 22], [7], [30, 31, 32, 33, 34, 35, 36, 8], [11, 12]]
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 20}):
        together = engine.generate_many(prompts, Sampling(num_samples=3, max_new_tokens=14, **options), [1, 50, 7, 9])
        for prompt, seed, found in zip(prompts, [1, 50, 7, 9], together, strict=True):
            assert found == engine.generate_batch(prompt, num_samples=3, max_tokens=14, seed=seed, **options)


def test_windows_and_padding_together():
    config = GPTConfig(
        sequence_len=256, vocab_size=110, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="S"
    )
    model = GPT(config)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    engine = Engine(model.eval(), FakeTokenizer())
    assert config.window(0) == 128
    prompts = [[10 + i % 90 for i in range(150)], [8, 9]]
    together = engine.generate_many(prompts, Sampling(max_new_tokens=10, temperature=0))
    assert together == [engine.generate_batch(prompt, max_tokens=10, temperature=0) for prompt in prompts]


def words(text):
    """'ab<cd>' as ids: < and > are the python brackets."""
    return [{"<": PYTHON, ">": PYTHON_END}.get(c) or FakeTokenizer().encode(c)[0] for c in text]


def test_the_calculator_answers_each_row_by_itself():
    model = Script(words("<2*21>" + "_" * 4 + "!"), words("no tool !"), words("<a+1>?"), words("<7-5>" + "_" * 3))
    sequences, masks = play(model, max_tokens=30)
    decoded = [FakeTokenizer().decode([t for t in row[1:] if t >= FIRST_CHARACTER]) for row in sequences]
    assert decoded == ["2*2142!", "no tool !", "a+1?", "7-52"]
    assert sequences[0] == [BOS, *words("<2*21>"), OUTPUT, *words("42"), OUTPUT_END, *words("!")]
    assert masks[0] == [0] + [1] * 6 + [0] * 4 + [1]
    assert masks[2] == [0] + [1] * 6
    # what was put in is also what the model reads next
    assert [heard[0] for heard in model.heard[7:11]] == [OUTPUT, *words("42"), OUTPUT_END]


def test_a_call_that_is_cut_off_or_never_opened():
    model = Script(words("<1+1"), words("1+1>"), words("<<1+1>___"))
    sequences, _ = play(model, max_tokens=20)
    assert sequences[0] == [BOS, *words("<1+1")] and sequences[1] == [BOS, *words("1+1>")]
    assert sequences[2] == [BOS, *words("<<1+1>"), OUTPUT, *words("2"), OUTPUT_END]


def test_max_tokens_counts_what_is_put_in():
    model = Script(words("<10*10>"))
    sequences, masks = play(model, max_tokens=9)
    assert sequences[0] == [BOS, *words("<10*10>"), OUTPUT, *words("1")] and len(masks[0]) == 10


def test_rows_that_have_ended_leave_the_batch():
    model = Script(*(words("x" * length) for length in (1, 1, 9, 2)))
    sequences, _ = play(model, max_tokens=20)
    assert [len(row) for row in sequences] == [2, 2, 10, 3]
    assert [len(heard) for heard in model.heard] == [4, 4, 2, 1, 1, 1, 1, 1, 1, 1]


def play(model, max_tokens):
    """(sequences, masks), one for each script."""
    sampling = Sampling(max_new_tokens=max_tokens)
    results = Engine(model, FakeTokenizer()).generate_many([[BOS]] * len(model.scripts), sampling)
    return [rows[0] for rows, _ in results], [masks[0] for _, masks in results]


def test_rows_that_are_rounded_up_change_no_answer(engine, monkeypatch):
    """As those of bf16 are on a CPU, whose products are planned for each number of rows; here in fp32, to be equal."""
    sampling, prompts, heard, found = Sampling(num_samples=20, max_new_tokens=12), [[5, 9], [7, 8, 6]], [], []

    def forward(idx, kv_cache):
        heard.append(idx.size(0))
        return engine.model(idx, kv_cache=kv_cache)

    monkeypatch.setattr(engine, "ready", lambda: forward)
    for multiple in (1, 16):
        batch = engine.batch([engine.samples(i, prompt, sampling, i) for i, prompt in enumerate(prompts)])
        batch.multiple, rows = multiple, [row for samples in batch.waiting for row in samples]
        heard.clear()
        while len(batch):
            batch.step()
        found.append([row.tokens for row in rows])
    assert found[0] == found[1] and set(heard) == {2, 32, 40}  # 2 prompts
    model = GPT(engine.model.config, torch.bfloat16)
    assert Batch(model, model, 4, 1, 8).multiple == 16


def test_prefill_repeats_one_row():
    one, many = KVCache(1, 2, 5, 4, 3), KVCache(4, 2, 9, 4, 3)
    for layer in range(3):
        one.insert(layer, torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4))
    one.advance(5)
    many.prefill(one)
    assert many.get_pos() == 5 and torch.equal(many.k_cache[:, 3, :5], one.k_cache[:, 0])
    many.reset()
    assert many.get_pos() == 0 and many.cache_seqlens.sum() == 0


def test_errors(engine):
    with pytest.raises(UserError, match="empty prompt"):
        next(engine.generate([]))
    with pytest.raises(UserError, match="empty prompt"):
        engine.generate_many([[1], []], Sampling(max_new_tokens=3))
    with pytest.raises(UserError, match="top_k=0"):
        next(engine.generate([1], top_k=0))
    with pytest.raises(UserError, match="temperature=-1"):
        Sampling(max_new_tokens=1, temperature=-1)
    with pytest.raises(UserError, match="full"):
        KVCache(1, 1, 2, 4, 1).insert(0, torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))


@given(st.integers(0, 10**6), st.floats(0.05, 1), st.sampled_from([None, 3, 50]))
def test_top_p_keeps_the_likeliest_tokens_that_reach_it(seed, top_p, top_k):
    logits = 3 * torch.randn(1, 60, generator=torch.Generator().manual_seed(seed))
    order = logits[0].argsort(descending=True).tolist()[: top_k or 60]
    probabilities = logits[0, order].double().softmax(0)
    kept = int((probabilities.cumsum(0) - probabilities < top_p - 1e-6).sum())  # those that are not beyond it yet
    numbers = torch.linspace(0, 1 - 1e-6, 400)
    chosen = sample_next_token(logits.expand(400, -1), numbers, drawn(top_p=top_p, top_k=top_k)).unique().tolist()
    assert set(chosen) <= set(order[: kept + 1])
    assert {i for i, p in zip(order[:kept], probabilities, strict=False) if p > 0.01} <= set(chosen)


def test_rows_join_and_leave_while_others_go_on(engine):
    prompts = [[5 + i, 9, 3, 22][: 1 + i % 4] for i in range(9)]
    sampling, limits = Sampling(num_samples=2, max_new_tokens=12), [1 + i % 7 for i in range(8)] + [0]
    found = dict((number, rest) for number, *rest in engine.answers(prompts, sampling, range(9), limits=limits, rows=5))
    for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        sequences, masks = engine.generate_batch(prompt, num_samples=2, max_tokens=limit, seed=number)
        assert [list(sequences), list(masks)] == [list(part) for part in found[number]]


@pytest.fixture(scope="module", params=[{}, {"ngram_embeds": 4, "ngram_slots": 1, "key_offset": True}])
def windowed(request):
    """With windows that are much shorter than the cache, documents, and the tokens before."""
    config = GPTConfig(
        sequence_len=3000, vocab_size=110, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL",
        short_window=20, long_window=60, document_token=BOS, smear=True, **request.param,
    )  # fmt: skip
    model = GPT(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3, generator=generator)
    return Engine(model.eval(), FakeTokenizer())


def test_a_cache_that_keeps_no_more_than_the_windows(windowed):
    prompt = [BOS, *(6 + i * i % 100 for i in range(1300))]
    sampling = Sampling(max_new_tokens=6, temperature=0)
    batch = windowed.batch([windowed.samples(0, prompt, sampling, 1), windowed.samples(1, prompt[:7], sampling, 1)])
    rows = [samples[0] for samples in batch.waiting]
    assert max(layer.size(1) for layer in batch.cache.k_cache) < 1100
    while len(batch):
        batch.step()
    assert [row.tokens for row in rows] == [slow_greedy(windowed.model, p, 6) for p in (prompt, prompt[:7])]


def test_what_another_row_has_read_is_not_read_again(windowed):
    shared = [BOS, *(6 + i * 7 % 100 for i in range(60))]
    batch = Batch(windowed.model, windowed.ready(), rows=3, prefills=2, length=200, remember=True)
    heard = []
    batch.forward = lambda idx, kv_cache: heard.append(idx.size(1)) or windowed.model(idx, kv_cache=kv_cache)

    def say(prompt, count=5):
        row = windowed.samples(0, prompt, Sampling(max_new_tokens=count, temperature=0), 1)
        batch.join(row)
        return row[0]

    first = say(shared)
    batch.step()
    second = say([*shared, 30, 31])  # while the first is decoded
    while len(batch):
        batch.step()
    third = say([*shared, *first.tokens[len(shared) :], 40, 41])  # as the next turn of a conversation does
    others = [say([50 + i] * 30) for i in range(2)]
    while len(batch):
        batch.step()
    read = [length for length in heard if length > 1]
    assert read[0] == len(shared) and read[1] == 2 and 3 <= read[2] <= 30
    for row in (first, second, third, *others):
        assert row.tokens == slow_greedy(windowed.model, row.tokens[: len(row.tokens) - row.new_tokens], row.new_tokens)


def test_rows_that_nobody_waits_for_leave(engine):
    batch = Batch(engine.model, engine.ready(), rows=2, prefills=1, length=40)
    groups = [engine.samples(i, [5 + i], Sampling(max_new_tokens=20), i) for i in range(4)]
    for samples in groups:
        batch.join(samples)
    batch.step()
    batch.leave([groups[0][0], groups[3][0]])
    seen = set()
    while len(batch):
        seen |= {row.prompt for row, _, _ in batch.step()}
    assert seen == {1, 2} and groups[3][0].new_tokens == 0


@torch.no_grad()  # with gradients, norms in bf16 round once less
def test_weights_are_cast_once_and_again_when_they_change():
    config = GPTConfig(sequence_len=64, vocab_size=110, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(config, torch.bfloat16)
    model.init_weights(head_std=0.5, zero_proj=False)
    engine = Engine(model.eval(), FakeTokenizer())
    for _ in range(2):
        runs = engine.ready()
        assert runs is not model and {param.dtype for param in runs.parameters()} == {torch.bfloat16}
        idx = torch.randint(110, (2, 20))
        assert torch.equal(runs(idx), model(idx))
        model.transformer.h[1].mlp.c_fc.weight += 1.0
    assert engine.ready() is runs and torch.equal(runs(idx), model(idx))


@torch.enable_grad()
def test_weights_that_the_optimizer_has_changed_are_those_that_answer():
    model = GPT(GPTConfig(sequence_len=32, vocab_size=110, n_layer=2, n_head=2, n_kv_head=2, n_embd=32), torch.bfloat16)
    model.init_weights(head_std=0.5, zero_proj=False)
    engine, optimizer, idx = Engine(model, FakeTokenizer()), model.setup_optimizer(), torch.randint(110, (2, 20))
    first = [param.clone() for param in engine.ready().parameters()]
    model(idx, idx).backward()
    optimizer.step()
    for param, before, copied in zip(model.parameters(), first, engine.ready().parameters(), strict=True):
        assert torch.equal(param.to(copied.dtype), copied) and not torch.equal(before, copied)
