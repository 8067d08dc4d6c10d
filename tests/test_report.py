import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nanochat import hardware, ledger, paths, report, sections
from nanochat.errors import UserError
from nanochat.report import fence
from nanochat.sections import duration, number, plain

NO_GPU = {
    "platform": "Linux", "processor": "cpu", "physical_cores": 1, "logical_cores": 2, "usable_cores": 2,
    "memory_bytes": 2**33, "gpus": [], "cuda": None,
}  # fmt: skip
EIGHT = {**NO_GPU, "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30}] * 8, "cuda": "13.0"}


@pytest.fixture(autouse=True)
def _run(store, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RUN_ID", "tiny-d4")
    monkeypatch.setattr(hardware, "hardware", lambda: NO_GPU)


def write_run():
    sections.write_section(
        "base_eval",
        "CORE",
        {
            "metrics": {"CORE": 0.1234, "CORE standard error": 0.01, "step": 400},
            "tables": [{"title": "Tasks", "columns": ["Task", "Score"], "rows": [["a|b", 0.5], ["c", None]]}],
            "synthetic": True,
        },
    )
    sections.write_section(
        "base_train", "Training", {"settings": {"depth": 4}, "metrics": {"Loss/val_bpb": 1.5, "mfu": 0.4}}
    )
    sections.write_section(
        "base_loss",
        "Loss",
        {
            "metrics": {"val_bpb": 1.25, "val_bpb_stderr": 0.0625, "train_bpb": math.nan},
            "samples": [{"prompt": "Hello", "text": "```\nnot the end"}],
            "notes": ["Measured on pydocs."],
            "settings": {"source": "pydocs"},
        },
    )
    append = ledger.append
    run_dir = paths.run_dir()
    append(run_dir, {"stage": "base_train", "status": "started", "time": 1000.0, "key": "k"})
    append(run_dir, {"stage": "base_train", "status": "finished", "time": 1100.0, "key": "k", "seconds": 3600.0})
    append(run_dir, {"stage": "chat_data", "status": "failed", "time": 4600.0, "seconds": 5.0, "exit_code": 3})
    append(run_dir, {"stage": "tok_eval", "status": "skipped", "time": 4700.0, "reason": "no text"})


def write_metrics(*lines):
    path = paths.run_dir() / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def generate(folder):
    return report.generate(paths.run_dir(), copy_to=folder).read_text()


def test_report_holds_summary_stages_sections_and_samples(tmp_path):
    write_run()
    text = generate(tmp_path)
    assert "| Metric | BASE |\n|---|---:|\n| CORE | 0.1234 ± 0.0100 |\n| val bpb | 1.2500 ± 0.0625 |\n" in text
    assert "MID" not in text
    assert "| base_train | finished | 1 h 0 min |" in text
    assert "| chat_data | **failed** | 5.0 s | - | exit code 3 |" in text
    assert "| tok_eval | **skipped** | - | - | no text |" in text
    assert "| dataset | **pending** |" in text
    assert "1 h 1 min from the first start to the last end, of which 1 h 0 min in stages" in text
    assert text.index("## Training") < text.index("## Loss") < text.index("## CORE")
    assert "| a\\|b | 0.5000 |" in text and "| c | - |" in text
    assert "````text\n```\nnot the end\n````" in text
    assert "Measured on pydocs." in text and "- depth: 4" in text


def test_the_section_of_a_stage_that_was_skipped_since_is_left_out(tmp_path):
    write_run()
    sections.write_section("chat_eval_rl", "Chat evaluation, rl", {"metrics": {"GSM8K": 0.5}})
    assert "| GSM8K |" in generate(tmp_path) and "## Chat evaluation, rl" in generate(tmp_path)
    ledger.append(paths.run_dir(), {"stage": "chat_eval_rl", "status": "skipped", "reason": "RUN_RL=1 runs it"})
    text = generate(tmp_path)
    assert "GSM8K" not in text and "| chat_eval_rl | **skipped** | - | - | RUN_RL=1 runs it |" in text


def chat_run(*events):
    """Sections of all chat stages, and a ledger in which they finished and then `events` (stage, status) happened."""
    stages = ("mid_train", "chat_eval_mid", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl")
    for stage in stages:
        sections.write_section(stage, f"Section of {stage}", {"metrics": {"GSM8K": 0.5}})
    for stage, status in [*((stage, "finished") for stage in stages), *events]:
        ledger.append(paths.run_dir(), {"stage": stage, "status": status, "key": "k", "seconds": 1.0})


def test_numbers_of_models_that_were_trained_before_the_last_failure_are_left_out(tmp_path):
    chat_run(("mid_train", "finished"), ("chat_eval_mid", "finished"), ("chat_sft", "started"), ("chat_sft", "failed"))
    text = generate(tmp_path)
    assert "| Metric | MID |\n" in text
    assert "## Section of mid_train" in text and "## Section of chat_eval_mid" in text
    assert "| chat_sft | **failed** |" in text and "## Section of chat_sft" not in text
    for stage in ("chat_eval_sft", "chat_rl", "chat_eval_rl"):
        assert f"| {stage} | **stale** |" in text and f"## Section of {stage}" not in text


def test_grading_a_stage_again_leaves_later_stages_as_they_are(tmp_path):
    chat_run(("chat_eval_mid", "started"), ("chat_eval_mid", "finished"))
    text = generate(tmp_path)
    assert "stale" not in text and "| Metric | MID | SFT | RL |\n" in text


def test_stages_started_by_hand_are_reported(tmp_path):
    sections.write_section("chat_eval_sft", "By hand", {"metrics": {"GSM8K": 0.5}})
    assert "## By hand" in generate(tmp_path)
    ledger.append(paths.run_dir(), {"stage": "base_train", "status": "finished"})
    assert "## By hand" in generate(tmp_path)


def test_title_says_that_data_is_offline_or_synthetic(tmp_path):
    write_run()
    title = generate(tmp_path).splitlines()[0]
    assert title == "# nanochat report: tiny-d4 (offline text: pydocs; synthetic data in base_eval)"


def test_title_of_real_data_says_nothing(tmp_path):
    sections.write_section("dataset", "Text", {"settings": {"source": "fineweb-edu"}})
    assert generate(tmp_path).splitlines()[0] == "# nanochat report: tiny-d4"


def test_report_json_is_valid_and_stands_beside(tmp_path):
    write_run()
    generate(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["summary"]["rows"][0] == ["CORE", "0.1234 ± 0.0100"]
    assert found["sections"][1]["metrics"]["train_bpb"] is None
    assert (paths.report_dir() / "report.md").read_text() == (tmp_path / "report.md").read_text()
    assert "Hello" in (paths.run_dir() / "report" / "base_loss.md").read_text()


def test_every_column_that_exists_and_chatcore_last(tmp_path):
    write_run()
    sections.write_section("chat_eval_sft", "Chat", {"metrics": {"ChatCORE": 0.2, "MMLU": 0.3, "MMLU_stderr": 0.01}})
    text = generate(tmp_path)
    assert "| Metric | BASE | SFT |\n|---|---:|---:|\n| CORE | 0.1234 ± 0.0100 | - |\n" in text
    assert "| MMLU | - | 0.3000 ± 0.0100 |\n| ChatCORE | - | 0.2000 |\n" in text


def test_cost_is_from_the_price_that_is_given_and_the_time_in_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "hardware", lambda: EIGHT)
    write_run()
    text = report.generate(paths.run_dir(), tmp_path, 24).read_text()
    assert "8 × NVIDIA H100" in text and "24.03 USD" in text and "24.00 USD an hour" in text
    assert "USD" not in generate(tmp_path)  # and none is guessed from the card


def test_the_sentences_of_a_stage_stand_in_its_template(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/chat_eval.md.j2").write_text(
        "{% if facts.left_out %}\n\nLeft out:\n{{ facts.left_out }}.\n{% endif %}\n\n"
        "{{ facts.items | number }} items,\n{{ settings.k }} samples.\n"
    )
    monkeypatch.setattr(report, "TEMPLATES", tmp_path)
    section = {"stage": "chat_eval_rl", "settings": {"k": 4}, "metrics": {}, "notes": []}
    assert report.notes({**section, "facts": {"items": 1234, "left_out": ""}}) == ["1,234 items, 4 samples."]
    assert report.notes({**section, "facts": {"items": 1, "left_out": "MMLU"}})[0] == "Left out: MMLU."
    assert report.notes({**section, "stage": "tok_eval", "facts": {}, "notes": ["By hand."]}) == ["By hand."]
    (missing,) = report.notes({**section, "facts": {}})
    assert missing.startswith("No notes: another version of the code left this section (") and "left_out" in missing


def test_nothing_to_report_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        generate(tmp_path)


def test_a_damaged_section_is_one_line(tmp_path):
    write_run()
    (paths.run_dir() / "report" / "base_eval.json").write_text('{"sta')
    with pytest.raises(UserError, match=r"base_eval\.json is not valid JSON"):
        generate(tmp_path)


def test_reset_forgets_sections_only(tmp_path):
    write_run()
    report.reset(paths.run_dir())
    text = generate(tmp_path)
    assert "## Loss" not in text and "| base_train | finished |" in text


def test_only_rank_0_writes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    sections.write_section("base_train", "Training", {})
    assert not (paths.run_dir() / "report").exists()


def test_without_a_name_the_run_that_was_last_at_work_is_reported(monkeypatch):
    write_run()
    monkeypatch.delenv("NANOCHAT_RUN_ID")
    assert report.current_run().name == "tiny-d4"


def test_loss_curve_is_well_formed_and_against_tokens(tmp_path):
    write_run()
    lines = [{"step": n, "stage": "base", "tokens": 1000 * n, "Loss/train_loss": 8 / (n + 1)} for n in range(2000)]
    lines += [{"step": 2000, "stage": "base", "tokens": 2_000_000, "Loss/val_bpb": 1.5}]
    write_metrics(*lines)
    text = generate(tmp_path)
    assert "](report_loss.svg)" in text
    svg = (tmp_path / "report_loss.svg").read_text()
    ET.fromstring(svg)
    assert "tokens" in svg and "1.5" in svg and "2M" in svg and "prefers-color-scheme: dark" in svg
    assert len(svg) < 60_000
    generate(tmp_path)
    assert (tmp_path / "report_loss.svg").read_text() == svg


def test_no_points_no_curve(tmp_path):
    write_run()
    assert "report_loss" not in generate(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"), (12345, "12,345"), (3.4918e18, "3.492e+18"), (1234.56, "1,234.6"), (1e-5, "1e-05"),
        (0.0, "0"), (True, "yes"), (None, "-"), ("x", "x"), (math.inf, "inf"), (-5, "-5"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 0 s"), (125, "2 min 5 s"), (11220, "3 h 7 min"), (None, "-")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_fence_is_never_closed_from_inside():
    for inside in ("", "```", "a\n`````\nb"):
        first, *_, last = fence(inside).splitlines()
        assert last not in inside or not last.strip()
        assert first == last + "text"


def test_plain_is_json_whatever_came_in():
    value = {"a": np.float32(0.5), 1: (np.int64(2), math.nan), "p": paths.run_dir()}
    assert plain(value) == {"a": 0.5, "1": [2, None], "p": str(paths.run_dir())}


def test_a_report_whose_copy_cannot_be_written_is_in_the_store(store):
    write_run()
    (store / "file").touch()
    assert report.generate(paths.run_dir(), copy_to=store / "file" / "cwd") == store / "report" / "report.md"
    (store / "report").rename(store / "moved")
    (store / "report").touch()
    with pytest.raises(UserError, match=r"neither .* can be written"):
        report.generate(paths.run_dir(), copy_to=store / "file" / "cwd")


# ---- text from elsewhere: prompts, names, notes, samples

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- ", "</details><b>", "&lt;b&gt;", "<http://x.y>",
    "[x](javascript:alert(1))", "![i](http://x.example/i.png)", "[a]: http://x.example", "`code`", "**a** _b_ __c__",
    "~~gone~~ ~gone~", "# heading", "## ", "- item", "+ item", "1. item", "12) item", "> quote", "---\n# x", "a\n\n# b",
    "| a | b |\n|---|---|\n| c | d |", "```\n<b>\n```", "    <b>indented", "\x1b[31mred\x07", "\u202eright to left",
    "lone \ud800", "back\\slash \\<b>", "===", "a\n\n<b>",
]  # fmt: skip


def tokens(text):
    """Kinds of everything in a Markdown text, and of what stands within lines."""
    found = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [(token.type, token.content) for each in found for token in (each, *(each.children or []))]


def hostile_section(text):
    return {
        "settings": {text: text, "list": [text]},
        "metrics": {text: 0.5, f"{text} standard error": 0.1, "word": text},
        "tables": [{"title": text, "columns": ["a", text], "rows": [[text, 1.0], [text, text]]}],
        "samples": [{"prompt": text, "text": text}],
        "notes": [text],
    }


def shape(text):
    return [kind for kind, _ in tokens(text)]


def shown(text):
    return "".join(content for kind, content in tokens(text) if kind in ("text", "text_special", "fence"))


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_elsewhere_is_neither_markup_nor_html(tmp_path, text):
    def report_of(words):
        sections.write_section("base_train", words, hostile_section(words))
        return generate(tmp_path)

    harmless, hostile = report_of("words"), report_of(text)
    assert [kind for kind in shape(hostile) if kind not in ("text", "text_special")] == [
        kind for kind in shape(harmless) if kind not in ("text", "text_special")
    ]
    assert not any(ord(character) < 32 and character not in "\n\t" for character in hostile)
    if text.isprintable():
        assert shown(hostile).count(text.strip()) >= 8  # it reads as it was written


@given(st.text(max_size=40))
def test_any_text_stays_within_its_line(text):
    line = f"{report.escape(text)}\n"
    assert text == "-" or set(shape(line)) <= {"paragraph_open", "inline", "text", "text_special", "paragraph_close"}
    row = shape(f"| a | b |\n|---|---|\n| {report.cell(text)} | c |\n")
    assert row.count("td_open") == 2 and not {"html_inline", "link_open", "image", "code_inline"} & set(row)


@pytest.mark.parametrize("stage", ["../../outside", "/tmp/outside", "base_train", "a/b", "", 5, None])
def test_a_section_of_another_name_than_its_file_is_refused_and_writes_nothing(tmp_path, stage):
    write_run()
    generate(tmp_path)
    before = {path for path in paths.get_base_dir().rglob("*")}
    folder = paths.run_dir() / "report"
    text = (folder / "base_eval.json").read_text()
    (folder / "base_eval.json").write_text(json.dumps({**json.loads(text), "stage": stage}))
    with pytest.raises(UserError, match=r"base_eval\.json is damaged \(stage .*remove it and run that stage again"):
        generate(tmp_path)
    if isinstance(stage, str) and stage.startswith(("/", "..")):
        with pytest.raises(UserError, match="leads out of"):
            sections.write_section(stage, "Elsewhere", {})
    assert {path for path in paths.get_base_dir().rglob("*")} == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["stage", "title", "time", "settings", "metrics", "facts", "tables", "samples", "notes", "synthetic"]


@given(st.sampled_from(FIELDS), JSON)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_a_section_is_shown_or_refused(tmp_path, field, value):
    write_run()
    path = paths.run_dir() / "report" / "chat_eval_sft.json"
    section = {"stage": "chat_eval_sft", "title": "t", "time": 1.0, **hostile_section("x"), field: value}
    path.write_text(json.dumps(section))
    try:
        generate(tmp_path)
    except UserError as error:
        assert "chat_eval_sft.json is" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff\xfe", b"[]", b"null", b'{"a": ' * 5000 + b"1" + b"}" * 5000]
)
def test_a_section_that_is_no_object_is_one_line(tmp_path, content):
    write_run()
    (paths.run_dir() / "report" / "base_eval.json").write_bytes(content)
    with pytest.raises(UserError, match=r"base_eval\.json is not valid JSON"):
        generate(tmp_path)
