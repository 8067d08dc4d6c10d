"""Our GPU kernels against plain operations in float64; where there is no GPU, through Triton's interpreter (in fp16
where a GPU has bf16, which the interpreter does not multiply), in a process that has it from the start."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from nanochat.gpt import rotary_tables
from nanochat.kernels import device as kernels
from nanochat.kernels import fp8_device
from nanochat.kernels.fp8 import E4M3, E5M2, quantize, transposed
from nanochat.kernels.mlp import FusedMLP, has_fused_mlp, weight_gradient
from nanochat.kernels.pointwise import EPSILON, norm, rotate

GPU, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float16
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a GPU or the interpreter")
hopper = pytest.mark.skipif(GPU and not has_fused_mlp(DEVICE, torch.bfloat16), reason="needs a Hopper GPU")


def drawn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(DEVICE, dtype)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.isfinite().all()
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@runs
@pytest.mark.parametrize(("heads", "dim", "length"), [(3, 16, 24), (5, 128, 7)])
def test_queries_are_turned_and_normed(heads, dim, length):
    x, grad = drawn(2, length, heads, dim, scale=3.0), drawn(2, length, heads, dim)
    cos, sin = (table.double() for table in rotary_tables(length, dim, DEVICE))
    wide = x.double().requires_grad_()
    wanted = norm(torch.cat([wide[..., : dim // 2] * cos + wide[..., dim // 2 :] * sin,
                             wide[..., dim // 2 :] * cos - wide[..., : dim // 2] * sin], dim=-1))  # fmt: skip
    (wanted_grad,) = torch.autograd.grad(wanted, wide, grad.double())
    tables = [table[0, :, 0].float().contiguous() for table in (cos, sin)]
    y, factor = kernels.rotate_norm(x, *tables, EPSILON)
    found_grad = kernels.rotate_norm_grad(grad, y, factor, *tables)
    assert relative(y, wanted.detach()) < 1e-6 and relative(found_grad, wanted_grad) < 1e-6
    assert relative(y, norm(rotate(x, cos.float(), sin.float()))) < 1e-6


@runs
@hopper
@pytest.mark.parametrize("rows", [200, 256])
def test_the_mlp_and_its_gradients(rows):
    """Sizes that tiles do not divide, too."""
    x, grad = drawn(rows, 96, dtype=HALF), drawn(rows, 96, dtype=HALF)
    up, down = drawn(384, 96, dtype=HALF, scale=0.1), drawn(96, 384, dtype=HALF, scale=0.1)

    def gradients(function, *tensors):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*tensors)
        return y.detach(), *torch.autograd.grad(y, tensors, grad.to(y.dtype))

    plain = lambda x, up, down: (x @ up.T).relu().square() @ down.T  # noqa: E731
    wanted = gradients(plain, *(tensor.double() for tensor in (x, up, down)))
    before = gradients(plain, x, up, down)
    for found, other, right in zip(gradients(FusedMLP.apply, x, up, down), before, wanted, strict=True):
        assert relative(found, right) < 1.1 * relative(other, right) + 1e-4


@runs
@hopper
@pytest.mark.parametrize("shape", [(2, 256, 128), (2, 128, 384), (1, 384, 256)])
def test_half_of_a_symmetric_product(shape):
    x, tall = drawn(*shape, dtype=torch.float16, scale=0.1), shape[1] > shape[2]
    gram = kernels.symmetric_product(x, x, None, 1.0, 0.0, 0.0, tall)
    wide = x.double().mT if tall else x.double()
    assert relative(gram, wide @ wide.mT) < 5e-4 and torch.equal(gram, gram.mT)
    found, wide = kernels.symmetric_product(gram, gram, gram, 0.3, -0.7, 2.5, False), gram.double()
    one = torch.eye(gram.size(-1), dtype=torch.float64, device=DEVICE)
    assert relative(found, 0.3 * wide @ wide - 0.7 * wide + 2.5 * one) < 5e-4 and torch.equal(found, found.mT)


@runs
@pytest.mark.parametrize(("kind", "dtype"), [(0, E4M3), (0, E5M2), (1, E4M3), (2, E5M2)])
@pytest.mark.parametrize("rows", [21, 160])
def test_rounding_to_8_bits(kind, dtype, rows):
    x, h = drawn(rows, 144, dtype=HALF, scale=3.0), drawn(rows, 144, dtype=HALF)
    plain = (x.float(), x.float().relu().square(), x.float() * 2 * h.float().relu())[kind]
    wanted = quantize(plain, dtype)
    largest, padded = plain.abs().amax(), -(-rows // 16) * 16
    values, columns, scale = fp8_device.to_fp8(x, largest, h if kind == 2 else None, kind, dtype, padded)
    torch.testing.assert_close(scale, wanted.scale)
    found, right = values.float(), wanted.values.float()
    differ = found != right
    if INTERPRETED:  # it does not carry to the exponent, and knows no numbers below the normal ones
        differ &= (2 * found != right) & (right.abs() >= torch.finfo(dtype).smallest_normal)
    # where the quotient differs in its last bit, what lies between two numbers may become either
    assert differ.float().mean() < 1e-3 and ((found - right).abs() <= 0.26 * right.abs())[differ].all()
    assert columns.shape == transposed(wanted).values.shape and (columns[:, rows:].float() == 0).all()
    assert torch.equal(columns[:, :rows].float(), values.float().T)
    x[3, 5] = float("nan")
    assert INTERPRETED or fp8_device.to_fp8(x, largest, None, 0, dtype, rows)[0].float()[3, 5].isnan()  # knows none


@pytest.mark.parametrize(("rows", "columns"), [(768, 3072), (1280, 5120), (5120, 1280), (1664, 6656), (1000, 7000)])
def test_the_gradient_of_a_weight_in_pieces(rows, columns):
    grad, x = drawn(8, rows), drawn(8, columns)
    torch.testing.assert_close(weight_gradient(grad, x), grad.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above run here")
def test_all_of_this_through_the_interpreter():
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(program, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "20 passed" in done.stdout, done.stdout[-3000:]
