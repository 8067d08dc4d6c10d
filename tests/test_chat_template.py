"""The chat template against render_conversation, through transformers."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from scripts.tok_eval import TEXTS

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def ours() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(TEXTS.values()), 900)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ours.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


# no special tokens in text: transformers would find them there
content = st.one_of(
    st.text(max_size=30), st.sampled_from(["", " ", "\n\n", "it's  12345 {{x}} {% y %}\r\n", "👩‍👩‍👧", "é", "  a "])
)
content = content.filter(lambda text: not any(name in text for name in SPECIAL_TOKENS))
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": content})
answer = st.one_of(content, st.lists(part, max_size=5))


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(answer)})
    return {"messages": messages}


HALVES = {
    "messages": [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": [{"type": "text", "text": "th"}, {"type": "text", "text": "e th"}]},
    ]
}


@given(conversations())
@example(HALVES)
@settings(max_examples=150)
def test_ids_and_mask_are_those_of_render_conversation(ours, theirs, conversation):
    ids, mask = ours.render_conversation(conversation, max_tokens=10_000)
    rendered = theirs.apply_chat_template(
        conversation["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered["input_ids"] == ids
    assert rendered["assistant_masks"] == mask


@given(conversations())
@settings(max_examples=50)
def test_prompts_are_those_of_render_for_completion(ours, theirs, conversation):
    wanted = ours.render_for_completion(conversation)
    question = conversation["messages"][:-1]
    found = theirs.apply_chat_template(question, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert found["input_ids"] == wanted


def test_what_is_no_conversation_is_an_error(theirs):
    for messages in (
        [{"role": "assistant", "content": "hello"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": "b"}]}],
    ):
        with pytest.raises(TemplateError):
            theirs.apply_chat_template(messages, tokenize=False)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_transformers_encodes_and_decodes_text_as_we_do(ours, theirs, text):
    if any(name in text for name in SPECIAL_TOKENS):
        return
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == text


def test_it_is_a_fast_tokenizer_that_knows_its_special_tokens(ours, theirs):
    assert theirs.is_fast and len(theirs) == ours.get_vocab_size()
    assert {name: theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS} == {
        name: ours.encode_special(name) for name in SPECIAL_TOKENS
    }
    assert theirs.bos_token_id == ours.get_bos_token_id()
    assert theirs.decode([*ours.encode("hi"), ours.get_bos_token_id()], skip_special_tokens=True) == "hi"
