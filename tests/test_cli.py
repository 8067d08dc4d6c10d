import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from cyclopts import CycloptsError
from hypothesis import given
from hypothesis import strategies as st

from nanochat import cli
from nanochat.cli import alias, float_flag, int_flag
from nanochat.errors import UserError, exit_on_user_error
from nanochat.flags import ParentFlags

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for folder in ("scripts", "nanochat")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    and path.name != "lm_eval.py"  # whose command line is another program's
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """Does nothing with its settings."""

    device_batch_size: Annotated[int, int_flag(gte=1, lte=4096)] = 32
    """Rows per forward pass."""
    max_chars: Annotated[int, int_flag(gte=-1)] = -1
    """Characters."""
    matrix_lr: Annotated[float, float_flag(gte=0.0, lte=1.0)] = 0.02
    """Learning rate."""
    num_files: Annotated[int, int_flag(gte=-1), alias("-n")] = 8
    """Shards."""
    init: Literal["uniform", "spectral"] = "uniform"
    """Initialisation."""
    compile: bool = True
    """Compile the model."""
    name: str = ""
    """Anything."""


def parse(*words):
    return cli.parse(Example, words)


@pytest.mark.parametrize(
    "words",
    [["--device-batch-size=8"], ["--device_batch_size", "8"], ["--device_batch_size=8"], ["--device-batch-size=8e0"]],
)
def test_spellings_of_one_flag(words):
    assert parse(*words).device_batch_size == 8


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "1e308"])
def test_a_number_is_finite(value):
    """And so are its products with sizes: of 1e308 tokens a parameter the horizon would not be a number."""

    @dataclasses.dataclass(frozen=True)
    class Rate:
        rate: Annotated[float | None, float_flag(gte=0)] = None

    assert cli.read(Rate, []).rate is None and cli.read(Rate, ["--rate=1e-3"]).rate == 1e-3
    with pytest.raises(CycloptsError, match=r"--rate. Must be"):
        cli.read(Rate, [f"--rate={value}"])


def test_nothing_given_is_the_defaults():
    assert parse() == Example()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demanding:
    """One flag must be given."""

    stage: Annotated[Literal["mid", "sft"], alias("-i")]
    """Which."""


def test_a_flag_that_must_be_given(capsys):
    assert cli.parse(Demanding, ["-i", "sft"]) == Demanding(stage="sft")
    with pytest.raises(SystemExit) as end:
        cli.parse(Demanding, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and "--stage" in line


def test_scientific_whole_numbers_short_names_and_switches():
    found = parse("--max_chars=2e9", "-n", "4", "--no-compile", "--init=spectral", "--matrix-lr=1e-3")
    assert found == Example(max_chars=2_000_000_000, num_files=4, compile=False, init="spectral", matrix_lr=1e-3)


@given(st.integers(-1, 10**30))
def test_whole_numbers_are_exact(number):
    assert parse(f"--max-chars={number}").max_chars == number


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (["--device-batch-sise=8"], ["--device-batch-sise", "--device-batch-size"]),
        (["--device-batch-size=0"], ["0", ">= 1"]),
        (["--device-batch-size=1e9"], ["<= 4096"]),
        (["--max-chars=1.5"], ["--max-chars", "1.5"]),
        (["--max-chars=many"], ["--max-chars", "many"]),
        (["--max-chars=nan"], ["--max-chars", "nan"]),
        (["--max-chars=inf"], ["--max-chars", "inf"]),
        (["--matrix-lr=2"], ["<= 1"]),
        (["--init=normal"], ["normal", "spectral"]),
        (["--name"], ["--name"]),
        (["stray"], ["stray"]),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_flag_and_the_range(words, needles, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for needle in needles:
        assert needle in error


def test_help_shows_every_flag_its_default_and_its_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Example):
        assert f"--{field.name.replace('_', '-')}" in shown
    for needle in ("Does nothing", "Rows per forward pass", "32", "0.02", "spectral"):
        assert needle in shown


def test_as_dict_gives_plain_values():
    assert cli.as_dict(Example(name="x"))["name"] == "x"


def test_a_script_ends_on_its_users_mistake_with_one_line():
    script = (
        "import sys; from tests.test_cli import Example; from nanochat import cli; "
        "from nanochat.errors import UserError\n"
        "def main(found):\n    raise UserError(f'no shards\\nfor {found.name}')\n"
        "cli.run(main, Example)"
    )
    done = subprocess.run([sys.executable, "-c", script, "--name=me"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: no shards for me\n")


def failing(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "code", "needle"),
    [
        (UserError("a\n  b"), 1, "error: a b"),
        (OSError(28, "No space left on device", "/x/shard"), 1, "disk full while writing /x/shard"),
        (OSError(28, "No space left on device"), 1, "disk full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_that_a_user_can_mend(error, code, needle, capsys):
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(failing(error))
    assert end.value.code == code
    shown = capsys.readouterr().err
    assert needle in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("ours"), PermissionError(13, "Permission denied"), FileNotFoundError(2, "No")]
)
def test_defects_of_ours_keep_their_trace(error):
    with pytest.raises(type(error)):
        exit_on_user_error(failing(error))


def test_a_program_that_ends_well_just_ends():
    seen = []
    exit_on_user_error(lambda: seen.append(1))
    assert seen == [1]


# Each program in a fork of a process that has loaded what all of them do: starts of Python would take 0.4 s each.
ALL_PROGRAMS = """
import contextlib, io, json, os, resource, runpy, sys
from nanochat import cli, flags
for module in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    for word in ("--help", "--nonsense=1"):
        said, sys.argv, code = io.StringIO(), [module, word], None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                code = end.code
        loaded = sorted({"torch", "wandb", "transformers", "matplotlib"} & sys.modules.keys())
        seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        print(json.dumps([module, word, code, said.getvalue(), loaded, seconds]), flush=True)
    os._exit(0)
print(json.dumps(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])))
"""


@pytest.fixture(scope="module")
def answers():
    """(program, word) -> (exit code, lines on stderr, large libraries that were loaded, seconds of CPU)."""
    words = [sys.executable, "-c", ALL_PROGRAMS, *PROGRAMS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    *found, start = map(json.loads, done.stdout.splitlines())
    return {(module, word): (code, said, loaded, start + own) for module, word, code, said, loaded, own in found}


@pytest.mark.parametrize("word", ["--help", "--nonsense=1"])
@pytest.mark.parametrize("module", PROGRAMS)
def test_help_and_mistakes_are_answered_before_torch_is_imported(answers, module, word):
    code, said, loaded, seconds = answers[module, word]
    assert code == (0 if word == "--help" else 2), said
    assert said.count("\n") == (0 if word == "--help" else 1) and loaded == []
    assert seconds < 1.2  # 0.2 to 0.5 s of an idle core; this one has other tests to run, and torch alone takes 1.8


def test_settings_that_torch_would_slow_down_are_parsed_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--name=first"])
    cli.start(Example)
    monkeypatch.setattr(sys, "argv", ["program", "--name=second"])
    found = []
    cli.run(found.append, Example)
    cli.run(found.append, Example)
    assert [settings.name for settings in found] == ["first", "second"]


def test_a_seed_has_as_many_bits_as_generators_take(capsys):
    assert cli.parse(ParentFlags, ["--seed=18446744073709551615"]).seed == 2**64 - 1
    for seed in (2**64, 10**30, -1):
        with pytest.raises(SystemExit) as end:
            cli.parse(ParentFlags, [f"--seed={seed}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and "--seed" in line


@pytest.mark.parametrize("word", ["--" + "x" * 100_000, "--name\udcff", "--run=\udcff\udcfe"])
def test_words_too_long_or_without_a_meaning_are_one_short_line(word, capsys):
    with pytest.raises(SystemExit) as end:
        parse(word)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and len(line) < 1200


@pytest.mark.parametrize("words", [["--nonsense"], ["--help"]])
def test_under_torchrun_rank_0_answers(words, monkeypatch, capsys):
    monkeypatch.setattr("nanochat.errors.RANK_0_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit) as end:
        parse(*words)
    assert end.value.code == (2 if words == ["--nonsense"] else 0)
    assert capsys.readouterr() == ("", "")


INTERRUPTED = """
import os, runpy, signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == word:
            os.kill(os.getpid(), signal.SIGINT)
word, module = sys.argv.pop(1), sys.argv.pop(1)
sys.meta_path.insert(0, Interrupts())
sys.argv[0] = "-m"  # as Python has it while it looks for the module
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("during", ["cyclopts", "numpy", "nanochat.train.run", "pyarrow.parquet"])
def test_ctrl_c_while_a_program_is_loaded_ends_it_without_a_trace(during):
    words = [sys.executable, "-c", INTERRUPTED, during, "scripts.base_train", "--source=local:nowhere"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode in (-signal.SIGINT, 130), ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("\n") <= 1, ended.stderr
