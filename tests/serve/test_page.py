"""The page in a headless Chromium, talking to a stand-in of the server that says what a test wants."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat.serve.server import PAGE, content_security_policy

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install your system's package of that name"),
]

HOSTILE = """<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script>
[a](javascript:window.hacked=1) ![b](http://127.0.0.1:1/x.png)

```html
<script>window.hacked=1</script>
```
"""

MARKDOWN = """# Title

Some **bold**, `code` and *more*.

- one
- two

| a | b |
|---|---|
| 1 | 2 |

```py
x = 1 < 2
```"""


class Handler(BaseHTTPRequestHandler):
    """Says `answers` one after the other, in pieces of three characters; keeps what it was asked."""

    answers: list = []  # noqa: RUF012
    asked: list = []  # noqa: RUF012
    gate = threading.Event()

    def do_GET(self):
        if self.path == "/":
            page = PAGE.read_text(encoding="utf-8")
            self._send(page.encode(), "text/html; charset=utf-8", policy=content_security_policy(page))
        else:
            models = [{"id": "sft/tiny"}, {"id": "base/tiny"}]
            self._send(json.dumps({"data": models}).encode(), "application/json")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        answer = self.answers.pop(0)
        if isinstance(answer, int):
            self._send(
                json.dumps({"error": {"message": "too many requests wait"}}).encode(), "application/json", answer
            )
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        parts = answer if isinstance(answer, list) else [answer[i : i + 3] for i in range(0, len(answer), 3)]
        for part in parts:
            if part == "WAIT":
                self.gate.wait(timeout=10)
                continue
            delta = part if isinstance(part, dict) else {"content": part}
            self._event({"choices": [{"index": 0, "delta": delta, "text": part}]})
        self._event({"choices": [], "usage": {"completion_tokens": 7}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data):
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _send(self, body, kind, status=200, policy=None):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        if policy:
            self.send_header("content-security-policy", policy)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.answers, Handler.asked, Handler.gate = [], [], threading.Event()
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.faults.append(message.text))
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
    page.wait_for_selector("#model option", state="attached")
    yield page
    assert page.faults == []
    address = page.url
    assert all(url.startswith((address, "data:", "blob:")) for url in page.requests)
    context.close()
    server.shutdown()


def say(page, text, answer):
    Handler.answers.append(answer)
    page.keyboard.type(text)  # the question has the focus from the start
    page.keyboard.press("Enter")


def last(page):
    page.locator("#send").wait_for(state="visible")  # in whose place Stop is while an answer comes
    return page.locator(".turn.assistant .body").last


def test_an_answer_streams_and_is_drawn_as_markdown(page):
    answer = MARKDOWN
    say(page, "hello", answer)
    body = last(page)
    assert body.locator("h3").inner_text() == "Title" and body.locator("strong").inner_text() == "bold"
    assert body.locator("li").all_inner_texts() == ["one", "two"]
    assert body.locator("td").all_inner_texts() == ["1", "2"]
    assert body.locator("pre code").inner_text().strip() == "x = 1 < 2"
    assert "7 tokens" in page.locator(".turn.assistant .note").inner_text()
    assert Handler.asked[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert Handler.asked[0]["temperature"] == 0.6 and Handler.asked[0]["model"] == "sft/tiny"


def test_hostile_text_runs_nothing(page):
    say(page, HOSTILE.split("\n")[0], HOSTILE)
    body = last(page)
    assert page.evaluate("window.hacked") is None
    assert body.locator("img, script").count() == 0
    assert [link.get_attribute("href") for link in body.locator("a").all()] == ["http://127.0.0.1:1/x.png"]
    assert "<script>" in body.locator("pre").inner_text()


def test_calls_of_the_calculator_are_shown_as_such(page):
    calls = [{"type": "call", "text": "12+30"}, {"type": "result", "text": "42"}]
    say(page, "sum?", ["It is ", {"calculator": calls[:1]}, {"calculator": calls[1:]}, " so 42."])
    body = last(page)
    assert (
        body.locator(".call").inner_text().replace("\n", "") == "12+30= 42"
        or "42" in body.locator(".call").inner_text()
    )
    assert "so 42." in body.inner_text()


def test_stop_try_again_and_go_back(page):
    say(page, "tell", ["one two", "WAIT", " three"])
    page.wait_for_selector("text=one two")
    page.keyboard.press("Escape")
    assert "stopped" in page.locator(".note").last.inner_text()
    Handler.gate.set()
    Handler.answers.append("another")
    page.get_by_role("button", name="Try again").click()
    assert last(page).inner_text() == "another"
    page.get_by_role("button", name="Version before").click()
    assert last(page).inner_text() == "one two" and page.get_by_text("1/2").count() == 1


def test_editing_a_question_makes_a_branch_that_one_can_leave(page):
    say(page, "first", "answer one")
    last(page)
    page.locator("#question").focus()
    say(page, "second", "answer two")
    last(page)
    Handler.answers.append("answer three")
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("first, better")
    page.keyboard.press("Enter")
    assert last(page).inner_text() == "answer three"
    assert [m["content"] for m in Handler.asked[2]["messages"]] == ["first, better"]
    page.get_by_role("button", name="Version before").click()
    assert page.locator(".turn.assistant .body").all_inner_texts() == ["answer one", "answer two"]


def test_conversations_stay_and_go_out_and_in(page, tmp_path):
    say(page, "keep me", "kept")
    last(page)
    page.reload()
    page.get_by_role("button", name="keep me", exact=True).click()
    assert last(page).inner_text() == "kept"
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    path = tmp_path / "out.json"
    download.value.save_as(path)
    page.get_by_role("button", name="Delete keep me").click()
    assert page.locator("#list li").count() == 0
    page.locator("#file").set_input_files(path)
    page.get_by_role("button", name="keep me", exact=True).click()
    assert last(page).inner_text() == "kept"
    path.write_text('[{"id": 1}, 3]')
    page.locator("#file").set_input_files(path)
    assert page.locator("#list li").count() == 1


def test_settings_models_copy_and_errors(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Model", exact=True).select_option("base/tiny")
    page.locator("#question").focus()
    say(page, "Once", "upon a time")
    assert last(page).inner_text() == "upon a time"
    assert (
        Handler.asked[0]["prompt"] == "Once" and Handler.asked[0]["temperature"] == 0 and Handler.asked[0]["seed"] == 5
    )
    page.get_by_role("button", name="Copy").last.click()
    page.locator("#status", has_text="Copied").wait_for(state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == "upon a time"
    page.locator("#question").focus()
    say(page, "again", 429)
    assert "too many requests wait" in last(page).inner_text()
    page.faults.clear()  # the browser notes the 429 too


def test_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert not page.locator("nav").is_visible()
    page.get_by_role("button", name="Conversations").click()
    assert page.locator("nav").is_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
