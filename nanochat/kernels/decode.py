"""Decoding in Triton: products with one row, attention of one query a row over a cache, drawing of tokens. Imported
where one is launched.

A token a row leaves a GPU waiting: at batch 1 a step's time is most of all the starts and ends of kernels. So norms,
squares, sums and the softcap are part of the products, rotation and the way into the cache part of the attention. Where
the card can do it (`launch_pdl`), a kernel starts while the one before ends, and reads what that one does not write.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # of nanochat.kernels.pointwise.norm
SMALL = 2**21  # weights of a matrix that all programs together hold at a time
PROGRAMS = 264  # of an attention, at least: two for each processor of an H100
PART = 2048  # logits whose largest are found together
MOST_CUT = 128  # for a larger one, sorting is as fast
SPLITS = 32  # programs, at most, that share the positions of one row and head


def _early(device: torch.device) -> dict[str, Any]:
    """What lets a kernel start before the one before has ended, on Hopper and later."""
    return {"launch_pdl": True} if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else {}


def product(
    x: Tensor, weight: Tensor, norm: bool, square: bool, add: Tensor | None, factor: float, cap: float
) -> Tensor:
    """nanochat.engine.fused.linear of one row."""
    (columns, depth), early = weight.shape, _early(x.device)
    out = x.new_empty(1, columns, dtype=torch.float32 if cap else x.dtype)
    assert x.stride(1) == 1 and weight.is_contiguous() and (add is None or add.is_contiguous())
    if columns * depth <= SMALL:  # all that a program reads in one go
        block = min(triton.next_power_of_2(depth), 8192)
        rows, warps = max(8192 // block, 1), 4
    else:  # 16 weights of each thread at a time
        block = min(max(depth & -depth, 256), 1024)
        rows, warps = 2 if block == 256 else 1, max(block // 512, 1)
    _product[triton.cdiv(columns, rows),](
        x, weight, x if add is None else add, out, columns, factor, cap,
        K=depth, NORM=norm, SQUARE=square, ADD=add is not None, CAP=cap > 0, EARLY=bool(early), BN=rows, BK=block,
        num_warps=warps, **early,
    )  # fmt: skip
    return out


@triton.jit
def _product(
    x_ptr, w_ptr, add_ptr, out_ptr, columns, factor, cap,
    K: tl.constexpr, NORM: tl.constexpr, SQUARE: tl.constexpr, ADD: tl.constexpr, CAP: tl.constexpr,
    EARLY: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    column, place = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside = column < columns
    at = w_ptr + column.to(tl.int64)[:, None] * K + place[None, :]
    w = tl.load(at, mask=inside[:, None] & (place < K)[None, :], other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    products, squares = tl.zeros([BN, BK], tl.float32), tl.zeros([BK], tl.float32)
    for start in tl.static_range(0, K, BK):
        x = tl.load(x_ptr + start + place, mask=start + place < K, other=0.0).to(tl.float32)
        products += w.to(tl.float32) * x[None, :]
        squares += x * x
        if start + BK < K:
            w = tl.load(at + start + BK, mask=inside[:, None] & (start + BK + place < K)[None, :], other=0.0)
    y = tl.sum(products, 1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + EPS)
    if SQUARE:
        y = tl.maximum(y, 0.0)
        y *= y
    if CAP:
        y = cap * (2 * tl.sigmoid(2 * factor / cap * y) - 1)
    if ADD:
        y = tl.load(add_ptr + column, mask=inside, other=0.0).to(tl.float32) + factor * y
    tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), mask=inside)


def scratch(rows: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the programs of an attention exchange: their sums (rows, heads, splits, dim + 2), and how many are done."""
    splits = min(triton.next_power_of_2(triton.cdiv(PROGRAMS, rows * kv_heads)), SPLITS)
    parts = torch.empty(rows, heads, splits, dim + 2, device=device)
    return parts, torch.zeros(rows, kv_heads, dtype=torch.int32, device=device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cache: Any, layer: int, window: int, first: Tensor | None, joined: Tensor | None,
    cos: Tensor, sin: Tensor, scale: float, space: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """What causal attention over a cache gives for q (B, H, D), k and v (B, Hkv, D), of one token a row, not rotated
    yet, which are put into it: (B, H * D). first (B,): where documents begin. joined (B,): of keys with a part of the
    token before, whether that is of the same document. Of rows that take no token in (cache.incoming is 0) nothing is
    written."""
    keys, values = cache.get_layer_cache(layer)
    (rows, heads, dim), kv_heads = q.shape, k.size(1)
    parts, counts = space
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    early = _early(q.device)
    assert keys.stride() == values.stride() and q.stride(2) == k.stride(2) == v.stride(2) == keys.stride(3) == 1
    _attend[rows, kv_heads, parts.size(2)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), keys, values, *keys.stride()[:3], cache.cache_seqlens,
        cache.incoming, cos if first is None else first, cos if joined is None else joined, cos, sin, scale, parts,
        counts, out, keys.size(1), window if window >= 0 else keys.size(1) + 1, parts.size(2), HEADS=kv_heads,
        GROUP=heads // kv_heads, D=dim, FIRST=first is not None, OFFSET=joined is not None, EARLY=bool(early),
        MOST=SPLITS, BT=64 if rows == 1 else 32,
        BG=max(16, triton.next_power_of_2(heads // kv_heads)), BD=max(16, triton.next_power_of_2(dim // 2)),
        num_warps=4, **early,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["size", "window", "splits"])  # not compiled for each length of a cache
def _attend(
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, keys, values, row_stride, step, head_stride,
    lengths, incoming, firsts, joined, cos_ptr, sin_ptr, scale, parts, counts, out, size, window, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr, OFFSET: tl.constexpr,
    EARLY: tl.constexpr, MOST: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    b, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HALF: tl.constexpr = D // 2
    dtype = keys.dtype.element_ty
    g, d = tl.arange(0, BG)[:, None], tl.arange(0, BD)[None, :]
    in_group, in_half = g < GROUP, d < HALF
    position = tl.load(lengths + b)

    # this program's share of the positions that the query sees
    low = tl.maximum(position - window, 0)
    if FIRST:
        low = tl.maximum(low, tl.load(firsts + b).to(tl.int32))
    share = tl.cdiv(tl.cdiv(position + 1 - low, splits), BT) * BT
    used = tl.where(tl.load(incoming + b) > 0, tl.cdiv(position + 1 - low, share), 0)
    begin = low + split * share
    end = tl.where(split < used, tl.minimum(begin + share, position), begin)
    base = b.to(tl.int64) * row_stride + h * head_stride
    cos = tl.load(cos_ptr + position * HALF + d, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + position * HALF + d, mask=in_half, other=0.0)
    # of earlier steps, so that it can be read before the projections are done
    k1, k2, seen = _block(keys, base, begin, end, size, step, d, HALF, BT)
    v1, v2, seen = _block(values, base, begin, end, size, step, d, HALF, BT)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()

    q1, q2 = _rotated(q_ptr + b * q_stride + (h * GROUP + g) * D + d, in_group & in_half, cos, sin, HALF)
    q1, q2 = q1.to(dtype), q2.to(dtype)
    most = tl.full([BG, 1], float("-inf"), tl.float32)
    total = tl.zeros([BG, 1], tl.float32)
    sum1, sum2 = tl.zeros([BG, BD], tl.float32), tl.zeros([BG, BD], tl.float32)
    if split == used - 1:
        one = tl.arange(0, 1)[:, None] + d  # (1, BD)
        value = v_ptr + b * v_stride + h * D + one
        is_joined = True
        if OFFSET:
            is_joined = tl.load(joined + b)
        k1_new, k2_new, v1_new, v2_new = _taken_in(
            k_ptr + b * k_stride + h * D + one, tl.load(value, mask=one < HALF, other=0.0),
            tl.load(value + HALF, mask=one < HALF, other=0.0), keys + base, values + base, step, position, size,
            is_joined, cos, sin, one, one < HALF, HALF, OFFSET,
        )  # fmt: skip
        product = q1.to(tl.float32) * k1_new.to(tl.float32) + q2.to(tl.float32) * k2_new.to(tl.float32)
        most = scale * tl.sum(product, 1)[:, None]
        total += 1.0
        sum1 += v1_new.to(tl.float32)
        sum2 += v2_new.to(tl.float32)
    if begin < end:
        most, total, sum1, sum2 = _attended(q1, q2, k1, k2, v1, v2, seen, scale, most, total, sum1, sum2)
    for start in tl.range(begin + BT, end, BT):
        more_k1, more_k2, those = _block(keys, base, start, end, size, step, d, HALF, BT)
        more_v1, more_v2, those = _block(values, base, start, end, size, step, d, HALF, BT)
        most, total, sum1, sum2 = _attended(
            q1, q2, more_k1, more_k2, more_v1, more_v2, those, scale, most, total, sum1, sum2
        )

    target = out + b * (HEADS * GROUP * D) + (h * GROUP + g) * D + d
    if (used == 1) & (split == 0):
        tl.store(target, (sum1 / total).to(dtype), mask=in_group & in_half)
        tl.store(target + HALF, (sum2 / total).to(dtype), mask=in_group & in_half)
    elif split < used:
        # the program that is done last adds up
        mine = parts + (((b * HEADS + h) * GROUP + g) * splits + split) * (D + 2)
        tl.store(mine + d, sum1, mask=in_group & in_half)
        tl.store(mine + HALF + d, sum2, mask=in_group & in_half)
        tl.store(mine + D, most, mask=in_group)
        tl.store(mine + D + 1, total, mask=in_group)
        tl.debug_barrier()
        done = tl.atomic_add(counts + b * HEADS + h, 1, sem="acq_rel")
        if done == used - 1:
            tl.store(counts + b * HEADS + h, 0)
            s = tl.arange(0, MOST)[:, None]
            ok = s < used
            for i in tl.static_range(GROUP):
                its = parts + (((b * HEADS + h) * GROUP + i) * splits + s) * (D + 2)
                highest = tl.load(its + D, mask=ok, other=float("-inf"), cache_modifier=".cg")
                factor = tl.exp(highest - tl.max(highest, 0))
                whole = tl.sum(factor * tl.load(its + D + 1, mask=ok, other=0.0, cache_modifier=".cg"), 0)
                factor /= whole
                o1 = tl.sum(factor * tl.load(its + d, mask=ok & in_half, other=0.0, cache_modifier=".cg"), 0)
                o2 = tl.sum(factor * tl.load(its + HALF + d, mask=ok & in_half, other=0.0, cache_modifier=".cg"), 0)
                goal = out + b * (HEADS * GROUP * D) + (h * GROUP + i) * D + tl.arange(0, BD)
                tl.store(goal, o1.to(dtype), mask=tl.arange(0, BD) < HALF)
                tl.store(goal + HALF, o2.to(dtype), mask=tl.arange(0, BD) < HALF)


@triton.jit
def _block(cache, base, start, end, size, step, d, HALF: tl.constexpr, BT: tl.constexpr):
    """Both halves of the keys or values of BT positions from `start` on, and which of these are before `end`."""
    t = start + tl.arange(0, BT)
    at = cache + base + (t % size).to(tl.int64)[:, None] * step + d
    ok = (t < end)[:, None] & (d < HALF)
    return tl.load(at, mask=ok, other=0.0), tl.load(at + HALF, mask=ok, other=0.0), t < end


@triton.jit
def _attended(q1, q2, k1, k2, v1, v2, seen, scale, most, total, sum1, sum2):
    """The largest score so far, the sum of weights and the weighted sums of both halves, with these positions too."""
    score = tl.dot(q1, k1.T, input_precision="ieee")
    score = scale * tl.dot(q2, k2.T, score, input_precision="ieee")
    score = tl.where(seen[None, :], score, float("-inf"))
    higher = tl.maximum(most, tl.max(score, 1)[:, None])
    weight, before = tl.exp(score - higher), tl.exp(most - higher)
    total = total * before + tl.sum(weight, 1)[:, None]
    sum1 = tl.dot(weight.to(v1.dtype), v1, sum1 * before, input_precision="ieee")
    sum2 = tl.dot(weight.to(v2.dtype), v2, sum2 * before, input_precision="ieee")
    return higher, total, sum1, sum2


@triton.jit
def _taken_in(
    key, v1, v2, keys, values, step, position, size, joined, cos, sin, one, ok, HALF: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    """The halves of a new key, at `key`, as attention sees it, and those of its value, all put into the cache."""
    dtype = keys.dtype.element_ty
    k1, k2 = _rotated(key, ok, cos, sin, HALF)
    k1, k2, v1, v2 = k1.to(dtype), k2.to(dtype), v1.to(dtype), v2.to(dtype)
    place = (position % size) * step + one
    if OFFSET:  # the slow halves are those of the token before, which lie there; the next token finds these
        slow, then = ok & (one >= HALF // 2), ((position + 1) % size) * step + one
        before1 = tl.load(keys + place, mask=slow, other=0.0)
        before2 = tl.load(keys + place + HALF, mask=slow, other=0.0)
        tl.store(keys + then, k1, mask=slow)
        tl.store(keys + then + HALF, k2, mask=slow)
        k1 = tl.where(slow, tl.where(joined, before1, 0.0), k1)
        k2 = tl.where(slow, tl.where(joined, before2, 0.0), k2)
    tl.store(keys + place, k1, mask=ok)
    tl.store(keys + place + HALF, k2, mask=ok)
    tl.store(values + place, v1, mask=ok)
    tl.store(values + place + HALF, v2, mask=ok)
    return k1, k2, v1, v2


@triton.jit
def _rotated(at, ok, cos, sin, HALF: tl.constexpr):
    """The halves of vectors at these addresses, rotated and normed, fp32."""
    first = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    a, b = first * cos + second * sin, second * cos - first * sin
    inverse = tl.rsqrt(tl.sum(a * a + b * b, 1)[:, None] / (2 * HALF) + EPS)
    return a * inverse, b * inverse


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float | None) -> Tensor:
    """nanochat.engine.sampling.sample_next_token where a cut of at most MOST_CUT is asked for: equal logits go by their
    number."""
    (rows, columns), early = logits.shape, _early(logits.device)
    parts, k = triton.cdiv(columns, PART), min(top_k, columns)
    kept = max(triton.next_power_of_2(k), 2)
    out = torch.empty(rows, dtype=torch.long, device=logits.device)
    best = torch.empty(rows, parts, kept, dtype=torch.long, device=logits.device)
    _narrow[rows, parts](logits, best, columns, KEPT=kept, EARLY=bool(early), BV=PART, num_warps=4, **early)
    _sample[rows,](
        best, uniform, out, parts * kept, 1 / temperature, k, 1.0 if top_p is None else top_p, KEPT=kept,
        EARLY=bool(early), BV=triton.next_power_of_2(parts * kept), num_warps=4, **early,
    )  # fmt: skip
    return out


@triton.jit
def _narrow(logits, best, columns, KEPT: tl.constexpr, EARLY: tl.constexpr, BV: tl.constexpr):
    """The largest logits of a part, the first first; each a number whose upper half has the order of the logits, and
    whose lower half falls as the token rises."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, part = tl.program_id(0), tl.program_id(1)
    i = part * BV + tl.arange(0, BV)
    bits = tl.load(logits + row.to(tl.int64) * columns + i, mask=i < columns, other=float("-inf")).to(
        tl.int32, bitcast=True
    )
    both = (_ordered(bits).to(tl.int64) << 32) | (0x7FFFFFFF - i)
    tl.store(best + (row * tl.num_programs(1) + part) * KEPT + tl.arange(0, KEPT), tl.topk(both, KEPT))


@triton.jit
def _ordered(bits):
    """Of the bits of numbers, integers that have the order of these; and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["count", "k"])
def _sample(best, uniform, out, count, inverse, k, p, KEPT: tl.constexpr, EARLY: tl.constexpr, BV: tl.constexpr):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, i, every = tl.program_id(0), tl.arange(0, KEPT), tl.arange(0, BV)
    both = tl.topk(tl.load(best + row * count + every, mask=every < count, other=-(2**63)), KEPT)
    z = _ordered((both >> 32).to(tl.int32)).to(tl.float32, bitcast=True) * inverse
    mass = tl.where(i < k, tl.exp(z - tl.max(z, 0)), 0.0)
    up_to, total = tl.cumsum(mass, 0), tl.sum(mass, 0)
    if p < 1:  # up to the token with which the sum reaches p
        last = tl.sum((up_to < p * total * (1 - 1e-7)).to(tl.int32), 0)
        total = tl.sum(tl.where(i <= last, mass, 0.0), 0)
    goal = tl.minimum(tl.load(uniform + row) * total, total * (1 - 3e-7))
    chosen = tl.minimum(tl.sum((up_to <= goal).to(tl.int32), 0), k - 1)
    tl.store(out + row, tl.sum(tl.where(i == chosen, 0x7FFFFFFF - (both & 0x7FFFFFFF), 0), 0))
