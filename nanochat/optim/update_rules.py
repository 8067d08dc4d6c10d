"""The arithmetic of Muon and AdamW on stacked tensors; nothing here knows of ranks.

Scalars are 0-D tensors, so that a new value recompiles nothing. Where `ok` (0-D bool) is false, weights and state stay.
"""

from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.symmetric import symmetric_product

# Polar Express, arXiv 2505.16932: polynomials that push all singular values in (0, 1] to 1, each the best for the
# interval that its predecessor left; computed for 5 iterations from l = 1e-3, with a safety factor of 1.02 for bf16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def exchange_dtype(device: torch.device) -> torch.dtype:
    """In what matrices are orthogonalised and sent: bf16 on GPUs, fp32 elsewhere (CPUs gain nothing by bf16)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(G: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrices to G (K, m, n), roughly: singular values end near 1."""
    if G.is_cuda:
        return orthogonalize_by_products(G, steps)
    X = G.to(exchange_dtype(G.device))
    wide = G.size(-2) <= G.size(-1)
    if not wide:
        X = X.mT  # the Gram matrix is taken on the short side
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X if wide else X.mT


def orthogonalize_by_products(G: Tensor, steps: int) -> Tensor:
    """The same in few large products, most of them symmetric. What multiplies X is found from its Gram matrix alone: at
    each iteration, or for long matrices of several, where all of X then takes part in four products in place of ten. In
    one go the small singular values would be lost, and in bf16 in two: fp16 has the range, for X is normed."""
    tall = G.size(-2) > G.size(-1)
    norm = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    X = (G / (norm * 1.02 + 1e-6)).to(torch.float16 if G.is_cuda else G.dtype)
    polynomials = POLAR_EXPRESS[:steps]
    several = max(G.shape[-2:]) >= 2 * min(G.shape[-2:])
    for together in (polynomials[:2], polynomials[2:]) if several else [[one] for one in polynomials]:
        factor: Any = None
        by: Any = None
        for a, b, c in together:
            if by is None:
                gram = symmetric_product(X, X, tall=tall)
            else:  # what that is after the last iteration
                gram = symmetric_product(symmetric_product(by, gram), by)
            by = symmetric_product(gram, gram, gram, c, b, a)
            factor = by if factor is None else symmetric_product(by, factor)
        if factor is not None:
            X = X @ factor if tall else factor @ X
    return X


def _set_where(ok: Tensor, old: Tensor, new: Tensor) -> None:
    """old <- new where ok (0-D bool); else every bit of it stays, whatever `new` holds."""
    old.copy_(torch.where(ok, new, old))


def nesterov(
    momentum_buffer: Tensor, grads: Tensor, factor: Tensor | None, momentum: Tensor, first: int, stop: int, ok: Tensor
) -> Tensor:
    """Update the momentum (K, m, n), fp32, in place, by the gradients times `factor` (clipping); what matrices
    first:stop would step along, to be sent."""
    grads = grads if factor is None else grads * factor
    _set_where(ok, momentum_buffer, momentum_buffer.lerp(grads, 1 - momentum))
    direction = grads[first:stop].lerp(momentum_buffer[first:stop], momentum)
    return direction.to(exchange_dtype(grads.device))


def muon_direction(direction: Tensor, second_moment: Tensor, beta2: Tensor, ns_steps: int, ok: Tensor) -> Tensor:
    """What unsharded matrices (K, m, n) step along, fp32: orthogonalised, then normalised by NorMuon (arXiv
    2510.05491): each row (column, if there are more of those) is divided by the running RMS of its entries,
    second_moment (K, m, 1) or (K, 1, n), and the matrix rescaled to its old norm, so that no neuron's update dwarfs
    the others'."""
    direction = orthogonalize(direction, ns_steps).float()
    reduce_dim = -1 if direction.size(-2) >= direction.size(-1) else -2
    mean_square = direction.square().mean(dim=reduce_dim, keepdim=True)
    _set_where(ok, second_moment, second_moment.lerp(mean_square, 1 - beta2))
    factor = second_moment.clamp(min=1e-10).rsqrt()
    if direction.is_cuda:  # both norms from those of the rows, so that all of it is not read again
        before, after = (x.sum(dim=(-2, -1), keepdim=True).sqrt() for x in (mean_square, mean_square * factor.square()))
        return direction * (factor * (before / after.clamp(min=1e-10)))
    before = direction.norm(dim=(-2, -1), keepdim=True)
    direction = direction * factor
    return direction * (before / direction.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


def muon_apply(
    params: Tensor, direction: Tensor, lr: Tensor, weight_decay: Tensor, aspect_scale: float, ok: Tensor
) -> None:
    """Step params (K, rows, n) in place by lr · aspect_scale along `direction`, where aspect_scale = √max(1, m/n) of
    the unsharded matrix. Decay acts only where it agrees with the step ("cautious", modded-nanogpt)."""
    decay = weight_decay * params * (direction * params >= 0)
    _set_where(ok, params, params - (lr * aspect_scale * direction.float() + lr * decay))


def muon_update(
    params: Tensor, direction: Tensor, second_moment: Tensor, beta2: Tensor, ns_steps: int, lr: Tensor,
    weight_decay: Tensor, aspect_scale: float, ok: Tensor,
) -> None:  # fmt: skip
    """Both, for matrices that one rank has in full: compiled as one, the direction is never written in fp32."""
    direction = muon_direction(direction, second_moment, beta2, ns_steps, ok)
    muon_apply(params, direction, lr, weight_decay, aspect_scale, ok)


def adamw_update(
    params: Tensor, grads: Tensor, factor: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor,
    beta1: Tensor, beta2: Tensor, eps: Tensor, weight_decay: Tensor, ok: Tensor,
) -> None:  # fmt: skip
    """One AdamW step in place (arXiv 1711.05101) by the gradients times `factor` (clipping), bias-corrected, fp32."""
    grads = grads if factor is None else grads * factor
    _set_where(ok, exp_avg, exp_avg.lerp(grads, 1 - beta1))
    _set_where(ok, exp_avg_sq, exp_avg_sq.lerp(grads.square(), 1 - beta2))
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    decayed = params * (1 - lr * weight_decay)
    _set_where(ok, params, decayed - lr / (1 - beta1**step) * exp_avg / denominator)
