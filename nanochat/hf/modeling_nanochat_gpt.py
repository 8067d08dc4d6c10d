"""nanochat's model for transformers, which runs this file with `trust_remote_code=True`.

Exports hold it as one file, with the parts of nanochat that it needs in front (nanochat.hf.one_file).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nanochat.engine.kv_cache import CHUNK, KVCache
from nanochat.gpt import GPT, GPTConfig

# what older versions of transformers call past_key_values
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NanochatGPTConfig(PretrainedConfig):
    """`gpt` holds the fields of GPTConfig; the others say the same in the words of other programs."""

    model_type = "nanochat_gpt"

    def __init__(self, gpt: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.gpt = gpt or {}
        super().__init__(**kwargs)


class GrowingCache(KVCache):
    """A KV cache that grows, with what `generate` asks of caches."""

    is_compileable = False
    is_linear = (False,)
    columns = 0  # of the input that have been read, padding included

    @classmethod
    def of(cls, model: GPT, rows: int, length: int) -> "GrowingCache":
        config = model.config
        shape = rows, config.n_kv_head, length, config.head_dim, config.n_layer
        windows = [config.window(layer) for layer in range(config.n_layer)]
        return cls(*shape, model.get_device(), model.compute_dtype, windows, config.key_offset)

    def make_room(self, model: GPT, tokens: int) -> None:
        """For so many more tokens in each row."""
        length = self.get_pos() + tokens
        if length > self.max_seq_len:
            larger = self.of(model, len(self.lengths), max(length, 2 * self.max_seq_len))
            larger.prefill(self)
            self.__dict__.update(larger.__dict__, columns=self.columns)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beams: Tensor) -> None:
        self.copy_rows(beams.tolist(), range(len(beams)))


class NanochatGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanochatGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: NanochatGPTConfig) -> None:
        super().__init__(config)
        self.model = GPT(GPTConfig(**config.gpt))
        self.has_buffers = False
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def _init_weights(self, module: nn.Module) -> None:
        """All weights come from a checkpoint."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: GrowingCache | None = None,
        past_key_values: GrowingCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in fp32, or of the last logits_to_keep tokens. attention_mask (B, columns read before + T):
        0 for padding in front of a row or behind it. With a cache and padding, the logits are those after each row's
        last token (B, 1, V). The loss is that of `labels`, as transformers shifts them."""
        model, (rows, length) = self.model, input_ids.shape
        model.compute_dtype = model.lm_head.weight.dtype
        if not self.has_buffers or model.cos.dtype != torch.float32 or model.cos.device != model.get_device():
            model.init_buffers()  # loading leaves them undefined, and .half() would round them
            self.has_buffers = True
        cache = past_key_values if cache is None else cache
        order = counts = None
        if attention_mask is not None and length > 1:
            order, counts = left_aligned(attention_mask[:, -length:])
        ids = input_ids if order is None else input_ids.gather(1, order)
        if cache is None and not use_cache:
            logits = model(ids)
            if order is not None:
                logits = logits.gather(1, order.argsort(1).unsqueeze(-1).expand_as(logits))
        else:
            cache = GrowingCache.of(model, rows, 2 * length + 64) if cache is None else cache
            cache.make_room(model, length)
            if logits_to_keep == 1 and counts is None:
                counts = torch.full((rows,), length, device=ids.device)
            logits = read(model, ids, counts, cache)
            cache.columns += length
        logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


def left_aligned(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(order (B, T) that brings the tokens of each row to its beginning, how many they are (B,)) for a mask (B, T) that
    is 0 at padding; None where there is none. Raises ValueError for masks of other kinds."""
    if mask.ndim != 2:
        raise ValueError(f"attention_mask has {mask.ndim} dimensions: this model takes a row of 0 and 1 for each text")
    if bool(mask.all()):
        return None, None
    counts, column = mask.long().sum(1), torch.arange(mask.size(1), device=mask.device)
    order = (column + mask.long().argmax(1, keepdim=True)) % mask.size(1)
    if not torch.equal(mask.gather(1, order).bool(), column < counts.unsqueeze(1)):
        raise ValueError("attention_mask has 0 between tokens: padding can be in front of a text or behind it")
    return order, counts


def read(model: GPT, ids: Tensor, counts: Tensor | None, cache: GrowingCache) -> Tensor:
    """Logits of ids (B, T), which go on from what the cache holds: all of them (B, T, V), or where counts (B,) of each
    row are not padding, those after each row's last token (B, 1, V)."""
    parts: list[Tensor] = []
    for start in range(0, ids.size(1), CHUNK):  # layers with windows keep no more
        part = ids[:, start : start + CHUNK]
        if counts is None:
            parts.append(model(part, kv_cache=cache))
            continue
        taken = (counts - start).clamp(0, part.size(1))
        cache.take(taken.tolist())
        logits = model(part, kv_cache=cache)
        parts = [torch.where(taken.view(-1, 1, 1) > 0, logits, parts[0]) if parts else logits]
    cache.incoming = None
    return torch.cat(parts, dim=1)
