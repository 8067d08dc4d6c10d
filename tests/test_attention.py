"""Masks of documents and windows (attention over all of the past is tested with the model, in test_gpt.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.attention import (
    BLOCK,
    _mask_blocks,
    block_mask,
    causal_attention,
    dense_mask,
    make_masks,
    masked_attention,
    offset_keys,
)


def documents_of(lengths, rows=1):
    """(rows, sum of lengths) document numbers; each further row is the one before, shifted by a third."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.stack([torch.sort(row.roll(i * len(row) // 3)).values for i in range(rows)])


def slow_mask(documents, window):
    B, T = documents.shape
    mask = torch.zeros(B, 1, T, T, dtype=torch.bool)
    for b in range(B):
        for query in range(T):
            for key in range(query + 1):
                same = documents[b, query] == documents[b, key]
                mask[b, 0, query, key] = same and query - key <= window
    return mask


def test_dense_mask_matches_slow_reference():
    documents = documents_of([5, 1, 9, 3], rows=2)
    for window in (0, 3, 7, 100):
        assert torch.equal(dense_mask(documents, torch.tensor(float(window))), slow_mask(documents, window))


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=6),
    st.integers(0, 900),
    st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_block_mask_names_exactly_the_blocks_that_matter(lengths, window, rows):
    documents = documents_of(lengths, rows)
    B, T = documents.shape
    count = -(-T // BLOCK)
    wanted = dense_mask(documents, torch.tensor(float(window)))
    made = block_mask(documents, torch.tensor(float(window)))
    pairs = [(made.kv_num_blocks, made.kv_indices), (made.full_kv_num_blocks, made.full_kv_indices)]
    partial, whole = (
        {(b, i, int(j)) for b in range(B) for i in range(count) for j in numbers[b, 0, i, : int(counted[b, 0, i])]}
        for counted, numbers in pairs
    )
    assert not partial & whole
    for b in range(B):
        for i in range(count):
            for j in range(count):
                tile = wanted[b, 0, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                if tile.numel() == BLOCK**2:
                    assert ((b, i, j) in whole) == bool(tile.all()), (i, j)
                assert (b, i, j) not in whole or tile.all()
                assert ((b, i, j) in partial | whole) == bool(tile.any()), (i, j)
    by_key = [(made.q_num_blocks, made.q_indices), (made.full_q_num_blocks, made.full_q_indices)]  # for the gradients
    for blocks, (counted, numbers) in zip((partial, whole), by_key, strict=True):
        assert blocks == {
            (b, int(i), j) for b in range(B) for j in range(count) for i in numbers[b, 0, j, : int(counted[b, 0, j])]
        }
    query, key = torch.arange(T).unsqueeze(1), torch.arange(T).unsqueeze(0)
    for b in range(B):
        seen = made.mask_mod(torch.tensor(b), torch.tensor(0), query, key)
        assert torch.equal(seen, wanted[b, 0])


def test_flex_attention_equals_the_dense_mask():
    documents = documents_of([100, 37, 150, 13], rows=2)
    q, k, v = torch.randn(2, 300, 4, 16), torch.randn(2, 300, 2, 16), torch.randn(2, 300, 2, 16)
    windows = torch.tensor([40.0, 130.0])
    for dense, blocks in zip(
        make_masks(documents, windows, documents, blocks=False),
        make_masks(documents, windows, documents, blocks=True),
        strict=True,
    ):
        expected = masked_attention(q, k, v, dense, 0.3)
        torch.testing.assert_close(masked_attention(q, k, v, blocks, 0.3), expected, atol=1e-5, rtol=1e-5)


def test_without_documents_a_mask_is_a_causal_window():
    q, k, v = (torch.randn(2, 50, 2, 8) for _ in range(3))
    short, long = make_masks(None, torch.tensor([7.0, 1000.0]), torch.zeros(2, 50), blocks=False)
    torch.testing.assert_close(masked_attention(q, k, v, short, 8**-0.5), causal_attention(q, k, v, 7))
    torch.testing.assert_close(masked_attention(q, k, v, long, 8**-0.5), causal_attention(q, k, v))


@pytest.mark.parametrize("length", [40, 300])  # of one block, and of two that end within it
def test_training_in_bf16_on_a_cpu_is_near_attention_in_fp64(length):
    """By blocks (with gradients) as near as SDPA (without): 1 % of the norm."""
    inputs = [torch.randn(2, length, 2, 16).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = torch.randn(2, length, 2, 16)
    outputs = [causal_attention(*tensors, scale=0.3) for tensors in (inputs, exact)]
    got, wanted = (
        [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]
        for out, tensors in zip(outputs, (inputs, exact), strict=True)
    )
    with torch.no_grad():
        got.append(causal_attention(*inputs, scale=0.3))
    for ours, theirs in zip(got, [*wanted, wanted[0]], strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_by_itself_is_as_among_others(key_heads, dtype):
    q, k, v = (torch.randn(3, 20, heads, 8, dtype=dtype) for heads in (4, key_heads, key_heads))
    mask = dense_mask(documents_of([4, 6, 10], rows=3), torch.tensor(7.0))
    together = masked_attention(q, k, v, mask, 0.5)
    for query in (0, 3, 4, 19):
        alone = masked_attention(q[:, query : query + 1], k, v, mask[:, :, query : query + 1], 0.5)
        error = 1e-5 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(alone[:, 0], together[:, query], atol=error, rtol=error)


def test_the_compiler_is_told_how_lists_of_blocks_are_laid_out():
    """The attention kernel goes by one list's strides in reading the others."""
    documents, window = documents_of([300, 100, 600], rows=2), torch.tensor(300.0)
    torch.library.opcheck(_mask_blocks, (documents, window))
    assert all(part.is_contiguous() for part in _mask_blocks(documents, window))


@pytest.mark.parametrize("carried", [False, True])
def test_offset_keys_take_half_of_their_slow_dimensions_from_the_token_before(carried):
    k, joined = torch.randn(2, 5, 3, 8), torch.rand(2, 5) > 0.3
    past = torch.randn(2, 1, 3, 2, 2) if carried else None
    joined[:, 0] &= carried
    found, slow = offset_keys(k, joined, past)
    expected = k.clone()
    for row, token in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        for half in range(2):  # pairs (i, i + D/2) turn together; the last quarter of each half turns slowest
            own = slice(4 * half + 2, 4 * half + 4)
            before = k[row, token - 1, :, own] if token else past[row, 0, :, half] if carried else torch.zeros(3, 2)
            expected[row, token, :, own] = before * joined[row, token]
            assert torch.equal(slow[row, token, :, half], k[row, token, :, own])
    assert torch.equal(found, expected)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_rows_of_queries_may_share_their_keys(rows, branches, steps, seed):
    """Against keys that are there once for each row of queries."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows * branches, steps, 4, 8, generator=generator)
    k, v = torch.randn(2, rows, 7, 2, 8, generator=generator)
    mask = torch.rand(rows, 1, branches * steps, 7, generator=generator) < 0.6
    mask[..., 0] = True
    alone = mask.view(rows * branches, 1, steps, 7)
    expected = masked_attention(q, *(x.repeat_interleave(branches, dim=0) for x in (k, v)), alone, 0.5)
    torch.testing.assert_close(masked_attention(q, k, v, mask, 0.5), expected)
