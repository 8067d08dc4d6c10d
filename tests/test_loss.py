import pytest
import torch
import torch.nn.functional as F

from nanochat import loss
from nanochat.gpt import Head
from nanochat.kernels.fp8 import E4M3, E5M2, quantize


def reference(hidden, head, targets, cap, scale=1.0):
    """Whole logits in fp64."""
    logits = scale * (hidden.double() @ head.weight.double().T)
    return F.cross_entropy(cap * torch.tanh(logits / cap), targets, ignore_index=-1, reduction="none")


def problem(rows=50, width=16, vocab=37, masked=True):
    head = Head(width, vocab)
    hidden = (3 * torch.randn(rows, width)).requires_grad_()
    targets = torch.randint(vocab, (rows,))
    if masked:
        targets[torch.rand(rows) < 0.3] = -1
    return hidden, head, targets


@pytest.fixture(params=["plain", "chunked"])
def path(request, monkeypatch):
    """Both ways through head_loss on the same small problem; the chunks do not divide the rows."""
    if request.param == "chunked":
        monkeypatch.setattr(loss, "PLAIN_LOGITS", 0)
        monkeypatch.setattr(loss, "_chunk_rows", lambda *_: 7)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_match_reference(path, reduction):
    hidden, head, targets = problem()
    expected = reference(hidden, head, targets, 15.0).sum()
    if reduction == "mean":
        expected = expected / (targets != -1).sum()
    wanted = torch.autograd.grad(2.5 * expected, [hidden, head.weight])
    got_loss = loss.head_loss(hidden, head, targets, 15.0, reduction)
    got = torch.autograd.grad(2.5 * got_loss, [hidden, head.weight])
    assert got_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_rows_without_reduction(path):
    hidden, head, targets = problem()
    with torch.no_grad():
        got = loss.head_loss(hidden, head, targets, 15.0, "none")
    torch.testing.assert_close(got.double(), reference(hidden, head, targets, 15.0), atol=1e-5, rtol=1e-5)


def test_weights(path):
    hidden, head, targets = problem()
    weights = torch.randn(len(targets))  # advantages may be negative
    expected = (reference(hidden, head, targets, 15.0) * weights).sum()
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    got_loss = loss.head_loss(hidden, head, targets, 15.0, "sum", weights)
    got = torch.autograd.grad(got_loss, [hidden, head.weight])
    assert got_loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert loss.head_loss(hidden, head, targets, 15.0, "sum", weights).item() == pytest.approx(
            got_loss.item(), rel=1e-5
        )


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_scale_of_the_logits(path, scale):
    hidden, head, targets = problem()
    expected = reference(hidden, head, targets, 15.0, scale).sum() / (targets != -1).sum()
    wanted = torch.autograd.grad(expected, [hidden, head.weight])
    got_loss = loss.head_loss(hidden, head, targets, 15.0, scale=scale)
    got = torch.autograd.grad(got_loss, [hidden, head.weight])
    assert got_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        assert loss.head_loss(hidden, head, targets, 15.0, scale=scale).item() == pytest.approx(got_loss.item())


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_the_gradient_of_cpus_is_that_of_gpus(scale):
    """Of a chunk of logits; the tests above see the one of the device that they run on."""
    logits, targets = 20 * torch.randn(30, 37), torch.randint(-1, 37, (30,))
    arguments = targets, torch.randn(30) * (targets >= 0), 15.0, scale
    wanted = loss._chunk_gradient(logits.clone(), *arguments)
    torch.testing.assert_close(loss._chunk_gradient_in_place(logits, *arguments), wanted, atol=2e-6, rtol=1e-5)


def test_all_masked(path):
    hidden, head, targets = problem()
    value = loss.head_loss(hidden, head, torch.full_like(targets, -1), 15.0)
    value.backward()
    assert value.item() == 0 and hidden.grad.abs().max() == 0 and head.weight.grad.abs().max() == 0


def test_compiles_without_graph_break(monkeypatch):
    monkeypatch.setattr(loss, "PLAIN_LOGITS", 0)
    hidden, head, targets = problem()
    compiled = torch.compile(lambda h, t: loss.head_loss(h, head, t, 15.0), fullgraph=True, backend="aot_eager")
    compiled(hidden, targets).backward()
    wanted = torch.autograd.grad(loss.head_loss(hidden, head, targets, 15.0), hidden)[0]
    torch.testing.assert_close(hidden.grad, wanted)


# ---- in 8 bits


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "_chunk_rows", lambda *_: 39)  # comes to 32: 50 rows are one chunk and a part of one


def loss_and_gradients(hidden, head, targets, weights, scale, fp8):
    total = loss.fused_head_loss(hidden, head.weight, targets, weights, 15.0, scale, fp8)
    return [total, *torch.autograd.grad(total, [hidden, head.weight])]


def cosine(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_8_bits_are_close_to_32(small_chunks, scale):
    torch.manual_seed(0)
    hidden, head, targets = problem(rows=50, width=64, vocab=96)
    weights = (targets != -1) * torch.rand(50)
    plain = loss_and_gradients(hidden, head, targets, weights, scale, fp8=False)
    ours = loss_and_gradients(hidden, head, targets, weights, scale, fp8=True)
    assert ours[0].item() != plain[0].item() and ours[0].item() == pytest.approx(plain[0].item(), rel=0.02)
    for got, wanted in zip(ours[1:], plain[1:], strict=True):
        assert cosine(got, wanted) > 0.99
        assert got.norm().item() == pytest.approx(wanted.norm().item(), rel=0.03)
    assert (ours[1][targets == -1] == 0).all()


def test_8_bits_match_the_loss_of_the_rounded_factors(small_chunks):
    """What is lost is lost by rounding hidden and head to 8 bits, and the gradient of the logits once more."""
    hidden, head, targets = problem(rows=50, width=64, vocab=96)
    weights = (targets != -1).float()
    total, grad_hidden, grad_weight = loss_and_gradients(hidden, head, targets, weights, 0.5, fp8=True)
    pieces = [quantize(piece, E4M3) for piece in hidden.detach().split(32)]
    hidden8 = torch.cat([piece.values.double() * piece.scale for piece in pieces])
    head8 = quantize(head.weight.detach(), E4M3)
    head8 = head8.values.double() * head8.scale
    logits = (hidden8 @ head8.T).requires_grad_()
    capped = 15.0 * torch.tanh(0.5 * logits / 15.0)
    expected = F.cross_entropy(capped, targets, ignore_index=-1, reduction="sum")
    (grad,) = torch.autograd.grad(expected, logits)
    largest = 0.5 / torch.finfo(E5M2).max  # no entry is larger than scale x weight
    rounded = (grad / largest).float().to(E5M2).double() * largest
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    # an entry on the edge between two 8-bit numbers may fall either way
    for got, wanted in ((grad_hidden, rounded @ head8), (grad_weight, rounded.T @ hidden8)):
        assert ((got - wanted).norm() / wanted.norm()).item() < 1e-3


def test_8_bits_all_masked(small_chunks):
    hidden, head, targets = problem(width=16, vocab=32)
    results = loss_and_gradients(hidden, head, torch.full_like(targets, -1), torch.zeros(50), 1.0, fp8=True)
    assert all((result == 0).all() for result in results)


def test_8_bits_through_the_head(path):
    """Both ways in training; plain in evaluation and without gradients."""
    hidden, head, targets = problem(rows=50, width=64, vocab=96)
    wanted_loss = loss.head_loss(hidden, head, targets, 15.0)
    wanted = torch.autograd.grad(wanted_loss, [hidden, head.weight])
    head.fp8 = True
    got_loss = loss.head_loss(hidden, head, targets, 15.0)
    got = torch.autograd.grad(got_loss, [hidden, head.weight])
    assert got_loss.item() != wanted_loss.item()
    assert all(cosine(ours, theirs) > 0.99 for ours, theirs in zip(got, wanted, strict=True))
    with torch.no_grad():
        assert loss.head_loss(hidden, head, targets, 15.0).item() == pytest.approx(wanted_loss.item(), rel=1e-6)
    head.eval()
    assert loss.head_loss(hidden, head, targets, 15.0).item() == wanted_loss.item()


def test_8_bits_compile_without_graph_break(monkeypatch, small_chunks):
    monkeypatch.setattr(loss, "PLAIN_LOGITS", 0)
    hidden, head, targets = problem(width=16, vocab=32)
    head.fp8 = True
    compiled = torch.compile(lambda h, t: loss.head_loss(h, head, t, 15.0), fullgraph=True, backend="aot_eager")
    compiled(hidden, targets).backward()
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(loss.head_loss(hidden, head, targets, 15.0), hidden)[0])
