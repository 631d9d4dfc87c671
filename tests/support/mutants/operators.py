"""Mutants of a module: what can be changed in its syntax tree, one change at a time.

A mutant replaces one stretch of the source text, so everything else stays as it was written. Not planted is what
changes no behaviour (``exclusions``): annotations, docstrings, texts of errors, ``__repr__``, blocks for type checkers.
"""

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mutants import exclusions

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}  # fmt: skip
_SHOWN = 120


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        module: path from the root of the checkout, such as ``trainer/loss/fused.py``.
        function: qualified name of the definition it lies in, empty for the module itself.
        operator: its kind, such as ``comparison``.
        start, end: offsets in bytes of the stretch that it replaces.
        line: line of ``start``, from 1.
        lines: first and last line of the statement, or of its header, that the change is part of.
        original, mutant: what is changed, for people.
        text: what stands in the place of the stretch.
        key: a short name; it stays the same when other places of the module change.
    """

    module: str
    function: str
    operator: str
    start: int
    end: int
    line: int
    lines: tuple[int, int]
    original: str
    mutant: str
    text: str = field(repr=False)
    key: str = ""

    @property
    def site(self) -> tuple[str, int, int, str]:
        """The place and kind of the change: mutants of one site are variants of each other."""
        return self.module, self.start, self.end, self.operator

    def apply(self, source: bytes) -> bytes:
        """Return the module's bytes with the change made."""
        return source[: self.start] + self.text.encode() + source[self.end :]


CONTROL = "control"
_EVERY_LINE = (0, 1 << 30)


def controls(module: str, count: int) -> list[Mutant]:
    """Return mutants that change nothing and ask every claim that executes a line of a module."""
    return [
        Mutant(module, "", CONTROL, 0, 0, 0, _EVERY_LINE, "", f"nothing, {n}", "", f"control-{n}")
        for n in range(1, count + 1)
    ]


def plan_mutants(module: str, source: bytes) -> list[Mutant]:
    """Return every mutant of a module that compiles, in the order of the source.

    Args:
        module: its path from the root of the checkout.
        source: its bytes, UTF-8.
    """
    tree = ast.parse(source)
    planner = _Planner(module, source)
    for statement in tree.body:
        planner.top(statement)
    unique = {(mutant.site, mutant.text): (mutant, top) for mutant, top in planner.found}
    found: list[Mutant] = []
    same: Counter[tuple[str, ...]] = Counter()
    for mutant, top in unique.values():
        words = (module, mutant.function, mutant.operator, mutant.original, mutant.text)
        same[words] += 1
        # Compiling the statement of the module that it lies in takes a tenth of compiling the module.
        if _compiles(source[top.start : mutant.start] + mutant.text.encode() + source[mutant.end : top.stop]):
            key = hashlib.sha256(repr((*words, same[words])).encode()).hexdigest()[:16]
            found.append(replace(mutant, key=key))
    return found


def _compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


class _Planner:
    """Walks one module and collects its mutants."""

    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.found: list[tuple[Mutant, slice]] = []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._lines = (1, 1)
        self._top = slice(0, 0)

    def top(self, statement: ast.stmt) -> None:
        """Collect the mutants of a statement of the module, each beside the stretch of that statement."""
        assert statement.end_lineno is not None and statement.end_col_offset is not None
        end = self._offset(statement.end_lineno, statement.end_col_offset)
        self._top = slice(self._offset(statement.lineno, statement.col_offset), end)
        self._statement(statement)

    # --- statements ---

    def _body(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        self._lines = (node.lineno, _last_line_of_header(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._definition(node)
        elif isinstance(node, ast.If | ast.While):
            self._branch(node)
        elif isinstance(node, ast.AugAssign):
            self._augmented(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            self._assignment(node)
        elif isinstance(node, ast.Return):
            self._returned(node)
        elif isinstance(node, ast.Expr):
            if isinstance(node.value, ast.Call) and not exclusions.is_release(node.value):
                self._add("statement", node, "pass", "(dropped)")
            self._expression(node.value)
        elif isinstance(node, ast.Continue):
            self._add("branch", node, "break")
        elif not isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.Delete):
            self._compound(node)

    def _compound(self, node: ast.stmt) -> None:
        """Walk loops, ``with``, ``try`` and ``match``: their expressions belong to their headers."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._expression(child)
            elif isinstance(child, ast.withitem):
                self._expression(child.context_expr)
            elif isinstance(child, ast.stmt):
                self._statement(child)
            elif isinstance(child, ast.ExceptHandler | ast.match_case):
                self._body(child.body)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        if node.name in exclusions.SHOWN_ONLY | exclusions.GPU_FUNCTIONS:
            return
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                self._expression(default)
        self._scope.append(node.name)
        self._body(node.body)
        self._scope.pop()

    def _branch(self, node: ast.If | ast.While) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            self._body(node.orelse)
            return
        test = self._text(node.test)
        self._add("branch", node.test, f"not ({test})")
        if exclusions.needs_gpu(node.test):
            self._body(node.orelse)
            return
        if isinstance(node, ast.If) and not node.orelse:
            self._add("branch", node.test, f"False and ({test})", "False")
        self._expression(node.test)
        self._body(node.body)
        self._body(node.orelse)

    def _assignment(self, node: ast.Assign | ast.AnnAssign) -> None:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        if node.value is None or (not self._scope and exclusions.is_performance_only(self.module, names)):
            return
        if self._scope and not names and all(isinstance(t, ast.Attribute | ast.Subscript) for t in targets):
            self._add("statement", node, "pass", "(dropped)")
        self._expression(node.value)

    def _augmented(self, node: ast.AugAssign) -> None:
        self._add("statement", node, "pass", "(dropped)")
        if (other := _ARITHMETIC.get(type(node.op))) is not None and not _is_text(node.value):
            self._add("arithmetic", node, ast.unparse(ast.AugAssign(node.target, other(), node.value)))
        self._expression(node.value)

    def _returned(self, node: ast.Return) -> None:
        value = node.value
        if value is None:
            return
        if not (isinstance(value, ast.Constant) and value.value is None):
            self._add("return value", value, "None")
        if isinstance(value, ast.Tuple) and len(value.elts) > 1:
            turned = ", ".join(self._text(item) for item in (value.elts[1], value.elts[0], *value.elts[2:]))
            self._add("return value", value, f"({turned})", f"({turned})")
        self._expression(value)

    # --- expressions ---

    def _expression(self, node: ast.AST) -> None:
        if isinstance(node, ast.JoinedStr):
            return
        for variant in self._variants(node):
            self._add(*variant)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.keyword):
                if child.arg not in exclusions.KEYWORDS:
                    self._expression(child.value)
            elif isinstance(child, ast.comprehension):
                for part in (child.iter, *child.ifs):
                    self._expression(part)
                for condition in child.ifs:
                    self._add("branch", condition, f"not ({self._text(condition)})")
            elif isinstance(child, ast.expr | ast.Slice | ast.arguments):
                self._expression(child)

    def _variants(self, node: ast.AST) -> Iterator[tuple[str, ast.expr, str] | tuple[str, ast.expr, str, str]]:
        match node:
            case ast.Compare():
                yield from self._comparison(node)
            case ast.BinOp() if type(node.op) in _ARITHMETIC and not (_is_text(node.left) or _is_text(node.right)):
                yield (
                    "arithmetic",
                    node,
                    f"({ast.unparse(ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right))})",
                )
            case ast.BoolOp():
                other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
                yield "boolean", node, f"({ast.unparse(ast.BoolOp(other, node.values))})"
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
                kind = "boolean" if isinstance(node.op, ast.Not) else "arithmetic"
                yield kind, node, f"({self._text(node.operand)})"
            case ast.IfExp():
                exchanged = ast.IfExp(node.test, node.orelse, node.body)
                yield "branch", node, f"({ast.unparse(exchanged)})"
            case ast.Constant():
                yield from ((kind, node, text) for kind, text in _constants(node.value))
            case ast.Call():
                yield from self._call(node)

    def _comparison(self, node: ast.Compare) -> Iterator[tuple[str, ast.expr, str]]:
        for index, operation in enumerate(node.ops):
            for other in _COMPARISONS[type(operation)]:
                ops = [*node.ops[:index], other(), *node.ops[index + 1 :]]
                yield "comparison", node, f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})"

    def _call(self, node: ast.Call) -> Iterator[tuple[str, ast.expr, str, str]]:
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is not None and keyword.arg not in exclusions.KEYWORDS:
                fewer = copy.copy(node)
                fewer.keywords = [*node.keywords[:index], *node.keywords[index + 1 :]]
                yield "dropped argument", node, ast.unparse(fewer), f"without {self._text(keyword)}"
        if exclusions.is_symmetric(node):
            return
        for index, (first, second) in enumerate(zip(node.args, node.args[1:], strict=False)):
            names = ast.Name | ast.Attribute | ast.Subscript
            if isinstance(first, names) and isinstance(second, names) and ast.dump(first) != ast.dump(second):
                turned = copy.copy(node)
                turned.args = [*node.args[:index], second, first, *node.args[index + 2 :]]
                shown = f"{self._text(node.func)}(… {self._text(second)}, {self._text(first)} …)"
                yield "exchanged arguments", node, ast.unparse(turned), shown

    # --- text ---

    def _offset(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _text(self, node: ast.expr | ast.stmt | ast.keyword) -> str:
        assert node.end_lineno is not None and node.end_col_offset is not None
        stretch = slice(self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset))
        text = self.source[stretch].decode()
        # Inside parentheses a line may end anywhere; outside them the text must stand on one.
        return text if "\n" not in text else ast.unparse(node)

    def _add(self, operator: str, node: ast.expr | ast.stmt, text: str, shown: str | None = None) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, end = self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)
        original, mutant = (" ".join(words.split())[:_SHOWN] for words in (self._text(node), shown or text))
        where = (self.module, ".".join(self._scope), operator, start, end, node.lineno, self._lines)
        self.found.append((Mutant(*where, original, mutant, text), self._top))


def _last_line_of_header(node: ast.stmt) -> int:
    """Return the last line of a statement, or of what stands before the body of a compound one."""
    last = node.end_lineno or node.lineno
    body = getattr(node, "body", None) or getattr(node, "cases", None)
    if not body:
        return last
    first = body[0] if isinstance(body[0], ast.stmt) else body[0].pattern
    return max(node.lineno, first.lineno - 1)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _constants(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool):
        yield "boolean", str(not value)
    elif isinstance(value, int | float):
        others = {"off by one": value + 1, "times two": value * 2, "zero": type(value)(0)}
        seen: set[float] = {value}
        for other in others.values():
            if other not in seen:
                seen.add(other)
                yield "constant", repr(other)
