"""Sources after an edit: other words, other places, one expression."""

import ast
import re
import tokenize
from collections.abc import Mapping
from io import StringIO

from q4kd.harness.judging import digests
from q4kd.harness.judging.syntax_trees import Source, SyntaxTrees, read_source

_AS_INSTALLED = digests.TREES


def edited(module: str, old: str, new: str) -> SyntaxTrees:
    """Return trees in which ``old``, which must be there, reads ``new`` in one module.

    All other modules are those that were read before: parsing them anew took 3 seconds an edit. What their names stand
    for is found again.
    """

    def read(name: str) -> Source | None:
        source = read_source(name)
        if name != module or source is None:
            return source
        assert old in source.text, f"{module} does not say {old!r}"
        return source._replace(text=source.text.replace(old, new))

    trees = SyntaxTrees(read)
    trees._modules |= {name: found for name, found in _AS_INSTALLED._modules.items() if name != module}
    return trees


def reworded(text: str) -> str:
    """Return a module's text with other words in every comment and docstring, at the same lines."""
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "# in other words\n"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno - 1, node.end_lineno or 0):
                lines[row] = re.sub(r"(?<=[A-Za-z ])[a-z](?=[a-z ])", "x", lines[row])
    return "".join(lines)


def with_moved(text: str, modules: Mapping[str, str]) -> str:
    """Return a module's text with other modules under their new names, as a tool for moving them writes it."""
    for old, new in modules.items():
        (home, _, name), (folder, _, file) = old.rpartition("."), new.rpartition(".")
        text = text.replace(f"from {home} import {name}\n", f"from {folder} import {file} as {name}\n")
        text = text.replace(f"from .{name} import ", f"from {new} import ")
        text = re.sub(rf"{re.escape(old)}\b", new, text)
    return text
