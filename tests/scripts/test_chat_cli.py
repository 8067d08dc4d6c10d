"""scripts/chat_cli.py, with an untrained model that says random things."""

import io
import json
import os
import pty
import select
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import checkpoint, cli
from nanochat.engine import Engine
from nanochat.errors import UserError, visible
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import checkpoint_dir, tokenizer_dir
from nanochat.serve.text import answer_parts, readable
from nanochat.tokenizer import RustBPETokenizer
from scripts import chat_cli
from scripts.chat_cli import Chat, Settings
from tests.checkpoints import save_checkpoint

TOKENIZER = RustBPETokenizer.train_from_iterator(["the cat sat on the mat, 2 + 3 = 5 and café"] * 20, 300)
CONTEXT = 96


def random_model() -> GPT:
    config = GPTConfig(
        sequence_len=CONTEXT, vocab_size=TOKENIZER.get_vocab_size(), n_layer=1, n_head=2, n_kv_head=2, n_embd=32
    )
    model = GPT(config)
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # starts at zero, which makes all tokens alike
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return random_model()


@pytest.fixture
def stored(store, model):
    """A store with one checkpoint each of stage sft and base."""
    TOKENIZER.save(tokenizer_dir())
    meta = {"model_config": vars(model.config), "settings": {}, "tokenizer_hash": TOKENIZER.hash}
    for stage, tag in (("sft", "d1"), ("base", "d1"), ("base", "wide")):
        save_checkpoint(checkpoint_dir(stage, tag), 7, model, None, meta)
    return store


@pytest.fixture
def say(monkeypatch, capsys):
    """say("lines for stdin", setting=…) -> (stdout, stderr) of the program."""

    def run(lines: str = "", **changes) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        chat_cli.main(Settings(**{"device_type": "cpu", "max_tokens": 12, **changes}))
        return capsys.readouterr()

    return run


def asked(message: str) -> list[int]:
    """What opens an answer to `message`, without <|bos|>."""
    return TOKENIZER.render_for_completion({"messages": [{"role": "user", "content": message}]})[1:]


def expected(model: GPT, message: str, seed: int = 42, max_tokens: int = 12, before: list[int] = ()) -> list[int]:
    """The answer's ids, from generate_batch; before: the turns that were said earlier."""
    prompt = [*special("bos"), *before, *asked(message)]
    options = {"max_tokens": max_tokens, "temperature": 0.6, "top_k": 50, "seed": seed}
    return Engine(model, TOKENIZER).generate_batch(prompt, **options)[0][0][len(prompt) :]


def pieces(tokens):
    return readable(answer_parts(TOKENIZER, tokens))


def shown(tokens: list[int]) -> str:
    return visible("".join(pieces(tokens)))  # control characters reach no terminal


def special(*names: str) -> list[int]:
    return [TOKENIZER.encode_special(f"<|{name}|>") for name in names]


def call(expression: str, result: str | None) -> list[int]:
    ids = [*special("python_start"), *TOKENIZER.encode(expression), *special("python_end")]
    return (
        ids if result is None else [*ids, *special("output_start"), *TOKENIZER.encode(result), *special("output_end")]
    )


# What is shown of an answer


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 10), max_size=40))
def test_streamed_text_is_the_decoded_text(tokens):
    assert "".join(pieces(tokens)) == TOKENIZER.decode(tokens)


def test_characters_come_whole():
    tokens = TOKENIZER.encode("a🙂é中")
    found = list(pieces(tokens))
    assert "".join(found) == "a🙂é中" and "�" not in "".join(found)
    assert len(tokens) > len(found)
    assert shown(tokens[:3]) == "a�"  # cut within the emoji: said at the end, not before


def test_calls_of_the_calculator_are_readable():
    text = TOKENIZER.encode
    assert shown([*text("is "), *call("2+3", "5"), *text(" so")]) == "is [2+3 → 5] so"
    assert shown([*call("2+x", None), *text(" so")]) == "[2+x] so"
    assert shown([*call("1", None), *call("2", "2")]) == "[1] [2 → 2]"
    assert shown(call("2+3", "5")[:-1]) == shown(call("2+3", "5")) == "[2+3 → 5]"
    assert shown(special("user_start", "output_end", "python_end")) == ""
    assert shown([*special("output_start"), *text("5")]) == "[→ 5]"


def test_pieces_come_as_soon_as_their_tokens():
    given = iter(TOKENIZER.encode("a cat"))
    shown_so_far = pieces(given)
    assert next(shown_so_far) == TOKENIZER.decode(TOKENIZER.encode("a cat")[:1])
    assert list(given) == TOKENIZER.encode("a cat")[1:]


# One message


def test_one_message_is_answered_like_generate_batch_does(stored, say, model):
    out, err = say(prompt="the cat")
    wanted = expected(model, "the cat")
    assert len(wanted) > 3 and out == shown(wanted) + "\n"
    assert "loaded" in err and "base model" not in err
    assert say(prompt="the cat").out == out != say(prompt="the cat", seed=43).out


def test_a_base_model_goes_on_with_the_text(stored, say, model):
    out, err = say(stage="base", model_tag="d1", prompt="the cat")
    prompt = TOKENIZER.encode("the cat", prepend="<|bos|>")
    options = {"max_tokens": 12, "temperature": 0.6, "top_k": 50, "seed": 42}
    sequences, _ = Engine(model, TOKENIZER).generate_batch(prompt, **options)
    assert out == shown(sequences[0][len(prompt) :]) + "\n"
    assert "goes on with your text" in err


def test_an_answer_takes_at_most_half_of_the_context(stored, model):
    chat = Chat(Engine(model, TOKENIZER), "sft/d1", Settings(max_tokens=512))
    assert chat.max_tokens == CONTEXT // 2


# A conversation


def test_lines_of_stdin_are_one_conversation(stored, say, model):
    out, _ = say("the cat\n\nthe mat\nquit\nnever read\n")
    answer = expected(model, "the cat")
    turn = [*asked("the cat"), *answer, *special("assistant_end")]
    assert out == f"{shown(answer)}\n{shown(expected(model, 'the mat', seed=43, before=turn))}\n"


def test_the_model_reads_the_very_tokens_that_it_wrote(model, monkeypatch, capsys):
    """Also where their text would be encoded in other tokens, and with calls of the calculator."""
    prompts: list[list[int]] = []
    letters = [TOKENIZER.encode(letter)[0] for letter in "the"]
    assert TOKENIZER.encode("the") != letters
    answer = [*letters, *call("2+3", "5"), *special("user_end")]

    def stream(self, prompt, sampling, seed):
        prompts.append(prompt)
        yield from (([token], [1]) for token in [*answer, *special("bos")])

    monkeypatch.setattr(Engine, "stream", stream)
    chat = Chat(Engine(model, TOKENIZER), "sft/d1", Settings(max_tokens=5))
    chat.answer("a")
    chat.answer("b")
    assert prompts == [
        [*special("bos"), *asked("a")],
        [*special("bos"), *asked("a"), *answer, *special("assistant_end"), *asked("b")],
    ]
    assert capsys.readouterr().out == "the[2+3 → 5]\n" * 2


def test_clear_forgets_and_exit_ends(stored, say, model):
    out, err = say("the cat\nCLEAR\nthe mat\nexit\nthe cat\n")
    answers = [expected(model, text, seed) for text, seed in (("the cat", 42), ("the mat", 43))]
    assert out == "".join(shown(answer) + "\n" for answer in answers)
    assert "(forgotten)" in err


def test_a_message_too_long_is_one_line_and_the_chat_goes_on(stored, say, model):
    out, err = say(f"{'xyz ' * 200}\nthe cat\n")
    assert out == shown(expected(model, "the cat")) + "\n"
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "shorten" in line
    _, err = say(f"{'xyz ' * 200}\n", stage="base")
    assert "shorten" in err


def test_a_long_conversation_drops_its_oldest_turns(stored, say):
    out, err = say("the cat sat on the mat\n" * 8)
    assert "error" not in err and len(out) > 8


def test_the_oldest_turns_go_when_the_context_is_full(model):
    chat = Chat(Engine(model, TOKENIZER), "sft/d1", Settings(max_tokens=12))  # of 96, so that 84 are left
    chat.turns = [[1] * 40, [2] * 30, [3] * 5]
    assert list(map(len, chat._kept(9))) == [40, 30, 5]
    assert list(map(len, chat._kept(10))) == [30, 5]
    assert list(map(len, chat._kept(50))) == [5]
    with pytest.raises(UserError, match=r"the message is 85 tokens long.* leaves 84 beside an answer of 12"):
        chat._kept(85)
    assert chat._kept(84) == []
    assert len(chat.turns) == 3  # all of it is there to be saved


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_control_d_and_control_c_end_politely(stored, monkeypatch, capsys):
    for ending in (EOFError, KeyboardInterrupt):
        words = iter(["the cat"])

        def typed(_prompt: str, words=words, ending=ending) -> str:
            for word in words:
                return word
            raise ending

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", typed)
        chat_cli.main(Settings(device_type="cpu", max_tokens=5))
        out, err = capsys.readouterr()
        assert out.endswith("\n") and "Ctrl-D ends" in err


# Commands


def test_a_conversation_is_saved_and_gone_on_with(stored, say, model, tmp_path):
    file, other = tmp_path / "talk here.json", tmp_path / "notes.txt"
    other.write_text("mine")
    out, err = say(f"the cat\n/save {file}\n/save {file}\n/save {other}\n/save\n/save {other}/x.json\n")
    assert other.read_text() == "mine" and err.count("(1 turns are in") == 2 and err.count("error:") == 3
    saved = json.loads(file.read_text())
    answer = "".join(part.text for part in answer_parts(TOKENIZER, expected(model, "the cat")))
    assert saved["model"] == "sft/d1" and saved["messages"][0] == {"role": "user", "content": "the cat"}
    said = saved["messages"][1]["content"]
    assert answer == (said if isinstance(said, str) else "".join(part["text"] for part in said))
    out, err = say(f"/load {file}\nthe mat\n")
    turn = TOKENIZER.render_conversation(saved)[0][1:]
    assert out == shown(expected(model, "the mat", before=turn)) + "\n" and "(1 turns)" in err


def test_calls_of_the_calculator_are_saved_as_such(model, tmp_path):
    chat = Chat(Engine(model, TOKENIZER), "sft/d1", Settings())
    answer = [*TOKENIZER.encode("so "), *call("2+3", "5"), *call("x", None)]
    chat.turns = [[*asked("a"), *answer, *special("assistant_end")], [*asked("b"), *special("assistant_end")]]
    before = list(chat.turns)
    chat.save(tmp_path / "talk.json")
    chat.turns = []
    chat.load(tmp_path / "talk.json")
    assert chat.turns == before


NO_TALK = ["", "3", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": "user", "content": "x"}]}', "[" * 100_000,
           '{"messages": [{"role": "assistant", "content": "x"}]}', "\udcff"]  # fmt: skip


@pytest.mark.parametrize("text", NO_TALK, ids=range(len(NO_TALK)))
def test_what_is_no_conversation_is_said_in_one_line(model, tmp_path, text):
    (tmp_path / "x").write_text(text, errors="surrogateescape")
    chat = Chat(Engine(model, TOKENIZER), "sft/d1", Settings())
    chat.turns = [[1, 2]]
    for file, wanted in ((tmp_path / "x", "holds no conversation"), (tmp_path / "none", "No such"), (tmp_path, "dir")):
        with pytest.raises(UserError, match=wanted) as caught:
            chat.load(file)
        assert "\n" not in str(caught.value) and chat.turns == [[1, 2]]


def test_commands(stored, say, model):
    out, err = say("/temp 0\nthe cat\n/temp\n/temp -1\n/temp nan\n/temp inf\n/nothing\n/help\n/EXIT\nthe cat\n")
    prompt = [*special("bos"), *asked("the cat")]
    greedy = Engine(model, TOKENIZER).generate_batch(prompt, max_tokens=12, temperature=0)[0][0][len(prompt) :]
    assert out == shown(greedy) + "\n"
    assert err.count("error: /temp") == 4 and "error: /nothing: no such command" in err and "/load FILE" in err
    out, err = say("/usr/bin is\n /help\n")
    first = expected(model, "/usr/bin is")
    turn = [*asked("/usr/bin is"), *first, *special("assistant_end")]
    assert out == f"{shown(first)}\n{shown(expected(model, '/help', 43, before=turn))}\n" and "error" not in err


def test_another_model_goes_on(stored, say):
    out, err = say("the cat\n/model base/wide\nthe mat\n/model base/none\n/model what\n/model sft\nthe cat\n/model\n")
    assert out.count("\n") == 3 and "(base/wide)" in err and "(sft/d1; there are base/d1, base/wide, sft/d1)" in err
    assert "no base checkpoint tagged none" in err and "no model of stage 'what'; there are base, sft" in err
    assert "goes on with your text" in err


def test_arrow_keys_bring_back_what_was_typed_in_this_session_and_before(tmp_path):
    history = tmp_path / "history"

    program = (  # a process of its own: a fork of this one, which has threads, can hang
        "import sys, pathlib; from scripts.chat_cli import typed; seen = open(sys.argv[2], 'w');"
        "seen.writelines(line + '\\n' for line in typed(pathlib.Path(sys.argv[1])))"
    )

    def session(*keys: bytes) -> list[str]:
        terminal, its_side = pty.openpty()
        command = [sys.executable, "-c", program, history, tmp_path / "seen"]
        child = subprocess.Popen(command, stdin=its_side, stdout=its_side)
        os.close(its_side)
        for line in (*keys, b"\x04"):
            shown = b""
            while b"> " not in shown:  # else it is not ready for keys
                assert select.select([terminal], [], [], 60)[0], shown
                shown += os.read(terminal, 1000)
            os.write(terminal, line)
        assert child.wait(timeout=60) == 0
        os.close(terminal)
        return (tmp_path / "seen").read_text().splitlines()

    up = b"\x1b[A"
    assert session(b"one\r", b"two\r", up + up + b"!\r") == ["one", "two", "one!"]
    assert session(up + up + b"\x7f?\r") == ["tw?"]
    assert history.read_text().splitlines() == ["one", "two", "one!", "tw?"]
    assert history.stat().st_mode & 0o777 == 0o600


# Which models there are


def test_models_of_the_store(stored, model):
    assert checkpoint.list_models() == {"base": ["d1", "wide"], "sft": ["d1"]}
    (checkpoint_dir("rl", "half") / "step_000001").mkdir(parents=True)  # no whole checkpoint in it
    assert checkpoint.list_models() == {"base": ["d1", "wide"], "sft": ["d1"]}


def test_a_missing_checkpoint_lists_what_is_there(stored, say):
    for changes, missing in (
        ({"stage": "rl"}, "no rl checkpoint"),
        ({"model_tag": "d9"}, "no sft checkpoint tagged d9"),
    ):
        with pytest.raises(UserError, match=rf"{missing} .*; there are base: d1, wide; sft: d1") as caught:
            say(**changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="step 7"):
        say(model_step=8)


def test_an_empty_store(store, say):
    with pytest.raises(UserError, match=r"none at all.*speedrun\.sh"):
        say()


def test_flags():
    words = ["-i", "mid", "-g", "d4", "-s", "3", "-p", "hello", "-t", "0.5", "-k", "0", "-m", "100"]
    words += ["--seed=1", "--device-type=cpu"]
    assert cli.parse(Settings, words) == Settings(
        stage="mid",
        model_tag="d4",
        model_step=3,
        prompt="hello",
        temperature=0.5,
        top_k=0,
        max_tokens=100,
        seed=1,
        device_type="cpu",
    )
    with pytest.raises(SystemExit):
        cli.parse(Settings, ["-t", "-1"])
