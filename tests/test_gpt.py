import math

import pytest
import torch

from nanochat.attention import causal_attention, visible
from nanochat.engine import KVCache
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig, rotary_tables
from nanochat.kernels.pointwise import norm, rotate

SMALL = {"sequence_len": 32, "vocab_size": 97, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}


def build(randomise: bool = True, **changes) -> GPT:
    """A small model; with `randomise` no weight is zero, so that every path shows in the output."""
    model = GPT(GPTConfig(**{**SMALL, **changes}))
    model.init_weights()
    if randomise:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                param.normal_(0, 0.2, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("depth", "params", "flops"), [(20, 560_988_160, 3.4918e9), (32, 1_879_048_192, 12.0796e9)])
def test_published_sizes(depth, params, flops):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=depth, n_head=depth // 2, n_kv_head=depth // 2, n_embd=64 * depth))
    assert model.num_params() == params
    assert model.estimate_flops() == pytest.approx(flops, rel=1e-4)


def test_short_windows_cost_fewer_flops():
    full = build(n_layer=4).estimate_flops()
    mixed = build(n_layer=4, sequence_len=1024, window_pattern="SSSL").estimate_flops()
    span_difference = 1024 + 3 * 256 - 4 * 32
    assert mixed - full == 12 * 64 * span_difference


@pytest.mark.parametrize("init", ["uniform", "spectral"])
def test_first_loss_is_ln_vocab(init):
    model = build(randomise=False)
    model.init_weights(init=init, head_std=0.0)
    idx = torch.randint(97, (2, 16))
    assert model(idx, idx).item() == pytest.approx(math.log(97), abs=1e-6)


@pytest.mark.parametrize("init", ["uniform", "spectral"])
def test_init_fills_poisoned_memory_and_follows_names(init):
    with torch.device("meta"):
        model = GPT(GPTConfig(**SMALL))
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    model.init_weights(init=init)
    assert all(tensor.isfinite().all() for tensor in [*model.parameters(), *model.buffers()])
    deeper = build(randomise=False, n_layer=5)
    deeper.init_weights(init=init)
    for name, param in model.named_parameters():  # a parameter's values depend on its name, not on its neighbours
        assert torch.equal(param, dict(deeper.named_parameters())[name])


def test_init_scales():
    model = build(randomise=False, n_embd=256, n_head=4, n_kv_head=1)
    model.init_weights(init="uniform")
    attn, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    assert attn.c_k.weight.std().item() == pytest.approx(1 / 16, rel=0.03)
    model.init_weights(init="spectral")
    assert attn.c_k.weight.std().item() == pytest.approx(1 / 16 * math.sqrt(64 / 256), rel=0.03)  # fan_out < fan_in
    assert mlp.c_fc.weight.std().item() == pytest.approx(1 / 16, rel=0.03)  # fan_out > fan_in: capped at 1
    assert attn.c_proj.weight.abs().max() == 0
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.03)
    model.init_weights(init="spectral", head_std=0.02, zero_proj=False, gain=0.5)
    assert mlp.c_proj.weight.std().item() == pytest.approx(0.5 / 32 * math.sqrt(256 / 1024), rel=0.03)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.03)


def slow_attention(q, k, v, window):
    """One query at a time, in fp64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    offset = k.size(1) - q.size(1)
    for b in range(q.size(0)):
        for h in range(q.size(2)):
            group = h // (q.size(2) // k.size(2))
            for t in range(q.size(1)):
                here = t + offset
                first = 0 if window < 0 else max(0, here - window)
                keys, values = (x[b, first : here + 1, group].double() for x in (k, v))
                weights = (keys @ q[b, t, h].double() / math.sqrt(q.size(3))).softmax(0)
                out[b, t, h] = weights @ values
    return out


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (1, 9)])
@pytest.mark.parametrize("window", [-1, 0, 3, 20])
def test_attention_matches_slow_reference(queries, keys, window):
    q, k, v = torch.randn(2, queries, 4, 8), torch.randn(2, keys, 2, 8), torch.randn(2, keys, 2, 8)
    torch.testing.assert_close(
        causal_attention(q, k, v, window).double(), slow_attention(q, k, v, window), atol=1e-5, rtol=1e-5
    )


def test_visible_counts():
    assert visible(4, 6, 2, torch.device("cpu")).sum(1).tolist() == [3, 3, 3, 3]
    assert visible(4, 4, -1, torch.device("cpu")).sum(1).tolist() == [1, 2, 3, 4]


def test_rotary_keeps_length_and_depends_on_distance_only():
    cos, sin = rotary_tables(64, 16, torch.device("cpu"))
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    turned = [(rotate(q, cos[:, i : i + 1], sin[:, i : i + 1]), rotate(k, cos[:, j : j + 1], sin[:, j : j + 1]))
              for i, j in ((7, 3), (50, 46))]  # fmt: skip
    (q1, k1), (q2, k2) = turned
    assert (q1 * k1).sum().item() == pytest.approx((q2 * k2).sum().item(), abs=1e-4)
    assert q1.norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    # the sense of rotation of published weights: position 1 maps (1, 0) to (cos 1, -sin 1)
    unit = torch.zeros(1, 1, 1, 16)
    unit[..., 0] = 1
    out = rotate(unit, cos[:, 1:2], sin[:, 1:2])[0, 0, 0]
    assert out[0].item() == pytest.approx(math.cos(1)) and out[8].item() == pytest.approx(-math.sin(1))


def test_causality():
    model = build(window_pattern="SL")
    idx = torch.randint(97, (1, 24))
    changed = idx.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 97
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("pattern", ["L", "SSSL"])
@pytest.mark.parametrize("chunks", [[24], [10, 14], [1] * 24, [7, 1, 1, 15]])
@torch.no_grad()
def test_kv_cache_gives_the_logits_of_the_full_forward(pattern, chunks):
    # sequence_len 16 makes the short window 16 < 24 tokens, so that windows really cut
    model = build(window_pattern=pattern, sequence_len=16)
    idx = torch.randint(97, (2, 24))
    cache = KVCache(2, 2, 24, 16, 3)
    pieces = [model(piece, kv_cache=cache) for piece in idx.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), atol=2e-5, rtol=1e-5)
    assert cache.get_pos() == 24 and cache.cache_seqlens.tolist() == [24, 24]


def test_logits_of_some_places_are_those_among_all():
    model = build()
    idx, at = torch.randint(97, (3, 16)), (torch.tensor([0, 2, 2, 1]), torch.tensor([15, 0, 3, 3]))
    torch.testing.assert_close(model(idx, at=at), model(idx)[at])
    assert model(idx, at=(at[0][:0], at[1][:0])).shape == (0, 97)


def test_all_masked_batch_gives_zero_loss_and_gradient():
    model = build()
    idx = torch.randint(97, (2, 8))
    loss = model(idx, torch.full_like(idx, -1))
    loss.backward()
    assert loss.item() == 0.0
    assert all(param.grad.abs().max() == 0 for param in model.parameters())


def test_logits_are_capped_and_normed_inputs_scale_free():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    logits = model(torch.randint(97, (1, 8)))
    assert logits.dtype == torch.float32 and logits.abs().max() <= 15
    x = torch.randn(3, 64)
    torch.testing.assert_close(norm(x), norm(7 * x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"n_embd": 66}, {"n_kv_head": 3}, {"window_pattern": "SX"}, {"window_pattern": ""}]
)
def test_impossible_shapes_are_one_line_errors(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        GPTConfig(**{**SMALL, **changes})
