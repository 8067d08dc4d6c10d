import dataclasses
import gc
import json
import math
import os
import signal
import time
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.eval.scores import gather_records
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim.schedule import lr_multiplier, muon_momentum
from nanochat.paths import run_dir
from nanochat.runtime import get_dist_info, interruptible
from nanochat.train import loop
from nanochat.train.console import Console
from nanochat.train.loop import train
from nanochat.train.monitor import Monitor, MonitorSettings
from nanochat.train.run import Evaluation, LoopState, RunFlags, TrainingRun
from nanochat.train.warmup import warm_kernels
from tests.processes import run_processes

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
ROWS = 8


class FakeLoader:
    """Endless batches of text-like random tokens that depend on the step only; ranks share the rows of a step."""

    def __init__(self, batch=4, rank=0, world=1, step=0, repeat=False, masked=()):
        self.batches_per_step = ROWS // (batch * world)
        self.device_batch_size = batch
        self.has_gradient_signal = True
        self.batch, self.rank, self.world, self.repeat, self.masked = batch, rank, world, repeat, masked
        self.given = step * self.batches_per_step

    def next_batch(self):
        step, index = divmod(self.given, self.batches_per_step)
        generator = torch.Generator().manual_seed(0 if self.repeat else step)
        rows = torch.randint(64, (ROWS, 17), generator=generator)
        for row in self.masked:
            rows[row, 1:] = -1
        mine = rows[self.rank :: self.world][index * self.batch : (index + 1) * self.batch]
        self.given += 1
        return mine[:, :-1].clamp(min=0), mine[:, 1:]

    def state_dict(self):
        return {"step": self.given // self.batches_per_step}

    def epoch(self):
        return 0.0

    def close(self):
        pass


def make_run(folder, steps, loader=None, save_every=-1, **changes):
    model = GPT(CONFIG)
    model.init_weights(head_std=0.0)
    optimizer = model.setup_optimizer(matrix_lr=0.02, embedding_lr=0.1, unembedding_lr=0.01)
    values = {
        "folder": folder,
        "settings": RunFlags(save_every=save_every),
        "earlier": {},
        "model": model,
        "forward": model,
        "optimizer": optimizer,
        "loader": loader or FakeLoader(),
        "num_iterations": steps,
        "tokens_per_step": ROWS * 16,
        "schedule": lambda step: (lr_multiplier(step, steps, 0.0, 0.3, 0.0), muon_momentum(step)),
        "grad_clip": 1.0,
        "evaluations": [],
        "meta": {"stage": "base", "tokenizer_hash": "x", "settings": {}, "model_config": dataclasses.asdict(CONFIG)},
        "flops_per_token": model.estimate_flops(),
    }
    return TrainingRun(**{**values, **changes})


def weights(run):
    return {name: param.detach().clone() for name, param in run.model.named_parameters()}


def recorded(name):
    """Values of a metric, by step."""
    lines = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def losses():
    return recorded("Loss/train_loss")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_RUN_ID", "test")
    return tmp_path / "checkpoints"


def test_overfitting_one_batch_drives_the_loss_to_zero(folder):
    run = make_run(folder, 150, FakeLoader(repeat=True))
    outcome = train(run)
    seen = losses()
    assert seen[1] == pytest.approx(math.log(64), abs=1e-5)
    assert seen[150] < 0.02
    assert outcome.finished and outcome.metrics["steps"] == 150


def start_again(folder, steps, **changes):
    """A fresh process's view: everything new, state from the last checkpoint."""
    step = checkpoint.committed_steps(folder)[-1]
    meta = checkpoint.read_meta(folder, step)
    return make_run(folder, steps, FakeLoader(step=meta["loader"]["step"]), earlier=meta, **changes)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(folder):
    whole = make_run(folder / "whole", 8)
    train(whole)
    expected_losses = losses()

    evaluated = []

    def stop_at_five(step):
        evaluated.append(step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"Loss/val_bpb": 1.0 / step}

    evaluations = [Evaluation(1, True, stop_at_five)]
    first = make_run(folder / "parts", 8, evaluations=evaluations)
    outcome = train(first)
    assert not outcome.finished
    stopped_at = checkpoint.committed_steps(folder / "parts")[-1]
    assert 5 <= stopped_at < 8

    torch.manual_seed(999)  # what another process would have
    second = start_again(folder / "parts", 8, evaluations=evaluations)
    assert train(second).finished
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    for name, tensor in whole.optimizer.named_state().items():
        assert torch.equal(tensor, second.optimizer.named_state()[name]), name
    assert losses() == expected_losses  # every step once, with the same value
    assert evaluated == list(range(1, 9))  # nothing skipped, nothing twice
    assert second.state.best["Loss/val_bpb"] == 1.0 / 8


def test_gradient_accumulation_changes_nothing_but_memory(folder):
    one, many = make_run(folder / "a", 3, FakeLoader(batch=8)), make_run(folder / "b", 3, FakeLoader(batch=2))
    train(one), train(many)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(many)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [(0, 1, 2), (4, 5, 6, 7)])
def test_each_target_weighs_the_same_wherever_it_lies(folder, masked):
    # some micro-batches have no target at all: neither nan, nor does the mean change
    one = make_run(folder / "a", 2, FakeLoader(batch=8, masked=masked))
    many = make_run(folder / "b", 2, FakeLoader(batch=2, masked=masked))
    train(one), train(many)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(many)[name], atol=1e-5, rtol=1e-4)


def test_all_masked_step_is_survived(folder):
    run = make_run(folder, 2, FakeLoader(masked=range(ROWS)))
    train(run)
    assert set(losses().values()) == {0.0}
    assert all(value.isfinite().all() for value in weights(run).values())


def train_on_ranks(base, steps):
    os.environ.update(NANOCHAT_BASE_DIR=str(base), NANOCHAT_RUN_ID="ranks")
    rank, world = dist.get_rank(), dist.get_world_size()
    run = make_run(base / "ckpt", steps, FakeLoader(batch=4, rank=rank, world=world), save_every=2)
    train(run)
    return {name: value.numpy() for name, value in weights(run).items()}


def test_two_ranks_equal_one_and_their_checkpoint_resumes_on_one(folder, tmp_path):
    one = make_run(folder / "one", 6, FakeLoader(batch=8))
    train(one)
    expected_losses = losses()
    first, second = run_processes(2, train_on_ranks, tmp_path, 6)
    for name, value in weights(one).items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], value.numpy(), atol=2e-5, err_msg=name)
    # the state of two ranks, taken up by one at step 4
    checkpoint.prune(tmp_path / "ckpt", 9)
    (tmp_path / "ckpt" / "step_000006" / "COMMITTED").unlink()
    again = start_again(tmp_path / "ckpt", 6)
    train(again)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(again)[name], value, atol=2e-5, rtol=1e-4)
    assert losses()[6] == pytest.approx(expected_losses[6], rel=1e-4)


def test_checkpoints_come_at_their_interval_and_old_ones_go(folder):
    train(make_run(folder, 7, save_every=2))
    assert checkpoint.committed_steps(folder) == [6, 7]


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_the_next_start(folder):
    evaluated = []
    evaluations = [Evaluation(3, True, lambda step: evaluated.append(step) or {"Loss/val_bpb": 1.0})]

    class Stopping(FakeLoader):
        def next_batch(self):
            if self.given // self.batches_per_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_batch()

    assert not train(make_run(folder, 3, Stopping(), evaluations=evaluations)).finished
    assert checkpoint.committed_steps(folder) == [3] and evaluated == []
    assert train(start_again(folder, 3, evaluations=evaluations)).finished
    assert evaluated == [3] and checkpoint.read_meta(folder, 3)["val_bpb"] == 1.0


def test_a_signal_within_an_evaluation_saves_at_once_and_the_evaluation_comes_again(folder):
    evaluated = []

    def measure(step):
        evaluated.append(step)
        with interruptible():
            if evaluated == [3]:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        return {"Loss/val_bpb": 1.0}

    evaluations = [Evaluation(3, False, measure, optional="a long one")]
    started = time.monotonic()
    first = make_run(folder, 5, evaluations=evaluations, save_every=2)
    assert not train(first).finished
    assert time.monotonic() - started < 30
    assert checkpoint.committed_steps(folder) == [2, 3] and evaluated == [3] and first.state.failures == []
    assert train(start_again(folder, 5, evaluations=evaluations)).finished
    assert evaluated == [3, 3]


def test_a_signal_in_the_first_step_drops_it(folder):
    class Stopping(FakeLoader):
        def next_batch(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert not train(make_run(folder, 3, Stopping())).finished
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint.committed_steps(folder) == []


def test_what_was_evaluated_at_the_last_step_is_known_after_a_kill_behind_it(folder):
    evaluations = [Evaluation(-1, True, lambda step: {"Loss/val_bpb": 1.0})]
    assert train(make_run(folder, 3, evaluations=evaluations)).finished
    records = (run_dir() / "metrics.jsonl").read_text()
    again = start_again(folder, 3, evaluations=evaluations)
    assert train(again).finished and again.state.latest["Loss/val_bpb"] == 1.0
    assert (run_dir() / "metrics.jsonl").read_text() == records


def spoil(run, what, steps):
    """From now on the loss, or the gradient alone, of these steps (counted from 0) is NaN."""

    def forward(*args, **kwargs):
        loss = run.model(*args, **kwargs)
        if run.state.step not in steps:
            return loss
        if what == "gradient":
            loss.register_hook(lambda grad: grad * float("nan"))
            return loss
        return loss * float("nan")

    run.forward = forward
    return run


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_training_goes_on(folder, what, capsys):
    seen = []

    def remember(step):
        state = {name: tensor.clone() for name, tensor in run.optimizer.named_state().items()}
        seen.append(weights(run) | state)
        return {}

    run = spoil(make_run(folder, 6, evaluations=[Evaluation(1, True, remember)]), what, {2})
    outcome = train(run)
    assert outcome.finished and outcome.metrics["steps skipped (not finite)"] == 1
    for name, value in seen[1].items():
        assert torch.equal(value, seen[2][name]), name
    for name in weights(run):
        assert not torch.equal(seen[2][name], seen[5][name]), name
    assert list(losses()) == [1, 2, 4, 5, 6] and recorded("Optimization/skipped_steps") == {3: 1}
    assert "step 00003 skipped, weights and optimizer unchanged: loss" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_is_never_finite_again_ends_with_its_state_saved(folder, what):
    good = make_run(folder / "good", 2)
    train(good)
    run = spoil(make_run(folder / "bad", 100_000), what, range(2, 200_000))
    with pytest.raises(UserError, match="not finite in 5 steps in a row, up to step"):
        train(run)
    (step,) = checkpoint.committed_steps(folder / "bad")
    assert step >= 7 and checkpoint.read_meta(folder / "bad", step)["loop"]["skipped"] == step - 2
    for name, value in weights(start_and_stop(folder / "bad", step)).items():
        assert torch.equal(value, weights(good)[name]), name


def start_and_stop(folder, step):
    """What a new process finds in the checkpoint: a run that has nothing more to do."""
    run = start_again(folder, step)
    train(run)
    return run


def test_few_steps_that_are_not_finite_end_a_short_run_too(folder):
    """The last steps are read before the run is called done. Of more than five a busy machine, where a second has gone
    by, reads five before the last."""
    with pytest.raises(UserError, match="not finite in 5 steps in a row, up to step 20;"):
        train(spoil(make_run(folder, 20), "loss", range(15, 20)))
    assert checkpoint.committed_steps(folder) == [20]


def diverge_on_ranks(base):
    """Of two ranks one has a loss that is not finite, from the third step on."""
    os.environ.update(NANOCHAT_BASE_DIR=str(base), NANOCHAT_RUN_ID="ranks")
    rank, world = dist.get_rank(), dist.get_world_size()
    run = make_run(base / "ckpt", 100_000, FakeLoader(batch=4, rank=rank, world=world))
    if rank == 1:
        spoil(run, "loss", range(2, 200_000))
    try:
        train(run)
    except UserError as error:
        return str(error)


def test_two_ranks_end_together_when_one_is_not_finite(tmp_path):
    first, second = run_processes(2, diverge_on_ranks, tmp_path)
    assert first == second and "not finite in 5 steps in a row" in first
    (step,) = checkpoint.committed_steps(tmp_path / "ckpt")
    assert step >= 7 and f"up to step {step};" in first


def test_running_out_of_memory_names_the_flag(folder):
    def too_much(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"out of memory at a device batch of 4 rows: halve --device-batch-size"):
        train(make_run(folder, 3, forward=too_much))


@pytest.mark.parametrize(
    ("every", "at_end", "expected"), [(2, True, [2, 4, 5]), (2, False, [2, 4]), (-1, True, [5]), (0, False, [])]
)
def test_when_evaluations_are_due(every, at_end, expected):
    evaluation = Evaluation(every, at_end, lambda step: {})
    assert [step for step in range(6) if evaluation.due(step, last=step == 5)] == expected


def test_loop_state_survives_json():
    state = LoopState(step=3, best={"Loss/val_bpb": 1.5})
    assert LoopState(**json.loads(json.dumps(dataclasses.asdict(state)))) == state


def test_losses_are_weighted_by_a_third_part_of_the_batch(folder):
    """A weight of 2 on every token moves the weights as a loss of 2; a weight of 0 as no target at all would."""

    class Weighted(FakeLoader):
        def next_batch(self):
            inputs, targets = super().next_batch()
            factors = torch.ones(targets.shape)
            factors[: len(factors) // 2] = 0
            return inputs, targets, factors

    class Halved(FakeLoader):
        def next_batch(self):
            inputs, targets = super().next_batch()
            targets = targets.clone()
            targets[: len(targets) // 2] = -1
            return inputs, targets

    runs = [make_run(folder / name, 1, loader()) for name, loader in (("a", Weighted), ("b", Halved))]
    for run in runs:
        run.step_metrics = lambda: {"RL/reward": 0.5}
        train(run)
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]) / 2)  # the count is of targets, whatever they weigh
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(value, weights(runs[1])[name])
    assert runs[0].state.latest["RL/reward"] == 0.5


def losses_of(run):
    return run.state.latest["Loss/train_loss"]


def test_a_step_without_a_gradient_signal_leaves_the_weights(folder):
    """Muon's direction has full length however small the gradient: old momentum alone would go on moving them."""
    seen = []

    class Silent(FakeLoader):
        def next_batch(self):
            inputs, targets = super().next_batch()
            # all weights move from the third step on
            self.has_gradient_signal = self.given <= 4 * self.batches_per_step
            return inputs, targets if self.has_gradient_signal else torch.full_like(targets, -1)

    def remember(step):
        seen.append(weights(run))
        return {}

    run = make_run(folder, 6, Silent(), evaluations=[Evaluation(1, True, remember)])
    train(run)
    for name in seen[0]:
        assert not torch.equal(seen[2][name], seen[3][name])
        assert torch.equal(seen[3][name], seen[4][name]) and torch.equal(seen[4][name], seen[5][name])


def test_warming_kernels_up_changes_nothing(folder):
    cold, warm = (make_run(folder / name, 3, FakeLoader(batch=2)) for name in ("cold", "warm"))
    warm.warm_kernels = warm_kernels
    for run in (cold, warm):
        train(run)
    for name, value in weights(cold).items():
        assert torch.equal(weights(warm)[name], value), name
    for name, value in cold.optimizer.named_state().items():
        assert torch.equal(warm.optimizer.named_state()[name], value), name
    assert warm.state.step == 3 and warm.optimizer.num_steps == 3


def test_the_monitor_looks_at_its_steps_and_moves_nothing(folder):
    plain, watched = make_run(folder / "plain", 6), make_run(folder / "watched", 6)
    watched.monitor = Monitor(watched.model, watched.optimizer, MonitorSettings(3, spectral_every=2))
    train(plain)
    assert recorded("Model/spectral_norm/0.mlp.c_fc") == {}
    train(watched)
    norms = recorded("Model/spectral_norm/0.mlp.c_fc")
    last = torch.linalg.matrix_norm(watched.model.transformer.h[0].mlp.c_fc.weight.detach(), 2).item()
    assert list(norms) == [1, 6] and norms[6] == pytest.approx(last, rel=2.5e-3)
    assert list(recorded("Activations/std/1.attn")) == [1, 3, 6]
    parts = [recorded(f"Optimization/grad_norm/{group['label']}") for group in watched.optimizer.param_groups]
    for step, norm in list(recorded("Optimization/grad_norm").items())[::-1]:
        if step in parts[0]:
            assert math.hypot(*(part[step] for part in parts)) == pytest.approx(norm, rel=1e-5)
    assert not [name for name in watched.state.latest if name.count("/") > 1]  # checkpoints stay small
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(watched)[name]), name


def test_a_rehearsal_does_not_count_as_the_first_event(folder):
    run = make_run(folder, 4, warm_kernels=warm_kernels)
    run.monitor = Monitor(run.model, run.optimizer, MonitorSettings(3))
    train(run)
    assert list(recorded("Model/update_ratio/0.mlp.c_fc")) == [1, 3]


def test_what_follows_from_the_step_is_prepared_before_its_first_forward_pass(folder):
    calls = []
    run = make_run(folder, 2, FakeLoader(batch=4))  # two micro-batches a step
    run.prepare = lambda step: calls.append(step)

    def forward(*args, **kwargs):
        calls.append("forward")
        return run.model(*args, **kwargs)

    run.forward = forward
    train(run)
    assert calls == [0, "forward", "forward", 1, "forward", "forward"]


def test_memory_is_recorded_with_each_step(folder):
    train(make_run(folder, 2))
    peaks = recorded("Hardware/peak_memory_gib")
    assert list(peaks) == [1, 2] and 0 < peaks[1] <= peaks[2]


def test_a_card_without_a_known_peak_is_named_once(folder, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.train.console.peak_flops", lambda device: None)
    monkeypatch.setattr("nanochat.train.console.device_name", lambda device: "Card X")
    Console(make_run(folder, 2), torch.device("cuda"))
    assert capsys.readouterr().out == "no MFU: the bf16 peak of Card X is not in hardware.GPUS\n"
    Console(make_run(folder, 2), torch.device("cpu"))
    assert capsys.readouterr().out == ""


class Node:
    """Something that can refer to itself."""


def cycle() -> weakref.ref:
    node = Node()
    node.self = node
    return weakref.ref(node)


def test_collects_at_multiples_of_every_and_not_in_between():
    with loop.garbage_collection() as collect:
        collect(1)
        garbage = cycle()
        many = [[] for _ in range(100_000)]  # enough to start an automatic collection
        for step in range(2, loop.COLLECT_EVERY):
            collect(step)
        assert garbage() is not None
        collect(loop.COLLECT_EVERY)
        assert garbage() is None
        assert len(many) == 100_000


def test_the_first_call_collects_all_and_freezes_what_lives():
    with loop.garbage_collection() as collect:
        garbage = cycle()
        collect(12_345)  # a resumed run starts anywhere
        assert garbage() is None
        assert gc.get_freeze_count() > 0
        frozen = gc.get_freeze_count()
        later = [[] for _ in range(1000)]
        collect(loop.COLLECT_EVERY)
        assert gc.get_freeze_count() <= frozen and len(later) == 1000  # fewer where something frozen has ended since
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was_after_an_exception(enabled):
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(KeyError), loop.garbage_collection() as collect:
            assert not gc.isenabled()
            collect(1)
            raise KeyError
        assert gc.isenabled() == enabled and gc.get_freeze_count() == 0
    finally:
        gc.enable()


def test_an_evaluation_that_fails_is_reported_and_training_goes_on(folder, capsys):
    def broken(step):
        raise TypeError("'None' has no\nlength")

    measured = Evaluation(2, True, lambda step: {"Eval/x": float(step)})
    run = make_run(folder, 4, evaluations=[Evaluation(2, True, broken, optional="CORE"), measured])
    outcome = train(run)
    assert outcome.finished and outcome.metrics["final x"] == 4.0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not measured")]
    assert len(said) == 2 and run.state.failures == said
    assert said[0].startswith("Not measured at step 2, training went on: CORE: TypeError in test_loop.py, line ")
    assert said[0].endswith("'None' has no length")
    with pytest.raises(TypeError):  # that of the validation loss, in which ranks meet, still ends the run
        train(make_run(folder.with_name("other"), 2, evaluations=[Evaluation(2, True, broken)]))


def fail_on_rank_1():
    def measure():
        if get_dist_info().rank == 1:
            raise KeyError("query")
        return {get_dist_info().rank: {"correct": True}}

    try:
        said = str(gather_records(measure))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, len(gather_records(lambda: {get_dist_info().rank: {}}))  # they meet again afterwards


def test_where_one_rank_cannot_score_no_rank_waits_for_it():
    others = "UserError: rank 1 could not go on: KeyError: 'query'"
    assert run_processes(2, fail_on_rank_1) == [(others, 2), ("KeyError: 'query'", 2)]
