"""The tokenizer of an export, as transformers loads it: the same ids, the same conversations, the same masks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import SPECIAL_TOKENS
from tests.test_chat_template import conversations


@pytest.fixture(scope="module")
def theirs(exports, transformers):
    return transformers.AutoTokenizer.from_pretrained(exports("nanochat")[1])


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_ids_are_ours(tokenizer, theirs, text):
    if not any(name in text for name in SPECIAL_TOKENS):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


@given(conversations())
@settings(max_examples=50)
def test_conversations_and_masks_are_ours(tokenizer, theirs, conversation):
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=10_000)
    options = {"tokenize": True, "return_dict": True}
    found = theirs.apply_chat_template(conversation["messages"], return_assistant_tokens_mask=True, **options)
    assert (found["input_ids"], found["assistant_masks"]) == (ids, mask)
    question = conversation["messages"][:-1]
    found = theirs.apply_chat_template(question, add_generation_prompt=True, **options)
    assert found["input_ids"] == tokenizer.render_for_completion(conversation)


def test_batches_are_padded_in_front(tokenizer, theirs):
    found = theirs(["a", "a longer text"], padding=True)
    assert found["attention_mask"][0][-1] == 1 and found["attention_mask"][0][0] == 0
    assert found["input_ids"][0][0] == tokenizer.get_bos_token_id() == theirs.pad_token_id
    assert theirs.eos_token_id == tokenizer.encode_special("<|assistant_end|>")
    assert theirs.model_max_length == 64
