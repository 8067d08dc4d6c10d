"""Reinforcement learning as a data loader: questions are answered by the model as it is now, and what it said becomes
the next batch, every sampled token weighted by how much better its answer was than the others to the same question.

The policy gradient. With rewards r of n answers to one question, the advantage of answer i is r_i - mean(r); the loss
-sum(advantage * log p(token)) / number of tokens has the gradient of the expected reward (REINFORCE with a baseline;
Williams 1992). Every token counts the same, long answers or short. The answers come from the very weights that are
updated, so there is no ratio to old probabilities and nothing to clip; there is no KL term.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from nanochat.data.chat_rows import epoch_order
from nanochat.data.rows import even_batches
from nanochat.engine import Engine, Sampling
from nanochat.errors import UserError
from nanochat.runtime import IGNORE_INDEX
from nanochat.tasks.common import Conversation, Task
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.run import Loader

# Answers sampled together for each row of a device batch: keys and values of a row (15 MB in a d12 at 400 tokens) are a
# small part of what a row costs in training.
SAMPLED_PER_ROW = 16
REWARD = "RL/reward"  # mean reward of the answers of a step
SAMPLED_TOKENS = "RL/sampled_tokens"  # mean length of an answer, tokens
TEACHING_SHARE = "RL/teaching_share"  # questions whose answers differ in reward, over all


class RolloutBatch(NamedTuple):
    """inputs, targets (B, T) int64 with -1 where the token was not sampled, weights (B, T) fp32: the advantages."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


class Answer(NamedTuple):
    """One sampled answer: all tokens with the question's, 1 where they were sampled, and what it was worth."""

    tokens: list[int]
    mask: list[int]
    reward: float


def advantages(rewards: np.ndarray) -> np.ndarray:
    """(questions, samples) rewards -> how much better each is than the mean of its question."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def row_width(tokenizer: RustBPETokenizer, task: Task, max_new_tokens: int, sequence_len: int) -> int:
    """Length of a training row: room for the longest question and max_new_tokens, in steps of 32, at most sequence_len.

    Raises UserError when the longest question does not leave room for an answer.
    """
    longest = max(len(tokenizer.render_for_completion(task[i])) for i in range(len(task)))
    if longest + max_new_tokens > sequence_len:
        raise UserError(
            f"--max-new-tokens={max_new_tokens}: the longest question of {task.name} has {longest} tokens, the model's "
            f"context {sequence_len}; {max(sequence_len - longest, 0)} are left for an answer"
        )
    return min(-(-(longest + max_new_tokens) // 32) * 32, sequence_len)


def questions_at_once(device_batch_size: int, num_samples: int) -> int:
    """Questions answered in one batch, so that memory follows the device batch."""
    return max(1, SAMPLED_PER_ROW * device_batch_size // num_samples)


def loss_of_taught(
    model: Callable[..., Any], inputs: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor, **options: Any
) -> Any:
    """The model's loss, the same but for rounding; on a CPU without the rows that weigh nothing, of answers as good as
    all others to their question, and the padding behind the longest of the rest: most of the arithmetic of a step."""
    if not inputs.is_cuda:  # there, attention is planned anew for each shape
        taught = (targets != IGNORE_INDEX) & (loss_weights != 0)
        taught[0, 0] = True  # all ranks have a part in a step, those too whose answers teach nothing
        rows, width = taught.any(1), int(taught.any(0).nonzero()[-1]) + 1
        inputs, targets, loss_weights = (part[rows, :width] for part in (inputs, targets, loss_weights))
    return model(inputs, targets, loss_weights=loss_weights, **options)


class RolloutLoader(Loader):
    """The loop's loader: each optimizer step is questions_per_step new questions, num_samples answers to each.

    Questions come in an order drawn from the seed and are assigned one by one to any number of ranks: a rank with fewer
    questions than others has rows of filler, without targets, so that all make the same micro-batches. Answers are
    drawn with seeds that follow from the position in that order, so that a resumed run repeats the one that was
    stopped. `unsharded` is entered by all ranks to sample: each then holds all weights.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        sampling: Sampling,
        questions_per_step: int,
        device_batch_size: int,
        width: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        state: dict[str, Any] | None = None,
        unsharded: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.engine, self.task, self.sampling, self.width = engine, task, sampling, width
        self.unsharded = unsharded
        self.questions_per_step = questions_per_step
        self.answered_at_once = questions_at_once(device_batch_size, sampling.num_samples)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        rows_of_first = -(-questions_per_step // world_size) * sampling.num_samples  # no rank has more
        self.batches_per_step, self.device_batch_size = even_batches(rows_of_first, device_batch_size)
        self.position = self._check(state)
        self.metrics: dict[str, float] = {}
        self._ready: list[RolloutBatch] = []

    def _check(self, state: dict[str, Any] | None) -> int:
        if state is None:
            return 0
        before, position = (state.get("seed"), state.get("questions")), state.get("position")
        if before != (self.seed, len(self.task)) or type(position) is not int:
            raise UserError(f"cannot resume: {before[1]} questions by seed {before[0]}, {position} of them asked, "
                            f"are now {len(self.task)} by seed {self.seed}")  # fmt: skip
        return position

    def next_batch(self) -> RolloutBatch:
        """The next (device_batch_size, width) micro-batch; the first of a step answers all questions of the step."""
        if not self._ready:
            self._ready = self._roll_out()
        return self._ready.pop(0)

    def _roll_out(self) -> list[RolloutBatch]:
        places = range(self.position, self.position + self.questions_per_step)[self.rank :: self.world_size]
        epochs = [divmod(place, len(self.task)) for place in places]
        conversations = [self.task[int(epoch_order(self.seed, n, len(self.task))[i])] for n, i in epochs]
        with self.unsharded():
            answers = self._answer(conversations, list(places))
        self.position += self.questions_per_step
        rewards = np.array([answer.reward for group in answers for answer in group])
        rewards = rewards.reshape(-1, self.sampling.num_samples)  # of no questions, on some of very many ranks
        self._measure(answers, rewards)
        flat = [answer for group in answers for answer in group]
        rows = self._rows(flat, advantages(rewards).ravel())
        parts = zip(*(part.split(self.device_batch_size) for part in rows), strict=True)
        return [RolloutBatch(*part) for part in parts]

    def _answer(self, conversations: list[Conversation], places: list[int]) -> list[list[Answer]]:
        """The answers to each question, with their rewards; as many at a time as the device batch allows."""
        tokenizer, stops, count = self.engine.tokenizer, self.engine.tools.stops, self.sampling.num_samples
        prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
        seeds = [self.seed * 1_000_003 + place * count for place in places]
        results = self.engine.generate_many(prompts, self.sampling, seeds, True, self.answered_at_once * count)
        groups = []
        for conversation, prompt, (sequences, masks) in zip(conversations, prompts, results, strict=True):
            said = [sequence[len(prompt) :] for sequence in sequences]
            texts = [tokenizer.decode(tokens[:-1] if tokens[-1] in stops else tokens) for tokens in said]
            rewards = [self.task.reward(conversation, text) for text in texts]
            groups.append([Answer(*answer) for answer in zip(sequences, masks, rewards, strict=True)])
        return groups

    def _rows(self, answers: list[Answer], weights: np.ndarray) -> RolloutBatch:
        """All answers as rows of self.width positions, padded with the stop token and no targets; then filler."""
        count = self.batches_per_step * self.device_batch_size
        pad = self.engine.tools.specials["<|assistant_end|>"]
        tokens = torch.full((count, self.width + 1), pad, dtype=torch.long)
        sampled = torch.zeros(count, self.width + 1, dtype=torch.bool)
        for row, answer in enumerate(answers):
            length = len(answer.tokens)
            assert length <= self.width + 1, f"an answer that ends at {length} in rows of {self.width}: see row_width"
            tokens[row, :length] = torch.tensor(answer.tokens)
            sampled[row, :length] = torch.tensor(answer.mask, dtype=torch.bool)
        targets = torch.where(sampled[:, 1:], tokens[:, 1:], IGNORE_INDEX)
        factors = torch.zeros(count, self.width)
        factors[: len(answers)] = torch.from_numpy(weights).float().unsqueeze(1)
        device = self.engine.model.get_device()
        return RolloutBatch(tokens[:, :-1].to(device), targets.to(device), factors.to(device))

    def _measure(self, answers: list[list[Answer]], rewards: np.ndarray) -> None:
        """Means over the answers of all ranks; questions whose answers differ in reward give a gradient."""
        lengths = sum(sum(answer.mask) for group in answers for answer in group)
        teaching = int((rewards.min(axis=1) < rewards.max(axis=1)).sum())
        sums = torch.tensor([rewards.sum(), lengths, teaching], dtype=torch.float32)
        if self.world_size > 1:
            sums = sums.to(self.engine.model.get_device())
            dist.all_reduce(sums)
        reward, length, teaching = sums.tolist()
        self.has_gradient_signal = teaching > 0
        count = self.questions_per_step * self.sampling.num_samples
        self.metrics = {
            REWARD: reward / count,
            SAMPLED_TOKENS: length / count,
            TEACHING_SHARE: teaching / self.questions_per_step,
        }

    def state_dict(self) -> dict[str, Any]:
        assert not self._ready, "the state is taken between optimizer steps"
        return {"seed": self.seed, "questions": len(self.task), "position": self.position}

    def epoch(self) -> float:
        """How often the questions have been gone through."""
        return self.position / len(self.task)
