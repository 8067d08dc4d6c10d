"""Every command of the documentation is run: dry, up to where its work begins, or with stand-ins for what needs an
account or a cluster. Blocks of commands have no language, or bash; what is no command says text, json or the like.
Commands within sentences count, too."""

import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from nanochat import cli
from tests.shell.conftest import bare_path, tree  # noqa: F401
from tests.shell.scripts import ROOT, shell
from tests.shell.test_pretrain import finish, start
from tests.shell.test_pretrain import tree as pretrain_tree  # noqa: F401

DOCUMENTS = ("README.md", "README.zh.md", "docs/guide.md", "docs/walkthrough.md", "docs/d12.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python -m|bash) [^`…]+)`")
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
# Commands of others: only the files of ours that they name are looked for.
OTHERS = frozenset(
    {
        "git",
        "cd",
        "source",
        "export",
        "uv",
        "cp",
        "volc",
        "sbatch",
        "sky",
        "kubectl",
        "tensorboard",
        "wandb",
        "transformers",
    }
)


def blocks(document, *languages):
    text = (ROOT / document).read_text(encoding="utf-8")
    return [body for language, body in BLOCK.findall(text) if language in languages]


def commands(document):
    """The lines of its blocks of commands, one for each command, comments left out."""
    lines = "".join(blocks(document, "", "bash")).replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in _without_comment(line).split(" && "))
    return [part for part in parts if part]


def _without_comment(line):
    return re.sub(r"(^|\s)#.*$", "", line)


def words_of(command):
    """(variables set before it, its words) as a shell reads them; what is redirected stays out."""
    words = shlex.split(re.sub(r"\s[<>]\s*\S+", "", command))
    place = next((place for place, word in enumerate(words) if not ASSIGNMENT.fullmatch(word)), len(words))
    return dict(word.split("=", 1) for word in words[:place]), words[place:]


def with_folders(command, tmp_path):
    """The command with folders of the reader's that are there."""

    def make(match):
        folder = tmp_path / match.group().strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval_data").mkdir(exist_ok=True)  # should it be a bundle of tasks: the smallest
        (folder / "eval_data/a.jsonl").write_text('{"context": "one", "continuation": " two"}\n')
        task = "{label: a, dataset_uri: a.jsonl, num_fewshot: [0], icl_task_type: language_modeling}"
        (folder / "core.yaml").write_text(f"icl_tasks: [{task}]\n")
        (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na,0\n")
        return str(folder)

    return re.sub(r"(?<=[=:])/(?:my|data|mnt)/[\w/.]+", make, command)


def in_sentences(document):
    """The commands that stand in its text."""
    text = BLOCK.sub("", (ROOT / document).read_text(encoding="utf-8"))
    return [" ".join(command.split()) for command in INLINE.findall(text)]


EVERY = sorted({command for name in DOCUMENTS for command in (*commands(name), *in_sentences(name))})


def of(*beginnings):
    return [command for command in EVERY if _kind(command) in beginnings]


def _kind(command):
    _, words = words_of(command)
    return words[0] if words else "variables"


@pytest.mark.parametrize("command", of("python"))
def test_a_command_of_python_is_understood(command, monkeypatch, tmp_path, capsys):
    environment, (_, flag, module, *words) = words_of(with_folders(command, tmp_path))
    assert flag == "-m"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    words = [word.replace("$TASKS", "Identity") for word in words]
    if module == "nanochat.launch" and words[:1] != ["plan"]:
        if "--" in words:  # what is started on every GPU
            _, started, *flags = words[words.index("--") + 1 :]
            cli.check(started, flags)
        monkeypatch.setattr(
            sys, "argv", ["launch", *([] if "--dry-run" in words else ["--dry-run"] if words else []), *words]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert ended.value.code in (0, None)
    elif module == "nanochat.pipeline":
        assert words in (["status"], ["reset"])
    elif module == "nanochat.launch":
        cli.check("nanochat.cluster.plan", words[1:])
    elif module == "nanochat.hf.lm_eval":  # the command line of lm_eval
        harness = pytest.importorskip("lm_eval._cli", reason="lm_eval is not installed (the extra `eval`)")
        monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
        harness.HarnessCLI().parse_args()
    else:
        cli.check(module, words)


@pytest.fixture
def cards(tree, bare_path):  # noqa: F811
    """Eight GPUs, for who asks."""
    driver, python = bare_path / "nvidia-smi", tree / ".venv/bin/python"
    driver.write_text("#!/bin/sh\nexit 0\n")
    driver.chmod(0o755)
    python.write_text(python.read_text().replace("echo 1", "echo 8"))


def scripts(*names):
    return [command for command in of("bash") if words_of(command)[1][1] in names]


@pytest.mark.parametrize("command", scripts("speedrun.sh"))
def test_speedrun_goes_through_its_stages(command, tree, bare_path, cards, tmp_path):  # noqa: F811
    environment, (_, script, *words) = words_of(with_folders(command, tmp_path))
    environment = {"NANOCHAT_BASE_DIR": str(tmp_path), **environment}
    done = shell(tree, script, *words, path=str(bare_path), **environment)
    assert done.returncode == 0, done.stderr
    assert "--help" in words or "nanochat.pipeline run base_train" in (tree / "calls").read_text()


@pytest.mark.parametrize("command", scripts("pretrain.sh"))
def test_pretrain_goes_through_its_stages(command, pretrain_tree):  # noqa: F811
    environment, (_, _, *words) = words_of(command)
    (pretrain_tree / "store/checkpoints/base/pretrain-d26-fineweb-edu").mkdir(parents=True)
    (pretrain_tree / "store/checkpoints/base/pretrain-d26-fineweb-edu/COMPLETE").touch()
    code, _, err = finish(start(pretrain_tree, *words, **environment))
    assert code == 0, err
    assert (pretrain_tree / "calls").read_text()


@pytest.mark.parametrize("command", sorted({*of("bash")} - {*scripts("speedrun.sh", "pretrain.sh")}))
def test_other_scripts_are_there_and_show_what_they_would_do(command):
    environment, (_, script, *words) = words_of(command)
    if script.startswith("volc/"):
        words = words if "--dry-run" in words else ["--dry-run", *words]
        call = ["bash", script, *words]
        done = subprocess.run(call, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0 and "pretrain.sh" in done.stdout, done.stderr
    else:  # these have tests of their own; here that they parse
        assert subprocess.run(["bash", "-n", script], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", of(*OTHERS))
def test_files_that_are_named_are_there(command):
    _, words = words_of(command)
    made = (".venv/bin/activate", "volc/config")
    for word in words[1:]:
        if re.match(r"(docs|volc|slurm|sky|kubeflow|dev|profiles|requirements|pyproject)\b[\w/.]*\.\w+$", word):
            assert (ROOT / word).exists() or word in made, word


def test_every_command_is_one_of_these():
    known = {"python", "bash", "variables", *OTHERS}
    assert [command for command in EVERY if _kind(command) not in known] == []


def test_both_languages_have_the_same_commands():
    assert commands("README.md") == commands("README.zh.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_pictures_lead_somewhere(document):
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", (ROOT / document).read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_text_names_are_there(document):
    text = BLOCK.sub("", (ROOT / document).read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:nanochat|scripts|docs|dev|benchmarks|profiles|tests)/[\w/]*\w(?:\.\w+)*/?)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("code", [code for document in DOCUMENTS for code in blocks(document, "python")])
def test_python_of_the_documents_compiles(code):
    compile(code, "documents", "exec")


def test_messages_that_the_guide_explains_are_in_the_code():
    sources = [
        *(ROOT / "nanochat").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.py"),
        *ROOT.glob("*.sh"),
        *ROOT.glob("dev/*.sh"),
    ]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))
    code = re.sub(r"\$\w+|\{[^{}]*\}", "…", code)
    guide = (ROOT / "docs/guide.md").read_text().partition("## When something goes wrong")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", guide, re.M)
    assert len(messages) > 15
    assert [message for message in messages if not re.search(_pattern(message), code)] == []


def _pattern(message):
    return ".{0,80}?".join(re.escape(part) for part in message.split("…"))
