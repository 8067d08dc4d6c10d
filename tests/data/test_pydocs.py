import base64
import random
import re

import pytest

from nanochat.data import pydocs
from nanochat.errors import UserError

WORDS = re.findall(
    r"\w+", "the value of a sample is returned when all the rows have been read and none of them is empty or broken"
)


def deduplicated(texts):
    return [rest for rest in pydocs.without_copies(texts) if rest]


def prose(seed: int, words: int = 200) -> str:
    """English-looking sentences, different for each seed."""
    pick = random.Random(seed)
    sentences = [" ".join(pick.choices(WORDS, k=10)).capitalize() + "." for _ in range(words // 10)]
    return "\n".join(sentences)


@pytest.fixture
def site(tmp_path):
    """A small site-packages folder."""

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    write("alpha/__init__.py", f'"""Alpha.\n\n{prose(1)}\n"""\n')
    write(
        "alpha/core.py",
        f'"""Core.\n\n{prose(2)}\n"""\n'
        f'class Thing(Base):\n    """A thing.\n\n    {prose(3)}\n    """\n'
        "    def turn(self, angle: float = 0.5) -> int:\n"
        f'        """Turn it by \\\\alpha.\n\n        {prose(4)}\n        """\n'
        f'def run(x, *rest, flag=True):\n    r"""Run it.\n\n    {prose(5)}\n    """\n',
    )
    write(
        "alpha/_docs.py",
        f'add_docstr(alpha.fill, r"""{prose(6)}\n\nArgs:\n    {{input}}\n    {{{{x}}}} set\n""".format(**args))\n',
    )
    write("alpha/broken.py", f'"""{prose(7)}"""\ndef (:\n')
    write("alpha/tests/test_core.py", f'"""{prose(8)}"""\n')
    write("beta/__init__.py", f'"""Beta.\n\n{prose(1)}\n"""\n')  # a copy of alpha's text
    write(
        "beta/README.md",
        f"[![badge](x)](y)\n<p align='center'>\n# Beta\n\n{prose(9)}\n* fix by @x in https://github.com/a/b/pull/1\n",
    )
    write("beta-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: beta\n\n{prose(10)}\n")
    write("beta-1.0.dist-info/LICENSE.txt", prose(11))
    write("nanochat/gpt.py", f'"""{prose(12)}"""\n')
    noise = base64.b64encode(random.Random(0).randbytes(3000)).decode()
    write("beta/blob.py", f'"""\n{noise}\n"""\n')
    return tmp_path


def test_what_is_taken_and_what_is_not(site):
    text = "\n".join(pydocs.harvest([site], workers=1))
    for seed in (1, 2, 3, 4, 5, 6, 9, 10):
        assert prose(seed).splitlines()[3] in text, seed
    for seed in (7, 8, 11, 12):
        assert prose(seed).splitlines()[3] not in text, seed


def test_docstrings_stand_under_names_and_signatures(site):
    text = "\n".join(pydocs.harvest([site], workers=1))
    assert f"alpha.core\n\nCore.\n\n{prose(2)}" in text
    assert "class alpha.core.Thing(Base)\n\nA thing." in text
    assert "Thing.turn(angle: float=0.5) -> int\n\nTurn it by \\alpha." in text
    assert "alpha.core.run(x, *rest, flag=True)\n\nRun it." in text


def test_attached_docstrings_lose_their_placeholders(site):
    text = "\n".join(pydocs.harvest([site], workers=1))
    assert "alpha.fill\n\n" in text and "{input}" not in text and "{x} set" in text


def test_markup_of_readmes_is_gone(site):
    text = "\n".join(pydocs.harvest([site], workers=1))
    assert "# Beta" in text
    for mark in ("badge", "<p", "pull/1", "Metadata-Version"):
        assert mark not in text


def test_copies_are_dropped(site):
    line = prose(1).splitlines()[3]
    assert "\n".join(pydocs.harvest([site], workers=1)).count(line) == 1


def test_documents_know_their_package(site):
    """Also those of a distribution, whose name need not be that of what it installs."""
    info = site / "PyAlpha_tools-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: pyalpha-tools\n\n{prose(13)}\n")
    (info / "RECORD").write_text(
        "../../bin/alpha,,\nPyAlpha_tools-2.0.dist-info/METADATA,,\nalpha/core.py,,\nalpha/x.py,,\n"
    )
    (site / "single.py").write_text(f'"""Single.\n\n{prose(14)}\n"""\n')
    packages = pydocs.harvest([site], workers=1)
    assert set(packages.values()) == {"alpha", "beta", "single"}
    assert packages[prose(13)] == "alpha" and packages[f"single\n\nSingle.\n\n{prose(14)}"] == "single"


def test_near_duplicates_are_dropped(site):
    one = [prose(f"part {i}", 60) for i in range(6)]
    (site / "gamma.md").write_text("\n".join(one))
    other = "\n".join(one).replace("is", "was", 3).replace("of", "for", 2)
    (site / "zeta.md").write_text(other)
    text = "\n".join(pydocs.harvest([site], workers=1))
    assert one[5] in text and text.count(one[5].splitlines()[3]) == 1


def test_same_packages_same_documents_in_any_number_of_processes(site):
    assert pydocs.harvest([site], workers=1) == pydocs.harvest([site], workers=2)


def test_fingerprint_follows_what_is_read(site):
    before = pydocs.fingerprint([site])
    assert pydocs.fingerprint([site]) == before
    (site / "beta-1.0.dist-info" / "LICENSE.txt").write_text("other")
    assert pydocs.fingerprint([site]) == before
    (site / "gamma.py").write_text('"""New."""')
    assert pydocs.fingerprint([site]) != before


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(UserError, match="no documentation below"):
        pydocs.harvest([tmp_path], workers=1)


def test_documents_have_a_size_for_small_models(site):
    paragraphs = "\n\n".join(prose(seed) for seed in range(100, 180))
    (site / "big.py").write_text(f'"""Big.\n\n{paragraphs}"""')
    texts = pydocs.harvest([site], workers=1)
    assert all(pydocs.MIN_BYTES <= len(text.encode()) <= pydocs.MAX_BYTES + 2_000 for text in texts)
    pieces = [text for text in texts if text.startswith("big")]
    assert len(pieces) > 2 and all(piece.startswith("big (continued)") for piece in pieces[1:])


def test_long_paragraph_is_kept_once_and_an_emptied_heading_goes():
    first, second, shared = prose(20), prose(21, 300), prose(22)
    a = f"{first}\n\nNotes\n-----\n\n{shared}"
    b = f"{second}\n\nNotes\n-----\n\n{shared.upper()}\n\nThe end of it."
    assert deduplicated([a, b]) == [a, f"{second}\n\nThe end of it."]


def test_short_boilerplate_is_kept_a_few_times():
    line = "This function is for the use of the other functions in this module and of nothing else at all."
    texts = [f"{prose(seed)}\n\n{line}" for seed in range(30, 50)]
    kept = deduplicated(texts)
    assert len(kept) == 20
    assert sum(line in text for text in kept) == pydocs.BOILERPLATE[1]


def test_single_paragraph_documents_survive():
    assert deduplicated([prose(60), prose(61), prose(60)]) == [prose(60), prose(61)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The name of it.",
        "\n".join(f"| {i} | {i * i} | {i**3} |" for i in range(200)),
        "\n".join(f"GL_TEXTURE_{i} GL_BUFFER_{i} GL_ARRAY" for i in range(100)),
        "Der Wert wird zurückgegeben, wenn keine der Zeilen leer ist und jede gelesen werden konnte. " * 10,
    ],
)
def test_junk_is_told_from_documentation(text):
    assert not pydocs.is_documentation(text)
    assert pydocs.is_documentation(prose(70))
