"""Largest singular values of many matrices at once, with a proof of how far off they can be.

Power iteration needs hundreds of products where the spectrum is flat, and Muon keeps it flat. Here the Gram matrix of
each is squared k times, so that the power 2^k costs k matrix products, which GPUs are good at; matrices of one shape
go together, and nothing is read back to the host.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.optim.update_rules import exchange_dtype
from nanochat.runtime import kernel

SQUARINGS = 7
APPLICATIONS = 3  # of G^(2^k) to the start vector: powers for the price of a product with one column
# With trace √m, the largest eigenvalue of a Gram matrix (m, m) lies between 1/√m and √m: four squarings later at
# most 2e31 for m = 8192, where bf16 and fp32 end at 3e38. So not each product needs another pass over memory.
SQUARINGS_PER_SCALE = 4
STACK_ELEMENTS = 2**27  # of the matrices treated at a time: bounds the memory
SMALL = 256  # short sides below it cost little in fp32, and leave bf16's errors too few entries to average out
TINY = 1e-30
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # by which, at most, σ₁ may lie outside the bounds


class Stack(NamedTuple):
    """Matrices of one shape."""

    indices: list[int]  # where each was in the list
    values: Tensor  # (K, m, n) fp32


def stacks(matrices: list[Tensor]) -> Iterator[Stack]:
    """The matrices by shape, in the order in which shapes first occur, at most STACK_ELEMENTS at a time. Copies."""
    groups: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(index)
    for shape, indices in groups.items():
        each = max(1, STACK_ELEMENTS // shape.numel())
        for first in range(0, len(indices), each):
            chunk = indices[first : first + each]
            yield Stack(chunk, torch.stack([matrices[i].float() for i in chunk]))


def _in_order(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    """Bounds (K, 2) of several groups of matrices, with their indices, as the list had the matrices."""
    found: dict[int, Tensor] = {}
    for indices, numbers in parts:
        found.update(zip(indices, numbers.unbind(0), strict=True))
    return torch.stack([found[index] for index in range(len(found))]) if found else torch.zeros(0, 2)


def spectral_norms(matrices: list[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(lower, upper), each (len(matrices),) fp32 in the order given: as `stacked_norms`, for matrices of any shapes."""
    return stacked_norms(list(stacks(matrices)), dtype)


@torch.no_grad()
def stacked_norms(stacked: list[Stack], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(lower, upper), each (N,) fp32 by index, for the N matrices of some stacks: bounds of the largest singular value
    σ₁ of each. Take `lower` as the value. dtype: of the squarings; default bf16 on GPUs where the short side is 256 or
    more, fp32 elsewhere. Singular values must lie between 1e-15 and 1e+17 (their squares must be numbers); zero
    matrices give 0.

    G = WWᵀ, on the short side, is squared k = 7 times. A column of the result, which three products with it polish to
    x, gives ‖Wᵀx‖/‖x‖ ≤ σ₁ ≤ ‖G^(2^k)‖_F^(1/2^(k+1)) ≤ σ₁ · r^(1/2^(k+2)). The last factor is 1.0131 at rank r = 768,
    and is reached where all singular values are equal. Rounding: the lower bound is made of two fp32 norms and an fp32
    product, and holds to 1e-6 (with TF32, as compute_init allows it, to 5e-4 at worst). The upper one has fallen 2e-6
    below σ₁ in fp32, 2e-5 with bf16 on dense matrices, where errors average out. Where they do not (few entries, a
    diagonal), bf16 can take 0.4 % off, or take one singular value for another up to 0.4 % above it; the upper bound is
    never given below the lower one. `ROUNDING` covers all this but TF32.

    Worst error of the value against fp64 SVD 0.06 %, reached on spectra that are flat within 20 % (on an H100 with its
    TF32 0.072 %); estimates from polar factors are up to 33 % off, see benchmarks.monitor.
    """
    found: list[tuple[list[int], Tensor]] = []
    for group in _by_short_side(stacked):
        wide = [values if values.size(1) <= values.size(2) else values.mT for _, values in group]
        short = wide[0].size(1)
        of_group = dtype or (exchange_dtype(wide[0].device) if short >= SMALL else torch.float32)
        bounds = torch.stack(kernel(_bounds, wide[0].is_cuda)(wide, of_group), dim=1)
        found.append(([index for indices, _ in group for index in indices], bounds))
    lower, upper = _in_order(found).unbind(1)
    return lower, upper


def _by_short_side(stacked: list[Stack]) -> list[list[Stack]]:
    """Stacks whose Gram matrices have one size and so can be squared together: on a GPU fewer and larger products, and
    fewer launches. Bounds the memory as STACK_ELEMENTS does."""
    groups: dict[int, list[list[Stack]]] = {}
    for stack in stacked:
        short = min(stack.values.shape[1:])
        last = groups.setdefault(short, [[]])[-1]
        if last and (sum(one.values.size(0) for one in last) + stack.values.size(0)) * short**2 > STACK_ELEMENTS:
            groups[short].append([stack])
        else:
            last.append(stack)
    return [group for of_short in groups.values() for group in of_short]


def _norms(stacked: Tensor) -> Tensor:
    """Frobenius norms (K, 1, 1) of (K, m, n), summed in fp32."""
    return torch.linalg.vector_norm(stacked, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def _power_of_two(norms: Tensor) -> Tensor:
    """What to multiply with for a norm of 1/2 to 1. Any other number would be off by up to 0.2 % in bf16."""
    return torch.exp2(-norms.clamp(min=TINY).log2().ceil())


def _scaled(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """(matrices of norm 1/2 to 1, the logarithm of what they were divided by); zero stays zero, with -inf."""
    norms = _norms(stacked)
    factor = _power_of_two(norms)
    return stacked * factor.to(stacked.dtype), torch.where(norms > 0, -factor.log(), -torch.inf)


def _factor(P: Tensor) -> tuple[Tensor, Tensor]:
    """(power of two (K, 1, 1) that takes P (K, m, m) to a trace of about √m, minus its logarithm). Of positive
    semidefinite matrices only the diagonal is looked at, which costs nothing; -inf for zero."""
    trace = P.diagonal(dim1=-2, dim2=-1).float().sum(-1)[:, None, None]
    factor = _power_of_two(trace / math.sqrt(P.size(-1)))
    return factor.to(P.dtype), torch.where(trace > 0, -factor.log(), -torch.inf)


def _bounds(wide: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bounds for matrices (K, m, n), each n >= m."""
    P = torch.cat([A @ A.mT for A in (W.to(dtype) for W in wide)])
    log = torch.zeros((), device=P.device)  # of what G^(2^j) has been divided by, over 2^j
    for j in range(SQUARINGS):
        if j % SQUARINGS_PER_SCALE == 0:
            factor, step = _factor(P)
            P, log = P * factor, log + step / 2**j
        P = P @ P
    factor, step = _factor(P)
    upper = ((log + (step + _norms(P * factor).log()) / 2**SQUARINGS) / 2).exp()
    # Each column of P is P times a unit vector; that of the largest entry of the diagonal has a share in the top
    # eigenvector, which a fixed start need not have.
    best = P.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    x = P.take_along_dim(best[:, None, None].expand(-1, P.size(-2), 1), dim=-1) * factor
    for _ in range(APPLICATIONS):  # each changes the norm of x by a factor of √m at most
        x = P @ x * factor
    parts = _scaled(x)[0].float().split([W.size(0) for W in wide])
    lower = torch.cat([_norms(W.mT @ x) / _norms(x).clamp(min=TINY) for W, x in zip(wide, parts, strict=True)])
    # Where bf16 has pushed the upper bound down, the lower one, in fp32, is the better upper bound.
    return lower.flatten(), torch.maximum(lower, upper).flatten()
