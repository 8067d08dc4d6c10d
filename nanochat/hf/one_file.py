"""One Python file from several modules of nanochat: what one of them needs of the others, and no more.

Exports carry the model's code this way, so that there is no second version of it to be kept the same.
"""

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = "nanochat"
Imported = tuple[str, str, str | None]  # module, name in it ("": the module itself), name here where it is another


class Module(NamedTuple):
    tree: ast.Module
    lines: list[str]
    defined: dict[str, ast.stmt]
    imported: dict[str, Imported]
    begins: dict[ast.stmt, int]
    """First line, from 0, of each statement with the comments above it."""


@cache
def read(name: str) -> Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, Imported] = {}
    tree, lines = ast.parse(text), text.splitlines()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name: (alias.name, "", alias.asname) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = (node.module or "", alias.name, alias.asname)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return Module(tree, lines, defined, imported, _begins(tree.body, lines))


def _begins(body: list[ast.stmt], lines: list[str]) -> dict[ast.stmt, int]:
    begins = {}
    for node in body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].lstrip().startswith("#") and not lines[first - 1].lstrip().startswith("# ---"):
            first -= 1
        begins[node] = first
    return begins


def one_file(root: str, replaced: dict[str, str]) -> str:
    """The source of the module `root` with all that it uses of its package in front. replaced: name -> what stands in
    that file in place of its definition. Raises RuntimeError for what cannot be written into one file."""
    wanted: dict[tuple[str, str], ast.stmt] = {}  # (module, name) -> where it is defined
    externals: set[Imported] = set()
    used = _names_behind_a_dot(read(root).tree) | {"forward"}  # which torch calls
    names = [(root, name) for name in read(root).defined]
    seen = -1
    while seen != len(used) + len(wanted):  # a method that is used may use others
        seen = len(used) + len(wanted)
        for module, name in names:
            _resolve(module, name, wanted, externals, replaced)
        names = []
        for (module, _), statement in wanted.items():
            kept = [statement, *_kept(statement, used)]
            used |= {node.attr for node in kept if isinstance(node, ast.Attribute)}
            names += [(module, node.id) for node in kept if isinstance(node, ast.Name)]
    taken = [name for _, name in wanted]
    if twice := {name for name in taken if taken.count(name) > 1}:
        raise RuntimeError(f"several modules define {', '.join(sorted(twice))}")
    parts = list(replaced.values())
    for module in _in_order(root, {module for module, _ in wanted}):
        statements = {node: None for (where, _), node in wanted.items() if where == module}
        parts += [_text(module, node, used) for node in sorted(statements, key=lambda node: node.lineno)]
    head = [f'"""{ast.get_docstring(read(root).tree)}\n"""\n', *_import_lines(externals)]
    text = "\n".join(head) + "\n\n" + "\n\n\n".join(parts) + "\n"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import) and PACKAGE in ast.unparse(node):
            raise RuntimeError(f"{ast.unparse(node)}: cannot be written into one file")
    return text


def _names_behind_a_dot(tree: ast.AST) -> set[str]:
    """And the methods of `tree` itself: all of the root stays."""
    nodes = list(ast.walk(tree))
    methods = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return methods | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _resolve(
    module: str,
    name: str,
    wanted: dict[tuple[str, str], ast.stmt],
    externals: set[Imported],
    replaced: dict[str, str],
) -> None:
    """Note where `name`, as `module` uses it, comes from; builtins and local variables come from nowhere."""
    found = read(module)
    if name in replaced:
        return
    if name in found.defined:
        wanted[module, name] = found.defined[name]
    elif name in found.imported:
        source, original, alias = found.imported[name]
        if not source.startswith(PACKAGE):
            externals.add((source, original, alias if alias != original else None))
        elif not original or original not in read(source).defined | read(source).imported or name != original:
            raise RuntimeError(f"{module} uses {name} of {source} in a way that cannot be written into one file")
        else:
            _resolve(source, original, wanted, externals, replaced)


def _kept(node: ast.AST, used: set[str]) -> Iterator[ast.AST]:
    """All nodes below a statement, but for the methods that nothing calls."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.ClassDef) and _is_unused(child, used)):
            yield child
            yield from _kept(child, used)


def _is_unused(node: ast.AST, used: set[str]) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in used


def _text(module: str, node: ast.stmt, used: set[str]) -> str:
    source = read(module)
    kept = set(range(source.begins[node], node.end_lineno or 0))
    if isinstance(node, ast.ClassDef):
        for method, first in _begins(node.body, source.lines).items():
            if _is_unused(method, used):
                kept -= set(range(first, (method.end_lineno or 0) + 1))
    return "\n".join(source.lines[i] for i in sorted(kept)).rstrip()


def _in_order(root: str, wanted: set[str]) -> list[str]:
    """The modules, each behind those that it imports."""
    order: list[str] = []

    def visit(module: str) -> None:
        for source, *_ in read(module).imported.values():
            if source.startswith(f"{PACKAGE}.") and source not in order:
                visit(source)
        if module not in order:
            order.append(module)

    visit(root)
    return [module for module in order if module in wanted]


def _import_lines(externals: set[Imported]) -> list[str]:
    def spelled(name: str, alias: str | None) -> str:
        return f"{name} as {alias}" if alias else name

    lines = [f"import {spelled(module, alias)}" for module, name, alias in externals if not name]
    for source in {module for module, name, _ in externals if name}:
        names = sorted(spelled(name, alias) for module, name, alias in externals if module == source and name)
        lines.append(f"from {source} import {', '.join(names)}")
    return sorted(lines)
