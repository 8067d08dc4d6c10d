import pytest
import torch

from nanochat.engine import Engine, KVCache, sample_next
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig

BOS, END = 0, 1


class FakeTokenizer:
    def get_bos_token_id(self):
        return BOS

    def encode_special(self, text):
        return {"<|bos|>": BOS, "<|assistant_end|>": END}[text]


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


def test_top_k_one_is_greedy_and_temperature_zero_needs_no_generator():
    logits = torch.randn(6, 40)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    assert torch.equal(sample_next(logits, generators, 1.0, 1), logits.argmax(-1))
    assert torch.equal(sample_next(logits, [], 0.0, None), logits.argmax(-1))


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    generator = [torch.Generator().manual_seed(0)]
    counts = torch.zeros(3)
    for _ in range(3000):
        counts[sample_next(logits, generator, 1.0, None)] += 1
    torch.testing.assert_close(counts / 3000, torch.tensor([0.7, 0.2, 0.1]), atol=0.04, rtol=0)


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
    with pytest.raises(UserError, match="full"):
        KVCache(1, 1, 2, 4, 1).insert(0, torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
