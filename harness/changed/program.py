"""The modules that a run executes, found by following imports, and a digest of what each says.

It errs to the safe side: a module that is imported anywhere in a module that runs counts whole, in functions too; a
text that names a module counts as its import; and where a module imports what only a run can tell, all of its package
count.
"""

import ast
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from q4kd.harness.judging.digests import TREES, Closure
from q4kd.harness.judging.normal_form import dotted, top_level
from q4kd.harness.judging.syntax_trees import Definition, Module, SyntaxTrees

# Every run is started, watched and measured by these. What the child runs then is followed from its command.
_RECORDERS = ("q4kd.harness.child", "q4kd.harness.runs.runner", "q4kd.harness.runs.supervise")
# Of these, that which a run needs is found by its command, or by name from its experiment. Faults are in no clean run.
_NOT_THROUGH = ("q4kd.harness.__main__", "q4kd.harness.cli", "q4kd.harness.subjects", "q4kd.harness.runs.faults")
_DISPATCHERS = ("q4kd.harness.__main__", "q4kd.harness.cli.main")
_COMMAND_PACKAGES = ("q4kd.trainer.cli", "q4kd.harness.cli")
TRAINER = "q4kd.trainer"
_MODULE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?::[\w.]*)?")
# What is imported or run by these is known to a run alone, unless it is named there. Our own registries do so too, and
# what they import is found by name.
_DYNAMIC = ("import_module", "__import__", "run_module", "run_path")
_DYNAMIC_ALONE = ("exec", "eval")
_REGISTRIES = "q4kd.harness."
_MENTIONS = (ast.Import, ast.ImportFrom, ast.Constant)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Program:
    """The modules of the packages under test, as they are installed now.

    Args:
        packages: the top-level packages whose modules count; those of others count by their versions.
        trees: where modules are read.
    """

    def __init__(self, packages: Iterable[str], trees: SyntaxTrees = TREES) -> None:
        self._packages, self._trees = frozenset(packages), trees
        self._edges: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self._mentioned: dict[str, list[tuple[ast.AST, bool]]] = {}
        self._digests: dict[str, str] = {}

    def of_experiment(self, closure: Closure, words: Iterable[str]) -> frozenset[str]:
        """Return the modules that the runs of an experiment, and the making of its inputs, may execute.

        Args:
            closure: of the experiment, of which the definitions themselves are counted elsewhere.
            words: the arguments of its runs, after the launcher's ``--``.
        """
        texts = {*words, *closure.texts, *(text for item in closure.definitions for text in item.reading.strings)}
        roots = {*_RECORDERS, *(name for text in texts for name in self._named(text))}
        for definition in closure.definitions:
            roots |= self._imported_by(definition)
        roots -= {definition.module.name for definition in closure.definitions}
        commands = {self.commands[text] for text in texts & self.commands.keys()}
        # The parser of the command line is made by all commands, whichever is asked for.
        started = self.loaded_by({*_DISPATCHERS, *self.commands.values()}) if commands else frozenset()
        return self.reach(roots, lambda name: not name.startswith(_NOT_THROUGH)) | self.reach(commands) | started

    def reach(self, roots: Iterable[str], through: Callable[[str], bool] = lambda _: True) -> frozenset[str]:
        """Return these modules, and all that they import anywhere, directly or not, as far as ``through`` is true."""
        return self._follow(roots, lambda name: self._edges_of(name)[1], through)

    def loaded_by(self, roots: Iterable[str]) -> frozenset[str]:
        """Return these modules and those that are loaded with them: what they import outside functions."""
        return self._follow(roots, lambda name: self._edges_of(name)[0], lambda _: True)

    def digest(self, name: str) -> str:
        """Return the SHA-256 of what a module says: its normal form, what it imports, its annotations, its files.

        Comments, docstrings and layout do not count. The files beside a package's modules, such as CUDA sources, do.
        """
        if name not in self._digests:
            tree = self._trees.module(name)
            parts = [] if tree is None else tree.read(tree.tree).text
            parts += [ast.dump(node) for node, _ in self._mentions(name) if not isinstance(node, ast.Constant)]
            parts += [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in _files_beside(name)]
            self._digests[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return self._digests[name]

    @cached_property
    def commands(self) -> dict[str, str]:
        """The module of every command of ``q4kd``, by the command's name."""
        found: dict[str, str] = {}
        for package in _COMMAND_PACKAGES:
            for name in _modules_of(package):
                tree = self._trees.module(name)
                found |= dict.fromkeys(_commands_in(tree.tree), name) if tree is not None else {}
        return found

    def _follow(
        self, roots: Iterable[str], edges: Callable[[str], Iterable[str]], through: Callable[[str], bool]
    ) -> frozenset[str]:
        seen: set[str] = set()
        waiting = [name for root in roots for name in self._with_packages(root)]
        while waiting:
            name = waiting.pop()
            if name not in seen and through(name):
                seen.add(name)
                waiting += edges(name)
        return frozenset(seen)

    def _edges_of(self, name: str) -> tuple[frozenset[str], frozenset[str]]:
        """Return what is imported when a module is loaded, and all that it imports or names anywhere."""
        if name not in self._edges:
            loaded: set[str] = set()
            anywhere: set[str] = set()
            for node, inside in self._mentions(name):
                found = set(self._imported(name, node))
                anywhere |= found
                loaded |= set() if inside else found
            for text in {text for node, _ in self._mentions(name) if (text := _text(node)) is not None}:
                anywhere |= set(self._named(text))
            if any(_is_dynamic(node) for node, _ in self._mentions(name)) and not name.startswith(_REGISTRIES):
                anywhere |= set(_modules_of(TRAINER if name.startswith(TRAINER) else top_level(name)))
            self._edges[name] = frozenset(loaded), frozenset(anywhere)
        return self._edges[name]

    def _mentions(self, name: str) -> list[tuple[ast.AST, bool]]:
        """Return what of a module matters beside its normal form, with whether it stands in a function."""
        if name not in self._mentioned:
            tree = self._trees.module(name)
            self._mentioned[name] = [] if tree is None else list(_walk(tree.tree))
        return self._mentioned[name]

    def _imported(self, module: str, node: ast.AST) -> Iterator[str]:
        tree = self._trees.module(module)
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield from self._with_packages(alias.name)
            case ast.ImportFrom(names=names) if tree is not None:
                origin = _absolute(tree, node)
                for alias in names:
                    yield from self._with_packages(f"{origin}.{alias.name}" if alias.name != "*" else origin)

    def _named(self, text: str) -> Iterator[str]:
        """Yield the modules that a text names, as ``package.module`` or ``package.module:Name``."""
        match = _MODULE.fullmatch(text) if len(text) < 200 else None
        found = [] if match is None else list(self._with_packages(match[1]))
        if match is not None and match[1] in found:
            yield from found

    def _with_packages(self, name: str) -> Iterator[str]:
        """Yield a module of ours and the packages it lies in, which run first; what is no module is left out."""
        if top_level(name) not in self._packages:
            return
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            tree = self._trees.module(module)
            if tree is None:
                return
            yield module
            if not tree.is_package:  # to look for more below it would import it
                return

    def _imported_by(self, definition: Definition) -> set[str]:
        """Return the modules of ours that a definition takes something from."""
        imports = {**definition.module.imports, **definition.reading.imports}
        found: set[str] = set()
        for name in definition.names:
            if (origin := imports.get(name[0])) is not None:
                found |= set(self._with_packages(".".join(filter(None, (origin.module, origin.name, *name[1:])))))
        return found.union(*(self._with_packages(star) for star in definition.module.stars))


def source_files(packages: Iterable[str]) -> Iterator[Path]:
    """Yield every file of the packages under test, of ours those that a run may reach."""
    for package in sorted(packages):
        for name in ("q4kd.harness", TRAINER) if package == "q4kd" else (package,):
            for folder in _folders(name):
                yield from (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def _walk(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """Yield imports, texts, what a function's annotations say, and calls that may import anything.

    The normal form has neither imports nor these annotations, and a program may read both. Written out, because
    ``ast.walk`` takes four times as long, and every module of the program is read on every run.
    """
    waiting: list[tuple[Any, bool]] = [(tree, False)]
    while waiting:
        node, inside = waiting.pop()
        kind = node.__class__
        if kind in _MENTIONS or (kind is ast.Call and _may_import(node)):
            yield node, inside
        elif kind is ast.arg and node.annotation is not None:
            yield node.annotation, inside
        elif kind in _FUNCTIONS:
            inside = True
            if node.returns is not None:
                yield node.returns, inside
        for field in kind._fields:
            value = getattr(node, field, None)
            if value.__class__ is list:
                waiting += [(item, inside) for item in value if isinstance(item, ast.AST)]
            elif field != "ctx" and isinstance(value, ast.AST):
                waiting.append((value, inside))


def _may_import(node: ast.Call) -> bool:
    function = dotted(node.func)
    return bool(function) and (function[-1] in _DYNAMIC or (len(function) == 1 and function[0] in _DYNAMIC_ALONE))


def _is_dynamic(node: ast.AST) -> bool:
    """Say whether a call imports what it does not name."""
    named = isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    return isinstance(node, ast.Call) and _may_import(node) and not named


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _absolute(tree: Module, node: ast.ImportFrom) -> str:
    package = tree.name if tree.is_package else tree.name.rpartition(".")[0]
    name = "." * node.level + (node.module or "")
    return importlib.util.resolve_name(name, package) if node.level else name


def _commands_in(tree: ast.Module) -> Iterator[str]:
    """Yield the commands that a module's ``add_commands(subparsers)`` adds."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="subparsers"), attr="add_parser"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def _folders(package: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


def _modules_of(package: str) -> list[str]:
    """Return a package and all modules below it."""
    found = [package]
    for folder in _folders(package):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append(".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts))))
    return found


def _files_beside(module: str) -> list[Path]:
    """Return the files of a package and of the folders in it that are no modules, such as CUDA sources.

    Packages that only hold others, such as ``q4kd.trainer``, have none that a run reads.
    """
    if module.count(".") < 2:
        return []
    folders = [inner for folder in _folders(module) for inner in (folder, *filter(Path.is_dir, folder.iterdir()))]
    files = (path for folder in folders if folder.name != "__pycache__" for path in sorted(folder.iterdir()))
    return [path for path in files if path.is_file() and path.suffix not in (".py", ".pyc") and path.name[0] != "."]
