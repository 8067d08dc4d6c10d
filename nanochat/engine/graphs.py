"""Decoding steps as CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.engine.kv_cache import KVCache
from nanochat.engine.sampling import Row, Sampling, on_device, sample_next_token, sample_rows

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # numbers of rows that steps are recorded for


class Graphs:
    """Steps of a batch, recorded as CUDA graphs, so that the host launches one thing a step and not some hundred
    kernels: one for each number of rows (rounded up) and way of sampling. `forward` gives logits (B, V) after idx
    (B, 1) and a cache that is `fixed`."""

    def __init__(self, cache: KVCache, forward: Callable[[Tensor, KVCache], Tensor], count: int) -> None:
        self.cache, self.forward, self.size, device = cache, forward, count, cache.cache_seqlens.device
        self.recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None
        self.tokens = torch.zeros(count, 1, dtype=torch.long, device=device)  # that are read, then those sampled
        self.numbers = torch.zeros(count, device=device)
        self.incoming = torch.zeros(count, dtype=torch.int32, device=device)  # 1 for live rows, 0 for those beyond
        self.live = 0

    def _kind(self, live: Sequence[Row]) -> tuple[int, Sampling | None]:
        """Number of rows that a step for these has, and how it samples; None: not as a part of the step."""
        count = min(next((size for size in ROWS if size >= len(live)), self.size), self.size)
        alike = len({row.sampling.drawn_by for row in live}) == 1
        return count, live[0].sampling if alike and all(row.sampling.top_logprobs is None for row in live) else None

    def are_recorded(self, live: Sequence[Row]) -> bool:
        """Whether the step for these rows is there, if there are any."""
        count, sampling = self._kind(live)
        return bool(live) and (count, sampling and sampling.drawn_by) in self.recorded

    def step(self, live: Sequence[Row], tokens: Tensor, ahead: int) -> Tensor:
        """The live rows, which are the first of the cache, read tokens (rows,) and sample the next (rows,), which the
        step after the next overwrites; ahead: see sample_rows."""
        rows, (count, sampling) = len(live), self._kind(live)
        if tokens.data_ptr() != self.tokens.data_ptr():  # not what the last step sampled
            self.tokens[:rows, 0].copy_(tokens)
        if sampling is not None and sampling.temperature:
            self.numbers[:rows].copy_(on_device(tokens.device, [row.number(ahead) for row in live]))
        if rows != self.live:
            self.incoming[:rows].fill_(1)
            self.incoming[rows:].zero_()
            self.live = rows
        key = count, sampling and sampling.drawn_by
        if key not in self.recorded:
            self.recorded[key] = self._record(count, sampling)
        graph, out = self.recorded[key]
        graph.replay()
        self.cache.lengths[:rows] += 1
        return self.tokens[:rows, 0] if sampling else sample_rows(live, out[:rows], ahead)

    def _record(self, count: int, sampling: Sampling | None) -> tuple[Any, Tensor]:
        cache = self.cache.fixed(count, self.incoming[:count])

        def run() -> Tensor:
            logits = self.forward(self.tokens[:count], cache)
            if sampling is not None:
                self.tokens[:count, 0] = sample_next_token(logits, self.numbers[:count], sampling)
            return logits

        # once outside of the graph, for what kernels set up on first use; nothing of it may stay
        state = [*cache.row_state(), self.tokens]
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others may go on
            out = run()
        self.pool = graph.pool()
        return graph, out
