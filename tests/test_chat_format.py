"""nanochat/chat_format.py, through the tokenizer's render methods: order, loss masks, truncation, refusals."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from scripts.tok_eval import TEXTS

# special tokens spelled out in the text, too: they must stay text
odd_text = st.lists(st.one_of(st.sampled_from([*SPECIAL_TOKENS, "\n\n", " "]), st.text(max_size=8))).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(TEXTS.values(), 600)


TOOL_CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 * 3?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me see: "},
                {"type": "python", "text": "12*3"},
                {"type": "python_output", "text": "36"},
                {"type": "text", "text": "It is 36."},
            ],
        },
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome!"},
    ]
}


def _spelled(tokenizer, ids, mask) -> list[tuple[str, int]]:
    """Runs of ordinary tokens with the same mask as one string; each special token by itself."""
    runs: list[list] = []
    for token, trained in zip(ids, mask, strict=True):
        special = token >= tokenizer.get_bos_token_id()
        if special or not runs or runs[-1][1:] != [trained, False]:
            runs.append([b"", trained, special])
        runs[-1][0] += tokenizer.decode_bytes([token])
    return [(text.decode(), trained) for text, trained, _ in runs]


def test_golden_mask_with_system_message_and_tools(tokenizer):
    untouched = copy.deepcopy(TOOL_CONVERSATION)
    ids, mask = tokenizer.render_conversation(TOOL_CONVERSATION)
    assert _spelled(tokenizer, ids, mask) == [
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("Be brief.\n\nWhat is 12 * 3?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Let me see: ", 1),
        ("<|python_start|>", 1),
        ("12*3", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("36", 0),
        ("<|output_end|>", 0),
        ("It is 36.", 1),
        ("<|assistant_end|>", 1),
        ("<|user_start|>", 0),
        ("Thanks", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Welcome!", 1),
        ("<|assistant_end|>", 1),
    ]
    assert untouched == TOOL_CONVERSATION


def test_golden_ids_of_a_plain_turn(tokenizer):
    special = tokenizer.encode_special
    question, answer = tokenizer.encode("Hi there"), tokenizer.encode("Hello")
    ids, mask = tokenizer.render_conversation(
        {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]}
    )
    head = [special("<|bos|>"), special("<|user_start|>"), *question, special("<|user_end|>")]
    assert ids == [*head, special("<|assistant_start|>"), *answer, special("<|assistant_end|>")]
    assert mask == [0] * (len(head) + 1) + [1] * (len(answer) + 1)


part = st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": odd_text})
answer = st.one_of(odd_text, st.lists(part, max_size=4))


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(odd_text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(odd_text)})
        messages.append({"role": "assistant", "content": draw(answer)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(odd_text)})
    return {"messages": messages}


def _expected_trained_text(conversation) -> str:
    """The straightforward reading of the mask rules: everything the assistant writes itself."""
    text = ""
    for message in conversation["messages"]:
        if message["role"] == "assistant":
            content = message["content"]
            for one in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if one["type"] == "text":
                    text += one["text"]
                elif one["type"] == "python":
                    text += f"<|python_start|>{one['text']}<|python_end|>"
            text += "<|assistant_end|>"
    return text


@given(conversation=conversations(), max_tokens=st.integers(1, 200))
def test_mask_selects_what_the_assistant_writes(tokenizer, conversation, max_tokens):
    untouched = copy.deepcopy(conversation)
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=10**6)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    trained = [token for token, keep in zip(ids, mask, strict=True) if keep]
    assert tokenizer.decode(trained) == _expected_trained_text(conversation)
    assert ids.count(tokenizer.get_bos_token_id()) == 1 and ids[0] == tokenizer.get_bos_token_id()

    short = tokenizer.render_conversation(conversation, max_tokens=max_tokens)
    assert short == (ids[:max_tokens], mask[:max_tokens])
    assert conversation == untouched


@given(conversation=conversations())
def test_completion_is_a_prefix_of_the_conversation(tokenizer, conversation):
    untouched = copy.deepcopy(conversation)
    ids, _ = tokenizer.render_conversation(conversation, max_tokens=10**6)
    prompt = tokenizer.render_for_completion(conversation)
    assert prompt[-1] == tokenizer.encode_special("<|assistant_start|>")
    if conversation["messages"][-1]["role"] == "user":
        assert prompt[:-1] == ids
    else:
        assert prompt == ids[: len(prompt)] and prompt.count(prompt[-1]) == ids.count(prompt[-1])
    assert conversation == untouched


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "without messages"),
        ("hello", "without messages"),
        ([ASSISTANT, USER], "message 0: role is 'assistant', expected 'user'"),
        ([USER, USER], "message 1: role is 'user', expected 'assistant'"),
        ([USER, ASSISTANT, ASSISTANT], "message 2: role is 'assistant', expected 'user'"),
        ([USER, {"role": "system", "content": "s"}], "message 1: role is 'system'"),
        ([{"role": "system", "content": "s"}], "message 0: a system message alone"),
        ([{"role": "system", "content": "s"}, ASSISTANT], "message 1: role is 'assistant', expected 'user'"),
        ([{"role": "system", "content": ["s"]}, USER], "message 0: system content is list"),
        ([{"role": "user", "content": None}], "message 0: user content is NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "message 0: user content is list"),
        ([USER, {"role": "assistant", "content": 5}], "message 1: assistant content is int"),
        ([USER, {"role": "assistant", "content": ["a"]}], "message 1, part 0: expected .* got str"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": "a"}]}], "part 0: unknown type 'image'"),
        ([USER, {"role": "assistant", "content": [{"type": ["text"], "text": "a"}]}], r"unknown type \['text'\]"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "part 0: its text is NoneType"),
        ([{"content": "q"}], "message 0: expected"),
        (["q"], "message 0: expected"),
    ],
)
def test_malformed_conversations_are_one_line_errors(tokenizer, messages, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        tokenizer.render_conversation({"messages": messages})
    assert "\n" not in str(error.value)


def test_completion_needs_a_question(tokenizer):
    for messages in ([], [ASSISTANT], [{"role": "system", "content": "s"}]):
        with pytest.raises(UserError):
            tokenizer.render_for_completion({"messages": messages})
