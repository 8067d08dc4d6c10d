import math
import os

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor

from nanochat import parallel
from nanochat.dtensor import is_sharded, local, row_range
from nanochat.errors import UserError
from nanochat.gpt import GPT, STATISTICS, GPTConfig, summarize
from nanochat.train.monitor import Monitor, MonitorSettings, monitor_settings, parse_interval
from tests.processes import run_processes

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=3, n_head=2, n_kv_head=1, n_embd=32)
MATRICES = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


# Scalars, of which a rank may hold none, and gates, which are no hidden matrices.
RICH = GPTConfig(**{**CONFIG.__dict__, "x0_shortcut": True, "attn_gate": True, "backout": True, "value_embeds": "ends"})


def shake(model: GPT) -> None:
    """Weights that are zero at the start get values, the same however the model is cut."""
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        noise = 0.05 * torch.randn(param.shape, generator=generator)
        if is_sharded(param):
            noise = noise[slice(*row_range(param))]
        with torch.no_grad():
            local(param).add_(noise)


def make(interval: int = 1, config: GPTConfig = CONFIG, **settings):
    model = GPT(config)
    model.init_weights()
    shake(model)
    optimizer = model.setup_optimizer(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01)
    return model, optimizer, Monitor(model, optimizer, MonitorSettings(interval, **settings))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def one_step(model, optimizer, monitor, number, forward=None, rows=slice(None)):
    """As the loop does it. Returns the not yet synced metrics, or None."""
    monitor.before_forward(number)
    inputs, targets = batch(number)
    (model if forward is None else forward)(inputs[rows], targets[rows]).backward()
    monitor.before_update()
    optimizer.step(max_norm=1.0)
    optimizer.zero_grad(set_to_none=True)
    return monitor.after_update()


def top(matrix: Tensor) -> float:
    return torch.linalg.svdvals(matrix.detach().double())[0].item()


@pytest.mark.parametrize("shape", [(7,), (4, 33, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_summary_is_what_it_says(shape, dtype):
    x = (3 * torch.randn(shape) - 1).to(dtype)
    wide = x.double()
    expected = [wide.mean(), wide.std(correction=0), wide.max(), wide.min(), wide.square().mean().sqrt()]
    torch.testing.assert_close(summarize(x), torch.stack(expected).float(), rtol=1e-4, atol=1e-5)
    assert not summarize(x.requires_grad_()).requires_grad


def test_metrics_equal_slow_references():
    model, optimizer, monitor = make()
    seen = {}

    def remember(name):
        return lambda _module, _inputs, output: seen.update({name: output.detach()})

    for layer, block in enumerate(model.transformer.h):
        for branch in ("attn", "mlp"):
            getattr(block, branch).register_forward_hook(remember(f"{layer}.{branch}"))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    inputs, targets = batch(1)
    model(inputs, targets).backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    optimizer.zero_grad(set_to_none=True)
    metrics = one_step(model, optimizer, monitor, 1)()

    after = dict(model.named_parameters())
    for layer in range(CONFIG.n_layer):
        for name in MATRICES:
            old, new = (weights[f"transformer.h.{layer}.{name}.weight"] for weights in (before, after))
            assert metrics.pop(f"Model/spectral_norm/{layer}.{name}") == pytest.approx(top(new), rel=2.5e-3)
            assert metrics.pop(f"Model/update_ratio/{layer}.{name}") == pytest.approx(
                top(new - old) / top(new), rel=5e-3
            )
        for branch in ("attn", "mlp"):
            x = seen[f"{layer}.{branch}"]
            for name, value in zip(STATISTICS, summarize(x).tolist(), strict=True):
                assert metrics.pop(f"Activations/{name}/{layer}.{branch}") == pytest.approx(value, rel=1e-6)
    for group in optimizer.param_groups:
        label = group["label"]
        norm = math.sqrt(sum(grads[name].square().sum().item() for name in group["names"]))
        assert metrics.pop(f"Optimization/grad_norm/{label}") == pytest.approx(norm, rel=1e-5)
        norm = math.sqrt(sum(after[name].detach().square().sum().item() for name in group["names"]))
        assert metrics.pop(f"Model/param_norm/{label}") == pytest.approx(norm, rel=1e-5)
    assert metrics == {}  # nothing else


def test_what_is_due_when():
    model, optimizer, monitor = make(interval=3, spectral_every=2)
    kinds = {}
    for number in range(5, 14):  # a run that goes on from step 4
        snapshot = one_step(model, optimizer, monitor, number)
        if snapshot is not None:
            kinds[number] = {name.split("/")[1] for name in snapshot()}
    assert list(kinds) == [5, 6, 9, 12]  # the first, and the multiples of three
    assert [number for number, names in kinds.items() if "spectral_norm" in names] == [5, 9]
    assert all(set(STATISTICS) | {"grad_norm", "param_norm"} <= names for names in kinds.values())


def test_parts_can_be_left_out():
    model, optimizer, monitor = make(spectral_every=0, activations=False)
    names = one_step(model, optimizer, monitor, 1)()
    assert {name.split("/")[1] for name in names} == {"grad_norm", "param_norm"}


def test_watching_changes_nothing_and_leaves_nothing():
    plain, watched = make(interval=1000), make(interval=1)
    for monitor in (plain[2], watched[2]):
        monitor.events += 1  # the first event is not forced
    attributes = [set(vars(block)) for block in watched[0].transformer.h]
    for number in range(1, 4):
        assert one_step(*plain, number) is None and one_step(*watched, number) is not None
        assert [set(vars(block)) for block in watched[0].transformer.h] == attributes
    for (name, one), (_, other) in zip(plain[0].named_parameters(), watched[0].named_parameters(), strict=True):
        assert torch.equal(one, other), name
    inputs, _ = batch()
    expected = watched[0](inputs)
    watched[2].attach()
    attached = watched[0](inputs)
    stats = [block.stats.clone() for block in watched[0].transformer.h]
    watched[2].detach()
    assert torch.equal(attached, expected) and torch.equal(watched[0](inputs), expected)
    assert all(table.abs().sum() > 0 for table in stats)
    assert all(block.stats is None for block in watched[0].transformer.h)
    assert watched[0].state_dict().keys() == plain[0].state_dict().keys()


def test_the_host_reads_nothing_until_the_metrics_are_wanted(monkeypatch):
    model, optimizer, monitor = make(interval=4)
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        inner = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *args, _inner=inner, _name=name: reads.append(_name) or _inner(*args))
    copies = []
    inner_to = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda self, *args, **kwargs: copies.append(args[0]) or inner_to(self, *args, **kwargs)
    )
    snapshots = {number: one_step(model, optimizer, monitor, number) for number in range(1, 6)}
    assert reads == []
    assert copies.count("cpu") == 2  # steps 1 and 4
    snapshots[4]()
    assert reads == ["tolist"]


def test_on_and_off_are_two_graphs_and_no_more():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, optimizer, monitor = make(interval=3, spectral_every=0)
    forward = torch.compile(model, backend=counter, dynamic=False)
    twin = make(interval=3, spectral_every=0)
    graphs = []
    for number in range(1, 10):
        snapshot = one_step(model, optimizer, monitor, number, forward)
        graphs.append(counter.frame_count)
        expected = one_step(*twin, number)
        assert (snapshot is None) == (expected is None)
        if snapshot is not None:
            assert snapshot() == pytest.approx(expected(), rel=1e-4, abs=1e-6)
    each = graphs[0]  # frames of one variant
    assert graphs == [each] + [2 * each] * 8
    torch._dynamo.reset()


def test_a_layer_without_attention_has_no_metrics_of_it():
    config = GPTConfig(**{**CONFIG.__dict__, "attention_free_layer": 1})
    names = one_step(*make(config=config), 1)()
    assert "Model/spectral_norm/1.mlp.c_fc" in names and "Activations/mean/1.mlp" in names
    assert not [name for name in names if "/1.attn" in name]


def metrics_on_ranks(strategy):
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with torch.device("meta"):
        model = GPT(RICH)
    policy, _ = parallel.make_policy(strategy, model.num_params(), torch.float32, world, 2)
    parallel.shard_model(model, parallel.make_mesh(policy, "cpu", 2), policy)
    model.to_empty(device="cpu")

    model.init_weights()
    shake(model)
    optimizer = model.setup_optimizer(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01)
    monitor = Monitor(model, optimizer, MonitorSettings(2))
    result = []
    for number in (1, 2):
        parallel.before_micro_batch(model, policy, last=True)
        snapshot = one_step(model, optimizer, monitor, number, rows=slice(rank, None, world))
        result.append(snapshot())
    return result


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_say_what_one_does(strategy):
    alone = make(2, RICH)
    expected = [one_step(*alone, number)() for number in (1, 2)]
    for metrics in run_processes(2, metrics_on_ranks, strategy):
        for mine, theirs in zip(expected, metrics, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                if not name.startswith("Activations/"):  # those are of the rank's own rows
                    np.testing.assert_allclose(theirs[name], value, rtol=5e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("text", "steps"), [("production", 100), ("research", 10), ("validation", 1), ("7", 7), ("0", 0)]
)
def test_intervals(text, steps):
    assert parse_interval(text) == steps


@pytest.mark.parametrize("text", ["often", "-1", "1.5", ""])
def test_other_intervals_are_user_errors(text):
    with pytest.raises(UserError, match=rf"--monitor-interval={text}: expected .* production \(100\)"):
        parse_interval(text)


def test_the_environment_has_a_say(monkeypatch):
    assert monitor_settings("0") is None
    assert monitor_settings("research") == MonitorSettings(10, 1, True)
    monkeypatch.setenv("MONITOR_SPECTRAL_EVERY", "5")
    monkeypatch.setenv("MONITOR_ACTIVATIONS", "0")
    assert monitor_settings("20") == MonitorSettings(20, 5, False)
    monkeypatch.setenv("MONITOR_ACTIVATIONS", "yes")
    with pytest.raises(UserError, match="MONITOR_ACTIVATIONS=yes"):
        monitor_settings("20")
    monkeypatch.setenv("MONITOR_SPECTRAL_EVERY", "-1")
    with pytest.raises(UserError, match="MONITOR_SPECTRAL_EVERY=-1"):
        monitor_settings("20")


def test_a_rank_that_owns_no_matrix_has_nothing_to_say():
    """More ranks than matrices: its share of the norms, which the ranks add up, is zero."""
    model, optimizer, monitor = make()
    monitor.matrices = [matrix._replace(local=False) for matrix in monitor.matrices]
    seen = one_step(model, optimizer, monitor, 1)()
    assert {value for name, value in seen.items() if name.startswith("Model/spectral_norm")} == {0.0}
    assert seen["Model/param_norm/matrices"] > 0
