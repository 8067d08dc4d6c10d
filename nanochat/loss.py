"""Hidden states -> cross-entropy, without ever holding all logits (as in arXiv 2410.10989).

At 65,536 tokens and a vocabulary of 32,768 the logits are 4.3 GB in bf16 and 8.6 GB in fp32, and their gradient as
much again. Here a chunk of rows at a time is computed, used and freed. When training, the gradients of hidden states
and head follow at once, so that no logits are computed twice.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.linear import EIGHT_BITS, Linear
from nanochat.runtime import IGNORE_INDEX, kernel

Reduction = Literal["mean", "sum", "none"]

# Up to this many logits in one piece. GPU: half a GiB in bf16 and as much for their gradient; the matmul is long
# saturated. CPU: what stays in the caches; at 2**22 the loss takes 1.5 times as long, in one piece far longer.
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**20}
# Up to this many the plain path is as quick, and shows lm_head's output to forward hooks in one piece.
PLAIN_LOGITS = 2**22
MOST_CAP = 60.0  # exp(60) times any vocabulary is still a number in fp32


class Head(Linear):
    """The output projection: hidden states to logits, or straight to their loss. Only these two methods touch its
    weight: elsewhere it may be sharded over ranks."""

    def summed_loss(self, hidden: Tensor, targets: Tensor, weights: Tensor, cap: float, scale: float) -> Tensor:
        """Summed cross-entropy of scaled and softcapped logits, with gradients. A method of its own, so that FSDP2
        can gather the weight here as it does before forward()."""
        return fused_head_loss(hidden, self.weight, targets, weights, cap, scale, fp8=self.fp8 and self.training)


def softcap(logits: Tensor, cap: float, scale: float = 1.0) -> Tensor:
    """cap * tanh(scale * logits / cap): smooth, and never beyond ±cap. One pass over the logits, scaled or not."""
    share = logits / (cap / scale)
    return cap * torch.tanh(share) if torch.is_grad_enabled() else share.tanh_().mul_(cap)


def head_loss(
    hidden: Tensor,
    lm_head: Head,
    targets: Tensor,
    cap: float,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Cross-entropy in nats of softcapped logits `scale * lm_head(hidden)` against `targets`.

    hidden (N, C), targets (N,) int64, IGNORE_INDEX where there is no loss, weights (N,) fp32 factors of the losses (1).
    Returns (N,) fp32 for "none" (0 where ignored), else a scalar; "mean" is over the targets that count, whatever they
    weigh, and 0 rather than NaN where there are none.
    """
    counted = targets != IGNORE_INDEX
    weights = counted.float() if weights is None else weights * counted
    size = hidden.size(0) * lm_head.out_features
    if size <= PLAIN_LOGITS or (reduction == "none" and torch.is_grad_enabled()):
        losses = _row_losses(hidden, lm_head, targets, cap, scale) * weights
        total = losses if reduction == "none" else losses.sum()
    elif torch.is_grad_enabled():
        total = lm_head.summed_loss(hidden, targets, weights, cap, scale)
    else:
        chunks = _chunk_rows(lm_head.out_features, hidden.device)
        pieces = zip(hidden.split(chunks), targets.split(chunks), strict=True)
        losses = torch.cat([_row_losses(h, lm_head, t, cap, scale) for h, t in pieces]) * weights
        total = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        return total / counted.sum().clamp(min=1)
    return total


def fused_head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, cap: float, scale: float = 1.0, fp8: bool = False
) -> Tensor:
    """Summed loss of hidden (N, C) against targets (N,), each times its weight (N,), by the head's weight (V, C). fp8:
    with 8-bit matmuls (nanochat.kernels.fp8), forward and backward."""
    total, _, _ = _fused_head_loss(hidden, weight, targets, weights, cap, scale, fp8)
    return total


def _row_losses(hidden: Tensor, lm_head: Head, targets: Tensor, cap: float, scale: float) -> Tensor:
    logits = softcap(lm_head(hidden).float(), cap, scale)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


def _chunk_rows(vocab_size: int, device: torch.device) -> int:
    return max(128, CHUNK_LOGITS.get(device.type, 2**26) // vocab_size)


@torch.library.custom_op("nanochat::head_loss", mutates_args=())
def _fused_head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor, cap: float, scale: float, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss, d loss/d hidden, d loss/d weight). One opaque operator, so that the compiler cannot decide to
    keep the logits for the backward pass, which is what this file is there to avoid."""
    rows = _chunk_rows(weight.size(0), weight.device)
    if fp8:
        in_8_bits: tuple[Tensor, Tensor, Tensor] = EIGHT_BITS["head_loss"](
            hidden, weight, targets, loss_weights, cap, scale, rows, raw_gradient
        )
        return in_8_bits
    head = weight.to(hidden.dtype)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # summed over many chunks
    gradient = kernel(_chunk_gradient, True) if hidden.is_cuda else _chunk_gradient_in_place
    for start in range(0, hidden.size(0), rows):
        piece = slice(start, start + rows)
        loss, grad_logits = gradient(hidden[piece] @ head.T, targets[piece], loss_weights[piece], cap, scale)
        total += loss
        torch.mm(grad_logits, head, out=grad_hidden[piece])
        _add_product(grad_weight, grad_logits.T, hidden[piece])
    return total, grad_hidden, grad_weight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (P, R), fp32, plus a (P, Q) @ b (Q, R), in place. On GPUs the product of bf16 is added up in fp32 and never
    rounded, in one kernel: 0.58 ms for 0.70 (H100, gradient of a head of 50,304 x 768 from 5,336 rows)."""
    if total.is_cuda and a.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total += a @ b


@_fused_head_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor, cap: float, scale: float, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden),
        torch.empty_like(weight, dtype=torch.float32),
    )


def _save_gradients(ctx, inputs, output) -> None:
    _, grad_hidden, grad_weight = output
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.weight_dtype = inputs[1].dtype


def _scale_gradients(ctx, grad_total: Tensor, *_unused: Tensor):
    grad_hidden, grad_weight = ctx.saved_tensors
    grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
    return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight, None, None, None, None, None


_fused_head_loss.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _chunk_gradient(
    logits: Tensor, targets: Tensor, loss_weights: Tensor, cap: float, scale: float
) -> tuple[Tensor, Tensor]:
    loss, grad = raw_gradient(logits, targets, loss_weights, cap, scale)
    return loss, grad.to(logits.dtype)


def raw_gradient(
    logits: Tensor, targets: Tensor, loss_weights: Tensor, cap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Summed loss of one chunk and its gradient with respect to the raw logits (n, V), fp32."""
    capped = softcap(logits.float(), cap, scale)
    # capped logits need not have their largest taken out first: a pass less, 0.72 ms for 0.97 (H100, 5,336 x 50,304)
    assert cap <= MOST_CAP
    log_normaliser = capped.exp().sum(dim=1, keepdim=True).log()
    weights = loss_weights.unsqueeze(1)  # 0 where there is no target
    index = targets.clamp(min=0).unsqueeze(1)
    loss = ((log_normaliser - capped.gather(1, index)) * weights).sum()
    is_target = torch.arange(logits.size(1), device=logits.device).unsqueeze(0) == index
    grad_capped = torch.exp(capped - log_normaliser) - is_target.float()
    grad = grad_capped * (1 - (capped / cap) ** 2) * (weights * scale)  # d softcap / d logit = 1 - tanh²
    return loss, grad


def _chunk_gradient_in_place(
    logits: Tensor, targets: Tensor, loss_weights: Tensor, cap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """_chunk_gradient up to rounding, for CPUs, where nothing joins its passes: few, in place, and tanh by way of the
    sigmoid, which takes a sixth of the time. The loss of a training step and its gradients: 72 ms for 118 (4,096 x
    2,048 logits from 128 channels in bf16, one core; 36 of them are matmuls). Overwrites logits in fp32."""
    assert cap <= MOST_CAP
    weights, index = loss_weights.unsqueeze(1) * scale, targets.clamp(min=0).unsqueeze(1)
    tanh = logits.float().mul_(2 * scale / cap).sigmoid_().mul_(2).sub_(1)
    grad = (tanh * cap).exp_()
    normaliser = grad.sum(dim=1, keepdim=True)
    losses = (normaliser.log() - cap * tanh.gather(1, index)).squeeze(1)
    grad.mul_(weights / normaliser).scatter_add_(1, index, -weights)
    return (losses * loss_weights).sum(), grad.addcmul_(grad, tanh.square_(), value=-1).to(logits.dtype)
