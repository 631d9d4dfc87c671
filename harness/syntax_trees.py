"""Syntax trees of installed modules, read without importing them: what a definition says, and what it depends on.

Two definitions that differ in comments, docstrings, annotations of arguments, import lines or the places of modules
have the same tree. What imports bind is resolved, so that a definition is found wherever it lies.
"""

import ast
import gc
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    return Source(importlib.util.decode_source(Path(spec.origin).read_bytes()), is_package)


def top_level(name: str) -> str:
    """Return the first part of a dotted name: the package of a module, the top-level definition of a qualified name."""
    return name.partition(".")[0]


@dataclass
class _Reading:
    """One walk over a tree: its normal form, and what it mentions.

    Attributes:
        text: the tree, field by field. Empty fields are left out, so that it is the same for every Python version.
        strings: string constants, as written.
        experiments: names of experiments that it asks ``get_experiment`` for.
        imports: what its import statements bind.
        stars: modules whose names it imports by ``*``.
    """

    shorten: Callable[[str], str]
    package: str
    text: list[str] = field(default_factory=list)
    strings: set[str] = field(default_factory=set)
    experiments: set[str] = field(default_factory=set)
    imports: dict[str, Origin] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def read(self, value: object) -> None:
        if isinstance(value, list):
            self.text.append("[")
            for item in value:
                before = len(self.text)
                self.read(item)
                if len(self.text) > before:  # neither a docstring nor an import
                    self.text.append(",")
            self.text.append("]")
        elif isinstance(value, ast.Import | ast.ImportFrom):
            self._bind(value)
        elif isinstance(value, ast.Constant):
            self._constant(value.value)
        elif isinstance(value, ast.Name | ast.Attribute) and (name := dotted(value)):
            self.text.append(self._name(name))
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
            if isinstance(node, ast.JoinedStr):  # Python 3.12 has empty strings in it where others have none
                part = [item for item in node.values if not (isinstance(item, ast.Constant) and item.value == "")]
            annotates = name == "annotation" and isinstance(node, ast.arg)
            if part is not None and part != [] and name not in _UNREAD and not annotates:
                self.text.append(f"{name}=")
                self.read(part)
        self.text.append(")")

    def _name(self, name: tuple[str, ...]) -> str:
        """Return a dotted name, without the path of a module of ours where it begins with one."""
        ours = name[0] in (PACKAGE, top_level(self.package))
        for end in range(len(name), 1, -1) if ours else ():
            if self.shorten(".".join(name[:end])) == ":":
                return f":{'.'.join(name[end:])}"
        return ".".join(name)

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


def bound_in(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that statements bind in the scope they stand in, without those that imports bind."""
    bound, outer, waiting = set(), set(), list(nodes)
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
                continue
            case ast.Lambda() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                continue
            case ast.Global():
                outer |= set(node.names)
            case ast.Name(ctx=ast.Store() | ast.Del()):
                bound.add(node.id)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
            case ast.MatchMapping(rest=str(name)):
                bound.add(name)
        waiting += ast.iter_child_nodes(node)
    return bound - outer


def look_up(node: ast.AST, found: set[tuple[str, ...]], hidden: frozenset[str] = frozenset()) -> None:
    """Collect the dotted names that a tree looks up and does not bind, ``("np", "random", "default_rng")`` for one.

    Args:
        node: the tree.
        found: collects the names. Annotations of arguments and results are left out.
        hidden: names that enclosing functions bind.
    """
    if name := dotted(node):
        if name[0] not in hidden and (len(name) > 1 or isinstance(node.ctx, ast.Load)):  # type: ignore[attr-defined]
            found.add(name)
        return
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        arguments = node.args
        for outer in (*getattr(node, "decorator_list", ()), *arguments.defaults, *filter(None, arguments.kw_defaults)):
            look_up(outer, found, hidden)
        children = node.body if isinstance(node.body, list) else [node.body]
        parameters = {part.arg for part in ast.walk(arguments) if isinstance(part, ast.arg)}
        hidden = hidden | parameters | bound_in(children)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        look_up(node.generators[0].iter, found, hidden)
        hidden = hidden | bound_in(generator.target for generator in node.generators)
    for child in children:
        look_up(child, found, hidden)


class Definition:
    """One top-level statement of a module, or one lambda in it."""

    def __init__(self, module: "Module", node: ast.stmt | ast.Lambda) -> None:
        self.module, self.node = module, node

    @cached_property
    def reading(self) -> _Reading:
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
                found.setdefault(node.lineno, []).append(Definition(self, node))
        return found


def _changed_by(node: ast.stmt) -> set[str]:
    """Return the names whose objects a top-level statement changes: ``TABLE["x"] = 1``, ``CASES.append(x)``."""
    changed: list[ast.expr] = []
    for inner in ast.walk(node) if not isinstance(node, _DEFINITIONS) else ():
        if isinstance(inner, ast.Subscript | ast.Attribute) and not isinstance(inner.ctx, ast.Load):
            changed.append(inner.value)
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            changed += [inner.value.func.value] if isinstance(inner.value.func, ast.Attribute) else []
    return {name for expression in changed if (name := _base(expression)) is not None}


def _base(expression: ast.expr) -> str | None:
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None


@contextmanager
def _trees_kept() -> Iterator[None]:
    """Pause the garbage collector: nothing of a new tree is garbage, and to find that out takes as long as to parse."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


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
            with _trees_kept():
                self._modules[name] = source and Module(name, source, lambda text: self.shorten(text, packages))
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
