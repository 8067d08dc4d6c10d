"""The features of the speedrun architecture, and the flags that choose them."""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nanochat.attention import load_flex_attention
from nanochat.config import ArchFlags, build_config, init_spec, resolve
from nanochat.engine import KVCache
from nanochat.errors import UserError
from nanochat.gpt import GPT, ngram_slots
from nanochat.optim.schedule import window_length
from nanochat.parallel import disable_compile
from tests.models import make_config

BOS = 0
SMALL = {"n_layer": 6, "n_embd": 64, "head_dim": 16, "vocab_size": 97, "sequence_len": 64, "document_token": BOS}
WINDOWS = {"long_window": 20, "short_window": 7}
EVERYTHING = {
    "attn_gate": True,
    "smear": True,
    "backout": True,
    "ngram_embeds": 4,
    "ngram_heads": 4,
    "key_offset": True,
}


def build(randomise=True, document_token=BOS, **changes) -> GPT:
    """A small speedrun model; with `randomise` no weight is what it begins with, so that every path shows."""
    config = make_config("speedrun", **{**SMALL, "document_token": document_token, **WINDOWS, **changes})
    model = GPT(config)
    model.init_weights()
    if randomise:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                param.normal_(0, 0.3, generator=generator)
    return model.eval()


def text(rows=2, length=48, documents=4):
    """Random tokens; each row starts with BOS and holds some more."""
    idx = torch.randint(1, 97, (rows, length))
    for row in idx:
        row[torch.randperm(length - 1)[: documents - 1] + 1] = BOS
    idx[:, 0] = BOS
    return idx


def test_the_reference_model_has_its_size():
    with torch.device("meta"):
        model = GPT(build_config(resolve(ArchFlags(arch="speedrun", depth=12, width=768)), 50304, 50256))
    scalars = 12 + 12 + 6 + 2 * 6  # shortcut, skips, mixes of the six layers with value embeddings
    attention, mlp, table = 11 * 4 * 768**2, 12 * 8 * 768**2, 50304 * 768
    assert model.num_params() == attention + mlp + 5 * table + scalars == 275_742_762
    assert not hasattr(model.transformer.h[7], "attn")
    assert 6 * (attention + mlp + table) == pytest.approx(727e6, rel=1e-3)  # published FLOPs of matmuls a token
    assert model.estimate_flops() == 6 * (attention + mlp + table) + 12 * 768 * (3 * 1792 + 8 * 896)


@pytest.mark.parametrize(
    ("changes", "gained"),
    [
        ({"value_embeds": "none"}, -3 * 97 * 64 - 6 * 2),
        ({"value_embeds": "gated"}, -6 * 2 + 3 * 4 * 12),
        ({"value_embeds": "layers"}, 3 * 97 * 64),
        ({"unet": False}, -3),
        ({"x0_shortcut": False}, -12),
        ({"attn_gate": True}, 6 * 4 * 12),
        ({"smear": True}, 13),
        ({"backout": True}, 1),
        ({"rotary_half": False}, 0),
        ({"attn_scale": 0.0}, 0),
        ({"scaled_logits": False}, 0),
        ({"window_pattern": "L"}, 0),
        ({"long_window": 5, "short_window": 5}, 0),
        ({"document_token": -1}, 0),
    ],
)
def test_each_feature_can_be_ablated_and_does_something(changes, gained):
    whole, changed = build(), build(**changes)
    assert changed.num_params() - whole.num_params() == gained
    own = dict(changed.named_parameters())
    with torch.no_grad():
        for name, param in whole.named_parameters():
            if name in own and own[name].shape == param.shape:
                own[name].copy_(param)
    idx = text()
    assert not torch.allclose(whole(idx), changed(idx), atol=1e-3)


def test_every_parameter_learns():
    model = build(**EVERYTHING)
    idx = text()
    model(idx, idx.roll(-1, 1)).backward()
    still = [name for name, param in model.named_parameters() if param.grad is None or not param.grad.abs().max() > 0]
    assert still == []
    gated = build(value_embeds="gated")
    gated(idx, idx.roll(-1, 1)).backward()
    assert all(param.grad.abs().max() > 0 for param in gated.parameters())


def test_new_features_begin_as_nothing():
    """Gates, smear, backout and n-gram embeddings start as the identity, so that switching one on does not change the
    first step. An offset of the keys has no weights to begin with."""
    idx = text()
    plain, full = build(randomise=False), build(randomise=False, **{**EVERYTHING, "key_offset": False})
    for model in (plain, full):
        model.init_weights(head_std=0.1, zero_proj=False)
    torch.testing.assert_close(full(idx), plain(idx), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("features", [{}, EVERYTHING, {"value_embeds": "gated"}])
@torch.no_grad()
def test_documents_in_a_row_are_as_if_alone(features):
    model = build(**features)
    first, second = text(1, 20, 1), text(1, 28, 1)
    packed = model(torch.cat([first, second], dim=1))
    torch.testing.assert_close(packed[:, :20], model(first), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(packed[:, 20:], model(second), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "features",
    [
        EVERYTHING,
        {"value_embeds": "gated"},
        {"value_embeds": "layers"},
        {"document_token": -1, "smear": True, "ngram_embeds": 4, "key_offset": True},
    ],
)
@pytest.mark.parametrize("chunks", [[48], [13, 1, 1, 33], [1] * 48])
@torch.no_grad()
def test_kv_cache_gives_the_logits_of_the_full_forward(features, chunks):
    model, idx = build(**features), text()
    cache = KVCache(2, 4, 48, 16, 6, key_offset=model.config.key_offset)
    pieces = [model(piece, kv_cache=cache) for piece in idx.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(idx), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "features", [EVERYTHING, {"document_token": -1, "smear": True, "ngram_embeds": 4, "key_offset": True}]
)
@torch.no_grad()
def test_kv_cache_with_rows_of_their_own_lengths(features):
    """Tokens behind those that count are as if they were not there, in any part of a row."""
    model, idx = build(**features), text(3, 48, 4)
    windows = [model.config.window(layer) for layer in range(6)]
    cache = KVCache(3, 4, 60, 16, 6, windows=windows, key_offset=model.config.key_offset)
    read = [0, 0, 0]
    for counts in ([5, 12, 1], [13, 2, 9], [1, 1, 1], [1, 1, 1], [20, 30, 3], [1, 1, 1]):
        width = max(counts)
        piece = [
            torch.cat([row[at : at + n], row.new_full((width - n,), 7)])
            for row, at, n in zip(idx, read, counts, strict=True)
        ]
        cache.take(counts)
        out = model(torch.stack(piece), kv_cache=cache)[:, 0]
        read = [at + n for at, n in zip(read, counts, strict=True)]
        assert cache.lengths.tolist() == cache.cache_seqlens.tolist() == read
        for row, at in enumerate(read):
            torch.testing.assert_close(out[row], model(idx[row : row + 1, :at])[0, -1], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_an_ngram_is_the_same_wherever_it_stands_and_two_rarely_share_all_slots():
    model = build(ngram_embeds=3, ngram_slots=5, ngram_heads=2)
    embed = functools.partial(model.embed_ngrams, kv_cache=None)
    one, other = embed(torch.tensor([[BOS, 5, 6, 7, 8]])), embed(torch.tensor([[9, 4, 5, 6, 7]]))
    assert torch.equal(one[0, 3], other[0, 4])
    assert not torch.equal(one[0, 2], other[0, 3])  # what is before the two tokens is another: BOS, and 4
    every = torch.cartesian_prod(torch.arange(97), torch.arange(97)).T
    slots = ngram_slots([*every.unsqueeze(1)], model.ngram_factors, 5 * 97).squeeze(0)
    assert slots.min() >= 0 and (slots.amax(0) < torch.tensor([5 * 97, 2 * 5 * 97])).all()
    uses = slots[:, 0].bincount(minlength=5 * 97)
    assert uses.min() > 0 and uses.max() < 60  # 19.4 on average
    shared = len(slots) - len(slots.unique(dim=0))
    assert shared < 1.3 * 97**4 / 2 / (5 * 97) ** 2  # as many pairs as chance has them


def test_the_ngram_preset():
    flags = resolve(ArchFlags(arch="ngram", depth=12))
    with torch.device("meta"):
        model, base = (
            GPT(build_config(resolve(ArchFlags(arch=arch, depth=12)), 32768, 0)) for arch in ("ngram", "speedrun")
        )
    assert flags.matrix_lr == 0.05 and model.config.key_offset
    tables = 3 * 5 + (11 - 3)  # n-grams, and value embeddings of each layer that has attention instead of three
    assert model.num_params() - base.num_params() == tables * 32768 * 768 + 12 + 5 * 2
    assert model.estimate_flops() == base.estimate_flops()  # looking up is none
    assert model.num_params(lookups=False) == base.num_params(lookups=False) + 12 + 5 * 2


def test_tables_of_the_ngram_preset_do_not_grow_with_depth_beyond_twelve_layers():
    shallow, deep = (resolve(ArchFlags(arch="ngram", depth=depth, ngram_slots=2)) for depth in (12, 20))
    assert (shallow.value_embeds, deep.value_embeds) == ("layers", "ends")
    own = resolve(dataclasses.replace(deep, value_embeds="layers"))
    sizes = []
    for flags in (deep, own):
        with torch.device("meta"):
            model = GPT(build_config(flags, 65536, 0))
        sizes.append(model.num_params() - model.num_params(lookups=False))
    assert build_config(resolve(ArchFlags(ngram_slots=2)), 65536) == build_config(resolve(ArchFlags()), 65536)
    assert sizes == [(3 * 2 + 3) * 65536 * 1280, (3 * 2 + 19) * 65536 * 1280]  # what PROFILE=full has: 0.75 billion


@torch.no_grad()
def test_growing_windows_are_tensors():
    """set_window gives what a model with those windows gives, and compiles nothing again."""
    model, idx = build(long_window=600, short_window=300, sequence_len=700), text(1, 700, 1)
    small = build(long_window=256, short_window=128, sequence_len=700)
    small.load_state_dict(model.state_dict())
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    full = compiled(idx)
    model.set_window(256)
    torch.testing.assert_close(compiled(idx), small(idx), atol=2e-4, rtol=1e-4)
    model.set_window(600)
    torch.testing.assert_close(compiled(idx), full)
    assert counter.frame_count == 1
    assert not torch.allclose(full, small(idx), atol=1e-2)
    torch._dynamo.reset()


@torch.no_grad()
def test_block_masks_give_the_same_and_growing_them_compiles_nothing():
    """As on a GPU, where the compiled model makes masks for FlexAttention; forward alone: a CPU has no backward."""
    model, idx = build(long_window=600, short_window=300, sequence_len=700, n_layer=4), text(1, 700, 3)
    dense = model(idx)
    model.block_masks = True
    load_flex_attention()  # as compile_model does
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    torch.testing.assert_close(compiled(idx), dense, atol=2e-4, rtol=1e-4)
    model.set_window(256)
    grown = compiled(idx)
    with disable_compile(model):
        torch.testing.assert_close(grown, model(idx), atol=2e-4, rtol=1e-4)
    assert counter.frame_count == 1 and model.block_masks
    torch._dynamo.reset()


def test_window_schedule():
    lengths = [window_length(step, 1000, 1792) for step in range(1000)]
    assert lengths[0] == 128 and lengths[-1] == 1792 and lengths == sorted(lengths)
    assert set(lengths) == set(range(128, 1793, 128))
    assert window_length(5, 6, 100) == 100 and window_length(0, 1, 300) == 128


def test_init_fills_poisoned_memory():
    config = make_config("speedrun", **SMALL, **WINDOWS, **EVERYTHING)
    for changed in (config, dataclasses.replace(config, value_embeds="gated")):
        with torch.device("meta"):
            model = GPT(changed)
        model.to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
        model.init_weights()
        assert all(tensor.isfinite().all() for tensor in [*model.parameters(), *model.buffers()])
        idx = text()
        assert model(idx, idx).isfinite()


def test_flags_resolve():
    classic = resolve(ArchFlags())
    assert (classic.window_pattern, classic.matrix_lr, classic.value_embeds, classic.grad_clip) == (
        "L",
        0.02,
        "none",
        1,
    )
    speedrun = resolve(ArchFlags(arch="speedrun", unet=False, grad_clip=0.5))
    assert (speedrun.unet, speedrun.matrix_lr, speedrun.grad_clip, speedrun.window_warmup) == (False, 0.05, 0.5, True)
    assert init_spec(speedrun).gain == 0.5 and init_spec(classic).head_std == 0.0
    wide = resolve(ArchFlags(arch="speedrun", width=512, head_dim=64, mup=True, base_width=256))
    config = build_config(wide, 97, BOS)
    assert config.n_head == 8 and config.attn_scale == 0.24  # logits stay within the same range
    assert config.logit_multiplier == 256**-0.5 * 256 / 512
    assert build_config(resolve(ArchFlags(depth=4, head_dim=128)), 97).n_embd == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1000}, "--width=1000.*896 or 1024"),
        ({"width": 100}, "--width=100.*use 128"),
        ({"window_warmup": True}, "--window-warmup"),
        ({"base_depth": 6}, "--base-depth=6.*--mup"),
        ({"base_width": 256}, "--base-width=256.*--mup"),
        ({"mup": True, "base_width": 700}, "--base-width=700.*--head-dim=128"),
        ({"document_mask": True}, "--document-mask"),
    ],
)
def test_flags_that_contradict_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        build_config(resolve(ArchFlags(**changes)), 97)
