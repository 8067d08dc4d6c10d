import errno
import json
import os
import pty
import subprocess
import sys

import pytest

from nanochat import errors
from nanochat.errors import UserError, exit_on_user_error, visible
from nanochat.files import parse_json, read_jsonl

START = "from nanochat.errors import UserError, exit_on_user_error; import sys, os, json\n"
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def in_ascii(code):
    return f"exec(bytes.fromhex('{code.encode().hex()}').decode())"


def run(program, shell="", **environment):
    """A program that does `program` in its main, its streams as `shell` has them."""
    lines = "".join(f"    {line}\n" for line in program.splitlines())
    code = in_ascii(f"{START}def main():\n{lines}exit_on_user_error(main)")
    command = ["bash", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=60)


@pytest.mark.parametrize("locale", [ASCII, {"PYTHONIOENCODING": "latin-1"}], ids=["ascii", "latin-1"])
def test_logs_are_utf_8_whatever_the_locale(locale):
    done = run("print('模型 █ \\ud800'); print('é', file=sys.stderr); raise UserError('坏')", **locale)
    assert done.stdout.decode() == "模型 █ ?\n"
    assert (done.returncode, done.stderr.decode()) == (1, "é\nerror: 坏\n")


def test_a_terminal_shows_a_question_mark_for_what_it_cannot_show():
    ours, theirs = pty.openpty()
    code = in_ascii(f"{START}exit_on_user_error(lambda: print('model 模 █'))")
    environment = {**os.environ, **ASCII}
    done = subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.read(ours, 100).strip() == b"model ? ?"
    os.close(ours)


@pytest.mark.parametrize(
    "program",
    ["for _ in range(100000): print('line')", "print('short')", "import time; time.sleep(0.5); raise UserError('x')"],
)
@pytest.mark.parametrize("shell", ["| true", "2>&1 | true"], ids=["stdout", "both"])
def test_a_closed_pipe_ends_quietly(program, shell):
    done = run(program, f"{shell}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 1, errors.CLOSED_PIPE)
    assert done.stderr in (b"", b"error: x\n")


def test_a_pipe_of_ours_that_breaks_is_a_defect():
    done = run("raise BrokenPipeError(32, 'Broken pipe')")
    assert done.returncode == 1 and b"Traceback" in done.stderr


@pytest.mark.parametrize("shell", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_go_nowhere(shell, tmp_path):
    program = f"file = open({str(tmp_path / 'x')!r}, 'w')\nprint('out'); print('err', file=sys.stderr)\n"
    program += "assert file.fileno() > 2 and sys.stdin.read() == ''\nos.system('echo of a child')"
    done = run(program, shell if "<" in shell else f"{shell} </dev/null")
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "x").read_text() == ""


def test_a_full_disk_under_stdout_is_one_line():
    done = run("print('x')", ">/dev/full")
    assert done.returncode == 1 and done.stderr.startswith(b"error: disk full") and done.stderr.count(b"\n") == 1


def failing(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT])
def test_a_file_that_cannot_be_used_is_one_line_with_its_name(number, capsys):
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(failing(OSError(number, os.strerror(number), "/store/x")))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and "/store/x" in line and os.strerror(number) in line


def test_a_file_of_the_users_is_not_told_to_be_in_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "store"))
    ours, theirs = tmp_path / "store" / "x", tmp_path / "a.txt"
    for path, hint in ((ours, "NANOCHAT_BASE_DIR=DIR keeps everything in DIR"), (theirs, "make it readable")):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        said = errors.explained(PermissionError(errno.EACCES, "Permission denied", str(path)))
        assert said.startswith(f"{path}: Permission denied") and hint in said


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    done = run("os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); os.getcwd()", str(tmp_path))
    assert done.stderr.decode() == "error: the current folder has been removed: cd to one that is there\n"


def test_errors_of_no_file_keep_their_trace():
    with pytest.raises(OSError, match="Cannot allocate"):
        exit_on_user_error(failing(OSError(errno.ENOMEM, "Cannot allocate memory")))
    with pytest.raises(RecursionError):
        exit_on_user_error(failing(RecursionError("maximum recursion depth exceeded")))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_nested_too_deep_is_one_line(text, capsys):
    with pytest.raises(SystemExit):
        exit_on_user_error(lambda: json.loads(text))
    (line,) = capsys.readouterr().err.splitlines()
    assert "JSON" in line and "nested" in line


def test_stdin_that_is_no_text_of_this_locale_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"caf\xe9\n")
    done = run("print(sys.stdin.read().strip())", f"< {tmp_path / 'x'}")
    assert (done.returncode, done.stdout.decode()) == (0, "caf\ufffd\n")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_nested_too_deep_is_damage_to_its_readers(text, tmp_path):
    with pytest.raises(ValueError, match="nested"):
        parse_json(text.encode())
    (tmp_path / "x.jsonl").write_text(f'{text}\n{{"a": 1}}\n')
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}]


def test_control_characters_never_reach_the_terminal(capsys):
    hostile = "\x1b]0;title\x07 \x9b2J \r\x08 \u202eabc \x7f"
    assert not any(character in visible(hostile) for character in hostile if ord(character) in (27, 7, 0x9B, 8, 13))
    assert visible("tab\tand\nlines, 模型 é 👩\u200d👧") == "tab\tand\nlines, 模型 é 👩\u200d👧"
    with pytest.raises(SystemExit):
        exit_on_user_error(failing(UserError(hostile)))
    assert capsys.readouterr().err.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HTTPS_PROXY=http://u:s3/cret@h:1 is no proxy", "HTTPS_PROXY=http://***@h:1 is no proxy"),
        ("HTTPS_PROXY=u:s3cret@h:99999: expected", "HTTPS_PROXY=***@h:99999: expected"),
        ("http://token@h/x, http://h:80/x", "http://***@h/x, http://h:80/x"),
        ("--source=local:me@home/text: no such folder", "--source=local:me@home/text: no such folder"),
        ("bin:a@b, mail me@h, http://h/@x", "bin:a@b, mail me@h, http://h/@x"),
    ],
)
def test_passwords_are_masked_and_folders_are_not(text, shown):
    assert errors.masked(text) == shown


def test_a_message_is_never_megabytes(capsys):
    with pytest.raises(SystemExit):
        exit_on_user_error(failing(UserError(f"--tasks={'x' * 10**6}: no such task")))
    line = capsys.readouterr().err
    assert len(line) < 1100 and "--tasks=x" in line and "no such task" in line


def test_under_torchrun_rank_0_says_it_and_the_others_leave_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(errors, "RANK_0_SECONDS", 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("0", "1"):
        path = tmp_path / rank
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        with pytest.raises(SystemExit) as end:
            exit_on_user_error(failing(UserError("no shards")))
        assert end.value.code == 1
        assert json.loads(path.read_text())["message"]["message"] == "error: no shards"
        assert capsys.readouterr().err == ("error: no shards\n" if rank == "0" else "")


@pytest.mark.parametrize("rank", ["5", "a", "-1"])
def test_a_rank_that_nobody_has_started_says_it_itself(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        exit_on_user_error(failing(UserError("RANK alone")))
    assert capsys.readouterr().err == "error: RANK alone\n"
