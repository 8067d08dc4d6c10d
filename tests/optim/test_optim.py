import functools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.dtensor import local
from nanochat.optim import MuonAdamW
from nanochat.optim.schedule import batch_lr_scale, lr_multiplier, muon_momentum
from nanochat.optim.sharded import assign_owners
from nanochat.optim.update_rules import adamw_update, orthogonalize, orthogonalize_by_products
from tests.processes import run_processes

SHAPES = {"a": (8, 6), "b": (8, 6), "c": (8, 6), "d": (4, 12), "emb": (10, 6), "odd": (7, 3), "gain": (5,)}


def make_optimizer() -> tuple[dict[str, torch.nn.Parameter], MuonAdamW]:
    """Three matrices of one shape (not a multiple of two ranks), one alone, rows that divide by two and that do not."""
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in SHAPES.items()}
    muon, adamw = ["a", "b", "c", "d"], ["emb", "odd", "gain"]
    groups = [
        {"kind": "muon", "params": [params[n] for n in muon], "names": muon, "lr": 0.02, "momentum": 0.9, "ns_steps": 5,
         "beta2": 0.95, "weight_decay": 0.1},
        {"kind": "adamw", "params": [params[n] for n in adamw], "names": adamw, "lr": 0.01, "betas": (0.8, 0.95),
         "eps": 1e-10, "weight_decay": 0.05},
    ]  # fmt: skip
    return params, MuonAdamW(groups)


def run_steps(steps: int = 4, max_norm: float | None = None) -> tuple[dict[str, np.ndarray], list[float]]:
    """Weights and gradient norms after some steps; each rank has gradients of its own, whose mean is the same as what
    one process gets."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    params, optimizer = make_optimizer()
    norms = []
    for step in range(steps):
        for index, (name, param) in enumerate(params.items()):
            generator = torch.Generator().manual_seed(100 * step + index)
            mean, noise = (torch.randn(SHAPES[name], generator=generator) for _ in range(2))
            sign = 0 if world == 1 else (1 if rank % 2 == 0 else -1)  # the noise cancels over an even number of ranks
            param.grad = mean + sign * noise
        norms.append(optimizer.step(max_norm=max_norm).item())
    return {name: param.detach().numpy() for name, param in params.items()}, norms


def run_with_and_without_clipping():
    return [run_steps(4, max_norm) for max_norm in (None, 1.0)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world):
    expected = run_with_and_without_clipping()
    for rank_results in run_processes(world, run_with_and_without_clipping):
        for (weights, norms), (wanted, wanted_norms) in zip(rank_results, expected, strict=True):
            assert norms == pytest.approx(wanted_norms, rel=1e-5)
            for name, value in weights.items():
                np.testing.assert_allclose(value, wanted[name], atol=2e-5, err_msg=name)


def state_sizes() -> tuple[int, list[str]]:
    _, optimizer = make_optimizer()
    held = sum(tensor.numel() for bucket in optimizer.buckets for tensor in bucket.state.values())
    return held, sorted(optimizer.named_state())


def test_state_is_sharded_and_every_name_is_somewhere():
    whole, names = state_sizes()
    (first, names0), (second, names1) = run_processes(2, state_sizes)
    assert first == second < 0.75 * whole  # 3 of one shape pad to 2 + 2, and two small parameters are replicated
    assert sorted(set(names0) | set(names1)) == names
    assert "a.momentum" in names0 and "a.momentum" not in names1  # a whole matrix has one owner


def test_norm_is_global_and_clipping_bounds_it():
    params, optimizer = make_optimizer()
    for param in params.values():
        param.grad = torch.randn_like(param)
    expected = torch.cat([p.grad.flatten() for p in params.values()]).norm()
    assert optimizer.step(max_norm=0.5).item() == pytest.approx(expected.item(), rel=1e-6)
    first_moment = {k: v for k, v in optimizer.named_state().items() if k.endswith("exp_avg")}
    scale = 0.5 / expected
    torch.testing.assert_close(first_moment["emb.exp_avg"], 0.2 * scale * params["emb"].grad, rtol=1e-4, atol=1e-7)


def test_adamw_matches_torch():
    ours, theirs = torch.randn(6, 5), None
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    number = torch.tensor
    for step in range(1, 6):
        grad = torch.randn(6, 5)
        theirs.grad = grad.clone()
        reference.step()
        adamw_update(ours, grad, None, m, v, number(float(step)), number(0.03), number(0.8), number(0.95), number(1e-8),
                     number(0.1), torch.tensor(True))  # fmt: skip
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 16, 48), (1, 48, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    # singular values between 0.05 and 1: a square Gaussian matrix has some near 0, which five steps cannot lift
    U, values, Vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    G = U @ torch.diag_embed(torch.empty_like(values).uniform_(0.05, 1)) @ Vh
    out = orthogonalize(G, 5)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.8 and values.max() < 1.25
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    alignment = (out * (U @ Vh)).sum() / out.norm() / (U @ Vh).norm()
    assert alignment > 0.99


@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 16, 48), (1, 48, 16)])
def test_the_form_for_gpus_computes_the_same(shape):
    G = torch.randn(shape) * torch.logspace(-4, 1, shape[0])[:, None, None]
    for steps in (1, 5):
        torch.testing.assert_close(orthogonalize_by_products(G, steps), orthogonalize(G, steps), atol=1e-4, rtol=1e-3)
    assert orthogonalize_by_products(torch.zeros(shape), 5).eq(0).all()


def test_matrices_move_together_once_and_stay_parameters():
    params, optimizer = make_optimizer()
    for step in range(3):
        for param in params.values():
            param.grad = torch.ones_like(param)
        optimizer.step()
        places = [params[name].data_ptr() for name in "abc"]
        assert [place - places[0] for place in places] == [0, 192, 384] and all(p.is_leaf for p in params.values())
        if step == 1:  # given other memory, as by another optimizer
            params["b"].data = params["b"].data.clone()
    assert params["a"].untyped_storage().nbytes() == 3 * 192


def test_muon_step_has_the_size_of_the_learning_rate():
    param = torch.nn.Parameter(torch.zeros(64, 16))
    group = {"kind": "muon", "params": [param], "lr": 0.1, "momentum": 0.0, "ns_steps": 5, "beta2": 0.95,
             "weight_decay": 0.0}  # fmt: skip
    optimizer = MuonAdamW([group])
    param.grad = torch.randn(64, 16)
    optimizer.step()
    # singular values near 1, times lr, times sqrt(64/16); NorMuon keeps the Frobenius norm
    assert param.detach().norm().item() == pytest.approx(0.1 * 2 * math.sqrt(16), rel=0.15)


BAD = {"nan": (math.nan, 1.0), "inf": (math.inf, 1.0), "loss": (0.0, math.nan)}  # gradient of one rank, loss of all


def bits(params, optimizer):
    """Every bit of weights and state. The state holds a -0.0, which arithmetic with zeros would not leave alone."""
    state = {f"{i}.{kind}": t for i, bucket in enumerate(optimizer.buckets) for kind, t in bucket.state.items()}
    for tensor in state.values():
        tensor.view(-1)[:1] = -0.0
    return {name: local(t.detach()).view(torch.int32).numpy().copy() for name, t in {**params, **state}.items()}


def changed_by(params, optimizer, is_bad, bad):
    """Names of what a step changed, good or bad: then the last rank alone has the bad gradient."""
    grad, loss = BAD[bad] if is_bad else (0.0, 1.0)
    for param in params.values():
        param.grad = torch.full_like(param, 0.1)
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        local(next(iter(params.values())).grad).view(-1)[0] += grad
    before = bits(params, optimizer)
    optimizer.step(max_norm=1.0, loss=torch.tensor(loss))
    state = [(f"{i}.{kind}", t) for i, bucket in enumerate(optimizer.buckets) for kind, t in bucket.state.items()]
    after = {name: local(t.detach()).view(torch.int32).numpy() for name, t in [*params.items(), *state]}
    return {name for name in before if not np.array_equal(before[name], after[name])}


def steps_with_bad_ones(bad):
    params, optimizer = make_optimizer()
    return [changed_by(params, optimizer, is_bad, bad) for is_bad in (False, False, True, True, False)]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(world, bad):
    results = run_processes(world, steps_with_bad_ones, bad) if world > 1 else [steps_with_bad_ones(bad)]
    for changed in results:
        assert changed[2:4] == [set(), set()]
        assert all(names >= SHAPES.keys() for names in (changed[0], changed[1], changed[4]))


def test_missing_gradient_counts_as_zero():
    params, optimizer = make_optimizer()
    before = params["odd"].detach().clone()
    params["a"].grad = torch.randn(8, 6)
    optimizer.step()
    torch.testing.assert_close(params["odd"].detach(), before * (1 - 0.01 * 0.05))
    assert not torch.equal(params["a"].detach(), make_optimizer()[0]["a"].detach())


@given(st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_schedule_is_a_trapezoid(total, warmup, warmdown, final):
    values = [lr_multiplier(step, total, warmup, warmdown, final) for step in range(total)]
    assert all(0 < value <= 1 or (value == final == 0) for value in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    if warmdown and round(warmdown * total) > 0:
        assert lr_multiplier(total, total, warmup, warmdown, final) == pytest.approx(final)


def test_momentum_ramp_and_batch_scale():
    assert muon_momentum(0) == 0.85 and muon_momentum(150) == pytest.approx(0.9) and muon_momentum(10**6) == 0.95
    scale = functools.partial(batch_lr_scale, tuned_batch=2**19, tuned_horizon=11.2e9)
    assert scale(2**19, 11.2e9) == 1 and scale(2**17, 11.2e9) == 0.5
    assert scale(2**16, 39e6) == pytest.approx(1.04, abs=0.02)  # a short run bears more at the same batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sgd"}, "sgd"),
        ({"ns_steps": 9}, "ns_steps=9"),
        ({"params": [torch.nn.Parameter(torch.zeros(3))]}, "matrices"),
    ],
)
def test_bad_groups(change, message):
    group = {"kind": "muon", "params": [torch.nn.Parameter(torch.zeros(3, 3))], "lr": 0.1, "momentum": 0.9,
             "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.0}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        MuonAdamW([{**group, **change}])


@given(st.lists(st.floats(0.1, 100), max_size=60), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_work_is_dealt_evenly(costs, owners):
    owner = assign_owners(costs, owners)
    load = [sum(cost for cost, who in zip(costs, owner, strict=True) if who == rank) for rank in range(owners)]
    assert len(owner) == len(costs) and all(0 <= who < owners for who in owner)
    # longest first to whoever has least: nobody has more than the mean and one job more (Graham 1969)
    assert max(load) <= sum(costs) / owners + max(costs, default=0) + 1e-9
    assert assign_owners(costs, owners) == owner
