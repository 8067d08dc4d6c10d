"""What a chat at a terminal shows and keeps."""

import io
import re

import pytest
from rich.console import Console

from nanochat.serve import terminal
from nanochat.serve.terminal import LINES_KEPT, Page, literal, show_markdown, typed

TEXT = """# Title

Some *text* with `code`, <b>tags</b>, ![a picture](http://x/y) and [a link](http://z).

1. one

   still one
2. two

```python
def f():

    return "a *b*"
```

| a | b |
|---|---|
| 1 | 2 |

- x
- y

Last line"""


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after this, also of those that have scrolled away."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[^\x1b]", written):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.startswith("\x1b"):
            row -= int(part[2:-1] or 1) if part[-1] == "A" else 0
            assert row >= 0
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def shown(pieces, height=100):
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=height, color_system=None)
    show_markdown(pieces, console)
    return console.file.getvalue()


@pytest.mark.parametrize("size", [1, 3, 7, 40, 1000])
@pytest.mark.parametrize("height", [5, 100])
def test_text_that_streams_ends_as_the_whole_would_look(monkeypatch, size, height):
    monkeypatch.setattr(terminal, "REFRESH", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    console.print(Page(TEXT))
    wanted = [line.rstrip() for line in console.file.getvalue().split("\n") if line.strip()]
    written = shown([TEXT[i : i + size] for i in range(0, len(TEXT), size)], height)
    assert [line for line in screen(written) if line] == wanted
    text = " ".join(wanted)
    assert "<b>tags</b>" in text and "a picture (http://x/y)" in text and "a link (http://z)" in text
    assert "*text*" not in text and 'return "a *b*"' in text and "# Title" not in text


def test_an_answer_is_seen_while_it_is_written(monkeypatch):
    monkeypatch.setattr(terminal, "REFRESH", 0)
    console = Console(file=io.StringIO(), force_terminal=True, width=60, height=10, color_system=None)

    def pieces():
        yield "the **cat"
        assert screen(console.file.getvalue())[0] == "the **cat"
        yield "** sat"
        assert screen(console.file.getvalue())[0] == "the cat sat"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show_markdown(pieces(), console)
    assert screen(console.file.getvalue())[0] == "the cat sat"  # what was stopped stays


@pytest.mark.parametrize("text", ["", " ", "\n\n"])
def test_no_text_is_an_empty_line(text):
    assert screen(shown([text])) == ["", ""]


def test_arithmetic_keeps_its_stars_and_lines_their_ends():
    text = "12*7*2=84 and 2**3**2, **bold** and 这是**重点**内容\n(2+3)*4*5"
    assert screen(shown([text]))[:2] == ["12*7*2=84 and 2**3**2, bold and 这是重点内容", "(2+3)*4*5"]


@pytest.mark.parametrize("call", ["[12*7 → 84](x)", "['a_b_`c`'.count('*') → 0]", "[<b>#1*2*3&amp;\\\\ → ~~1~~]"])
def test_calls_of_the_calculator_are_no_markdown(call):
    assert screen(shown([f"so *it* is {literal(call)}"]))[0] == f"so it is {call}"


def type_lines(monkeypatch, lines):
    words = iter(lines)

    def typed_line(_prompt):
        for word in words:
            return word
        raise EOFError

    monkeypatch.setattr("builtins.input", typed_line)


def test_the_history_does_not_grow_for_ever(monkeypatch, tmp_path):
    history = tmp_path / "history"
    history.write_text("".join(f"{i}\n" for i in range(2 * LINES_KEPT + 1)))
    type_lines(monkeypatch, ["new", " "])
    assert list(typed(history)) == ["new", " "]
    lines = history.read_text().splitlines()
    assert len(lines) == LINES_KEPT + 1 and lines[-2:] == [str(2 * LINES_KEPT), "new"]


def test_a_history_that_cannot_be_kept_is_said_once(monkeypatch, tmp_path, capsys):
    history = tmp_path / "folder"
    history.mkdir()
    type_lines(monkeypatch, ["a", "b"])
    assert list(typed(history)) == ["a", "b"]
    assert capsys.readouterr().err.count("is not kept") == 1
