"""bpb.py: bits per byte against a plain loop; masks, specials, ranks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.eval.bpb import evaluate_bpb, measure_bpb
from tests.processes import run_processes

VOCAB = 11
TOKEN_BYTES = torch.tensor([0, 0, *range(1, 10)], dtype=torch.int32)  # two special tokens


def model(x: torch.Tensor, y: torch.Tensor, loss_reduction: str) -> torch.Tensor:
    """Some loss for each (x, y); nan where the target is masked, as the worst a model may do."""
    assert loss_reduction == "none"
    losses = (x * 0.37 + y * 0.11).sin().abs() + 0.1
    return torch.where(y < 0, torch.nan, losses).flatten()


def make_batches(seed: int, count: int, rows: int, length: int):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randint(0, VOCAB, (rows, length), generator=generator)
        y = torch.randint(-1, VOCAB, (rows, length), generator=generator)
        yield x, y


def slow_bpb(batches) -> tuple[float, int, int]:
    nats, size, tokens = 0.0, 0, 0
    for x, y in batches:
        losses = model(x, y, "none").view(y.shape)
        for i in range(y.size(0)):
            for j in range(y.size(1)):
                target = int(y[i, j])
                if target >= 0 and TOKEN_BYTES[target] > 0:
                    nats += float(losses[i, j])
                    size += int(TOKEN_BYTES[target])
                    tokens += 1
    return nats / math.log(2) / size, tokens, size


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.integers(2, 9))
@hypothesis_settings(max_examples=40, deadline=None)
def test_against_a_plain_loop(seed, count, rows, length):
    if (
        int(sum((TOKEN_BYTES[y.clamp(min=0)] * (y >= 0)).sum() for _, y in make_batches(seed, count, rows, length)))
        == 0
    ):
        return
    expected, tokens, size = slow_bpb(make_batches(seed, count, rows, length))
    result = measure_bpb(model, make_batches(seed, count, rows, length), TOKEN_BYTES)
    assert result.bpb == pytest.approx(expected, rel=1e-6)
    assert (result.tokens, result.bytes) == (tokens, size)
    assert evaluate_bpb(model, make_batches(seed, count, rows, length), TOKEN_BYTES) == result.bpb


def test_uniform_model_on_one_byte_tokens_is_the_log_of_the_vocabulary():
    def uniform(x, y, loss_reduction):
        return torch.full(y.shape, math.log(256))

    x = torch.zeros(3, 50, dtype=torch.long)
    result = measure_bpb(uniform, [(x, x)], torch.ones(256, dtype=torch.int32))
    assert result.bpb == pytest.approx(8.0)


def test_masked_rows_change_nothing():
    """Loaders fill the last batch with rows whose targets are all -1."""
    batches = list(make_batches(2, 3, 4, 8))
    filler = (torch.zeros(4, 8, dtype=torch.long), torch.full((4, 8), -1))
    plain, filled = (measure_bpb(model, some, TOKEN_BYTES) for some in (batches, [*batches, filler]))
    assert plain == filled


def test_nothing_to_measure_is_one_line():
    x = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(UserError, match="no text"):
        measure_bpb(model, [], TOKEN_BYTES)
    with pytest.raises(UserError, match="no text"):
        measure_bpb(model, [(x, x)], TOKEN_BYTES)  # token 0 is special
    with pytest.raises(UserError, match="no text"):
        measure_bpb(model, [(x, x - 1)], TOKEN_BYTES)


def _uneven() -> tuple[float, int]:
    """Rank 0 holds all batches, rank 1 none."""
    count = 4 if torch.distributed.get_rank() == 0 else 0
    result = measure_bpb(model, make_batches(1, count, 3, 8), TOKEN_BYTES)
    return result.bpb, result.bytes


def test_ranks_with_different_numbers_of_batches():
    alone = measure_bpb(model, make_batches(1, 4, 3, 8), TOKEN_BYTES)
    first, second = run_processes(2, _uneven)
    assert first == second
    assert first == (pytest.approx(alone.bpb, rel=1e-12), alone.bytes)
