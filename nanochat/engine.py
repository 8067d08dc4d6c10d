"""Inference: a KV cache, batched sampling from one prefill, and the calculator that a model may call."""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.calculator import use_calculator
from nanochat.errors import UserError
from nanochat.runtime import heartbeat
from nanochat.tokenizer import RustBPETokenizer

TOOL_TOKENS = (
    "<|bos|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are drawn, the same for every prompt of a batch. Raises UserError for impossible values."""

    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int  # length of a continuation, at most
    temperature: float = 1.0  # logits are divided by it; 0 always takes the likeliest token
    top_k: int | None = None  # draw from this many likeliest tokens; None: from all

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be 1 or more, or None for all tokens")


class KVCache:
    """Keys and values of all layers, preallocated as (L, B, T, H, D); every row is at the same position."""

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = torch.zeros(batch_size, seq_len, device=device, dtype=torch.long)  # what was read so far
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.starts: Tensor | None = None  # (B,) first position of each row that counts; None: all of them do
        self.max_seq_len = seq_len
        self._position = 0  # the same number on the host, so that a decoding step need not wait for the device

    def get_pos(self) -> int:
        """Positions filled so far."""
        return self._position

    def advance(self, num_tokens: int) -> None:
        """Called once per forward, after the last layer has inserted its keys."""
        self._position += num_tokens
        self.cache_seqlens += num_tokens

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._position = 0
        self.cache_seqlens.zero_()

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (B, T, H, D), filled up to get_pos()."""
        return self.k_cache[layer], self.v_cache[layer]

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, Tq, H, D) behind what this layer holds; returns its keys and values (B, pos + Tq, H, D)."""
        end = self._end(k.size(1))
        keys, values = self.get_layer_cache(layer)
        keys[:, self._position : end] = k
        values[:, self._position : end] = v
        return keys[:, :end], values[:, :end]

    def insert_tokens(self, idx: Tensor) -> Tensor:
        """Put tokens (B, Tq) behind those read so far; returns all of them (B, pos + Tq)."""
        end = self._end(idx.size(1))
        self.tokens[:, self._position : end] = idx
        return self.tokens[:, :end]

    def _end(self, more: int) -> int:
        end = self._position + more
        if end > self.max_seq_len:
            raise UserError(f"KV cache of {self.max_seq_len} positions is full: {end} are needed; make it longer")
        return end

    def prefill(self, other: "KVCache") -> None:
        """Copy `other` in, each row of it repeated as often as there is room for. Must be empty before."""
        assert self._position == 0, f"prefill into a cache that already holds {self._position} positions"
        repeats, length = self.k_cache.size(1) // other.k_cache.size(1), other.get_pos()
        self.k_cache[:, :, :length] = other.k_cache[:, :, :length].repeat_interleave(repeats, dim=1)
        self.v_cache[:, :, :length] = other.v_cache[:, :, :length].repeat_interleave(repeats, dim=1)
        self.tokens[:, :length] = other.tokens[:, :length].repeat_interleave(repeats, dim=0)
        self.starts = None if other.starts is None else other.starts.repeat_interleave(repeats)
        self.advance(length)

    def select(self, rows: Sequence[int]) -> "KVCache":
        """A cache that holds only these rows."""
        index = torch.tensor(rows, device=self.k_cache.device)
        smaller = copy.copy(self)
        smaller.k_cache, smaller.v_cache = self.k_cache[:, index], self.v_cache[:, index]
        smaller.cache_seqlens, smaller.tokens = self.cache_seqlens[index], self.tokens[index]
        smaller.starts = None if self.starts is None else self.starts[index]
        return smaller


def sample_next_token(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token for each row of logits (B, V) -> (B,) int64. Temperature 0 takes the largest logit. Row i takes the
    token at which its cumulative probability passes uniform[i], in [0, 1): all rows in one go, where torch.multinomial
    takes one generator for all rows, and a call for each row costs more than the model does."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / sampling.temperature
    tokens = None
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        logits, tokens = logits.topk(sampling.top_k, dim=-1)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    # relative to the last entry, which is 1 but for rounding; right=True: never a token of probability 0
    chosen = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
    chosen = chosen.clamp(max=logits.size(-1) - 1)
    return (chosen if tokens is None else tokens.gather(1, chosen)).squeeze(1)


class RowState:
    """One sample and its tool calls: what is between <|python_start|> and <|python_end|> goes to the calculator, whose
    result, if there is one, is forced in behind it as <|output_start|> result <|output_end|>."""

    def __init__(self, tokenizer: RustBPETokenizer, specials: dict[str, int], stops: set[int]) -> None:
        self.tokenizer, self.specials, self.stops = tokenizer, specials, stops
        self.ended = False
        self.forced: deque[int] = deque()  # tokens that come next, whatever is sampled
        self.expression: list[int] | None = None  # tokens since <|python_start|>; None outside of a call

    def next_token(self, sampled: int) -> tuple[int, int]:
        """(the token that comes next, 1 if it is the sampled one and 0 if it was forced)."""
        token, mask = (self.forced.popleft(), 0) if self.forced else (sampled, 1)
        if token in self.stops:
            self.ended = True
        elif token == self.specials["<|python_start|>"]:
            self.expression = []
        elif token == self.specials["<|python_end|>"] and self.expression is not None:
            if (result := use_calculator(self.tokenizer.decode(self.expression))) is not None:
                output = self.tokenizer.encode(result)
                self.forced.extend([self.specials["<|output_start|>"], *output, self.specials["<|output_end|>"]])
            self.expression = None
        elif self.expression is not None:
            self.expression.append(token)
        return token, mask


class Engine:
    """Samples continuations of prompts in a batch, and runs the calculator where the model calls for it."""

    def __init__(self, model, tokenizer: RustBPETokenizer) -> None:
        self.model = model
        self.forward = model if callable(model) else model.forward  # stand-ins of a model need not be modules
        self.tokenizer = tokenizer
        self.specials = {name: tokenizer.encode_special(name) for name in TOOL_TOKENS}
        self.stops = {self.specials["<|assistant_end|>"], self.specials["<|bos|>"]}

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (token column, mask column), each with num_samples entries, until every row has ended with
        <|assistant_end|> or <|bos|> (yielded too; what follows in that row means nothing). Mask 1 = sampled, 0 = the
        output of a tool. Row i draws from a generator seeded with seed + i. max_tokens=None goes on to the model's
        sequence_len. Raises UserError for an empty prompt."""
        options = {"num_samples": num_samples, "temperature": temperature, "top_k": top_k}
        sampling = self._sampling(tokens, max_tokens, options)
        yield from self.stream([tokens], sampling, [seed])

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, seed: int = 42, max_tokens: int | None = None, **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """All at once: (sequences, masks), each row starting with the prompt (mask 0) and without its stop token.
        options: temperature, top_k, as for `generate`."""
        sampling = self._sampling(tokens, max_tokens, {"num_samples": num_samples, **options})
        return self.generate_many([tokens], sampling, [seed])[0]

    def _sampling(self, tokens: Sequence[int], max_tokens: int | None, options: dict[str, Any]) -> Sampling:
        room = max(0, self.model.config.sequence_len - len(tokens))
        return Sampling(max_new_tokens=room if max_tokens is None else max_tokens, **options)

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        keep_stop: bool = False,
    ) -> list[tuple[list[list[int]], list[list[int]]]]:
        """What generate_batch gives, for each of several prompts, from one batch of len(prompts) x num_samples rows;
        keep_stop: with the stop token that ended a row. Sample i of prompt p draws from a generator seeded with
        seeds[p] + i (default: 42 for every prompt): but for rounding it does not depend on the rest of the batch."""
        count = sampling.num_samples
        seeds = [42] * len(prompts) if seeds is None else seeds
        sequences = [list(prompt) for prompt in prompts for _ in range(count)]
        masks = [[0] * len(sequence) for sequence in sequences]
        going = set(range(len(sequences)))
        for column, column_mask in self.stream(prompts, sampling, seeds):
            for row in list(going):
                if column[row] in self.stops:
                    going.remove(row)
                if row in going or keep_stop:
                    sequences[row].append(column[row])
                    masks[row].append(column_mask[row])
        firsts = range(0, len(sequences), count)
        return [(sequences[i : i + count], masks[i : i + count]) for i in firsts]

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """(tokens, masks) of all len(prompts) x num_samples rows, one column a step, until every row has ended; rows
        that have ended repeat <|assistant_end|>. seeds: of each prompt's first sample, see generate_many."""
        if not all(prompts):
            raise UserError("empty prompt: give at least one token (the <|bos|> token starts a document)")
        count, device = sampling.num_samples, self.model.get_device()
        rows = [RowState(self.tokenizer, self.specials, self.stops) for _ in range(len(prompts) * count)]
        # drawn on the CPU, so that every device gets the same numbers, each row from a generator of its own
        generators = [torch.Generator().manual_seed((seed + i) % 2**64) for seed in seeds for i in range(count)]
        uniforms = torch.stack([torch.rand(sampling.max_new_tokens, generator=g) for g in generators]).to(device)

        # 1) prefill: every prompt goes through the model once
        prompt_cache, logits = self._prefill(prompts)
        # 2) replicate: the samples of a prompt share its keys, values and distribution; each draws its own first token
        cache = self._cache(len(rows), prompt_cache.get_pos() + sampling.max_new_tokens)
        cache.prefill(prompt_cache)
        del prompt_cache  # its memory is free while the rows are sampled
        logits = logits.repeat_interleave(count, dim=0)
        # 3) loop: sample a token for each row and read it
        alive = list(range(len(rows)))  # number of the row that each row of the batch is
        for step in range(sampling.max_new_tokens):
            heartbeat()
            sampled = sample_next_token(logits, uniforms[alive, step], sampling).tolist()
            tokens, masks = [self.specials["<|assistant_end|>"]] * len(rows), [1] * len(rows)
            for number, token in zip(alive, sampled, strict=True):
                if not rows[number].ended:
                    tokens[number], masks[number] = rows[number].next_token(token)
            yield tokens, masks
            going = [i for i, number in enumerate(alive) if not rows[number].ended]
            if not going or step == sampling.max_new_tokens - 1:
                return
            if len(going) <= len(alive) // 2:  # carry no more than twice the rows that are needed
                cache = cache.select(going)
                alive = [alive[i] for i in going]
            column = torch.tensor([[tokens[number]] for number in alive], dtype=torch.long, device=device)
            logits = self.forward(column, kv_cache=cache)[:, -1]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[KVCache, Tensor]:
        """(cache filled with the prompts, logits (len(prompts), V) of what follows each). Shorter prompts are padded on
        the left, so that all rows are at the same position; rotary positions count only by their differences."""
        width = max(map(len, prompts))
        starts = [width - len(prompt) for prompt in prompts]
        bos = self.specials["<|bos|>"]
        padded = [[bos] * start + list(prompt) for start, prompt in zip(starts, prompts, strict=True)]
        device = self.model.get_device()
        cache = self._cache(len(prompts), width)
        if any(starts):
            cache.starts = torch.tensor(starts, device=device)
        idx = torch.tensor(padded, dtype=torch.long, device=device)
        return cache, self.forward(idx, kv_cache=cache)[:, -1]

    def _cache(self, batch_size: int, length: int) -> KVCache:
        config = self.model.config
        dtype = getattr(self.model, "compute_dtype", torch.float32)
        shape = (batch_size, config.n_kv_head, length, config.n_embd // config.n_head, config.n_layer)
        return KVCache(*shape, self.model.get_device(), dtype)
