import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.train.spectral import ROUNDING, spectral_norms

FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(96, 96), (64, 256), (256, 64), (1, 50), (50, 1), (3, 7)]


def orthogonal(m, n):
    """(m, n) with orthonormal columns, m >= n."""
    return torch.linalg.qr(torch.randn(m, n))[0]


def with_spectrum(m, n, values):
    return (orthogonal(m, len(values)) * values) @ orthogonal(n, len(values)).T


def make(kind, m, n):
    rank = min(m, n)
    index = torch.arange(1.0, rank + 1)
    if kind == "gaussian":
        return torch.randn(m, n)
    if kind == "power law":
        return with_spectrum(m, n, index**-0.3)
    if kind == "flat":
        return with_spectrum(m, n, 0.8 + 0.4 * torch.rand(rank))
    if kind == "equal":
        return with_spectrum(m, n, torch.ones(rank))
    noise = torch.randn(m, n)
    return noise + 1.3 * torch.linalg.matrix_norm(noise, 2) * with_spectrum(m, n, torch.ones(1))


def true_norms(matrices):
    return torch.stack([torch.linalg.svdvals(matrix.double())[0] for matrix in matrices])


KINDS = ["gaussian", "power law", "flat", "equal", "spike"]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_within_a_quarter_of_a_per_cent_and_the_bounds_hold(kind, dtype):
    matrices = [make(kind, *shape) for shape in SHAPES for _ in range(2)]
    lower, upper = spectral_norms(matrices, dtype=dtype)
    true = true_norms(matrices)
    assert ((lower / true - 1).abs() <= 2.5e-3).all(), lower / true
    assert (lower <= true * (1 + 1e-6)).all()
    assert (upper >= true * (1 - ROUNDING[dtype])).all(), upper / true
    ranks = torch.tensor([float(min(matrix.shape)) for matrix in matrices])
    assert (upper <= true * ranks ** (1 / 2**9) * (1 + ROUNDING[dtype])).all(), upper / true


@pytest.mark.slow  # 20 s of SVD
@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (3072, 768)])
def test_the_same_at_the_sizes_of_a_model(shape):
    matrices = [make(kind, *shape) for kind in KINDS]
    true = true_norms(matrices)
    for dtype in (FP32, BF16):
        lower, upper = spectral_norms(matrices, dtype=dtype)
        assert ((lower / true - 1).abs() <= 2.5e-3).all(), lower / true
        assert (lower <= true * (1 + 1e-6)).all() and (upper >= true * (1 - ROUNDING[dtype])).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**31), st.floats(-15, 15), st.booleans(), st.booleans())
def test_bounds_hold_for_any_matrix_of_any_scale(m, n, seed, exponent, sparse, bf16):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(m, n, generator=generator) * 10**exponent
    if sparse:  # few entries, where rounding errors do not average out
        matrix *= torch.rand(m, n, generator=generator) < 0.2
    dtype = BF16 if bf16 else FP32
    (lower,), (upper,) = spectral_norms([matrix], dtype=dtype)
    true = true_norms([matrix])[0]
    assert true * (1 - 2.5e-3 - ROUNDING[dtype]) <= lower <= true * (1 + 1e-6)
    assert upper >= true * (1 - ROUNDING[dtype])


def test_zero_matrices_and_no_matrices():
    lower, upper = spectral_norms([torch.zeros(5, 3), torch.zeros(1, 1)])
    assert lower.tolist() == upper.tolist() == [0.0, 0.0]
    assert [bound.numel() for bound in spectral_norms([])] == [0, 0]


def test_the_order_given_is_kept_and_shapes_may_be_mixed(monkeypatch):
    monkeypatch.setattr("nanochat.train.spectral.STACK_ELEMENTS", 40)  # pieces of one or two matrices
    shapes = [(3, 5), (5, 3), (1, 1), (3, 5), (4, 4), (3, 5), (5, 3)]
    matrices = [torch.diag(torch.ones(max(shape)))[: shape[0], : shape[1]] * k for k, shape in enumerate(shapes, 1)]
    lower, _ = spectral_norms(matrices)
    assert lower.tolist() == pytest.approx(list(range(1, len(shapes) + 1)))


def test_a_matrix_has_the_same_norm_in_any_company():
    """Matrices of one short side are treated together, the tall ones on their backs."""
    matrices = [
        make("gaussian", m, n) * 10.0**k for k, (m, n) in enumerate([(8, 24), (24, 8), (8, 8), (6, 8), (8, 24)])
    ]
    together = torch.stack(spectral_norms(matrices), dim=1)
    alone = torch.cat([torch.stack(spectral_norms([matrix]), dim=1) for matrix in matrices])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
