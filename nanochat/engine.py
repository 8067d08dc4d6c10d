"""Inference: a KV cache and batched sampling from one prefill."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanochat.errors import UserError


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
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
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
        end = self._position + k.size(1)
        if end > self.max_seq_len:
            raise UserError(f"KV cache of {self.max_seq_len} positions is full: {end} are needed; make it longer")
        keys, values = self.get_layer_cache(layer)
        keys[:, self._position : end] = k
        values[:, self._position : end] = v
        return keys[:, :end], values[:, :end]

    def prefill(self, other: "KVCache") -> None:
        """Take over the contents of `other`, whose single row is repeated for every row here. Must be empty before."""
        assert self._position == 0, f"prefill into a cache that already holds {self._position} positions"
        assert other.k_cache.size(1) in (1, self.k_cache.size(1)), "other must have one row, or as many as this"
        length = other.get_pos()
        assert length <= self.max_seq_len, f"{length} positions do not fit into {self.max_seq_len}"
        self.k_cache[:, :, :length] = other.k_cache[:, :, :length]
        self.v_cache[:, :, :length] = other.v_cache[:, :, :length]
        self.advance(length)


class SpecialTokens(Protocol):
    """The part of a tokenizer that the engine needs."""

    def encode_special(self, text: str) -> int: ...

    def get_bos_token_id(self) -> int: ...


def sample_next(logits: Tensor, generators: Sequence[torch.Generator], temperature: float, top_k: int | None) -> Tensor:
    """One token for each row of logits (B, V) -> (B,) int64. Temperature 0 takes the largest logit.

    Every row draws from its own generator, so that a row gets the same tokens whatever the size of the batch.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    draws = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(draws)


class Engine:
    """Samples continuations of one prompt in a batch."""

    def __init__(self, model, tokenizer: SpecialTokens) -> None:
        self.model = model
        self.forward = model if callable(model) else model.forward  # stand-ins of a model need not be modules
        self.tokenizer = tokenizer

    def _cache(self, batch_size: int, length: int) -> KVCache:
        config, device = self.model.config, self.model.get_device()
        dtype = getattr(self.model, "compute_dtype", torch.float32)
        head_dim = config.n_embd // config.n_head
        return KVCache(batch_size, config.n_kv_head, length, head_dim, config.n_layer, device, dtype)

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (token column, mask column), each with num_samples entries, until every row has ended.

        A row ends with <|assistant_end|> or <|bos|> (yielded too; what follows in that row means nothing).
        Mask 1 = sampled. max_tokens=None goes on to the model's sequence_len. Raises UserError for an empty prompt.
        """
        if not tokens:
            raise UserError("empty prompt: give at least one token (the <|bos|> token starts a document)")
        if temperature < 0:
            raise UserError(f"temperature={temperature}: must be 0 (greedy) or more")
        if max_tokens is None:
            max_tokens = max(0, self.model.config.sequence_len - len(tokens))
        device = self.model.get_device()
        stops = {self.tokenizer.get_bos_token_id(), self.tokenizer.encode_special("<|assistant_end|>")}
        generators = [torch.Generator(device=device).manual_seed(seed + row) for row in range(num_samples)]

        prompt_cache = self._cache(1, len(tokens))
        prompt = torch.tensor([list(tokens)], dtype=torch.long, device=device)
        # Only the distribution is shared between the samples; each row draws its own first token from it.
        logits = self.forward(prompt, kv_cache=prompt_cache)[:, -1].expand(num_samples, -1)
        cache = self._cache(num_samples, len(tokens) + max_tokens)
        cache.prefill(prompt_cache)
        del prompt_cache

        ended = [False] * num_samples
        for step in range(max_tokens):
            column = sample_next(logits, generators, temperature, top_k)
            values = column.tolist()
            yield values, [1] * num_samples
            ended = [done or value in stops for done, value in zip(ended, values, strict=True)]
            if all(ended) or step == max_tokens - 1:
                return
            logits = self.forward(column.unsqueeze(1), kv_cache=cache)[:, -1]

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **options: object
    ) -> tuple[list[list[int]], list[list[int]]]:
        """All at once: (sequences, masks), each row starting with the prompt (mask 0) and without its stop token."""
        stops = {self.tokenizer.get_bos_token_id(), self.tokenizer.encode_special("<|assistant_end|>")}
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        ended = [False] * num_samples
        for column, column_mask in self.generate(tokens, num_samples, **options):  # type: ignore[arg-type]
            for row, (token, mask) in enumerate(zip(column, column_mask, strict=True)):
                ended[row] = ended[row] or token in stops
                if not ended[row]:
                    sequences[row].append(token)
                    masks[row].append(mask)
        return sequences, masks
