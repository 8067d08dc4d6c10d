"""GPU kernels in Triton, for what torch.compile makes measurably slower (docs/speed.md). Imported where one is
launched: everything else works without Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# ---- queries and keys: turned, then normed


@triton.jit
def _rows_and_angles(cos, sin, rows, heads, length, HALF: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows, which of them exist, cos and sin of what each is turned by (ROWS, HALF)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    angle = ((row // heads) % length)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return row, row < rows, tl.load(cos + angle), tl.load(sin + angle)


@triton.jit
def _load_halves(x, row, mask, HALF: tl.constexpr):
    """Both halves of so many rows of 2 x HALF, fp32."""
    place = row[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    first = tl.load(x + place, mask=mask[:, None], other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=mask[:, None], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(x, row, mask, first, second, HALF: tl.constexpr):
    place = row[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    tl.store(x + place, first.to(x.dtype.element_ty), mask=mask[:, None])
    tl.store(x + place + HALF, second.to(x.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _rotate_norm(x, cos, sin, y, factor, rows, heads, length, EPSILON: tl.constexpr, HALF: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    row, mask, c, s = _rows_and_angles(cos, sin, rows, heads, length, HALF, ROWS)
    first, second = _load_halves(x, row, mask, HALF)
    scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + EPSILON)
    one, two = (first * c + second * s) * scale[:, None], (second * c - first * s) * scale[:, None]
    _store_halves(y, row, mask, one, two, HALF)
    tl.store(factor + row, scale, mask=mask)


@triton.jit
def _rotate_norm_grad(grad, y, factor, cos, sin, grad_x, rows, heads, length, HALF: tl.constexpr, ROWS: tl.constexpr):
    row, mask, c, s = _rows_and_angles(cos, sin, rows, heads, length, HALF, ROWS)
    y1, y2 = _load_halves(y, row, mask, HALF)
    g1, g2 = _load_halves(grad, row, mask, HALF)
    along = (tl.sum(g1 * y1 + g2 * y2, 1) / (2 * HALF))[:, None]
    scale = tl.load(factor + row, mask=mask, other=0.0)[:, None]
    g1, g2 = (g1 - y1 * along) * scale, (g2 - y2 * along) * scale
    _store_halves(grad_x, row, mask, g1 * c - g2 * s, g2 * c + g1 * s, HALF)


ROWS = 32  # of one head each, in a program


def rotate_norm(x: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(x (B, T, H, D) turned by cos and sin (T, D/2) and normed; the factors of its rows (B, T, H), fp32)."""
    B, T, H, D = x.shape
    y, factor = torch.empty_like(x), x.new_empty((B, T, H), dtype=torch.float32)
    rows = B * T * H
    _rotate_norm[(triton.cdiv(rows, ROWS),)](x, cos, sin, y, factor, rows, H, T, epsilon, D // 2, ROWS)
    return y, factor


def rotate_norm_grad(grad: Tensor, y: Tensor, factor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """d/dx of it, from the gradient (B, T, H, D) and what rotate_norm gave."""
    B, T, H, D = y.shape
    grad_x = torch.empty_like(y)
    rows = B * T * H
    _rotate_norm_grad[(triton.cdiv(rows, ROWS),)](grad, y, factor, cos, sin, grad_x, rows, H, T, D // 2, ROWS)
    return grad_x


# ---- products with what is next to them


@triton.jit
def _product(a, b, c, extra, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
             PROGRAMS: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """relu(a @ b.T)² into c; BACKWARD: (a @ b) * 2 sqrt(extra). Persistent: each program takes every PROGRAMS-th tile,
    in groups of GROUP rows of tiles, which share what they read in the second-level cache."""
    rows, columns, steps = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, BK)
    width = GROUP * columns
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS, flatten=True):
        first = tile // width * GROUP
        size = min(rows - first, GROUP)
        m, n = (first + tile % size) * BM, (tile % width) // size * BN
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(steps):
            left = a.load([m, k * BK])
            if BACKWARD:  # noqa: SIM108 - only one of them is compiled
                right = b.load([k * BK, n])
            else:
                right = b.load([n, k * BK]).T
            total = tl.dot(left, right, total)
        # in two halves: the tile on its way out then takes half the shared memory
        one, two = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        if BACKWARD:
            one = one * (2.0 * tl.sqrt(extra.load([m, n]).to(tl.float32)))
            c.store([m, n], one.to(c.dtype))
            two = two * (2.0 * tl.sqrt(extra.load([m, n + BN // 2]).to(tl.float32)))
        else:
            one, two = tl.maximum(one, 0.0), tl.maximum(two, 0.0)
            one, two = one * one, two * two
            c.store([m, n], one.to(c.dtype))
        c.store([m, n + BN // 2], two.to(c.dtype))


TILE = 128, 256, 64  # on an H200 1.13 ms for 65,536 x 1,280 -> 5,120; the others tried took 1.23 to 1.40


def relu_squared_product(x: Tensor, weight: Tensor, squares: Tensor | None, programs: int) -> Tensor:
    """relu(x (N, K) @ weight (M, K).T)², (N, M); with `squares` (x @ weight.T) * 2 sqrt(squares), weight laid out along
    M. programs: multiprocessors of the GPU."""
    (M, K), (BM, BN, BK), columns, backward = x.shape, TILE, weight.size(0), squares is not None
    c = x.new_empty((M, columns))
    describe: Any = TensorDescriptor.from_tensor
    programs = min(triton.cdiv(M, BM) * triton.cdiv(columns, BN), programs)
    _product[(programs,)](
        describe(x, [BM, BK]),
        describe(weight.T.contiguous(), [BK, BN]) if backward else describe(weight.contiguous(), [BN, BK]),
        describe(c, [BM, BN // 2]),
        describe(c if squares is None else squares, [BM, BN // 2]),
        M, columns, K, BM, BN, BK, 8, programs, backward, num_warps=8, num_stages=3,
    )  # fmt: skip
    return c


# ---- products that are symmetric


@triton.jit
def _symmetric(a, b, c, extra, N, times, plus, diagonal, DEPTH: tl.constexpr, TALL: tl.constexpr, EXTRA: tl.constexpr,
               B: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One tile, on or below the diagonal, of times * a @ b.T (TALL: a.T @ b) + plus * extra + diagonal * 1, for one of
    a stack of matrices below each other; written to its mirror image, too."""
    t, matrix = tl.program_id(0), tl.program_id(1)
    row = ((tl.sqrt(8.0 * t + 1.5) - 1.0) * 0.5).to(tl.int32)
    column = t - row * (row + 1) // 2
    m, n, top = row * B, column * B, matrix * N
    sums = tl.zeros((B, B), dtype=tl.float32)
    for k in range(0, DEPTH, BK):
        if TALL:
            left, right = a.load([matrix * DEPTH + k, m]).T, b.load([matrix * DEPTH + k, n])
        else:
            left, right = a.load([top + m, k]), b.load([top + n, k]).T
        sums = tl.dot(left, right, sums)
    sums *= times
    if EXTRA:
        sums += plus * extra.load([top + m, n]).to(tl.float32)
        same = (m + tl.arange(0, B))[:, None] == (n + tl.arange(0, B))[None, :]
        sums = tl.where(same, sums + diagonal, sums)
    out = sums.to(c.dtype)
    c.store([top + m, n], out)
    if row != column:
        c.store([top + n, m], out.T)


SIDE, DEEP = 128, 64  # of a tile of the result; of what is multiplied at a time


def symmetric_product(
    a: Tensor, b: Tensor, extra: Tensor | None, times: float, plus: float, diagonal: float, tall: bool
) -> Tensor:
    """times * a @ b.mT + plus * extra + diagonal * 1, (K, s, s); tall: a.mT @ b. Sizes are multiples of SIDE."""
    K, m, n = a.shape
    side, depth = (n, m) if tall else (m, n)
    c, describe = a.new_empty((K, side, side)), TensorDescriptor.from_tensor
    block: Any = [DEEP, SIDE] if tall else [SIDE, DEEP]
    flat = [describe(x.flatten(0, 1), block) for x in (a, b)]
    tiles: Any = [describe(x.flatten(0, 1), [SIDE, SIDE]) for x in (c, c if extra is None else extra)]
    blocks = side // SIDE
    sizes = depth, tall, extra is not None, SIDE, DEEP
    _symmetric[(blocks * (blocks + 1) // 2, K)](
        *flat, *tiles, side, times, plus, diagonal, *sizes, num_warps=8, num_stages=3
    )
    return c
