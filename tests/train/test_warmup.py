import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanochat import parallel
from nanochat.checkpoint import rng_state
from nanochat.dtensor import is_sharded, local
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim.schedule import set_schedule
from nanochat.train.warmup import SyntheticLoader, warm_up
from tests.processes import run_processes

# 3 blocks do not divide by 2 ranks, nor 61 rows of the vocabulary.
CONFIG = GPTConfig(sequence_len=16, vocab_size=61, n_layer=3, n_head=2, n_kv_head=1, n_embd=20)


@dataclasses.dataclass
class Shape:
    """What SyntheticLoader asks of a loader."""

    device_batch_size: int = 4
    batches_per_step: int = 2


class Training:
    """The steps of a run: two micro-batches of tokens from the global generators, and a schedule."""

    def __init__(self, strategy="ddp", large=False):
        with torch.device("meta"):
            self.model = GPT(CONFIG)
        self.policy = parallel.Policy(strategy, torch.float32, torch.float32, large, accumulate_unsharded=not large)
        if strategy != "ddp":
            parallel.shard_model(self.model, parallel.make_mesh(self.policy, "cpu", 1), self.policy)
        self.model.to_empty(device="cpu")
        self.model.init_weights(seed=1)
        self.optimizer = self.model.setup_optimizer(0.02, 0.1, 0.01)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.steps, self.forwards = 0, 0

    def step(self, batches):
        for index, (x, y) in enumerate(batches):
            parallel.before_micro_batch(self.model, self.policy, last=index == len(batches) - 1)
            (self.model(x, y) / len(batches)).backward()
            self.forwards += 1
        set_schedule(self.optimizer.param_groups, 1 / (1 + self.optimizer.num_steps), 0.8)
        self.optimizer.step(max_norm=1.0)
        self.optimizer.zero_grad(set_to_none=True)

    def real_step(self):
        offset = random.randrange(61) + np.random.randint(61)
        rows = [(torch.randint(61, (4, 17)) + offset) % 61 for _ in range(2)]
        self.step([(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows])

    def rehearse(self):
        """Steps and an evaluation that leave their mark wherever one can be left."""
        loader = SyntheticLoader(Shape(), self.model)
        self.step([loader.next_batch() for _ in range(loader.batches_per_step)])
        self.real_step()  # draws from all generators
        self.model.cos.mul_(0.5)
        with torch.no_grad(), parallel.unsharded_params(self.model, self.policy):
            self.model.eval()
            self.model(*loader.next_batch(), loss_reduction="none")
        self.model.train()

    def everything(self):
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers()) | self.optimizer.named_state()
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "names")}
            for group in self.optimizer.param_groups
        ]
        bits = {name: local(tensor.detach()).numpy().copy() for name, tensor in tensors.items()}
        return bits, groups, self.optimizer.num_steps, rng_state()


def assert_same(ours, theirs):
    bits, *rest = ours
    expected, *expected_rest = theirs
    assert bits.keys() == expected.keys() and rest == expected_rest
    for name, tensor in bits.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name, strict=True)


def train_both_ways(strategy="ddp", large=False, before=0):
    """Steps with and without a warm-up after the first `before` of them; raises unless all is the same."""
    results = []
    for warm in (False, True):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        run = Training(strategy, large)
        for _ in range(before):
            run.real_step()
        if warm:
            then, ids = run.everything(), {name: id(param) for name, param in run.model.named_parameters()}
            assert warm_up(run.model, run.optimizer, run.rehearse, repeats=2) > 0
            assert run.forwards == 2 * before + 2 * 4
            assert all(param.grad is None for param in run.model.parameters())
            assert ids == {name: id(param) for name, param in run.model.named_parameters()}
            assert_same(run.everything(), then)
        for _ in range(3):
            run.real_step()
        results.append(run.everything())
        assert strategy == "ddp" or all(is_sharded(param) for param in run.model.parameters())
    assert_same(*results)
    return results[0][0]


@pytest.mark.parametrize("before", [0, 2])  # at the start, and where a run is resumed
def test_a_warm_up_leaves_no_trace(before):
    assert np.isfinite(train_both_ways(before=before)["lm_head.weight"]).all()


def train_in_layouts():
    return [train_both_ways(*layout)["lm_head.weight"] for layout in (("ddp", False), ("fsdp", False), ("fsdp", True))]


def test_nor_on_two_ranks():
    for heads in run_processes(2, train_in_layouts):
        assert len(heads) == 3 and all(np.isfinite(head).all() for head in heads)


def test_a_step_that_is_not_undone_shows():
    """The comparison above can fail."""
    run = Training()
    then = run.everything()
    run.rehearse()
    with pytest.raises(AssertionError):
        assert_same(run.everything(), then)


def test_synthetic_batches_are_as_the_loader_gives_them():
    model = GPT(CONFIG)
    loader = SyntheticLoader(Shape(device_batch_size=5, batches_per_step=3), model)
    before = torch.get_rng_state()
    inputs, targets = loader.next_batch()
    assert torch.equal(torch.get_rng_state(), before)
    assert (loader.device_batch_size, loader.batches_per_step) == (5, 3)
    for tokens in (inputs, targets):
        assert tokens.shape == (5, 16) and tokens.dtype == torch.int64 and tokens.is_contiguous()
        assert tokens.min() >= 0 and tokens.max() < 61
    # compiled code is made again for a batch whose two tensors are one
    assert inputs.untyped_storage().data_ptr() != targets.untyped_storage().data_ptr()


def test_nothing_is_compiled_after_the_warm_up():
    from torch._dynamo.testing import CompileCounter

    run, counter = Training(), CompileCounter()
    run.model.forward = torch.compile(run.model.forward, backend=counter, dynamic=False)
    loader = SyntheticLoader(Shape(), run.model)
    warm_up(run.model, run.optimizer, lambda: run.step([loader.next_batch(), loader.next_batch()]))
    compiled = counter.frame_count
    assert compiled > 0
    run.real_step()
    assert counter.frame_count == compiled
