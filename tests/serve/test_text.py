from hypothesis import given
from hypothesis import strategies as st

from nanochat.serve.text import AnswerText, Part, newest_turns, turn_messages
from nanochat.tokenizer import RustBPETokenizer

TOKENIZER = RustBPETokenizer.train_from_iterator(["the cat sat on the mat, 2 + 3 = 5 and café"] * 20, 300)


def said(tokens, stops=()):
    """(parts while tokens come, parts at the end)."""
    text = AnswerText(TOKENIZER, stops)
    return [part for token in tokens for part in text.push(token)], text.end()


def joined(parts):
    return "".join(part.text for part in parts if part.kind == "text")


@given(st.text(), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_the_text_up_to_the_first_stop_string_and_never_half_a_character(whole, stops):
    whole = whole.encode("utf-8", "replace").decode()
    tokens = TOKENIZER.encode_ordinary(whole)
    expected, before = whole, ""
    for length in range(len(tokens) + 1):  # what ends it is the first stop string that is there, whichever that is
        text = TOKENIZER.decode(tokens[:length]).rstrip("\ufffd") if length < len(tokens) else whole
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            expected = text[: min(found)]
            break
        before = text
    parts, rest = said(tokens, stops)
    assert joined([*parts, *rest]) == expected, before
    assert all("\ufffd" not in part.text for part in parts) or "\ufffd" in whole


def test_nothing_of_a_stop_string_is_shown():
    parts, rest = said(TOKENIZER.encode_ordinary("the mat, 2 + 3 = 5"), ["2 + 4", "= 5"])
    assert joined(parts) == "the mat, 2 + 3 " and rest == []


def test_calls_of_the_calculator_are_parts_of_their_own():
    special = TOKENIZER.encode_special
    tokens = [
        *TOKENIZER.encode_ordinary("it is "), special("<|python_start|>"), *TOKENIZER.encode_ordinary("2+3"),
        special("<|python_end|>"), special("<|output_start|>"), *TOKENIZER.encode_ordinary("5"),
        special("<|output_end|>"), *TOKENIZER.encode_ordinary("!"),
    ]  # fmt: skip
    parts, rest = said(tokens)
    parts += rest
    assert [part for part in parts if part.kind != "text"] == [Part("call", "2+3"), Part("result", "5")]
    assert joined(parts) == "it is !"
    open_call, rest = said(tokens[: tokens.index(special("<|python_end|>"))])
    assert joined(open_call) == "it is " and rest == [Part("call", "2+3")]


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 60))
def test_the_newest_turns_that_fit(lengths, room):
    kept = list(newest_turns(lengths, sum, room))
    slow = list(lengths)
    while slow and sum(slow) > room:
        del slow[0]
    assert kept == slow


TEXTS = st.text(st.characters(codec="utf-8"), max_size=9)
KINDS = st.sampled_from(["python", "python_output"])
CALLS = st.lists(st.builds(dict, type=KINDS, text=TEXTS.filter(bool)), min_size=1)
PARTS = st.tuples(TEXTS.filter(bool), CALLS).map(lambda pair: [{"type": "text", "text": pair[0]}, *pair[1]])


@given(TEXTS, TEXTS | CALLS | PARTS)
def test_messages_of_a_turn_are_those_that_were_rendered(question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turn = TOKENIZER.render_conversation({"messages": messages})[0][1:]
    assert turn_messages(TOKENIZER, turn) == messages
