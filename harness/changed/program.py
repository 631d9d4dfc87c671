"""The modules that a run executes, found by following imports, and a digest of what each says.

It errs to the safe side: a module that is imported anywhere in a module that runs counts whole, in functions too; a
text that names a module counts as its import; and where a module imports what only a run can tell, all of its package
count.
"""

import ast
import hashlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

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
_EDGES = (ast.Import, ast.ImportFrom, ast.Constant, ast.Call)


class Program:
    """The modules of the packages under test, as they are installed now.

    Args:
        packages: the top-level packages whose modules count; those of others count by their versions.
        trees: where modules are read.
    """

    def __init__(self, packages: Iterable[str], trees: SyntaxTrees = TREES) -> None:
        self._packages, self._trees = frozenset(packages), trees
        self._edges: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
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
            parts = [] if tree is None else [*tree.read(tree.tree).text, *_imports(tree), *_annotations(tree)]
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
            tree = self._trees.module(name)
            loaded: set[str] = set()
            anywhere: set[str] = set()
            waiting: list[tuple[ast.AST, bool]] = [] if tree is None else [(tree.tree, False)]
            while waiting and tree is not None:
                node, inside = waiting.pop()
                if isinstance(node, _EDGES):
                    found = set(self._edges_by(tree, node))
                    anywhere |= found
                    loaded |= found if not inside and isinstance(node, ast.Import | ast.ImportFrom) else set()
                inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                waiting += [(child, inside) for child in ast.iter_child_nodes(node)]
            self._edges[name] = frozenset(loaded), frozenset(anywhere)
        return self._edges[name]

    def _edges_by(self, tree: Module, node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield from self._with_packages(alias.name)
            case ast.ImportFrom(names=names):
                module = _absolute(tree, node)
                for alias in names:
                    yield from self._with_packages(f"{module}.{alias.name}" if alias.name != "*" else module)
            case ast.Constant(value=str(text)):
                yield from self._named(text)
            case ast.Call(func=function, args=arguments) if _is_dynamic(dotted(function)):
                told = bool(arguments) and isinstance(arguments[0], ast.Constant)
                if not told and not tree.name.startswith(_REGISTRIES):
                    yield from _modules_of(TRAINER if tree.name.startswith(TRAINER) else top_level(tree.name))

    def _named(self, text: str) -> Iterator[str]:
        """Yield the modules that a text names, as ``package.module`` or ``package.module:Name``."""
        match = _MODULE.fullmatch(text) if len(text) < 200 else None
        if match is not None and self._trees.module(match[1]) is not None:
            yield from self._with_packages(match[1])

    def _with_packages(self, name: str) -> Iterator[str]:
        """Yield a module of ours and the packages it lies in, which run first; what is no module is left out."""
        if top_level(name) not in self._packages:
            return
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if self._trees.module(module) is None:
                return
            yield module

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


def _is_dynamic(function: tuple[str, ...]) -> bool:
    return bool(function) and (function[-1] in _DYNAMIC or (len(function) == 1 and function[0] in _DYNAMIC_ALONE))


def _absolute(tree: Module, node: ast.ImportFrom) -> str:
    package = tree.name if tree.is_package else tree.name.rpartition(".")[0]
    name = "." * node.level + (node.module or "")
    return importlib.util.resolve_name(name, package) if node.level else name


def _imports(tree: Module) -> list[str]:
    """Return every import statement anywhere in a module, in order: the normal form leaves them out."""
    nodes = (node for node in ast.walk(tree.tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return [ast.dump(node) for node in nodes]


def _annotations(tree: Module) -> list[str]:
    """Return the annotations of functions, which the normal form leaves out and a program may read."""
    nodes = list(ast.walk(tree.tree))
    given = [node.annotation for node in nodes if isinstance(node, ast.arg) and node.annotation is not None]
    given += [node.returns for node in nodes if isinstance(node, ast.FunctionDef) and node.returns is not None]
    return [ast.dump(annotation) for annotation in given]


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
    places = [str(folder) for folder in _folders(package)]
    return [package, *(found.name for found in pkgutil.walk_packages(places, f"{package}."))]


def _files_beside(module: str) -> list[Path]:
    """Return the files of a package and of the folders in it that are no modules, such as CUDA sources.

    Packages that only hold others, such as ``q4kd.trainer``, have none that a run reads.
    """
    if module.count(".") < 2:
        return []
    folders = [inner for folder in _folders(module) for inner in (folder, *filter(Path.is_dir, folder.iterdir()))]
    files = (path for folder in folders if folder.name != "__pycache__" for path in sorted(folder.iterdir()))
    return [path for path in files if path.is_file() and path.suffix not in (".py", ".pyc") and path.name[0] != "."]
