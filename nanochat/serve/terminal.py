"""A chat at a terminal: Markdown that streams, and lines that the arrow keys bring back."""

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from nanochat.errors import explained
from nanochat.files import atomic_write_text

REFRESH = 0.08  # seconds between two pictures of what is being written
LINES_KEPT = 1000  # of what was typed


def _times(state: StateInline, silent: bool) -> bool:
    """2*3*4 and 2**3 are arithmetic: stars between ASCII letters and digits are no emphasis."""
    start, end = state.pos, state.pos
    while end < state.posMax and state.src[end] == "*":
        end += 1
    around = state.src[start - 1 : start] + state.src[end : end + 1]
    if end == start or len(around) < 2 or not (around.isascii() and around.isalnum()):
        return False
    if not silent:
        state.pending += state.src[start:end]
    state.pos = end
    return True


# HTML and images stay text, and the address of a link is shown: nothing that the model writes is out of sight
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("image")
PARSER.inline.ruler.before("emphasis", "times", _times)


class Page(Markdown):
    """Markdown of one or more blocks, whose lines end where the model ended them; `gap`: an empty line comes first."""

    def __init__(self, text: str, gap: bool = False) -> None:
        super().__init__(text, hyperlinks=False)
        self.parsed, self.gap = PARSER.parse(text), gap
        for token in itertools.chain(*(block.children or [] for block in self.parsed)):
            token.type = "hardbreak" if token.type == "softbreak" else token.type

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.gap:
            yield Segment.line()
        yield from super().__rich_console__(console, options)


class _Tail:
    """As many of a page's last lines as a terminal has: what is above could not be wiped away."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.page, options.update(height=None), pad=False)[-console.height + 1 :]:
            yield from line
            yield Segment.line()


def literal(text: str) -> str:
    """What Markdown shows as `text`."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def show_markdown(pieces: Iterable[str], console: Console) -> None:
    """Print text as it comes: the block that is being written is drawn anew, until the next begins."""
    text, is_first, drawn = "", True, 0.0
    live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
    try:
        with live:
            for piece in pieces:
                text += piece
                if time.monotonic() - drawn < REFRESH:
                    continue
                if start := _last_block(text):
                    live.update("")
                    console.print(Page(text[:start], gap=not is_first))
                    text, is_first = text[start:], False
                live.update(_Tail(Page(text, gap=not is_first)), refresh=True)
                drawn = time.monotonic()
    finally:  # also of an answer that was stopped
        console.print(Page(text, gap=not is_first) if text.strip() else "")


def _last_block(text: str) -> int:
    """Where the last block of text begins; of the line that is being written nothing is known."""
    blocks = PARSER.parse(text[: text.rfind("\n") + 1])
    starts = [token.map[0] for token in blocks if token.map and token.level == 0 and token.nesting >= 0]
    return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]]) if starts else 0


def typed(history: Path) -> Iterator[str]:
    """Lines that the user types, until Ctrl-D. The arrow keys bring back earlier ones, which `history` keeps."""
    keeps = True
    with contextlib.suppress(ImportError):
        import readline  # input() edits lines with it

        try:
            for line in _read(history):
                readline.add_history(line)
        except OSError as error:
            keeps = _not_kept(error)
    while True:
        try:
            if not sys.stdout.isatty():  # input() would write the prompt into what should hold answers only
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return
        if keeps and line.strip():
            try:
                _append(history, line)
            except OSError as error:
                keeps = _not_kept(error)
        yield line


def _read(history: Path) -> list[str]:
    if not history.exists():
        return []
    lines = history.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(lines) > 2 * LINES_KEPT:
        atomic_write_text(history, "".join(f"{line}\n" for line in lines[-LINES_KEPT:]))
        history.chmod(0o600)
    return lines[-LINES_KEPT:]


def _append(history: Path, line: str) -> None:
    """Line by line, so that a chat that is killed, or another beside it, loses nothing."""
    history.touch(mode=0o600)
    with history.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"{line}\n")


def _not_kept(error: OSError) -> bool:
    print(f"what you type is not kept: {explained(error)}", file=sys.stderr)
    return False
