"""The kernels of decoding against the plain code; test_decode.py runs this by Triton's interpreter."""

import dataclasses

import torch
import torch.nn.functional as F

from nanochat.engine import KVCache, Sampling
from nanochat.engine.fused import Fused, linear
from nanochat.engine.sampling import sample_next_token
from nanochat.gpt import GPT, norm
from nanochat.kernels import decode
from tests.models import make_config

FEATURES = {"attn_gate": True, "smear": True, "backout": True, "ngram_embeds": 3, "key_offset": True, "ngram_slots": 1}


def check_products(rows: int, columns: int, depth: int) -> None:
    x, weight, more = torch.randn(rows, depth), torch.randn(columns, depth) / depth**0.5, torch.randn(rows, columns)
    torch.testing.assert_close(linear(x, weight, add=more, factor=0.5), more + 0.5 * x @ weight.T)
    y = norm(x) @ weight.T
    torch.testing.assert_close(linear(x, weight, normed=True, square=True), F.relu(y).square())
    capped = linear(x, weight, normed=True, cap=15.0, factor=9.0)
    torch.testing.assert_close(capped, 15 * torch.tanh(9 * y / 15), atol=1e-4, rtol=1e-4)


def check_sampling() -> None:
    decode.PART = 256  # sorting is slow here
    logits, numbers = 3 * torch.randn(6, 700), torch.rand(6)
    for cut in ({"top_k": 5}, {"top_k": 120}, {"top_k": 20, "top_p": 0.7}, {"top_k": 1}):
        sampling = Sampling(max_new_tokens=1, temperature=0.8, **cut)
        found = decode.sample(logits, numbers, *sampling.drawn_by)
        assert torch.equal(found, sample_next_token(logits, numbers, sampling))
    alike, numbers = torch.zeros(8, 100), torch.arange(0.01, 1, 1 / 8)  # where logits are equal, by their number
    assert decode.sample(alike, numbers, 1.0, 8, None).tolist() == list(range(8))
    assert decode.sample(alike, numbers, 1.0, 8, 0.5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@torch.no_grad()
def check_steps(arch: str, kv_heads: int, programs: int, **changes) -> None:
    """Rows of several lengths, one of them not live, against the full forward pass."""
    decode.PROGRAMS = programs
    size = {"n_layer": 3, "n_embd": 48, "head_dim": 24, "vocab_size": 60, "sequence_len": 80}
    config = dataclasses.replace(make_config(arch, **size, **changes), n_kv_head=kv_heads)  # type: ignore[arg-type]
    model = GPT(config).eval()
    model.init_weights(seed=1, head_std=0.3, zero_proj=False)
    for name, param in model.named_parameters():
        if "gate" in name or "ngram_embeds" in name or param.ndim == 1:
            param.add_(0.3 * torch.randn(param.shape))
    twin, lengths = model.inference_copy(), [1, 66]
    fused = Fused(twin)
    windows = [config.window(layer) for layer in range(config.n_layer)]
    cache = KVCache(3, kv_heads, 70, 24, config.n_layer, windows=windows, key_offset=config.key_offset)
    idx = torch.randint(config.vocab_size, (2, 70))
    reading = cache.rows(0, 2)
    reading.take(lengths)
    twin(idx[:, :66], kv_cache=reading)
    step = cache.fixed(3, torch.tensor([1, 1, 0], dtype=torch.int32))
    for count in range(2):
        ends = [length + count for length in lengths]
        tokens = [idx[0, ends[0]], idx[1, ends[1]], idx[0, 0]]
        logits = fused.step(torch.stack(tokens).unsqueeze(1), step)
        for row, end in enumerate(ends):
            torch.testing.assert_close(logits[row], model(idx[row : row + 1, : end + 1])[0, -1], atol=1e-4, rtol=1e-4)
        cache.lengths[:2] += 1
    assert cache.cache_seqlens.tolist() == [3, 68, 0]


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for shape in ((1, 9, 96), (1, 3, 20_000), (1, 250, 8448), (3, 40, 96)):
        check_products(*shape)
    check_sampling()
    check_steps("nanochat", 1, 12, window_pattern="SL", short_window=9)
    check_steps("speedrun", 2, 1, mup_base_width=24, base_depth=2)
    check_steps("speedrun", 2, 6, long_window=40, short_window=7, document_token=3, **FEATURES)
