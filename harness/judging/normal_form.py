"""The normal form of a syntax tree: what a definition says, without what changes nothing of what it does.

Two definitions that differ in comments, docstrings, annotations of arguments and results, import lines or the paths of
modules have the same normal form, whatever Python version writes it.
"""

import ast
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

PACKAGE = "q4kd"
# Fields that change nothing of what a program does: implied by a node's place, or read by type checkers alone.
_UNREAD = frozenset({"ctx", "kind", "type_comment", "returns"})
# Decorators that register a function and leave it as it is: what they declare counts by its values.
_REGISTERING = frozenset({("fault",), ("patch",), ("probe",)})


class Origin(NamedTuple):
    """What an import binds: a name in a module, or the module itself where ``name`` is None."""

    module: str
    name: str | None


def top_level(name: str) -> str:
    """Return the first part of a dotted name: the package of a module, the top-level definition of a qualified name."""
    return name.partition(".")[0]


@dataclass
class Reading:
    """The normal form of trees of one module, and what they mention.

    ``shorten`` takes the path of a module out of a text that names it; relative imports begin at ``package``. ``text``
    has the trees field by field, without empty fields, so that every Python version writes the same. ``experiments``
    are names that it asks ``get_experiment`` for; ``stars`` are modules whose names it imports by ``*``.
    """

    shorten: Callable[[str], str]
    package: str
    text: list[str] = field(default_factory=list)
    strings: set[str] = field(default_factory=set)
    experiments: set[str] = field(default_factory=set)
    imports: dict[str, Origin] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def read(self, value: object) -> None:
        """Add a node, a list of nodes or a field."""
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
            part = acting_decorators(node) if name == "decorator_list" else getattr(node, name, None)
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


def acting_decorators(node: ast.AST) -> list[ast.expr]:
    """Return the decorators of a definition without those that only register it."""
    return [
        decorator
        for decorator in getattr(node, "decorator_list", ())
        if not (isinstance(decorator, ast.Call) and dotted(decorator.func)[-1:] in _REGISTERING)
    ]


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
    """Collect the dotted names that a tree looks up and neither it nor an enclosing function (``hidden``) binds.

    ``("np", "random", "default_rng")`` is one. Annotations of arguments and results are left out.
    """
    if name := dotted(node):
        if name[0] not in hidden and (len(name) > 1 or isinstance(node.ctx, ast.Load)):  # type: ignore[attr-defined]
            found.add(name)
        return
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        arguments = node.args
        for outer in (*acting_decorators(node), *arguments.defaults, *filter(None, arguments.kw_defaults)):
            look_up(outer, found, hidden)
        children = node.body if isinstance(node.body, list) else [node.body]
        parameters = {part.arg for part in ast.walk(arguments) if isinstance(part, ast.arg)}
        hidden = hidden | parameters | bound_in(children)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        look_up(node.generators[0].iter, found, hidden)
        hidden = hidden | bound_in(generator.target for generator in node.generators)
    for child in children:
        look_up(child, found, hidden)
