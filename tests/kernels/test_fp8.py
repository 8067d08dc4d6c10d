import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import parallel
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import fp8
from nanochat.kernels.fp8 import E4M3, E5M2, Scaled, apply_fp8, fp8_linear, quantize, require_fp8, transposed
from tests.processes import run_processes

# Half a step of the mantissa, as a share of the value: 3 bits in e4m3, 2 in e5m2.
ERROR = {E4M3: 2**-4, E5M2: 2**-3}

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def small_model(**changes):
    model = GPT(dataclasses.replace(CONFIG, **changes))
    model.init_weights()
    return model


def value(x):
    return x.values.float() * x.scale


def cosine(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def slow_quantize(x, dtype):
    """Element by element: the nearest number of the format, all of which are written down."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()].sort().values
    scale = x.double().abs().max() / numbers.max()
    return torch.stack([numbers[(numbers - entry / scale).abs().argmin()] * scale for entry in x.double().flatten()])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantizes_to_the_nearest_number_of_the_format(dtype):
    x = torch.randn(7, 16) * torch.logspace(-4, 3, 16)
    got = value(quantize(x, dtype)).double().flatten()
    # ties and the rounding of the scale may go either way: equally near is as good
    exact = x.double().flatten()
    errors, least = ((rounded / exact - 1).abs() for rounded in (got, slow_quantize(x, dtype)))
    torch.testing.assert_close(errors, least, atol=1e-6, rtol=0)


@given(
    exponent=st.integers(-150, 127),
    dtype=st.sampled_from([E4M3, E5M2]),
    source=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**30),
)
@settings(max_examples=100, deadline=None)
def test_any_finite_tensor_stays_finite_and_large_entries_close(exponent, dtype, source, seed):
    x = (torch.rand(4, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1).double() * 2.0**exponent
    x = x.to(source)
    quantized = quantize(x, dtype)
    got, x = quantized.values.double() * quantized.scale.double(), x.double()
    assert quantized.values.float().isfinite().all() and quantized.scale > 0
    large = (x.abs() > x.abs().max() / 100) & (x.abs() > 1e-30)  # so far neither format has run out of bits
    assert ((got - x).abs() <= (ERROR[dtype] * 1.01) * x.abs())[large].all()


def test_the_largest_gradient_takes_the_maximum_of_its_own_format():
    x = torch.randn(3, 16)
    assert quantize(x, E5M2).values.float().abs().max() == 57344
    assert quantize(x, E4M3).values.float().abs().max() == 448


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden():
    assert (value(quantize(torch.zeros(2, 16), E4M3)) == 0).all()
    for broken in (float("nan"), float("inf")):
        x = torch.ones(2, 16)
        x[1, 3] = broken
        assert not value(quantize(x, E5M2)).isfinite().all()


def test_of_many_rows_some_say_how_large_they_are(monkeypatch):
    monkeypatch.setattr(fp8, "MANY_ROWS", 48)
    x = torch.randn(48, 16)
    x[5, 3] = 1e4  # in a row that is not looked at
    values, columns, scale = fp8.rounded(x)
    assert scale == 2 * x[::16].abs().max() / 448 and values.float().abs().max() == values[5, 3].float() == 448
    assert ((values.float() * scale - x).abs() <= 1.01 * ERROR[E4M3] * x.abs() + scale * 2**-9)[:5].all()
    exact = fp8.rounded(x[:47])[2]
    assert exact == 1e4 / 448 and torch.equal(columns.float(), values.float().T)


def test_transposing_fills_up_to_sixteen_rows():
    x = quantize(torch.randn(21, 32), E5M2)
    got = transposed(x)
    assert got.values.shape == (32, 32) and got.values.is_contiguous()
    torch.testing.assert_close(value(got)[:, :21], value(x).T)
    assert (value(got)[:, 21:] == 0).all()


@pytest.mark.parametrize("gradient", [False, True])
def test_emulation_is_what_scaled_mm_computes(gradient):
    """The operator that GPUs run, on the CPU."""
    a, b = quantize(torch.randn(24, 64), E5M2 if gradient else E4M3), quantize(torch.randn(48, 64), E4M3)
    scales = {"scale_a": a.scale, "scale_b": b.scale}
    try:
        wanted = torch._scaled_mm(a.values, b.values.T, **scales, out_dtype=torch.float32, use_fast_accum=not gradient)
    except RuntimeError as error:
        pytest.skip(f"torch._scaled_mm does not run on this CPU: {error}")
    torch.testing.assert_close(fp8.matmul(a, b, torch.float32, fast=not gradient), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_matches_the_product_of_the_rounded_factors(dtype):
    """Forward and backward against autograd on dequantised fp32 copies; 21 rows are no multiple of 16."""
    x = torch.randn(3, 7, 32, dtype=dtype, requires_grad=True)
    weight = (0.1 * torch.randn(48, 32)).requires_grad_()
    grad = (1e-6 * torch.randn(3, 7, 48)).to(dtype)
    y = fp8_linear(x, weight)
    y.backward(grad)
    x8, weight8 = (value(quantize(t.detach().flatten(0, -2), E4M3)) for t in (x, weight))
    grad8 = value(quantize(grad.flatten(0, -2), E5M2))
    near = {"atol": 0.0, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-4}
    assert y.dtype == x.grad.dtype == dtype and weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.flatten(0, -2).float(), x8 @ weight8.T, **near)
    scale = 1e6  # so that the tolerances mean something
    torch.testing.assert_close(scale * x.grad.flatten(0, -2).float(), scale * (grad8 @ weight8), **near)
    torch.testing.assert_close(scale * weight.grad, scale * (grad8.T @ x8), atol=1e-5, rtol=1e-4)


def test_linear_is_close_to_the_exact_product():
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    grad = torch.randn(64, 96)
    wanted_y = x @ weight.T
    wanted = torch.autograd.grad(wanted_y, [x, weight], grad)
    y = fp8_linear(x, weight)
    got = torch.autograd.grad(y, [x, weight], grad)
    # errors of a product of random entries add up as its terms do: the relative error stays that of one term
    assert ((y - wanted_y).norm() / wanted_y.norm()).item() < ERROR[E4M3]
    for ours, theirs in zip(got, wanted, strict=True):
        assert cosine(ours, theirs) > 0.99


def test_operator_follows_the_rules_of_torch():
    """Fake tensors and autograd. (The other checks do arithmetic on all outputs, which float8 has none of.)"""
    checks = {"test_utils": ("test_autograd_registration", "test_faketensor")}
    x, weight = torch.randn(21, 16), torch.randn(48, 16)
    for gradient, kind, h in ((False, fp8.PLAIN, None), (False, fp8.SQUARED, None), (True, fp8.BEFORE_SQUARES, -x)):
        torch.library.opcheck(fp8.to_fp8, (x, x.abs().amax(), gradient, kind, h), **checks)
    (x8, _, x_scale), (weight8, _, scale) = fp8.rounded(x), fp8.rounded(weight)
    torch.library.opcheck(fp8.product, (x8, weight8, x_scale, scale, torch.bfloat16, True), **checks)


def test_the_mlp_in_one_is_the_three_in_a_row():
    x, up, down = (t.requires_grad_() for t in (torch.randn(21, 32), torch.randn(128, 32), torch.randn(32, 128)))
    grad = torch.randn(21, 32)
    wanted = fp8_linear(F.relu(fp8_linear(x, up)).square(), down)
    found = fp8.Fp8MLP.apply(x, up, down)
    assert torch.equal(found, wanted)
    for one, other in zip(*(torch.autograd.grad(y, [x, up, down], grad) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compiles_without_graph_break_and_keeps_one_byte_an_element():
    x, weight = torch.randn(2, 16, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    wanted = torch.autograd.grad(fp8_linear(x, weight).square().sum(), [x, weight])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")(x, weight)
    got = torch.autograd.grad(y.square().sum(), [x, weight])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {t.numel() for t in kept if t.dtype != E4M3} <= {1}  # scales


def test_bf16_weight_gets_a_bf16_gradient():
    weight = torch.randn(32, 16, dtype=torch.bfloat16, requires_grad=True)
    fp8_linear(torch.randn(4, 16), weight).sum().backward()
    assert weight.grad.dtype == torch.bfloat16


# ---- in the model


def marked(model):
    return {name for name, module in model.named_modules() if getattr(module, "fp8", False)}


def test_marks_head_and_matrices():
    model = small_model()
    apply_fp8(model, "none")
    assert marked(model) == set()
    apply_fp8(model, "head")
    assert marked(model) == {"lm_head"}
    apply_fp8(model, "all")
    layers = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert marked(model) == {"lm_head"} | {f"transformer.h.{i}.{name}" for i in range(2) for name in layers}


def test_dimensions_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"lm_head is 50257 x 32.*multiples of 16"):
        apply_fp8(small_model(vocab_size=50257), "head")
    model = small_model(n_embd=24, vocab_size=48)
    model.lm_head = type(model.lm_head)(32, 48)
    with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_q is 24 x 24"):
        apply_fp8(model, "all")
    assert marked(model) == set()


def test_devices_without_8_bit_matmul_are_refused(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"--fp8=head: compute capability 8\.0 has no 8-bit matmul"):
        require_fp8(gpu, "head")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    require_fp8(gpu, "head")
    with pytest.raises(UserError, match="device type meta"):
        apply_fp8(small_model().to("meta"), "head")


def make_trainable(model):
    with torch.no_grad():  # projections and head begin at zero, where 8 bits and 32 are the same
        for param in model.parameters():
            if param.ndim == 2 and param.abs().max() == 0:
                param.normal_(0, 0.05)


@pytest.mark.parametrize("which", ["head", "all"])
def test_8_bits_in_training_only(which):
    model = small_model()
    make_trainable(model)
    idx = torch.randint(64, (4, 17))
    plain = model(idx[:, :-1], idx[:, 1:]).item()
    apply_fp8(model, which)
    in_training = model(idx[:, :-1], idx[:, 1:])
    assert in_training.item() != plain and in_training.item() == pytest.approx(plain, rel=0.02)
    with torch.no_grad():
        assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(plain, rel=1e-6)
    model.eval()
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("which", ["head", "all"])
def test_gradients_point_the_same_way(which):
    torch.manual_seed(0)
    model = small_model()
    make_trainable(model)
    idx = torch.randint(64, (16, 17))

    def gradients():
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:]).backward()
        return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}

    wanted = gradients()
    apply_fp8(model, which)
    got = gradients()
    assert cosine(got["lm_head.weight"], wanted["lm_head.weight"]) > 0.99
    for name, ours in got.items():
        assert wanted[name].norm() == 0 or cosine(ours, wanted[name]) > 0.95, name


def test_a_model_learns_in_8_bits():
    model = small_model()
    apply_fp8(model, "all")
    optimizer = model.setup_optimizer(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01)
    idx = torch.randint(64, (8, 17))
    losses = []
    for _ in range(15):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def whole_gradients(sharded):
    """Of the same batch on every rank, so that their mean is the gradient of one process."""
    with torch.device("meta"):
        model = GPT(CONFIG)
    policy = parallel.Policy("fsdp" if sharded else "ddp", torch.float32)
    if sharded:
        parallel.shard_model(model, parallel.make_mesh(policy, "cpu", 1), policy)
    model.to_empty(device="cpu")
    model.init_weights(seed=3, head_std=0.1, zero_proj=False)
    apply_fp8(model, "all")
    assert len(marked(model)) == 13
    idx = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    model(idx[:, :-1], idx[:, 1:]).backward()
    named = {name: param.grad for name, param in model.named_parameters()}
    return {name: (grad.full_tensor() if sharded else grad).numpy() for name, grad in named.items()}


def test_weights_that_are_cut_over_ranks_make_no_difference():
    wanted = whole_gradients(sharded=False)
    for got in run_processes(2, whole_gradients, True):
        for name, grad in wanted.items():
            np.testing.assert_allclose(got[name], grad, atol=1e-7, rtol=1e-4, err_msg=name)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < fp8.CAPABILITY,
    reason="needs a GPU with 8-bit matmuls",
)
def test_gpu_computes_what_the_emulation_computes():
    x, weight = torch.randn(200, 128, dtype=torch.bfloat16), 0.1 * torch.randn(96, 128)
    grad = torch.randn(200, 96, dtype=torch.bfloat16)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device).requires_grad_() for t in (x, weight)]
        y = fp8_linear(*inputs)
        results.append([t.cpu().float() for t in (y, *torch.autograd.grad(y, inputs, grad.to(device)))])
    for name, emulated, real in zip(("y", "d/dx", "d/dweight"), *results, strict=True):
        # bf16 outputs, and fewer bits in the sums of the forward pass
        assert ((emulated - real).norm() / emulated.norm()).item() < 5e-3, name


def test_both_factors_must_run_along_the_contracted_dimension():
    """A CPU would take any layout; the GPU would not."""
    x = quantize(torch.randn(16, 32), E4M3)
    with pytest.raises(AssertionError, match="contracted"):
        fp8.matmul(x, Scaled(quantize(torch.randn(32, 16), E4M3).values.T, x.scale), torch.float32, fast=True)
