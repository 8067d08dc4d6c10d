"""What only a GPU can show: compiled FlexAttention, 8-bit matmuls and the instruments, against eager references.

Skipped where there is no CUDA device. In fp32 unless said, so that errors of the code are not hidden by those of bf16.
"""

import copy

import pytest
import torch

from nanochat import parallel
from nanochat.attention import GPU_KERNELS, make_masks, masked_attention
from nanochat.engine import Engine, Sampling
from nanochat.engine.sampling import sample_next_token
from nanochat.eval.core import evaluate_task
from nanochat.eval.tree import OVERHEAD
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import pointwise
from nanochat.kernels.fp8 import CAPABILITY, apply_fp8
from nanochat.optim import MuonAdamW
from nanochat.studies.short_run import ResidentLoader, build_model, short_run
from nanochat.train.loop import train_step
from nanochat.train.monitor import Monitor, MonitorSettings
from nanochat.train.spectral import spectral_norms
from tests.eval.test_core import ByteTokenizer, make_task
from tests.models import make_config
from tests.test_engine import FakeTokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DDP = parallel.Policy("ddp", torch.float32)
BOS = 0
EVERYTHING = {"attn_gate": True, "smear": True, "backout": True, "ngram_embeds": 4, "key_offset": True}


@pytest.fixture(autouse=True)
def exact():
    """No TF32, and no compiled code of the test before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)
    torch._dynamo.reset()


def build(arch: str = "speedrun", dtype: torch.dtype = torch.float32, width: int = 256, **changes) -> GPT:
    """12 layers of the speedrun architecture, no weight zero, or a small classic one."""
    windows = {"long_window": 384, "short_window": 128} if arch == "speedrun" else {}
    config = make_config(
        arch,  # type: ignore[arg-type]
        n_layer=12 if arch == "speedrun" else 2,
        n_embd=width,
        head_dim=64,
        vocab_size=512,
        sequence_len=1024,
        document_token=BOS if arch == "speedrun" else -1,
        **{**windows, **changes},
    )
    model = GPT(config, dtype).cuda()
    model.init_weights(seed=1, head_std=0.05, zero_proj=False)
    generator = torch.Generator("cuda").manual_seed(2)
    with torch.no_grad():  # what begins as nothing takes part
        for name, param in model.named_parameters():
            if "gate" in name or "ngram_embeds" in name or param.ndim == 1:
                param.add_(0.2 * torch.randn(param.shape, generator=generator, device="cuda"))
    return model


def text(seed: int = 0, rows: int = 2, length: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of documents in which each token is the one before plus 1 or 2: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 3, (rows, length + 1), generator=generator).cumsum(1) % 512
    tokens[torch.rand(tokens.shape, generator=generator) < 0.01] = BOS
    tokens[:, 0] = BOS
    return tokens[:, :-1].contiguous().cuda(), tokens[:, 1:].contiguous().cuda()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("length", [256, 1000])
@pytest.mark.parametrize("grouped", [False, True])
def test_compiled_flex_attention_is_dense_attention(length, grouped):
    """Forward and backward, rows that do not divide by the block and grouped heads included."""
    torch.manual_seed(0)
    shape, key_shape = (2, length, 4, 64), (2, length, 2 if grouped else 4, 64)
    drawn = [torch.randn(s, device="cuda", requires_grad=True) for s in (shape, key_shape, key_shape)]
    grad = torch.randn(shape, device="cuda")
    idx = torch.randint(0, 60, (2, length), device="cuda")
    documents = (idx == BOS).cumsum(1)
    windows = torch.tensor([96.0, 300.0], device="cuda")

    def attend(q, k, v, documents, windows, blocks):
        masks = make_masks(documents, windows, idx, blocks=blocks)
        return masked_attention(q, k, v, masks[0], 0.12) + masked_attention(q, k, v, masks[1], 0.12)

    wanted = attend(*drawn, documents, windows, False)
    wanted_grads = torch.autograd.grad(wanted, drawn, grad)
    found = torch.compile(attend, dynamic=False)(*drawn, documents, windows, True)
    found_grads = torch.autograd.grad(found, drawn, grad)
    for one, other in zip((found, *found_grads), (wanted, *wanted_grads), strict=True):
        assert relative(one, other) < 1e-4


@pytest.mark.parametrize("features", [{}, EVERYTHING, {"value_embeds": "gated"}])
def test_the_compiled_speedrun_model_is_the_eager_one(features):
    """Loss and every gradient, with block masks against dense ones, at two lengths of the windows."""
    model = build(**features)
    compiled = parallel.compile_model(model, DDP)
    for long in (384, 128):
        model.set_window(long)
        inputs, targets = text(long)
        with parallel.disable_compile(model):
            wanted = model(inputs, targets)
            wanted.backward()
        gradients = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        found = compiled(inputs, targets)
        found.backward()
        assert relative(found, wanted) < 1e-5
        for name, param in model.named_parameters():
            # sums of many terms that cancel, such as those of scalars, lose digits
            assert relative(param.grad, gradients[name]) < 2e-3, name
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("features", [{}, EVERYTHING])
@torch.no_grad()
def test_rows_decoded_by_recorded_steps_are_as_if_alone(features):
    model = build(**features).eval()
    engine, sampling = Engine(model, FakeTokenizer()), Sampling(max_new_tokens=12, temperature=0)
    prompts = [[BOS, *range(7, 7 + length)] for length in (3, 40, 480)]
    batch = engine.batch([engine.samples(i, prompt, sampling, 1) for i, prompt in enumerate(prompts)])
    rows = [samples[0] for samples in batch.waiting]
    while len(batch):
        batch.step()
    assert batch.graphs is not None and batch.graphs.recorded
    for row, tokens in zip(rows, prompts, strict=True):
        for token in row.tokens[len(tokens) :]:
            logits = model(torch.tensor([tokens], device="cuda"))[0, -1]
            assert logits[token] > logits.max() - 1e-3  # greedy but for rounding
            tokens.append(token)


@torch.no_grad()
def test_a_second_answer_of_a_shape_records_no_step():
    model = build("nanochat").eval()
    engine = Engine(model, FakeTokenizer())
    answers, recorded = [], []
    for _ in range(2):
        answers.append(engine.generate_batch([BOS, 7, 8], num_samples=2, max_tokens=40, seed=3, top_k=20))
        recorded.append({kind: id(step) for kind, step in engine._idle.graphs.recorded.items()})
        torch.cuda.empty_cache()
        model.lm_head.weight.mul_(1)  # the engine's copy of the weights is renewed in place
    assert answers[0] == answers[1]
    assert recorded[0] == recorded[1]


@pytest.mark.parametrize("features", [None, {}, EVERYTHING])
def test_core_is_the_same_where_what_options_share_is_read_once(features):
    """Against rows in full; None: the classic architecture."""
    model = build("nanochat") if features is None else build("speedrun", **features)
    model.eval()
    for kind in ("multiple_choice", "schema", "language_modeling"):
        task = make_task(kind, 30, 4)  # prompts of a few hundred bytes, some of them cut
        for overhead in (0, 10**6):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(OVERHEAD, "cuda", overhead)
                tree, full = (
                    evaluate_task(one, ByteTokenizer(), task, torch.device("cuda"), sequence_len=250)
                    for one in (model, lambda idx: model(idx))
                )
            losses, expected = ([record["loss"] for record in score.records] for score in (tree, full))
            torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", [{"top_k": 50}, {"top_p": 0.6}, {"top_k": 200, "top_p": 0.8}])
def test_a_gpu_draws_the_tokens_that_a_cpu_draws(cut):
    logits, numbers = 3 * torch.randn(64, 32_768), torch.rand(64)
    sampling = Sampling(max_new_tokens=1, temperature=0.8, **cut)
    found = sample_next_token(logits.cuda(), numbers.cuda(), sampling).cpu()
    assert (found == sample_next_token(logits, numbers, sampling)).float().mean() > 0.95  # but for rounding


def test_growing_windows_compile_nothing_and_wait_for_nothing():
    model = build()
    compiled = parallel.compile_model(model, DDP)
    optimizer = model.setup_optimizer()
    inputs, targets = text()

    def step(long: int) -> None:
        model.set_window(long)
        compiled(inputs, targets).backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step(384)
    torch.cuda.synchronize()
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for long in (128, 256, 384):
            step(long)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations


def test_a_step_of_the_loop_waits_for_nothing_and_its_schedule_compiles_nothing():
    config = GPTConfig(sequence_len=256, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=256)
    model, forward, policy = build_model(config, torch.device("cuda"))
    model.init_weights()
    rows = torch.randint(0, 512, (4, 257), device="cuda", dtype=torch.int32)
    loader, schedule = ResidentLoader(rows, 4, 2), lambda step: (1 / (step + 1), 0.85 + 0.01 * step)
    run = short_run(model, forward, model.setup_optimizer(), loader, 9, 1024, schedule, grad_clip=1.0, policy=policy)
    for _ in range(2):
        train_step(run)
    torch.cuda.synchronize()
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [train_step(run) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
    assert all(result.loss.isfinite() for result in results)


@pytest.mark.parametrize("arch", ["nanochat", "speedrun"])
def test_gradients_in_bf16_are_no_further_off_than_by_plain_operations(arch, monkeypatch):
    """Against fp32, at the same weights, each path compiled."""
    inputs, targets = text()

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        model = build(arch, dtype)
        parallel.compile_model(model, DDP)(inputs, targets).backward()
        return {name: param.grad for name, param in model.named_parameters() if param.ndim == 2}

    ours = gradients(torch.bfloat16)
    monkeypatch.setattr(pointwise, "_learns_on_gpu", lambda x: False)
    plain, wanted = gradients(torch.bfloat16), gradients(torch.float32)
    errors, before = ({name: relative(g, wanted[name]) for name, g in grads.items()} for grads in (ours, plain))
    assert sum(errors.values()) <= 1.1 * sum(before.values())
    assert all(errors[name] <= 1.5 * before[name] + 1e-3 for name in errors)


def losses_of(model: GPT, optimizer: MuonAdamW, steps: int) -> list[float]:
    compiled = parallel.compile_model(model.train(), DDP)
    found = []
    for step in range(steps):
        loss = compiled(*text(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    return torch.stack(found).tolist()


@pytest.mark.parametrize("arch", ["nanochat", "speedrun"])
@pytest.mark.parametrize("use_muon", [True, False])
def test_mup_at_the_base_width_is_the_standard_parametrisation_bit_for_bit(arch, use_muon):
    weights = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # the gradient of an embedding is summed in any order
    try:
        for base in (0, 256):
            model = build(arch, torch.bfloat16, mup_base_width=base)
            losses = losses_of(model, model.setup_optimizer(use_muon=use_muon), 20)
            weights.append((losses, [param.detach().clone() for param in model.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(one, other) for one, other in zip(weights[0][1], weights[1][1], strict=True))


def test_a_step_that_is_not_finite_changes_nothing_waits_for_nothing_and_compiles_nothing():
    model = build(dtype=torch.bfloat16)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    tensors = [*model.parameters(), *(t for bucket in optimizer.buckets for t in bucket.state.values())]
    inputs, targets = text()
    for step, bad in enumerate((False, False, True, False)):
        loss = model(inputs, targets)
        loss.backward()
        if bad:
            model.transformer.h[1].mlp.c_fc.weight.grad[0, 0] = float("nan")
        before = [tensor.detach().clone() for tensor in tensors]
        compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step(max_norm=1.0, loss=loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
        same = [torch.equal(one, other) for one, other in zip(before, tensors, strict=True)]
        assert all(same) if bad else not any(same)
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("which", ["head", "all"])
def test_training_in_8_bits_follows_training_in_16(which):
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("needs a GPU with 8-bit matmuls")
    curves = []
    for fp8 in ("none", which):
        model = build(dtype=torch.bfloat16)
        apply_fp8(model, fp8)
        curves.append(losses_of(model, model.setup_optimizer(), 30))
    usual, found = (torch.tensor(curve) for curve in curves)
    assert found.isfinite().all() and (found - usual).abs().max() < 0.05
    assert not torch.equal(found, usual) and found[-1] < found[0] - 0.3


def test_8_bits_are_for_training_only():
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("needs a GPU with 8-bit matmuls")
    model = build(dtype=torch.bfloat16).eval()
    inputs, targets = text()
    with torch.no_grad():
        usual = model(inputs, targets)
        apply_fp8(model, "all")
        assert torch.equal(model(inputs, targets), usual)


def test_the_monitor_reads_what_is_there_and_waits_for_nothing():
    """Against fp64 SVD and eager sums; between the start of an event and its reading nothing is read back."""
    config = GPTConfig(sequence_len=256, vocab_size=512, n_layer=3, n_head=4, n_kv_head=4, n_embd=256)
    model = GPT(config, torch.bfloat16).cuda()
    model.init_weights(seed=1, head_std=0.05, zero_proj=False)
    compiled = parallel.compile_model(model, DDP)
    optimizer = model.setup_optimizer()
    monitor = Monitor(model, optimizer, MonitorSettings(1))
    plain = copy.deepcopy(model)
    inputs, targets = text(length=256)
    for number in range(4):
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        if number == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            monitor.before_forward(number)
            compiled(inputs, targets).backward()
            monitor.before_update()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad(set_to_none=True)
            reading = monitor.after_update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    figures = reading()
    for matrix in monitor.matrices:
        new, old = matrix.param.detach().double(), before[f"transformer.h.{matrix.name}.weight"].double()
        top, step = (torch.linalg.svdvals(m)[0].item() for m in (new, new - old))
        assert figures[f"Model/spectral_norm/{matrix.name}"] == pytest.approx(top, rel=2.5e-3)
        assert figures[f"Model/update_ratio/{matrix.name}"] == pytest.approx(step / top, rel=5e-3)
    plain.load_state_dict(before)
    seen = {}
    for layer, block in enumerate(plain.transformer.h):
        for branch in ("attn", "mlp"):
            hook = lambda module, args, output, name=f"{layer}.{branch}": seen.update({name: output.float()})  # noqa: E731
            getattr(block, branch).register_forward_hook(hook)
    plain(inputs, targets)
    for name, x in seen.items():
        assert figures[f"Activations/l2/{name}"] == pytest.approx(x.square().mean().sqrt().item(), rel=0.02)
        assert figures[f"Activations/max/{name}"] == pytest.approx(x.max().item(), rel=0.1)


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072)])
def test_spectral_norms_in_bf16(shape):
    """Gaussian and as flat as Muon leaves them."""
    gaussian = torch.randn(shape, device="cuda")
    left, _, right = torch.linalg.svd(gaussian, full_matrices=False)
    flat = (left * (0.8 + 0.4 * torch.rand(left.size(1), device="cuda"))) @ right
    matrices = [gaussian, flat]
    true = torch.stack([torch.linalg.svdvals(matrix.double())[0] for matrix in matrices])
    lower, upper = spectral_norms(matrices)
    assert ((lower / true - 1).abs() < 2.5e-3).all()
    assert (lower <= true * (1 + 1e-5)).all() and (upper >= true * (1 - 1e-3)).all()


def test_the_order_of_attention_kernels_is_accepted():
    """The sets that nanochat.attention asks for exist on this GPU."""
    model = build("nanochat", torch.bfloat16)
    inputs, targets = text()
    assert len(GPU_KERNELS) == 4
    assert model(inputs, targets).isfinite()
