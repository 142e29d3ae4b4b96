"""The size and name limits of the style guide, for product code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nas", "hw_profiles", "deploy", "compress", "cli", "benchmarks")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
FILE_NAMES = r"^_?(util|utils|helper|helpers|common|misc|base|core|manager)$"
CLASS_NAMES = r"(Manager|Handler|Helper|Factory|Builder|Controller|Processor|Context)$"
#: an operator has as many dimensions as it has: the same names as torch.nn.Conv2d's
GRANTED = {"hw_profiles/op.py": ["conv: 8 parameters"]}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCK = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, *FUNCTION)


def depth(node: ast.AST, level: int = 0) -> int:
    """Nesting of blocks inside a function; an elif is no deeper than its if."""
    deepest = level
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                chained = isinstance(node, ast.If) and field == "orelse" and len(node.orelse) == 1
                inner = isinstance(child, BLOCK) and not (chained and isinstance(child, ast.If))
                deepest = max(deepest, depth(child, level + inner))
    return deepest


def faults(path: Path) -> list[str]:
    """What is over budget, as `name: figure`."""
    text = path.read_text()
    found = [f"{len(text.splitlines())} lines"] if len(text.splitlines()) > 400 else []
    if re.search(FILE_NAMES, path.stem):
        found.append(f"file name {path.name}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and re.search(CLASS_NAMES, node.name):
            found.append(f"class name {node.name}")
        if not isinstance(node, FUNCTION):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        own = [a for a in arguments if a.arg not in ("self", "cls")]
        lines = node.end_lineno - node.lineno + 1
        command = path.parent.name == "cli" and node.name == "command"
        if lines > 60 and not command:  # whose options are lines too
            found.append(f"{node.name}: {lines} lines")
        if len(own) > 6 and path.parent.name != "cli":
            found.append(f"{node.name}: {len(own)} parameters")
        if (deep := depth(node)) > 3:
            found.append(f"{node.name}: {deep} levels")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_to_the_budgets(path):
    assert faults(path) == GRANTED.get(str(path.relative_to(ROOT)), [])


def test_the_budgets_catch_what_they_are_for(tmp_path):
    body = "".join(f"{'    ' * i}if x:\n" for i in range(1, 5)) + "    " * 5 + "pass\n"
    long = "def g():\n" + "    x = 1\n" * 61
    path = tmp_path / "utils.py"
    path.write_text(
        f"class RunManager: pass\ndef f(a, b, c, d, e, f, *, g): pass\ndef h(x):\n{body}{long}"
    )
    found = "; ".join(faults(path))
    for part in ("utils.py", "RunManager", "f: 7 parameters", "h: 4 levels", "g: 62 lines"):
        assert part in found
