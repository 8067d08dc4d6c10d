"""Every strategy is the same program: equal losses and weights, whatever the layout and the number of ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanochat import parallel
from nanochat.dtensor import is_sharded, local, row_range
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from tests.models import make_config
from tests.optim.test_optim import changed_by
from tests.processes import run_processes

# Uneven on purpose: 3 rows of 8 do not divide, the second moment of both orientations occurs, 2 layers of 6 matrices
# are fewer of a shape than 8 ranks.
CONFIG = GPTConfig(sequence_len=16, vocab_size=61, n_layer=2, n_head=2, n_kv_head=1, n_embd=20)
ROWS, STEPS = 8, 3


# Everything of the speedrun architecture at once, under muP, in a size that few counts of ranks divide.
SPEEDRUN = make_config(
    "speedrun", n_layer=4, n_embd=24, head_dim=12, vocab_size=61, sequence_len=16, mup_base_width=12, document_token=0,
    long_window=9, short_window=4, attn_gate=True, smear=True, backout=True, ngram_embeds=4, ngram_slots=1,
    ngram_heads=4, key_offset=True,
)  # fmt: skip


def make_model(strategy="ddp", ranks_per_node=1, large=False, config=CONFIG):
    """(model, policy), parallel if ranks are there, on its way as the scripts make it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    with torch.device("meta"):
        model = GPT(config)
    policy = parallel.Policy(strategy, torch.float32, reshard_after_forward=large, accumulate_unsharded=not large)
    if world > 1:
        parallel.shard_model(model, parallel.make_mesh(policy, "cpu", ranks_per_node), policy)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            local(param).fill_(float("nan"))  # what was not initialised shows
    model.init_weights(seed=7, head_std=0.0)
    return model, policy


def whole(tensor):
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().numpy().copy()


def train_steps(strategy, ranks_per_node=1, large=False, use_muon=True, config=CONFIG):
    """(losses, gradient norms, weights, first weights) after STEPS steps of two micro-batches; ranks share the rows."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model, policy = make_model(strategy, ranks_per_node, large, config)
    first = {name: whole(param) for name, param in model.named_parameters()}
    with torch.no_grad():
        for name, param in model.named_parameters():  # zero-initialised projections would hide half of the gradients
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                full = torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
                local(param).copy_(full[slice(*row_range(param))])
    optimizer = model.setup_optimizer(0.02, 0.1, 0.01, weight_decay=0.1, use_muon=use_muon)
    losses, norms = [], []
    for step in range(STEPS):
        rows = torch.randint(61, (ROWS, 17), generator=torch.Generator().manual_seed(step))
        mine = rows[rank::world]
        parts = mine.chunk(2) if len(mine) > 1 else [mine]
        total = torch.zeros(())
        for index, part in enumerate(parts):
            parallel.before_micro_batch(model, policy, last=index == len(parts) - 1)
            loss = model(part[:, :-1].contiguous(), part[:, 1:].contiguous(), loss_reduction="sum")
            (loss * world / (ROWS * 16)).backward()
            total += loss.detach()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / (ROWS * 16))
        norms.append(optimizer.step(max_norm=1.0).item())
        optimizer.zero_grad(set_to_none=True)
    weights = {name: whole(param) for name, param in model.named_parameters()}
    return losses, norms, weights, first


# ranks -> (strategy, ranks a node, weights freed after the forward pass)
LAYOUTS = {
    2: [("ddp", 1, False), ("fsdp", 1, False)],
    3: [("fsdp", 1, True)],
    4: [("fsdp", 1, True), ("hsdp", 2, False)],
    8: [("fsdp", 1, False), ("hsdp", 4, True)],
}


def train_in_layouts(layouts, use_muon, config=CONFIG):
    return [train_steps(*layout, use_muon=use_muon, config=config) for layout in layouts]


@pytest.mark.parametrize(
    ("world", "use_muon", "config"),
    [*((world, True, CONFIG) for world in LAYOUTS), (4, False, CONFIG), (2, True, SPEEDRUN), (4, True, SPEEDRUN)],
)
def test_every_layout_trains_as_one_process_does(world, use_muon, config):
    losses, norms, weights, first = train_steps("ddp", use_muon=use_muon, config=config)
    # AdamW divides gradients by their own size, so that where they are tiny rounding shows: 4e-5 has been seen with
    # twice the layers, on weights of size 1.4 after three steps of up to 0.1
    close = 3e-5 if config is CONFIG else 1e-4
    for results in run_processes(world, train_in_layouts, LAYOUTS[world], use_muon, config):
        for result in results:
            assert result[0] == pytest.approx(losses, rel=1e-5)
            assert result[1] == pytest.approx(norms, rel=1e-4)
            for name, value in first.items():
                np.testing.assert_array_equal(result[3][name], value, err_msg=name)  # bit for bit
            for name, value in weights.items():
                np.testing.assert_allclose(result[2][name], value, atol=close, err_msg=name)


def named_state_of(strategy, ranks_per_node):
    """(name -> shape of the whole, number of orthogonalised matrices) of this rank."""
    model, _ = make_model(strategy, ranks_per_node)
    optimizer = model.setup_optimizer()
    state = optimizer.named_state()
    return {name: tuple(t.shape) for name, t in state.items()}, sum(".second_moment" in name for name in state)


@pytest.mark.parametrize("layout", [("fsdp", 1), ("hsdp", 2)])
def test_state_has_the_names_of_one_process_and_every_matrix_one_owner(layout):
    wanted = {name: tuple(t.shape) for name, t in make_model()[0].setup_optimizer().named_state().items()}
    states, owned = zip(*run_processes(4, named_state_of, *layout), strict=True)
    assert {name: shape for state in states for name, shape in state.items()} == wanted
    assert sum(owned) == 12 and max(owned) - min(owned) <= 1  # over all ranks, replicas too: nothing is done twice
    for state in states:
        assert {name for name in wanted if "second_moment" not in name} <= state.keys()


class FakeTokenizer:
    """Ids as they are; the special tokens of a chat are not in the way of anything."""

    def encode_special(self, text):
        return 50 + len(text) % 10

    def get_bos_token_id(self):
        return 0


def evaluate(strategy, ranks_per_node=1, large=False):
    """(logits, greedy tokens of ranks that go on for different lengths, loss after one more step)."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model, policy = make_model(strategy, ranks_per_node, large)
    with torch.no_grad():
        local(model.lm_head.weight).copy_(local(model.transformer.wte.weight) * 0.3)
    optimizer = model.setup_optimizer()
    rows = torch.randint(50, (world, 17), generator=torch.Generator().manual_seed(0))
    seen = []
    for _ in range(2):  # evaluating in between, and before the first step, changes nothing
        model.eval()
        with parallel.unsharded_params(model, policy), torch.no_grad():
            if rank != 1:  # ranks make as many forward passes as they like
                logits = model(rows[:1, :12])
                engine = Engine(model, FakeTokenizer())
                tokens, _ = engine.generate_batch([0, 3, 5], max_tokens=3 + 2 * rank, temperature=0.0)
                seen.append((logits.numpy(), tokens[0][:6]))
        model.train()
        parallel.before_micro_batch(model, policy, last=True)
        loss = model(rows[:1, :-1].contiguous(), rows[:1, 1:].contiguous(), loss_reduction="mean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return seen, loss.item()


def evaluate_in_layouts(layouts):
    return [evaluate(*layout) for layout in layouts]


def test_ranks_evaluate_and_sample_at_their_own_pace():
    wanted, wanted_loss = evaluate("ddp")
    layouts = [("fsdp", 1, True), ("fsdp", 1, False), ("hsdp", 2, True)]
    for rank, results in enumerate(run_processes(4, evaluate_in_layouts, layouts)):
        for seen, loss in results:
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert len(seen) == (0 if rank == 1 else 2)
            for (logits, tokens), (wanted_logits, wanted_tokens) in zip(seen, wanted, strict=False):
                np.testing.assert_allclose(logits, wanted_logits, atol=1e-4)
                assert tokens == wanted_tokens


@pytest.mark.parametrize(
    ("parameters", "world", "per_node", "strategy", "why"),
    [
        (1e9, 1, 1, "ddp", "one rank"),
        (1e9, 8, 8, "ddp", "fit on every rank"),
        (1e10, 8, 8, "fsdp", "too many for every rank"),
        (1e9, 16, 8, "hsdp", "2 nodes"),
    ],
)
def test_auto_chooses_by_size_and_nodes_and_says_why(parameters, world, per_node, strategy, why):
    policy, said = parallel.make_policy("auto", parameters, torch.bfloat16, world, per_node)
    assert policy.strategy == strategy and why in said
    assert policy.reshard_after_forward == (parameters > 3e9) != policy.accumulate_unsharded
    assert policy.reduce_dtype == torch.float32


def test_strategies_that_do_not_fit():
    with pytest.raises(UserError, match="12 ranks are no whole number of nodes of 8"):
        parallel.make_policy("hsdp", 1e9, torch.bfloat16, 12, 8)
    with pytest.raises(UserError, match="--use-fsdp and --parallel=ddp contradict"):
        parallel.requested_strategy("ddp", use_fsdp=True)
    assert parallel.requested_strategy("auto", use_fsdp=True) == "fsdp"
    assert parallel.make_policy("fsdp", 1e9, torch.bfloat16, 1, 1)[0].strategy == "ddp"  # nothing to cut


def sharded_steps_with_bad_ones(strategy, ranks_per_node):
    model, _ = make_model(strategy, ranks_per_node)
    optimizer = model.setup_optimizer(0.02, 0.1, 0.01, weight_decay=0.1)
    params = dict(model.named_parameters())
    return [changed_by(params, optimizer, is_bad, "nan") for is_bad in (False, True, False)]


@pytest.mark.parametrize(("strategy", "world"), [("fsdp", 2), ("hsdp", 4)])
def test_a_step_that_is_not_finite_changes_nothing_on_shards(strategy, world):
    for good, bad, again in run_processes(world, sharded_steps_with_bad_ones, strategy, 2):
        assert good and again and not bad


@pytest.mark.parametrize(("arch", "pieces"), [("nanochat", 5), ("speedrun", 1)])
def test_what_is_compiled_on_one_gpu(arch, pieces, monkeypatch):
    """Blocks one by one where nothing is mixed in between them, or the whole; the loss is that of the model."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    model = GPT(make_config(arch, n_layer=3, n_embd=32, head_dim=16, vocab_size=61, sequence_len=16))
    model.init_weights(zero_proj=False, head_std=0.1)
    forward = parallel.compile_model(model, parallel.Policy("ddp", torch.float32))
    assert compiled == [{"dynamic": False, "fullgraph": True}] * pieces
    inputs = torch.arange(16).unsqueeze(0)
    assert torch.equal(forward(inputs, inputs, loss_reduction="sum"), model(inputs, inputs, loss_reduction="sum"))
