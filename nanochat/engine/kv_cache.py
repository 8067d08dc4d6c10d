"""Keys and values that attention has computed, so that a token is read once."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.config import LOOK_BACK
from nanochat.errors import UserError

CHUNK = 512  # tokens of a prompt, at most, that go through the model at a time
ROW_STATE = ("cache_seqlens", "last_tokens", "document_starts")  # tensors with an entry for each row


class KVCache:
    """Keys and values of all layers, preallocated as (L, B, T, H, D); row b holds its first cache_seqlens[b] positions.

    windows: how far back each layer looks (-1: to the start). A layer that looks back w positions needs no more than
    w + 1 + 2 * CHUNK, and keeps position p at p modulo that; k_cache and v_cache are then a list with a tensor a layer.
    key_offset: of a model whose keys have a part of the token before; what the last token passes on to the next lies in
    the next one's place already, and there is one place more.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        windows: Sequence[int] = (),
        key_offset: bool = False,
    ) -> None:
        sizes = [
            seq_len if window < 0 else min(seq_len, window + 1 + 2 * CHUNK) for window in windows or [-1] * num_layers
        ]

        self.extra = int(key_offset)

        def zeros(*layers: int, size: int) -> Tensor:
            # the vectors of a head lie together: 3.3 ms for 4.8 in attention on a CPU
            shape = *layers, batch_size, num_heads, size + self.extra, head_dim
            return torch.zeros(shape, device=device, dtype=dtype).transpose(-3, -2)

        self.k_cache: Any
        self.v_cache: Any
        if min(sizes) == seq_len:
            self.k_cache, self.v_cache = (zeros(num_layers, size=seq_len) for _ in "kv")
        else:
            self.k_cache, self.v_cache = ([zeros(size=size) for size in sizes] for _ in "kv")
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.lengths = np.zeros(batch_size, dtype=np.int64)  # the same on the host: no step waits for the device
        self.last_tokens = torch.zeros(batch_size, LOOK_BACK, dtype=torch.long, device=device)
        self.document_starts = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._back = torch.arange(LOOK_BACK, device=device)
        self.incoming: Tensor | None = None  # (B,) tokens of the next forward pass that count; None: all of them
        self.max_seq_len = seq_len
        self._position: Tensor | None = None  # (B, T) of the tokens of the forward pass that is going on

    def get_pos(self) -> int:
        """Positions filled so far, of the row that has most."""
        return int(self.lengths.max(initial=0))

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (B, T, H, D), filled up to cache_seqlens."""
        return self.k_cache[layer], self.v_cache[layer]

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.lengths[:] = 0
        for tensor in self.row_state():
            tensor.zero_()

    def row_state(self) -> list[Tensor]:
        """What the device knows of the rows, beside keys and values."""
        return [getattr(self, name) for name in ROW_STATE]

    # ---- what the model calls, in this order

    def begin(self, num_tokens: int) -> Tensor:
        """(B, num_tokens) positions of the tokens of this forward pass."""
        if self._position is None:
            end = self.get_pos() + num_tokens
            if end > self.max_seq_len:
                raise UserError(f"KV cache of {self.max_seq_len} positions is full: {end} are needed; make it longer")
            steps = torch.arange(num_tokens, device=self.cache_seqlens.device)
            self._position = self.cache_seqlens.unsqueeze(1) + steps
        return self._position

    def mask(self, layer: int, window: int, first: Tensor | None) -> Tensor:
        """(B, 1, T, keys) bool: which of the keys that `insert` returns a query may see: at most its own position, at
        most `window` positions back, none before `first` (B, T)."""
        assert self._position is not None
        query, size = self._position.unsqueeze(2), self.get_layer_cache(layer)[0].size(1)
        end = self.get_pos() + query.size(1)
        if size < self.max_seq_len:  # the last position of each row that modulo `size` is this place's
            last = query[:, -1:] - (query[:, -1:] - torch.arange(min(size, end), device=query.device)) % size
        else:
            last = torch.arange(end, device=query.device).view(1, 1, -1)
        visible = (last <= query) & (last >= 0)
        if window >= 0:
            visible &= query - last <= window
        if first is not None:
            visible &= last >= first.unsqueeze(2)
        return visible.unsqueeze(1)

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, T, H, D) behind what this layer holds; returns its keys and values (B, keys, H, D)."""
        keys, values = self.get_layer_cache(layer)
        position, size = self.begin(k.size(1)), keys.size(1)
        row, place = torch.arange(k.size(0), device=k.device).unsqueeze(1), position % size
        keys[row, place], values[row, place] = k, v
        end = self.get_pos() + k.size(1)
        return keys[:, : min(end, size)], values[:, : min(end, size)]

    def note_tokens(self, idx: Tensor) -> None:
        """Remember the last tokens of each row, of idx (B, T) and what was before. Of T = 1 every one counts, or
        belongs to a row of which this is not asked again."""
        text = torch.cat([self.last_tokens, idx], dim=1)
        if self.incoming is None or idx.size(1) == 1:
            self.last_tokens.copy_(text[:, -LOOK_BACK:])
        else:
            self.last_tokens.copy_(text.gather(1, self.incoming.long().unsqueeze(1) + self._back))

    def carried(self, layer: int) -> Tensor:
        """(B, 1, H, 2, D/4): what the last token of each row passes on to the next one's key."""
        keys, (row, place) = self.get_layer_cache(layer)[0], self._places(layer, self.cache_seqlens)
        return keys.unflatten(-1, (2, 2, -1))[row, place, :, :, 1].unsqueeze(1)

    def carry(self, layer: int, slow: Tensor, carried: Tensor) -> None:
        """Keep what the last of these tokens passes on, of slow (B, T, H, 2, D/4); called behind `insert`. Where no
        token of a row counts, that is what was carried before."""
        keys, count = self.get_layer_cache(layer)[0], slow.size(1)
        counts = torch.full_like(self.cache_seqlens, count) if self.incoming is None else self.incoming
        row, place = self._places(layer, self.cache_seqlens + counts)
        keys.unflatten(-1, (2, 2, -1))[row, place, :, :, 1] = torch.cat([carried, slow], dim=1)[row, counts.long()]

    def _places(self, layer: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) rows and the places in this layer of one position in each."""
        size = self.get_layer_cache(layer)[0].size(1)
        return torch.arange(len(position), device=position.device), position.long() % size

    def last(self, x: Tensor) -> Tensor:
        """(B, ...): of x (B, T, ...) what belongs to the last token of each row that counts."""
        if self.incoming is None:
            return x[:, -1]
        return x[torch.arange(len(x), device=x.device), self.incoming.long() - 1]

    def advance(self, num_tokens: int) -> None:
        """Called once per forward, after the last layer has inserted its keys."""
        self._position = None
        if self.incoming is None:
            self.lengths += num_tokens
            self.cache_seqlens += num_tokens
        else:
            self.lengths += self._incoming_on_host
            self.cache_seqlens += self.incoming

    def take(self, counts: Sequence[int]) -> None:
        """Of the tokens of the next forward pass, counts[b] of row b count, from the left; the others are padding."""
        self._incoming_on_host = np.array(counts)
        self.incoming = torch.tensor(counts, dtype=torch.int32, device=self.cache_seqlens.device)

    def fixed(self, rows: int, incoming: Tensor) -> "KVCache":
        """The first rows, for a step that can be recorded: rows go on by `incoming` (rows,) int32, 0 or 1, on the
        device alone; whoever replays it adds that to `lengths`."""
        part = self.rows(0, rows)
        part.incoming, part._incoming_on_host = incoming, np.zeros(rows, dtype=np.int64)
        return part

    # ---- rows

    def rows(self, start: int, stop: int) -> "KVCache":
        """These rows as a cache that shares the memory."""
        part = copy.copy(self)
        for name in ("lengths", *ROW_STATE):
            setattr(part, name, getattr(self, name)[start:stop])
        for name in ("k_cache", "v_cache"):
            cached = getattr(self, name)
            parts = cached[:, start:stop] if isinstance(cached, Tensor) else [layer[start:stop] for layer in cached]
            setattr(part, name, parts)
        return part

    def can_rewind(self, row: int, length: int) -> bool:
        """Whether all that positions from `length` on look at is still there."""
        lost = int(self.lengths[row]) - length
        return lost <= CHUNK or all(layer.size(1) >= self.max_seq_len for layer in self.k_cache)

    def rewind(self, row: int, tokens: Sequence[int], document_token: int) -> None:
        """Forget what this row holds behind these, its first tokens."""
        self.lengths[row] = self.cache_seqlens[row] = len(tokens)
        self.last_tokens[row] = torch.tensor([*[0] * LOOK_BACK, *tokens][-LOOK_BACK:], device=self.last_tokens.device)
        begins = [i for i, token in enumerate(tokens) if token == document_token]
        self.document_starts[row] = begins[-1] if begins else 0

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], other: "KVCache | None" = None) -> None:
        """Row targets[i] becomes what row sources[i] was, in `other` or here."""
        other, device = self if other is None else other, self.cache_seqlens.device
        most = int(other.lengths[list(sources)].max(initial=0)) + self.extra
        if not len(sources):
            return
        of, to = torch.tensor(list(sources), device=device), torch.tensor(list(targets), device=device)
        for mine, others in ((self.k_cache, other.k_cache), (self.v_cache, other.v_cache)):
            for layer, its in zip(mine, others, strict=True):
                layer[:, : its[:, :most].size(1)][to] = its[:, :most][of]
        for tensor, its in zip(self.row_state(), other.row_state(), strict=True):
            tensor[to] = its[of]
        self.lengths[list(targets)] = other.lengths[list(sources)]

    def prefill(self, other: "KVCache") -> None:
        """Copy `other` in, each row of it repeated as often as there is room for. Must be empty before."""
        assert self.get_pos() == 0, f"prefill into a cache that already holds {self.get_pos()} positions"
        rows, repeats = range(len(self.lengths)), len(self.lengths) // len(other.lengths)
        self.copy_rows([row // repeats for row in rows], rows, other)
