"""Which token comes next in a row: drawn by its settings, or put in by a tool."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.engine.calculator import use_calculator
from nanochat.errors import UserError
from nanochat.kernels.pointwise import TRITON
from nanochat.tokenizer import RustBPETokenizer

TOOL_TOKENS = (
    "<|bos|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)


class Tools(NamedTuple):
    """What the tokens of a row mean."""

    tokenizer: RustBPETokenizer
    specials: dict[str, int]
    """Ids of TOOL_TOKENS."""
    stops: set[int]
    """Tokens that end a row."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are drawn, the same for every prompt of a batch. Raises UserError for impossible values."""

    num_samples: int = 1  # continuations of each prompt
    max_new_tokens: int  # length of a continuation, at most
    temperature: float = 1.0  # logits are divided by it; 0 always takes the likeliest token
    top_k: int | None = None  # draw from this many likeliest tokens; None: from all
    top_logprobs: int | None = None  # log-probabilities of each token and this many likeliest; None: of none
    top_p: float | None = None  # draw from the likeliest tokens that together have this probability; None: from all

    @property
    def drawn_by(self) -> tuple[float, int | None, float | None]:
        """What matters when a token is drawn."""
        return self.temperature, self.top_k, self.top_p

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1, or None for all tokens")


def sample_next_token(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One token for each row of logits (B, V) -> (B,) int64. Temperature 0 takes the largest logit. Row i takes the
    token at which its cumulative probability passes uniform[i], in [0, 1): all rows in one go, where torch.multinomial
    takes one generator for all rows, and a call for each row costs more than the model does."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    if logits.device.type == "cuda" and TRITON and sampling.top_k is not None:
        from nanochat.kernels.decode import MOST_CUT, sample

        if sampling.top_k <= MOST_CUT:
            return sample(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)
    logits = logits.float() / sampling.temperature
    tokens = None
    if sampling.top_k is not None and sampling.top_k < logits.size(-1):
        logits, tokens = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p is not None and sampling.top_p < 1:
        logits, tokens = logits.sort(dim=-1, descending=True)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]  # 1 but for rounding
    if tokens is not None and sampling.top_p is not None:  # up to the token with which the sum reaches top_p
        last = torch.searchsorted(cumulative, sampling.top_p * total).clamp(max=logits.size(-1) - 1)
        total = cumulative.gather(1, last)
    chosen = torch.searchsorted(cumulative, uniform.unsqueeze(1) * total, right=True)  # right: never a probability of 0
    chosen = chosen.clamp(max=logits.size(-1) - 1)
    return (chosen if tokens is None else tokens.gather(1, chosen)).squeeze(1)


class Scores(NamedTuple):
    """Log-probabilities at temperature 1 and before any cut, on the device."""

    chosen: Tensor
    """() fp32, of the token that was sampled."""
    top: Tensor
    """(k,) fp32, of the likeliest tokens."""
    tokens: Tensor
    """(k,) int64: the likeliest tokens."""


class Row:
    """One sample and its tool calls: what is between <|python_start|> and <|python_end|> goes to the calculator, whose
    result, if there is one, is forced in behind it as <|output_start|> result <|output_end|>."""

    def __init__(
        self, tools: Tools, key: tuple[int, int], prompt: Sequence[int], sampling: Sampling, seed: int
    ) -> None:
        self.tools = tools
        self.prompt, self.sample = key  # number of the prompt, and of this sample among those of the prompt
        self.tokens, self.mask, self.sampling = list(prompt), [0] * len(prompt), sampling
        self.new_tokens = 0  # how many of the tokens are no prompt
        self.ended = False
        self.scores: deque[Scores] = deque()  # of tokens that are sampled and not yet here
        self.score: Scores | None = None  # of the newest token, where the sampling asks for it
        self.forced: deque[int] = deque()  # tokens that come next, whatever is sampled
        self.expression: list[int] | None = None  # tokens since <|python_start|>; None outside of a call
        # drawn on the CPU, so that every device gets the same numbers, each row from a generator of its own
        generator = torch.Generator().manual_seed(seed % 2**64)
        self.numbers = torch.rand(sampling.max_new_tokens, generator=generator).tolist()

    def number(self, ahead: int) -> float:
        """In [0, 1): what the next token is drawn with, when `ahead` tokens before it are not here yet."""
        place = self.new_tokens + ahead
        return self.numbers[place] if place < len(self.numbers) else 0.0

    def next_token(self, sampled: int) -> tuple[int, int]:
        """(the token that comes next, 1 if it is the sampled one and 0 if it was forced)."""
        token, mask = (self.forced.popleft(), 0) if self.forced else (sampled, 1)
        self.score = self.scores.popleft() if self.scores else None
        self.tokens.append(token)
        self.mask.append(mask)
        self.new_tokens += 1
        if token in self.tools.stops or self.new_tokens == self.sampling.max_new_tokens:
            self.ended = True
        elif token == self.tools.specials["<|python_start|>"]:
            self.expression = []
        elif token == self.tools.specials["<|python_end|>"] and self.expression is not None:
            if (result := use_calculator(self.tools.tokenizer.decode(self.expression))) is not None:
                output = self.tools.tokenizer.encode(result)
                self.forced.extend(
                    [self.tools.specials["<|output_start|>"], *output, self.tools.specials["<|output_end|>"]]
                )
            self.expression = None
        elif self.expression is not None:
            self.expression.append(token)
        return token, mask


def sample_rows(rows: Sequence[Row], logits: Tensor, ahead: int) -> Tensor:
    """(B,) tokens, each by the settings of its row. ahead: how many tokens of each row the host has not seen yet."""
    numbers = on_device(logits.device, [row.number(ahead) for row in rows])
    kinds = {row.sampling.drawn_by: row.sampling for row in rows}
    if len(kinds) == 1:
        tokens = sample_next_token(logits, numbers, rows[0].sampling)
    else:
        tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        for kind, sampling in kinds.items():
            index = on_device(logits.device, [i for i, row in enumerate(rows) if row.sampling.drawn_by == kind])
            tokens[index] = sample_next_token(logits[index], numbers[index], sampling)
    for i, row in enumerate(rows):
        if row.sampling.top_logprobs is not None:
            logprobs = logits[i].float().log_softmax(-1)
            row.scores.append(Scores(logprobs[tokens[i]], *logprobs.topk(row.sampling.top_logprobs)))
    return tokens


def on_device(device: torch.device, values: list[Any]) -> Tensor:
    """A tensor of these, made without waiting for the device."""
    made = torch.tensor(values, dtype=torch.long if not values or type(values[0]) is int else torch.float32)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made
