import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.chat_format import conversation_pieces
from nanochat.errors import UserError
from nanochat.tasks.customjson import CustomJSON, load_conversations

ASK, ANSWER = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_bytes("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode())
    return path


def test_both_forms_of_a_line_are_read_and_blank_lines_are_ignored(tmp_path):
    path = write(tmp_path, [ASK, ANSWER], "", {"messages": [SYSTEM, ASK, ANSWER], "id": 5}, "  \t", "")
    task = CustomJSON(path)
    assert [task[i] for i in range(len(task))] == [{"messages": [ASK, ANSWER]}, {"messages": [SYSTEM, ASK, ANSWER]}]
    assert (task.name, task.eval_type, task.published) == ("mine.jsonl", None, False)
    assert len(CustomJSON(path, stop=1)) == 1


def asked(path, split):
    task = CustomJSON(path, split)
    return [task[i]["messages"][0]["content"] for i in range(len(task))]


def test_about_one_in_20_conversations_is_held_out_by_what_it_says(tmp_path):
    lines = [[{"role": "user", "content": str(number)}, ANSWER] for number in range(1000)]
    path = write(tmp_path, *lines)
    train, test = asked(path, "train"), asked(path, "test")
    assert 30 <= len(test) <= 70 and sorted([*train, *test], key=int) == [str(number) for number in range(1000)]
    path = write(tmp_path, *reversed(lines), *lines[::7])  # another order and repeats move nothing to the other side
    assert (set(asked(path, "train")), set(asked(path, "test"))) == (set(train), set(test))


def test_the_same_conversation_written_in_another_way_stays_on_its_side(tmp_path):
    turned = [{"content": ASK["content"], "role": "user"}, {"content": ANSWER["content"], "role": "assistant"}]
    path = write(tmp_path, [ASK, ANSWER], {"id": 1, "messages": turned}, json.dumps([ASK, ANSWER], indent=None))
    assert sorted(len(CustomJSON(path, split)) for split in ("train", "test")) == [0, 3]


def test_parts_with_a_calculator_are_allowed(tmp_path):
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2."}]
    message = {"role": "assistant", "content": parts}
    assert CustomJSON(write(tmp_path, [ASK, message]))[0]["messages"][1] == message


@pytest.mark.parametrize(
    "line, message",
    [
        ([ASK, ASK], r"mine\.jsonl:3: message 1: role is 'user', expected 'assistant'"),
        ([ASK], r"mine\.jsonl:3: no assistant message, so there is nothing to learn"),
        ([], r"mine\.jsonl:3: conversation without messages"),
        ({"text": "hello"}, r"mine\.jsonl:3: conversation without messages"),
        ('[{"role": "user"', r"mine\.jsonl:3: not JSON \("),
        ('"hello"', r'mine\.jsonl:3: str, expected a list of messages or {"messages": \[...\]}'),
        ([ASK, {"role": "assistant", "content": 5}], r"mine\.jsonl:3: message 1: assistant content is int"),
        ([ASK, "hello"], r"mine\.jsonl:3: message 1: expected"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    path = write(tmp_path, [ASK, ANSWER], "", line, [ASK, ANSWER])
    with pytest.raises(UserError, match=message) as caught:
        CustomJSON(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps([ASK, ANSWER]).encode() + b'\n[{"role": "\xff"}]\n')
    with pytest.raises(UserError, match=r"mine\.jsonl:2: not JSON"):
        CustomJSON(path)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"mine\.jsonl: no conversations"):
        CustomJSON(tmp_path / "mine.jsonl")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read \(No such file"):
        CustomJSON(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        CustomJSON(tmp_path)


@given(texts=st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_comes_back_as_it_was_written(tmp_path_factory, texts):
    conversations = [{"messages": [ASK, {"role": "assistant", "content": text}]} for text in texts]
    path = tmp_path_factory.mktemp("texts") / "mine.jsonl"
    path.write_text(
        "".join(
            json.dumps(item, ensure_ascii=text.isprintable()) + "\n"
            for text, item in zip(texts, conversations, strict=True)
        ),
        encoding="utf-8",
    )
    assert load_conversations(path) == conversations


def test_the_only_conversation_of_a_file_is_trained_on(tmp_path):
    for number in range(60):  # by its hash, some of these would be for test
        path = write(tmp_path, [{"role": "user", "content": str(number)}, ANSWER])
        assert (len(CustomJSON(path)), len(CustomJSON(path, "test"))) == (1, 0)


@pytest.mark.parametrize(
    "line, message",
    [
        (b"[" * 100_000, r"nested deeper than 64 levels"),
        (b'{"messages": ' * 500 + b"1" + b"}" * 500, "nested deeper"),
        (b'[{"role": "user", "content": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}]", "nested deeper"),
        (b'[{"role": "user", "content": ' + b"9" * 5000 + b"}]", "not JSON"),
        (b'[{"role": ["user"], "content": "a"}]', "message 0: expected"),
        (b'{"messages": {"0": 1}}', "conversation without messages"),
    ],
)
def test_hostile_lines_are_named(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps([ASK, ANSWER]).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"mine\.jsonl:2: .*{message}") as caught:
        CustomJSON(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_bom_and_very_long_lines_are_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    long = {"role": "assistant", "content": "x" * 5_000_000}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([ASK, ANSWER]).encode() + b"\r\n" + json.dumps([ASK, long]).encode())
    assert [each["messages"][1] for each in load_conversations(path)] == [ANSWER, long]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "messages"]), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | VALUES, "content": VALUES})


@given(
    VALUES | st.lists(MESSAGE, max_size=3) | st.just([ASK]).flatmap(lambda ask: MESSAGE.map(lambda each: [*ask, each]))
)
def test_any_json_is_refused_or_rendered(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("values") / "mine.jsonl"
    path.write_text(json.dumps(value) + "\n")
    try:
        task = CustomJSON(path)
    except UserError as error:
        assert "mine.jsonl" in str(error) and "\n" not in str(error)
        return
    assert conversation_pieces(task[0])
