import itertools
import re
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.rows import even_batches, plan_batch
from nanochat.dataloader import Prefetcher, target_batches
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import IGNORE_INDEX

WORLDS = [1, 3, 6, 7, 12, 48, 56, 100, 127, 1000, 1024]


@pytest.mark.parametrize("rows", [1, 6, 255, 256, 1000])
@pytest.mark.parametrize("asked", [1, 4, 32])
def test_every_world_size_has_room_for_the_rows_and_wastes_little(rows, asked):
    for world in range(1, 1025):
        plan = plan_batch(rows * 64, asked, 64, world)
        each = plan.batches_per_step * plan.device_batch_size
        assert plan.rows_per_step == rows and world * each == rows + plan.filler_rows
        assert 1 <= plan.device_batch_size <= asked
        needed = len(range(0, rows, world))  # what rank 0 has, and no rank has more
        assert needed <= each < needed + plan.batches_per_step
        assert (plan.batches_per_step - 1) * asked < needed  # no more batches than it takes
        assert (plan.note is None) == (plan.filler_rows == 0 and plan.device_batch_size == asked)
        if plan.filler_rows:
            better = int(re.search(r"--total-batch-size=(\d+) would have none", plan.note)[1])
            assert plan_batch(better, asked, 64, world).filler_rows == 0


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 1024), st.integers(1, 4096))
def test_what_divides_evenly_is_left_as_it_is(device_batch, batches, world, length):
    rows = device_batch * batches * world
    assert plan_batch(rows * length, device_batch, length, world) == (rows, device_batch, batches, 0, None)


def test_the_batch_arithmetic_of_known_runs():
    assert plan_batch(524_288, 32, 2048, 8) == (256, 32, 1, 0, None)
    assert plan_batch(524_288, 32, 2048, 1)[1:3] == (32, 8)
    assert plan_batch(6 * 2048, 4, 2048, 1)[1:4] == (3, 2, 0)
    assert plan_batch(256 * 2048, 16, 2048, 56)[1:4] == (5, 1, 24)


def test_notes_say_what_was_changed_and_lost():
    lowered = plan_batch(524_288, 32, 2048, 64).note
    assert lowered == "device batch of 4 instead of 32: 256 rows a step on 64 rank(s)"
    filled = plan_batch(524_288, 37, 2048, 7).note
    assert filled == "1.2 % of the positions are filler; --total-batch-size=530432 would have none"
    idle = plan_batch(524_288, 1, 2048, 1024).note
    assert idle.startswith("75.0 % of the positions are filler (768 ranks have nothing else)")


@pytest.mark.parametrize(("total", "better"), [(5000, 4096), (100, 2048), (2049, 2048)])
def test_rows_that_do_not_make_up_the_batch(total, better):
    with pytest.raises(UserError, match=rf"--total-batch-size={total} .*--max-seq-len=2048; {better} would be"):
        plan_batch(total, 1, 2048, 1)


@given(st.integers(0, 500), st.integers(1, 40))
def test_even_batches_hold_all_rows(rows, most):
    batches, size = even_batches(rows, most)
    assert rows <= batches * size < rows + max(batches, 1) and size <= most


def rows_to_evaluate(count):
    """Inputs and targets (count, 4) that say which row they are of."""
    inputs = np.arange(count * 4).reshape(count, 4)
    return inputs, inputs + 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [0, 1, 5, 130])
def test_evaluation_batches_are_as_many_on_every_rank_and_hold_each_row_once(world, count):
    inputs, targets = rows_to_evaluate(count)
    given_out, numbers = [], set()
    for rank in range(world):
        batches = list(target_batches(inputs, targets, 3, torch.device("cpu"), rank, world))
        numbers.add((len(batches), *{batch.inputs.shape for batch in batches}))
        for x, y in batches:
            real = (y != IGNORE_INDEX).all(dim=1)
            assert (
                ((y == IGNORE_INDEX).all(dim=1) | real).all()
                and (x[~real] == 0).all()
                and (y[real] == x[real] + 1).all()
            )
            given_out += (x[real][:, 0] // 4).tolist()
    assert len(numbers) == 1 and sorted(given_out) == list(range(count))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tiny = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    tiny.init_weights()
    torch.nn.init.normal_(tiny.lm_head.weight, std=0.3)  # the head starts at zero, and with it most gradients
    return tiny


def loss_and_gradient(model, ranks):
    """The trainer's arithmetic over the batches of each rank: summed losses over the global count of targets."""
    count = sum(int((y != IGNORE_INDEX).sum()) for batches in ranks for _, y in batches)
    model.zero_grad(set_to_none=False)
    total = 0.0
    for batches in ranks:
        for x, y in batches:
            loss = model(x, y, loss_reduction="sum") / count
            loss.backward()
            total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("rows", "world", "device_batch"), [(1, 3, 2), (6, 4, 1), (7, 3, 2), (12, 5, 4), (5, 9, 3)])
def test_filler_changes_neither_loss_nor_gradient(model, rows, world, device_batch):
    draw = np.random.default_rng(rows)
    inputs = draw.integers(0, 32, (rows, 8))
    targets = np.where(draw.random((rows, 8)) < 0.7, draw.integers(0, 32, (rows, 8)), IGNORE_INDEX)
    targets[0, 0] = 1
    one = list(target_batches(inputs, targets, rows, torch.device("cpu")))
    many = [list(target_batches(inputs, targets, device_batch, torch.device("cpu"), r, world)) for r in range(world)]
    loss, gradient = loss_and_gradient(model, [one])
    assert gradient.abs().max() > 0
    other_loss, other_gradient = loss_and_gradient(model, many)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-5)


# ---- the thread that prepares batches


def test_items_come_in_order_and_ahead():
    made = []
    ahead = Prefetcher((made.append(i) or i for i in itertools.count()), 3, "numbers")
    assert [ahead.get() for _ in range(5)] == [0, 1, 2, 3, 4]
    deadline = time.monotonic() + 5
    while len(made) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 8  # three lie ready
    ahead.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("numbers")]


def test_what_the_iterator_raises_is_raised_where_it_is_read():
    def items():
        yield 1
        raise ValueError("broken")

    ahead = Prefetcher(items(), 2, "broken")
    assert ahead.get() == 1
    with pytest.raises(ValueError, match="broken"):
        ahead.get()
    ahead.close()
