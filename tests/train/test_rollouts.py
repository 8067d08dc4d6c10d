from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tasks.common import Task
from nanochat.train import rollouts
from nanochat.train.rollouts import RolloutLoader, advantages, loss_of_taught, row_width
from tests.processes import run_processes
from tests.test_engine import FIRST_CHARACTER
from tests.test_engine import FakeTokenizer as Letters

BOS, END = 0, 1
SAMPLING = Sampling(num_samples=4, max_new_tokens=10)


class FakeTokenizer(Letters):
    """Conversations are the last message's text."""

    def render_for_completion(self, conversation):
        return [BOS, *self.encode(conversation["messages"][-1]["content"])]


class Characters(Task):
    """The more `e` in an answer, the better."""

    name = "characters"
    eval_type = "generative"

    def num_examples(self):
        return 11

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": "ask" + "!" * index}]}

    def evaluate(self, conversation, completion):
        return "e" in completion

    def reward(self, conversation, completion):
        return completion.count("e") / 10


def make_model():
    model = GPT(GPTConfig(sequence_len=32, vocab_size=110, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.2, generator=generator)
    return model


def make_loader(rank=0, world=1, seed=3, state=None, batch=4, model=None):
    engine = Engine(model or make_model(), FakeTokenizer())
    return RolloutLoader(engine, Characters(), SAMPLING, 4, batch, 32, rank, world, seed, state)


def steps(loader, count):
    """Arrays (steps, rows, width) of inputs, targets, weights."""
    batches = [[loader.next_batch() for _ in range(loader.batches_per_step)] for _ in range(count)]
    return [np.stack([torch.cat([b[i] for b in step]).numpy() for step in batches]) for i in range(3)]


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=6))
def test_advantages_sum_to_nothing_and_keep_the_order(rewards):
    found = advantages(np.array(rewards))
    assert np.allclose(found.sum(axis=1), 0)
    for given_rewards, row in zip(rewards, found, strict=True):
        assert np.allclose(np.subtract.outer(row, row), np.subtract.outer(given_rewards, given_rewards))


def test_rows_hold_the_answers_and_what_they_were_worth():
    loader = make_loader()
    inputs, targets, weights = (part[0] for part in steps(loader, 1))
    assert inputs.shape == targets.shape == weights.shape == (16, 32)
    tokenizer, task, worth = FakeTokenizer(), Characters(), []
    for i in range(16):
        sampled = targets[i] >= 0
        assert (np.diff(np.flatnonzero(sampled)) == 1).all()  # no tools here: one stretch
        first = int(np.flatnonzero(sampled)[0])
        prompt = tokenizer.decode(inputs[i][1 : first + 1])
        assert inputs[i][0] == BOS and prompt.startswith("ask") and set(prompt[3:]) <= {"!"}
        assert (inputs[i][first + 1 : first + sampled.sum()] == targets[i][sampled][:-1]).all()
        said = targets[i][sampled].tolist()
        if len(said) < SAMPLING.max_new_tokens:
            assert said[-1] in (BOS, END)  # ending is a choice of the model's, and is trained on
        worth.append(task.reward({}, tokenizer.decode([t for t in said if t >= FIRST_CHARACTER])))
    groups = np.array(worth).reshape(4, 4)
    assert np.allclose(weights[:, 0].reshape(4, 4), groups - groups.mean(axis=1, keepdims=True), atol=1e-6)
    assert (weights == weights[:, :1]).all()
    assert loader.metrics["RL/reward"] == pytest.approx(np.mean(worth))
    assert loader.metrics["RL/sampled_tokens"] == pytest.approx((targets >= 0).sum() / 16)
    assert loader.metrics["RL/teaching_share"] == np.mean(groups.max(axis=1) > groups.min(axis=1))


def test_tool_output_is_no_target():
    """What the calculator put in was not sampled, so the model earns nothing for it."""

    class Caller(Engine):
        def generate_many(self, prompts, sampling, *_, **options):
            answer, mask, count = [40, 41, 42, END], [1, 0, 0, 1], sampling.num_samples
            return [([[*p, *answer]] * count, [[0] * len(p) + mask] * count) for p in prompts]

    loader = make_loader()
    loader.engine = Caller(loader.engine.model, loader.engine.tokenizer)
    targets = loader.next_batch().targets
    assert [[t for t in row if t >= 0] for row in targets.tolist()] == [[40, END]] * 4


def test_the_gradient_is_that_of_the_expected_reward():
    model = make_model()
    loader = make_loader(model=model, batch=16)
    inputs, targets, weights = loader.next_batch()
    model(inputs, targets, loss_reduction="sum", loss_weights=weights).backward()
    found = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    for row in range(len(inputs)):  # -advantage x log p, token by token
        log_p = model(inputs[row : row + 1])[0].log_softmax(-1)
        for place in range(inputs.size(1)):
            if targets[row, place] >= 0:
                (-weights[row, place] * log_p[place, targets[row, place]]).backward(retain_graph=True)
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], param.grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("equal", [0, 9, 16])
def test_what_teaches_nothing_is_left_out_of_a_loss(equal):
    """So many answers are worth as much as the others to their question."""
    model = make_model()
    inputs, targets, weights = make_loader(model=model, batch=16).next_batch()
    weights[torch.randperm(16)[:equal]] = 0
    shapes, found = [], []

    def watched(inputs, *rest, **options):
        shapes.append(inputs.shape)
        return model(inputs, *rest, **options)

    for loss in (partial(loss_of_taught, watched), watched):
        value = loss(inputs, targets, loss_reduction="sum", loss_weights=weights)
        value.backward()
        found.append([value.detach(), *(param.grad.clone() for param in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert shapes[0][0] <= max(16 - equal, 0) + 1 and shapes[0][1] < shapes[1][1]


def test_a_resumed_loader_repeats_and_answers_differ_between_steps():
    loader = make_loader()
    whole = steps(loader, 5)
    assert loader.epoch() == pytest.approx(20 / 11)
    first = make_loader()
    steps(first, 3)
    rest = steps(make_loader(state=first.state_dict()), 2)
    assert all((a[3:] == b).all() for a, b in zip(whole, rest, strict=True))
    assert (whole[1][0] != whole[1][1]).any()
    with pytest.raises(UserError, match="cannot resume"):
        make_loader(seed=4, state=first.state_dict())
    for state in ({}, {**first.state_dict(), "position": "1"}):
        with pytest.raises(UserError, match="cannot resume"):
            make_loader(seed=3, state=state)


def _rank_rows(batch):
    import torch.distributed as dist

    loader = make_loader(dist.get_rank(), dist.get_world_size(), batch=batch)
    return steps(loader, 2), loader.metrics


@pytest.mark.parametrize(("world", "batch"), [(2, 4), (3, 3), (5, 4)])
def test_ranks_share_the_questions_of_one(world, batch):
    """Four questions; of five ranks one has none."""
    loader = make_loader()
    whole = steps(loader, 2)
    results = run_processes(world, _rank_rows, batch)
    assert len({rows[0].shape for rows, _ in results}) == 1
    merged = [np.full_like(part, -2) for part in whole]
    for rank, (rows, metrics) in enumerate(results):
        mine = [4 * question + answer for question in range(rank, 4, world) for answer in range(4)]
        for part, given_out in zip(merged, rows, strict=True):
            part[:, mine] = given_out[:, : len(mine)]
        assert (rows[1][:, len(mine) :] == -1).all() and (rows[2][:, len(mine) :] == 0).all()
        assert metrics == pytest.approx(loader.metrics)
    for part, expected in zip(merged, whole, strict=True):
        assert np.allclose(part, expected)


def test_width_has_room_for_the_longest_question():
    tokenizer, task = FakeTokenizer(), Characters()  # longest question: BOS and 13 characters
    assert row_width(tokenizer, task, 20, 300) == 64 and row_width(tokenizer, task, 18, 300) == 32
    assert row_width(tokenizer, task, 20, 40) == 40
    with pytest.raises(UserError, match=r"--max-new-tokens=20: the longest question of characters has 14 tokens"):
        row_width(tokenizer, task, 20, 33)


def test_answers_do_not_depend_on_how_many_are_sampled_together(monkeypatch):
    together = steps(make_loader(), 2)
    monkeypatch.setattr(rollouts, "SAMPLED_PER_ROW", 1)
    assert rollouts.questions_at_once(4, 4) == 1
    apart = steps(make_loader(), 2)
    for one, other in zip(together, apart, strict=True):
        assert np.allclose(one, other)
