"""Values and gradients of the chains between products: what a GPU is given, against plain operations in float64."""

import pytest
import torch
from torch import Tensor

from nanochat.gpt import rotary_tables
from nanochat.kernels import pointwise

cos32, sin32 = rotary_tables(16, 8, torch.device("cpu"))
ANGLE = torch.atan2(sin32.double(), cos32.double())  # tables whose pairs have length 1 up to fp64
COS, SIN = ANGLE.cos(), ANGLE.sin()
PLAIN = {
    "norm": pointwise.norm,
    "rotate_norm": lambda x: pointwise.rotate_norm(x, COS, SIN),
    "relu_squared": pointwise.relu_squared,
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Have CPU tensors take the path of those on a GPU without Triton (with it: tests/kernels/test_device.py)."""
    monkeypatch.setattr(pointwise, "_learns_on_gpu", lambda x: True)
    monkeypatch.setattr(pointwise, "TRITON", False)


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(B, T, H, D) of sizes from tiny to large, a row of zeros among them; and a gradient."""
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 8, dtype=torch.float64) * 10.0 ** torch.randint(-6, 3, (2, 16, 3, 1))
    x[0, 0, 0] = 0
    return x.to(dtype), torch.randn(x.shape, dtype=torch.float64).to(dtype)


def reference(name: str, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64, by autograd of the formula."""
    x = x.double().requires_grad_()
    if name == "relu_squared":
        y = x.clamp(min=0) ** 2
    else:
        first, second = x.chunk(2, dim=-1)
        cos, sin = (COS, SIN) if name == "rotate_norm" else (1.0, 0.0)
        turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
        y = turned / (turned.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


def computed(function, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("name", PLAIN)
def test_values_and_gradients_are_those_of_the_formula(name, as_on_a_gpu):
    x, grad = drawn()
    for found, wanted in zip(computed(PLAIN[name], x, grad), reference(name, x, grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_in_bf16_they_are_no_further_off_than_plain_operations(name, on_gpu, monkeypatch):
    x, grad = drawn(torch.bfloat16)
    with monkeypatch.context() as without:
        without.setattr(pointwise, "_learns_in_bf16_on_cpu", lambda x: False)
        plain = computed(PLAIN[name], x, grad)
        without.setattr(pointwise, "_learns_on_gpu", lambda x: True)
        without.setattr(pointwise, "TRITON", False)
        on_a_gpu = computed(PLAIN[name], x, grad)
    ours = on_a_gpu if on_gpu else computed(PLAIN[name], x, grad)
    for found, other, wanted in zip(ours, plain, reference(name, x, grad), strict=True):
        assert found.dtype == torch.bfloat16
        error, before = ((found.double() - wanted).norm(), (other.double() - wanted).norm())
        assert error <= 1.25 * before and error <= 4e-3 * wanted.norm()


@pytest.mark.parametrize("name", PLAIN)
def test_only_the_output_is_kept(name, as_on_a_gpu):
    """No tensor of the size of what goes in: none but the output, which the product behind it keeps anyway."""
    kept: list[Tensor] = []
    x = drawn()[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = PLAIN[name](x)
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.data_ptr() for t in large] == [y.data_ptr()]


def test_they_compile_in_one_piece(as_on_a_gpu):
    def block(x: Tensor) -> Tensor:
        return pointwise.relu_squared(pointwise.norm(x)) + pointwise.rotate_norm(x, COS, SIN)

    x, grad = drawn(torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(computed(compiled, x, grad), computed(block, x, grad), strict=True):
        torch.testing.assert_close(found, wanted)
