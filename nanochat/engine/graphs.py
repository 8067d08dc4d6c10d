"""Decoding steps as CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.engine.kv_cache import KVCache
from nanochat.engine.sampling import Row, Sampling, on_device, sample_next_token, sample_rows

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # numbers of rows that steps are recorded for
SPAN = 256  # positions of a row come in multiples of this many in a recorded step


class Graphs:
    """Steps of a batch, recorded as CUDA graphs, so that the host launches one thing a step and not some hundred
    kernels: one for each number of rows (rounded up), number of positions (rounded up) and way of sampling."""

    def __init__(self, cache: KVCache, forward: Callable[..., Tensor], count: int) -> None:
        self.cache, self.forward, self.size, device = cache, forward, count, cache.cache_seqlens.device
        self.recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None
        self.tokens = torch.zeros(count, 1, dtype=torch.long, device=device)
        self.numbers = torch.zeros(count, device=device)
        self.incoming = torch.zeros(count, dtype=torch.int32, device=device)  # 1 for live rows, 0 for those beyond

    def step(self, live: Sequence[Row], tokens: Tensor, ahead: int) -> Tensor:
        """The live rows, which are the first of the cache, read tokens (rows,) and sample the next (rows,); ahead: see
        sample_rows."""
        count, cache = min(next((size for size in ROWS if size >= len(live)), self.size), self.size), self.cache
        span = min(-(-(int(cache.lengths[: len(live)].max()) + 1) // SPAN) * SPAN, cache.max_seq_len)
        alike = len({row.sampling.drawn_by for row in live}) == 1
        sampling = live[0].sampling if alike and all(row.sampling.top_logprobs is None for row in live) else None
        self.tokens[: len(live), 0].copy_(tokens)
        self.numbers[: len(live)].copy_(on_device(tokens.device, [row.number(ahead) for row in live]))
        self.incoming[: len(live)].fill_(1)
        self.incoming[len(live) :].zero_()
        key = count, span, sampling and sampling.drawn_by
        if key not in self.recorded:
            self.recorded[key] = self._record(count, span, sampling)
        graph, out = self.recorded[key]
        graph.replay()
        cache.lengths[: len(live)] += 1
        return out[: len(live)] if sampling else sample_rows(live, out[: len(live)], ahead)

    def _record(self, count: int, span: int, sampling: Sampling | None) -> tuple[Any, Tensor]:
        cache = self.cache.fixed(count, span, self.incoming[:count])

        def run() -> Tensor:
            logits = self.forward(self.tokens[:count], kv_cache=cache)[:, -1]
            return sample_next_token(logits, self.numbers[:count], sampling) if sampling else logits

        # once outside of the graph, for what kernels set up on first use; nothing of it may stay
        kept = [tensor.clone() for tensor in (cache.cache_seqlens, cache.last_tokens, cache.document_starts)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            for tensor, before in zip(
                (cache.cache_seqlens, cache.last_tokens, cache.document_starts), kept, strict=True
            ):
                tensor.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        self.pool = graph.pool()
        return graph, out
