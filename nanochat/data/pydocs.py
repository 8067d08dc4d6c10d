"""English technical prose that every machine has: the documentation inside the installed Python packages.

    python -m nanochat.dataset --source=pydocs

Read are the standard library and site-packages of the running interpreter, as text: nothing is imported. Taken are
docstrings (each under its qualified name and signature), long string constants that are documentation (numpy and torch
attach theirs with calls, the language reference is a dict of strings), README-like files, and the descriptions
that packages carry in their METADATA. The same packages give the same documents. Held out are whole packages: pieces of
one module are full of each other's lines.
"""

import ast
import collections
import gc
import hashlib
import inspect
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from nanochat.data import overlap, parquet
from nanochat.errors import UserError
from nanochat.paths import data_dir

# Of some 28 MB: six train shards and a validation shard like the others, with row groups for several ranks
VAL_SHARE = 0.045
MIN_VAL_BYTES = 600_000
TRAIN_SHARDS = 6
ROW_GROUP = 128

MIN_BYTES = 300  # shorter documents are names without explanation
SOFT_BYTES = 6_000  # a document is closed once it is this long
MAX_BYTES = 20_000  # a single docstring beyond this is cut between paragraphs
MIN_CONSTANT = 400  # characters; string constants below this are messages, not documentation
LONG_PARAGRAPH = 200  # letters; paragraphs from here on are kept only where they stand first
BOILERPLATE = (60, 8)  # letters, times: shorter ones from 60 on are kept eight times ("out: the output tensor.")
WIDE_SIGNATURE = 120  # characters; wider ones are written without annotations

# Tests document nothing; data folders hold tables; our own code must not change its own training data.
SKIPPED_FOLDERS = {
    "__pycache__", "test", "tests", "_tests", "testing", "site-packages", "dist-packages", "node_modules", "data",
    "idle_test", "licenses", "license_files", "encodings", "nanochat", "rustbpe", "typeshed",
}  # fmt: skip
SKIPPED_FILES = re.compile("licen[cs]e|copying|notice|authors|requirements|top_level|entry_points|sources|vendor", re.I)
TEXT_SUFFIXES = {".md", ".rst", ".txt"}
COMMON_WORDS = (
    "the of to and a in is that for it as be with are this on or by an if not from can will which at you used when "
    "has have all any value values returns return use default must may one should only"
)
STOP_WORDS = frozenset(COMMON_WORDS.split())
TRIPLE_QUOTED = re.compile(r"(\"{3}|'{3}).*?\1", re.S)
HEADING = re.compile(r"[^\n]+\n[=~^-]{3,}")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def make_shards(source: str, num_files: int) -> None:
    """Harvest the documentation of the installed packages, unless the same packages have been harvested already. Always
    as many train shards (TRAIN_SHARDS)."""
    folder = data_dir(source)
    manifest = parquet.load_manifest(folder)
    about = {"source": source, "kind": "offline documentation", "synthetic": False, "fingerprint": fingerprint()}
    if manifest.get("fingerprint") == about["fingerprint"] and parquet.all_here(folder, manifest):
        print("pydocs: shards are here")
        return
    parquet.about_to_replace(folder)
    packages = harvest()
    documents = sorted(packages, key=parquet.text_hash)
    sizes = np.array([len(text.encode()) for text in documents])
    size, labels = int(sizes.sum()), np.unique([packages[text] for text in documents], return_inverse=True)[1]
    held, _ = overlap.hold_out(labels, sizes, max(MIN_VAL_BYTES, int(size * VAL_SHARE)))
    val_bytes = int(sizes[held].sum())
    ordered = (documents[i] for i in np.argsort(~held, kind="stable").tolist())
    files = parquet.write_shards(folder, ordered, val_bytes, (size - val_bytes) // TRAIN_SHARDS + 1, ROW_GROUP)
    parquet.replace_shards(folder, about, files)


def harvest(roots: Sequence[Path] | None = None, workers: int | None = None) -> dict[str, str]:
    """All documents below `roots` (default: the running interpreter's libraries), deduplicated, in path order, and the
    package that each comes from. Raises UserError where there is nothing to read."""
    roots = list(roots) if roots is not None else default_roots()
    files = [(root, path) for root in roots for path in _files(root)]
    print(f"pydocs: reading {len(files):,} files of the installed Python packages", flush=True)
    names = {root: _packages(root) for root in roots}
    packages = [_package(path.relative_to(root), names[root]) for root, path in files]
    # spawn: forking a process that holds torch's or pyarrow's threads can deadlock
    # without the cycle collector a syntax tree is built a fifth faster
    workers = workers or min(os.cpu_count() or 1, 16)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=gc.disable) as pool:
        read = map(_read_file, files) if workers == 1 else pool.map(_read_file, files, chunksize=32)
        found = [(package, text) for package, texts in zip(packages, read, strict=True) for text in texts]
    rests = without_copies(text for _, text in found)
    kept = {rest: package for (package, _), rest in zip(found, rests, strict=True) if rest}
    texts = list(kept)
    documents = {texts[i]: kept[texts[i]] for i in np.unique(overlap.clusters(overlap.sketches(texts))).tolist()}
    if not documents:
        raise UserError(f"pydocs: no documentation below {', '.join(map(str, roots))}; use another --source")
    return documents


def default_roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")))


def fingerprint(roots: Sequence[Path] | None = None) -> str:
    """Changes with the files that a harvest reads (names and sizes) and with how it reads and splits them."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + Path(overlap.__file__).read_bytes())
    for root in roots if roots is not None else default_roots():
        for path in _files(root):
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            suffix = os.path.splitext(name)[1]
            is_text = suffix in TEXT_SUFFIXES and not SKIPPED_FILES.search(name)
            if is_text or suffix in (".py", ".pyi") or name == "METADATA":
                yield Path(folder, name)


def _read_file(job: tuple[Path, Path]) -> list[str]:
    """Documents of one file; unreadable and unparsable files give none (libraries ship broken templates)."""
    root, path = job
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    if path.suffix in (".py", ".pyi"):
        parts = path.relative_to(root).with_suffix("").parts
        module = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        sections = _python_sections(source, ".".join(module))
    else:
        sections = [readable(source.partition("\n\n")[2] if path.name == "METADATA" else source)]
    return [text for text in map(tidy, _packed(sections)) if is_documentation(text)]


def _packages(root: Path) -> dict[str, str]:
    """dist-info folders below `root` -> what the distribution installs most files into, which is what users import."""
    found = {}
    for record in root.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
        places = collections.Counter(line.partition(",")[0].partition("/")[0] for line in lines)
        for place, _ in places.most_common():
            if not place.endswith((".dist-info", "__pycache__")) and place not in ("", ".."):
                found[record.parent.name] = place.removesuffix(".py")
                break
    return found


def _package(path: Path, names: Mapping[str, str]) -> str:
    """What a file is part of: the package or module that is imported, also for what its distribution says of it."""
    first = path.parts[0]
    return names.get(first, first.removesuffix(".dist-info").partition("-")[0]).removesuffix(".py").removesuffix(".pyi")


# ---- Python source -> sections


def _python_sections(source: str, module: str) -> list[str]:
    # a file with little triple-quoted text is not worth parsing: saves a third of the time for 6 % of the text
    quoted = sum(match.end() - match.start() for match in TRIPLE_QUOTED.finditer(source))
    if quoted < max(2 * MIN_BYTES, len(source) // 10):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    sections = []
    if head := ast.get_docstring(tree):
        sections.append(head if head.startswith(module) else f"{module}\n\n{head}")
    for node in tree.body:
        if isinstance(node, ast.ClassDef | FunctionNode):
            sections.append("\n\n".join(_documented(node, f"{module}.{node.name}")))
        else:
            sections += _constants(node)
    return [section for section in sections if section]


def _documented(node: ast.ClassDef | FunctionNode, name: str) -> list[str]:
    """Signature and docstring of `node`, and of the methods and classes inside a class, in source order."""
    doc = ast.get_docstring(node)
    children = []
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | FunctionNode):
                children += _documented(child, f"{node.name}.{child.name}")
    if not doc and not children:
        return []
    return [_signature(node, name), *([doc] if doc else []), *children]


def _signature(node: ast.ClassDef | FunctionNode, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if len(arguments) + len(returns) <= WIDE_SIGNATURE:
        return f"{name}({arguments}){returns}"
    names = [arg.arg for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
    return f"{name}({', '.join(name for name in names if name not in ('self', 'cls'))})"


def _constants(node: ast.stmt) -> Iterator[str]:
    """Long strings in a statement, under the names they are attached to. `add_docstr(torch.abs, r'''...''')`,
    `add_newdoc("numpy", "abs", '''...''')`, `topics = {"assert": '''...'''}`"""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            names = [ast.unparse(arg) for arg in call.args if isinstance(arg, ast.Attribute | ast.Name)]
            names += [name for arg in call.args if (name := _string(arg)) is not None and "\n" not in name]
            texts = [text for arg in call.args if (text := _template(arg))]
            yield from (f"{'.'.join(names)}\n\n{text}" if names else text for text in texts)
        elif isinstance(call, ast.Dict):
            for key, value in zip(call.keys, call.values, strict=True):
                if (name := _string(key)) is not None and (text := _template(value)):
                    yield f"{name}\n\n{text}"


def _string(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _template(node: ast.expr) -> str | None:
    """A long string constant, or what is fixed in one that `.format` fills."""
    filled = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format"
    text = _string(node.func.value if filled else node)  # type: ignore[attr-defined]
    if text is None or len(text) < MIN_CONSTANT:
        return None
    text = inspect.cleandoc(text)
    if filled:
        text = re.sub(r"(?m)^[ \t]*\{\w+\}[ \t]*\n?", "", text).replace("{{", "{").replace("}}", "}")
    return text


# ---- Sections -> documents


def _packed(sections: Iterable[str]) -> Iterator[str]:
    """Join sections until SOFT_BYTES; cut those beyond MAX_BYTES between paragraphs."""
    pieces: list[str] = []
    for section in sections:
        title = section.partition("\n")[0]
        parts = section.split("\n\n") if len(section) > MAX_BYTES else [section]
        pieces += _joined(parts, MAX_BYTES // 2, first=f"{title} (continued)")
    return _joined(pieces, SOFT_BYTES)


def _joined(parts: Iterable[str], most: int, first: str | None = None) -> Iterator[str]:
    """Parts with blank lines between them, up to `most` characters of them at a time; all but the first begin with
    `first`."""
    document: list[str] = []
    size = 0
    for part in parts:
        if document and size + len(part) > most:
            yield "\n\n".join(document)
            document, size = [first] if first else [], 0
        document.append(part)
        size += len(part)
    if document:
        yield "\n\n".join(document)


def readable(text: str) -> str:
    """README or change log without badges, HTML tags and lists of pull requests."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    tags = r"a|b|br|code|details|div|em|h\d|hr|i|img|p|picture|source|strong|su[bp]|summary"
    text = re.sub(rf"</?({tags})\b[^>]*>", "", text)
    text = re.sub(r"(?m)^[ \t]*\.\. (\|.*\| )?image::.*\n([ \t]+:.*\n)*", "", text)
    text = re.sub(r"(?m)^[ \t]*(\[?!\[|\|[\w-]+\|).*\n", "", text)
    return re.sub(r"(?m)^.*github\.com/\S+/(pull|issues|commit|compare)/.*\n", "", text)


def tidy(text: str) -> str:
    """Plain text: no control characters, trailing blanks or runs of blank lines."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_documentation(text: str) -> bool:
    """English prose with examples, rather than a table, a template, a dump or another language."""
    if len(text.encode()) < MIN_BYTES:
        return False
    words = re.findall(r"[A-Za-z]+", text)
    letters = sum(map(len, words))
    stops = sum(word.lower() in STOP_WORDS for word in words)
    return letters > 0.5 * len(text) and stops > 0.12 * len(words)


def without_copies(texts: Iterable[str]) -> Iterator[str]:
    """Each document without what has been seen before (paragraphs are compared without case and white space). Nothing
    is left of one that loses half of itself: it was a copy (vendored packages, stubs beside modules)."""
    seen: collections.Counter[str] = collections.Counter()
    short, times = BOILERPLATE
    documents = set()
    for text in texts:
        paragraphs: list[str] = []
        for paragraph in text.split("\n\n"):
            key = "".join(paragraph.lower().split())
            if len(key) < short:
                paragraphs.append(paragraph)
                continue
            seen[key] += 1
            if seen[key] <= (times if len(key) < LONG_PARAGRAPH else 1):
                paragraphs.append(paragraph)
            elif paragraphs and HEADING.fullmatch(paragraphs[-1]):
                paragraphs.pop()  # nothing is left for it to head
        rest = "\n\n".join(paragraphs)
        key = "".join(rest.lower().split())
        new = len(rest) > len(text) / 2 and is_documentation(rest) and key not in documents
        documents.add(key if new else "")
        yield rest if new else ""
