import re
import subprocess
import tomllib

import pytest

from tests.shell.scripts import ROOT, SCRIPTS, shell


def lock_entries():
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {re.match(r"[\w.-]+==[^\s;]+", line).group(): line for line in lines}


def test_the_lock_holds_every_pin_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    locked = {name.lower().replace("_", "-") for name in lock_entries()}
    for pin in pins:
        assert "==" in pin, f"{pin} is not pinned exactly"
        assert pin.lower().replace("_", "-") in locked, f"{pin} is not in requirements.lock: compile it anew (README)"


def test_the_lock_has_hashes_and_names_no_place():
    entries = lock_entries()
    assert len(entries) > 50
    for name, line in entries.items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), name
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and not re.search(r"^\s*-(?!-hash)", text, re.M)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_are_strict_and_parse(script):
    assert "set -euo pipefail" in (ROOT / script).read_text()
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").iterdir()), ids=lambda path: path.stem)
def test_profiles_parse_and_run_nothing(profile):
    subprocess.run(["bash", "-n", profile], check=True)
    assert not re.search(r"\b(python|stage|echo)\b", re.sub(r"#.*", "", profile.read_text()))


def test_set_up_has_nothing_to_do_the_second_time(tree):
    done = shell(tree, "dev/setup.sh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_machine_without_python_is_told_so(tree, bare_path):
    (tree / "requirements.lock").write_text("x==2\n")
    done = shell(tree, "dev/setup.sh", path=str(bare_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.11 or newer found") and done.stderr.count("\n") == 1


def test_a_machine_without_cargo_is_told_how_to_get_it_before_anything_is_installed(tree, bare_path):
    (tree / "requirements.lock").write_text("x==2\n")
    (bare_path / "python3").symlink_to(tree / ".venv" / "bin" / "python")
    done = shell(tree, "dev/setup.sh", path=str(bare_path), UV="/bin/false")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cargo not found: install Rust") and done.stderr.count("\n") == 1


def test_rustup_without_a_toolchain_is_told_how_to_get_one(tree, bare_path):
    (tree / "requirements.lock").write_text("x==2\n")
    (bare_path / "python3").symlink_to(tree / ".venv" / "bin" / "python")
    (bare_path / "cargo").symlink_to("/bin/false")
    done = shell(tree, "dev/setup.sh", path=str(bare_path), UV="/bin/false")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "rustup default stable" in done.stderr
