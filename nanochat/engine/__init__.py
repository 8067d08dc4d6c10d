"""Inference: a KV cache, batched sampling from one prefill, and the calculator that a model may call."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from nanochat.dtensor import is_sharded
from nanochat.engine.batch import Batch
from nanochat.engine.kv_cache import KVCache as KVCache
from nanochat.engine.sampling import TOOL_TOKENS, Row, Sampling, Tools
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.kernels.pointwise import TRITON
from nanochat.tokenizer import RustBPETokenizer

PROMPTS_AT_ONCE = 16  # that go through the model together
KEPT = 2**29  # bytes of a cache, at most, that stays with its recorded steps for the next batch of its shape
LENGTHS = 256  # there, caches are made for a multiple of so many tokens, so that shapes come again


class Engine:
    """Samples continuations of prompts in a batch, and runs the calculator where the model calls for it."""

    def __init__(self, model, tokenizer: RustBPETokenizer) -> None:
        self.model = model
        self._copy: GPT | None = None
        self._version = -1
        self._idle: Batch | None = None  # that has ended
        self.tokenizer = tokenizer
        specials = {name: tokenizer.encode_special(name) for name in TOOL_TOKENS}
        self.tools = Tools(tokenizer, specials, {specials["<|assistant_end|>"], specials["<|bos|>"]})

    def ready(self) -> Callable[..., Tensor]:
        """What runs the model with the weights it has now: itself, or where it computes in another dtype than it keeps
        unsharded weights in, a copy, which is fused on a GPU."""
        model = self.model
        if not isinstance(model, GPT) or any(is_sharded(param) for param in model.parameters()):
            return model if callable(model) else model.forward  # stand-ins of a model need not be modules
        fuses = TRITON and model.get_device().type == "cuda"
        if model.lm_head.weight.dtype == model.compute_dtype and not fuses:
            return model
        version = sum(param._version for param in model.parameters())  # counts changes in place
        if self._copy is None:
            self._copy = model.inference_copy()
            if fuses:
                from nanochat.engine.fused import fuse  # there is no Triton without a GPU of its kind

                fuse(self._copy)
        elif version != self._version:
            model.update_copy(self._copy)
        self._version = version
        return self._copy

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        top_p: float | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (token column, mask column), each with num_samples entries, until every row has ended with
        <|assistant_end|> or <|bos|> (yielded too; what follows in that row means nothing). Mask 1 = sampled, 0 = the
        output of a tool. Row i draws from a generator seeded with seed + i. max_tokens=None goes on to the model's
        sequence_len. Raises UserError for an empty prompt."""
        options = {"num_samples": num_samples, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = self._sampling(tokens, max_tokens, options)
        yield from self.stream(tokens, sampling, seed)

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, seed: int = 42, max_tokens: int | None = None, **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """All at once: (sequences, masks), each row starting with the prompt (mask 0) and without its stop token.
        options: temperature, top_k, top_p, as for `generate`."""
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
        rows: int | None = None,
    ) -> list[tuple[list[list[int]], list[list[int]]]]:
        """What generate_batch gives, for each of several prompts, at most `rows` samples at once (default: all);
        keep_stop: with the stop token that ended a row. Sample i of prompt p draws from a generator seeded with
        seeds[p] + i (default: 42 for every prompt): but for rounding it does not depend on the rest of the batch."""
        results: list[Any] = [None] * len(prompts)
        for number, sequences, masks in self.answers(prompts, sampling, seeds, rows=rows, keep_stop=keep_stop):
            results[number] = sequences, masks
        return results

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        *,
        limits: Sequence[int] | None = None,
        rows: int | None = None,
        keep_stop: bool = False,
    ) -> Iterator[tuple[int, list[list[int]], list[list[int]]]]:
        """(number of the prompt, sequences, masks), as generate_many gives them, of each prompt as soon as its last
        sample has ended. At most `rows` samples are decoded at once (default: all): others take the places of those
        that have ended. limits: new tokens of each prompt's samples, at most, instead of the sampling's."""
        seeds = [42] * len(prompts) if seeds is None else seeds
        limits = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
        going: dict[int, list[Row]] = {}
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if limit > 0:
                going[number] = self.samples(number, prompt, replace(sampling, max_new_tokens=limit), seeds[number])
            else:
                count = sampling.num_samples
                yield number, [list(prompt)] * count, [[0] * len(prompt)] * count
        batch, stops = self.batch(list(going.values()), rows) if going else None, self.tools.stops
        while batch:
            ended = {row.prompt for row, *_ in batch.step() if row.ended}
            for number in sorted(ended):
                if all(row.ended for row in going[number]):
                    samples = going.pop(number)
                    ends = [len(row.tokens) - (row.tokens[-1] in stops and not keep_stop) for row in samples]
                    pairs = list(zip(samples, ends, strict=True))
                    yield number, [row.tokens[:end] for row, end in pairs], [row.mask[:end] for row, end in pairs]
        if batch is not None:
            self._put_back(batch)

    def samples(self, prompt_number: int, prompt: Sequence[int], sampling: Sampling, seed: int) -> list[Row]:
        """The rows of one prompt. Raises UserError for an empty one."""
        if not prompt:
            raise UserError("empty prompt: give at least one token (the <|bos|> token starts a document)")
        return [Row(self.tools, (prompt_number, i), prompt, sampling, seed + i) for i in range(sampling.num_samples)]

    def batch(self, samples: Sequence[list[Row]], rows: int | None = None) -> Batch:
        """A batch with room for `rows` of these (None: for all), that has taken them all in."""
        total, most = sum(map(len, samples)), max(map(len, samples))
        length = max(len(row.tokens) + row.sampling.max_new_tokens for group in samples for row in group)
        size, forward = total if rows is None else max(most, min(rows, total)), self.ready()
        if hasattr(forward, "step"):
            length = -(-length // LENGTHS) * LENGTHS
        shape = size, min(len(samples), PROMPTS_AT_ONCE), length
        batch, self._idle = self._idle, None
        if batch is None or batch.shape != shape or batch.forward is not forward:
            batch = Batch(self.model, forward, *shape)
        for group in samples:
            batch.join(group)
        return batch

    def _put_back(self, batch: Batch) -> None:
        """What was recorded for this batch, which has ended, serves the next of its shape, unless it is large."""
        if batch.graphs is not None and sum(layer.nbytes for layer in batch.cache.k_cache) <= KEPT // 2:
            batch.cache.reset()
            self._idle = batch

    def stream(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[tuple[list[int], list[int]]]:
        """(tokens, masks) of all samples of a prompt, one column a step, until every row has ended; rows that have
        ended repeat <|assistant_end|>."""
        samples, count = self.samples(0, prompt, sampling, seed), sampling.num_samples
        batch = self.batch([samples]) if sampling.max_new_tokens > 0 else None
        while batch:
            tokens, masks = [self.tools.specials["<|assistant_end|>"]] * count, [1] * count
            for row, token, mask in (column := batch.step()):
                tokens[row.sample], masks[row.sample] = token, mask
            if column:  # else the prompt is still being read
                yield tokens, masks
        if batch is not None:
            self._put_back(batch)
