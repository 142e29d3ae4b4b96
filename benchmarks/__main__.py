"""Lists the benchmarks: every file here that has a `main`, with its docstring's first line."""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def listing() -> list[tuple[str, str]]:
    """(name, first line of the docstring), read from the text: nothing is imported."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        runs = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if runs:
            found.append((path.stem, (ast.get_docstring(tree) or "").partition("\n")[0]))
    return found


if __name__ == "__main__":
    for name, line in listing():
        print(name if "--names" in sys.argv else f"python -m benchmarks.{name:22s} {line}")
