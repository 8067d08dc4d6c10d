import pytest
import torch
import torch.nn.functional as F

from nanochat import loss
from nanochat.gpt import Head


def reference(hidden, head, targets, cap):
    """Whole logits in fp64."""
    logits = hidden.double() @ head.weight.double().T
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
