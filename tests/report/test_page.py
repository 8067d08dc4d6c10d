"""report.html: one file that needs nothing else, whatever is in it; on a phone too."""

import re
import shutil
from html.parser import HTMLParser

import pytest

from nanochat import ledger, paths, report, sections
from nanochat.errors import UserError
from nanochat.report import __main__ as command
from tests.report.runs import write, write_run
from tests.test_report import HOSTILE, hostile_section

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def generate(folder):
    return report.generate(paths.run_dir(), copy_to=folder).with_name("report.html")


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_elsewhere_is_text(store, monkeypatch, tmp_path, text):
    monkeypatch.setenv("NANOCHAT_RUN_ID", "x")

    def tags(words):
        sections.write_section("base_train", words, hostile_section(words))
        sections.write_section("base_eval", words, hostile_section(words))
        return Tags(generate(tmp_path).read_text())

    harmless, hostile = tags("words"), tags(text)
    assert [tag for tag in hostile.found if tag[0] != "path"] == [tag for tag in harmless.found if tag[0] != "path"]
    if text.isprintable():
        assert "".join(hostile.text).count(text.strip()) >= 8


def test_the_page_is_one_file(store, monkeypatch, tmp_path):
    write_run("a", monkeypatch)
    text = generate(tmp_path).read_text()
    assert "<script" not in text and not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", text)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert text.count("<figure") >= 8 and "7.3M" in text and "1.5000 <small>± 0.1000" in text
    markdown = (tmp_path / "report.md").read_text()
    for file in re.findall(r"\]\((\S+\.svg)\)", markdown):
        assert (tmp_path / file).read_text().startswith("<svg")
    assert len(re.findall(r"\]\((\S+\.svg)\)", markdown)) == 4


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_nothing_sticks_out_on_a_phone_and_nothing_is_fetched(store, monkeypatch, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    write_run("a", monkeypatch)
    sections.write_section("chat_eval_sft", "Answers", hostile_section("https://" + "long" * 60))
    page_file = generate(tmp_path)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme=scheme)
            asked, faults = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, faults=faults: faults.append(message.text))
            page.goto(f"file://{page_file}")
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            # names in the first column keep their words in one piece; the table scrolls
            heights = "[...document.querySelectorAll('td:first-child')].map(e => e.getBoundingClientRect().height)"
            assert max(page.evaluate(heights)) < 80
            drawn = "[...document.querySelectorAll('figure svg')].every(e => e.getBoundingClientRect().height > 100)"
            assert page.evaluate(drawn) and len(asked) == 1 and not faults
            # text of the plots has the colour of the page's
            colours = (
                "[getComputedStyle(document.querySelector('figure text')).fill, getComputedStyle(document.body).color]"
            )
            assert len(set(page.evaluate(colours))) == 1
        browser.close()


def test_values_that_no_plot_can_show_are_left_out(store, monkeypatch, tmp_path):
    folder = write_run("a", monkeypatch)
    odd = [None, "1", True, 10**400, float("nan"), float("inf"), -(10**400)]
    write(
        folder / "metrics.jsonl", [{"stage": "base", "step": 1, "tokens": 5, "Loss/train_loss": value} for value in odd]
    )
    write(
        folder / "stages.jsonl",
        [{"stage": "a$b$\x01 <i>", "status": "finished", "time": 1.0, "seconds": 60.0, "key": "k"}],
    )
    text = generate(tmp_path).read_text()
    assert "a$b$" in text and "<i>" not in text and "\x01" not in text


# ---- the command


def test_a_run_is_named_or_a_folder(store, monkeypatch, tmp_path, capsys):
    runs = [write_run("a", monkeypatch), write_run("b", monkeypatch)]
    monkeypatch.chdir(tmp_path)
    command.main(command.Settings("compare", ("a", str(runs[1]))))
    assert "compare.html" in capsys.readouterr().out and (tmp_path / "compare.md").exists()
    with pytest.raises(UserError, match=r"no run c in .*there are a, b"):
        command.main(command.Settings("compare", ("a", "c")))
    with pytest.raises(UserError, match="NANOCHAT_RUN_ID"):
        command.main(command.Settings("generate", ("a",)))
    assert ledger.read(runs[0])
