from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataloader
from nanochat.data import chat_rows
from nanochat.data.chat_rows import ChatPacker, ChatRows, evaluation_rows
from nanochat.dataloader import RowLoader
from nanochat.errors import UserError
from nanochat.runtime import IGNORE_INDEX
from nanochat.tasks.common import Task
from tests.data.synchronous import Synchronous

BOS = 0


class Numbers(Task):
    """Conversation i is some tokens that no other conversation has, trained on from the third on."""

    name = "numbers"

    def __init__(self, lengths, **kwargs):
        super().__init__(**kwargs)
        self.lengths = lengths
        self.first = np.cumsum([1, *lengths])

    def num_examples(self):
        return len(self.lengths)

    def get_example(self, index):
        return list(range(self.first[index], self.first[index] + self.lengths[index]))


class Identity:
    """A tokenizer for them."""

    def get_bos_token_id(self):
        return BOS

    def render_conversation(self, conversation, max_tokens):
        ids = [BOS, *conversation][:max_tokens]
        return ids, [int(i > 2) for i in range(len(ids))]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chat_rows, "CHUNK", 8)


def task(count=30, seed=0):
    return Numbers(np.random.default_rng(seed).integers(1, 12, count).tolist())


def packer(packing="bestfit", loss_on="assistant", seed=0, **options):
    given = options.pop("task") if "task" in options else task(**options)
    return ChatPacker(Identity(), given, 16, packing, loss_on, seed)


def loader_of(source, rows, device_batch, **options):
    return RowLoader(ChatRows(source), rows, device_batch, **options)


def take(loader, steps):
    """(inputs, targets), each (steps, rows of this rank, T)."""
    batches = [[loader.next_batch() for _ in range(loader.batches_per_step)] for _ in range(steps)]
    loader.close()
    return tuple(np.stack([np.concatenate([b[i].numpy() for b in step]) for step in batches]) for i in (0, 1))


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_an_epoch_trains_on_every_token_that_it_should_once(packing, loss_on):
    source = packer(packing, loss_on)
    for epoch in (0, 3):
        chunks = [source.chunk(epoch * source.per_epoch + i) for i in range(source.per_epoch)]
        targets = np.concatenate([chunk.targets.ravel() for chunk in chunks])
        seen = Counter(targets[targets >= 0].tolist())
        tokens = {int(t) for i in range(30) for t in source.task[i][2 if loss_on == "assistant" else 0 :]}
        if packing == "stream":  # the first token of a row is no target
            lost = {int(row[0]) for chunk in chunks for row in chunk.inputs}
            assert tokens - set(seen) <= lost
            tokens -= lost
        assert {token: n for token, n in seen.items() if token in tokens} == dict.fromkeys(tokens, 1)
        assert loss_on == "all" or set(seen) <= {int(t) for i in range(30) for t in source.task[i]}
    assert source.chunk(0).inputs.tolist() != source.chunk(source.per_epoch).inputs.tolist()


def test_targets_follow_inputs():
    chunk = packer(loss_on="all").chunk(0)
    counted = chunk.targets[:, :-1] >= 0
    assert counted.any() and (chunk.inputs[:, 1:][counted] == chunk.targets[:, :-1][counted]).all()


def test_long_conversations_are_cut_and_counted():
    source = packer(task=Numbers([40, 3]))
    chunk = source.chunk(0)
    assert (chunk.cut, chunk.shortened, chunk.emptied) == (41 - 17, 1, 0) and source.rows_per_epoch().cut > 0
    assert packer("stream", task=Numbers([40, 3])).chunk(0)[2:] == (0, 0, 0)


def all_ranks(source, rows, device_batch, world, steps, state=None):
    """((inputs, targets), each (steps, rows, T), of all ranks put together, and the state after them)."""
    merged = [np.full((steps, rows, 16), -2) for _ in range(2)]
    states = []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataloader, "Prefetcher", Synchronous)
            loader = loader_of(source, rows, device_batch, rank=rank, world_size=world, state=state)
        assert loader.device_batch_size <= device_batch
        for step in range(steps):
            batches = [loader.next_batch() for _ in range(loader.batches_per_step)]
            mine = len(range(rank, rows, world))
            for part, name in zip(merged, ("inputs", "targets"), strict=True):
                given_out = np.concatenate([getattr(batch, name).numpy() for batch in batches])
                part[step, rank::world] = given_out[:mine]
                assert (given_out[mine:] == (BOS if name == "inputs" else IGNORE_INDEX)).all()
        states.append((loader.state_dict(), loader.batches_per_step, loader.device_batch_size))
    assert all(one == states[0] for one in states)
    return merged, states[0][0]


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from(["bestfit", "stream"]),
)
@settings(max_examples=15)
def test_any_number_of_ranks_sees_the_same_batches_and_resumes(world, world_after, rows, device_batch, before, packing):
    source = packer(packing)
    expected, _ = all_ranks(source, rows, rows, 1, before + 2)
    first, state = all_ranks(source, rows, device_batch, world, before)
    rest, _ = all_ranks(source, rows, device_batch, world_after, 2, state)
    for whole, *parts in zip(expected, first, rest, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("world", [3, 7, 48, 127, 1024])
def test_any_number_of_ranks_up_to_1024(world, monkeypatch):
    source = packer()
    monkeypatch.setattr(source, "chunk", lru_cache(source.chunk))  # each rank packs all of them
    expected, _ = all_ranks(source, 40, 40, 1, 3)
    first, state = all_ranks(source, 40, 4, world, 1)
    rest, _ = all_ranks(source, 40, 4, world, 2, state)
    for whole, *parts in zip(expected, first, rest, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_threads_give_what_a_plain_loop_gives():
    expected, _ = all_ranks(packer(), 5, 5, 1, 4)
    for rank in range(2):
        inputs, targets = take(loader_of(packer(), 5, 2, rank=rank, world_size=2), 4)
        assert inputs.shape == (4, 4, 16)  # two batches of two, where 3 and 2 rows are real
        for given_out, whole in zip((inputs, targets), expected, strict=True):
            np.testing.assert_array_equal(given_out[:, : 3 - rank], whole[:, rank::2])
        assert (targets[:, 3 - rank :] == IGNORE_INDEX).all() and (inputs[:, 3 - rank :] == BOS).all()


def test_epochs_are_counted():
    loader = loader_of(packer(), 4, 4)
    rows = packer().rows_per_epoch()[0]
    for _ in range(rows // 4):
        loader.next_batch()
    assert loader.epoch() == pytest.approx(1, abs=0.15)
    loader.close()


def test_epochs_are_those_of_the_run_before_where_nothing_is_left_to_do():
    loader = loader_of(packer(), 3, 3)
    take(loader, 7)
    resumed = loader_of(packer(), 3, 3, state=loader.state_dict())
    assert resumed.epoch() == loader.epoch() > 0
    resumed.close()


def test_rows_of_an_epoch_are_exact_for_few_chunks_and_close_for_many(monkeypatch):
    source = packer(count=400)
    true = sum(len(source.chunk(i).inputs) for i in range(source.per_epoch))
    assert packer(count=200).rows_per_epoch()[0] == sum(len(packer(count=200).chunk(i).inputs) for i in range(25))
    assert source.rows_per_epoch()[0] == pytest.approx(true, rel=0.05)


def test_another_set_of_conversations_cannot_be_resumed():
    loader = loader_of(packer(), 4, 4)
    loader.next_batch()
    state = loader.state_dict()
    loader.close()
    with pytest.raises(UserError, match="conversations was 30 and is now 31"):
        loader_of(packer(count=31), 4, 4, state=state)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="no conversations"):
        packer(task=Numbers([]))


def test_a_malformed_conversation_is_raised_where_batches_are_read():
    class Broken(Numbers):
        def get_example(self, index):
            raise UserError("x.jsonl:3: unknown type")

    loader = loader_of(packer(task=Broken([5, 5])), 2, 2)
    with pytest.raises(UserError, match=r"x\.jsonl:3"):
        loader.next_batch()
    loader.close()


def test_evaluation_rows_are_the_first_conversations():
    inputs, targets = evaluation_rows(packer(), 64)
    assert inputs.shape == targets.shape == (4, 16)
    everything, _ = evaluation_rows(packer(), 10**9)
    assert (everything[:4] == inputs).all() and len(everything) > 4


def test_a_step_without_a_target_is_told_on_every_rank():
    """Long questions whose answers lie behind the end of the row, and one short one."""

    class Late(Identity):
        def render_conversation(self, conversation, max_tokens):
            ids = [BOS, *conversation]
            return ids, [int(i > 30 or len(ids) < 10) for i in range(len(ids))]

    def told(rank):
        source = ChatPacker(Late(), Numbers([40] * 5 + [4]), 16, "bestfit", "assistant")
        loader = loader_of(source, 2, 1, rank=rank, world_size=2)
        found = [(loader.next_batch() and loader.has_gradient_signal) for _ in range(6)]
        loader.close()
        return found

    first = told(0)
    assert first == told(1) and True in first and False in first


def test_the_fingerprint_knows_other_conversations():
    assert packer().fingerprint() == packer(seed=5).fingerprint()  # the order is another matter
    assert packer().fingerprint() != packer(count=31).fingerprint()
    other = Numbers([*task().lengths[:-1], task().lengths[-1] + 1])
    assert packer().fingerprint() != packer(task=other).fingerprint()
