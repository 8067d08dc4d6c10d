"""nanochat/mup.py: rules against hand-written tables, identity at the base width, and what a public test suite of this
family of programs asks of the model, asked more strictly."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from nanochat import mup, parallel
from nanochat.config import LEARNING_RATES, ArchFlags, InitSpec, resolve
from nanochat.dtensor import is_sharded, local
from nanochat.engine import KVCache
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.pointwise import norm
from nanochat.mup import Dim, InfShape
from nanochat.optim.buckets import lr_aspect_scale
from tests import models
from tests.processes import run_processes

EVERYTHING = {"value_embeds": "gated", "attn_gate": True, "smear": True, "backout": True, "ngram_embeds": 4,
              "ngram_slots": 1, "key_offset": True}  # fmt: skip


def make_config(width, base_width=0, arch="nanochat", head_dim=16, n_layer=2, **changes):
    sizes = {"n_layer": n_layer, "n_embd": width, "head_dim": head_dim, "vocab_size": 64, "sequence_len": 32}
    return models.make_config(arch, **sizes, mup_base_width=base_width, **changes)


def make_model(config, seed=0, head_std=0.02, **changes):
    model = GPT(config)
    model.init_weights(seed=seed, head_std=head_std, zero_proj=False, **changes)
    return model


def make_batch(step, rows=4, length=32, vocab_size=64):
    text = torch.randint(vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(step))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def train(model, optimizer, steps, batch=make_batch):
    losses = []
    for step in range(steps):
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


# ---- the table


@pytest.mark.parametrize("use_muon", [True, False])
@pytest.mark.parametrize("base_width", [0, 64])
@pytest.mark.parametrize(
    ("arch", "changes"), [("nanochat", {}), ("speedrun", {}), ("speedrun", EVERYTHING), ("ngram", {"ngram_slots": 1})]
)
def test_all_factors_are_one_at_the_base_width(arch, changes, base_width, use_muon):
    config = make_config(64, base_width, arch, **changes)
    table = mup.mup_table(GPT, config, use_muon)
    assert table.keys() == dict(GPT(config).named_parameters()).keys()
    for name, rule in table.items():
        assert (rule.lr, rule.eps, rule.weight_decay, rule.multiplier) == (1.0, 1.0, 1.0, 1.0), name


# name -> (kind, lr, eps, weight decay, forward multiplier) at four times the base width
AT_FOUR_TIMES = {
    "transformer.wte.weight": ("input", 1, 1 / 4, 1, 1),
    "transformer.value_embeds.0.weight": ("input", 1, 1 / 4, 1, 1),
    "transformer.ngram_embeds.0.weight": ("input", 1, 1 / 4, 1, 1),
    "transformer.ngram_embeds.1.weight": ("input", 1, 1 / 4, 1, 1),
    "transformer.ngram_embeds.2.weight": ("input", 1, 1 / 4, 1, 1),
    "transformer.h.1.attn.value_gate.weight": ("input", 1, 1 / 4, 1, 1),
    "transformer.h.0.attn.gate.weight": ("input", 1, 1 / 4, 1, 1),
    "lm_head.weight": ("output", 1, 1 / 4, 1, 1 / 4),
    "resid_lambdas": ("scalar", 1, 1, 1, 1),
    "x0_lambdas": ("scalar", 1, 1, 1, 1),
    "ngram_lambdas": ("scalar", 1, 1, 1, 1),
    "skip_weights": ("scalar", 1, 1, 1, 1),
    "smear_lambda": ("scalar", 1, 1, 1, 1),
    "smear_gate.weight": ("scalar", 1, 1, 1, 1),
    "backout_lambda": ("scalar", 1, 1, 1, 1),
}
HIDDEN = [f"attn.c_{part}.weight" for part in ("q", "k", "v", "proj")] + ["mlp.c_fc.weight", "mlp.c_proj.weight"]


@pytest.mark.parametrize("use_muon", [True, False])
def test_factors_at_four_times_the_base_width(use_muon):
    table = mup.mup_table(GPT, make_config(128, 32, "speedrun", **EVERYTHING), use_muon)
    hidden = ("hidden", 1, 1, 1, 1) if use_muon else ("hidden", 1 / 4, 1 / 4, 4, 1)
    expected = {f"transformer.h.{i}.{part}": hidden for i in range(2) for part in HIDDEN} | AT_FOUR_TIMES
    found = {name: (r.kind, r.lr, r.eps, r.weight_decay, r.multiplier) for name, r in table.items()}
    found["transformer.h.0.attn.gate.weight"] = found.pop("transformer.h.1.attn.gate.weight")  # the same in all layers
    assert found == expected
    muon = {name for name, rule in table.items() if rule.optimizer == "muon"}
    assert muon == ({name for name, rule in table.items() if rule.kind == "hidden"} if use_muon else set())


@given(st.tuples(*[st.integers(1, 4096)] * 4))
def test_muon_steps_by_the_spectral_condition_relative_to_base(sizes):
    out, into, base_out, base_into = sizes
    factor = mup.muon_lr_factor(InfShape((Dim(base_out, out, True), Dim(base_into, into, True))))
    step = factor * lr_aspect_scale(torch.empty(out, into, device="meta"))
    at_base = lr_aspect_scale(torch.empty(base_out, base_into, device="meta"))
    assert step / at_base == pytest.approx(math.sqrt((out / into) / (base_out / base_into)))


@given(st.integers(1, 8), st.integers(1, 8))
def test_muon_factor_is_exactly_one_where_the_aspect_is_kept(multiple, aspect):
    for out, into in ((64 * aspect, 64), (64, 64 * aspect)):
        shape = InfShape((Dim(out, out * multiple, True), Dim(into, into * multiple, True)))
        assert mup.muon_lr_factor(shape) == 1.0


@pytest.mark.parametrize("use_muon", [True, False])
def test_depth_scales_branches_and_eps_but_no_rate(use_muon):
    shallow = make_config(64, 32, "speedrun", n_layer=8, **EVERYTHING)
    deep = dataclasses.replace(shallow, mup_base_depth=2)
    before, after = mup.mup_table(GPT, shallow, use_muon), mup.mup_table(GPT, deep, use_muon)
    for name, rule in after.items():
        branch = name.startswith(("transformer.h.", "transformer.value_embeds."))
        assert rule.eps == before[name].eps * (1 / 4 if branch and rule.optimizer == "adamw" else 1), name
        assert rule.multiplier == before[name].multiplier * (1 / 4 if name.endswith("c_proj.weight") else 1), name
        assert (rule.lr, rule.weight_decay) == (before[name].lr, before[name].weight_decay), name
    model, x = make_model(deep), torch.randn(1, 32, 64)
    block, ctx = model.transformer.h[0], model.forward_context(make_batch(0, rows=1)[0], None)
    middle = x + block.attn(norm(x), None, ctx) / 4
    torch.testing.assert_close(block(x, None, ctx), middle + block.mlp(norm(middle)) / 4)


@pytest.mark.parametrize("init", ["uniform", "spectral"])
@pytest.mark.parametrize("zero_proj", [True, False])
def test_the_stated_init_is_what_is_drawn(init, zero_proj):
    spec = InitSpec(init, 3, 0.05, zero_proj, 0.5)
    config = make_config(128, 32, "speedrun", **EVERYTHING)
    model = GPT(config)
    model.init_weights(spec)
    table = mup.mup_table(GPT, config, spec=spec)
    for name, param in model.named_parameters():
        found = param.std().item() if param.numel() > 1 else 0.0
        assert found == pytest.approx(table[name].init_std, rel=0.05), name


# ---- which dimensions grow


def test_shapes_say_what_grows_whichever_way_they_are_stored():
    shapes = mup.inf_shapes(GPT, make_config(64, 32, "speedrun"))
    assert shapes["transformer.wte.weight"] == ((32, 64, True), (64, 64, False))  # out: width, in: vocabulary
    assert shapes["lm_head.weight"] == ((64, 64, False), (32, 64, True))
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == ((128, 256, True), (32, 64, True))
    assert shapes["resid_lambdas"] == ((2, 2, False),)


def test_a_vocabulary_of_the_size_of_the_width_is_finite_all_the_same():
    shape = mup.inf_shapes(GPT, GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=4, n_kv_head=4, n_embd=64))
    assert [dim.infinite for dim in shape["lm_head.weight"]] == [False, True]


def test_grouped_heads_and_widths_below_the_base():
    config = GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, mup_base_width=128)
    shapes, table = mup.inf_shapes(GPT, config), mup.mup_table(GPT, config, use_muon=False)
    assert shapes["transformer.h.0.attn.c_k.weight"] == ((64, 16, True), (128, 32, True))
    assert table["transformer.h.0.attn.c_k.weight"].lr == 4 and table["lm_head.weight"].multiplier == 4


@pytest.mark.parametrize(("heads", "kv_heads", "base"), [(4, 4, 24), (4, 1, 32), (4, 4, 8)])
def test_a_base_width_that_the_heads_do_not_divide_is_the_users_mistake(heads, kv_heads, base):
    config = GPTConfig(n_layer=1, n_head=heads, n_kv_head=kv_heads, n_embd=64, mup_base_width=base)
    with pytest.raises(UserError, match=f"width {base}"):
        mup.mup_table(GPT, config)


FINITE, GROWS = Dim(8, 8, False), Dim(8, 16, True)


@pytest.mark.parametrize(
    ("name", "dims", "words"),
    [
        ("probe.weight", (FINITE, GROWS), "output multiplier"),
        ("conv.weight", (GROWS, GROWS, FINITE), "3 dimensions"),
        ("lm_head.weight", (GROWS, GROWS), "its name output"),  # the trap of calling every dimension infinite
        ("transformer.wte.weight", (GROWS, GROWS), "its name input"),
        ("transformer.value_embeds.0.weight", (FINITE, FINITE), "its name input"),
        ("transformer.h.0.attn.c_q.weight", (GROWS, FINITE), "its name hidden"),
        ("transformer.h.0.mlp.c_fc.weight", (FINITE, FINITE), "its name hidden"),
    ],
)
def test_what_no_rule_covers_is_named(name, dims, words):
    with pytest.raises(ValueError, match=words) as caught:
        mup.classify(name, InfShape(dims))
    assert name in str(caught.value)


def test_the_table_can_be_read():
    config = make_config(128, 32, "speedrun", **EVERYTHING)
    records = mup.as_records(GPT, config)
    assert sum(record["count"] for record in records) == len(mup.mup_table(GPT, config))
    head = next(record for record in records if record["parameter"] == "lm_head.weight")
    assert (head["fans"], head["at base"], head["infinite"]) == ("64 x 128", "64 x 32", "· x ∞")
    assert (head["kind"], head["multiplier"]) == ("output", 0.25)
    lines = mup.format_table(records).splitlines()
    assert len(lines) == len(records) + 1
    assert "transformer.h.*.attn.c_q.weight" in "\n".join(lines)


# ---- the same at base, the same under every path


@pytest.mark.parametrize("use_muon", [True, False])
@pytest.mark.parametrize("arch", ["nanochat", "speedrun", "ngram"])
def test_at_the_base_width_it_is_the_standard_parametrisation_bit_for_bit(arch, use_muon):
    results, flags = [], resolve(ArchFlags(arch=arch))
    rates = {name: getattr(flags, name) for name in LEARNING_RATES}
    for base_width in (0, 64):
        model = make_model(make_config(64, base_width, arch, n_layer=4))
        optimizer = model.setup_optimizer(**rates, weight_decay=0.1, use_muon=use_muon)
        results.append((train(model, optimizer, 20), [param.detach() for param in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert results[0][0][-1] != results[0][0][0]


def test_logits_loss_and_cache_all_have_the_multiplier():
    narrow, wide = make_model(make_config(64, head_dim=16)), make_model(make_config(64, 16, head_dim=16))
    inputs, targets = make_batch(0)
    raw = 15 * torch.atanh(narrow(inputs).double() / 15)  # before the softcap
    expected = 15 * torch.tanh(raw / 4 / 15)
    torch.testing.assert_close(wide(inputs).double(), expected, atol=1e-6, rtol=1e-4)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).item()
    assert wide(inputs, targets).item() == pytest.approx(loss, rel=1e-6)
    assert wide(inputs, targets, loss_reduction="none").mean().item() == pytest.approx(loss, rel=1e-6)
    cache = KVCache(4, 4, 32, 16, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        parts = [wide(inputs[:, :20], kv_cache=cache), wide(inputs[:, 20:], kv_cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1).double(), expected, atol=1e-5, rtol=1e-3)


def sharded_losses(strategy):
    """Losses of 4 steps at twice the base width."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    with torch.device("meta"):
        model = GPT(make_config(32, 16, "speedrun", n_layer=4, head_dim=8))
    policy = parallel.Policy(strategy, torch.float32)
    if world > 1:
        parallel.shard_model(model, parallel.make_mesh(policy, "cpu", 1), policy)
    model.to_empty(device="cpu")
    model.init_weights(seed=1, head_std=0.02, zero_proj=False)
    optimizer = model.setup_optimizer(0.02, 0.2, 0.1, weight_decay=0.1, use_mup=True, base_width=16)
    losses = []
    for step in range(4):
        inputs, targets = make_batch(step)
        parallel.before_micro_batch(model, policy, last=True)
        loss = model(inputs[rank::world], targets[rank::world])
        loss.backward()
        mean = loss.detach()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert world == 1 or strategy == "ddp" or is_sharded(model.lm_head.weight)
    return losses


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_sharded_over_ranks_it_is_the_same(strategy):
    expected = sharded_losses("ddp")
    for losses in run_processes(2, sharded_losses, strategy):
        assert losses == pytest.approx(expected, rel=1e-5)


# ---- what public tests ask of the model: widths 128 to 512, heads of 64, 256 tokens, rows of 64, nothing compiled


@pytest.fixture
def uncompiled():
    with torch._dynamo.config.patch(disable=True):  # monkeypatch would leave this module without the attribute
        yield


def public_model(width, base_width=0, seed=42, **init):
    """As outside code builds it: on the meta device, then memory, here full of NaN, then init_weights."""
    config = GPTConfig(
        sequence_len=64,
        vocab_size=256,
        n_layer=2,
        n_head=width // 64,
        n_kv_head=width // 64,
        n_embd=width,
        window_pattern="L",
        mup_base_width=base_width,
    )
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**40))
    model.init_weights(seed=seed, **init)
    return model


def public_batch(rows=4, seed=0):
    return make_batch(seed, rows, 64, 256)


@pytest.mark.parametrize(
    ("arch", "changes"), [("nanochat", {}), ("speedrun", {}), ("speedrun", EVERYTHING), ("ngram", {"ngram_slots": 1})]
)
def test_everything_is_initialised(arch, changes):
    config = make_config(64, 32, arch, n_layer=12, **changes)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -(2**40))
    model.init_weights()
    reference = GPT(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all() and (tensor > -(2**40)).all(), name
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert model(*make_batch(0)).isfinite()


@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("base_width", [0, 128])
def test_trains_at_public_widths(uncompiled, width, base_width):
    model = public_model(width, base_width)
    optimizer = model.setup_optimizer(
        matrix_lr=0.02,
        embedding_lr=0.2,
        unembedding_lr=0.004,
        weight_decay=0.0,
        use_mup=base_width > 0,
        base_width=128,
    )
    losses = train(model, optimizer, 2, lambda step: public_batch())
    assert losses[0] == pytest.approx(math.log(256), abs=0.01) and losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        assert model(*public_batch(8)).isfinite()


def test_computes_in_bf16_too(uncompiled):
    model = public_model(128, 64)
    model.compute_dtype = torch.bfloat16
    loss = model(*public_batch())
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())


def sizes(model, batch):
    """Module -> mean |output|, by forward hooks on modules as outside code names them; lm_head's times base/width."""
    found = {}

    def hook(name, factor=1.0):
        return lambda module, args, output: found.__setitem__(name, output.detach().abs().mean().item() * factor)

    config = model.config
    modules = {"embedding": model.transformer.wte, "logits": model.lm_head}
    for i, block in enumerate(model.transformer.h):
        modules |= {f"attn.{i}": block.attn.c_proj, f"ffn.{i}": block.mlp.c_proj}
    base = config.mup_base_width
    handles = [
        module.register_forward_hook(hook(name, base / config.n_embd if base and name == "logits" else 1.0))
        for name, module in modules.items()
    ]
    model(*batch)
    for handle in handles:
        handle.remove()
    assert found.keys() == modules.keys()
    return found


def size_slopes(base_width, widths=(128, 256, 512), steps=0, **init):
    logs = []
    for width in widths:
        model = public_model(width, base_width, **init)
        optimizer = model.setup_optimizer(0.02, 0.2, 0.004, 0.0)
        train(model, optimizer, steps, lambda step: public_batch(8, step))
        logs.append({name: math.log2(max(size, 1e-10)) for name, size in sizes(model, public_batch(8, steps)).items()})
    return {name: np.polyfit(np.log2(widths), [log[name] for log in logs], 1)[0] for name in logs[0]}


def test_public_check_of_sizes_at_init(uncompiled):
    slopes = size_slopes(128)  # as published: projections are zero, and lm_head is left out
    assert max(abs(slope) for name, slope in slopes.items() if name != "logits") < 0.2
    standard = size_slopes(0)
    assert max(abs(slope) for slope in standard.values()) > 0.1


def test_sizes_at_init_with_projections_that_are_not_zero(uncompiled):
    for base_width, logits in ((128, -0.5), (0, 0.5)):
        slopes = size_slopes(base_width, head_std=0.02, zero_proj=False)
        assert slopes.pop("logits") == pytest.approx(logits, abs=0.05)  # √width terms, times 1/width under muP
        assert max(map(abs, slopes.values())) < 0.1  # of one seed; of several, see test_mup_mutations


@pytest.mark.slow  # 25 s
def test_sizes_after_training_steps(uncompiled):
    """What the published check leaves out: without steps, no learning rate is seen."""
    slopes = size_slopes(128, steps=8, head_std=0.02, zero_proj=False)
    assert abs(slopes.pop("logits")) < 0.25
    assert max(map(abs, slopes.values())) < 0.15
    standard = size_slopes(0, steps=8, head_std=0.02, zero_proj=False)
    assert standard["embedding"] < -0.2  # the one rate that falls with the width, and should not


@pytest.mark.slow  # 400 steps: a minute
def test_public_check_of_transfer(uncompiled):
    """The best of four multipliers of all rates is nearly the same at two widths, on one batch that is memorised."""
    multipliers = (0.25, 1.0, 4.0, 16.0)
    best = []
    for width in (128, 256):
        losses = []
        for multiplier in multipliers:
            model = public_model(width, 128)
            rates = {"matrix_lr": 0.12, "embedding_lr": 6.0, "unembedding_lr": 0.12}
            scaled = {name: rate * multiplier for name, rate in rates.items()}
            optimizer = model.setup_optimizer(**scaled, weight_decay=0.0, use_mup=True, base_width=128)
            losses.append(train(model, optimizer, 50, lambda step: public_batch(8))[-1])
        best.append(math.log2(multipliers[int(np.nanargmin(losses))]))
        assert min(losses) < 1.0  # it does learn: ln 256 = 5.5
    assert abs(best[0] - best[1]) <= 2.0


def test_memory_of_a_rank_is_its_own(uncompiled):
    """Nothing hangs on tensors that sharding or copying could lose."""
    model = public_model(128, 64)
    for param in model.parameters():
        assert not vars(local(param)), "no attributes: the table is by name"
