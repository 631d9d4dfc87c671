"""Syntax trees of installed modules, read without importing them: what a definition says, and what it depends on.

Two definitions that differ in comments, docstrings, annotations of arguments, import lines or the places of modules
have the same tree. What imports bind is resolved, so that a definition is found wherever it lies.
"""

import ast
import hashlib
import importlib.util
import re
import symtable
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

PACKAGE = "q4kd"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Fields that change nothing of what a program does: implied by a node's place, or read by type checkers alone.
_UNREAD = frozenset({"ctx", "kind", "type_comment", "returns"})
_REFERENCE = re.compile(r"(\w+(?:\.\w+)*)(:[\w.]*)?")


class Source(NamedTuple):
    """The text of a module; ``is_package`` says whether modules may lie below it."""

    text: str
    is_package: bool


class Origin(NamedTuple):
    """What an import binds: a name in a module, or the module itself where ``name`` is None."""

    module: str
    name: str | None


def read_source(module: str) -> Source | None:
    """Return an installed module's source, empty for a namespace package; None when there is no source."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    is_package = spec.submodule_search_locations is not None
    if spec.origin is None or not spec.origin.endswith(".py"):
        return Source("", True) if is_package and spec.origin is None else None
    return Source(Path(spec.origin).read_text(encoding="utf-8"), is_package)


def top_level(module: str) -> str:
    """Return the top-level package of a module."""
    return module.partition(".")[0]


@dataclass
class _Reading:
    """One walk over a tree: its normal form, and what it mentions.

    Attributes:
        text: the tree, field by field. Empty fields are left out, so that it is the same for every Python version.
        names: names, with the attributes that follow: ``("np", "random", "default_rng")``.
        strings: string constants, as written.
        experiments: names of experiments that it asks ``get_experiment`` for.
        imports: what its import statements bind.
        stars: modules whose names it imports by ``*``.
    """

    shorten: Callable[[str], str]
    package: str
    text: list[str] = field(default_factory=list)
    names: set[tuple[str, ...]] = field(default_factory=set)
    strings: set[str] = field(default_factory=set)
    experiments: set[str] = field(default_factory=set)
    imports: dict[str, Origin] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def read(self, value: object) -> None:
        if isinstance(value, list):
            self.text.append("[")
            for item in value:
                self.read(item)
                self.text.append(",")
            self.text.append("]")
        elif isinstance(value, ast.Import | ast.ImportFrom):
            self._bind(value)
        elif isinstance(value, ast.Constant):
            self._constant(value.value)
        elif isinstance(value, ast.Name | ast.Attribute) and (name := dotted(value)):
            self.names.add(name)
            self.text.append(".".join(name))
        elif isinstance(value, ast.AST):
            self._node(value)
        else:
            self.text.append(repr(value))

    def _node(self, node: ast.AST) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return  # a docstring
        if isinstance(node, ast.Call) and dotted(node.func)[-1:] == ("get_experiment",):
            self.experiments |= {
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
        self.text.append(f"{type(node).__name__}(")
        for name in node._fields:
            part = getattr(node, name, None)
            annotates = name == "annotation" and isinstance(node, ast.arg)
            if part is not None and part != [] and name not in _UNREAD and not annotates:
                self.text.append(f"{name}=")
                self.read(part)
        self.text.append(")")

    def _constant(self, value: object) -> None:
        if isinstance(value, str):
            self.strings.add(value)
            value = self.shorten(value)
        self.text.append(repr(value))

    def _bind(self, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = alias.name if alias.asname else top_level(alias.name)
                self.imports[alias.asname or module] = Origin(module, None)
            return
        module = "." * node.level + (node.module or "")
        if node.level:
            module = importlib.util.resolve_name(module, self.package)
        for alias in node.names:
            if alias.name == "*":
                self.stars.append(module)
            else:
                self.imports[alias.asname or alias.name] = Origin(module, alias.name)


def dotted(node: ast.AST) -> tuple[str, ...]:
    """Return the parts of ``a.b.c``, or nothing for another expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else ()


class Definition:
    """One top-level statement of a module, or one lambda in it."""

    def __init__(self, module: "Module", node: ast.stmt | ast.Lambda, text: str) -> None:
        self.module, self.node, self._text = module, node, text

    @cached_property
    def reading(self) -> _Reading:
        """Its normal form and what it mentions."""
        return self.module.read(self.node)

    @cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The dotted names that it looks up in its module, or imports itself."""
        outside = _looked_up(symtable.symtable(self._text, self.module.name, "exec"), top=True)
        return tuple(sorted(name for name in self.reading.names if name[0] in {*outside, *self.reading.imports}))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of its normal form and of what it takes from packages that are not followed, by their names."""
        ours = {PACKAGE, top_level(self.module.name)}
        origins = {name[0]: self.origin(name[0]) for name in self.names}
        taken = sorted(
            f"{name}={origin.module}:{origin.name or ''}"
            for name, origin in origins.items()
            if origin is not None and top_level(origin.module) not in ours
        )
        return hashlib.sha256("\n".join(["".join(self.reading.text), *taken]).encode()).hexdigest()

    def origin(self, name: str) -> Origin | None:
        """Return what an import binds this name to, in the definition or in its module."""
        return self.reading.imports.get(name) or self.module.imports.get(name)


def _looked_up(table: symtable.SymbolTable, *, top: bool = False) -> set[str]:
    """Return the names that a statement, or a scope within it, looks up in the module."""
    names = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return names.union(*map(_looked_up, table.get_children()))


class Module:
    """The definitions and imports of one module.

    Attributes:
        name: its full name.
        is_package: whether modules may lie below it.
        tree: the whole syntax tree.
        definitions: the statements that bind or change each name.
        imports: what import statements outside functions and classes bind.
        stars: modules whose names are imported by ``*``.
    """

    def __init__(self, name: str, source: Source, shorten: Callable[[str], str]) -> None:
        self.name, self.is_package, self._shorten = name, source.is_package, shorten
        self.tree, self._lines = ast.parse(source.text), source.text.splitlines(keepends=True)
        self.definitions: dict[str, list[Definition]] = {}
        outside = self.read([])
        for node in self.tree.body:
            if isinstance(node, _DEFINITIONS):
                names = {node.name}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                outside.read(node)
                continue
            else:
                names = self._bound(node)
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Import | ast.ImportFrom):
                        outside.read(inner)
            definition = Definition(self, node, self._segment(node))
            for bound in names:
                self.definitions.setdefault(bound, []).append(definition)
        self.imports, self.stars = outside.imports, outside.stars

    def read(self, node: ast.AST | list[ast.AST]) -> _Reading:
        """Return a reading of a part of this module."""
        reading = _Reading(self._shorten, self.name if self.is_package else self.name.rpartition(".")[0])
        reading.read(node)
        return reading

    @cached_property
    def lambdas(self) -> dict[int, list[Definition]]:
        """The lambdas that begin on each line."""
        found: dict[int, list[Definition]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Lambda):
                found.setdefault(node.lineno, []).append(Definition(self, node, ast.unparse(node)))
        return found

    def _segment(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
        return "".join(self._lines[first - 1 : node.end_lineno])

    def _bound(self, node: ast.stmt) -> set[str]:
        """Return the names that a statement binds, and those whose objects it changes: ``TABLE["x"] = 1``."""
        table = symtable.symtable(self._segment(node), self.name, "exec")
        names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
        for inner in ast.walk(node):
            changed: ast.AST | None = None
            if isinstance(inner, ast.Subscript | ast.Attribute) and not isinstance(inner.ctx, ast.Load):
                changed = inner.value
            elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
                changed = inner.value.func if isinstance(inner.value.func, ast.Attribute) else None
            while isinstance(changed, ast.Subscript):
                changed = changed.value
            names |= set(dotted(changed)[:1]) if changed is not None else set()
        return names


class SyntaxTrees:
    """Modules by name, each read and parsed once.

    Args:
        read: returns the source of a module, or None when it has none.
    """

    def __init__(self, read: Callable[[str], Source | None] = read_source) -> None:
        self._read = cache(read)
        self._modules: dict[str, Module | None] = {}
        self._found: dict[Definition, tuple[Definition, ...]] = {}

    def module(self, name: str) -> Module | None:
        """Return a module, or None when it has no source."""
        if name not in self._modules:
            source = self._read(name)
            packages = frozenset({PACKAGE, top_level(name)})
            self._modules[name] = source and Module(name, source, lambda text: self.shorten(text, packages))
        return self._modules[name]

    def shorten(self, text: str, packages: Iterable[str]) -> str:
        """Return ``:Qual.name`` for ``module:Qual.name`` and ``:`` for a module's name, any other text as it is."""
        match = _REFERENCE.fullmatch(text)
        if match is None or top_level(match[1]) not in packages or match[1] == text and "." not in text:
            return text
        return text if self._read(match[1]) is None else match[2] or ":"

    def used_by(self, definition: Definition) -> tuple[Definition, ...]:
        """Return the definitions, in its own package or in ours, that the names in a definition stand for."""
        if definition not in self._found:
            found: dict[Definition, None] = {}
            for name in definition.names:
                origin = definition.reading.imports.get(name[0])
                home = definition.module.name
                found |= dict.fromkeys(self._from(origin, name[1:], home) if origin else self.resolve(home, name))
            self._found[definition] = tuple(found)
        return self._found[definition]

    def resolve(self, module: str, name: tuple[str, ...], seen: frozenset[object] = frozenset()) -> list[Definition]:
        """Return what a dotted name stands for in a module; without a name, everything that the module defines.

        What comes after a definition's own name, an attribute or a method, belongs to the definition.
        """
        tree = None if (module, name) in seen else self.module(module)
        if tree is None:
            return []
        if not name:
            return [definition for every in tree.definitions.values() for definition in every]
        seen |= {(module, name)}
        found = list(tree.definitions.get(name[0], ()))
        if origin := tree.imports.get(name[0]):
            found += self._from(origin, name[1:], module, seen)
        for star in tree.stars if not found else ():
            found += self._from(Origin(star, name[0]), name[1:], module, seen)
        return found if found or not tree.is_package else self.resolve(f"{module}.{name[0]}", name[1:], seen)

    def _from(
        self, origin: Origin, rest: tuple[str, ...], home: str, seen: frozenset[object] = frozenset()
    ) -> list[Definition]:
        if top_level(origin.module) not in (PACKAGE, top_level(home)):
            return []
        return self.resolve(origin.module, rest if origin.name is None else (origin.name, *rest), seen)
