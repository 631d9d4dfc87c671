"""Syntax trees of installed modules, read without importing them: their definitions, and what each depends on.

What imports bind is resolved, so that a definition is found wherever it lies.
"""

import ast
import gc
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from q4kd.harness.judging.normal_form import PACKAGE, Origin, Reading, bound_in, look_up, top_level

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_REFERENCE = re.compile(r"(\w+(?:\.\w+)*)(:[\w.]*)?")


class Source(NamedTuple):
    """The text of a module; ``is_package`` says whether modules may lie below it."""

    text: str
    is_package: bool


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
    return Source(importlib.util.decode_source(Path(spec.origin).read_bytes()), is_package)


class Definition:
    """One top-level statement of a module, or one lambda in it."""

    def __init__(self, module: "Module", node: ast.stmt | ast.Lambda) -> None:
        self.module, self.node = module, node

    @cached_property
    def reading(self) -> Reading:
        """Its normal form and what it mentions."""
        return self.module.read(self.node)

    @cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The dotted names that it looks up: in its module, or where it imports them from itself."""
        found: set[tuple[str, ...]] = set()
        look_up(self.node, found)
        return tuple(sorted(found))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of its normal form and of what it takes from packages that are not followed, by their names."""
        ours = {PACKAGE, top_level(self.module.name)}
        imports = {**self.module.imports, **self.reading.imports}
        used = {name[0]: imports[name[0]] for name in self.names if name[0] in imports}
        taken = [f"{name}={origin}" for name, origin in used.items() if top_level(origin.module) not in ours]
        return hashlib.sha256("\n".join(["".join(self.reading.text), *taken]).encode()).hexdigest()


class Module:
    """The definitions and imports of one module.

    ``definitions`` are the statements that bind or change each name; ``imports`` and ``stars`` are what import
    statements outside functions and classes bind, and the modules whose names they import by ``*``.
    """

    def __init__(self, name: str, source: Source, shorten: Callable[[str], str]) -> None:
        self.name, self.is_package, self._shorten = name, source.is_package, shorten
        self.tree = ast.parse(source.text)
        self.definitions: dict[str, list[Definition]] = {}
        outside = self.read([])
        for node in self.tree.body:
            definition = Definition(self, node)
            for name in bound_in([node]) | _changed_by(node):
                self.definitions.setdefault(name, []).append(definition)
            for inner in ast.walk(node) if not isinstance(node, _DEFINITIONS) else ():
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    outside.read(inner)
        self.imports, self.stars = outside.imports, outside.stars

    def read(self, node: ast.AST | list[ast.AST]) -> Reading:
        """Return a reading of a part of this module."""
        reading = Reading(self._shorten, self.name if self.is_package else self.name.rpartition(".")[0])
        reading.read(node)
        return reading

    @cached_property
    def lambdas(self) -> dict[int, list[Definition]]:
        """The lambdas that begin on each line."""
        found: dict[int, list[Definition]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Lambda):
                found.setdefault(node.lineno, []).append(Definition(self, node))
        return found


def _changed_by(node: ast.stmt) -> set[str]:
    """Return the names whose objects a top-level statement changes: ``TABLE["x"] = 1``, ``CASES.append(x)``."""
    names = set()
    for inner in ast.walk(node) if not isinstance(node, _DEFINITIONS) else ():
        match inner:
            case (
                ast.Subscript(value=changed, ctx=ast.Store() | ast.Del())
                | ast.Attribute(value=changed, ctx=ast.Store() | ast.Del())
                | ast.Expr(value=ast.Call(func=ast.Attribute(value=changed)))
            ):
                while isinstance(changed, ast.Attribute | ast.Subscript):
                    changed = changed.value
                names |= {changed.id} if isinstance(changed, ast.Name) else set()
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
            collects = gc.isenabled()
            gc.disable()  # nothing of a new tree is garbage, and to find that out takes as long as to parse it
            try:
                self._modules[name] = source and Module(name, source, lambda text: self.shorten(text, packages))
            finally:
                if collects:
                    gc.enable()
        return self._modules[name]

    def shorten(self, text: str, packages: Iterable[str]) -> str:
        """Return ``:Qual.name`` for ``module:Qual.name`` and ``:`` for a module's name, any other text as it is."""
        match = _REFERENCE.fullmatch(text)
        if match is None or top_level(match[1]) not in packages or (match[1] == text and "." not in text):
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
